"""Warm-up, stable, decay: the learning rate over a stage's optimizer steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def build_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, *, max_lr: float, min_lr: float,
    warmup_ratio: float, decay_ratio: float,
) -> LambdaLR:  # fmt: skip
    """pytorch-optimizer's WSD schedule over optimizer steps, shifted by one: step k (from 1) takes multiplier k.

    The library's first multiplier is 0, which would waste the first step; its last is `min_lr`. The cooldown is the
    library's default, floored at `min_lr`; past the end the rate stays there.
    """
    warmup, decay = round(total_steps * warmup_ratio), round(total_steps * decay_ratio)
    multiplier = wsd_multiplier(total_steps, min(warmup, total_steps), decay, min_lr / max_lr)
    return LambdaLR(optimizer, lambda done: multiplier(done + 1))


def wsd_multiplier(total: int, warmup: int, decay: int, floor: float) -> Callable[[int], float]:
    """multiplier(k) of optimizer step k, counted from 1, from pytorch-optimizer's own schedule."""
    from pytorch_optimizer.lr_scheduler import get_wsd_schedule

    decay = min(decay, total - warmup)
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    library: Any = get_wsd_schedule(probe, warmup, total - warmup - decay, decay, min_lr_ratio=floor)

    def multiplier(step: int) -> float:
        if step >= total:
            return 1.0 if step == total == 1 else floor
        return max(floor, library.lr_lambdas[0](step))

    return multiplier
