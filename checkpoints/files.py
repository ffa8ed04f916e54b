"""The files of a checkpoint folder: written with their hashes, and verified against the manifest."""

import copy
import ctypes
import hashlib
import json
import os
import queue
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.serialization import config as serialization_config
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

MANIFEST, METADATA, TRAINER_STATE = "manifest.json", "training_state.json", "trainer_state.pt"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
RENAME_EXCHANGE, AT_FDCWD = 2, -100
BLOCK = 1 << 24  # bytes hashed and written at a time
LARGEST_JSON = 1 << 26  # bytes; tokenizer.json of a 128k vocabulary is 17 MB

DTYPE_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.int64: "I64", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.uint16: "U16",
}  # fmt: skip


class HashedFile:
    """A new file that takes the sha256 of what is written to it; synced to the disk when it is closed."""

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.digest, self.size = hashlib.sha256(), 0
        self.error: OSError | None = None
        self.blocks: queue.Queue[memoryview | None] = queue.Queue(1)
        self.hasher = threading.Thread(target=self._hash, name="hash")  # as long as writing takes, so beside it
        self.hasher.start()

    def _hash(self) -> None:
        while (block := self.blocks.get()) is not None:
            self.digest.update(block)
            self.blocks.task_done()

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            for start in range(0, len(view), BLOCK):
                block = view[start : start + BLOCK]
                self.blocks.put(block)
                while block:
                    block = block[os.write(self.file, block) :]
                self.blocks.join()
        except OSError as error:
            self.error = error
            raise
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Asked for by torch.save; nothing is held back."""

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: object, *error: Any) -> None:
        try:
            if kind is None:
                os.fsync(self.file)
        finally:
            self.blocks.put(None)
            self.hasher.join()
            os.close(self.file)

    @property
    def entry(self) -> dict[str, Any]:
        """The file's line in the manifest: {"size": bytes, "sha256": hex}."""
        return {"size": self.size, "sha256": self.digest.hexdigest()}


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """Write and sync a small file; returns its manifest entry."""
    with HashedFile(path) as file:
        file.write(content)
    return file.entry


def write_stream(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Write and sync a file from buffers; returns its manifest entry."""
    with HashedFile(path) as file:
        for chunk in chunks:
            file.write(chunk)
    return file.entry


def hash_stream(chunks: Iterable[Any]) -> dict[str, Any]:
    """The manifest entry that `write_stream` would return, without writing."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def write_torch(path: Path, state: object) -> dict[str, Any]:
    """torch.save without its CRC32 (the manifest's sha256 covers the file); returns the manifest entry."""
    with HashedFile(path) as file, serialization_config.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
        try:
            torch.save(state, file)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's writer stumbles over a failed write and hides it
            raise file.error or error from error
    return file.entry


def safetensors_stream(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> Iterator[Any]:
    """The bytes of a safetensors file, a tensor at a time; floating tensors are cast to `dtype` where given.

    One tensor at most is held on the host beside those that are there already. Format: eight bytes of header
    length (little endian), a JSON header, the tensors' bytes; wide elements first, so that all are aligned.
    """
    kinds = {name: stored_dtype(tensor, dtype) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        end = offset + tensors[name].numel() * kinds[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPE_NAMES[kinds[name]], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        yield _tensor_bytes(tensors[name].detach().to(kinds[name]))


def stored_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor is stored when weights are stored in `dtype`."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _tensor_bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def together(*tasks: Callable[[], Any]) -> list[Any]:
    """The results of tasks run side by side; raises the first error of any. (An executor takes no task at exit.)"""
    results: dict[int, Any] = {}
    errors: list[Exception] = []

    def run(index: int) -> None:
        try:
            results[index] = tasks[index]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), name="checkpoint") for index in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(tasks))]


def sync_folder(path: Path) -> None:
    """Make names created or renamed in a folder survive a power cut."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; raises `ValueError` with the reason."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path.name}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON ({str(error)[:100]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its names and types checked; raises `ValueError` with the reason."""
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not isinstance(manifest.get("serial"), int):
        raise ValueError(f"{MANIFEST} is not one of this toolkit")
    for name, entry in files.items():
        plain_name(name, MANIFEST)
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise ValueError(f"{MANIFEST}: the entry of {name} lacks size or sha256")
    return manifest


def damage(folder: Path, *, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, in a few words; None when it is complete and undamaged.

    Sizes are always compared. Hashes cost one reading: about 1.5 GB/s on each of up to eight cores.
    """
    try:
        files = read_manifest(folder)["files"]
        for name, entry in files.items():
            info = os.lstat(folder / name)
            if not stat.S_ISREG(info.st_mode) and not inside(folder, folder / name):
                return f"{name} is not a file of this folder"
            size = (folder / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes instead of {entry['size']}"
        if hashes:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                found = dict(zip(files, pool.map(lambda name: hash_file(folder / name), files)))
            wrong = [name for name, entry in files.items() if found[name] != entry["sha256"]]
            if wrong:
                return f"the content of {', '.join(wrong)} is not what was written (sha256)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def hash_file(path: Path) -> str:
    """sha256 of a file, as hex."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_name(name: object, where: str) -> str:
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name:
        raise ValueError(f"{where} names {name!r}, which is not a file of this folder")
    return name


def inside(folder: Path, path: Path) -> bool:
    """True if a path ends in the folder, or in the blobs beside it when it is a snapshot of a Hub cache."""
    allowed = [folder.resolve()]
    if allowed[0].parent.name == "snapshots":
        allowed.append(allowed[0].parent.parent / "blobs")
    return any(path.resolve().is_relative_to(root) for root in allowed)


def files_written(write: Callable[[str], Any]) -> dict[str, bytes]:
    """What a function writes into the folder that it is given, as {name: content}."""
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def save_description(model: PreTrainedModel, dtype: torch.dtype | None, folder: str) -> None:
    """What `save_pretrained` writes beside the weights: configuration, generation settings, modelling code."""
    config = copy.deepcopy(model.config)
    config.dtype = str(dtype or model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if getattr(model, "_auto_class", None) is not None:
        custom_object_save(model, folder, config=config)  # type: ignore[arg-type]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def distinct_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's state dict with one name a parameter: of tied ones the name that the others are tied to.

    Memory says nothing here: an untied student's frozen embedding and head may both lie in a tied teacher's.
    """
    aliases = set(getattr(model, "_tied_weights_keys", None) or ())
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if id(tensor) not in names or names[id(tensor)] in aliases:
            names[id(tensor)] = name
    return {name: state[name].detach() for name in state if name in names.values()}


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step (Linux renameat2); False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def gib(size: float) -> str:
    """Bytes for a message."""
    return f"{size / 2**30:.2f} GiB"
