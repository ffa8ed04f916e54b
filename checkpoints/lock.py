"""One run in an output folder at a time."""

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils import UserError

log = logging.getLogger(__name__)


class RunLock:
    """`run.lock` in the output folder, with pid, host and process start time: a second run there refuses.

    The kernel's lock on the file decides: it ends with its process, is not inherited by children, and counts across
    containers. Where a file system has no locks, the pid and its start time decide (a pid may be given again). A
    lock left by a dead process of this host is taken over; one of another host is for the user to judge.
    """

    _held: set[Path] = set()  # noqa: RUF012  the kernel's locks do not exclude their own process

    def __init__(self, folder: Path, log: Callable[[str], None] = log.warning):
        self.folder, self.path, self.log = folder, folder / "run.lock", log

    def __enter__(self) -> "RunLock":
        key = self.path.absolute()
        if key in RunLock._held:
            raise self._refusal(os.getpid(), socket.gethostname())
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open_and_lock()
        except OSError as error:
            raise UserError(f"--output_dir {self.folder}: cannot lock it ({error.strerror}: {self.path})") from error
        RunLock._held.add(key)
        return self

    def _open_and_lock(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                locked = self._lock(file)
                if not _same_file(file, self.path):  # the holder removed it between open and lock
                    os.close(file)
                    continue
                self._take_over(file, locked)
            except BaseException:
                os.close(file)
                raise
            return file

    def _lock(self, file: int) -> bool:
        """True with the kernel's lock, False where the file system has none; raises if another process has it."""
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError):
            pid, host, _ = _read_holder(file)
            raise self._refusal(pid, host) from None
        except OSError:
            return False

    def _take_over(self, file: int, locked: bool) -> None:
        pid, host, started = _read_holder(file)
        if host and host != socket.gethostname():
            raise UserError(
                f"--output_dir {self.folder} was locked by process {pid} on {host}; "
                f"if that run is gone, remove {self.path}"
            )
        if pid and not locked and process_start(pid) == started:
            raise self._refusal(pid, host)
        if pid:
            self.log(f"{self.path}: the lock of process {pid}, which is gone, is taken over")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": process_start(os.getpid())}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
        os.fsync(file)

    def _refusal(self, pid: int, host: str) -> UserError:
        return UserError(f"--output_dir {self.folder} is in use by process {pid or '?'} on {host or 'this host'}")

    def __exit__(self, *error: Any) -> None:
        RunLock._held.discard(self.path.absolute())
        with contextlib.suppress(OSError):  # the folder may be gone by now; the kernel's lock ends all the same
            if _same_file(self._file, self.path):
                self.path.unlink()
        os.close(self._file)


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(file: int) -> tuple[int, str, str | None]:
    """(pid, host, start time) that the lock file states; (0, "", None) if it states none."""
    try:
        held = json.loads(os.pread(file, 4096, 0))
        return int(held["pid"]), str(held["host"]), held["started"]
    except (ValueError, KeyError, TypeError):
        return 0, "", None


def process_start(pid: int) -> str | None:
    """A process' start time: boot id and clock ticks since boot (field 22 of /proc/PID/stat); None if it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"
