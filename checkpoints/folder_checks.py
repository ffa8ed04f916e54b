"""Is a model folder what it claims to be? Asked before anything of it is loaded.

Nothing here trusts a folder: every size is bounded by what the files hold, and nothing of them is executed.
"""

import json
import math
import re
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import inside, plain_name, read_json
from utils import UserError

PICKLES = re.compile(r"pytorch_model.*\.bin|trainer_state\.pt")  # those that are ever loaded
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
# name in a safetensors header -> bytes of one element
ELEMENT_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


def check_folder(folder: Path) -> None:
    """Refuse a model folder that is not what it claims to be, before anything of it is loaded.

    No path may leave the folder (links inside a Hub cache's snapshot may point to its blobs), safetensors headers
    must agree with their files, pickles may hold nothing but tensors, and the configuration may claim no more than
    the weights hold. Reads headers only, so it takes milliseconds. Raises `UserError` in one line.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            raise ValueError("is not a folder")
        entries = sorted(folder.iterdir())
        for path in entries:
            _check_entry(folder, path)
        shapes: dict[str, list[int]] = {}
        for path in entries:
            if path.name.endswith(".safetensors"):
                shapes |= read_safetensors_header(path)
            elif path.name.endswith(".index.json"):
                _check_index(folder, path)
            elif PICKLES.fullmatch(path.name):
                check_pickle(path)
        if shapes and (folder / "config.json").exists():
            _check_claims(read_json(folder / "config.json"), shapes)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder}: {error}") from error


def _check_entry(folder: Path, path: Path) -> None:
    if path.is_symlink() and not inside(folder, path):
        raise ValueError(f"{path.name} is a link out of the folder")
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path.name} is neither a file nor a folder")


def _check_index(folder: Path, path: Path) -> None:
    mapping = read_json(path).get("weight_map")
    if not isinstance(mapping, dict):
        raise ValueError(f"{path.name} has no weight_map")
    for shard in {plain_name(name, path.name) for name in mapping.values()}:
        if not shard.endswith((".safetensors", ".bin")):
            raise ValueError(f"{path.name} names {shard!r}, which is no weights file")
        if not (folder / shard).is_file():
            raise ValueError(f"{path.name} names {shard}, which is missing")


def read_safetensors_header(path: Path) -> dict[str, list[int]]:
    """{tensor: shape} of a safetensors file; `ValueError` unless header, offsets and file size agree."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(LARGEST_HEADER, size - 8):
            raise ValueError(f"{path.name} is truncated or no safetensors file (header of {length} bytes)")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = [(name, e["dtype"], e["shape"], *e["data_offsets"]) for name, e in header.items()]
        entries.sort(key=lambda entry: entry[3:])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path.name} has no readable safetensors header") from error
    end = 0
    for name, dtype, shape, first, last in entries:
        _check_shape(f"{path.name}: {name}", shape)
        if first != end or last - first != math.prod(shape) * ELEMENT_SIZES.get(dtype, 0):
            raise ValueError(f"{path.name}: {name} claims {dtype} {shape} but has bytes {first} to {last}")
        end = last
    if size != 8 + length + end:
        raise ValueError(f"{path.name} has {size} bytes instead of {8 + length + end}")
    return {name: shape for name, _, shape, _, _ in entries}


def _check_shape(what: str, shape: object) -> None:
    if (
        not isinstance(shape, list)
        or len(shape) > 8
        or any(type(n) is not int or not 0 <= n < 1 << 40 for n in shape)
    ):
        raise ValueError(f"{what} has the shape {str(shape)[:80]}")


def check_pickle(path: Path) -> None:
    """Refuse a torch.save file that holds anything but tensors and plain values, or more than its size allows.

    torch's weights-only reader builds the objects without their data (meta device), so nothing is executed and
    nothing large is allocated.
    """
    size, archived = path.stat().st_size, zipfile.is_zipfile(path)
    if archived:
        with zipfile.ZipFile(path) as archive:
            packed = [entry for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            if packed or sum(entry.file_size for entry in archive.infolist()) > size:
                raise ValueError(f"{path.name} is not a file that torch.save writes (compressed)")
    try:
        content = torch.load(str(path), map_location="meta", weights_only=True, mmap=archived)
    except Exception as error:  # whatever a hostile file makes of the reader, it is one line
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path.name} is damaged or holds more than tensors ({reason[0][:160]})") from error
    stack: list[Any] = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
        elif isinstance(value, torch.Tensor) and value.numel() * value.element_size() > size:
            raise ValueError(f"{path.name} claims a tensor of the shape {list(value.shape)}, larger than the file")


def _check_claims(config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """The configuration may not make the loader build more than the weights hold."""
    held = sum(math.prod(shape) for shape in shapes.values())
    layers = config.get("n_layer", config.get("num_hidden_layers", 0))
    width = config.get("d_model", config.get("hidden_size", 0))
    vocabulary = config.get("vocab_size", 0)
    for name, value in (("layers", layers), ("width", width), ("vocabulary", vocabulary)):
        if type(value) is not int or value < 0:
            raise ValueError(f"config.json states {name} as {str(value)[:80]!r}")
    if layers > len(shapes) or width * max(vocabulary, layers) > 2 * held:
        raise ValueError(
            f"config.json claims {layers} layers of width {width}, {vocabulary} tokens; the weights hold {held}"
        )
