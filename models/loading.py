"""Loading a student with every key of the checkpoint accounted for."""

from typing import Any

import torch


def load_student(
    model_class: Any,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    local_files_only: bool = False,
) -> Any:
    """Load a local folder or hub id: model.safetensors, sharded safetensors or pytorch_model.bin (weights only).

    transformers reads the files; here its account of the keys is turned into an error. Raises ValueError in one
    line that lists missing, unexpected or misshapen keys, and OSError when files are missing or cannot be read.
    """
    model, account = model_class.from_pretrained(
        name,
        dtype=dtype,
        attn_implementation=attn_implementation,
        local_files_only=local_files_only,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        weights_only=True,
    )
    faults = {
        "missing": sorted(account["missing_keys"]),
        "unexpected": sorted(account["unexpected_keys"]),
        "misshapen": sorted(str(key) for key in account["mismatched_keys"]),
    }
    found = [f"{kind} keys: {_listed(keys)}" for kind, keys in faults.items() if keys]
    if found:
        raise ValueError(f"{name}: {'; '.join(found)}")
    return model


def _listed(keys: list[str], most: int = 8) -> str:
    shown = ", ".join(keys[:most])
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"
