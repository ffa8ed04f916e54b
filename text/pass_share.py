"""How much of a pass over a source lies before a position, by stored bytes; for passes that end (`--epochs`)."""

import contextlib
import os
import zlib
from collections.abc import Sequence

from text.json_records import Unzipped
from text.row_readers import END, BadData, TextFile

RATIO_BYTES = 1 << 22  # of decompressed text that a file's ratio is taken from


class PassShare:
    """Shares of a pass over files of known sizes; a file is opened for a position in its middle, once."""

    def __init__(self, files: Sequence[TextFile], sizes: Sequence[int]):
        self.files, self.sizes = files, sizes
        self.units: dict[int, int] = {}  # rows of a parquet or Arrow file, bytes of a JSON text

    def before(self, order: Sequence[int], position: tuple[int, int, int]) -> float | None:
        """Share of the pass over the files in `order` before (place in order, row, byte offset), from 0 to 1.

        None where it cannot be told: Arrow streams on the Hub do not say how long they are.
        """
        place, row, offset = position
        if any(file.format == "arrow" and not file.written for file in self.files):
            return None
        stored = float(sum(self.sizes[index] for index in order[:place]))
        if place < len(order):
            stored += self.sizes[order[place]] * self._within(order[place], row, offset)
        return min(1.0, stored / max(1, sum(self.sizes)))

    def _within(self, index: int, row: int, offset: int) -> float:
        if row == END or row == offset == 0:
            return float(row == END)
        file = self.files[index]
        if index not in self.units:
            with contextlib.suppress(BadData):  # no footer: such a file has no positions in its middle
                rows = file.row_count()
                self.units[index] = text_size(file) if rows is None else rows
        at = offset if file.format in ("json", "jsonl") else row
        return min(1.0, at / max(1, self.units.get(index, 1)))


def text_size(file: TextFile) -> int:
    """Bytes of a JSON file; of a compressed one the decompressed size, from the ratio of its beginning."""
    if not file.compressed:
        return file.size()
    with file.open() as handle:
        stored, stream = handle.seek(0, os.SEEK_END), Unzipped(handle)
        with contextlib.suppress(EOFError, zlib.error):  # a damaged file: what there is of it
            stream.seek(RATIO_BYTES)
        return stream.position * stored // max(1, handle.tell() - len(stream.packed))
