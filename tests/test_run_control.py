"""Signals, the lock on a run's folder, the save clock and masked secrets, with real processes where there are any."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run_control
from arguments import UserError
from conftest import ROOT
from run_control import MaskingFilter, RunLock, SaveClock, StopSignals, mask_secrets, process_start


class Script:
    """A Python process that imports run_control, prints lines and takes signals."""

    def __init__(self, code: str, *, prefix: tuple[str, ...] = (), ignore: tuple[int, ...] = ()):
        def in_child():
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN if number in ignore else signal.SIG_DFL)

        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-u", "-c", f"import time, os, signal, threading\n{code}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=in_child,
        )

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=20)
        return self.process.returncode, output.strip()


LOOP = """
from run_control import StopSignals
with StopSignals() as signals:
    print("ready")
    while not signals.stop_requested:
        if signals.take_save_request():
            print("saved")
        time.sleep(0.01)
    print("saving")
    time.sleep({saving})
raise SystemExit(signals.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_for_a_save_and_exit_with_128_and_its_number(number):
    script = Script(LOOP.format(saving=0))
    assert script.line() == "ready"
    script.send(number)
    assert script.end() == (128 + number, "saving")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_exits_at_once(number):
    script = Script(LOOP.format(saving=60))
    script.line()
    script.send(number)
    assert script.line() == "saving"
    began = time.monotonic()
    script.send(number)
    assert script.end()[0] == 128 + number
    assert time.monotonic() - began < 5


def test_before_there_is_anything_to_save_the_first_signal_exits_and_unwinds():
    script = Script(
        """
from run_control import StopSignals
with StopSignals() as signals:
    signals.leave_at_once = True
    try:
        print("ready")
        time.sleep(60)
    finally:
        print("unwound")
"""
    )
    assert script.line() == "ready"
    script.send(signal.SIGTERM)
    assert script.end() == (143, "unwound")


def test_a_second_signal_exits_although_the_main_thread_hangs_in_c():
    script = Script(
        """
import ctypes
from run_control import StopSignals
with StopSignals():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # the main thread never gets to its handlers
    def take():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        time.sleep(60)
    threading.Thread(target=take).start()
    print("ready")
    ctypes.CDLL(None).sleep(60)
"""
    )
    script.line()
    script.send(signal.SIGTERM)
    time.sleep(0.3)
    assert script.process.poll() is None
    script.send(signal.SIGTERM)
    assert script.end()[0] == 128 + signal.SIGTERM


def test_a_launcher_that_passes_ctrl_c_on_as_sigterm_does_not_cut_the_save_off():
    script = Script(LOOP.format(saving=0.5))
    script.line()
    script.send(signal.SIGINT)
    script.line()
    script.send(signal.SIGTERM)
    assert script.end()[0] == 128 + signal.SIGINT


def test_sigusr1_asks_for_one_save_each():
    script = Script(LOOP.format(saving=0))
    script.line()
    for _ in range(2):
        script.send(signal.SIGUSR1)
        assert script.line() == "saved"
    script.send(signal.SIGTERM)
    assert script.end() == (143, "saving")


def test_under_nohup_a_hangup_is_ignored():
    script = Script(LOOP.format(saving=0), prefix=("nohup",))
    assert script.line() == "ready"
    script.send(signal.SIGHUP)
    script.send(signal.SIGUSR1)
    assert script.line() == "saved"
    script.send(signal.SIGTERM)
    assert script.end()[0] == 143


def test_a_forked_worker_dies_of_sigterm_and_its_signals_are_not_taken_for_the_runs():
    script = Script(
        """
import multiprocessing
from run_control import StopSignals
with StopSignals() as signals:
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    time.sleep(0.3)  # a signal in the middle of the fork itself is lost, in any Python program
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(10)
    print(worker.exitcode, signals.stop_requested)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    print(signals.stop_requested)
"""
    )
    assert script.end() == (0, "-15 False\nTrue")


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.stop_requested
        assert signals.exit_code == 143
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


# the lock

HOLD = """
import sys
from pathlib import Path
from run_control import RunLock
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
from run_control import RunLock
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
    monkeypatch.setattr(run_control.fcntl, "lockf", unsupported)  # as on a file system without locks
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
from arguments import UserError
from run_control import RunLock
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


# the clock


def test_the_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_control.time, "monotonic", lambda: now[0])
    clock, off = SaveClock(0.5), SaveClock(0)
    for moment, due in ((129.9, False), (130.0, True), (500.0, True)):
        now[0] = moment
        assert clock.due() is due
        assert not off.due()
    clock.restart()
    assert not clock.due()


# secrets

HUB_TOKEN = "hf_" + "aB3" * 11
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    "text",
    [
        HUB_TOKEN,
        WANDB_KEY,
        "wandb_v1_" + "xY1" * 12,
        "sk-" + "a1B2" * 6,
        "ghp_" + "a1B2" * 9,
        "https://user:pa55word@host/data",
        "https://:pa55word@host",
        "https://host/?token=abcdefgh&x=1",
        "Authorization: Bearer abc.def.ghi",
        "HF_TOKEN=abcdefgh123",
        'api_key: "abcdefgh"',
    ],
)
def test_what_looks_like_a_secret_is_masked(text):
    for masked in (mask_secrets(f"before {text} after"), mask_secrets({"notes": [f"before {text}"]})["notes"][0]):
        assert "***" in masked
        assert masked.startswith("before ")
        for secret in ("aB3aB3", "0123456789abcdef", "xY1xY1", "a1B2a1B2", "pa55word", "abcdefgh", "abc.def"):
            assert secret not in masked


def test_names_decide_too():
    flags = {
        "hub_token": "short",
        "API-KEY": "x",
        "password": "",
        "nested": {"client_secret": ["a", "b"]},
        "second_dataset_tokens": 200_000_000,
        "matrix_tokens": 0,
        "tokenizer": "some/name",
        "wandb_project": "llamba-distill",
        "dataset_revision": WANDB_KEY,
        "layers": [10, 14],
        "max_lr": 1e-5,
        "output_dir": Path("a/b"),
        "none": None,
    }
    assert mask_secrets(flags) == {
        **flags,
        "hub_token": "***",
        "API-KEY": "***",
        "nested": {"client_secret": ["***", "***"]},
        "output_dir": "a/b",
    }
    assert flags["hub_token"] == "short"  # a copy


def test_ordinary_text_stays():
    line = "stage1 step 12: loss 1.25, 4096 tokens, key frame 3, https://host:8080/x, token count: 5"
    assert mask_secrets(line) == line


def test_secrets_of_the_environment_are_masked_wherever_they_appear(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "plain-looking")
    assert mask_secrets("error at plain-looking/x") == "error at ***/x"


def test_log_lines_and_tracebacks_are_masked(capsys):
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(MaskingFilter())
    logger = logging.getLogger("masking")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        raise ValueError(f"bad token {HUB_TOKEN}")
    except ValueError:
        logger.exception("failed with %s", HUB_TOKEN)
    logger.warning("100%% of %s", HUB_TOKEN)
    logged = capsys.readouterr().err
    assert HUB_TOKEN not in logged
    assert "failed with ***" in logged
    assert "ValueError: bad token ***" in logged
    assert "100% of ***" in logged
    record = logging.LogRecord("masking", logging.WARNING, __file__, 1, "two %s of %d", ("a",), None)
    assert MaskingFilter().filter(record)  # a line with a mistake in it is logging's to report, not the run's end
