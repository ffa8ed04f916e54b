"""The mathematics of a step: losses, distillation and alignment, how mixers start, which layers stay."""
