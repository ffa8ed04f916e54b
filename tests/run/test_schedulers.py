"""Signals as schedulers send them, to a launcher and its ranks alike, and the files for users to copy."""

import os
import signal
import time

import pytest

from helpers import runs
from helpers.launching import ended, ranks_of, start_long_run, wait_until

pytestmark = pytest.mark.slow


def saved_steps(folder):
    return [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")]


@pytest.mark.parametrize("order", ["launcher first", "ranks first"])
def test_sigterm_to_torchrun_and_its_ranks_at_once_is_one_request(order, tiny_teacher, sources, tmp_path):
    """As SLURM and systemd send it: each rank takes its own signal, and the one that torchrun passes on."""
    process = start_long_run(tmp_path, tiny_teacher, sources, parallel="ddp")
    wait_until(lambda: (tmp_path / "metrics.jsonl").exists() and len(runs.losses(tmp_path)) > 3)
    everyone = [process.pid, *ranks_of(process).values()]
    for pid in everyone if order == "launcher first" else reversed(everyone):
        os.kill(pid, signal.SIGTERM)
    output = ended(process, 60)
    assert saved_steps(tmp_path) == [runs.losses(tmp_path)[-1][0]], output[-2000:]


def test_no_rank_leaves_before_the_checkpoint_is_written(tiny_teacher, sources, tmp_path):
    """torchrun ends the others once one has left, 5 s later by SIGKILL here; a checkpoint takes 12."""
    process = start_long_run(
        tmp_path, tiny_teacher, sources, script="tests/helpers/train_slow_disk.py", shutdown_timeout=5, parallel="ddp"
    )
    wait_until(lambda: (tmp_path / "metrics.jsonl").exists() and len(runs.losses(tmp_path)) > 3)
    for pid in ranks_of(process).values():
        os.kill(pid, signal.SIGTERM)
    began = time.monotonic()
    output = ended(process, 60)
    assert time.monotonic() - began > 10
    assert saved_steps(tmp_path) == [runs.losses(tmp_path)[-1][0]], output[-2000:]
