"""Write a subset of FineWeb-Edu as shard-NNNNN.jsonl(.gz); run again, it goes on after the last whole shard.

    python download_fineweb_subset.py --output_dir data/fineweb --max_samples 1000000
    python train.py --dataset_name data/fineweb --dataset_subset '' --local_files_only

Each shard is written under a temporary name, synced, then renamed; `manifest.json` lists rows, bytes and SHA-256 of
each, and where the source stands behind it, so that an interrupted run ends with the same bytes as a whole one.
"""

import argparse
import gzip
import hashlib
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flags.reading import HelpFormatter, Parser, real, whole
from utils import UserError, check_folder_writable, progress_bar, write_whole


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", default="HuggingFaceFW/fineweb-edu", help="hub id, or a local folder or file")
    add("--subset", help="configuration or folder; '' for none (default: CC-MAIN-2014-49 of a FineWeb, else none)")
    add("--split", default="train", help="split")
    add("--revision", default=None, help="commit, tag or branch")
    add("--output_dir", required=True, help="folder for the shards and manifest.json")
    add("--samples_per_file", type=whole(1), default=10_000, help="rows a shard")
    add("--max_samples", type=whole(0), default=0, help="rows in all; 0: everything")
    add("--compression", choices=["none", "gzip"], default="gzip", help="compression of the shards")
    add("--text_field", default="text", help="column that holds the text")
    add("--no_streaming", action="store_true", help="download the files into the cache first, then read them")
    add("--on_bad_data", choices=["error", "skip"], default="error", help="what to do with rows that cannot be read")
    add("--network_patience", type=real(0), default=600.0, help="seconds to ride out a network fault")
    args = parser.parse_args(argv)
    if args.subset is None:
        args.subset = "CC-MAIN-2014-49" if "fineweb" in args.dataset.lower() else ""
    return args


class Manifest:
    """`manifest.json`: the parameters of the download, its shards so far, and where the source stands."""

    PARAMETERS = ("dataset", "subset", "split", "revision", "samples_per_file", "compression", "text_field")

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.path = folder / "manifest.json"
        self.content: dict[str, Any] = {"parameters": {name: getattr(args, name) for name in self.PARAMETERS}}
        self.content |= {"identity": None, "commit": None, "position": [0, 0, 0], "shards": [], "complete": False}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        try:
            found = json.loads(self.path.read_text())
            before = found["parameters"]
        except (ValueError, KeyError) as error:
            raise UserError(f"--output_dir {self.path.parent}: {self.path.name} cannot be read; remove it") from error
        for name, value in self.content["parameters"].items():
            if before.get(name) != value:
                raise UserError(
                    f"--{name} {value}: {self.path.parent} was begun with {before.get(name)}; "
                    "use the same value or another --output_dir"
                )
        self.content = found

    def write(self) -> None:
        write_whole(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


def rows_after(args: argparse.Namespace, manifest: Manifest) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """(row, position behind it) of all after the manifest's position, in the source's own order.

    A row is {"text": ...}, or {"conversations": ...} of a data set that has those and no text. Empty ones are left
    out.
    """
    from text.text_sources import SourceSpec, open_source

    spec = SourceSpec(
        name=args.dataset,
        subset=args.subset,
        split=args.split,
        revision=args.revision,
        text_field=args.text_field,
        on_bad_data=args.on_bad_data,
        network_patience=args.network_patience,
        streaming=not args.no_streaming,
    )
    source = open_source(spec, manifest.content["commit"])
    if manifest.content["identity"] not in (None, source.identity):
        raise UserError(f"--dataset {args.dataset}: its files have changed since this download began")
    manifest.content["identity"], manifest.content["commit"] = source.identity, source.commit
    file, row, offset = manifest.content["position"]
    for value, _, position in source.documents(list(range(len(source.files))), (file, row, offset)):
        if isinstance(value, Exception):
            if args.on_bad_data == "error":
                raise value
            continue
        value = str(value, "utf-8") if isinstance(value, bytes | memoryview) else value
        if value and (source.chat or value.strip()):
            yield {"conversations" if source.chat else "text": value}, list(position)


def encode_shard(rows: list[dict[str, Any]], compression: str) -> bytes:
    """JSON lines; gzip without time and name, so that the same rows give the same bytes."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if compression == "none":
        return lines
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(lines)
    return buffer.getvalue()


def download(args: argparse.Namespace) -> None:
    """Write every shard that is still missing."""
    folder = Path(args.output_dir)
    check_folder_writable("--output_dir", folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(folder, args)
    done = sum(shard["rows"] for shard in manifest.content["shards"])
    if manifest.content["complete"] or (args.max_samples and done >= args.max_samples):
        print(f"{folder} is complete: {done:,} rows in {len(manifest.content['shards'])} shards")
        return
    with progress_bar("rows", args.max_samples or None, initial=done) as bar:
        done = write_shards(args, folder, manifest, done, bar)
    manifest.write()
    if not done:
        raise UserError(f"--dataset {args.dataset}: no rows with text in split {args.split}")
    print(f"{folder}: {done:,} rows in {len(manifest.content['shards'])} shards")


def write_shards(args: argparse.Namespace, folder: Path, manifest: Manifest, done: int, bar: Any) -> int:
    """Every shard after the `done` rows that are there, with a line each; returns the rows that are there then."""
    progress = Progress(done, args.max_samples, bar)
    rows: list[dict[str, Any]] = []
    for row, position in rows_after(args, manifest):
        bar.update(done - bar.n)
        manifest.content["position"] = position
        rows.append(row)
        done += 1
        finished = bool(args.max_samples) and done >= args.max_samples
        if len(rows) == args.samples_per_file or finished:
            progress.show(done, add_shard(folder, manifest, rows, args.compression))
            rows = []
        if finished:
            break
    else:
        manifest.content["complete"] = True
    if rows:
        progress.show(done, add_shard(folder, manifest, rows, args.compression))
    return done


def add_shard(folder: Path, manifest: Manifest, rows: list[dict[str, Any]], compression: str) -> int:
    """Write the next shard and the manifest that lists it; returns its bytes."""
    shards = manifest.content["shards"]
    name = f"shard-{len(shards):05}.jsonl{'.gz' if compression == 'gzip' else ''}"
    content = encode_shard(rows, compression)
    write_whole(folder / name, content)
    digest = hashlib.sha256(content).hexdigest()
    shards.append({"name": name, "rows": len(rows), "bytes": len(content), "sha256": digest})
    manifest.write()
    return len(content)


class Progress:
    """A line a shard: rows, rows a second, size, and the time left where the end is known."""

    def __init__(self, done: int, wanted: int, bar: Any):
        self.bar = bar
        self.before, self.wanted, self.size, self.since = done, wanted, 0, time.perf_counter()

    def show(self, done: int, added: int) -> None:
        from utils import format_duration

        self.size += added
        rate = (done - self.before) / max(time.perf_counter() - self.since, 1e-9)
        left = f", ETA {format_duration((self.wanted - done) / rate)}" if self.wanted and rate else ""
        self.bar.clear()
        print(f"{done:,} rows, {rate:,.0f} rows/s, {self.size / 2**20:.1f} MiB{left}", flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from hub.hub_files import exit_status

    return exit_status(lambda: download(args))


if __name__ == "__main__":
    sys.exit(main())
