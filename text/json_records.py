"""JSON lines, elements of one JSON array, and gzip, cut into records with their places in bytes.

Bytes in, bytes out: what a record means, and how a fault in it is reported, is `row_readers`' matter.
"""

import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

BUFFER_BYTES = 1 << 22  # of file read at a time
ZIP_STEP = 1 << 16  # bytes decompressed at a time
GZIP = 31  # zlib's word for a gzip header and checksum
LONG_TEXT = 1 << 22  # bytes; longer texts stay UTF-8 bytes, as a str may take four times as much
JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"')


class Unzipped(io.RawIOBase):
    """A gzip file decompressed in small steps, so that everything before a damage is still given out.

    Seeking decompresses from the start, always in the same steps, so that a damage is met at the same place.
    """

    def __init__(self, handle: BinaryIO):
        self.handle = handle
        self._rewind()

    def _rewind(self) -> None:
        self.handle.seek(0)
        self.engine = zlib.decompressobj(GZIP)
        self.packed, self.plain, self.position = b"", b"", 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        offset += self.position if whence == io.SEEK_CUR else 0
        if offset < self.position:
            self._rewind()
        while self.position < offset and (taken := self._take(offset - self.position)):
            self.position += len(taken)
        return self.position

    def readinto(self, buffer: Any) -> int:
        taken = self._take(len(buffer))
        buffer[: len(taken)] = taken
        self.position += len(taken)
        return len(taken)

    def _take(self, count: int) -> bytes:
        while not self.plain and self._step():
            pass
        taken, self.plain = self.plain[:count], self.plain[count:]
        return taken

    def _step(self) -> bool:
        """Decompress a little more; False at the end of the file."""
        if self.engine.eof:  # gzip files may be joined
            self.packed, self.engine = self.engine.unused_data, zlib.decompressobj(GZIP)
            self.packed = self.packed or self.handle.read(ZIP_STEP)
            if not self.packed.strip(b"\0"):
                return False
        self.packed = self.packed or self.handle.read(ZIP_STEP)
        if not self.packed:
            raise EOFError("the gzip file is cut off")
        self.plain = self.engine.decompress(self.packed, ZIP_STEP)
        self.packed = self.engine.unconsumed_tail
        return True


def line_records(stream: BinaryIO, offset: int) -> Iterator[tuple[int, int, bytes]]:
    """The lines of `stream` from `offset` on: where each begins and ends, in bytes, and its text."""
    for line in stream:
        yield offset, offset + len(line), line
        offset += len(line)


class BrokenArray(ValueError):
    """The text is no JSON array any more."""


def array_records(stream: BinaryIO, offset: int) -> Iterator[tuple[int, int, bytes]]:
    """The elements of one JSON array like `line_records`, read part by part (OpenHermes-2.5 is one array of 2 GB).

    JSON's structure is ASCII, so that decoding as latin-1 finds the elements with one character a byte. Raises
    `BrokenArray` where the text is no array any more.
    """
    scan = json.JSONDecoder(strict=False).raw_decode
    gap = re.compile(r"[\s,\[]*")
    text, at, wanted = "", 0, BUFFER_BYTES
    while True:
        at = gap.match(text, at).end()  # type: ignore[union-attr]
        stop = None
        if at < len(text):
            if text[at] == "]":
                return
            try:
                stop = scan(text, at)[1]
            except json.JSONDecodeError as error:
                if not _is_cut(error, text):
                    raise BrokenArray(error.msg) from None
        if stop is not None and stop < len(text):
            yield offset + at, offset + stop, text[at:stop].encode("latin-1")
            at = stop
            continue
        more = stream.read(wanted)
        if not more:
            raise BrokenArray("the file ends inside its array")
        wanted = BUFFER_BYTES if stop is None and at == len(text) else 2 * wanted
        offset, text, at = offset + at, text[at:] + more.decode("latin-1"), 0


def _is_cut(error: json.JSONDecodeError, text: str) -> bool:
    return error.pos >= len(text) - 16 or error.msg.startswith("Unterminated string")


def parsed_record(record: bytes) -> Any:
    """The value of one JSON text; long strings in an object become UTF-8 bytes, decoded window by window.

    No str of a long one is ever made. Raises `ValueError` (of which `UnicodeError` is one) or `RecursionError`.
    """
    if len(record) <= LONG_TEXT:
        return json.loads(record)
    texts: list[bytes] = []

    def hold(match: re.Match[bytes]) -> bytes:
        if match.end() - match.start() <= LONG_TEXT:
            return match[0]
        texts.append(_unescaped(record, match.start() + 1, match.end() - 1))
        return b'"\\u0000long %d"' % (len(texts) - 1)

    value = json.loads(JSON_STRING.sub(hold, record))
    if isinstance(value, dict):
        held = {f"\0long {index}": text for index, text in enumerate(texts)}
        if sum(item in held for item in value.values() if isinstance(item, str)) < len(held):
            return json.loads(record)  # long texts further inside, in a conversation
        value = {name: held.get(item, item) if isinstance(item, str) else item for name, item in value.items()}
    return value


def _unescaped(record: bytes, start: int, stop: int) -> bytes:
    """The UTF-8 text of a JSON string's inside, cut at spaces, which are in no escape and in no character."""
    text = io.BytesIO()  # gives its content out without a copy
    while start < stop:
        end = record.find(b" ", start + BUFFER_BYTES, stop)
        end = stop if end < 0 else end
        text.write(json.loads(b'"%b"' % record[start:end]).encode())
        start = end
    return text.getvalue()
