"""Weights of models that are built on the meta device and sharded: each rank makes and reads its own rows alone."""

import ctypes
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hardware.parallel import copy_rows, own_rows
from utils import UserError

FILES = ("model.safetensors", "pytorch_model.bin")  # the first of which there is one, or an index of shards


class WeightFiles:
    """The tensors in a model's folder, of which any rows can be read without reading the others."""

    def __init__(self, folder: Path):
        """Raises `UserError` for a folder without weights."""
        self.folder, self.file_of = folder, {}  # type: Path, dict[str, str]
        for name in FILES:
            index = folder / f"{name}.index.json"
            if index.is_file():
                self.file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            elif (folder / name).is_file():
                self.file_of = dict.fromkeys(self._keys(name), name)
            if self.file_of:
                return
        raise UserError(f"{folder} holds neither {FILES[0]} nor {FILES[1]}, and no index of shards")

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def _keys(self, file: str) -> list[str]:
        if not file.endswith(".safetensors"):
            return list(_mapped(self.folder / file))
        with safe_open(self.folder / file, framework="pt") as opened:
            return list(opened.keys())

    def read_into(self, parameter: Tensor, name: str) -> None:
        """Write a tensor, or this rank's rows of it, into a parameter, in whose dtype they then are.

        The file is mapped for this long alone. Raises `UserError` when shapes differ.
        """
        file = self.folder / self.file_of[name]
        if not str(file).endswith(".safetensors"):
            stored = _mapped(file)[name]
            self._check(name, list(stored.shape), parameter)
            copy_rows(parameter, stored)
            return
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice(name)
            self._check(name, part.get_shape(), parameter)
            if not isinstance(parameter, DTensor):
                parameter.copy_(opened.get_tensor(name))
                return
            first, count = own_rows(parameter)
            if count:
                parameter.to_local().copy_(part[first : first + count])

    def _check(self, name: str, shape: list[int], parameter: Tensor) -> None:
        if shape != list(parameter.shape):
            raise UserError(f"{self.folder}: misshapen keys: {name} {shape} instead of {list(parameter.shape)}")


@functools.lru_cache(1)
def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped: rows that nobody reads are never in memory."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


@torch.no_grad()
def read_weights(
    named: Iterable[tuple[str, Tensor]], files: WeightFiles, key: Callable[[str], str] = lambda name: name
) -> None:
    """Fill parameters, or this rank's rows of them, from a model's files; `key` gives a name's in the files.

    Raises `UserError` that lists what the files lack.
    """
    wanted = list(named)
    missing = [name for name, _ in wanted if key(name) not in files]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise UserError(f"{files.folder}: missing keys: {shown}")
    for name, parameter in wanted:
        files.read_into(parameter, key(name))


def materialise(module: nn.Module, device: torch.device) -> None:
    """Give every parameter that is on the meta device memory of its own, of shards this rank's; values are arbitrary.

    Tied parameters stay tied (`nn.Module.to_empty` would part them).
    """
    made: dict[Tensor, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in made:
                empty: Any = torch.empty_like(parameter, device=device)
                made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            owner._parameters[name] = made[parameter]


def return_free_memory() -> None:
    """Give freed host memory back to the system: glibc keeps tensors of a few MiB in its heap, layer upon layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@torch.no_grad()
def copy_shard(target: Tensor, source: Tensor) -> None:
    """Write a tensor of the same shape, sharded as the target is or whole, into a parameter."""
    if isinstance(source, DTensor) and isinstance(target, DTensor):
        target.to_local().copy_(source.to_local())
    else:
        copy_rows(target, source)
