"""Environment and tracking: devices, bars beside log lines, stage marks on resume, a W&B that fails."""

import contextlib
import fcntl
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
import torch

from conftest import ROOT
from hardware.devices import check_device
from helpers import runs, warm
from run.metrics_file import read_metrics
from run.terminal import SignOfLife
from run.tracking import Tracker
from utils import UserError, library_versions, wait_passively


def test_devices():
    assert check_device("cpu") == torch.device("cpu")
    absent = f"cuda:{torch.cuda.device_count() + 1}"
    with pytest.raises(UserError, match=f"--device {absent}: this machine has no such CUDA device"):
        check_device(absent)


def test_versions_name_what_a_result_depends_on():
    versions = library_versions()
    assert versions["torch"] == torch.__version__ and versions["python"].startswith("3.")


def test_a_stage_is_marked_once_when_a_run_resumes_at_its_start(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.mark_stage("stage1", 0)
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.mark_stage("stage2", 1)
    whole = read_metrics(tmp_path)
    tracker.log({"train/loss": 0.9}, step=2)
    resumed = Tracker(tmp_path)
    resumed.truncate_after(1)
    resumed.mark_stage("stage2", 1)
    assert read_metrics(tmp_path) == whole
    resumed.truncate_after(0)
    resumed.mark_stage("stage2", 1)
    assert [row["stage_begins"] for row in read_metrics(tmp_path)] == ["stage1", "stage2"]


def test_torn_bytes_do_not_stop_a_resume(tmp_path):
    tracker = Tracker(tmp_path)
    tracker.log({"train/loss": 1.0}, step=1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, \xff\xfe\x00')
    tracker.truncate_after(5)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1]


def test_a_full_disk_is_told_once_until_it_is_over(tmp_path, caplog):
    tracker = Tracker(tmp_path)
    path, tracker.path = tracker.path, tmp_path / "none" / "metrics.jsonl"
    for step in (1, 2, 3):
        tracker.log({"train/loss": 1.0}, step=step)
    assert len(caplog.records) == 1
    tracker.path = path
    tracker.log({"train/loss": 1.0}, step=4)
    assert [row["step"] for row in read_metrics(tmp_path)] == [4] and tracker.writable


def test_wandb_that_does_not_start_or_breaks_is_one_warning(tmp_path, caplog, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def fail(*_, **__):
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = Tracker(tmp_path)
    tracker.wandb_id = "kept"
    tracker.start_wandb({}, project="p", mode="offline")
    assert "W&B did not start" in caplog.text and tracker.wandb_id == "kept"
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.wandb = type("Run", (), {"log": fail})()
    tracker.log({"train/loss": 1.0}, step=2)
    tracker.log({"train/loss": 1.0}, step=3)
    assert len(caplog.records) == 2 and len(read_metrics(tmp_path)) == 3


def test_other_ranks_write_nothing(tmp_path):
    tracker = Tracker(tmp_path / "run", main_process=False)
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.mark_stage("stage1", 1)
    tracker.close()
    assert not (tmp_path / "run").exists()


SCRIPT = """
import sys, logging
sys.path.insert(0, {root!r})
from loop.forms import Progress
from run.terminal import StageBar
from utils import setup_logging
setup_logging({log!r})
bar = StageBar()
bar.begin("stage1", 4, 9)
for step in (5, 6, 7):
    logging.info("line %d", step)
    bar.step(Progress(stage="stage1", stage_step=step, stage_total=9))
    bar.show({{"train/loss": 2.0, "train/kl": 0.5, "train/tokens_per_second": 9635, "perf/run_eta_seconds": 7325}})
bar.close()
"""


@contextlib.contextmanager
def terminal():
    """(a terminal's end for a process, a function that returns all that it has shown once it has ended)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))  # a bar needs columns
    shown = []

    def keep() -> None:
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while piece := os.read(ours, 65536):
                shown.append(piece)

    reader = threading.Thread(target=keep)
    reader.start()

    def read(process) -> str:
        process.wait(60)
        os.close(theirs)
        reader.join()
        return b"".join(shown).decode()

    yield theirs, read
    os.close(ours)


def lines_of(output: str) -> list[str]:
    return [line.split("\r")[-1] for line in output.replace("\r\n", "\n").split("\n")]


def test_a_terminal_shows_whole_lines_beside_the_bar_and_a_log_shows_no_bar(tmp_path):
    command = [sys.executable, "-c", SCRIPT.format(root=str(ROOT), log=str(tmp_path / "log"))]
    plain = subprocess.run(command, capture_output=True, text=True, check=True)
    assert plain.stderr == "" and [line[-6:] for line in plain.stdout.splitlines()] == ["line 5", "line 6", "line 7"]
    with terminal() as (theirs, read):
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
        text = read(process)
    assert process.wait() == 0
    assert "stage1  44%" in text and "4/9" in text  # before the first step
    assert "7/9" in text and "loss 2, KL 0.5, 9,635 tokens/s, 2:02:05 left" in text
    shown = [line for line in lines_of(text) if "line " in line]
    assert len(shown) == 3 and all("stage1" not in line for line in shown), shown
    kept = (tmp_path / "log").read_text()  # appended to: three lines of each run
    assert kept.count("\n") == 6 and "stage1" not in kept


def test_a_run_on_a_terminal_and_under_nohup(tmp_path, tiny_teacher, sources):
    """A bar a stage and one for held-out text, with the time that is left; lines alone without a terminal."""
    flags = dict(eval_dataset=sources["heldout"], eval_interval=4, eval_tokens=256, layers="auto:1")
    argv = runs.flags(tiny_teacher, sources, tmp_path / "run", choice_tokens=128, **flags)
    with terminal() as (theirs, read):
        name = os.ttyname(theirs)
        process = warm.start("train.py", argv, name, environment={"COLUMNS": "140"})
        text = read(process)
    assert process.wait() == 0, text[-2000:]
    for stage, steps in (("stage1", 8), ("stage2", 4)):
        bars = [line for line in re.split("[\r\n]", text) if re.match(rf"{stage} +\d+%\|", line)]
        assert f"0/{steps}" in bars[0] and f"{steps}/{steps}" in bars[-1] and "left" in bars[-1], "\n".join(bars)
        assert "loss" in bars[-1] and "tokens/s" in bars[-1]
    assert "held-out text: " in text and "layer choice: " in text
    argv = runs.flags(tiny_teacher, sources, tmp_path / "again", choice_tokens=128, **flags)
    warm.start("train.py", argv, tmp_path / "log").wait(60)
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines), lines
    assert lines[0].endswith("loading libraries ...") and lines[-1].endswith("/final")
    assert any("loading the teacher" in line for line in lines) and any("whole run" in line for line in lines)


def test_a_silent_log_says_what_is_being_done(caplog):
    with caplog.at_level("INFO"), SignOfLife(0.2) as alive:
        logging.getLogger("x").info("loading the teacher ...")
        time.sleep(0.7)
        logging.getLogger("x").info("loaded")
        alive.where = lambda: "stage1: step 3 of 9"
        time.sleep(0.5)
    told = [record.getMessage() for record in caplog.records if record.name == "run.terminal"]
    assert told[0].startswith("still loading the teacher, 0:0") and told[-1].startswith("stage1: step 3 of 9")
    assert 3 <= len(told) <= 6
    count = len(caplog.records)
    time.sleep(0.4)
    assert len(caplog.records) == count


def test_a_secret_in_a_log_line_is_masked(tmp_path, capsys):
    from utils import setup_logging

    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        setup_logging(str(tmp_path / "log"))
        logging.getLogger("x").info("key %s", "hf_" + "a" * 30)
    finally:
        for handler in set(root.handlers) - set(before):
            handler.close()
        root.handlers[:] = before
        root.setLevel(level)
    assert "a" * 30 not in (tmp_path / "log").read_text() + capsys.readouterr().out


@pytest.mark.parametrize("own, spins", [({}, "0"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000")])
def test_threads_on_a_cpu_sleep_while_they_wait_unless_told_otherwise(own, spins, tmp_path, run_script, monkeypatch):
    """As the library of threads says when torch loads it; the run ends at a teacher without config."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)  # a run in this process may have set it
    flags = ["--device", "cpu", "--teacher_model", tmp_path, "--output_dir", tmp_path / "run"]
    done = run_script("train.py", *flags, env={"OMP_DISPLAY_ENV": "VERBOSE", **own})
    assert done.returncode == 2
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)[:1] == [spins]


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT"])
def test_how_threads_wait_is_the_users(name, monkeypatch):
    for other in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(other, raising=False)
    with monkeypatch.context() as patch:
        patch.setenv(name, "1")
        wait_passively("cpu")
        assert os.environ.get("OMP_WAIT_POLICY") == ("1" if name == "OMP_WAIT_POLICY" else None)
    wait_passively("cuda:0")
    assert "OMP_WAIT_POLICY" not in os.environ
