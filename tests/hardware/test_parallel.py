"""Several ranks with gloo: the same numbers, the same files; under torchrun: signals, and ranks that die."""

import functools
import os
import re
import shutil
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from arguments import parse_arguments
from conftest import tiny_llama_config
from distill.distillation import StudentLoss
from distill.initialization import student_config
from hardware import parallel
from hardware.memory import StepModel, estimate_memory
from hardware.meta_models import meta_student
from hardware.ranks import Ranks
from helpers import runs
from helpers.launching import ended, launch, ranks_of, start_long_run, torchrun, wait_until
from run.acceleration import step_settings
from run.inputs import settle_parallel
from utils import UserError

pytestmark = pytest.mark.slow

EXACT = {"dtype": "float32", "optimizer": "adamw", "skip_stage2": True, "max_steps": 10, "grad_accumulation_steps": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_teacher, sources):
    """One rank with a batch of 4: what every division of it has to equal."""
    folder = tmp_path_factory.mktemp("alone")
    launch(0, runs.flags(tiny_teacher, sources, folder, batch_size=4, **EXACT))
    return folder


@pytest.mark.parametrize(
    "extra",
    [
        {"parallel": "ddp"},
        {"parallel": "fsdp"},
        {"parallel": "ddp", "teacher_device": "cpu"},
        {"parallel": "fsdp", "freeze_mlp": True, "freeze_embeddings": True},
        {"parallel": "ddp", "layer_weight": 2.0},
        {"parallel": "fsdp", "layer_weight": 2.0},
    ],
    ids=[
        "ddp",
        "fsdp",
        "one teacher for the host",
        "fsdp, most of it frozen",
        "ddp, every layer matched",
        "fsdp, every layer matched",
    ],
)
def test_two_ranks_equal_one_with_twice_the_batch(extra, alone, tiny_teacher, sources, tmp_path):
    flags = {name: value for name, value in extra.items() if name not in ("parallel", "teacher_device")}
    if flags:
        alone = tmp_path / "alone"
        launch(0, runs.flags(tiny_teacher, sources, alone, batch_size=4, **EXACT | flags))
    output = launch(2, runs.flags(tiny_teacher, sources, tmp_path / "run", batch_size=2, **EXACT | extra))
    expected, found = runs.losses(alone), runs.losses(tmp_path / "run")
    assert len(expected) == len(found) == 10
    for (step, loss, norm), (other_step, other_loss, other_norm) in zip(expected, found):
        assert step == other_step
        assert abs(loss - other_loss) < 2e-6 * loss and abs(norm - other_norm) < 1e-5 * norm
    weights, others = (runs.weights(folder / "final") for folder in (alone, tmp_path / "run"))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert (others[name] - weight).norm() <= 2e-5 * weight.norm(), name
    assert output.count("step 10, loss") == 1  # one rank speaks
    placed = re.findall(r"rank (\d), process \d+ on \S+: student on cpu, (.*)", output)
    shared = [("0", "teacher on cpu for 2 students"), ("1", "no teacher of its own: asks the first process' on cpu")]
    assert placed == (shared if "teacher_device" in extra else [("0", "teacher on cpu"), ("1", "teacher on cpu")])
    last = [row for row in runs.metrics(tmp_path / "run") if "train/loss" in row][-1]
    assert last["train/tokens"] == 10 * 8 * 64
    assert {"data/wait_seconds_rank_0", "data/wait_seconds_rank_1"} <= last.keys()


@pytest.fixture(scope="module")
def alone_with(tmp_path_factory, tiny_teacher, sources):
    """As `alone`, with another optimizer: a function from its name to the folder."""

    @functools.cache
    def run(optimizer):
        folder = tmp_path_factory.mktemp(f"alone-{optimizer}")
        launch(0, runs.flags(tiny_teacher, sources, folder, batch_size=4, **EXACT | {"optimizer": optimizer}))
        return folder

    return run


@pytest.mark.parametrize("kind, optimizer", [("ddp", "adamw8bit"), ("fsdp", "adamw8bit"), ("ddp", "muon")])
def test_two_ranks_equal_one_and_one_goes_on(kind, optimizer, alone_with, tiny_teacher, sources, tmp_path):
    """Gradients differ by rounding, and rounding decides which of two codes a moment takes: 2% of a tensor's way.

    Losses and norms hardly see that. 5% is allowed of how far the second half of the run moved each tensor; with
    gradients that are not averaged it is 17% to 116%.
    """
    alone = alone_with(optimizer)
    shared = {**EXACT, "optimizer": optimizer, "save_interval": 10}  # micro steps
    two, one = tmp_path / "two", tmp_path / "one"
    launch(2, runs.flags(tiny_teacher, sources, two, batch_size=2, parallel=kind, **shared))
    runs.copy_up_to(two, "checkpoint-5", one)
    output = launch(0, runs.flags(tiny_teacher, sources, one, batch_size=4, **shared))
    assert "resuming" in output and "checkpoint-5" in output
    expected = runs.losses(alone)
    halfway, end = runs.weights(two / "checkpoint-5"), runs.weights(alone / "final")
    for folder in (two, one):
        found, weights = runs.losses(folder), runs.weights(folder / "final")
        assert [step for step, *_ in found] == [step for step, *_ in expected] == list(range(1, 11))
        for (_, loss, norm), (_, other_loss, other_norm) in zip(expected, found):
            assert abs(loss - other_loss) < 2e-6 * loss and abs(norm - other_norm) < 2e-3 * norm
        assert weights.keys() == end.keys()
        for name, weight in end.items():
            assert (weights[name] - weight).norm() < 0.05 * (weight - halfway[name]).norm(), name


def test_a_run_goes_on_with_any_number_of_ranks(tiny_teacher, sources, tmp_path):
    """Saved by 2 shards of the 8-bit optimizer; 1 and 4 ranks go on as the 2 did, on the same sequences."""
    shared = dict(
        optimizer="adamw8bit", dtype="bfloat16", skip_stage2=True, save_interval=4, keep_checkpoints=9,
        parallel="fsdp", hidden_tokens=2048, eval_dataset=sources["heldout"], eval_interval=6, eval_tokens=500,
    )  # fmt: skip
    two = tmp_path / "two"
    launch(2, runs.flags(tiny_teacher, sources, two, batch_size=2, **shared))
    expected = runs.losses(two)
    for ranks, batch in ((0, 4), (4, 1)):
        folder = tmp_path / f"go-on-{ranks}"
        runs.copy_up_to(two, "checkpoint-12", folder)
        output = launch(ranks, runs.flags(tiny_teacher, sources, folder, batch_size=batch, **shared))
        assert "resuming" in output and "checkpoint-12" in output
        found = runs.losses(folder)
        assert [step for step, *_ in found] == [step for step, *_ in expected]
        for (_, loss, norm), (_, other_loss, other_norm) in zip(expected, found):
            assert abs(loss - other_loss) < 1e-4 * loss and abs(norm - other_norm) < 1e-2 * norm
        sizes = {path.name: path.stat().st_size for path in (two / "final").iterdir()}
        small = {"training_state.json", "README.md", "manifest.json"}
        assert {path.name for path in (folder / "final").iterdir()} == sizes.keys()
        assert all((folder / "final" / name).stat().st_size == sizes[name] for name in sizes.keys() - small)


def test_another_number_of_sequences_a_step_is_told(tiny_teacher, sources, tmp_path):
    shared = dict(skip_stage2=True, save_interval=3, keep_checkpoints=9, max_steps=6)
    launch(0, runs.flags(tiny_teacher, sources, tmp_path, **shared))
    for name in ("checkpoint-6", "final"):
        shutil.rmtree(tmp_path / name)
    output = launch(2, runs.flags(tiny_teacher, sources, tmp_path, **shared))
    assert "an optimizer step takes 4 sequences from here on, not 2 as before" in output
    assert [step for step, *_ in runs.losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("victim, kind", [(1, "fsdp"), (0, "ddp")])
def test_a_killed_rank_ends_all_and_the_checkpoint_stays(victim, kind, tiny_teacher, sources, tmp_path):
    process = start_long_run(tmp_path, tiny_teacher, sources, save_interval=5, parallel=kind)
    wait_until(lambda: (tmp_path / "checkpoint-5" / "manifest.json").exists())
    everyone = ranks_of(process)
    began = time.monotonic()
    os.kill(everyone[victim], signal.SIGKILL)
    output = ended(process, 60)
    assert time.monotonic() - began < 60 and process.returncode != 0
    assert "another rank is gone; the last checkpoint is checkpoint-" in output
    for pid in everyone.values():
        assert not os.path.exists(f"/proc/{pid}")
    steps = max(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*"))
    shared = dict(batch_size=4, save_interval=5, skip_stage2=True, max_steps=100_000)
    run = torchrun(0, runs.flags(tiny_teacher, sources, tmp_path, **shared))
    wait_until(lambda: (tmp_path / f"checkpoint-{steps + 5}" / "manifest.json").exists())
    run.send_signal(signal.SIGTERM)
    output = ended(run, 60)
    assert re.findall(r"step (\d+), loss", output)[0] == str(steps + 1)
    assert run.returncode == 128 + signal.SIGTERM


def test_sigterm_saves_and_a_closed_terminal_changes_nothing(tiny_teacher, sources, tmp_path):
    """As the README starts it: torchrun leaves SIGHUP alone, and passes SIGTERM on in time for a checkpoint."""
    process = start_long_run(tmp_path, tiny_teacher, sources, parallel="ddp")
    wait_until(lambda: (tmp_path / "metrics.jsonl").exists() and len(runs.losses(tmp_path)) > 3)
    before = runs.losses(tmp_path)[-1][0]
    process.send_signal(signal.SIGHUP)
    wait_until(lambda: runs.losses(tmp_path)[-1][0] > before + 5)
    process.send_signal(signal.SIGTERM)
    output = ended(process, 60)
    saved = [int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")]
    assert len(saved) == 1 and saved[0] == runs.losses(tmp_path)[-1][0], output[-2000:]


def test_a_users_mistake_is_one_line_from_all_ranks(tiny_teacher, sources, tmp_path):
    flags = runs.flags(tiny_teacher, sources, tmp_path, layers=[99])
    process = torchrun(2, flags)
    output = ended(process, 120)
    assert process.returncode != 0
    assert re.findall(r"^error: .*", output, re.MULTILINE) == ["error: --layers 99: the teacher has layers 0 to 3"]


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_holds_what_the_estimate_counts(group):
    """Its own buckets for all gradients but the head's; a gradient is a view of them only once it is reduced."""
    config = tiny_llama_config(max_position_embeddings=65536)
    args = parse_arguments(["--dtype", "float32", "--layers", "1", "--seq_length", "16", "--device", "cuda:0"])
    args.no_compile = True
    model = StepModel(config, student_config(config), step_settings(args), replicated=True)
    student = meta_student(config, student_config(config), step_settings(args)).to_empty(device="cpu")
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.02)
    step = parallel.replicate(StudentLoss(student, None, kl_weight=0.0, ce_weight=1.0))
    others = [p for p in student.parameters() if p is not student.lm_head.weight]
    tokens = torch.randint(0, 512, (1, 17))
    for last, memories in ((False, len(others)), (True, 1)):
        step.require_backward_grad_sync = last
        valid = torch.ones(1, 16, dtype=torch.bool)
        step(tokens[:, :-1], tokens[:, 1:], valid, None, None, torch.tensor(1.0)).loss.backward()
        assert len({p.grad.untyped_storage().data_ptr() for p in others}) == memories
    assert int(step._get_ddp_logging_data()["bucket_sizes"]) == model.buckets() > 0


def test_auto_shards_where_only_the_buckets_do_not_fit(group):
    config = tiny_llama_config(max_position_embeddings=65536, hidden_size=512, intermediate_size=2048, head_dim=128)
    student = student_config(config)
    args = parse_arguments(["--layers", "1", "--seq_length", "16", "--device", "cuda:0"])
    args.no_compile = True
    whole, replicated = (
        estimate_memory(config, student, step_settings(args), replicated=ddp).needed for ddp in (False, True)
    )
    assert whole < replicated
    ranks = Ranks(world_size=2)  # asks the group, which is this process alone
    for free, settled in ((replicated, "ddp"), ((whole + replicated) / 2, "fsdp")):
        kind, estimate = settle_parallel(config, student, args, "auto", free, ranks)
        assert kind == settled and (estimate.parts["gradient buckets"] > 0) == (kind == "ddp")
    assert settle_parallel(config, student, args, "ddp", 0.0, ranks)[0] == "ddp"
    args.optimizer = "muon"
    with pytest.raises(UserError, match=r"--optimizer muon.*use adamw8bit"):
        settle_parallel(config, student, args, "auto", 1.0, ranks)
    args.optimizer = "adamw8bit"
    assert settle_parallel(config, student, args, "none", 1e12, Ranks())[1].parts["gradient buckets"] == 0


def test_alone_nothing_is_asked_of_anyone():
    ranks = Ranks()
    assert ranks.agree(True, False) == [True, False]
    assert ranks.gather("x") == ["x"] and ranks.first(lambda: 3) == 3 and ranks.device("cuda:1") == "cuda:1"
    assert torch.equal(ranks.sum(torch.ones(2)), torch.ones(2))
