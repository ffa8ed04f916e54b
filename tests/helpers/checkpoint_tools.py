"""What the tests of checkpoints share."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from checkpoints.files import MANIFEST
from checkpoints.files import METADATA as METADATA_FILE
from checkpoints.store import CheckpointStore
from conftest import tiny_llama_config

METADATA = {"progress": {"optimizer_step": 1}, "flags": {}, "finished": False}


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(tiny_llama_config(num_hidden_layers=2))


class Lines(list):
    """A log that can be read."""

    __call__ = list.append


def make_store(folder: Path, **options) -> CheckpointStore:
    return CheckpointStore(folder, log=Lines(), **options)


def save(store: CheckpointStore, name: str, model, *, wait: bool = True, **options) -> bool:
    defaults = dict(tokenizer=None, trainer_state={"x": torch.arange(3)}, metadata=METADATA)
    accepted = store.save(name, model=model, **{**defaults, **options})
    return store.wait() if wait else accepted


def frozen_names(model) -> list[str]:
    return [name for name, _ in model.named_parameters() if ".mlp." in name]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit_metadata(checkpoint: Path, change) -> None:
    """Let `change` edit a checkpoint's `training_state.json` in place, its manifest too."""
    path, manifest = checkpoint / METADATA_FILE, checkpoint / MANIFEST
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    listed = json.loads(manifest.read_text())
    listed["files"][METADATA_FILE] = {
        "size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    manifest.write_text(json.dumps(listed))
