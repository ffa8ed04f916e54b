"""Checkpoints that survive what happens to runs: kill -9, full disks, lost mounts, damaged files.

A checkpoint is a folder that is complete or not there: written under a temporary name, synced, then renamed.
    model.safetensors       weights in `--dtype`; with frozen tensors two shards and model.safetensors.index.json,
                            the frozen one hard-linked from checkpoint to checkpoint
    config.json, generation_config.json, *.py, tokenizer files, README.md
    training_state.json     readable: stage, counters, flags, versions, W&B run id
    trainer_state.pt        optimizer, scaler, RNG, loader (torch.save, read with weights_only)
    manifest.json           size and sha256 of every file, and a serial number; written last
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from checkpoints.files import (
    INDEX,
    MANIFEST,
    METADATA,
    TRAINER_STATE,
    WEIGHTS,
    damage,
    distinct_weights,
    files_written,
    gib,
    safetensors_stream,
    save_description,
    stored_dtype,
    sync_folder,
    together,
    write_bytes,
    write_stream,
    write_torch,
)
from checkpoints.folder_checks import check_folder
from checkpoints.frozen import FrozenFile, FrozenWeights
from checkpoints.host_copies import HostCopies, available_memory, checked, distinct_bytes
from checkpoints.run_folder import CHECKPOINT, RunFolder
from checkpoints.run_state import read_metadata, read_trainer_state, rng_state, set_rng_state
from utils import UserError, mask_secrets

__all__ = [
    "CheckpointStore",
    "check_folder",
    "read_metadata",
    "read_trainer_state",
    "rng_state",
    "set_rng_state",
]

logger = logging.getLogger(__name__)

MANY_CORES = 8
ROOM = 0.8  # share of the free memory that a copy may take
SPARE = 1 << 24  # bytes that must stay free beside a checkpoint


@dataclass
class Job:
    """One checkpoint to write; nothing in it changes while training goes on."""

    name: str
    files: dict[str, bytes]
    trained: dict[str, torch.Tensor]
    frozen: FrozenWeights
    dtype: torch.dtype | None
    trainer_state: dict[str, Any]
    best: bool

    def stored_bytes(self, *, frozen: bool = True) -> int:
        """Bytes of the weights as they are stored, with or without the frozen ones."""
        tensors = [*self.trained.values(), *(self.frozen.tensors.values() if frozen else ())]
        return sum(tensor.numel() * stored_dtype(tensor, self.dtype).itemsize for tensor in tensors)


def split_weights(
    model: PreTrainedModel, weights: dict[str, torch.Tensor] | None, frozen: Collection[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The model's weights (or `weights` in their place), one name a tensor: those that train, and the frozen ones."""
    named = {name: t.detach() for name, t in (distinct_weights(model) if weights is None else weights).items()}
    fixed = {name: tensor for name, tensor in named.items() if name in frozen}
    return {name: tensor for name, tensor in named.items() if name not in fixed}, fixed


class CheckpointStore:
    """The checkpoints of one output folder: `checkpoint-<step>`, `stable-<stage>` and `final`.

    A save never raises: what goes wrong is one line to `log`, and the next interval tries again. `blocked_seconds`
    and `total_seconds` are the last save's. Nothing is written once `held()` says that the folder is another run's.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        keep: int = 2,
        log: Callable[[str], Any] = print,
        asynchronous: bool = True,
        held: Callable[[], bool] = lambda: True,
        writes: bool = True,
    ):
        self.output_dir, self.keep, self.log, self.asynchronous = Path(output_dir), keep, log, asynchronous
        self.held = held
        self.blocked_seconds = self.total_seconds = 0.0
        self.succeeded = True
        self._thread: threading.Thread | None = None
        self._copies = HostCopies()
        self._tokenizer_files: tuple[Any, dict[str, bytes]] = (None, {})
        self.folder = RunFolder(self.output_dir, log, clean=writes)
        self._frozen_file = FrozenFile(self.folder)

    # saving

    def save(
        self,
        name: str,
        *,
        model: PreTrainedModel,
        tokenizer: Tokenizer | None,
        trainer_state: dict[str, Any],
        metadata: dict[str, Any],
        frozen: Collection[str] = (),
        dtype: torch.dtype | None = None,
        best: bool = False,
        weights: dict[str, torch.Tensor] | None = None,
        model_card: str | None = None,
    ) -> bool:
        """Write a checkpoint; returns once training may go on, False if it failed by then (`wait` says how it ended).

        name: "checkpoint-<step>", "stable-<stage>" or "final"; one of the same name is replaced. frozen: names of
        weights that do not change: they are not copied but read while training goes on, so `wait` before they are
        trained again. dtype: of the stored floating weights. weights: name -> tensor in place of
        `model.state_dict()`, for sharded models. best: keep this one until a better one is saved. An empty
        trainer_state writes no trainer_state.pt. Secrets in the metadata are masked.
        """
        assert CHECKPOINT.fullmatch(name), name
        self.wait()
        began = time.perf_counter()
        try:
            files = self._small_files(model, tokenizer, dtype, model_card)
            files[METADATA] = json.dumps(mask_secrets(metadata), indent=2).encode()
            moving, fixed = split_weights(model, weights, frozen)
            state, background = self._snapshot({"weights": moving, "state": trainer_state})
            job = Job(name, files, state["weights"], FrozenWeights.of(fixed, dtype), dtype, state["state"], best)
        except Exception as error:
            self._failed(name, error)
            return False
        self.blocked_seconds = time.perf_counter() - began
        if not background:
            self._write(job, began)
            self.blocked_seconds = self.total_seconds
            return self.succeeded
        self._thread = threading.Thread(target=self._write, args=(job, began), name="checkpoint")
        self._thread.start()
        return True

    def prepare(
        self,
        *,
        model: PreTrainedModel,
        trainer_state: dict[str, Any],
        frozen: Collection[str] = (),
        weights: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Allocate a snapshot's host memory in the background, so that the first save blocks as little as later ones.

        For after the first optimizer step, when the optimizer's state is there; the arguments are those of `save`.
        """
        moving, _ = split_weights(model, weights, frozen)
        state = {"weights": moving, "state": trainer_state}
        if self.asynchronous and self._copies.bytes_missing(state) < ROOM * available_memory():
            self.wait()
            self._thread = threading.Thread(target=self._copies.reserve, args=(state,), name="checkpoint")
            self._thread.start()

    def wait(self) -> bool:
        """Wait for the checkpoint that is being written; True if the last one was written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.succeeded

    def _snapshot(self, state: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """(state, True) copied, to be written in the background; (the live state, False) where a copy has no room."""
        if not self.asynchronous:
            return checked(state), False
        needed, free = self._copies.bytes_missing(state), available_memory()
        if needed > ROOM * free:
            self.log(
                f"a checkpoint's copy needs {gib(needed)} of host memory and {gib(free)} are free: "
                "training waits while it is written"
            )
            return checked(state), False
        return self._copies.take(state), True

    def _small_files(
        self, model: PreTrainedModel, tokenizer: Tokenizer | None, dtype: torch.dtype | None, card: str | None
    ) -> dict[str, bytes]:
        """Configuration, modelling code, tokenizer and model card, as transformers writes them."""
        if tokenizer is not None and self._tokenizer_files[0] is not tokenizer:
            several = isinstance(getattr(tokenizer, "chat_template", None), dict)  # else they get a folder
            options: Any = {"save_jinja_files": False} if several else {}
            self._tokenizer_files = tokenizer, files_written(lambda to: tokenizer.save_pretrained(to, **options))
        files = {**self._tokenizer_files[1], **files_written(lambda folder: save_description(model, dtype, folder))}
        if card is not None:
            files["README.md"] = card.encode()
        return files

    def _write(self, job: Job, began: float) -> None:
        try:
            self._write_folder(job)
            self.succeeded = True
            self.total_seconds = time.perf_counter() - began
            logger.info(
                "%s saved in %.1f s, %.1f s of them blocking", job.name, self.total_seconds, self.blocked_seconds
            )
        except Exception as error:
            self._failed(job.name, error)
            return
        try:
            self.folder.prune(self.keep)
        except OSError as error:
            self.log(f"{job.name} is saved, but older checkpoints could not be removed ({error.strerror})")

    def _failed(self, name: str, error: Exception) -> None:
        self.succeeded = False
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        last = self.folder.last_good
        good = f"the last good one is {last}" if last else "there is none yet"
        self.log(f"{name} was not saved ({reason or type(error).__name__}); {good}; the next interval tries again")
        logger.debug("%s was not saved", name, exc_info=error)

    def _write_folder(self, job: Job) -> None:
        self._check_held()
        self.folder.check_mount()
        link = self._frozen_file.earlier(job.frozen)
        self._check_space(job, linked=link is not None)
        temporary = self.folder.private("tmp", job.name)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            entries = self._write_large(temporary, job, link)
            for name, content in job.files.items():
                entries[name] = write_bytes(temporary / name, content)
            best = job.best or self.folder.is_best(job.name)  # the same step saved once more
            manifest = {"serial": self.folder.next_serial(), "best": best, "files": entries}
            write_bytes(temporary / MANIFEST, json.dumps(manifest, indent=2).encode())
            sync_folder(temporary)
            self._check_held()
            self.folder.publish(temporary, job.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _check_held(self) -> None:
        if not self.held():
            raise RuntimeError("another run has taken this folder over")

    def _write_large(self, folder: Path, job: Job, link: Path | None) -> dict[str, Any]:
        """Weights and trainer state: side by side where training can spare the cores, else one after the other."""

        def state() -> dict[str, Any]:
            return (
                {TRAINER_STATE: write_torch(folder / TRAINER_STATE, job.trainer_state)} if job.trainer_state else {}
            )

        def weights() -> dict[str, Any]:
            return self._write_weights(folder, job, link)

        written = together(weights, state) if (os.cpu_count() or 1) >= MANY_CORES else [weights(), state()]
        return written[0] | written[1]

    def _write_weights(self, folder: Path, job: Job, link: Path | None) -> dict[str, Any]:
        parts = [part for part in (job.trained, job.frozen.tensors) if part]
        names = [WEIGHTS] if len(parts) < 2 else [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        entries: dict[str, Any] = {}
        for name, part in zip(names, parts):
            if part is not job.frozen.tensors:
                entries[name] = write_stream(folder / name, safetensors_stream(part, job.dtype))
            else:
                entries[name] = self._frozen_file.write(folder / name, job.frozen, link)
        if len(parts) == 2:
            shard_of = {key: name for name, part in zip(names, parts) for key in part}
            index = {"metadata": {"total_size": job.stored_bytes()}, "weight_map": shard_of}
            entries[INDEX] = write_bytes(folder / INDEX, json.dumps(index, indent=2).encode())
        return entries

    def _check_space(self, job: Job, *, linked: bool) -> None:
        small = sum(map(len, job.files.values())) + (1 << 16)
        needed = job.stored_bytes(frozen=not linked) + distinct_bytes(job.trainer_state) + small
        free = shutil.disk_usage(self.output_dir).free
        if needed + SPARE > free:
            raise OSError(f"it needs {gib(needed)} and {self.output_dir} has {gib(free)} free")

    # resuming

    def newest(self) -> Path | None:
        """The last checkpoint written that is complete and undamaged; others that are newer are named in the log."""
        self.wait()
        order = [folder for folder, _ in self.folder.manifests()]
        for folder in [path for path in self.folder.checkpoints() if path not in order] + order:
            reason = damage(folder)
            if reason is None:
                return folder
            self.log(f"{folder} is passed over: {reason}")
        return None

    def resolve(self, resume: str) -> Path | None:
        """What `--resume` stands for: "auto" the newest checkpoint if there is one, "none" nothing, or a path.

        Raises `UserError` for "none" in a folder that holds a run, for "auto" where every checkpoint is damaged,
        and for a path that is no undamaged checkpoint.
        """
        folders = self.folder.checkpoints()
        if resume == "none":
            if folders:
                raise UserError(
                    f"--resume none: {self.output_dir} already holds a run ({folders[-1].name}); give another "
                    "--output_dir, or move it away"
                )
            return None
        if resume == "auto":
            found = self.newest()
            if found is None and folders:
                raise UserError(
                    f"--resume auto: every checkpoint in {self.output_dir} is damaged; move them away to start anew"
                )
        else:
            found = Path(resume)
            reason = damage(found) if found.is_dir() else "there is no such folder"
            if reason:
                raise UserError(f"--resume {resume}: {reason}")
        if found is not None:
            check_folder(found)
        return found
