"""Devices, seeds and dtypes of this process."""

import contextlib
import os
import random
from collections.abc import Iterator

import torch

from utils import UserError


def check_device(name: str, flag: str = "--device") -> torch.device:
    """The device, or a `UserError` that names the flag and says which CUDA devices there are."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        known = f"cuda:0 to cuda:{count - 1}" if count else f"none; use {flag} cpu"
        raise UserError(f"{flag} {name}: this machine has no such CUDA device (there: {known})")
    return device


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def enable_determinism() -> None:
    """Deterministic GPU kernels, so that a run repeats bit for bit on the same card."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating tensors, a model's parameters among them, are made in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
