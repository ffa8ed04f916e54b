"""Where text comes from: a Hub dataset, a local folder or file; its files, its column, its rows in their order."""

import bisect
import hashlib
import itertools
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from hub.hub_files import DataStreamLost, HubFile, Patience, cache_folders, cached_files, cached_tree, list_hub_files
from text.row_readers import BadData, TextFile, column_types, data_format, plain_value
from utils import UserError

__all__ = ["BadData", "DataStreamLost", "SourceSpec", "TextSource", "TextTable", "load_table", "open_source"]

log = logging.getLogger(__name__)

TEXT_VERSION = 2  # 1: runs begun when documents had no start of the tokenizer's own
ROWS_A_BATCH = 1024
CONVERSATIONS = "conversations"  # OpenHermes' column of turns: a list of {from, value}
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}

Position = tuple[int, int, int]


@dataclass(frozen=True)
class SourceSpec:
    """What the flags say about one text source."""

    name: str  # hub id, folder or file
    subset: str = ""  # configuration on the Hub, subfolder of a local source; empty: none
    split: str = "train"
    revision: str | None = None  # on the Hub: commit, tag or branch
    text_field: str = "text"
    streaming: bool = True
    shuffle_buffer: int = 10_000  # documents that are shuffled among each other; 0: the files' own order
    local_files_only: bool = False
    on_bad_data: str = "error"  # or "skip"
    network_patience: float = 600.0  # seconds
    chat: bool | None = None  # None: conversations where there is no text column
    flag: str = "--dataset_"  # what the flags that say this begin with, for messages
    version: int = TEXT_VERSION  # of the rules from files to tokens; a resumed run keeps its own


@dataclass
class TextSource:
    """The files of a source in a fixed order, and the column that is read from them."""

    name: str
    files: list[TextFile]
    identity: str  # the same as long as the files are
    sizes: list[int] = field(default_factory=list)  # bytes of each file as stored
    commit: str | None = None  # of a Hub dataset
    column: str = "text"
    chat: bool = False
    patience: Patience = field(default_factory=lambda: Patience(600.0))

    @property
    def size(self) -> int:
        """Bytes of all files as stored."""
        return sum(self.sizes)

    def stamp(self) -> str:
        """Like `identity`, and also another one when a local file was written anew."""
        return hashlib.sha256(repr([file.written for file in self.files]).encode()).hexdigest()[:8]

    def places(self) -> set[str]:
        """Where each file is: a path, or a dataset and its file, whatever the revision."""
        return {file.written.rpartition(" ")[0] or f"{self.name}/{file.name}" for file in self.files}

    def documents(self, order: list[int], start: tuple[int, int, int]) -> Iterator[tuple[Any, str, Position]]:
        """(value, name, position behind it) of every row from `start` on, the files in `order`.

        A position is (place in order, row, byte offset). Values may be `BadData`.
        """
        place, row, offset = start
        for index in range(place, len(order)):
            file = self.files[order[index]]
            for item in file.rows(self.column, row, offset):
                yield item.value, f"{file.name}:{item.row + 1}", (index, item.next_row, item.next_offset)
            row = offset = 0


def open_source(spec: SourceSpec, commit: str | None = None) -> TextSource:
    """Find the files and the column of a source.

    `commit` pins a Hub dataset to the commit of a saved state. Raises `UserError` for a source, subset, split or
    column that is not there, an empty source, and under `local_files_only` for what the caches lack; `DataStreamLost`
    when the network stays away for longer than the patience.
    """
    source = find_files(spec, commit)
    if not source.files:
        raise UserError(f"{spec.name}: no data files (parquet, jsonl, jsonl.gz, json) in split {spec.split}")
    source.column, source.chat = choose_column(spec, source.files)
    return source


def find_files(spec: SourceSpec, commit: str | None = None) -> TextSource:
    """The files of a source, sorted by name, without a look into them."""
    patience = Patience(spec.network_patience)
    path = Path(spec.name).expanduser()
    if path.exists():
        return _local_source(spec, local_files(path, spec.subset, spec.split, spec.flag), patience)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", spec.name):
        raise UserError(f"{spec.name}: no such file or folder, nor a name of a Hub dataset")
    from huggingface_hub import constants

    if spec.local_files_only or constants.HF_HUB_OFFLINE:
        files, found = files_from_caches(replace(spec, revision=commit or spec.revision))
        return replace(_local_source(spec, files, patience), commit=found)
    listing = list_hub_files(spec.name, spec.subset, spec.split, commit or spec.revision, patience, spec.flag)
    files = [_hub_file(listing.repo, listing.commit, path, patience) for path in listing.paths if data_format(path)]
    if not files:
        raise UserError(f"{spec.name}: its files ({listing.paths[0]}, ...) are not parquet or JSON")
    log.info("%s: %d files at commit %s", spec.name, len(files), listing.commit[:12])
    sizes = [listing.sizes.get(file.name, 0) for file in files]
    return TextSource(spec.name, files, identity_of(files), sizes, listing.commit, patience=patience)


def _local_source(spec: SourceSpec, files: list[TextFile], patience: Patience) -> TextSource:
    return TextSource(spec.name, files, identity_of(files), [int(file.stamp) for file in files], patience=patience)


def _hub_file(repo: str, commit: str, path: str, patience: Patience) -> TextFile:
    return TextFile(path, lambda: HubFile(repo, commit, path, patience), commit)


def _local_file(path: Path, root: Path) -> TextFile:
    status = path.stat()
    return TextFile(
        path.relative_to(root).as_posix(),
        lambda: open(path, "rb", buffering=0),
        str(status.st_size),
        f"{path.resolve()} {status.st_mtime_ns}",
    )


def identity_of(files: list[TextFile]) -> str:
    """A short name of exactly these files (names and sizes, or the commit)."""
    return hashlib.sha256(repr([(file.name, file.stamp) for file in files]).encode()).hexdigest()[:16]


def local_files(path: Path, subset: str, split: str, flag: str = "--dataset_") -> list[TextFile]:
    """Data files of a local file or folder, sorted.

    The subset names a subfolder (also under data/) or a configuration in the folder's README. File and folder names
    choose the split as the `datasets` library does; files whose names say nothing belong to train. Raises `UserError`
    naming `flag`subset or `flag`split and what there is.
    """
    if path.is_file():
        if subset:
            raise UserError(f"{flag}subset {subset}: {path} is a file, which has none; use {flag}subset ''")
        return [_local_file(path, path.parent)]
    for folder in (path / subset, path / "data" / subset):
        if subset and folder.is_dir():
            return _of_split(_data_paths(folder), folder, split, flag)
    configured = _readme_files(path, subset, split)
    if configured:
        return [_local_file(file, path) for file in configured]
    if subset:
        found = ", ".join(local_subsets(path)) or "none"
        raise UserError(f"{flag}subset {subset}: {path} has none such in split {split}; there: {found} ('': all)")
    return _of_split(_data_paths(path), path, split, flag)


def local_subsets(path: Path) -> list[str]:
    """What a subset of a local folder can be: its subfolders with data (also those of data/), and configurations."""
    folders = [each for root in (path, path / "data") if root.is_dir() for each in sorted(root.iterdir())]
    found = [folder.name for folder in folders if folder.is_dir() and folder != path / "data" and _data_paths(folder)]
    readme = path / "README.md"
    text = readme.read_text("utf-8", errors="replace")[:200_000] if readme.is_file() else ""
    return list(dict.fromkeys([*found, *re.findall(r"^ *- *config_name: *['\"]?([\w.-]+)", text, re.M)]))


def has_subset(name: str, subset: str) -> bool:
    """False where `name` is a local file or folder without this subset; the Hub is not asked."""
    path = Path(name).expanduser()
    if not subset or not path.exists():
        return True
    return any(folder.is_dir() for folder in (path / subset, path / "data" / subset)) or subset in local_subsets(path)


def _data_paths(folder: Path) -> list[Path]:
    """Data files under a folder, sorted; .json files only where there is nothing else (manifests are JSON too)."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if data_format(path.name) and not any(p.startswith((".", "_")) for p in path.relative_to(folder).parts)
    ]
    return [path for path in found if data_format(path.name) != "json"] or found


def _of_split(paths: list[Path], root: Path, split: str, flag: str) -> list[TextFile]:
    wanted = _split_of(split)
    by_split: dict[str, list[TextFile]] = {}
    for path in paths:
        by_split.setdefault(_split_of(path.relative_to(root).as_posix()) or "train", []).append(
            _local_file(path, root)
        )
    key = wanted or split
    if key in by_split:
        return by_split[key]
    named = [file for files in by_split.values() for file in files if split in re.split(r"[/.-]", file.name)]
    if not named and by_split:
        raise UserError(f"{flag}split {split}: {root} has {', '.join(sorted(by_split))}")
    return named


def _split_of(name: str) -> str | None:
    for word in re.split(r"[^a-z0-9]+", name.lower()):
        for split, words in SPLIT_WORDS.items():
            if word in words:
                return split
    return None


def _readme_files(folder: Path, subset: str, split: str) -> list[Path]:
    """Files that the README's `configs:` name for this subset, as in a mirror of a Hub dataset; else none."""
    readme = folder / "README.md"
    if not readme.is_file() or "\nconfigs:" not in readme.read_text("utf-8", errors="replace")[:200_000]:
        return []
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(str(folder.resolve()), subset or None)
    except (ValueError, FileNotFoundError):  # no such configuration, or its files were not mirrored
        return []
    files = sorted((builder.config.data_files or {}).get(split, []))
    return [folder / Path(file).relative_to(folder.resolve()) for file in files if data_format(file)]


def files_from_caches(spec: SourceSpec) -> tuple[list[TextFile], str | None]:
    """A Hub dataset's files from HF_HOME and HF_DATASETS_CACHE alone, and their commit where it is known.

    Raises `UserError` with what is missing.
    """
    snapshot, arrow = cached_files(spec.name, spec.subset, spec.split, spec.revision)
    files: list[TextFile] = []
    if snapshot is not None and _data_paths(snapshot):
        folders = [snapshot / spec.subset, snapshot / "data" / spec.subset]
        configured = bool(_readme_files(snapshot, spec.subset, spec.split))
        if not spec.subset or configured or any(folder.is_dir() for folder in folders):
            files = local_files(snapshot, spec.subset, spec.split, spec.flag)
    commit = snapshot.name if snapshot is not None and files else None
    if snapshot is not None and (missing := _missing(spec, snapshot, files)):
        raise UserError(
            f"--local_files_only: dataset {spec.name} is in the cache in part: {len(missing)} files are missing, "
            f"{missing[0]} the first; run download_all.py again with the same flags"
        )
    files = files or [_local_file(Path(path), Path(path).parent) for path in arrow]
    if not files:
        subset = f", subset {spec.subset}" if spec.subset else ""
        raise UserError(
            f"--local_files_only: dataset {spec.name}{subset}, split {spec.split}, revision "
            f"{spec.revision or 'main'}, is not in the caches {cache_folders()}; {_hint()}"
        )
    log.info("%s: %d files from the caches", spec.name, len(files))
    return files, commit


def _missing(spec: SourceSpec, snapshot: Path, files: list[TextFile]) -> list[str]:
    """Files of the split that a download was interrupted before: those beside `files` that the repository has."""
    folders, split = {Path(file.name).parent for file in files}, _split_of(spec.split)
    beside = [path for path in cached_tree(spec.name, snapshot.name) if Path(path).parent in folders]
    wanted = [path for path in beside if data_format(path) and (_split_of(path) or "train") == split]
    kinds = {data_format(file.name) for file in files}
    return [path for path in wanted if data_format(path) in kinds and not (snapshot / path).exists()]


def _hint() -> str:
    """What helps where the caches lack a data set."""
    home = Path(os.environ.get("HF_HOME", "")).expanduser()
    if os.environ.get("HF_HOME") and not (home / "hub").exists() and _data_paths(home):
        return f"HF_HOME {home} is a folder of text, not a cache: name it as the data set, with --dataset_name {home}"
    return "download_all.py with the same flags brings it there; a folder of text is named by its path"


def choose_column(spec: SourceSpec, files: list[TextFile]) -> tuple[str, bool]:
    """The column to read and whether it holds conversations; raises `UserError` listing the columns there are."""
    columns = _first_columns(spec, files)
    has_text = spec.text_field in columns and _may_hold_text(columns[spec.text_field])
    if has_text and not spec.chat:
        return spec.text_field, False
    if CONVERSATIONS in columns and spec.chat is not False:
        return CONVERSATIONS, True
    kind = columns.get(spec.text_field)
    problem = f"column {spec.text_field} holds {kind}, not text" if kind else f"no column {spec.text_field}"
    raise UserError(f"{spec.name}: {problem}; its columns are: {', '.join(columns) or 'none'}")


def _first_columns(spec: SourceSpec, files: list[TextFile]) -> dict[str, str]:
    """Columns of the first file that has any; unreadable files before it are passed over if the flags say so."""
    for file in files:
        try:
            columns = column_types(file)
        except BadData:
            if spec.on_bad_data == "error":
                raise
            continue
        if columns:
            return columns
    raise UserError(f"{spec.name}: empty dataset, no rows in {len(files)} files")


def _may_hold_text(kind: str) -> bool:
    return not kind or "string" in kind or kind == "null"


class TextTable:
    """A source loaded at once, mapped into memory from one Arrow file.

    Rows are (value, name), in the files' order; `BadData` values where a row could not be read.
    """

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
        value, (name, bad) = plain_value(batch.column(0), row), (batch.column(i)[row].as_py() for i in (1, 2))
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


def _write(source: TextSource, handle: IO[bytes]) -> None:
    import pyarrow as pa

    schema = pa.schema([("text", pa.large_string()), ("name", pa.string()), ("bad", pa.bool_())])
    rows = source.documents(list(range(len(source.files))), (0, 0, 0))
    with pa.ipc.new_stream(handle, schema) as writer:
        while chunk := list(itertools.islice(rows, ROWS_A_BATCH)):
            columns = zip(*(_stored(value, name, source.chat) for value, name, _ in chunk))
            writer.write_batch(pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema)], schema=schema))
    handle.flush()
    os.fsync(handle.fileno())


def _stored(value: object, name: str, chat: bool) -> tuple[str | bytes | None, str, bool]:
    if isinstance(value, BadData):
        return str(value), name, True
    if value is not None and chat:
        return json.dumps(value), name, False
    if isinstance(value, bytes | memoryview):
        return bytes(value), name, False
    if value is None or isinstance(value, str):
        try:
            (value or "").encode()
            return value, name, False
        except UnicodeEncodeError as error:
            return f"{name}: invalid Unicode: {error}", name, True
    return f"{name}: the column holds {type(value).__name__}, not text", name, True
