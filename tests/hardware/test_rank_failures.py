"""One rank that fails in its own work: all ranks agree on it and end, with a checkpoint once training has begun."""

import shutil
import signal

import pytest

from helpers import runs
from helpers.launching import end_ranks, start_ranks, wait_until

pytestmark = pytest.mark.slow

WATCHED = 60.0  # seconds, as the README promises


def fail(place, rank, at, flags, seconds=120, ranks=2):
    """What `end_ranks` says of ranks of which one fails in a place the `at`-th time that it comes there."""
    variables = {"FAIL_IN": place, "FAIL_RANK": str(rank), "FAIL_AT": str(at)}
    return end_ranks(*start_ranks(ranks, flags, script="tests/helpers/train_with_failure.py", **variables), seconds)


def run_flags(tiny_teacher, sources, folder, **changes):
    shared = dict(
        skip_stage2=True, max_steps=30, optimizer="adamw", eval_dataset=sources["heldout"], eval_interval=4,
        eval_tokens=500, diagnostics_interval=4, sample_interval=4, save_interval=1000, batch_size=1,
    )  # fmt: skip
    return runs.flags(tiny_teacher, sources, folder, **{**shared, **changes})


def newest(folder):
    return max((int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")), default=None)


@pytest.mark.parametrize(
    "place, at, rank, way",
    [
        ("held-out text", 3, 1, "fsdp"),  # looked at with the other inputs, and used before the first step
        ("held-out batch", 4, 1, "fsdp"),  # in mid-evaluation, when root and head are whole on every rank
        ("held-out batch on its device", 4, 1, "fsdp"),
        ("training text", 25, 1, "ddp"),
        ("evaluation", 20, 1, "ddp"),
        ("evaluation", 20, 0, "ddp"),
        ("gradient norms", 1, 1, "ddp"),
        ("layer figures", 1, 0, "ddp"),
        ("samples", 1, 0, "ddp"),
        ("saving", 2, 1, "ddp"),
        ("model card", 1, 0, "fsdp"),
    ],
)
def test_all_ranks_end_together_with_a_checkpoint(place, at, rank, way, tiny_teacher, sources, tmp_path):
    """Of the step at which it happened; where saving itself failed, by saving once more."""
    statuses, apart, output = fail(place, rank, at, run_flags(tiny_teacher, sources, tmp_path, parallel=way))
    assert statuses == [4, 4], output[-3000:]
    assert apart < WATCHED
    assert f"stopped, with a checkpoint: rank {rank}: ValueError: made to fail" in output
    assert newest(tmp_path) == runs.losses(tmp_path)[-1][0] > 0


@pytest.mark.parametrize(
    "place, at", [("evaluation", 20), ("held-out batch", 4), ("layer figures", 1), ("samples", 1)]
)
def test_one_process_ends_with_a_checkpoint_as_well(place, at, tiny_teacher, sources, tmp_path):
    statuses, _, output = fail(place, 0, at, run_flags(tiny_teacher, sources, tmp_path), ranks=1)
    assert statuses == [4], output[-3000:]
    assert "stopped, with a checkpoint: ValueError: made to fail" in output
    assert newest(tmp_path) == runs.losses(tmp_path)[-1][0] > 0


@pytest.mark.parametrize("place", ["loading", "building"])
def test_before_the_first_step_all_ranks_end_together(place, tiny_teacher, sources, tmp_path):
    statuses, apart, output = fail(place, 1, 1, run_flags(tiny_teacher, sources, tmp_path))
    assert statuses == [4, 4], output[-3000:]
    assert apart < WATCHED
    assert "stopped, before the first checkpoint: rank 1: ValueError: made to fail" in output
    assert newest(tmp_path) is None and not (tmp_path / "run.lock").exists()


def test_a_resume_that_fails_on_one_rank_leaves_the_checkpoints(tiny_teacher, sources, tmp_path):
    changes = {"eval_dataset": None, "eval_interval": None, "save_interval": 2}
    flags = run_flags(tiny_teacher, sources, tmp_path, **changes, max_steps=3)
    statuses, _, output = end_ranks(*start_ranks(2, flags))
    assert statuses == [0, 0], output[-3000:]
    shutil.rmtree(tmp_path / "final")
    shutil.rmtree(tmp_path / "checkpoint-3")
    before = sorted(path.name for path in tmp_path.iterdir())
    for place in ("resuming", "restoring"):
        statuses, apart, output = fail(place, 1, 1, flags)
        assert statuses == [4, 4], output[-3000:]
        assert apart < WATCHED and "rank 1: ValueError: made to fail" in output
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("place, at, way", [("evaluation", 20, "fsdp"), ("training step", 20, "ddp")])
def test_ranks_that_wait_in_a_collective_end_within_a_minute(place, at, way, tiny_teacher, sources, tmp_path):
    """They never come to agree; the checkpoint is the last one that was due."""
    flags = run_flags(tiny_teacher, sources, tmp_path, parallel=way, save_interval=5)
    statuses, apart, output = fail(place, 1, at, flags)
    assert statuses[0] == 4, output[-3000:]
    assert apart < WATCHED and all(statuses)
    assert "rank 1: ValueError: made to fail" in output
    assert newest(tmp_path) > 0


def test_a_rank_that_is_killed_ends_the_other_with_status_5(tiny_teacher, sources, tmp_path):
    """Real processes of their own, without a launcher that would end the other itself."""
    flags = run_flags(tiny_teacher, sources, tmp_path, max_steps=100_000, save_interval=5)
    processes, log = start_ranks(2, flags, fresh=True)
    wait_until(lambda: list(tmp_path.glob("checkpoint-*/manifest.json")) or processes[0].poll() is not None)
    processes[1].kill()
    statuses, apart, output = end_ranks(processes, log)
    assert statuses == [5, -signal.SIGKILL], output[-3000:]
    assert apart < WATCHED and "another rank is gone; the last checkpoint is checkpoint-" in output
