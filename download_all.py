"""Bring everything that a run needs into the Hub's cache: both models, the text of every stage, held-out text.

    python download_all.py --config run.yaml                    the flags of train.py, from a file or given
    python train.py --config run.yaml --local_files_only        the same run, without a network

Run again it goes on. `--dry_run` says how much it would be. The cache is HF_HOME, ~/.cache/huggingface by default.
"""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import Arguments, parse_arguments
from utils import FROM_TEACHER, UserError, existing_folder, setup_logging

if TYPE_CHECKING:
    from text.text_sources import SourceSpec

SPARE = 2**30  # bytes that stay free beside the cache


@dataclass(frozen=True)
class Part:
    """Files of one data set on the Hub that are to be in the cache."""

    spec: "SourceSpec"
    commit: str
    sizes: dict[str, int]  # bytes by path

    def folder(self) -> Path:
        """Where the cache holds this commit, once it is there."""
        from huggingface_hub import constants

        name = "datasets--" + self.spec.name.replace("/", "--")
        return Path(constants.HF_HUB_CACHE) / name / "snapshots" / self.commit

    def missing(self) -> int:
        """Bytes that are still to come."""
        there = self.folder()
        return sum(size for path, size in self.sizes.items() if not (there / path).exists())


def sources(args: Arguments) -> list["SourceSpec"]:
    """Every text that a run with these flags reads and that is not on this disk, each once."""
    from run.mixing import mixed_sources
    from run.plan import stage_names
    from run.text import RunText

    text, found = RunText(args, None), []
    for name in stage_names(args):
        main = text.source(name)
        found += [main, *(mixed.source for mixed in mixed_sources(args, name, main, None) if mixed.source)]
    if args.eval_dataset:
        found.append(text.held_out_source())
    if args.choice_dataset:
        found.append(text.choice_source())
    remote = [spec for spec in found if not Path(spec.name).expanduser().exists()]
    return list({(spec.name, spec.subset, spec.split, spec.revision): spec for spec in remote}.values())


def listed(spec: "SourceSpec", patience: Any) -> Part:
    """The files of a source, with the page that says which of them belong to which configuration."""
    from hub.hub_files import list_hub_files
    from text.row_readers import data_format

    found = list_hub_files(spec.name, spec.subset, spec.split, spec.revision, patience, spec.flag)
    sizes = {path: found.sizes.get(path, 0) for path in found.paths if data_format(path)}
    if not sizes:
        raise UserError(f"{spec.name}: its files ({found.paths[0]}, ...) are not parquet or JSON")
    return Part(spec, found.commit, sizes)


def check_space(parts: list[Part]) -> None:
    """Raise `UserError` unless the text that is still missing fits on the cache's disk."""
    from huggingface_hub import constants

    place = existing_folder(Path(constants.HF_HUB_CACHE).expanduser())
    missing, free = sum(part.missing() for part in parts), shutil.disk_usage(place).free
    if missing + SPARE > free:
        raise UserError(
            f"HF_HOME: {missing / 2**30:.1f} GiB of text are still to come, {free / 2**30:.1f} GiB are free at "
            f"{place}; set HF_HOME to another disk, or take a part with download_fineweb_subset.py"
        )


def fetch_text(part: Part, patience: Any) -> None:
    """A source's files into the cache, under the name by which they are looked up without a network."""
    from huggingface_hub import snapshot_download

    from text.text_sources import find_files

    patience.call(
        f"downloading {part.spec.name}",
        lambda: snapshot_download(
            part.spec.name,
            repo_type="dataset",
            revision=part.spec.revision,
            allow_patterns=["README.md", *part.sizes],
        ),
    )
    find_files(replace(part.spec, local_files_only=True))  # as train.py will look for them


def mirror(args: Arguments) -> None:
    """List, check the space, fetch."""
    from hub.hub_files import Patience
    from hub.model_files import fetch_model
    from run.flag_checks import validate

    validate(replace(args, wandb=False, local_files_only=False))
    patience = Patience(args.network_patience)
    parts = [listed(spec, patience) for spec in sources(args)]
    for part in parts:
        size, missing = sum(part.sizes.values()), part.missing()
        print(f"{part.spec.name}: {len(part.sizes):,} files of {size:,} bytes, {missing:,} still to come", flush=True)
    if args.dry_run:
        return
    check_space(parts)
    for flag in ("teacher_model", "student_model"):
        name = getattr(args, flag)
        if name != FROM_TEACHER:
            print(f"{name} ...", flush=True)
            waiting = args.network_patience
            fetch_model(f"--{flag}", name, local_files_only=False, network_patience=waiting, weights=True)
    for part in parts:
        print(f"{part.spec.name} ...", flush=True)
        fetch_text(part, patience)
    print("all is there: train.py with the same flags and --local_files_only needs no network")


def main(argv: Sequence[str] | None = None) -> int:
    if {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
        print(__doc__)
        return 0
    args = parse_arguments(argv)
    setup_logging(None)
    from hub.hub_files import exit_status
    from run.terminal import quiet_libraries

    quiet_libraries()
    return exit_status(lambda: mirror(args))


if __name__ == "__main__":
    sys.exit(main())
