"""Checkpoints: what they hold, exactness, frozen weights, pruning, flags."""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from checkpoints import files as checkpoint_files
from checkpoints import run_folder
from checkpoints.files import damage
from checkpoints.host_copies import HostCopies
from checkpoints.run_state import read_metadata, read_trainer_state, rng_state, set_rng_state
from conftest import tiny_llama_config
from helpers.checkpoint_tools import flip_bit, frozen_names, make_store, names_in, save, tiny_model
from utils import UserError


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


# what a checkpoint is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_frozen", [False, True])
def test_a_checkpoint_loads_with_transformers_after_being_moved(model, tokenizer, tmp_path, dtype, with_frozen):
    store = make_store(tmp_path / "run")
    frozen = frozen_names(model) if with_frozen else []
    assert save(store, "checkpoint-1", model, tokenizer=tokenizer, frozen=frozen, dtype=dtype, model_card="# Card")
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "run/checkpoint-1", moved)
    shutil.rmtree(tmp_path / "run")
    loaded, account = AutoModelForCausalLM.from_pretrained(moved, dtype="auto", output_loading_info=True)
    assert loaded.dtype == dtype
    assert not any(account.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype)), name
    assert AutoTokenizer.from_pretrained(moved)("hello").input_ids == tokenizer("hello").input_ids
    assert (moved / "README.md").read_text() == "# Card"
    assert len(list(moved.glob("*.safetensors"))) == 1 + with_frozen
    assert damage(moved) is None


def test_the_manifest_lists_every_other_file(model, tokenizer, tmp_path):
    store = make_store(tmp_path)
    save(store, "final", model, tokenizer=tokenizer, trainer_state={}, frozen=frozen_names(model))
    files = json.loads((tmp_path / "final/manifest.json").read_text())["files"]
    assert sorted([*files, "manifest.json"]) == names_in(tmp_path / "final")
    assert "trainer_state.pt" not in files
    with pytest.raises(UserError, match="--student_model"):
        read_trainer_state(tmp_path / "final")


def test_tied_weights_have_one_name(tmp_path):
    tied = LlamaForCausalLM(tiny_llama_config(num_hidden_layers=1, tie_word_embeddings=True))
    save(make_store(tmp_path), "checkpoint-1", tied)
    stored = load_file(tmp_path / "checkpoint-1/model.safetensors")
    assert "lm_head.weight" not in stored
    assert "model.embed_tokens.weight" in stored
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(loaded.lm_head.weight, tied.lm_head.weight)


def test_the_student_carries_its_modelling_code(tmp_path):
    from models import LlambaConfig, LlambaForCausalLM

    config = LlambaConfig(
        vocab_size=64,
        d_model=16,
        n_layer=1,
        mlp_cfg={"intermediate_size": 32, "bias": False, "act_fn": "silu"},
        ssm_cfg={
            "d_state": 8, "n_v_heads": 2, "n_qk_heads": 2, "expand": 1, "chunk_size": 8, "activation": "identity",
            "bias": False,
        },
    )  # fmt: skip
    save(make_store(tmp_path), "checkpoint-1", LlambaForCausalLM(config), dtype=torch.bfloat16)
    folder = tmp_path / "checkpoint-1"
    assert {"modeling_llamba.py", "configuration_llamba.py", "state_space.py"} <= set(names_in(folder))
    described = json.loads((folder / "config.json").read_text())
    assert set(described["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert described["dtype"] == "bfloat16"
    assert LlambaForCausalLM.from_pretrained(folder).config.d_model == 16


def test_trainer_state_and_metadata_come_back(model, tmp_path):
    state = {
        "tensor": torch.randn(3, 4).t(),
        "nested": [1, 2.5, None, True, ("a", b"\x00\xff")],
        7: {"numpy": np.float64(0.25)},
        "empty": torch.empty(0),
        "bfloat16": torch.randn(5).bfloat16(),
    }
    key = "hf_" + "A" * 30
    save(make_store(tmp_path), "checkpoint-1", model, trainer_state=state, metadata={"flags": {"note": key}})
    back = read_trainer_state(tmp_path / "checkpoint-1")
    assert torch.equal(back["tensor"], state["tensor"])
    assert back["nested"] == state["nested"]
    assert back[7] == {"numpy": 0.25}
    assert back["empty"].shape == (0,)
    assert back["bfloat16"].dtype == torch.bfloat16
    assert read_metadata(tmp_path / "checkpoint-1") == {"flags": {"note": "***"}}
    for path in (tmp_path / "checkpoint-1").iterdir():
        assert key.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_would_not_load_again_is_not_saved(model, tmp_path, asynchronous):
    store = make_store(tmp_path, asynchronous=asynchronous)
    assert not save(store, "checkpoint-1", model, trainer_state={"optimizer": {"odd": object()}}, wait=False)
    assert store.log == [
        "checkpoint-1 was not saved (/state/optimizer/odd: a checkpoint cannot hold a builtins.object); "
        "there is none yet; the next interval tries again"
    ]


# exactness


def test_the_snapshot_is_the_state_at_the_call(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {"step": torch.ones(1_000_000), "list": [1]}
    store = make_store(tmp_path)
    for _ in range(2):  # the second one reuses the buffers of the first
        accepted = save(store, "checkpoint-1", model, trainer_state=state, frozen=frozen_names(model), wait=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".mlp." not in name:
                    parameter.add_(1)
        state["step"].add_(1)
        state["list"].append(2)
        assert accepted
        assert store.wait()
        found = {
            name: tensor
            for shard in (tmp_path / "checkpoint-1").glob("*.safetensors")
            for name, tensor in load_file(shard).items()
        }
        assert all(torch.equal(found[name], before[name]) for name in before)
        back = read_trainer_state(tmp_path / "checkpoint-1")
        assert (back["step"] == state["step"][0] - 1).all()
        assert back["list"] == state["list"][:-1]
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}


def steps(model, optimizer, schedule, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        tokens = torch.randint(0, 512, (2, 16 + random.randrange(4) + np.random.randint(4)))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make_run(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_a_restored_run_goes_on_bit_for_bit(model, tmp_path):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    random.gauss(0, 1), np.random.normal()  # leaves a half used pair behind in both generators
    optimizer, schedule = make_run(model)
    steps(model, optimizer, schedule, 3)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "rng": rng_state()}
    store = make_store(tmp_path)
    save(store, "checkpoint-3", model, trainer_state=state, wait=False)
    expected = steps(model, optimizer, schedule, 4)
    expected_gauss = random.gauss(0, 1), np.random.normal()
    torch.randn(5), random.random(), np.random.rand()
    store.wait()

    resumed = AutoModelForCausalLM.from_pretrained(store.newest()).train()
    optimizer, schedule = make_run(resumed)
    state = read_trainer_state(tmp_path / "checkpoint-3")
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    set_rng_state(state["rng"])
    assert steps(resumed, optimizer, schedule, 4) == expected
    assert (random.gauss(0, 1), np.random.normal()) == expected_gauss
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_memory_that_is_shared_is_copied_once():
    weight = torch.randn(1000)
    copies = HostCopies()
    taken = copies.take({"weights": {"a": weight}, "exact": {"a": weight.detach()}})
    assert taken["weights"]["a"].data_ptr() == taken["exact"]["a"].data_ptr() != weight.data_ptr()
    assert copies.bytes_missing({"weights": {"a": weight}}) == 0
    assert copies.bytes_missing({"weights": {"a": weight.double()}}) == 8000


def test_prepared_memory_is_what_the_first_save_copies_into(model, tmp_path):
    frozen, state = frozen_names(model), {"moments": torch.randn(3_000_000), "step": torch.tensor(1.0)}
    store = make_store(tmp_path)
    store.prepare(model=model, trainer_state=state, frozen=frozen)
    store.wait()
    buffer = store._copies.buffers["/state/moments"]
    assert len(store._copies.buffers) == len(model.state_dict()) - len(frozen) + 2
    assert save(store, "checkpoint-1", model, trainer_state=state, frozen=frozen)
    assert store._copies.buffers["/state/moments"] is buffer
    assert torch.equal(read_trainer_state(tmp_path / "checkpoint-1")["moments"], state["moments"])


def test_without_room_for_a_copy_training_waits(model, tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoints.store.available_memory", lambda: 1000)
    store = make_store(tmp_path)
    assert save(store, "checkpoint-1", model, wait=False)
    assert store._thread is None
    assert "training waits" in store.log[0]
    assert damage(tmp_path / "checkpoint-1") is None


# frozen weights


def frozen_shard(folder: Path) -> Path:
    return folder / "model-00002-of-00002.safetensors"


def test_frozen_weights_are_linked_and_outlive_the_older_checkpoint(model, tmp_path):
    frozen = frozen_names(model)
    store = make_store(tmp_path, keep=1)
    save(store, "checkpoint-1", model, frozen=frozen)
    inode = frozen_shard(tmp_path / "checkpoint-1").stat().st_ino
    save(store, "checkpoint-2", model, frozen=frozen)
    store = make_store(tmp_path, keep=1)  # a new process hashes the weights instead of writing them
    save(store, "checkpoint-3", model, frozen=frozen)
    save(store, "final", model, frozen=frozen)
    assert names_in(tmp_path) == ["checkpoint-3", "final"]
    for name in ("checkpoint-3", "final"):
        assert frozen_shard(tmp_path / name).stat().st_ino == inode
    assert damage(tmp_path / "final") is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("change", ["values", "names"])
def test_frozen_weights_that_changed_are_written_anew(model, tmp_path, change):
    frozen = frozen_names(model)
    store = make_store(tmp_path)
    save(store, "checkpoint-1", model, frozen=frozen)
    if change == "values":
        with torch.no_grad():
            model.get_parameter(frozen[0]).add_(1)
    else:
        frozen = frozen[1:]
    save(store, "checkpoint-2", model, frozen=frozen)
    inodes = {frozen_shard(tmp_path / f"checkpoint-{step}").stat().st_ino for step in (1, 2)}
    assert len(inodes) == 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(loaded.get_parameter(frozen[0]), model.get_parameter(frozen[0]))


def test_without_hard_links_frozen_weights_are_written(model, tmp_path, monkeypatch):
    def refuse(*paths):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)  # what a FAT or some network file systems answer
    store = make_store(tmp_path)
    for step in (1, 2):
        assert save(store, f"checkpoint-{step}", model, frozen=frozen_names(model))
        assert damage(tmp_path / f"checkpoint-{step}") is None


def test_a_rotten_frozen_shard_is_not_linked_on(model, tmp_path):
    save(make_store(tmp_path), "checkpoint-1", model, frozen=frozen_names(model))
    flip_bit(frozen_shard(tmp_path / "checkpoint-1"), -5)
    store = make_store(tmp_path)
    assert save(store, "checkpoint-2", model, frozen=frozen_names(model))
    assert store.newest() == tmp_path / "checkpoint-2"


# keeping and pruning


def test_pruning_keeps_the_newest_the_best_and_final(model, tmp_path):
    store = make_store(tmp_path, keep=2)
    save(store, "final", model)
    for step in range(1, 7):
        save(store, f"checkpoint-{step}", model, best=step in (2, 3))
    assert names_in(tmp_path) == ["checkpoint-3", "checkpoint-5", "checkpoint-6", "final"]
    save(store, "checkpoint-3", model)  # the same step saved again is still the best
    save(store, "checkpoint-8", model)
    save(store, "checkpoint-9", model)
    assert names_in(tmp_path) == ["checkpoint-3", "checkpoint-8", "checkpoint-9", "final"]


def test_pruning_touches_nothing_that_is_not_ours(model, tmp_path):
    for name in ("checkpoint-1", "checkpoint-old", "notes"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("mine")
    store = make_store(tmp_path, keep=1)
    for step in (2, 3, 4):
        save(store, f"checkpoint-{step}", model)
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-4", "checkpoint-old", "notes"]


def test_a_failed_save_prunes_nothing(model, tmp_path, monkeypatch):
    store = make_store(tmp_path, keep=1)
    save(store, "checkpoint-1", model)
    monkeypatch.setattr(
        "checkpoints.store.write_torch", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    assert not save(store, "checkpoint-2", model)
    assert names_in(tmp_path) == ["checkpoint-1"]
    assert store.newest() == tmp_path / "checkpoint-1"


def test_newest_is_the_last_written_not_the_highest_step(model, tmp_path):
    store = make_store(tmp_path, keep=3)
    for name in ("checkpoint-10", "checkpoint-20", "checkpoint-15"):  # resumed from 10
        save(store, name, model)
    assert store.newest() == tmp_path / "checkpoint-15"


@pytest.mark.parametrize("atomic", [True, False])
def test_saving_a_name_again_replaces_it(model, tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr(run_folder, "exchange", lambda one, other: False)
    store = make_store(tmp_path)
    save(store, "checkpoint-1", model, trainer_state={"n": 1})
    save(store, "checkpoint-1", model, trainer_state={"n": 2})
    assert names_in(tmp_path) == ["checkpoint-1"]
    assert read_trainer_state(tmp_path / "checkpoint-1") == {"n": 2}
    assert damage(tmp_path / "checkpoint-1") is None


def test_left_overs_of_dead_processes_go_and_live_ones_stay(model, tmp_path):
    save(make_store(tmp_path), "checkpoint-1", model)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".tmp-checkpoint-2-{dead.pid}-77").mkdir()
    (tmp_path / f".tmp-checkpoint-3-{os.getpid()}-1").mkdir()  # our pid, of another start time
    live = run_folder.RunFolder(tmp_path, print).private("tmp", "checkpoint-4")
    live.mkdir()
    (tmp_path / "checkpoint-1").rename(tmp_path / f".old-checkpoint-1-{dead.pid}-77")  # killed between two renames
    store = make_store(tmp_path)
    assert names_in(tmp_path) == [live.name, "checkpoint-1"]
    assert store.newest() == tmp_path / "checkpoint-1"


def test_safetensors_agree_with_the_library(tmp_path):
    tensors = {
        "float": torch.randn(3, 5).t(),
        "half": torch.randn(7).half(),
        "whole": torch.arange(4),
        "bytes": torch.tensor([1, 2, 255], dtype=torch.uint8),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 4),
    }
    entry = checkpoint_files.write_stream(
        tmp_path / "x.safetensors", checkpoint_files.safetensors_stream(tensors, None)
    )
    assert entry == {"size": (tmp_path / "x.safetensors").stat().st_size, "sha256": entry["sha256"]}
    assert checkpoint_files.hash_file(tmp_path / "x.safetensors") == entry["sha256"]
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
