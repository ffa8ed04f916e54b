"""Text sources -> PackedTextDataset -> batches, with a state that is small, exact and the same for every rank.

There is one global order of sequences (`packing.py`); global batch k is rows [k*W*B, (k+1)*W*B) of it, of which rank
r takes its B. Every rank tokenises the whole stream, so that no rank waits for another and none ends early: the last
incomplete global batch is filled up with rows that do not count.
"""

import atexit
import contextlib
import itertools
import logging
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from hub.hub_files import DataStreamLost
from text.documents import BadDocument, DocumentEncoder
from text.mixture import MixedDataset, MixedSpec, mixed_dataset
from text.packing import PackedTextDataset, Sequence
from text.pass_share import text_size
from text.row_readers import BadData, TextFile
from text.text_sources import SourceSpec, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BadData",
    "Batch",
    "DataStreamLost",
    "PackedTextDataset",
    "SourceSpec",
    "TextLoader",
    "build_loader",
    "estimate_steps_per_epoch",
]

log = logging.getLogger(__name__)

SAMPLED_FILES = 8
SAMPLED_PLACES = 4  # in each file that can be sought in
SAMPLED_CHARACTERS = 1 << 21  # over all sampled files
POLL = 0.2  # seconds between looks at the stop flag while waiting
JOIN = 5.0  # seconds that closing waits for a thread in the middle of its work


@dataclass
class Batch:
    """One micro batch of one rank, as the loader yields it on the host, and on a device."""

    tokens: torch.Tensor  # int64 [B, T+1]
    valid: torch.Tensor  # bool [B, T]: targets that count
    position_ids: torch.Tensor | None  # int64 [B, T] under document_reset: place in the document, else None
    document_ids: list[str]  # file:row of every document in it
    loader_state: dict[str, Any] = field(default_factory=dict)  # the loader's state after this batch
    on_host: "Batch | None" = None  # the same on the host, of one that is on a device
    following: "Batch | None" = None  # the next one, with `Stage.ahead`

    @property
    def inputs(self) -> torch.Tensor:
        """int64 [B, T]"""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> torch.Tensor:
        """int64 [B, T]: the token after each input."""
        return self.tokens[:, 1:]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device; copies to a GPU do not block (from page-locked memory)."""
        options: Any = {"device": device, "non_blocking": device.type == "cuda"}
        positions = None if self.position_ids is None else self.position_ids.to(**options)
        tokens, valid = self.tokens.to(**options), self.valid.to(**options)
        return replace(self, tokens=tokens, valid=valid, position_ids=positions, on_host=self)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        positions = None if self.position_ids is None else self.position_ids.pin_memory()
        return replace(self, tokens=self.tokens.pin_memory(), valid=self.valid.pin_memory(), position_ids=positions)


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
        thread.start()
        pipeline.threads.append(thread)

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


class TextLoader:
    """Batches of one rank. Tokenises `prefetch` batches ahead in the background; 0 works in the caller's thread.

    `state_dict()` is the state behind the last batch that was yielded, the same on every rank. Iterating again goes
    on from there. `waited_seconds` is the time that the consumer waited for data; `stats` counts documents, tokens,
    empty and bad rows up to the last batch.
    """

    def __init__(
        self,
        dataset: PackedTextDataset | MixedDataset,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        document_reset: bool = False,
        prefetch: int = 8,
        pin_memory: bool = False,
    ):
        self.dataset, self.batch_size, self.rank, self.world_size = dataset, batch_size, rank, world_size
        self.document_reset, self.prefetch = document_reset, prefetch
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.waited_seconds = 0.0
        self.stop_requested: Callable[[], bool] | None = None  # asked while waiting: True ends the iteration
        self.pipeline: Pipeline | None = None
        _open_loaders.add(self)

    @property
    def stats(self) -> dict[str, float]:
        return {**self.dataset.counters, "sequences": self.dataset.sequences, "waited_seconds": self.waited_seconds}

    def state_dict(self) -> dict[str, Any]:
        return self.dataset.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the batch after which `state` was taken, whatever the world size was."""
        self.close()
        self.dataset.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        pipeline = self.pipeline = Pipeline()
        self.dataset.stop_with(pipeline.stop)
        threaded = self.prefetch > 0
        batches: Any
        if threaded:
            sequences = self.dataset.stream(lambda items: Background(pipeline, items, depth=1))
            batches = Background(pipeline, self._batches(sequences), self.prefetch, self._asked_to_stop)
        else:
            batches = self._batches(self.dataset.stream())
        try:
            while True:
                since = time.perf_counter()
                item = next(batches, None)
                self.waited_seconds += time.perf_counter() - since
                if item is None:
                    return
                batch, last, count = item
                self.dataset.advance(last, count)
                yield batch
        finally:
            pipeline.close()

    def _asked_to_stop(self) -> bool:
        return self.stop_requested is not None and self.stop_requested()

    def _batches(self, sequences: Iterator[Sequence]) -> Iterator[tuple[Batch, Sequence, int]]:
        """(this rank's batch, last sequence of the global batch, number of sequences in it)."""
        size = self.batch_size * self.world_size
        mine = range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        while rows := list(itertools.islice(sequences, size)):
            batch = self._collate([rows[i] if i < len(rows) else None for i in mine], rows[0])
            yield (batch.pin_memory() if self.pin_memory else batch), rows[-1], len(rows)

    def _collate(self, rows: list[Sequence | None], filler: Sequence) -> Batch:
        real = [row or filler for row in rows]
        lengths = torch.tensor([row.length if row else 0 for row in rows])
        tokens = torch.stack([row.tokens for row in real])
        valid = torch.arange(1, tokens.shape[1]) < lengths[:, None]
        inputs_positions = None
        if self.document_reset:
            positions = torch.stack([row.positions for row in real])
            valid &= positions[:, 1:] != 0
            inputs_positions = positions[:, :-1].contiguous()
        names = list(dict.fromkeys(name for row in rows if row for name in row.documents))
        return Batch(tokens, valid, inputs_positions, names)

    def close(self) -> None:
        """Stop the background threads; the state stays, and iterating again goes on from it."""
        if self.pipeline is not None:
            self.pipeline.close()
            self.pipeline = None


_open_loaders: "weakref.WeakSet[TextLoader]" = weakref.WeakSet()


@atexit.register
def _close_loaders() -> None:
    for loader in list(_open_loaders):
        loader.close()


def build_loader(
    spec: SourceSpec,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seq_length: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 42,
    epochs: int | None = None,
    document_reset: bool = False,
    prefetch: int = 8,
    pin_memory: bool = False,
    mixed: Collection[MixedSpec] = (),
    excluded: Collection[str] = (),
) -> TextLoader:
    """The loader of a text source; `epochs` None is endless. Nothing runs in the background until it is iterated.

    mixed: other sources by their shares of all sequences; of a generated one, `excluded` are words that it leaves
    out. Raises `UserError` for a source, split or column that is not there, or less text than one sequence; `BadData`
    (a `UserError`) and `DataStreamLost` when the first documents cannot be read. Both may come while iterating.
    """
    dataset = PackedTextDataset(spec, tokenizer, seq_length=seq_length, seed=seed, epochs=epochs)
    return TextLoader(
        mixed_dataset(dataset, mixed, tokenizer, excluded) if mixed else dataset,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        document_reset=document_reset,
        prefetch=prefetch,
        pin_memory=pin_memory,
    )


def estimate_steps_per_epoch(
    spec: SourceSpec, tokenizer: "PreTrainedTokenizerBase", *, seq_length: int, sequences_per_step: float
) -> int:
    """Optimizer steps of one pass, from the tokens per stored byte in a sample of up to 8 files.

    sequences_per_step: those of this source; in a mixture a part of a step's.
    """
    tokens = estimate_tokens(spec, tokenizer)
    return max(1, math.ceil(tokens / ((seq_length + 1) * sequences_per_step)))


def estimate_tokens(spec: SourceSpec, tokenizer: "PreTrainedTokenizerBase") -> float:
    """Tokens of one pass over a source, separators included, estimated from a sample of up to 8 files."""
    source = open_source(spec)
    encoder = DocumentEncoder(tokenizer, source.chat, started=spec.version > 1)
    count = len(source.files)
    chosen = sorted({round(i * (count - 1) / (SAMPLED_FILES - 1)) for i in range(SAMPLED_FILES)})
    tokens = 0.0
    for index in chosen:
        tokens += _tokens_of_file(source.files[index], source.column, encoder, SAMPLED_CHARACTERS // len(chosen))
    if len(chosen) == count:
        return tokens
    sizes = [file.size() for file in source.files]
    return tokens * sum(sizes) / max(1, sum(sizes[index] for index in chosen))


def _tokens_of_file(file: TextFile, column: str, encoder: DocumentEncoder, characters: int) -> float:
    """Tokens per row (JSON: per byte) of samples at several places of a file, times its rows (bytes)."""
    rows = file.row_count()
    total = text_size(file) if rows is None else rows
    places = SAMPLED_PLACES if rows is not None or (file.format == "jsonl" and not file.compressed) else 1
    tokens = units = 0
    for place in range(places):
        first, last = place * total // places, (place + 1) * total // places
        items: Any = file.rows(column, *((0, first) if rows is None else (first, 0)))
        limit = None if file.compressed else last
        more_tokens, more_units = _sample(items, encoder, first, limit, characters // places, rows is not None)
        tokens, units = tokens + more_tokens, units + more_units
        items.close()
    return tokens * total / max(1, units)


def _sample(
    items: Any, encoder: DocumentEncoder, at: int, last: int | None, characters: int, by_rows: bool
) -> tuple[int, int]:
    """(tokens, units read) from `at` up to `last`; a line begun in its middle counts as neither."""
    segments: list[Any] = []
    units = 0
    for item in items:
        if characters <= 0 or (last is not None and at >= last):
            break
        after = item.next_row if by_rows else item.next_offset
        if not isinstance(item.value, BadData):
            units += after - at
            with contextlib.suppress(BadDocument):
                document = list(encoder.segments(item.value))
                segments += document
                characters -= sum(len(part) for part in document)
        at = after
    known = sum(len(part) for part in segments if not isinstance(part, str))
    texts = [part for part in segments if isinstance(part, str)]
    return known + sum(map(len, encoder.encode(texts))), units
