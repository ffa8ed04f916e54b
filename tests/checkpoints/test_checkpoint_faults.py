"""Faults while a checkpoint is written, and in what is found on the disk: real processes, real file systems."""

import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from checkpoints import run_folder
from checkpoints.files import damage
from checkpoints.run_state import read_metadata, read_trainer_state
from checkpoints.store import CheckpointStore
from conftest import ROOT, tiny_llama_config
from helpers import warm
from helpers.checkpoint_tools import (
    METADATA,
    flip_bit,
    frozen_names,
    make_store,
    names_in,
    save,
    tiny_model,
)
from utils import UserError


@pytest.fixture
def model():
    return tiny_model()


# damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "truncated weights": (lambda f: truncate(f / "model.safetensors"), "model.safetensors has"),
    "bit flipped in weights": (lambda f: flip_bit(f / "model.safetensors", -9), "model.safetensors is not what was"),
    "bit flipped in state": (lambda f: flip_bit(f / "trainer_state.pt", 700), "trainer_state.pt is not what was"),
    "truncated metadata": (lambda f: truncate(f / "training_state.json"), "training_state.json has"),
    "file missing": (lambda f: (f / "trainer_state.pt").unlink(), "trainer_state.pt is missing"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "manifest.json: No such file"),
    "manifest truncated": (lambda f: truncate(f / "manifest.json"), "manifest.json is not JSON"),
    "manifest of another kind": (lambda f: (f / "manifest.json").write_text("{}"), "not one of this toolkit"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_the_one_before_is_used(model, tmp_path, kind):
    spoil, reason = DAMAGES[kind]
    store = make_store(tmp_path)
    save(store, "checkpoint-1", model)
    save(store, "checkpoint-2", model)
    spoil(tmp_path / "checkpoint-2")
    assert make_store(tmp_path).resolve("auto") == tmp_path / "checkpoint-1"
    assert store.newest() == tmp_path / "checkpoint-1"
    assert len(store.log) == 1
    assert "checkpoint-2 is passed over: " in store.log[0]
    assert reason in store.log[0]
    with pytest.raises(UserError, match="checkpoint-2"):
        store.resolve(str(tmp_path / "checkpoint-2"))
    assert save(store, "checkpoint-2", model)  # and is replaced when the run comes there again
    assert store.newest() == tmp_path / "checkpoint-2"


def test_resolve(model, tmp_path):
    store = make_store(tmp_path / "run")
    assert store.resolve("auto") is None
    assert store.resolve("none") is None
    with pytest.raises(UserError, match="no such folder"):
        store.resolve(str(tmp_path / "nowhere"))
    save(store, "checkpoint-1", model)
    assert store.resolve("auto") == tmp_path / "run/checkpoint-1"
    assert store.resolve(str(tmp_path / "run/checkpoint-1")) == tmp_path / "run/checkpoint-1"
    with pytest.raises(UserError, match="already holds a run"):
        store.resolve("none")
    truncate(tmp_path / "run/checkpoint-1/trainer_state.pt")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        store.resolve("auto")


# faults while saving


def save_for_ever(folder: str, ready) -> None:
    """A process that saves and prunes until it is killed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(num_hidden_layers=1))
    store = CheckpointStore(Path(folder), keep=2)
    state = {"moments": [torch.randn(1_000_000) for _ in range(4)]}
    step = max((int(p.name.split("-")[1]) for p in store.folder.checkpoints()), default=0)
    while True:
        step += 1
        metadata = {**METADATA, "progress": {"optimizer_step": step}}
        for name in (f"checkpoint-{step}", f"checkpoint-{step}"):  # every step twice: replacing is killed as well
            assert save(store, name, model, trainer_state=state, metadata=metadata, frozen=frozen_names(model))
            ready.set()


def test_killed_at_random_moments_a_complete_checkpoint_is_left(tmp_path):
    context = warm.context()
    rng = random.Random(5)
    last = 0
    for _ in range(6):
        ready = context.Event()
        process = context.Process(target=save_for_ever, args=(str(tmp_path), ready))
        process.start()
        assert ready.wait(60)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        store = make_store(tmp_path)
        newest = store.newest()
        assert store.log == []  # the very newest is complete; nothing had to be passed over
        step = read_metadata(newest)["progress"]["optimizer_step"]
        assert step > last
        last = step
        assert newest.name == f"checkpoint-{step}"
        assert all(name.startswith("checkpoint-") for name in names_in(tmp_path))


def die_at(count: int) -> None:
    """SIGKILL this process just before its count-th operation on the file system."""
    left = itertools.count(count, -1)

    def deadly(function):
        def call(*args, **kwargs):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("write", "fsync", "rename", "mkdir", "link", "unlink", "rmdir", "open"):
        setattr(os, name, deadly(getattr(os, name)))
    run_folder.exchange = deadly(run_folder.exchange)


def die_at_every_operation(folder: str, atomic: bool, queue) -> None:
    """Save a new checkpoint, prune the old one, save the new one again: killed before each single operation."""
    torch.set_num_threads(1)
    model, run = LlamaForCausalLM(tiny_llama_config(num_hidden_layers=1)), Path(folder) / "run"
    if not atomic:
        run_folder.exchange = lambda one, other: False
    first = Path(folder) / "first"
    assert save(make_store(first), "checkpoint-1", model, trainer_state={"n": 1}, frozen=frozen_names(model))
    for count in itertools.count():
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(first, run)
        process = os.fork()
        if process == 0:
            store = make_store(run, keep=1)
            die_at(count)
            for n in (2, 3):
                save(store, "checkpoint-2", model, trainer_state={"n": n}, frozen=frozen_names(model))
            os._exit(0)
        _, status = os.waitpid(process, 0)
        store = make_store(run)
        newest = store.newest()
        queue.put((status, list(store.log), newest and newest.name, newest and read_trainer_state(newest)["n"]))
        if status == 0:
            return


@pytest.mark.slow
@pytest.mark.parametrize("atomic", [True, False])
def test_killed_before_each_operation_on_the_file_system(tmp_path, atomic):
    context = warm.context()
    queue = context.Queue()
    process = context.Process(target=die_at_every_operation, args=(str(tmp_path), atomic, queue))
    process.start()
    seen = []
    while not seen or seen[-1][0] != 0:
        seen.append(queue.get(timeout=60))
        assert seen[-1][1] == []  # whatever the moment, no damaged checkpoint is ever in sight
        assert seen[-1][2:] in [("checkpoint-1", 1), ("checkpoint-2", 2), ("checkpoint-2", 3)]
    process.join()
    states = [n for *_, n in seen]
    assert states == sorted(states)
    assert min(states.count(n) for n in (1, 2)) > 20  # operations
    assert states[-1] == 3


HERE = Path(__file__).parent


def save_and_leave(folder: str) -> None:
    torch.set_num_threads(1)
    model = LlamaForCausalLM(tiny_llama_config(num_hidden_layers=1))
    state = {"moments": [torch.randn(1_000_000) for _ in range(8)]}
    save(make_store(Path(folder)), "checkpoint-1", model, trainer_state=state, wait=False)
    raise RuntimeError("training broke down")


def test_a_process_that_ends_without_waiting_finishes_its_checkpoint(tmp_path):
    code = f"from test_checkpoint_faults import *; save_and_leave({str(tmp_path)!r})"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests", HERE])),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert names_in(tmp_path) == ["checkpoint-1"]
    assert damage(tmp_path / "checkpoint-1") is None


@pytest.mark.parametrize("cores", [2, 64])
def test_on_many_cores_files_are_written_side_by_side_to_the_same_bytes(model, tmp_path, monkeypatch, cores):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    store = make_store(tmp_path, keep=1)
    assert save(store, "checkpoint-1", model, frozen=frozen_names(model), trainer_state={"x": torch.arange(1000)})
    assert damage(tmp_path / "checkpoint-1") is None
    assert not save(store, "checkpoint-2", model, weights={"x": torch.zeros(2, dtype=torch.complex128)})
    assert "checkpoint-2 was not saved" in store.log[0]
    assert names_in(tmp_path) == ["checkpoint-1"]


@contextlib.contextmanager
def mounted(folder: Path, size: str = "40m"):
    """A small file system of its own; skips the test where mounting is not permitted."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


BIG = {"moments": torch.zeros(12_000_000)}  # 48 MB


def test_too_little_space_is_seen_before_writing(model, tmp_path):
    with mounted(tmp_path / "disk") as disk:
        store = make_store(disk)
        assert save(store, "checkpoint-1", model)
        assert not save(store, "checkpoint-2", model, trainer_state={"moments": torch.zeros(9_000_000)})
        assert "it needs 0.03 GiB and" in store.log[0]
        assert "the last good one is checkpoint-1; the next interval tries again" in store.log[0]
        assert save(store, "checkpoint-3", model)


def test_a_disk_that_fills_up_in_mid_write(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "checkpoints.store.SPARE", -(1 << 40)
    )  # passes the check, as if others filled the disk meanwhile
    with mounted(tmp_path / "disk") as disk:
        store = make_store(disk, keep=1)
        assert save(store, "checkpoint-1", model)
        assert not save(store, "checkpoint-2", model, trainer_state=BIG)
        assert "checkpoint-2 was not saved (No space left on device)" in store.log[0]
        assert names_in(disk) == ["checkpoint-1"]
        assert store.newest() == disk / "checkpoint-1"
        assert save(store, "checkpoint-3", model)
        assert names_in(disk) == ["checkpoint-3"]


def save_under_a_limit(folder: str, queue) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    torch.set_num_threads(1)
    store = make_store(Path(folder))
    model = LlamaForCausalLM(tiny_llama_config(num_hidden_layers=1))
    outcomes = [save(store, "checkpoint-1", model), save(store, "checkpoint-2", model, trainer_state=BIG)]
    queue.put((outcomes, list(store.log), names_in(Path(folder))))


def test_a_write_that_fails_half_way(tmp_path):
    """Needs no privileges: the kernel refuses to let a file grow over a limit."""
    context = warm.context()
    queue = context.Queue()
    process = context.Process(target=save_under_a_limit, args=(str(tmp_path), queue))
    process.start()
    outcomes, log, names = queue.get(timeout=60)
    process.join()
    assert outcomes == [True, False]
    assert "checkpoint-2 was not saved (File too large)" in log[0]
    assert names == ["checkpoint-1"]


def test_a_read_only_file_system(model, tmp_path):
    with mounted(tmp_path / "disk") as disk:
        store = make_store(disk)
        assert save(store, "checkpoint-1", model)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert not save(store, "checkpoint-2", model)
        assert "Read-only file system" in store.log[0]
        assert store.newest() == disk / "checkpoint-1"
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert save(store, "checkpoint-3", model)


def test_a_mount_that_vanished_is_not_replaced_by_the_disk_under_it(model, tmp_path):
    with mounted(tmp_path / "disk") as disk:
        store = make_store(disk)
        assert save(store, "checkpoint-1", model)
        subprocess.run(["umount", str(disk)], check=True)
        assert not save(store, "checkpoint-2", model)
        assert "is its mount gone?" in store.log[0]
        assert names_in(disk) == []


def test_a_folder_that_vanished(model, tmp_path):
    store = make_store(tmp_path / "run")
    assert save(store, "checkpoint-1", model)
    (tmp_path / "run").rename(tmp_path / "away")
    assert not save(store, "checkpoint-2", model)
    assert "No such file or directory" in store.log[0]
    assert not (tmp_path / "run").exists()
    (tmp_path / "away").rename(tmp_path / "run")
    assert save(store, "checkpoint-3", model)


def test_an_output_folder_that_is_a_file(model, tmp_path):
    (tmp_path / "run").write_text("")
    store = make_store(tmp_path / "run")
    assert not save(store, "checkpoint-1", model)
    assert "was not saved" in store.log[0]


def test_every_file_is_synced_before_the_folder_gets_its_name(model, tmp_path, monkeypatch):
    order = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append(f"rename {b}"), rename(a, b))[1])
    save(make_store(tmp_path), "checkpoint-1", model, frozen=frozen_names(model))
    renamed = order.index(f"rename {tmp_path / 'checkpoint-1'}")
    synced = {Path(path).name for path in order[:renamed]}
    assert set(names_in(tmp_path / "checkpoint-1")) < synced
    assert order[renamed - 2].endswith("manifest.json")
    assert Path(order[renamed - 1]).name.startswith(".tmp-checkpoint-1")  # the folder itself
    assert order[renamed + 1 :] == [str(tmp_path)]
