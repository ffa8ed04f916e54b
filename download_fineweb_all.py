"""Mirror the whole FineWeb-Edu repository, or folders of it; run again, it goes on and repairs what is damaged.

python download_fineweb_all.py --output_dir data/fineweb-all --subsets CC-MAIN-2014-49 --dry_run
python train.py --dataset_name data/fineweb-all --dataset_subset CC-MAIN-2014-49 --local_files_only
"""

import argparse
import fnmatch
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from flags.reading import HelpFormatter, Parser, real, whole
from utils import UserError, check_folder_writable, complain, existing_folder

SPARE = 2**30  # bytes that stay free beside the mirror


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", default="HuggingFaceFW/fineweb-edu", help="hub id of the data set")
    add("--output_dir", required=True, help="folder of the mirror")
    add("--hf_home", default=None, help="folder for the Hub library's own files (HF_HOME)")
    add("--max_workers", type=whole(1), default=8, help="files downloaded at once")
    add("--only_parquet", action="store_true", help="parquet files alone")
    add("--subsets", nargs="+", default=[], help="folders under data/, such as CC-MAIN-2014-49")
    add("--allow_patterns", nargs="+", default=[], help="file patterns, such as 'data/CC-MAIN-2024-*/*'")
    add("--revision", default="main", help="commit, tag or branch")
    add("--dry_run", action="store_true", help="say how many files and bytes; write nothing")
    add("--network_patience", type=real(0), default=600.0, help="seconds to ride out a network fault")
    return parser.parse_args(argv)


def wanted(path: str, args: argparse.Namespace) -> bool:
    """Whether the flags ask for a file of the repository."""
    if args.only_parquet and not path.endswith(".parquet"):
        return False
    in_subset = not args.subsets or any(f"/{subset}/" in f"/{path}" for subset in args.subsets)
    return in_subset and (
        not args.allow_patterns or any(fnmatch.fnmatch(path, pattern) for pattern in args.allow_patterns)
    )


def list_files(args: argparse.Namespace, patience: Any) -> tuple[str, list[Any]]:
    """(commit, files) of the repository that the flags ask for, with sizes and, for large files, SHA-256."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        info = patience.call(
            f"reading {args.dataset}", lambda: api.dataset_info(args.dataset, revision=args.revision)
        )
        commit = info.sha or args.revision
        tree = patience.call(
            f"listing {args.dataset}",
            lambda: list(api.list_repo_tree(args.dataset, repo_type="dataset", revision=commit, recursive=True)),
        )
    except GatedRepoError as error:
        raise UserError(
            f"--dataset {args.dataset} is gated: accept its licence on its page and log in with 'hf auth login' "
            "or set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(f"--dataset {args.dataset}: no such repository or revision ({args.revision})") from error
    files = [entry for entry in tree if hasattr(entry, "size") and wanted(entry.path, args)]
    if not files:
        raise UserError(f"--dataset {args.dataset}: no files match --subsets, --allow_patterns and --only_parquet")
    return commit, files


def check_space(folder: Path, files: list[Any]) -> None:
    """Raise `UserError` unless what is still missing fits on the disk."""
    missing = sum(entry.size for entry in files if not is_there(folder, entry))
    free = shutil.disk_usage(existing_folder(folder)).free
    if missing + SPARE > free:
        raise UserError(
            f"--output_dir {folder}: {missing / 2**30:.1f} GiB are still to come, {free / 2**30:.1f} GiB are free; "
            "choose fewer --subsets or another disk"
        )


def is_there(folder: Path, entry: Any) -> bool:
    path = folder / entry.path
    return path.is_file() and path.stat().st_size == entry.size


def damaged(folder: Path, files: list[Any]) -> list[str]:
    """Files that are missing, of another size, or of another SHA-256 where the Hub gives one."""
    found = []
    for entry in files:
        if not is_there(folder, entry):
            found.append(entry.path)
        elif entry.lfs is not None:
            with (folder / entry.path).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry.lfs.sha256:
                    found.append(entry.path)
    return found


def mirror(args: argparse.Namespace) -> None:
    """List, check the space, download what is missing or damaged, verify."""
    from huggingface_hub import snapshot_download

    from hub.hub_files import Patience

    patience = Patience(args.network_patience)
    commit, files = list_files(args, patience)
    size = sum(entry.size for entry in files)
    print(f"{args.dataset} at {commit[:12]}: {len(files):,} files, {size / 2**30:.2f} GiB", flush=True)
    if args.dry_run:
        return
    folder = Path(args.output_dir)
    check_folder_writable("--output_dir", folder)
    check_space(folder, files)
    for path in damaged(folder, [entry for entry in files if (folder / entry.path).exists()]):
        print(f"{path} is damaged: it is fetched again", flush=True)
        (folder / path).unlink(missing_ok=True)
    patience.call(
        f"downloading {args.dataset}",
        lambda: snapshot_download(
            args.dataset,
            repo_type="dataset",
            revision=commit,
            local_dir=folder,
            allow_patterns=[entry.path for entry in files],
            max_workers=args.max_workers,
        ),
    )
    left = damaged(folder, files)
    if left:
        raise OSError(f"{len(left)} files are missing or damaged: {', '.join(left[:5])}")
    print(f"{folder}: all {len(files):,} files verified", flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.hf_home:
        home = Path(args.hf_home).expanduser()
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            complain(f"--hf_home {home}: cannot be made ({error.strerror})")
            return 2
        os.environ["HF_HOME"] = str(home)
    from hub.hub_files import exit_status

    return exit_status(lambda: mirror(args))


if __name__ == "__main__":
    sys.exit(main())
