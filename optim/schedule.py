"""The learning rate of a stage: warm-up, stable phase and cooldown (WSD), a function of the optimizer step alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from optim.stretch import Stretches, planned_step


@dataclass(frozen=True)
class Phases:
    """Optimizer steps of a stage, and of its warm-up and cooldown."""

    total: int
    warmup: int
    cooldown: int

    @classmethod
    def of(cls, total: int, warmup_ratio: float, decay_ratio: float, warmup: int | None = None) -> "Phases":
        """The phases of `total` steps; `warmup`: its steps, in place of the ratio, for a stage that was extended."""
        warmup = min(round(total * warmup_ratio) if warmup is None else warmup, total)
        return cls(total, warmup, min(round(total * decay_ratio), total - warmup))

    @property
    def stable_end(self) -> int:
        """Steps before the cooldown: up to here a longer stage with the same warm-up takes the same rates."""
        return 1 if self.total == 1 else self.total - max(1, self.cooldown)


def build_schedule(
    optimizer: torch.optim.Optimizer,
    phases: Phases,
    *,
    max_lr: float,
    min_lr: float,
    done: int = 0,
    stretches: Stretches = (),
) -> LambdaLR:
    """pytorch-optimizer's WSD schedule over optimizer steps, shifted by one: step k (from 1) takes multiplier k.

    The library's first multiplier is 0, which would waste the first step; its last is `min_lr`. The cooldown is the
    library's default, floored at `min_lr`; past the end the rate stays there. `done`: steps taken before.
    stretches: those of the schedule (optim/stretch.py); one that is added later counts from then on.
    """
    multiplier = wsd_multiplier(phases, min_lr / max_lr)
    for group in optimizer.param_groups:
        group["initial_lr"] = max_lr
    planned = lambda before: multiplier(planned_step(before + 1, phases.total, stretches))  # noqa: E731
    return LambdaLR(optimizer, planned, last_epoch=done - 1)


def wsd_multiplier(phases: Phases, floor: float) -> Callable[[float], float]:
    """multiplier(k) of planned step k, counted from 1, from pytorch-optimizer's own schedule."""
    from pytorch_optimizer.lr_scheduler import get_wsd_schedule

    total, warmup, cooldown = phases.total, phases.warmup, phases.cooldown
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    library: Any = get_wsd_schedule(probe, warmup, total - warmup - cooldown, cooldown, min_lr_ratio=floor)

    def multiplier(step: float) -> float:
        if step >= total:
            return 1.0 if step == total == 1 else floor
        return max(floor, library.lr_lambdas[0](step))

    return multiplier
