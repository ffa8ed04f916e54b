"""A run that is killed, stopped or starved goes on as if nothing had happened, bit for bit (on the CPU)."""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from helpers import runs, warm

pytestmark = pytest.mark.slow

OPTIONS = dict(max_steps=14, save_interval=4, grad_accumulation_steps=2, freeze_mlp=True, second_dataset_tokens=1024)
KILLS = 20


def start(argv: list[str], log: Path) -> warm.Process:
    return warm.start("train.py", argv, log)


def wait_for(log: Path, pattern: str, process: warm.Process, start_at: int = 0, timeout: float = 120) -> None:
    """Until the log, from a position on, shows the pattern or the process ends."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        if re.search(pattern, log.read_text()[start_at:]):
            return
        time.sleep(0.01)
    assert process.poll() is not None, f"{pattern} did not come in {timeout} s:\n{log.read_text()[-2000:]}"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_teacher, sources, run_script):
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run_script("train.py", *runs.flags(tiny_teacher, sources, output, **OPTIONS), fresh=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def test_killed_at_random_moments_it_ends_as_if_never_interrupted(tmp_path, tiny_teacher, sources, uninterrupted):
    """SIGKILL at 20 random moments: in stage 1, between stages, in stage 2, in half an update, while saving."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    argv, log = runs.flags(tiny_teacher, sources, tmp_path / "run", **OPTIONS), tmp_path / "log"
    log.touch()
    kills = finished = 0
    while kills < KILLS:
        process, position = start(argv, log), len(log.read_text())
        wait_for(log, rf"step {rng.randrange(1, 23)},|(, step \d+, .*\n.*){{3}}", process, position)
        time.sleep(rng.random() * 0.5)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "run" / "final").exists():
            finished += compare_and_clear(tmp_path / "run", uninterrupted)
    process = start(argv, log)
    assert process.wait(timeout=200) == 0, log.read_text()[-2000:]
    finished += compare_and_clear(tmp_path / "run", uninterrupted)
    print(f"{kills} kills in {finished} runs")


def test_alignment_stages_killed_at_random_moments(tmp_path, tiny_teacher, sources, run_script):
    """Both alignment stages and what follows, documents kept apart: bit for bit, each with its own schedule."""
    options = {
        **OPTIONS, "matrix_tokens": 768, "matrix_seq_length": 32, "matrix_lr": "2e-3", "hidden_tokens": 1536,
        "hidden_lr": "5e-4", "max_steps": 2, "skip_stage2": True, "document_reset": True,
    }  # fmt: skip
    whole = tmp_path / "whole"
    done = run_script("train.py", *runs.flags(tiny_teacher, sources, whole, **options))
    assert done.returncode == 0, done.stderr[-2000:]
    argv, log = runs.flags(tiny_teacher, sources, tmp_path / "run", **options), tmp_path / "log"
    log.touch()
    for step in (2, 5, 6, 9, 11):
        process, position = start(argv, log), len(log.read_text())
        wait_for(log, rf"step {step},", process, position)
        time.sleep(random.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()[-2000:]
    assert start(argv, log).wait(timeout=200) == 0, log.read_text()[-2000:]
    assert runs.bits(tmp_path / "run" / "final") == runs.bits(whole / "final")
    rows, others = ([row for row in runs.metrics(run) if "train/loss" in row] for run in (tmp_path / "run", whole))
    assert [row["stage"] for row in rows] == ["matrix"] * 6 + ["hidden"] * 6 + ["stage1"] * 2
    for row, other in zip(rows, others, strict=True):
        exact = [name for name in row if name.startswith(("train/", "layers/")) and "second" not in name]
        assert {name: row[name] for name in exact} == {name: other[name] for name in exact}
        layers = {f"layers/{kind}_{i}" for kind in ("relative_error", "mean_decay") for i in (0, 2, 3)}
        assert {name for name in row if name.startswith("layers/")} == (layers if row["stage"] != "stage1" else set())
    for stage, highest in (("matrix", 2e-3), ("hidden", 5e-4)):
        rates = [row["train/lr"] for row in rows if row["stage"] == stage]
        assert max(rates) == pytest.approx(highest) and rates[-1] == pytest.approx(1e-5)
        assert all(row[f"layers/mean_decay_{i}"] < 1 for row in rows if row["stage"] == stage for i in (0, 2, 3))


def compare_and_clear(output: Path, uninterrupted: Path) -> int:
    assert runs.losses(output) == runs.losses(uninterrupted)
    assert runs.bits(output / "final") == runs.bits(uninterrupted / "final")
    shutil.rmtree(output)
    return 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_128_plus_n(tmp_path, tiny_teacher, sources, uninterrupted, number):
    options = {**OPTIONS, "save_interval": 10**6}
    argv, log = runs.flags(tiny_teacher, sources, tmp_path / "run", **options), tmp_path / "log"
    log.touch()
    process = start(argv, log)
    wait_for(log, r"step 5,", process)
    process.send_signal(number)
    assert process.wait(timeout=40) == 128 + number
    assert list((tmp_path / "run").glob("checkpoint-*"))
    assert start(argv, log).wait(timeout=200) == 0
    assert runs.losses(tmp_path / "run") == runs.losses(uninterrupted)
    assert runs.bits(tmp_path / "run" / "final") == runs.bits(uninterrupted / "final")


def test_a_signal_cuts_a_long_evaluation_short(tmp_path, tiny_teacher, sources):
    """The first evaluation has nothing to save behind it, one between two steps has."""
    endless = dict(eval_dataset=sources["train"], eval_tokens=10**9, eval_interval=2, seq_length=16, batch_size=1)
    for first, options in ((True, endless), (False, {**endless, "eval_tokens": 8000})):
        output, log = tmp_path / str(first), tmp_path / f"{first}.log"
        log.touch()
        process = start(runs.flags(tiny_teacher, sources, output, **{**OPTIONS, **options}), log)
        wait_for(log, "trainable" if first else "step 2,", process)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(timeout=30) == 143
        assert time.monotonic() - began < 10
        assert bool(list(output.glob("checkpoint-*"))) != first
        assert ("evaluation at step 2 is left out" in log.read_text()) != first
        assert not (output / "run.lock").exists()


def test_sigusr1_saves_and_goes_on(tmp_path, tiny_teacher, sources):
    options = {**OPTIONS, "save_interval": 10**6, "max_steps": 60, "skip_stage2": True}
    argv, log = runs.flags(tiny_teacher, sources, tmp_path / "run", **options), tmp_path / "log"
    log.touch()
    process = start(argv, log)
    wait_for(log, r"step 3,", process)
    process.send_signal(signal.SIGUSR1)
    end = time.monotonic() + 20
    while not list((tmp_path / "run").glob("checkpoint-*")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    early = [int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")]
    assert early and min(early) < 60
    assert process.wait(timeout=200) == 0


def test_a_second_run_in_the_folder_refuses(tmp_path, tiny_teacher, sources, run_script):
    options = {**OPTIONS, "max_steps": 100_000, "skip_stage2": True}
    argv, log = runs.flags(tiny_teacher, sources, tmp_path / "run", **options), tmp_path / "log"
    log.touch()
    process = start(argv, log)
    wait_for(log, r"step 1,", process)
    second = run_script("train.py", *argv, fresh=True)
    process.kill()
    process.wait()
    assert second.returncode == 2
    assert f"process {process.pid}" in second.stderr and "--output_dir" in second.stderr


def test_changed_flags_are_listed(tmp_path, tiny_teacher, sources, run_script):
    options = {**OPTIONS, "max_steps": 2, "second_dataset_tokens": 128}
    assert run_script("train.py", *runs.flags(tiny_teacher, sources, tmp_path / "run", **options)).returncode == 0
    other = {**options, "max_lr": "2e-3", "seed": 7, "log_interval": 5}
    refused = run_script("train.py", *runs.flags(tiny_teacher, sources, tmp_path / "run", **other))
    assert refused.returncode == 2
    line = next(text for text in refused.stderr.splitlines() if text.startswith("error:"))
    assert "--max_lr" in line and "--seed" in line and "--log_interval" not in line and "--resume_force" in line


def test_non_finite_updates_are_skipped_counted_and_end_the_run(tmp_path, tiny_teacher, sources, run_script):
    """A rate of 1e30 makes the second forward pass overflow: the run stops with the last good state saved."""
    options = dict(max_lr="1e30", min_lr="1", max_steps=30, max_bad_steps=3, skip_stage2=True, warmup_ratio=0)
    done = run_script("train.py", *runs.flags(tiny_teacher, sources, tmp_path / "run", **options), fresh=True)
    assert done.returncode == 4, done.stdout[-1500:] + done.stderr[-1500:]
    assert "non-finite loss or gradient, update skipped; documents: " in done.stdout
    assert "3 optimizer steps in a row" in done.stdout and "--max_lr" in done.stdout
    assert list((tmp_path / "run").glob("checkpoint-*"))
    assert runs.metrics(tmp_path / "run")[-1]["train/bad_steps"] >= 1


@pytest.mark.gpu
def test_on_a_gpu_with_deterministic_kernels_it_resumes_bit_for_bit(tmp_path, tiny_teacher, sources, run_script):
    options = {**OPTIONS, "device": "cuda:0", "dtype": "bfloat16", "deterministic": True, "no_compile": True}
    done = run_script("train.py", *runs.flags(tiny_teacher, sources, tmp_path / "whole", **options))
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    argv, log = runs.flags(tiny_teacher, sources, tmp_path / "run", **options), tmp_path / "log"
    log.touch()
    process = start(argv, log)
    wait_for(log, r"step 6,", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before it was killed"
    assert start(argv, log).wait(timeout=200) == 0, log.read_text()[-2000:]
    assert runs.losses(tmp_path / "run") == runs.losses(tmp_path / "whole")
    assert runs.bits(tmp_path / "run" / "final") == runs.bits(tmp_path / "whole" / "final")
