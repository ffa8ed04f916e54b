"""A stage that turns out longer than planned: what is left of its schedule is stretched over what is left of it."""

import bisect
from collections.abc import Sequence

Stretches = Sequence[Sequence[int]]  # (steps that were done, total that was expected from there on) in turn


def planned_step(step: int, total: int, stretches: Stretches) -> float:
    """The step of the plan of `total` steps whose learning rate optimizer step `step` takes."""
    position, since, pace = 0.0, 0, 1.0
    for done, longer in stretches:
        if done >= step:
            break
        position += (done - since) * pace
        since, pace = done, max(0.0, total - position) / (longer - done)
    return round(position + (step - since) * pace, 9) if stretches else step


def last_step(planned: int, total: int, stretches: Stretches) -> int:
    """The last optimizer step that is not past a step of the plan."""
    if not stretches:
        return planned
    steps = range(stretches[-1][1] + 1)
    return bisect.bisect_right(steps, float(planned), key=lambda step: planned_step(step, total, stretches)) - 1
