"""What a run hears from outside: the signals that ask it to stop or to save, and the clock of its saves."""

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST = 2.0  # seconds in which another signal is the same request: launchers and schedulers repeat theirs


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP ask the loop to save and stop, a second one exits at once; SIGUSR1 asks for a save.

    What counts as a second one: see `is_second_request`. A SIGHUP that was ignored at the start (nohup) stays
    ignored. A context manager, for the main thread; handlers are restored at its end, and in forked children. A
    thread of its own sees every signal too, so that the second one works even while the main thread hangs in a
    collective or in a dead mount.
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
    if seen and is_second_request(seen[0][0], number, now - seen[0][1], launched="RANK" in os.environ):
        os._exit(128 + number)
    seen.append((number, now))


def is_second_request(first: int, number: int, seconds: float, *, launched: bool) -> bool:
    """True if a stop signal, `seconds` after the first, means somebody who will not wait for the save.

    Ctrl-C twice does, at a keyboard. A scheduler's SIGTERM comes to every process of a job, and a launcher passes
    its own on to its ranks: within SAME_REQUEST that is one request. A launcher's ranks never take a further
    SIGTERM for haste: it is also what they get when another rank has left, or at a job's time limit, and SIGKILL
    follows where somebody means it.
    """
    if launched:
        return number == signal.SIGINT and seconds > SAME_REQUEST
    return seconds > SAME_REQUEST or number == first == signal.SIGINT


class SaveClock:
    """Says when `minutes` have passed since the last save; never for 0."""

    def __init__(self, minutes: float):
        self.seconds = minutes * 60
        self.restart()

    def restart(self) -> None:
        self.since = time.monotonic()

    def due(self) -> bool:
        return self.seconds > 0 and time.monotonic() - self.since >= self.seconds
