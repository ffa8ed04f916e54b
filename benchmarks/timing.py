"""Clocks of the benchmarks: a median time, a peak of memory, the parts of a step, the ceiling of matrix products."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

GIB = 2**30
HEAD_START = 20_000_000  # clock ticks that the device sleeps while the host queues a run: about 10 ms
PARTS = ("data", "teacher", "student", "loss", "backward", "optimizer")


def milliseconds(run: Callable[[], Any], cuda: bool, repeats: int, ahead: bool = False, warmup: int = 4) -> float:
    """Median time of `run` in ms; ahead: all of it is queued before the device starts on it."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if ahead:
                torch.cuda._sleep(HEAD_START)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def extra_peak(run: Callable[[], Any], cuda: bool) -> float | None:
    """Peak memory in GiB that `run` adds to what is allocated already; None on the CPU, which does not count it."""
    if not cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def show(row: dict[str, Any]) -> None:
    """A row of figures as a line."""
    print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


class Clock:
    """Marks on the device's timeline; each names the part of the step that ends there."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        if not self.cuda:
            self.marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((name, event))

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of each part, a whole step a row."""
        if self.cuda:
            torch.cuda.synchronize()
        rows: list[dict[str, float]] = []
        row = dict.fromkeys(PARTS, 0.0)
        for (_, before), (name, after) in itertools.pairwise(self.marks):
            row[name] += before.elapsed_time(after) if self.cuda else 1000 * (after - before)
            if name == "optimizer":
                rows.append(row)
                row = dict.fromkeys(PARTS, 0.0)
        return rows


def matrix_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product on random data: 8192^3 on a GPU, 512^3 elsewhere."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    for _ in range(5):
        left @ right
    for _ in range(21):
        clock.mark("optimizer")
        left @ right
    clock.mark("optimizer")
    return 2.0 * size**3 / (statistics.median(row["optimizer"] for row in clock.steps()) / 1000)
