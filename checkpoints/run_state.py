"""What a resumed run reads from a checkpoint: trainer state, metadata, random generators."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints.files import METADATA, TRAINER_STATE, read_json
from utils import UserError


def read_trainer_state(folder: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """`trainer_state.pt`, by torch's weights-only reader, its tensors mapped: only what is used of them is read.

    Raises `UserError` in one line.
    """
    path = Path(folder) / TRAINER_STATE
    if not path.is_file():
        raise UserError(f"{folder} holds no {TRAINER_STATE}: it can be a --student_model, but not be resumed")
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or hostile file makes of the reader, it is one line
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise UserError(f"{path} is damaged or holds more than tensors ({reason[:160]})") from error


def read_metadata(folder: Path) -> dict[str, Any]:
    """`training_state.json`; raises `UserError` in one line."""
    try:
        return read_json(Path(folder) / METADATA)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def rng_state() -> dict[str, Any]:
    """State of the random generators of Python, NumPy, torch and, where it is in use, CUDA."""
    version, words, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back where `rng_state` found it; CUDA devices that are not here are passed over."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    numpy = state["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    torch.set_rng_state(state["torch"].cpu())
    for device, cuda in enumerate(state.get("cuda", [])):
        if device < torch.cuda.device_count():
            torch.cuda.set_rng_state(cuda.cpu(), device)
