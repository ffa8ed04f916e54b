"""Packed sequences: documents in a shuffled order, joined by end-of-text, cut into seq_length + 1 tokens.

The order of documents, and the cursor that is the whole state, are `blocks`' matter.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from text.blocks import Block, Cursor, StreamedBlocks, TableBlocks
from text.documents import BadDocument, DocumentEncoder, TextOrIds, ids_of
from text.row_readers import BadData
from text.text_sources import TEXT_VERSION, SourceSpec, TextSource, load_table, open_source
from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

FIRST_CHARACTERS, MOST_CHARACTERS = 1 << 16, 1 << 20  # of text tokenised at once, at the start and later


@dataclass
class Sequence:
    """seq_length + 1 tokens, and the state behind them."""

    tokens: torch.Tensor  # int64 [T+1]
    length: int  # real tokens; the rest (only at the end of the last pass) is filled with separators
    starts: list[int]  # where its documents begin
    documents: list[str]
    cursor: Cursor
    counters: dict[str, int]
    share: float | None = None  # of all passes, up to its end
    mark: Any = None  # where a mixture of sources stands behind it

    @property
    def positions(self) -> torch.Tensor:
        """int64 [T+1]: place in the document, from 0 at the sequence's start."""
        starts = np.zeros(len(self.tokens), dtype=np.int64)
        starts[self.starts] = self.starts
        return torch.from_numpy(np.arange(len(starts)) - np.maximum.accumulate(starts))


@dataclass
class Segment:
    """Tokens of a part of a document, and its place; of none where an epoch ends."""

    cursor: Cursor
    ids: Any  # np.ndarray int32, or str until it is tokenised
    name: str = ""
    ends: bool = False  # the document ends with it
    skipped: dict[str, int] = field(default_factory=dict)  # rows passed over before it
    share: float | None = None  # see Block.share


Tokenised = tuple[list[Segment], list[Any]]  # segments, and the backend's encodings of those that are text


def with_ids(batches: Iterator[Tokenised]) -> Iterator[Segment]:
    """The segments one by one, with ids in place of text. Apart from the tokenising, which lets other threads run."""
    for segments, encodings in batches:
        texts = iter(encodings)
        for segment in segments:
            if isinstance(segment.ids, str):
                segment.ids = ids_of(next(texts))
            yield segment


class PackedTextDataset(IterableDataset):
    """Whole sequences of seq_length + 1 tokens in the global order, usable without a loader.

    Iterating goes on from `state_dict()`; `epochs` None never ends. After the last pass the tokens that are left
    are one sequence filled up with separators, whose `length` says how many of its tokens are real.
    """

    def __init__(
        self,
        spec: SourceSpec,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        seq_length: int,
        seed: int = 42,
        epochs: int | None = None,
        source: TextSource | None = None,
    ):
        super().__init__()
        self.spec, self.seq_length, self.seed, self.epochs = spec, seq_length, seed, epochs
        self.source = source or open_source(spec)
        self.encoder = self._make_encoder(tokenizer)
        self.cursor, self.sequences = Cursor(), 0
        self.share: float | None = None  # of all passes, what was given out
        self.counters = dict.fromkeys(("documents", "skipped_empty", "bad", "tokens"), 0)
        self.blocks = self._make_blocks()
        self._check_enough()

    def _make_encoder(self, tokenizer: "PreTrainedTokenizerBase") -> DocumentEncoder:
        return DocumentEncoder(tokenizer, self.source.chat, started=self.spec.version > 1)

    def _make_blocks(self) -> StreamedBlocks | TableBlocks:
        if self.spec.streaming:
            return StreamedBlocks(self.source, self.seed, self.spec.shuffle_buffer, self.epochs is not None)
        return TableBlocks(load_table(self.source), self.seed, shuffle=self.spec.shuffle_buffer > 0)

    def _check_enough(self) -> None:
        """One pass must fill a sequence; reads no further than that, in the files' own order."""
        wanted, found = self.seq_length + 1, 0
        blocks = StreamedBlocks(self.source, self.seed, 0) if self.spec.streaming else self.blocks
        for segment in with_ids(self._tokenised(self._segments(blocks.epoch(Cursor()), Cursor()), 1 << 12)):
            found += len(segment.ids)
            if found >= wanted:
                return
        raise UserError(
            f"{self.spec.name}: {found} tokens in all, fewer than one sequence of {wanted} (--seq_length + 1)"
            if found
            else f"{self.spec.name}: empty dataset, no text in column {self.source.column}"
        )

    def __iter__(self) -> Iterator[Sequence]:
        worker = get_worker_info()
        for number, sequence in enumerate(self.stream()):
            if worker is None or number % worker.num_workers == worker.id:
                self.advance(sequence)
                yield sequence

    def places(self) -> set[str]:
        """Where its files are."""
        return self.source.places()

    def stop_with(self, stop: Any) -> None:
        """Waiting for the network ends when the event `stop` is set."""
        self.source.patience.stop = stop

    def advance(self, sequence: Sequence, count: int = 1) -> None:
        """Take note that everything up to this sequence was given out, `count` sequences more than before."""
        self.cursor, self.counters, self.share = sequence.cursor, sequence.counters, sequence.share
        self.sequences += count

    def stream(self, ahead: Callable[[Iterator[Any]], Iterator[Any]] = iter) -> Iterator[Sequence]:
        """Sequences from the state on, without moving it; `ahead` may put reading and tokenising into threads."""
        blocks = itertools.chain.from_iterable(ahead(self._all_blocks(self.cursor)))
        batches = ahead(self._tokenised(self._segments(blocks, self.cursor), MOST_CHARACTERS))
        return self._packed(with_ids(batches))

    def _all_blocks(self, cursor: Cursor) -> Iterator[list[Block]]:
        """One block at a time; the empty one that ends an epoch comes with the next, so that reading stays ahead."""
        ended: list[Block] = []
        while self.epochs is None or cursor.epoch < self.epochs:
            for block in self.blocks.epoch(cursor):
                yield [*ended, block]
                ended = []
            cursor = Cursor(cursor.epoch + 1)
            ended.append(Block(cursor, []))
        yield ended

    def _segments(self, blocks: Iterator[Block], cursor: Cursor) -> Iterator[Segment]:
        """Segments of the documents in order, from the cursor's segment on, still untokenised."""
        skipped: dict[str, int] = {}
        for block in blocks:
            if not block.rows:  # an epoch ends
                yield Segment(block.start, self.encoder.separator[:0], skipped=skipped)
                skipped = {}
            first = cursor.document if block.start[:2] == cursor[:2] else 0
            for index in range(first, len(block.rows)):
                value, name = block.rows[index]
                at = block.start._replace(document=index)
                for number, content in enumerate(self._contents(value, name, skipped)):
                    if at[:6] == cursor[:6] and number < cursor.segment:
                        continue
                    ends = content is self.encoder.separator
                    yield Segment(at._replace(segment=number), content, name, ends, skipped, block.share(index))
                    skipped = {}

    def _contents(self, value: object, name: str, skipped: dict[str, int]) -> Iterable[TextOrIds]:
        try:
            if isinstance(value, BadData):
                raise value
            try:
                contents = self.encoder.segments(value)
            except BadDocument as error:
                raise BadData(f"{name}: {error} (--on_bad_data skip passes over it)") from error
        except BadData as error:
            if self.spec.on_bad_data == "error":
                raise
            log.warning("skipped: %s", error)
            skipped["bad"] = skipped.get("bad", 0) + 1
            return []
        if contents == []:
            skipped["skipped_empty"] = skipped.get("skipped_empty", 0) + 1
        return contents

    def _tokenised(self, segments: Iterator[Segment], most: int) -> Iterator[Tokenised]:
        """The segments with their text tokenised, in batches of a growing number of characters."""
        limit, waiting, characters = min(FIRST_CHARACTERS, most), [], 0
        failure: Exception | None = None
        try:
            for segment in segments:
                waiting.append(segment)
                characters += len(segment.ids)
                if characters >= limit:
                    yield self._encoded(waiting)
                    waiting, characters, limit = [], 0, min(4 * limit, most)
        except Exception as error:  # what came before it is given out first
            failure = error
        yield self._encoded(waiting)
        if failure is not None:
            raise failure

    def _encoded(self, segments: list[Segment]) -> Tokenised:
        texts = [segment.ids for segment in segments if isinstance(segment.ids, str)]
        return segments, self.encoder.encode(texts)

    def _packed(self, segments: Iterator[Segment]) -> Iterator[Sequence]:
        """Cut the segments' tokens into sequences."""
        size, counters, draft = self.seq_length + 1, dict(self.counters), Draft()
        skip, cursor = self.cursor.token, self.cursor
        for segment in segments:
            for name, count in segment.skipped.items():
                counters[name] += count
            at, skip = skip, 0
            while at < len(segment.ids):
                taken = segment.ids[at : at + size - draft.length]
                at += len(taken)
                ended = segment.ends and at == len(segment.ids)
                draft.add(taken, segment.name, ended)
                counters["documents"] += ended
                counters["tokens"] += len(taken)
                if draft.length == size:
                    share = (
                        None if segment.share is None or not self.epochs else round(segment.share / self.epochs, 9)
                    )
                    after = segment.cursor._replace(token=at)
                    yield draft.as_sequence(size, after, dict(counters), self.encoder.separator, share)
                    draft = Draft()
            cursor = segment.cursor._replace(token=len(segment.ids))
        if draft.length:
            yield draft.as_sequence(size, cursor, dict(counters), self.encoder.separator, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain python, a few hundred bytes whatever the source, the buffer or the position."""
        return {
            "version": self.spec.version,
            "source": self.source.identity,
            "commit": self.source.commit,
            "order": [self.seed, self.spec.shuffle_buffer, self.spec.streaming],
            "cursor": list(self.cursor),
            "sequences": self.sequences,
            "counters": dict(self.counters),
            **({} if self.share is None else {"share": self.share}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, at any world size and batch size, and by the rules of its version.

        Raises `UserError` when the files, the seed or the shuffling are others than then.
        """
        if state["version"] not in range(1, TEXT_VERSION + 1):
            raise UserError(f"{self.spec.name}: the data state was saved by a newer version of this toolkit")
        if state["version"] != self.spec.version:
            self.spec = replace(self.spec, version=state["version"])
            self.encoder = self._make_encoder(self.encoder.tokenizer)
        if state["commit"] and state["commit"] != self.source.commit:
            self.source = open_source(self.spec, state["commit"])
            self.blocks = self._make_blocks()
        if state["source"] != self.source.identity:
            raise UserError(f"{self.spec.name}: its files are not those that the saved data state was taken with")
        if list(state["order"]) != [self.seed, self.spec.shuffle_buffer, self.spec.streaming]:
            raise UserError(
                "the saved data state was taken with --seed, --shuffle_buffer, streaming = "
                f"{tuple(state['order'])}, not {(self.seed, self.spec.shuffle_buffer, self.spec.streaming)}"
            )
        self.cursor = Cursor(*state["cursor"])
        self.sequences, self.counters = state["sequences"], dict(state["counters"])
        self.share = state.get("share")


class Draft:
    """A sequence being filled."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.length = 0
        self.starts: list[int] = []  # where documents begin
        self.names: list[str] = []
        self.at_start = True

    def add(self, ids: np.ndarray, name: str, ended: bool) -> None:
        """Append tokens of one document; `ended` if the next ones are another document's."""
        if self.at_start:
            self.starts.append(self.length)
            self.names.append(name)
        self.parts.append(ids)
        self.length += len(ids)
        self.at_start = ended

    def as_sequence(
        self, size: int, cursor: Cursor, counters: dict[str, int], filler: np.ndarray, share: float | None
    ) -> Sequence:
        """The sequence, filled up to `size` tokens."""
        tokens = np.concatenate([*self.parts, np.repeat(filler, size - self.length)]).astype(np.int64)
        return Sequence(torch.from_numpy(tokens), self.length, self.starts, self.names, cursor, counters, share)
