"""The lock on a run's folder, with real processes."""

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from checkpoints import lock as run_lock
from checkpoints.lock import LockTaken, RunLock, process_start
from helpers import runs, warm
from helpers.launching import wait_until
from helpers.scripts import Script
from utils import UserError

HOLD = """
import sys
from pathlib import Path
from checkpoints.lock import RunLock
with RunLock(Path({folder!r})):
    print("locked")
    time.sleep({hold})
"""


def hold(folder: Path, seconds: float = 60) -> Script:
    script = Script(HOLD.format(folder=str(folder), hold=seconds))
    assert script.line() == "locked"
    return script


def test_the_second_run_refuses_and_names_the_first(tmp_path):
    script = hold(tmp_path)
    with pytest.raises(UserError) as refusal, RunLock(tmp_path):
        pass
    assert str(refusal.value) == (
        f"--output_dir {tmp_path} is in use by process {script.process.pid} on {socket.gethostname()}"
    )
    script.process.kill()
    script.process.wait()


def test_the_lock_of_a_killed_process_is_taken_over_with_a_line(tmp_path):
    script = hold(tmp_path)
    script.process.kill()
    script.process.wait()
    lines: list[str] = []
    with RunLock(tmp_path, log=lines.append):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert lines == [f"{tmp_path}/run.lock: the lock of process {script.process.pid}, which is gone, is taken over"]
    assert list(tmp_path.iterdir()) == []


def test_the_lock_goes_with_the_run_and_the_folder_is_made(tmp_path):
    folder = tmp_path / "new" / "run"
    for _ in range(2):
        with RunLock(folder, log=pytest.fail):
            held = json.loads((folder / "run.lock").read_text())
            started = process_start(os.getpid())
            assert held | {"pid": os.getpid(), "host": socket.gethostname(), "started": started} == held
            with pytest.raises(UserError, match=f"process {os.getpid()} "), RunLock(folder):
                pass
        assert list(folder.iterdir()) == []


def test_a_fork_does_not_keep_the_lock(tmp_path):
    script = Script(
        f"""
from pathlib import Path
from checkpoints.lock import RunLock
RunLock(Path({str(tmp_path)!r})).__enter__()
child = os.fork()
if child == 0:
    time.sleep(60)
print(child)
time.sleep(60)
"""
    )
    child = int(script.line())
    script.process.kill()
    script.process.wait()
    with RunLock(tmp_path, log=lambda line: None):
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("held", ["", "{}", "not json", '{"pid": "x", "host": "h", "started": 1}'])
def test_a_lock_file_that_says_nothing_is_no_obstacle(tmp_path, held):
    (tmp_path / "run.lock").write_text(held)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_without_kernel_locks_pid_and_start_time_decide(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(38, "Function not implemented")

    sleeper = subprocess.Popen(["sleep", "60"])
    holder = {"pid": sleeper.pid, "host": socket.gethostname(), "started": process_start(sleeper.pid)}
    monkeypatch.setattr(run_lock.fcntl, "lockf", unsupported)  # as on a file system without locks
    (tmp_path / "run.lock").write_text(json.dumps(holder))
    with pytest.raises(UserError, match=f"process {sleeper.pid} "), RunLock(tmp_path):
        pass
    (tmp_path / "run.lock").write_text(json.dumps({**holder, "started": "boot/1"}))  # the pid was given again
    with RunLock(tmp_path, log=lambda line: None):
        pass
    (tmp_path / "run.lock").write_text(json.dumps(holder))
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(sleeper.pid) is None  # a zombie counts as dead
    with RunLock(tmp_path, log=lambda line: None):
        pass
    sleeper.wait()


def test_of_many_that_start_at_once_one_gets_the_lock(tmp_path):
    code = f"""
from pathlib import Path
from utils import UserError
from checkpoints.lock import RunLock
at = {time.time() + 2.5}
time.sleep(max(0, at - time.time()))
try:
    with RunLock(Path({str(tmp_path)!r})):
        print("locked")
        time.sleep(4)
except UserError:
    print("refused")
"""
    outcomes = [script.end()[1] for script in [Script(code) for _ in range(6)]]
    assert sorted(outcomes) == ["locked"] + ["refused"] * 5


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot lock it"), RunLock(tmp_path / "file" / "run"):
        pass


# another host's lock

ELSEWHERE = """
import socket
from pathlib import Path
socket.gethostname = lambda: "elsewhere"
from checkpoints.lock import RunLock
with RunLock(Path({folder!r}), beat=0.2) as lock:
    print("locked")
    while lock.held():
        time.sleep(0.1)
    print("taken")
"""
WATCH = 3.0


def hold_elsewhere(folder: Path) -> Script:
    script = Script(ELSEWHERE.format(folder=str(folder)))
    assert script.line() == "locked"
    return script


def test_another_hosts_lock_that_beats_is_left_alone(tmp_path):
    script = hold_elsewhere(tmp_path)
    lines: list[str] = []
    with (
        pytest.raises(UserError, match=f"is in use by process {script.process.pid} on elsewhere"),
        RunLock(tmp_path, log=lines.append, watch=WATCH),
    ):
        pass
    assert "watching for 3 s" in lines[0] and len(lines) == 1
    script.send(signal.SIGKILL)
    script.process.wait()


def test_another_hosts_lock_without_a_beat_is_taken_over(tmp_path):
    script = hold_elsewhere(tmp_path)
    script.process.kill()
    script.process.wait()
    lines: list[str] = []
    began = time.monotonic()
    with RunLock(tmp_path, log=lines.append, watch=WATCH):
        assert time.monotonic() - began > WATCH
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
        assert lines[1] == (
            f"{tmp_path}/run.lock: the lock of process {script.process.pid} on elsewhere, which gave no sign of life "
            "for 3 s, is taken over"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_a_version_without_beats_is_watched_too(tmp_path):
    (tmp_path / "run.lock").write_text('{"pid": 12, "host": "elsewhere", "started": "1"}')
    with RunLock(tmp_path, log=lambda line: None, watch=0.5) as lock:
        assert lock.held()


def test_a_holder_that_was_suspended_finds_its_lock_taken(tmp_path):
    """It neither writes a beat into the other's file nor removes it at its end."""
    script = hold_elsewhere(tmp_path)
    script.send(signal.SIGSTOP)
    with RunLock(tmp_path, log=lambda line: None, watch=WATCH, beat=0.2) as lock:
        script.send(signal.SIGCONT)
        assert script.end() == (0, "taken")
        time.sleep(0.5)
        assert lock.held() and json.loads((tmp_path / "run.lock").read_text())["run"] == lock.run


def test_a_suspended_holder_notices_a_takeover_that_has_ended(tmp_path):
    script = hold_elsewhere(tmp_path)
    script.send(signal.SIGSTOP)
    with RunLock(tmp_path, log=lambda line: None, watch=WATCH, beat=0.2):
        pass
    assert not (tmp_path / "run.lock").exists()
    script.send(signal.SIGCONT)
    assert script.end() == (0, "taken")
    assert not (tmp_path / "run.lock").exists()


def test_a_lock_file_whose_mount_is_gone_is_nobody_elses(tmp_path):
    with RunLock(tmp_path / "run", beat=0.05) as lock:
        (tmp_path / "run").rename(tmp_path / "away")
        time.sleep(0.2)
        assert lock.held()
        (tmp_path / "away").rename(tmp_path / "run")
        assert lock.held()
        lock.check()
        (tmp_path / "run" / "run.lock").write_text('{"pid": 3, "host": "elsewhere", "started": null, "run": "other"}')
        with pytest.raises(LockTaken, match="taken over by process 3 on elsewhere; this run writes nothing more"):
            for _ in range(200):  # a beat may be late
                time.sleep(0.05)
                lock.check()


@pytest.mark.slow
def test_of_many_that_watch_one_takes_the_lock(tmp_path):
    (tmp_path / "run.lock").write_text('{"pid": 12, "host": "elsewhere", "started": "1"}')
    code = f"""
import socket, sys
from pathlib import Path
from utils import UserError
from checkpoints.lock import RunLock
socket.gethostname = lambda: f"host-{{os.getpid()}}"
at = {time.time() + 4}
time.sleep(max(0, at - time.time()))
try:
    with RunLock(Path({str(tmp_path)!r}), watch=2.0, beat=0.2):
        print("locked")
        time.sleep(6)
except UserError:
    print("refused")
"""
    outcomes = [script.end()[1] for script in [Script(code) for _ in range(4)]]
    assert sorted(outcomes) == ["locked"] + ["refused"] * 3


def test_a_holder_that_has_looked_at_its_lock_still_has_it(tmp_path):
    """Opening and closing a file gives up all POSIX locks of the process on it."""
    with RunLock(tmp_path) as lock:
        assert lock.held()
        script = Script(HOLD.format(folder=str(tmp_path), hold=0))
        assert script.line() == "" and script.end()[0] == 1
        assert lock.held()
        (tmp_path / "run.lock").write_text("")  # no pid that would tell
        assert lock.held()
        script = Script(HOLD.format(folder=str(tmp_path), hold=0))
        assert script.line() == "" and script.end()[0] == 1


@pytest.mark.slow
def test_a_run_whose_folder_was_taken_stops_without_writing(tiny_teacher, sources, tmp_path):
    flags = runs.flags(tiny_teacher, sources, tmp_path, skip_stage2=True, max_steps=100_000, save_interval=20)
    log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115  it lives as long as the process
    run = warm.start("tests/helpers/train_elsewhere.py", flags, log.name)
    wait_until(lambda: list(tmp_path.glob("checkpoint-*/manifest.json")) or run.poll() is not None)
    os.kill(run.pid, signal.SIGSTOP)
    with RunLock(tmp_path, log=lambda line: None, watch=WATCH):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "run.lock"}
        os.kill(run.pid, signal.SIGCONT)
        assert run.wait(timeout=60) == 4
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "run.lock"}
    log.seek(0)
    assert "taken over by process" in log.read()
    assert {path: moment for path, moment in after.items() if "/.tmp-" not in str(path)} == {
        path: moment for path, moment in before.items() if "/.tmp-" not in str(path)
    }
