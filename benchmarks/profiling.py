"""What a step's time on the device goes to, and where the host waits for the device."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch

# A kernel's name -> the kind of work, first match counts.
KINDS = {
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitK|cublas",
    "attention": r"flash|fmha|cudnn.*sdpa|attention",
    "optimizer": r"update_blocks|multi_tensor|adam|foreach",
    "compiled elementwise": r"triton",
    "copies": r"memcpy|memset|copy|fill",
    "other kernels": r"",
}


def kernel_table(run: Callable[[], Any], cuda: bool, rows: int = 25) -> str:
    """Kernels of one run by time, and their sums by kind with the time in which no kernel ran, as text."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    if not cuda:
        return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=60)
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not _is_note(event)
    ]
    return "\n".join([_kinds(spans), _longest(spans, rows)])


def _is_note(event: Any) -> bool:
    """True for a named region on the device's timeline, which holds kernels and is none."""
    named = event.name.startswith(("Optimizer.", "ProfilerStep", "Torch-Compiled", "CompiledFunction", "## "))
    return named or getattr(event, "is_user_annotation", False)


def _kinds(spans: list[tuple[float, float, str]]) -> str:
    sums = dict.fromkeys(KINDS, 0.0)
    for start, end, name in spans:
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
        sums[kind] += end - start
    first, last = min(s[0] for s in spans), max(s[1] for s in spans)
    busy = 0.0
    reached = first
    for start, end, _ in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    lines = [f"{kind}: {time / 1000:.1f} ms" for kind, time in sums.items()]
    return "; ".join([*lines, f"idle: {(last - first - busy) / 1000:.1f} ms", f"span {(last - first) / 1000:.1f} ms"])


def _longest(spans: list[tuple[float, float, str]], rows: int) -> str:
    totals: dict[str, list[float]] = {}
    for start, end, name in spans:
        totals.setdefault(name, []).append(end - start)
    ranked = sorted(totals.items(), key=lambda item: -sum(item[1]))[:rows]
    return "\n".join(f"{sum(t) / 1000:9.2f} ms {len(t):6d} x {name[:140]}" for name, t in ranked)


def host_waits(run: Callable[[], Any], cuda: bool) -> str:
    """The lines of Python at which the host waited for the device during a run, with how often."""
    if not cuda:
        return "host waits: none on the CPU"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places: dict[str, int] = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{warning.filename}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
    found = "\n".join(f"  {count} x {place}" for place, count in sorted(places.items(), key=lambda item: -item[1]))
    return f"host waits:\n{found or '  none'}"
