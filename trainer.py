"""The one training loop: `run_stage` drives every stage (matrix, hidden, and both KD stages) through its steps.

The loop knows nothing of flags, W&B or file names. It is handed a `Stage` (what to do in a micro step, on which
batches, with which optimizer and schedule), a `Progress` (where the run stands) and a `Services` (who is told).

Words: a *micro step* is one forward/backward of one batch, an *optimizer step* one update after a *window* of
`accumulation` micro steps. Nothing in a micro step makes the CPU wait for the GPU.
"""

import itertools
import logging
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data import Batch
from hardware.ranks import RankFailed, SharedMistake
from loop.forms import Progress, Stage, Sums
from loop.gradient_check import GradientCheck
from loop.meter import BadStepWatch, Meter, Reading, TooManyBadSteps
from optim.step import clip_and_step

log = logging.getLogger(__name__)


@dataclass
class Services:
    """Who is told what: the loop calls these and knows nothing of what is behind them."""

    log_metrics: Callable[[int, dict[str, Any]], None]  # optimizer step, figures
    save: Callable[[Progress, Stage], Any]
    save_stable: Callable[[Progress, Stage], Any] | None = None  # at the end of a stage's stable phase
    save_due: Callable[[Progress], bool] = lambda progress: False
    stop_requested: Callable[[], bool] = lambda: False
    save_requested: Callable[[], bool] = lambda: False
    evaluate: Callable[[Progress], dict[str, float]] | None = None
    diagnose: Callable[[Progress, Stage, Batch], None] = lambda progress, stage, batch: None  # has gradients
    sample: Callable[[Progress], None] = lambda progress: None  # after each optimizer step, as diagnose before it
    log_interval: int = 1
    eval_interval: int = 0
    max_bad_steps: int = 10
    save_before_raising: tuple[type[BaseException], ...] = (TooManyBadSteps, RankFailed, SharedMistake)


def feed(stage: Stage) -> Generator[Batch]:
    """Batches on the stage's device; with `stage.ahead` each comes with the one that follows it.

    Each carries the loader's state after it, so that looking ahead never moves a checkpoint's position.
    """
    waiting: Batch | None = None
    for on_host in stage.loader:
        batch = on_host.to(stage.device)
        batch.loader_state = stage.loader.state_dict()
        if not stage.ahead:
            yield batch
            continue
        if waiting is not None:
            waiting.following = batch
            yield waiting
        waiting = batch
    if waiting is not None:
        yield waiting


def windows(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Group micro batches into optimizer steps; the last window of a pass may be shorter."""
    iterator = iter(batches)
    while window := list(itertools.islice(iterator, size)):
        yield window


def run_stage(stage: Stage, progress: Progress, services: Services) -> bool:
    """Run one stage to its end; returns False when a signal stopped it early (after saving).

    Loss and gradients of an optimizer step are means over the valid tokens of its whole window, on all ranks. A step
    with a non-finite gradient leaves the weights as they are (with updates in the backward pass those behind the bad
    one, see `UpdateInBackward`) and is counted. Raises `TooManyBadSteps` after `services.max_bad_steps` of them in a
    row, with a checkpoint, and `UntrainedTensors` when the first update that counts leaves a trainable tensor without
    a gradient.
    """
    meter, journal = Meter(progress, stage), Journal(services)
    watch, check = BadStepWatch(progress, services.max_bad_steps), GradientCheck(stage)
    parameters = stage.parameters()
    batches = feed(stage)
    coming = AgreedWindows(stage, batches, services)
    try:
        for window in coming if not _finished(stage, progress) else ():
            sums = accumulate(stage, window, coming.stop_within)
            if sums is None:  # a signal in mid-window: its partial gradients are dropped
                break
            stage.average_gradients()
            services.diagnose(progress, stage, window[0])
            norm, bad = clip_and_step(stage.optimizer, parameters, stage.grad_clip, scaler=stage.scaler)
            rate = stage.schedule.get_last_lr()[0]
            check.push(sums["tokens"], bad, rate)
            _advance(progress, stage, window)
            _expect(progress, stage, window)
            stage.schedule.step()
            stage.optimizer.zero_grad(set_to_none=True)
            meter.add(sums, norm, bad, rate)
            watch.push(bad, window)
            journal.write()  # a step late: by now these figures have arrived
            if progress.optimizer_step % services.log_interval == 0:
                journal.add(meter.read())
            meter.pause(lambda: _evaluate(stage, services, progress, journal))
            if services.save_stable is not None and progress.stage_step == stage.stable_step:
                _save(stage, progress, services.save_stable, meter, watch, journal)
            if _finished(stage, progress):
                break
            if _save_due(stage, progress, services):
                _save(stage, progress, services.save, meter, watch, journal)
        if stage.open_ended and not coming.stopped:
            _evaluate_at_the_end(services, progress, journal)
            if services.save_stable is not None and _ends_stable(stage, progress):
                progress.stage_done = True
                _save(stage, progress, services.save_stable, meter, watch, journal)
        watch.flush()
        check.flush()
    except services.save_before_raising:
        stage.optimizer.zero_grad(set_to_none=True)
        _save(stage, progress, services.save, meter, None, journal)
        raise
    finally:
        batches.close()
    stage.optimizer.zero_grad(set_to_none=True)
    progress.stage_done = _finished(stage, progress) or not coming.stopped
    if progress.stage_done and meter.steps:
        journal.add(meter.read())
    _save(stage, progress, services.save, meter, watch, journal)
    return progress.stage_done


class Journal:
    """Log lines that are told once their figures have come from the device."""

    def __init__(self, services: Services):
        self.services = services
        self.coming: list[Reading] = []

    def add(self, reading: Reading) -> None:
        """Tell it now if its figures are on the host, else when `write` is called next."""
        self.coming.append(reading)
        if reading.sums.event is None:
            self.write()

    def write(self) -> None:
        """Tell all of them, waiting for those that have just been read."""
        for reading in self.coming:
            self.services.log_metrics(reading.step, reading.figures())
        self.coming = []


class AgreedWindows:
    """Windows of micro batches until any rank has none left, fails to get one, or is asked to stop: all end then."""

    def __init__(self, stage: Stage, batches: Iterable[Batch], services: Services):
        self.ranks, self.services = stage.ranks, services
        self.windows = windows(batches, stage.accumulation)
        self.stopped = False

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            window, stop, failure = None, False, None
            try:
                stop = self.services.stop_requested()
                window = next(self.windows, None)
            except Exception as error:
                failure = error
            stop, over = self.ranks.agree(stop, window is None, failure=failure)
            self.stopped = stop
            if stop or over or window is None:
                return
            yield window

    def stop_within(self) -> bool:
        """True where a window may be left at once: on one rank, once a signal came."""
        self.stopped = self.stopped or (self.ranks.alone and self.services.stop_requested())
        return self.stopped


def accumulate(stage: Stage, window: list[Batch], stop: Callable[[], bool]) -> Sums | None:
    """Forward and backward of one window; returns its summed figures, or None when asked to stop within it.

    What reduces gradients takes their mean over ranks, hence the factor of the number of ranks.
    """
    tokens = torch.stack([batch.valid.sum() for batch in window]).sum().float()
    scale = stage.ranks.world_size / stage.ranks.sum(tokens).clamp(min=1.0)
    if stage.scaler is not None:
        scale = scale * stage.scaler.scale(torch.ones_like(scale))
    total: Sums = {"tokens": tokens}
    for index, batch in enumerate(window):
        if stop():
            return None
        stage.synchronise(index == len(window) - 1)
        for name, value in stage.micro_step(batch, scale).items():
            total[name] = total[name] + value if name in total else value
    return total


def _advance(progress: Progress, stage: Stage, window: list[Batch]) -> None:
    progress.optimizer_step += 1
    progress.stage_step += 1
    if stage.stable_step is not None and progress.stage_step > stage.stable_step:
        progress.stage_cooled += 1
    progress.micro_step += len(window)
    tokens = _window_tokens(stage, window)
    progress.tokens += tokens
    progress.stage_tokens += tokens
    progress.loader = window[-1].loader_state


def _window_tokens(stage: Stage, window: list[Batch]) -> int:
    return sum(batch.inputs.numel() for batch in window) * stage.ranks.world_size


def _expect(progress: Progress, stage: Stage, window: list[Batch]) -> None:
    """Where a pass (`--epochs`) turns out longer than planned: say so, and stretch what is left of the schedule.

    Looked at from half the plan on; what is known of the text's length is its share that lies behind.
    """
    share, step, before = progress.loader.get("share"), progress.stage_step, progress.stage_end
    if not stage.open_ended or 2 * step < progress.stage_total:
        return
    if not share:
        if step == progress.stage_total + 1:
            log.warning("%s: longer than its %d steps; the learning rate stays at its least", stage.name, step - 1)
        return
    left = math.ceil(progress.stage_tokens * (1 / share - 1) / _window_tokens(stage, window))
    off = step + left - before
    if abs(off) <= max(1, left // 10) or not (off > 0 or progress.stage_stretches):
        return
    progress.stage_expected = step + left
    if not left:
        return
    stage.stretches.append([step, progress.stage_expected])
    progress.stage_stretches = [list(stretch) for stretch in stage.stretches]
    if _is_news([expected for _, expected in stage.stretches]):
        log.warning(
            "%s: about %d optimizer steps, not %d: what is left of the schedule is stretched over them",
            stage.name, progress.stage_expected, before,
        )  # fmt: skip


def _is_news(expected: Sequence[int]) -> bool:
    """Whether the last of these lengths is to be said: the first is, then each that has doubled since."""
    told = 0
    for length in expected:
        news = length >= 2 * told
        told = length if news else told
    return news


def _finished(stage: Stage, progress: Progress) -> bool:
    return not stage.open_ended and progress.stage_step >= stage.total_steps


def _ends_stable(stage: Stage, progress: Progress) -> bool:
    """True where a pass has ended before the cooldown: a longer stage goes on from its end."""
    return stage.stable_step is not None and 0 < progress.stage_step < stage.stable_step


def _save_due(stage: Stage, progress: Progress, services: Services) -> bool:
    due = stage.ranks.together(lambda: services.save_due(progress) or services.save_requested())
    return stage.ranks.agree(due)[0]


def _evaluate(stage: Stage, services: Services, progress: Progress, journal: Journal) -> None:
    """The evaluation, at its interval of optimizer steps and at the end of a stage, and what is sampled beside it."""
    due = services.eval_interval and progress.optimizer_step % services.eval_interval == 0
    if services.evaluate is not None and services.eval_interval and (due or _finished(stage, progress)):
        journal.write()
        services.log_metrics(progress.optimizer_step, services.evaluate(progress))
    services.sample(progress)


def _evaluate_at_the_end(services: Services, progress: Progress, journal: Journal) -> None:
    """Where the text's end came as a surprise, after the step that was the last."""
    evaluated = progress.evaluation.get("step") == progress.optimizer_step
    if services.evaluate is not None and services.eval_interval and progress.stage_step and not evaluated:
        journal.write()
        services.log_metrics(progress.optimizer_step, services.evaluate(progress))


def _save(
    stage: Stage,
    progress: Progress,
    save: Callable[[Progress, Stage], Any],
    meter: Meter,
    watch: BadStepWatch | None,
    journal: Journal,
) -> None:
    journal.write()
    if watch is not None:
        watch.flush()
    progress.meter = meter.totals()
    if math.isnan(sum(progress.meter.values(), 0.0)):
        log.warning("step %d: the figures since the last log line hold a non-finite value", progress.optimizer_step)
    save(progress, stage)
