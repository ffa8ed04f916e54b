"""Copies of tensors on the host, taken fast enough that training hardly notices."""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HUGE = 1 << 22  # bytes from which a buffer asks for huge pages: first touch is four times as fast
PLAIN: tuple[Any, ...] = (bool, int, float, str, bytes)  # bool before int, which it is one of


class HostCopies:
    """Snapshots of nested state, in host buffers that are kept from one snapshot to the next.

    The first copy of a tensor pays for its memory (1.4 GB/s a core), later ones do not (12 GB/s). Buffers of GPU
    tensors are pinned, so that all copies run at once at the bus's speed.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}

    def take(self, state: object) -> Any:
        """A copy of nested dicts, lists and tuples that shares no memory with `state`.

        Tensors that are the same memory are copied once. Raises `TypeError` for what torch's weights-only reader
        would not load again.
        """
        self._seen: dict[Any, torch.Tensor] = {}
        self._used: set[str] = set()
        self._devices: set[torch.device] = set()
        copy = rebuilt(state, self._copy_tensor)
        self.buffers = {path: buffer for path, buffer in self.buffers.items() if path in self._used}
        for device in self._devices:
            torch.cuda.synchronize(device)
        return copy

    def reserve(self, state: object) -> None:
        """Allocate and touch what `take(state)` will need, so that it only copies."""
        sizes: set[Any] = set()
        for path, tensor in tensors_in(state):
            if not _fits(self.buffers.get(path), tensor) and _memory(tensor) not in sizes:
                sizes.add(_memory(tensor))
                self.buffers[path] = _allocate(tensor)
                _as_bytes(self.buffers[path]).fill(0)

    def bytes_missing(self, state: object) -> int:
        """Bytes of host memory that `take(state)` would have to allocate."""
        sizes: dict[Any, int] = {}
        for path, tensor in tensors_in(state):
            if not _fits(self.buffers.get(path), tensor):
                sizes.setdefault(_memory(tensor), tensor.numel() * tensor.element_size())
        return sum(sizes.values())

    def _copy_tensor(self, tensor: torch.Tensor, path: str) -> torch.Tensor:
        tensor = tensor.detach()
        memory = _memory(tensor)
        if memory in self._seen:
            return self._seen[memory]
        buffer = self.buffers.get(path)
        if buffer is None or not _fits(buffer, tensor):
            self.buffers.pop(path, None)
            buffer = self.buffers[path] = _allocate(tensor)
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            np.copyto(_as_bytes(buffer), _as_bytes(tensor))  # one thread: copy_'s many wait for each other's cores
        else:
            buffer.copy_(tensor, non_blocking=True)
            if tensor.device.type == "cuda":
                self._devices.add(tensor.device)
        self._used.add(path)
        if tensor.numel():
            self._seen[memory] = buffer
        return buffer


def rebuilt(value: object, tensor: Callable[[torch.Tensor, str], torch.Tensor], path: str = "") -> Any:
    """Nested dicts, lists and tuples built anew, `tensor(value, path)` in the place of each tensor.

    Raises `TypeError`, with the path, for what torch's weights-only reader would not load.
    """
    if isinstance(value, torch.Tensor):
        return tensor(value, path)
    if isinstance(value, dict):
        return {plain(key): rebuilt(entry, tensor, f"{path}/{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        entries = [rebuilt(entry, tensor, f"{path}/{index}") for index, entry in enumerate(value)]
        return entries if isinstance(value, list) else tuple(entries)
    try:
        return plain(value)
    except TypeError as error:
        raise TypeError(f"{path}: {error}") from None


def checked(state: object) -> Any:
    """`state` with its own tensors, but in containers and plain values that will load again."""
    return rebuilt(state, lambda tensor, path: tensor.detach())


def plain(value: object) -> Any:
    """A value of an exact built-in type (NumPy's float64 is a float that would not load); `TypeError` for others."""
    if value is None or isinstance(value, (torch.dtype, torch.device)):
        return value
    for kind in PLAIN:
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"a checkpoint cannot hold a {type(value).__module__}.{type(value).__qualname__}")


def tensors_in(state: object, path: str = "") -> list[tuple[str, torch.Tensor]]:
    """(path, tensor) of every tensor in nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        return [(path, state)]
    if isinstance(state, dict):
        return [found for key, entry in state.items() for found in tensors_in(entry, f"{path}/{key}")]
    if isinstance(state, (list, tuple)):
        return [found for index, entry in enumerate(state) for found in tensors_in(entry, f"{path}/{index}")]
    return []


def distinct_bytes(state: object) -> int:
    """Bytes of the tensors in a nested state, memory that is shared counted once."""
    return sum({_memory(t): t.numel() * t.element_size() for _, t in tensors_in(state)}.values())


def _memory(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _as_bytes(tensor: torch.Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy()


def _fits(buffer: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return (
        buffer is not None
        and buffer.shape == tensor.shape
        and buffer.dtype == tensor.dtype
        and buffer.is_pinned() == (tensor.device.type == "cuda")
    )


def _allocate(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialised contiguous host tensor like `tensor`: pinned for the GPU's, on huge pages where large."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cuda":
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    if size < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def available_memory() -> int:
    """Bytes of host memory that may still be allocated: the machine's, or the control group's where that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            figures = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(figures["inactive_file"])
            free = min(free, int(limit) - used)
    except (OSError, KeyError, ValueError):
        return free  # no control group of the second version here
    return free
