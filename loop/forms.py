"""The forms that pass between loop, steps and checkpoints: where a run stands, a stage, figures."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from data import Batch
from hardware.ranks import Ranks
from optim.stretch import last_step

Sums = dict[str, torch.Tensor]  # figures of a batch, summed over its valid tokens
MicroStep = Callable[[Batch, torch.Tensor], Sums]  # forward and backward, gradients times a scale


@dataclass
class Progress:
    """Where a run stands: everything that a checkpoint must hold beside weights, optimizer and RNG."""

    stage: str = ""
    stage_step: int = 0  # optimizer steps done in this stage
    stage_done: bool = False
    stage_total: int = 0  # as planned
    stage_warmup: int = 0  # of its steps
    stage_cooled: int = 0  # steps done in its cooldown
    stage_expected: int = 0  # where it turned out otherwise (--epochs)
    stage_stretches: list[list[int]] = field(default_factory=list)  # see optim/stretch.py
    optimizer_step: int = 0  # counted on through all stages
    micro_step: int = 0
    tokens: int = 0  # seq_length a sequence, all ranks, all stages
    stage_tokens: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)  # the last held-out figures, with their step
    best: dict[str, float] = field(default_factory=dict)  # those of the lowest KL
    loader: dict[str, Any] = field(default_factory=dict)  # loader state at the next window's start
    meter: dict[str, float] = field(default_factory=dict)  # sums since the last log line

    def begin(self, stage: str, total: int) -> None:
        """Enter a stage anew: its counters start at 0, the run's go on."""
        self.stage, self.stage_step, self.stage_done, self.stage_total = stage, 0, False, total
        self.stage_cooled, self.stage_tokens, self.loader, self.meter = 0, 0, {}, {}
        self.stage_expected, self.stage_stretches = 0, []

    @property
    def stage_end(self) -> int:
        """Optimizer steps of the stage, as far as is known."""
        return max(self.stage_expected or self.stage_total, self.stage_step)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Stage:
    """One run of the loop over one data source."""

    name: str
    loader: Any  # yields data.Batch; has state_dict() and waited_seconds
    micro_step: MicroStep
    trainable: nn.Module  # holds the parameters that the optimizer updates
    optimizer: torch.optim.Optimizer
    schedule: Any
    total_steps: int
    accumulation: int = 1
    warmup: int = 0  # of the steps
    stable_end: int | None = None  # planned steps before the cooldown, where a longer run goes on from
    grad_clip: float = 1.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ahead: bool = False  # the next batch is there, too, when a micro step begins: its teacher may start on it
    scaler: Any = None  # torch.amp.GradScaler under float16
    open_ended: bool = False  # the loader's end, not total_steps, ends the stage (--epochs)
    stretches: list[list[int]] = field(default_factory=list)  # of its schedule, where it turns out longer
    ranks: Ranks = field(default_factory=Ranks)
    synchronise: Callable[[bool], None] = lambda last: None  # gradients are averaged in the last micro step
    average_gradients: Callable[[], None] = lambda: None  # before clipping: average what no wrapper averages
    without_gradient: dict[str, str] = field(default_factory=dict)  # see gradient_check.without_gradient

    @property
    def stable_step(self) -> int | None:
        """`stable_end`, in a schedule that may have been stretched."""
        return None if self.stable_end is None else last_step(self.stable_end, self.total_steps, self.stretches)

    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.trainable.parameters() if p.requires_grad]

    def close(self) -> None:
        """Take off what the optimizer has hung on the parameters; the next stage trains some of them too."""
        if hasattr(self.optimizer, "close"):
            self.optimizer.close()
