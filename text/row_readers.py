"""Rows of parquet, Arrow, JSON and gzipped JSON files, from any position that was reached before.

A position is (row, offset): the row's number in its file and, for JSON, its byte offset in the (decompressed) text.
Parquet seeks to the row group, JSON to the byte; a gzip file cannot be sought in, so it alone is decompressed
again from its start. What cannot be read becomes a `BadData` in the row's place, with file and position named.
"""

import codecs
import contextlib
import io
import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from text.json_records import (
    BUFFER_BYTES,
    LONG_TEXT,
    BrokenArray,
    Unzipped,
    array_records,
    line_records,
    parsed_record,
)
from utils import UserError

END = -1  # as a position's row: nothing is left in this file
GROUP_BYTES = 1 << 24  # of decoded column held at a time
MOST_ROWS = 1024  # rows decoded at a time
PEEKED_ROWS = 100  # rows of a JSON file that are looked at to learn its columns


class BadData(UserError):
    """A row, or the rest of a file, that cannot be read; the message names the file and the position."""


class Row(NamedTuple):
    """One row of one column, and the position behind it."""

    value: Any  # the column's value (str, list, ... or None; a long text as UTF-8 bytes or a view), or BadData
    row: int
    next_row: int  # END after the last row that can be read
    next_offset: int


@dataclass(frozen=True)
class TextFile:
    """A data file, local or on the Hub: `open` gives a seekable binary handle."""

    name: str
    open: Callable[[], Any] = field(compare=False)
    stamp: str = ""  # changes when the content does (size; on the Hub the commit stands for all files)
    written: str = ""  # where and when a local file was written

    @property
    def format(self) -> str:
        """One of parquet, arrow, jsonl, json; raises `UserError` for any other ending."""
        found = data_format(self.name)
        if found is None:
            raise UserError(f"{self.name}: not a format that can be read (parquet, jsonl, jsonl.gz, json, arrow)")
        return found

    @property
    def compressed(self) -> bool:
        return self.name.endswith(".gz")

    def size(self) -> int:
        """Bytes of the file as stored."""
        with self.open() as handle:
            return handle.seek(0, io.SEEK_END)

    def row_count(self) -> int | None:
        """Rows of a parquet file by its footer, or of a local Arrow stream; None where none are counted so quickly.

        Raises `BadData` for a parquet file without a footer.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.format not in ("parquet", "arrow"):
            return None
        with self.open() as handle:
            try:
                if self.format == "arrow":
                    return _mapped_rows(handle.name) if isinstance(handle, io.FileIO) else None
                return pq.read_metadata(handle).num_rows
            except (pa.ArrowException, OSError) as error:
                raise self.bad(error, 0) from error

    def rows(self, column: str, row: int = 0, offset: int = 0) -> Iterator[Row]:
        """The column's rows from a position on; never raises for bad content, which is yielded as `BadData`."""
        if row == END:
            return iter(())
        readers = {"parquet": _parquet_rows, "arrow": _arrow_rows}
        return readers.get(self.format, _json_rows)(self, column, row, offset)

    def bad(self, error: object, row: int, offset: int | None = None) -> BadData:
        """A `BadData` that names this file and the position."""
        place = f"row {row + 1}" if offset is None else f"line {row + 1} (byte {offset})"
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return BadData(f"{self.name}: {place}: {reason} (--on_bad_data skip passes over it)")


def data_format(name: str) -> str | None:
    """The format that a file's name ends in, None for files that hold no data."""
    match = re.search(r"\.(parquet|arrow|jsonl|json)(\.gz)?$", name, re.IGNORECASE)
    if match is None or (match[2] and match[1].lower() in ("parquet", "arrow")):
        return None
    return match[1].lower()


def column_types(file: TextFile) -> dict[str, str]:
    """Names and types of a file's columns (of a JSON file, those of its first rows, without types).

    Raises `BadData` when the file cannot be opened as what its name says.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if file.format in ("parquet", "arrow"):
        try:
            with file.open() as handle:
                schema = pq.read_schema(handle) if file.format == "parquet" else pa.ipc.open_stream(handle).schema
        except (pa.ArrowException, OSError) as error:
            raise file.bad(error, 0) from error
        return {name: str(schema.field(name).type) for name in schema.names}
    names: dict[str, str] = {}
    for row in itertools.islice(_json_rows(file, None, 0, 0), PEEKED_ROWS):
        if isinstance(row.value, BadData):
            if not names:
                raise row.value
            break
        names |= dict.fromkeys(row.value, "")
    return names


def _parquet_rows(file: TextFile, column: str, row: int, offset: int) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_memory_pool(pa.system_memory_pool())  # gives a long text's memory back to the system at once
    with file.open() as handle:
        try:
            native = pa.OSFile(handle.name) if isinstance(handle, io.FileIO) else handle
            reader = pq.ParquetFile(native, buffer_size=BUFFER_BYTES)
            if column not in reader.schema_arrow.names:
                raise pa.ArrowInvalid(f"no column {column}")
        except (pa.ArrowException, OSError) as error:
            yield Row(file.bad(error, 0), 0, END, 0)
            return
        first = 0
        for group in range(reader.num_row_groups):
            last = first + reader.metadata.row_group(group).num_rows
            if row < last:
                yield from _group_rows(file, reader, group, column, row, first, last)
                row = last
            first = last


def _group_rows(file: TextFile, reader, group: int, column: str, row: int, first: int, last: int) -> Iterator[Row]:
    """Rows of one row group [first, last) from `row` on; an unreadable rest of it is one `BadData`."""
    import pyarrow as pa

    size = sum(
        chunk.total_uncompressed_size
        for chunk in map(reader.metadata.row_group(group).column, range(reader.metadata.num_columns))
        if chunk.path_in_schema.partition(".")[0] == column
    )
    count = max(1, min(MOST_ROWS, GROUP_BYTES * (last - first) // max(size, 1)))
    batches = reader.iter_batches(count, row_groups=[group], columns=[column], use_threads=False)
    position = first
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            yield Row(file.bad(error, max(position, row)), max(position, row), last, 0)
            return
        if batch is None:
            return
        start = max(row - position, 0)
        yield from _array_rows(file, batch.column(0).slice(start), position + start)
        position += batch.num_rows


def _array_rows(file: TextFile, array: Any, row: int) -> Iterator[Row]:
    try:
        values = [None] * len(array) if _has_long_texts(array) else array.to_pylist()
    except UnicodeDecodeError:
        values = [None] * len(array)
    for index, value in enumerate(values):
        if value is None:  # null, invalid or long
            value = _decoded(file, array, index, row + index)
        yield Row(value, row + index, row + index + 1, 0)


def _has_long_texts(array: Any) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc

    if not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        return False
    return (pc.max(pc.binary_length(array)).as_py() or 0) > LONG_TEXT


def _decoded(file: TextFile, array: Any, index: int, row: int) -> Any:
    try:
        return plain_value(array, index)
    except UnicodeDecodeError as error:
        return file.bad(f"invalid UTF-8: {error}", row)


def plain_value(array: Any, index: int) -> Any:
    """A value of an Arrow array as Python knows it, a long text as UTF-8 in place; raises `UnicodeDecodeError`."""
    one = array.slice(index, 1)
    if not _has_long_texts(one):
        return one[0].as_py()
    _, offsets, data = one.buffers()  # an Arrow scalar would be a copy of the text
    width = np.int32 if str(one.type) == "string" else np.int64
    start, stop = np.frombuffer(offsets, width)[one.offset : one.offset + 2].tolist()
    return check_utf8(memoryview(data.slice(start, stop - start)).cast("B"))


def check_utf8(data: memoryview) -> memoryview:
    """`data` itself; raises `UnicodeDecodeError` unless it is UTF-8. Decodes piece by piece, to save memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), BUFFER_BYTES):
        decoder.decode(data[start : start + BUFFER_BYTES], final=start + BUFFER_BYTES >= len(data))
    return data


def _mapped_rows(path: str) -> int:
    """Rows of an Arrow stream up to its end or first damage: of a mapped file the batches' headers alone are read."""
    import pyarrow as pa

    rows = 0
    with pa.memory_map(path) as handle, contextlib.suppress(pa.ArrowException, OSError):
        for batch in pa.ipc.open_stream(handle):
            rows += batch.num_rows
    return rows


def _arrow_rows(file: TextFile, column: str, row: int, offset: int) -> Iterator[Row]:
    import pyarrow as pa

    with file.open() as handle:
        first = 0
        try:
            for batch in pa.ipc.open_stream(handle):
                if row < first + batch.num_rows:
                    start = max(row - first, 0)
                    yield from _array_rows(file, batch.column(column).slice(start), first + start)
                first += batch.num_rows
        except (pa.ArrowException, OSError, KeyError) as error:
            yield Row(file.bad(error, first), first, END, 0)


def _json_rows(file: TextFile, column: str | None, row: int, offset: int) -> Iterator[Row]:
    """Rows of JSON lines or of one JSON array; `column` None gives whole records."""
    with file.open() as handle:
        stream = io.BufferedReader(Unzipped(handle) if file.compressed else handle, BUFFER_BYTES)
        try:
            is_array = file.format == "json" and stream.peek(64).lstrip()[:1] == b"["
            stream.seek(offset)
            records = array_records(stream, offset) if is_array else line_records(stream, offset)
            for start, stop, record in records:
                offset = stop
                if record.strip():
                    yield Row(_parsed(file, record, column, row, start), row, row + 1, stop)
                row += 1
        except (EOFError, zlib.error, BrokenArray) as error:
            yield Row(file.bad(error, row, offset), row, END, 0)


def _parsed(file: TextFile, record: bytes, column: str | None, row: int, offset: int) -> Any:
    try:
        value = parsed_record(record)
    except UnicodeError as error:
        return file.bad(f"invalid UTF-8: {str(error)[-200:]}", row, offset)
    except (ValueError, RecursionError) as error:
        return file.bad(f"not JSON: {error}", row, offset)
    if not isinstance(value, dict):
        return file.bad(f"not a JSON object but {type(value).__name__}", row, offset)
    return value if column is None else value.get(column)
