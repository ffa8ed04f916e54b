"""Frozen weights of a run: written to a file once, then hard-linked from checkpoint to checkpoint."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import hash_file, hash_stream, safetensors_stream, write_stream
from checkpoints.run_folder import RunFolder


@dataclass(frozen=True)
class FrozenWeights:
    """Tensors that do not change, by name, the dtype they are stored in, and their version counters."""

    tensors: dict[str, torch.Tensor]
    dtype: torch.dtype | None
    versions: dict[str, int]

    @classmethod
    def of(cls, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> "FrozenWeights":
        """The tensors as they stand now."""
        return cls(tensors, dtype, {name: tensor._version for name, tensor in tensors.items()})


class FrozenFile:
    """The file that holds a run's frozen weights, wherever it is linked to.

    Its hash is taken once a process; afterwards addresses and version counters tell that the weights are unchanged.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self._tensors: dict[str, torch.Tensor] = {}  # held, so that their addresses stay theirs
        self._key: Any = None
        self._entry: dict[str, Any] | None = None  # size and sha256, as in a manifest
        self._file: tuple[int, int] | None = None  # device and inode

    def earlier(self, weights: FrozenWeights) -> Path | None:
        """A file of an earlier checkpoint that holds exactly these weights; None if they must be written."""
        key = weights.dtype, [(name, t.data_ptr(), weights.versions[name]) for name, t in weights.tensors.items()]
        if key != self._key:
            self._tensors, self._key, self._entry = weights.tensors, key, None
        if not weights.tensors:
            return None
        files = [
            (folder / name, entry)
            for folder, manifest in self.folder.manifests()
            for name, entry in manifest["files"].items()
            if name.endswith(".safetensors")
        ]
        if files and self._entry is None:
            self._entry = hash_stream(safetensors_stream(weights.tensors, weights.dtype))
        same = (path for path, entry in files if entry == self._entry)
        return next((path for path in same if self._is_sound(path)), None)

    def _is_sound(self, path: Path) -> bool:
        """True if a file holds the weights; read once a process, unless this process wrote it."""
        assert self._entry is not None
        try:
            info = path.stat()
            if info.st_size != self._entry["size"]:
                return False
            if (info.st_dev, info.st_ino) != self._file and hash_file(path) != self._entry["sha256"]:
                return False
        except OSError:
            return False
        self._file = info.st_dev, info.st_ino
        return True

    def write(self, path: Path, weights: FrozenWeights, link: Path | None) -> dict[str, Any]:
        """Put the weights at `path`, as a link to what `earlier` found where that works; its entry in the manifest.

        Raises `RuntimeError` if they changed while they were written.
        """
        if link is not None and self._entry is not None:
            with contextlib.suppress(OSError):  # no hard links here: written again
                os.link(link, path)
                return self._entry
        entry = write_stream(path, safetensors_stream(weights.tensors, weights.dtype))
        if any(tensor._version != weights.versions[name] for name, tensor in weights.tensors.items()):
            raise RuntimeError("weights that were said to be frozen changed while they were written")
        info = path.stat()
        self._entry, self._file = entry, (info.st_dev, info.st_ino)
        return entry
