"""The mathematics of a step: losses, distillation and alignment steps, how mixers start, which layers stay."""
