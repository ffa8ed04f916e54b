"""Running generators in background threads, with bounded look-ahead and a clean end."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

POLL = 0.2  # seconds between looks at the stop flag while waiting
JOIN = 5.0  # seconds that closing waits for a thread in the middle of its work


class Pipeline:
    """Background threads that stop together."""

    def __init__(self, stop: threading.Event | None = None):
        self.stop = stop or threading.Event()
        self.threads: list[threading.Thread] = []

    def close(self) -> None:
        """Stop the threads; what they were doing is dropped."""
        self.stop.set()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(JOIN)


class Background(Iterator):
    """An iterator that a thread runs at most `depth` items ahead; its exceptions are raised in the consumer.

    The thread starts on an item only when there is room for it, so that no more than `depth` items wait.
    """

    def __init__(
        self, pipeline: Pipeline, items: Iterator, depth: int, should_stop: Callable[[], bool] | None = None
    ):
        self.stop, self.items, self.should_stop = pipeline.stop, items, should_stop
        self.room = threading.Semaphore(depth)
        self.ready: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        thread = threading.Thread(target=self._run, name="data", daemon=True)
        pipeline.threads.append(thread)
        thread.start()

    def _run(self) -> None:
        try:
            while self._wait_for_room():
                self.ready.put((True, next(self.items)))
        except BaseException as error:  # also StopIteration: the consumer raises it again
            self.ready.put((False, error))

    def _wait_for_room(self) -> bool:
        while not self.room.acquire(timeout=POLL):
            if self.stop.is_set():
                return False
        return not self.stop.is_set()

    def __next__(self) -> Any:
        while True:
            if self.stop.is_set():
                raise StopIteration
            try:
                good, item = self.ready.get(timeout=POLL)
                break
            except queue.Empty:
                if self.should_stop is not None and self.should_stop():
                    raise StopIteration from None
        if not good:
            self.ready.put((False, item))  # asked again, it ends or fails again
            raise item
        self.room.release()
        return item
