"""What the loop measures: figures between log lines, and updates that were skipped.

Nothing here makes the CPU wait within a step: figures are sums on the device, copied to the host when a log line is
due and read a step later, when they have long arrived.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data import Batch
from loop.forms import Progress, Stage, Sums
from text.mixture import source_shares

log = logging.getLogger(__name__)


OWN_FIGURES = ("grad_norm", "bad", "steps", "loss_max", "grad_norm_max")  # not summed over ranks


class TooManyBadSteps(RuntimeError):
    """`--max_bad_steps` optimizer steps in a row had a non-finite loss or gradient."""


class HostCopy:
    """Numbers on their way from the device to the host."""

    def __init__(self, values: torch.Tensor):
        self.values, self.event = values, None
        if values.is_cuda:
            self.values = values.to("cpu", non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def numbers(self) -> list[float]:
        """Waits until they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


@dataclass
class Reading:
    """A log line whose sums may still be on their way."""

    step: int
    names: list[str]
    sums: HostCopy
    known: dict[str, Any]

    def figures(self) -> dict[str, Any]:
        """Means over tokens or steps, and what was known at once."""
        sums = dict(zip(self.names, self.sums.numbers()))
        tokens, steps = max(sums["tokens"], 1.0), max(sums["steps"], 1.0)
        shared = [name for name in self.names if name not in OWN_FIGURES and name != "tokens"]
        figures: dict[str, Any] = {name if "/" in name else f"train/{name}": sums[name] / tokens for name in shared}
        for name in [name for name in figures if "/squared_error_" in name]:
            figures[name.replace("/squared_", "/relative_")] = math.sqrt(figures.pop(name))
        figures["train/grad_norm"] = sums["grad_norm"] / steps
        figures["train/loss_max"], figures["train/grad_norm_max"] = sums["loss_max"], sums["grad_norm_max"]
        return figures | self.known


class Meter:
    """Means over the optimizer steps since the last log line; sums stay on the device until they are read.

    Beside them the largest loss (of this rank's tokens) and gradient norm of a single step, which show a spike.
    """

    def __init__(self, progress: "Progress", stage: "Stage"):
        self.progress, self.stage = progress, stage
        self.sums: dict[str, Any] = self._own_share(progress.meter)
        self.rate = 0.0
        self.restart()

    def restart(self) -> None:
        self.since = time.perf_counter()
        self.waited = self.stage.loader.waited_seconds
        self.steps = 0
        self.first_tokens = self.progress.tokens

    def add(self, sums: Sums, norm: torch.Tensor, bad: torch.Tensor, rate: float) -> None:
        step = {**sums, "grad_norm": norm, "bad": bad, "steps": torch.ones_like(norm)}
        for name, value in step.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()
        for name, value in (("loss_max", sums["loss"] / sums["tokens"].clamp(min=1.0)), ("grad_norm_max", norm)):
            value, before = value.detach().double(), self.sums.get(name, -math.inf)
            self.sums[name] = torch.maximum(value, before) if torch.is_tensor(before) else value.clamp(min=before)
        self.rate = rate
        self.steps += 1

    def pause(self, work: Callable[[], None]) -> None:
        """Do something that is no part of a step's time, such as an evaluation."""
        began = time.perf_counter()
        work()
        self.since += time.perf_counter() - began

    def totals(self) -> dict[str, float]:
        """The sums over all ranks as plain numbers (waits for the device), so that a checkpoint can hold them."""
        totals = dict(zip(self.sums, HostCopy(self._over_ranks()).numbers()))
        self.sums = self._own_share(totals)
        return totals

    def read(self) -> Reading:
        """The figures of a log line, for later; starts the next interval."""
        reading = Reading(self.progress.optimizer_step, list(self.sums), HostCopy(self._over_ranks()), self._known())
        self.sums = {}
        self.restart()
        return reading

    def _over_ranks(self) -> torch.Tensor:
        """The sums as one float64 tensor, those of tokens summed over ranks."""
        device = self.stage.device
        values = [torch.as_tensor(value, dtype=torch.float64) for value in self.sums.values()]
        if not values:
            return torch.zeros(0, dtype=torch.float64, device=device)
        own = torch.stack([value.to(device, non_blocking=True) for value in values])
        if self.stage.ranks.alone:
            return own
        total = self.stage.ranks.sum(own).unbind()
        return torch.stack([o if name in OWN_FIGURES else t for name, o, t in zip(self.sums, own.unbind(), total)])

    def _own_share(self, totals: dict[str, float]) -> dict[str, Any]:
        """This rank's start from sums over all ranks: the first has them, others 0, so that they count once."""
        if self.stage.ranks.is_first:
            return dict(totals)
        return {name: value if name in OWN_FIGURES else 0.0 for name, value in totals.items()}

    def _known(self) -> dict[str, Any]:
        """What a log line says beside the sums."""
        progress = self.progress
        elapsed = time.perf_counter() - self.since
        seconds = elapsed / max(self.steps, 1)
        return {
            "train/lr": self.rate,
            "train/tokens": progress.tokens,
            "train/optimizer_step": progress.optimizer_step,
            "train/tokens_per_second": (progress.tokens - self.first_tokens) / max(elapsed, 1e-9),
            "train/bad_steps": progress.bad_steps,
            "perf/step_seconds": seconds,
            "perf/eta_seconds": (progress.stage_end - progress.stage_step) * seconds,
            "perf/peak_memory_gib": peak_memory_gib(self.stage.device),
            **self._waiting(),
            **{f"data/share/{name}": share for name, share in source_shares(progress.loader).items()},
            "stage": progress.stage,
            "stage_step": progress.stage_step,
            "stage_total": progress.stage_end,
        }

    def _waiting(self) -> dict[str, float]:
        """Seconds a step of waiting for data: the slowest rank's, and each rank's where there are several."""
        own = (self.stage.loader.waited_seconds - self.waited) / max(self.steps, 1)
        every = self.stage.ranks.gather(own)
        each = {f"data/wait_seconds_rank_{rank}": seconds for rank, seconds in enumerate(every)}
        return {"data/wait_seconds": max(every), **(each if len(every) > 1 else {})}


class BadStepWatch:
    """Counts skipped updates. On a GPU the flag is read one step late, so that the CPU never waits for it."""

    def __init__(self, progress: "Progress", limit: int):
        self.progress, self.limit = progress, limit
        self.pending: tuple[HostCopy, int, list[str]] | None = None

    def push(self, bad: torch.Tensor, window: list[Batch]) -> None:
        documents = sorted({name for batch in window for name in batch.document_ids})
        self.flush()
        flag = HostCopy(bad.view(1))
        self.pending = (flag, self.progress.optimizer_step, documents)
        if flag.event is None:
            self.flush()

    def flush(self) -> None:
        if self.pending is None:
            return
        flag, step, documents = self.pending
        self.pending = None
        if not flag.numbers()[0]:
            self.progress.bad_in_a_row = 0
            return
        self.progress.bad_steps += 1
        self.progress.bad_in_a_row += 1
        names = ", ".join(documents[:8]) + (f" and {len(documents) - 8} more" if len(documents) > 8 else "")
        log.warning("step %d: non-finite loss or gradient, update skipped; documents: %s", step, names)
        if self.progress.bad_in_a_row >= self.limit:
            raise TooManyBadSteps(
                f"{self.limit} optimizer steps in a row had a non-finite loss or gradient, the last one step {step}; "
                "try a lower --max_lr, a smaller --grad_clip or --dtype float32"
            )


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated on a CUDA device, resident set of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
