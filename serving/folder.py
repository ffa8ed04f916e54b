"""A folder that is there whole or not at all, and the files in it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoints.files import sync_folder, write_bytes


@contextmanager
def draft_of(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its name where the block ends well, and goes otherwise."""
    draft = output.absolute().with_name(f".{output.absolute().name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        sync_folder(draft)
        draft.replace(output)
        sync_folder(output.absolute().parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """A small new file, synced."""
    write_bytes(path, text.encode())
