"""What keeps a run safe from the outside: signals, the lock on its folder, the save clock, masked secrets."""

import contextlib
import fcntl
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from arguments import UserError

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST = 2.0  # seconds in which another signal is the same request: launchers pass Ctrl-C on as SIGTERM


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP ask the loop to save and stop, a second one exits at once; SIGUSR1 asks for a save.

    A SIGHUP that was ignored at the start (nohup) stays ignored. A context manager, for the main thread; handlers
    are restored at its end, and in forked children. A thread of its own sees every signal too, so that the second
    one works even while the main thread hangs in a collective or in a dead mount.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self.leave_at_once = False  # True while there is nothing to save: the first signal raises SystemExit(128+N)
        self._save_requested = False
        self._previous: dict[int, Any] = {}
        self._seen_by_handler: list[tuple[int, float]] = []
        self._seen_by_watcher: list[tuple[int, float]] = []

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._stop)
        self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._save)
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        os.register_at_fork(after_in_child=self._restore)
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore()
        os.close(self._writer)

    def _restore(self) -> None:
        if self._previous:
            signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _watch(self, reader: int) -> None:
        handled = set(self._previous)
        with open(reader, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                if number[0] in handled and number[0] in STOP_SIGNALS:
                    _exit_on_second(self._seen_by_watcher, number[0])

    def _stop(self, number: int, frame: FrameType | None) -> None:
        _exit_on_second(self._seen_by_handler, number)
        if self.leave_at_once:
            raise SystemExit(128 + number)
        if self.stopped_by is None:
            self.stopped_by = number
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):  # a terminal that hung up
                os.write(2, f"\n{name}: saving after this micro step (once more to exit at once)\n".encode())

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._save_requested = True

    @property
    def stop_requested(self) -> bool:
        return self.stopped_by is not None

    @property
    def exit_code(self) -> int:
        """128 + N after signal N, else 0."""
        return 0 if self.stopped_by is None else 128 + self.stopped_by

    def take_save_request(self) -> bool:
        """True once for each SIGUSR1 (or several that came together)."""
        requested, self._save_requested = self._save_requested, False
        return requested


def _exit_on_second(seen: list[tuple[int, float]], number: int) -> None:
    """Record a stop signal; leave the process with 128+N if it is a second request."""
    now = time.monotonic()
    if seen and (number == seen[0][0] or now - seen[0][1] > SAME_REQUEST):
        os._exit(128 + number)
    seen.append((number, now))


class SaveClock:
    """Says when `minutes` have passed since the last save; never for 0."""

    def __init__(self, minutes: float):
        self.seconds = minutes * 60
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def due(self) -> bool:
        return self.seconds > 0 and time.monotonic() - self.since >= self.seconds


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


MASK = "***"
SECRET_WORDS = set("token secret password passwd key apikey credential credentials authorization".split())
COMMIT_WORDS = {"revision", "commit", "sha", "sha1", "hash"}  # 40 hex digits are an id there, not a W&B key
SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bwandb_v\d+_\w{16,}|\b(?:sk|pk)-[\w-]{16,}|\bgh[pousr]_\w{16,}|\bAKIA[A-Z0-9]{12,}"
    r"|(?<=://)[^/@\s:]*:[^/@\s]+(?=@)|(?i:(?<=\bbearer )\S+)"
)
SECRET_SETTING = re.compile(
    r"(?i)\b((?:\w*[_-])?(?:token|secret|password|passwd|api_?key)\s*[=:]\s*)(['\"]?)[^\s'\"&]{6,}"
)
HEX_KEY = re.compile(r"\b[0-9a-f]{40}\b")


def mask_secrets(value: Any, name: str = "") -> Any:
    """A copy of flags, settings or a text, with `***` for everything that looks like a token, key or password.

    Masked are strings under a name that says so (`..._token`, `api_key`; counts of tokens are numbers and stay),
    strings in the form of the known kinds of tokens, passwords in URLs, and the values of environment variables
    with such names. 40 hex digits are a W&B key except under a name of commits.
    """
    return _masked(value, name, _environment_secrets())


def _masked(value: Any, name: str, known: list[str]) -> Any:
    if isinstance(value, dict):
        return {key: _masked(entry, str(key), known) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_masked(entry, name, known) for entry in value]
    if isinstance(value, Path):
        value = str(value)
    if not isinstance(value, str):
        return value
    words = _words(name)
    if value and words & SECRET_WORDS:
        return MASK
    return _masked_text(value, known, hex_keys=not words & COMMIT_WORDS)


def _masked_text(text: str, known: list[str], hex_keys: bool = True) -> str:
    for secret in known:
        text = text.replace(secret, MASK)
    text = SECRET_SETTING.sub(rf"\1\2{MASK}", SECRET_VALUE.sub(MASK, text))
    return HEX_KEY.sub(MASK, text) if hex_keys else text


def _environment_secrets() -> list[str]:
    """Values of environment variables whose names speak of a secret (HF_TOKEN, WANDB_API_KEY, ...)."""
    found = [value for name, value in os.environ.items() if len(value) >= 8 and _words(name) & SECRET_WORDS]
    return sorted(found, key=len, reverse=True)


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


class MaskingFilter(logging.Filter):
    """Masks secrets in every log line, and in the traceback that a record may carry."""

    def filter(self, record: logging.LogRecord) -> bool:
        with contextlib.suppress(TypeError, ValueError):  # arguments that do not fit: the handler reports it
            record.msg, record.args = mask_secrets(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = mask_secrets(logging.Formatter().formatException(record.exc_info))
        return True
