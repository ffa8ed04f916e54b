"""What a person sees while a run works: one bar a stage on a terminal, and a sign of life in every log."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from loop.forms import Progress
from utils import format_duration, on_terminal

log = logging.getLogger(__name__)

SILENCE = 60.0  # seconds without a line after which one says what is being done


def quiet_libraries() -> None:
    """Off a terminal, no bars of transformers, the Hub's client and datasets, whenever they were imported."""
    if on_terminal():
        return
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    datasets.disable_progress_bars()


class StageBar:
    """One bar a stage from its first second on: steps, loss, KL, tokens a second, time left of the whole run.

    Nothing at all off a terminal, so that a nohup log stays clean lines.
    """

    def __init__(self, enabled: bool | None = None):
        self.enabled = on_terminal() if enabled is None else enabled
        self.bar: Any = None

    def begin(self, stage: str, done: int, total: int) -> None:
        """A bar of a stage that stands at `done` of `total` steps."""
        self.close()
        if self.enabled:
            from tqdm import tqdm

            shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self.bar = tqdm(desc=stage, initial=done, total=total, dynamic_ncols=True, bar_format=shape)

    def step(self, progress: Progress) -> None:
        """Where the stage stands after a step; drawn a few times a second at most."""
        if self.bar is not None:
            self.bar.total = progress.stage_end
            self.bar.update(progress.stage_step - self.bar.n)

    def show(self, figures: dict[str, Any]) -> None:
        """The figures of a log line; others are passed over."""
        if self.bar is None or "train/loss" not in figures:
            return
        shown = [f"loss {figures['train/loss']:.4g}"]
        shown += [f"KL {figures['train/kl']:.4g}"] if "train/kl" in figures else []
        if rate := figures.get("train/tokens_per_second"):
            shown.append(f"{rate:,.0f} tokens/s")
        if "perf/run_eta_seconds" in figures:
            shown.append(f"{format_duration(figures['perf/run_eta_seconds'])} left")
        self.bar.set_postfix_str(", ".join(shown))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class SignOfLife(logging.Handler):
    """A line where a log would be silent for a minute: what is being done, or where the stage stands.

    A context manager. What is being done is the last line that ended in "..."; `where` says where a stage stands.
    """

    def __init__(self, seconds: float = SILENCE):
        super().__init__()
        self.seconds = seconds
        self.where: Callable[[], str] = lambda: ""
        self.last, self.doing, self.since = time.monotonic(), "", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sign of life", daemon=True)

    def __enter__(self) -> "SignOfLife":
        logging.getLogger().addHandler(self)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ended.set()
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Note when the last line was, and what it said is being done."""
        self.last = time.monotonic()
        if record.name == __name__:
            return
        message = record.getMessage()
        self.doing, self.since = (message.removesuffix(" ...") if message.endswith(" ...") else ""), self.last

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self.last >= self.seconds:
                what = f"still {self.doing}" if self.doing else self.where() or "still at work"
                log.info("%s, %s since the last line", what, format_duration(time.monotonic() - self.since))


def stands_at(progress: Progress) -> str:
    """Where a stage stands, for a sign of life."""
    return f"{progress.stage}: step {progress.stage_step:,} of {progress.stage_end:,}" if progress.stage else ""
