"""Checkpoints that are whole, atomic and verified: written aside, synced, renamed; damaged ones are passed over.

A checkpoint is a complete folder that can be moved: weights in `--dtype` (frozen tensors in a shard of their own,
hard-linked from the checkpoint before), configuration, modelling code, tokenizer, `training_state.json` (readable),
`trainer_state.pt` (optimizer with masters, schedule, scaler, RNG, loader; read with weights_only) and, written last,
`manifest.json` with the size and SHA-256 of every file.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from arguments import RESULT_FLAGS, UserError

log = logging.getLogger(__name__)

STATE, METADATA, MANIFEST = "trainer_state.pt", "training_state.json", "manifest.json"
FROZEN, TRAINED, WHOLE, INDEX = (
    "model-frozen.safetensors",
    "model-trained.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
)
NAME = re.compile(r"checkpoint-(\d+)")


class DamagedCheckpoint(Exception):
    """A checkpoint folder that is incomplete, altered, or reaches outside itself; the message says how."""


class CheckpointStore:
    """The checkpoints of one run: `<output_dir>/checkpoint-<step>` and `<output_dir>/final`."""

    def __init__(
        self,
        output_dir: Path,
        *,
        keep: int = 2,
        log: Callable[[str], None] = log.warning,
        asynchronous: bool = True,
    ):
        self.folder, self.keep, self.log, self.asynchronous = Path(output_dir), keep, log, asynchronous
        self.best: str | None = None
        self.previous: Path | None = None  # where the frozen shard can be linked from
        self.failures = 0
        self._writer: threading.Thread | None = None
        self._recover()

    def save(
        self,
        name: str,
        *,
        model: Any,
        tokenizer: Any,
        trainer_state: dict[str, Any],
        metadata: dict[str, Any],
        frozen: Collection[str] = (),
        dtype: torch.dtype | None = None,
        weights: dict[str, torch.Tensor] | None = None,
        model_card: str = "",
    ) -> None:
        """Take a snapshot and write it in the background under `name`; training may go on when this returns.

        `frozen` names the parameters that never change in this run; `weights` overrides the model's own state
        (gathered shards). A failure is one warning: nothing that was good before is touched, and the next save
        tries again.
        """
        self.wait()
        tensors = weights if weights is not None else unique_tensors(model)
        linked = self._linkable(set(frozen) & set(tensors), dtype)
        skip = set(frozen) if linked else set()
        snapshot = {key: to_host(value, dtype) for key, value in tensors.items() if key not in skip}
        work = _Work(self, name, model, tokenizer, to_host_tree(trainer_state), metadata, snapshot, set(frozen))
        work.linked, work.dtype, work.model_card = linked, dtype, model_card
        if self.asynchronous:
            self._writer = threading.Thread(target=self._write, args=(work,), name=f"save {name}")
            self._writer.start()
        else:
            self._write(work)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written, if any, is complete."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write(self, work: "_Work") -> None:
        try:
            folder = work.write()
        except (OSError, RuntimeError, SafetensorError) as error:
            self.failures += 1
            shutil.rmtree(work.draft, ignore_errors=True)
            self.log(f"checkpoint {work.name} could not be saved ({error}); the run goes on and tries again later")
            return
        self.previous = folder
        self._prune()

    def _linkable(self, frozen: set[str], dtype: torch.dtype | None) -> Path | None:
        """The frozen shard of the checkpoint before, if it holds exactly these tensors in this dtype."""
        if self.previous is None or not frozen or not (self.previous / FROZEN).exists():
            return None
        try:
            if read_metadata(self.previous).get("dtype") != str(dtype):
                return None
            index = json.loads((self.previous / INDEX).read_text())["weight_map"]
        except (OSError, ValueError, KeyError, UserError):
            return None
        return self.previous / FROZEN if {k for k, v in index.items() if v == FROZEN} == frozen else None

    def _prune(self) -> None:
        for folder in self._numbered()[self.keep :]:
            if folder.name != self.best:
                shutil.rmtree(folder, ignore_errors=True)

    def _numbered(self) -> list[Path]:
        found = [path for path in self.folder.glob("checkpoint-*") if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)

    def _recover(self) -> None:
        """Put back what a crash left under a temporary name, and clear drafts."""
        for old in self.folder.glob(".old-*"):
            target = self.folder / old.name.removeprefix(".old-")
            if target.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(old, target)
        for draft in self.folder.glob(".tmp-*"):
            shutil.rmtree(draft, ignore_errors=True)

    def newest(self) -> Path | None:
        """The final model if the run is finished, else the newest checkpoint that is complete and undamaged."""
        for folder in [self.folder / "final", *self._numbered()]:
            if not folder.exists():
                continue
            try:
                verify(folder)
            except DamagedCheckpoint as damage:
                self.log(f"{folder} is damaged and passed over: {damage}")
                continue
            return folder
        return None

    def resolve(self, resume: str) -> Path | None:
        """What `--resume` means here: a verified checkpoint folder, or None to start anew."""
        if resume == "none":
            if (self.folder / "final").exists() or self._numbered():
                raise UserError(
                    f"--resume none: {self.folder} holds a run already; choose another --output_dir or remove it"
                )
            return None
        if resume == "auto":
            found = self.newest()
        else:
            found = Path(resume).expanduser()
            if not found.is_dir():
                raise UserError(f"--resume {resume}: no such folder; use auto, none or a checkpoint folder")
            try:
                verify(found)
            except DamagedCheckpoint as damage:
                raise UserError(f"--resume {resume}: {damage}") from damage
        self.previous = found
        return found


class _Work:
    """One checkpoint on its way to disk."""

    linked: Path | None = None
    dtype: torch.dtype | None = None
    model_card = ""

    def __init__(
        self,
        store: CheckpointStore,
        name: str,
        model: Any,
        tokenizer: Any,
        state: dict[str, Any],
        metadata: dict[str, Any],
        tensors: dict[str, torch.Tensor],
        frozen: set[str],
    ):
        self.store, self.name, self.model, self.tokenizer = store, name, model, tokenizer
        self.state, self.metadata, self.tensors, self.frozen = state, metadata, tensors, frozen
        self.draft = store.folder / f".tmp-{name}-{os.getpid()}"

    def write(self) -> Path:
        """Write the draft, sync it, and rename it into place; returns the checkpoint's folder."""
        self._check_space()
        shutil.rmtree(self.draft, ignore_errors=True)
        self.draft.mkdir(parents=True)
        hashes = self._write_weights()
        self._write_model_files()
        torch.save(self.state, self.draft / STATE)
        readable = {**self.metadata, "dtype": str(self.dtype)}
        (self.draft / METADATA).write_text(json.dumps(readable, indent=2, default=str) + "\n")
        write_manifest(self.draft, hashes)
        for file in self.draft.iterdir():
            sync(file)
        sync(self.draft)
        return self._put_in_place()

    def _check_space(self) -> None:
        needed = sum(t.numel() * t.element_size() for t in [*self.tensors.values(), *tensors_in(self.state)])
        self.store.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.store.folder).free
        if needed * 1.02 + 2**20 > free:
            raise OSError(f"it needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free")

    def _write_weights(self) -> dict[str, str]:
        """One file, or a trained and a frozen shard with an index; returns hashes that are known already."""
        if not self.frozen:
            save_file(self.tensors, self.draft / WHOLE, metadata={"format": "pt"})
            return {}
        trained = {name: tensor for name, tensor in self.tensors.items() if name not in self.frozen}
        save_file(trained, self.draft / TRAINED, metadata={"format": "pt"})
        known: dict[str, str] = {}
        if self.linked is None:
            save_file(
                {n: t for n, t in self.tensors.items() if n in self.frozen}, self.draft / FROZEN, {"format": "pt"}
            )
        else:
            link_or_copy(self.linked, self.draft / FROZEN)
            manifest = json.loads((self.linked.parent / MANIFEST).read_text())
            known[FROZEN] = manifest["files"][FROZEN]["sha256"]
        places = dict.fromkeys(self.frozen, FROZEN) | dict.fromkeys(trained, TRAINED)
        size = sum((self.draft / shard).stat().st_size for shard in (FROZEN, TRAINED))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (self.draft / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        return known

    def _write_model_files(self) -> None:
        """Configuration, modelling code, generation settings, tokenizer, model card: by transformers itself."""
        from transformers.dynamic_module_utils import custom_object_save

        config = self.model.config
        config.architectures = [type(self.model).__name__]
        config.dtype = self.dtype or next(iter(self.tensors.values())).dtype
        if getattr(self.model, "_auto_class", None):
            custom_object_save(self.model, self.draft, config=config)
        config.save_pretrained(self.draft)
        if getattr(self.model, "generation_config", None) is not None:
            self.model.generation_config.save_pretrained(self.draft)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(self.draft)
        if self.model_card:
            (self.draft / "README.md").write_text(self.model_card)

    def _put_in_place(self) -> Path:
        """Rename the draft; an older folder of the name steps aside first and is put back after a crash."""
        target, aside = self.store.folder / self.name, self.store.folder / f".old-{self.name}"
        if target.exists():
            os.replace(target, aside)
        os.replace(self.draft, target)
        sync(self.store.folder)
        shutil.rmtree(aside, ignore_errors=True)
        return target


def unique_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the model under one name: a tied head goes by the embedding's."""
    named: dict[str, torch.Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and tensor.device.type != "meta" and identity in seen:
            continue
        seen.add(identity)
        named[name] = tensor
    return named


def to_host(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A CPU copy of its own, contiguous, floating-point tensors in `dtype` if given."""
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", wanted, copy=True).contiguous()


def to_host_tree(value: Any) -> Any:
    """`to_host` for every tensor in nested dicts, lists and tuples."""
    if torch.is_tensor(value):
        return to_host(value)
    if isinstance(value, dict):
        return {key: to_host_tree(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_host_tree(entry) for entry in value)
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if torch.is_tensor(value):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for entry in entries for tensor in tensors_in(entry)]


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system can, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, known: dict[str, str]) -> None:
    """`manifest.json`: size and SHA-256 of every file; `known` hashes are not computed again."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": known.get(path.name) or sha256(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")


def verify(folder: Path) -> None:
    """Raise `DamagedCheckpoint` unless every file of the manifest is there, inside the folder, and unaltered.

    Reads every byte once (about 1 GB/s a core).
    """
    check_folder(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"no readable {MANIFEST}") from error
    if METADATA not in expected or STATE not in expected:
        raise DamagedCheckpoint(f"{MANIFEST} does not list {METADATA} and {STATE}")
    for name, (size, digest) in expected.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        if path.stat().st_size != size:
            raise DamagedCheckpoint(f"{name} has {path.stat().st_size} bytes instead of {size}")
        if sha256(path) != digest:
            raise DamagedCheckpoint(f"{name} does not match its hash")


def check_folder(folder: Path) -> None:
    """Raise `DamagedCheckpoint` if a path of the folder leads out of it: links, or names in a shard index."""
    root = folder.resolve()
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise DamagedCheckpoint(f"{path.name} is a link that leads out of the folder")
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{index.name} is not a shard index") from error
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
                raise DamagedCheckpoint(f"{index.name} names {shard!r}, which is not a file of the folder")


def read_metadata(folder: Path) -> dict[str, Any]:
    """`training_state.json` of a checkpoint."""
    try:
        return json.loads((folder / METADATA).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no readable {METADATA}: not a checkpoint of this toolkit") from error


def read_trainer_state(folder: Path, map_location: str = "cpu") -> dict[str, Any]:
    """`trainer_state.pt`, tensors and plain containers only: nothing in it is ever executed."""
    try:
        return torch.load(folder / STATE, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged or hostile files
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{folder / STATE} cannot be read safely: {reason}") from error


def rng_state() -> dict[str, Any]:
    """States of Python's, NumPy's, torch's CPU and CUDA generators, as plain containers and tensors."""
    import numpy

    name, keys, position, has_gauss, cached = numpy.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned."""
    import numpy

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def changed_flags(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """`--flag saved -> current` for every flag that changes the result and differs."""
    return [
        f"--{name} {saved[name]} -> {current[name]}"
        for name in sorted(RESULT_FLAGS)
        if name in saved and name in current and saved[name] != current[name]
    ]
