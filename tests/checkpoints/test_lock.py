"""The lock on a run's folder, with real processes."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from checkpoints import lock as run_lock
from checkpoints.lock import RunLock, process_start
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
            assert held == {"pid": os.getpid(), "host": socket.gethostname(), "started": process_start(os.getpid())}
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


def test_another_hosts_lock_is_for_the_user_to_judge(tmp_path):
    held = '{"pid": 12, "host": "elsewhere", "started": "1"}'
    (tmp_path / "run.lock").write_text(held)
    with (
        pytest.raises(UserError, match=r"process 12 on elsewhere; if that run is gone, remove .*run\.lock"),
        RunLock(tmp_path),
    ):
        pass
    assert (tmp_path / "run.lock").read_text() == held


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
