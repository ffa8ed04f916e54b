"""A source loaded at once: one Arrow file in HF_DATASETS_CACHE, mapped into memory, with every row at hand."""

import bisect
import itertools
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from row_readers import BadData
from text_sources import TextSource

log = logging.getLogger(__name__)

ROWS_A_BATCH = 1024


class TextTable:
    """Rows as (value, name), in the files' order; `BadData` values where a row could not be read."""

    def __init__(self, path: Path, chat: bool):
        import pyarrow as pa

        self.chat = chat
        self.batches = [batch for batch in pa.ipc.open_stream(pa.memory_map(str(path))) if batch.num_rows]
        self.ends = list(itertools.accumulate(batch.num_rows for batch in self.batches))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> tuple[Any, str]:
        number = bisect.bisect_right(self.ends, index)
        batch = self.batches[number]
        row = index - self.ends[number] + batch.num_rows
        value, name, bad = (batch.column(i)[row].as_py() for i in range(3))
        if bad:
            return BadData(value), name
        return (json.loads(value) if self.chat and value is not None else value), name


def load_table(source: TextSource) -> TextTable:
    """The whole source; read once, and found again in the cache by later runs and other ranks."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "packed_text"
    path = folder / f"{source.identity}-{source.stamp()}-{source.column}.arrow"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        log.info("%s: loading %d files at once into %s", source.name, len(source.files), path)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as scratch:
            try:
                _write(source, scratch)
                os.replace(scratch.name, path)
            except BaseException:
                os.unlink(scratch.name)
                raise
    return TextTable(path, source.chat)


def _write(source: TextSource, handle: Any) -> None:
    import pyarrow as pa

    schema = pa.schema([("text", pa.large_string()), ("name", pa.string()), ("bad", pa.bool_())])
    rows = source.documents(list(range(len(source.files))), (0, 0, 0))
    with pa.ipc.new_stream(handle, schema) as writer:
        while chunk := list(itertools.islice(rows, ROWS_A_BATCH)):
            columns = zip(*(_stored(value, name, source.chat) for value, name, _ in chunk))
            writer.write_batch(pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema)], schema=schema))
    handle.flush()
    os.fsync(handle.fileno())


def _stored(value: Any, name: str, chat: bool) -> tuple[str | None, str, bool]:
    if isinstance(value, BadData):
        return str(value), name, True
    if value is not None and chat:
        return json.dumps(value), name, False
    if value is None or isinstance(value, str):
        try:
            (value or "").encode()
            return value, name, False
        except UnicodeEncodeError as error:
            return f"{name}: invalid Unicode: {error}", name, True
    return f"{name}: the column holds {type(value).__name__}, not text", name, True
