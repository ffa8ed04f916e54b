"""Real runs of `train.main` in processes that have everything imported: a fork of a server takes 20 ms, not 5 s.

Each run is a process of its own, with its own signals, environment, exit status and log; several ranks are several
processes with torchrun's variables. Only the picture at a run's end is not drawn.
"""

import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

PLACES = (str(Path(__file__).resolve().parents[3]), str(Path(__file__).resolve().parents[2]))
QUIET = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
At = tuple[str, signal.Signals]  # a pattern of a log line, and the signal that the process sends itself there
_context = multiprocessing.get_context("forkserver")


def start_server(cache: Path) -> None:
    """Start the process that all runs are forks of, once; `cache`: where remote code is copied to."""
    _context.set_forkserver_preload(["helpers.combinations.preload"])
    places = os.pathsep.join([*PLACES, os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, {**QUIET, "PYTHONPATH": places, "HF_MODULES_CACHE": str(cache / "modules")}):
        forkserver.ensure_running()
    assert finished(call(int, (), cache / "server.log", {})) == 0  # it has imported everything


def call(work: Callable[..., Any], arguments: Sequence[Any], log: Path, environment: dict[str, str]) -> Any:
    """A started process that does `work(*arguments)`, its exit status the result, with its output in `log`."""
    process = _context.Process(target=_work, args=(work, arguments, str(log), {**QUIET, **environment}))
    process.start()
    return process


def train(flags: list[str], log: Path, *, ranks: int = 1, at: Sequence[At] = (), timeout: float = 100) -> list[int]:
    """Run `train.main` on `ranks` ranks; exit statuses, negative after a signal. `at` is for the first rank."""
    processes = []
    for rank, environment in enumerate(environments(ranks)):
        own = log if rank == 0 else log.with_suffix(f".{rank}.log")
        processes.append(call(_train, (flags, at if rank == 0 else ()), own, environment))
    return [finished(process, timeout) for process in processes]


def finished(process: Any, timeout: float = 60) -> int:
    """The exit status of a process; one that does not end is killed."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode


def environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank; nothing for one alone."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _train(flags: list[str], at: Sequence[At]) -> int:
    import run.saving
    import train

    run.saving.plot_runs = lambda *_: None  # half of a tiny run's time
    plain, waiting = logging.getLogRecordFactory(), list(at)

    def watched(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = plain(*arguments, **named)
        for pattern, number in [entry for entry in waiting if re.search(entry[0], record.getMessage())]:
            waiting.remove((pattern, number))
            os.kill(os.getpid(), number)
        return record

    logging.setLogRecordFactory(watched)
    return train.main(flags)


def _work(work: Callable[..., Any], arguments: Sequence[Any], log: str, environment: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    try:
        status = work(*arguments) or 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(status)  # as after a fork: nothing of the server's is to be closed
