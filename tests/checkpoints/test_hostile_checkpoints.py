"""Hostile model folders are refused in one line, and nothing of them is executed."""

import json
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.folder_checks import check_folder
from checkpoints.run_state import read_metadata, read_trainer_state
from helpers.checkpoint_tools import make_store, save, tiny_model
from utils import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    """A sound checkpoint with two shards, to be spoiled."""
    model = tiny_model()
    frozen = [name for name, _ in model.named_parameters() if ".mlp." in name]
    save(make_store(tmp_path / "run"), "checkpoint-1", model, frozen=frozen)
    check_folder(tmp_path / "run/checkpoint-1")
    return tmp_path / "run/checkpoint-1"


class Payload:
    """Unpickling it makes a file: the proof that something was executed."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def refused(folder: Path, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as refusal:
        check_folder(folder)
    assert time.monotonic() - began < 5
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


def write_safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


# pickles


@pytest.mark.parametrize("name", ["trainer_state.pt", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_payload_in_a_torch_file(folder, tmp_path, name):
    torch.save({"weight": torch.zeros(2), "state": Payload(tmp_path / "proof")}, folder / name)
    refused(folder, f"{name} is damaged or holds more than tensors")
    if name == "trainer_state.pt":
        with pytest.raises(UserError, match="holds more than tensors"):
            read_trainer_state(folder)
        with pytest.raises(UserError, match=r"sha256|instead of"):
            make_store(folder.parent).resolve(str(folder))
    assert not (tmp_path / "proof").exists()


def test_pickles_that_are_never_loaded_are_left_alone(folder, tmp_path):
    """Many a model folder carries a training_args.bin; and the payload of these tests is a real one."""
    (folder / "training_args.bin").write_bytes(pickle.dumps(Payload(tmp_path / "proof")))
    check_folder(folder)
    assert not (tmp_path / "proof").exists()
    pickle.loads((folder / "training_args.bin").read_bytes())
    assert (tmp_path / "proof").exists()


def test_a_bare_pickle(folder, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "proof"), protocol=2))
    refused(folder, "pytorch_model.bin is damaged or holds more than tensors")
    assert not (tmp_path / "proof").exists()


def test_a_payload_whose_manifest_was_forged_as_well(folder, tmp_path):
    """Hashes say that a file is what was written, not that it is harmless."""
    from checkpoints import files as checkpoint_files

    torch.save({"state": Payload(tmp_path / "proof")}, folder / "trainer_state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "trainer_state.pt"
    manifest["files"][path.name] = {"size": path.stat().st_size, "sha256": checkpoint_files.hash_file(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="holds more than tensors"):
        make_store(folder.parent).resolve("auto")
    assert not (tmp_path / "proof").exists()


def test_a_compressed_torch_file(folder):
    """A zip bomb: kilobytes on the disk, gigabytes in memory."""
    torch.save({"weight": torch.zeros(1_000_000)}, folder / "plain.zip")
    with zipfile.ZipFile(folder / "plain.zip") as plain, zipfile.ZipFile(folder / "pytorch_model.bin", "w") as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    (folder / "plain.zip").unlink()
    refused(folder, "compressed")


def test_a_tensor_in_a_torch_file_that_is_larger_than_the_file(folder):
    torch.save({"weight": torch.zeros(1).expand(1 << 40)}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin claims a tensor of the shape [1099511627776], larger than the file")


def test_a_truncated_torch_file(folder):
    path = folder / "trainer_state.pt"
    path.write_bytes(path.read_bytes()[:-200])
    refused(folder, "trainer_state.pt is damaged")
    with pytest.raises(UserError, match=r"trainer_state\.pt is damaged"):
        read_trainer_state(folder)


# paths


OUTSIDE = [
    "../secret.safetensors",
    "/etc/secret.safetensors",
    "a/../../secret.safetensors",
    "..\\secret.safetensors",
    "..",
]


@pytest.mark.parametrize("shard", [*OUTSIDE, "", 7, None, ["model.safetensors"]])
def test_a_shard_index_that_leaves_the_folder(folder, shard):
    save_file({"x": torch.zeros(1)}, folder.parent / "secret.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "is not a file of this folder")


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ('{"weight_map": {"x": "gone.safetensors"}}', "names gone.safetensors, which is missing"),
        ('{"weight_map": {"x": "config.json"}}', "which is no weights file"),
        ('{"weight_map": []}', "has no weight_map"),
        ("[1, 2]", "holds no JSON object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_shard_index_of_another_form(folder, index, reason):
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, reason)


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", "extra"])
def test_a_link_out_of_the_folder(folder, name):
    (folder.parent / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / "secret")
    refused(folder, f"{name} is a link out of the folder")


def test_a_folder_that_is_a_link_out_of_the_folder(folder):
    (folder / "code").symlink_to("/etc")
    refused(folder, "code is a link out of the folder")


def test_links_of_a_hub_cache_are_in_order(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    check_folder(snapshot)
    (snapshot / "more").symlink_to("../../../elsewhere")
    (tmp_path / "elsewhere").mkdir()
    refused(snapshot, "more is a link out of the folder")


def test_a_pipe_does_not_make_the_reader_wait(folder):
    (folder / "pytorch_model.bin").unlink(missing_ok=True)
    os.mkfifo(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is neither a file nor a folder")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_leaves_the_folder(folder, name):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not a file of this folder"):
        make_store(folder.parent).resolve(str(folder))


# safetensors

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"x": {**F32, "shape": [1 << 62]}}, b"12345678", "has the shape"),
        ({"x": {**F32, "shape": [1 << 31, 1 << 31]}}, b"12345678", "but has bytes 0 to 8"),
        ({"x": {**F32, "shape": [-2]}}, b"12345678", "has the shape"),
        ({"x": {**F32, "shape": [True, 2]}}, b"12345678", "has the shape"),
        ({"x": {**F32, "shape": [1] * 100}}, b"12345678", "has the shape"),
        ({"x": {**F32, "dtype": "F99"}}, b"12345678", "claims F99"),
        ({"x": F32, "y": F32}, b"12345678", "y claims F32 [2] but has bytes 0 to 8"),
        ({"x": {**F32, "data_offsets": [4, 12]}}, b"123456789012", "but has bytes 4 to 12"),
        ({"x": {**F32, "data_offsets": [8, 0]}}, b"12345678", "but has bytes 8 to 0"),
        ({"x": F32}, b"1234", "bytes instead of"),
        ({"x": F32}, b"12345678 and more", "bytes instead of"),
        ({"x": {"dtype": "F32"}}, b"", "no readable safetensors header"),
        ({"x": 3}, b"", "no readable safetensors header"),
        (b"[]", b"", "no readable safetensors header"),
        (b"{" * 1000, b"", "no readable safetensors header"),
        (b"[" * 100_000, b"", "no readable safetensors header"),
    ],
)
def test_a_header_that_does_not_agree_with_the_file(folder, header, data, reason):
    write_safetensors(folder / "model-00001-of-00002.safetensors", header, data)
    refused(folder, reason)


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 500, 2**64 - 1])
def test_an_absurd_header_length(folder, length):
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"x": F32}, b"12345678", length=length)
    refused(folder, "truncated or no safetensors file")


@pytest.mark.parametrize("size", [0, 5, 8, 100, 20_000])
def test_a_truncated_safetensors_file(folder, size):
    os.truncate(folder / "model-00002-of-00002.safetensors", size)
    refused(folder, "model-00002-of-00002.safetensors")


# descriptions


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "config.json claims 1000000000 layers"),
        ({"hidden_size": 10**9}, "config.json claims"),
        ({"vocab_size": 10**12}, "config.json claims"),
        ({"hidden_size": -64}, "states width as '-64'"),
        ({"vocab_size": "many"}, "states vocabulary as 'many'"),
        ({"num_hidden_layers": [4]}, "states layers as"),
    ],
)
def test_a_configuration_that_claims_more_than_the_weights_hold(folder, change, reason):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    refused(folder, reason)


def test_metadata_that_is_too_large_or_no_json(folder):
    (folder / "training_state.json").write_text("{nonsense")
    with pytest.raises(UserError, match=r"training_state\.json is not JSON"):
        read_metadata(folder)
    os.truncate(folder / "training_state.json", 1 << 40)  # sparse: a terabyte that takes no room
    with pytest.raises(UserError, match=r"training_state\.json has 1099511627776 bytes"):
        read_metadata(folder)


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "is not a folder")
