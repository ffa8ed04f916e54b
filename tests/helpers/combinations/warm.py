"""Runs of `train.main` in warm processes (`helpers/warm.py`) that send themselves signals at lines of their log.

Only the picture at a run's end is not drawn, and less text is tokenised ahead than a tiny run ever takes.
"""

import logging
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from helpers import warm

QUIET = {"TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}
At = tuple[str, signal.Signals]  # a pattern of a log line, and the signal that the process sends itself there


def train(flags: list[str], log: Path, *, ranks: int = 1, at: Sequence[At] = (), timeout: float = 250) -> list[int]:
    """Run `train.main` on `ranks` ranks; exit statuses, negative after a signal. `at` is for the first rank."""
    processes = []
    for rank, environment in enumerate(warm.environments(ranks)):
        own = log if rank == 0 else log.with_suffix(f".{rank}.log")
        arguments = flags, at if rank == 0 else ()
        processes.append(warm.Process(_train, arguments, own, environment={**QUIET, **environment}))
    return [process.finish(timeout) for process in processes]


def call(work: Callable[..., Any], arguments: Sequence[Any], log: Path, *, timeout: float = 60) -> int:
    """The exit status of a process that does `work(*arguments)`, with its output in `log`."""
    return warm.Process(work, arguments, log, environment=QUIET).finish(timeout)


def _train(flags: list[str], at: Sequence[At]) -> int:
    import data
    import run.saving
    import text.packing
    import train

    plain, waiting = logging.getLogRecordFactory(), list(at)

    def watched(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = plain(*arguments, **named)
        for pattern, number in [entry for entry in waiting if re.search(entry[0], record.getMessage())]:
            waiting.remove((pattern, number))
            os.kill(os.getpid(), number)
        return record

    logging.setLogRecordFactory(watched)
    with (
        mock.patch.object(run.saving, "plot_runs"),  # half of a tiny run's time
        mock.patch.object(text.packing, "MOST_CHARACTERS", 2000),
        mock.patch.object(data, "POLL", 0.02),
    ):
        return train.main(flags)
