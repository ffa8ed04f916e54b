"""The global order of documents: each pass, block by block, from any position reached before.

Shuffling: each pass (epoch) permutes the files and then, block by block, the documents of each block of
`shuffle_buffer` consecutive ones; both from (seed, epoch, block). So the whole state is a *cursor*: epoch, block,
where the block starts, and how far into the block's order, the document and its tokens the last sequence reached.
Restoring reads one block again, not the stream. A source that is loaded at once is permuted as a whole.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from text.pass_share import PassShare
from text.text_sources import Position, TextSource, TextTable

UNSHUFFLED_BLOCK = 256  # documents read at a time when they are not shuffled
TABLE_BLOCK = 1024  # documents taken at a time from a source that was loaded at once
BLOCK_CHARACTERS = 1 << 28  # a block ends early at this much text, so that huge documents do not add up


class Cursor(NamedTuple):
    """The first token that has not been given out. `file`, `row`, `offset`: where the block starts."""

    epoch: int = 0
    block: int = 0
    file: int = 0  # place in this epoch's order of files
    row: int = 0
    offset: int = 0  # bytes, in JSON files
    document: int = 0  # place in the block's order of documents
    segment: int = 0  # of the document
    token: int = 0  # of the segment


def draw_order(count: int, *seed: int) -> np.ndarray:
    """A permutation of range(count) from integers, the same on every machine and numpy version (raw Philox bits)."""
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")


@dataclass
class Block:
    """Consecutive documents in the order in which they are given out, as (value, name)."""

    start: Cursor
    rows: list[tuple[Any, str]]
    begins: float | None = None  # what share of the pass lies before it, where that is measured
    ends: float | None = None

    def share(self, index: int) -> float | None:
        """Of all passes, in passes, up to the end of document `index`."""
        if self.begins is None or self.ends is None:
            return None
        return self.start.epoch + self.begins + (self.ends - self.begins) * (index + 1) / max(1, len(self.rows))


class StreamedBlocks:
    """Blocks of a source that is read from front to back, file by file."""

    def __init__(self, source: TextSource, seed: int, shuffle_buffer: int, measured: bool = False):
        self.source, self.seed, self.shuffle_buffer = source, seed, shuffle_buffer
        self.shares = PassShare(source.files, source.sizes) if measured else None

    def epoch(self, cursor: Cursor) -> Iterator[Block]:
        """The blocks of one pass from the cursor's block on."""
        files = len(self.source.files)
        order = draw_order(files, self.seed, cursor.epoch).tolist() if self.shuffle_buffer else list(range(files))
        size = self.shuffle_buffer or UNSHUFFLED_BLOCK
        start, rows, characters = cursor._replace(document=0, segment=0, token=0), [], 0
        for value, name, after in self.source.documents(order, cursor[2:5]):
            rows.append((value, name))
            characters += _characters(value)
            if len(rows) == size or characters >= BLOCK_CHARACTERS:
                yield self._ordered(start, rows, order, after)
                start = Cursor(start.epoch, start.block + 1, *after)
                rows, characters = [], 0
        if rows:
            yield self._ordered(start, rows, order, (len(order), 0, 0))

    def _ordered(self, start: Cursor, rows: list[tuple[Any, str]], files: list[int], after: Position) -> Block:
        shares = self.shares and [self.shares.before(files, position) for position in (start[2:5], after)]
        if self.shuffle_buffer:
            rows = [rows[index] for index in draw_order(len(rows), self.seed, start.epoch, start.block)]
        return Block(start, rows, *(shares or ()))


def _characters(value: object) -> int:
    if isinstance(value, list):
        return sum(len(str(turn)) for turn in value)
    return len(value) if isinstance(value, str | bytes | memoryview) else 0


class TableBlocks:
    """Blocks of a source that was loaded at once: slices of one permutation of all its documents a pass."""

    def __init__(self, table: TextTable, seed: int, shuffle: bool):
        self.table, self.seed, self.shuffle = table, seed, shuffle

    def epoch(self, cursor: Cursor) -> Iterator[Block]:
        """The blocks of one pass from the cursor's block on."""
        count = len(self.table)
        order = draw_order(count, self.seed, cursor.epoch) if self.shuffle else np.arange(count)
        for block in range(cursor.block, math.ceil(count / TABLE_BLOCK)):
            chosen = order[block * TABLE_BLOCK : (block + 1) * TABLE_BLOCK]
            rows = [self.table[int(index)] for index in chosen]
            first = block * TABLE_BLOCK
            yield Block(Cursor(cursor.epoch, block), rows, first / count, (first + len(rows)) / count)
