"""`run.lock`: one run at a time in an output folder, whichever host it is on."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils import UserError

log = logging.getLogger(__name__)

BEAT = 15.0  # seconds between two beats of a holder
WATCH = 300.0  # seconds that another host's lock is watched: far more than a beat, a busy disk and NFS's caches
RECORD = 512  # bytes, always the same, so that a beat is one write in place


class LockTaken(RuntimeError):
    """Another run has taken the folder over: this one may not write there any more."""


class RunLock:
    """`run.lock` in the output folder, with pid, host and process start time: a second run there refuses.

    The kernel's lock on the file decides: it ends with its process, is not inherited by children, and counts across
    containers. Where a file system has no locks, the pid and its start time decide (a pid may be given again). A
    lock left by a dead process of this host is taken over at once. Of another host only the file is to be seen: its
    holder counts a beat up there, and where that stands still for `watch` seconds of watching, the lock is taken
    over. No clocks are compared. A holder whose lock was taken all the same (it was suspended, or cut off) sees
    another's record in the file; whoever writes into the folder asks `held` first.
    """

    _held: set[Path] = set()  # noqa: RUF012  the kernel's locks do not exclude their own process

    def __init__(
        self, folder: Path, log: Callable[[str], None] = log.warning, *, watch: float = WATCH, beat: float = BEAT
    ):
        self.folder, self.path, self.log, self.watch, self.beat = folder, folder / "run.lock", log, watch, beat
        self.run, self.beats, self.lost = "", 0, False  # run: says whose record it is; empty until it is asked for
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="run.lock", daemon=True)

    def __enter__(self) -> "RunLock":
        key = self.path.absolute()
        if key in RunLock._held:
            raise self._refusal(os.getpid(), socket.gethostname())
        self.run = uuid.uuid4().hex
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._open_and_lock()
        except OSError as error:
            raise UserError(f"--output_dir {self.folder}: cannot lock it ({error.strerror}: {self.path})") from error
        RunLock._held.add(key)
        self._beating.start()
        return self

    # taking it

    def _open_and_lock(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                locked = _lock(file)
                if not _same_file(file, self.path):  # the holder removed it between open and lock
                    os.close(file)
                    continue
                pid, host, started = _read_holder(file)
                if host and host != socket.gethostname():
                    if self._falls_silent(pid, host):
                        return self._replace(file, pid, host)
                    os.close(file)
                    continue
                if locked is None or (pid and started and process_start(pid) == started):
                    raise self._refusal(pid, host)
            except BaseException:
                os.close(file)
                raise
            if pid:
                self.log(f"{self.path}: the lock of process {pid}, which is gone, is taken over")
            self._write(file)
            return file

    def _falls_silent(self, pid: int, host: str) -> bool:
        """Watch another host's lock: True if its beat stands still, False if it is gone; raises if it beats."""
        self.log(
            f"{self.path}: locked by process {pid} on {host}; "
            f"watching for {self.watch:.0f} s whether that run is still alive"
        )
        seen, end = self._content(), time.monotonic() + self.watch
        while time.monotonic() < end:
            time.sleep(min(1.0, self.watch / 10))
            content = self._content()
            if content is None:
                return False
            if content != seen:
                raise self._refusal(*_holder(content)[:2])
        return True

    def _replace(self, old: int, pid: int, host: str) -> int:
        """A lock file of our own in the silent one's place: what its holder may still write goes into no file."""
        draft = self.path.with_name(f".run.lock-{self.run}")
        file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        _lock(file)
        self._file = file
        self._write(file)
        os.replace(draft, self.path)
        time.sleep(min(2.0, self.watch / 10))  # another that watched as long may have done the same just now
        if not self.held():
            os.close(file)
            raise self._refusal(*_holder(self._content() or b"")[:2])
        os.close(old)
        self.log(
            f"{self.path}: the lock of process {pid} on {host}, which gave no sign of life for {self.watch:.0f} s, "
            "is taken over"
        )
        return file

    def _refusal(self, pid: int, host: str) -> UserError:
        return UserError(f"--output_dir {self.folder} is in use by process {pid or '?'} on {host or 'this host'}")

    # holding it

    def held(self) -> bool:
        """False from the moment that another run's record stands in the file, which is read each time.

        Or when the file is no longer there at all: who took it over may have ended since.
        """
        content = self._content() if self.run and not self.lost else None
        if content is None and self.run:
            with contextlib.suppress(OSError):  # a mount that is gone may come back
                self.lost = self.lost or os.fstat(self._file).st_nlink == 0
        if content is not None:
            _lock(self._file)  # closing any descriptor of a file, as `_content` does, gives up all locks on it
            with contextlib.suppress(ValueError):
                record = json.loads(content)
                self.lost = isinstance(record, dict) and "pid" in record and record.get("run") != self.run
        return not self.lost

    def check(self) -> None:
        """Raises `LockTaken` once a beat, or whoever asked `held`, has found the lock taken."""
        if self.lost:
            pid, host, _ = _holder(self._content() or b"")
            by = f"taken over by process {pid} on {host}" if pid else "taken over by a run that has ended, or removed"
            raise LockTaken(f"{self.path} was {by}; this run writes nothing more")

    def _beat(self) -> None:
        while not self._ended.wait(self.beat) and self.held():
            self.beats += 1
            with contextlib.suppress(OSError):  # a full disk, a mount that is gone: the next beat may pass
                self._write(self._file)

    def _write(self, file: int) -> None:
        holder: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname()}
        holder |= {"started": process_start(os.getpid()), "run": self.run, "beat": self.beats}
        os.pwrite(file, json.dumps(holder).encode().ljust(RECORD), 0)
        os.ftruncate(file, RECORD)
        os.fsync(file)

    def _content(self) -> bytes | None:
        """What the file holds, opened anew, since that is when NFS asks its server; None where it cannot be read."""
        try:
            return self.path.read_bytes()
        except OSError:
            return None

    def __exit__(self, *error: Any) -> None:
        RunLock._held.discard(self.path.absolute())
        self._ended.set()
        self._beating.join()
        with contextlib.suppress(OSError):  # the folder may be gone by now; the kernel's lock ends all the same
            if _same_file(self._file, self.path):
                self.path.unlink()
        os.close(self._file)


def _lock(file: int) -> bool | None:
    """True with the kernel's lock, None if another process has it, False where the file system has none."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        return None
    except OSError:
        return False


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(file: int) -> tuple[int, str, str | None]:
    return _holder(os.pread(file, 4096, 0))


def _holder(content: bytes) -> tuple[int, str, str | None]:
    """(pid, host, start time) that a lock file states; (0, "", None) if it states none."""
    try:
        held = json.loads(content)
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
