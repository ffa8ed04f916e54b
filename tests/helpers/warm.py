"""Scripts in processes that have everything imported: a fork of a server starts in 20 ms, not after 4 s of imports.

Each is a process of its own, with its own signals, environment, folder, exit status and log, and can be killed as any
other; several ranks are several processes with torchrun's variables. What is read from the environment at import is
the server's: `fits` says whether a process may be a fork of it. A process with another Hub or other caches is a fork
of a second server, which has imported torch and the like, but nothing that reads variables of the Hub.
"""

import atexit
import faulthandler
import functools
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
OF_THE_HUB = re.compile("HF|HUGGINGFACE|TRANSFORMERS")
READ_AT_IMPORT = re.compile(f"({OF_THE_HUB.pattern}|TORCH|OMP(?!_WAIT_POLICY)|KMP|GOMP|MKL|PYTHON|LD|CUDA)_?")

_pids: set[int] = set()  # of the servers that have been asked


@functools.cache
def context() -> Any:
    """The context of forks of one server with everything imported, started by the first call."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["helpers.preload"])
    cache = tempfile.mkdtemp()  # for models' remote code
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    own = {**_settings(), "OMP_NUM_THREADS": "1", "PYTHONPATH": _places(), "HF_MODULES_CACHE": cache}
    with mock.patch.dict(os.environ, own):
        forkserver.ensure_running()
    return found


@functools.cache
def _plainer() -> forkserver.ForkServer:
    """The second server: without what reads variables of the Hub at import."""
    context()
    found = forkserver.ForkServer()
    found.set_forkserver_preload(["helpers.preload_torch"])
    with mock.patch.dict(os.environ, {**_settings(), "OMP_NUM_THREADS": "1", "PYTHONPATH": _places()}):
        found.ensure_running()
    return found


def _places() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])


@functools.cache
def _settings() -> dict[str, str]:
    """What the servers read of the environment at import."""
    return {name: value for name, value in os.environ.items() if READ_AT_IMPORT.match(name)}


@functools.cache
def _server_pid(plainer: bool) -> int:
    """A server's process id, once it has imported everything."""
    with tempfile.NamedTemporaryFile("r") as file:
        module = "helpers.preload_torch" if plainer else "helpers.preload"
        process = context().Process(target=_say_parent, args=(file.name, module))
        _start(process, plainer)
        process.join()
        assert process.exitcode == 0, f"the server of warm processes has not imported {module}"
        return int(file.read())


def _start(process: Any, plainer: bool) -> None:
    if not plainer:
        process.start()
        return
    with mock.patch.object(forkserver, "connect_to_new_process", _plainer().connect_to_new_process):
        process.start()


def _say_parent(file: str, module: str) -> None:
    assert module in sys.modules  # the server passes over what it cannot import
    Path(file).write_text(str(os.getppid()))


def cpu_seconds() -> float:
    """CPU seconds of all forks that have ended."""
    return sum(map(_ended_seconds, _pids))


def _ended_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")  # cutime and cstime


def fits(environment: dict[str, str]) -> bool:
    """Whether a fork is what a new process with this environment, beside that of the tests, would be."""
    return all(OF_THE_HUB.match(name) for name in _differing(environment))


def _differing(environment: dict[str, str]) -> set[str]:
    """Names of variables that are read at import and are others than a server's."""
    servers = {"OMP_NUM_THREADS": "1", **_settings()}
    wanted = {name: value for name, value in {**os.environ, **environment}.items() if READ_AT_IMPORT.match(name)}
    return {name for name, _ in {"OMP_NUM_THREADS": "1", **wanted}.items() ^ servers.items()}


class Process:
    """A call in a fork, with the face of a `subprocess.Popen`; its output goes to files, to their ends."""

    def __init__(
        self,
        work: Callable[..., Any],
        arguments: Sequence[Any],
        stdout: str | Path,
        stderr: str | Path | None = None,
        environment: dict[str, str] | None = None,
        cwd: str | Path | None = None,
    ):
        """The result of `work(*arguments)`, a number or None, is the exit status. No `stderr`: to `stdout`."""
        plainer = bool(_differing(environment or {}))
        _pids.add(_server_pid(plainer))
        full = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        outputs = str(stdout), str(stderr or stdout)
        self._process = context().Process(target=_work, args=(work, arguments, outputs, full, str(cwd or Path.cwd())))
        _start(self._process, plainer)
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired([str(self._process)], timeout or 0.0)
        return self.returncode

    def finish(self, timeout: float) -> int:
        """The exit status, once it has ended; when it is late it is ended, and its log says where it stood."""
        for number in (signal.SIGABRT, signal.SIGKILL):
            try:
                return self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.send_signal(number)
                timeout = 10
        return self.wait()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(script: str | Path, flags: Sequence[object], stdout: str | Path, **options: Any) -> Process:
    """A script, or a module by its dotted name, as `python` would run it; `options` as of `Process`."""
    return Process(_script, (str(script), [*map(str, flags)]), stdout, **options)


def run(script: str | Path, flags: Sequence[object], timeout: float = 300, **options: Any) -> Any:
    """`start`, waited for; a `subprocess.CompletedProcess` with text. Killed and `TimeoutExpired` when it is late."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = start(script, flags, stdout, stderr=stderr, **options)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        texts = [path.read_text() if path.exists() else "" for path in (stdout, stderr)]
        return subprocess.CompletedProcess([str(script), *map(str, flags)], status, *texts)


def environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank; nothing for one alone (0 or 1 ranks)."""
    if ranks <= 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _script(script: str, flags: list[str]) -> None:
    if script.endswith(".py"):
        path = ROOT / script
        sys.argv, sys.path[0:0] = [str(path), *flags], [str(path.parent)]
        runpy.run_path(str(path), run_name="__main__")
    else:
        sys.argv = [script, *flags]
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def _work(work: Callable[..., Any], arguments: Sequence[Any], outputs: Sequence[str], full: Any, cwd: str) -> None:
    for number, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()  # SIGABRT tells where each thread stands
    os.environ.clear()
    os.environ.update(full)
    os.chdir(cwd)
    try:
        status = work(*arguments) or 0
    except SystemExit as ended:
        status = _status(ended.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter's own end: threads, then what asked for it
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # nothing of the server's is to be closed


def _status(code: Any) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1
