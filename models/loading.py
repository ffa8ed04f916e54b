"""Loading a student with every key of the checkpoint accounted for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging


def load_student(
    model_class: Any,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    local_files_only: bool = False,
    revision: str | None = None,
) -> Any:
    """Load a local folder or hub id: model.safetensors, sharded safetensors or pytorch_model.bin (weights only).

    transformers reads the files, tensor by tensor, straight into `dtype`; here its account of the keys is turned
    into an error. Raises ValueError in one line for missing, unexpected or misshapen keys (it lists them), damaged
    files, and files outside the folder; OSError when files are missing.
    """
    if Path(name).is_dir():
        check_files(Path(name))
    try:
        with _warnings_held_back():
            model, account = model_class.from_pretrained(
                name,
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=local_files_only,
                revision=revision or "main",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                weights_only=True,
            )
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{name}: weights cannot be read: {' '.join(str(error).split())[:200]}") from error
    faults = {
        "missing": sorted(account["missing_keys"]),
        "unexpected": sorted(account["unexpected_keys"]),
        "misshapen": sorted(
            f"{key} {list(found)} instead of {list(wanted)}" for key, found, wanted in account["mismatched_keys"]
        ),
    }
    found = [f"{kind} keys: {_listed(keys)}" for kind, keys in faults.items() if keys]
    if found:
        raise ValueError(f"{name}: {'; '.join(found)}")
    return model


def check_files(folder: Path) -> None:
    """Raise ValueError if a shard index or a link leads out of a folder (a Hub cache's blobs count as inside)."""
    root = folder.resolve()
    inside = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in folder.iterdir():
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in inside):
            raise ValueError(f"{folder}: {path.name} is a link out of the folder")
    for index in folder.glob("*.index.json"):
        try:
            shards = {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder}: {index.name} is no index of shards") from error
        for shard in sorted(shards):
            if Path(shard).name != shard:
                raise ValueError(f"{folder}: {index.name} names {shard!r}, which is not in the folder")
            if not (folder / shard).is_file():
                raise ValueError(f"{folder}: {index.name} names {shard}, which is missing")


@contextmanager
def _warnings_held_back() -> Iterator[None]:
    """transformers prints its own table of missing keys, which the error says in one line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _listed(keys: list[str], most: int = 8) -> str:
    shown = ", ".join(keys[:most])
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"
