"""Signals and the save clock, with real processes where there are any."""

import os
import signal
import time

import pytest

from helpers.scripts import Script
from run import signals as run_control
from run.signals import SaveClock, StopSignals, is_second_request

LOOP = """
from run.signals import StopSignals
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


@pytest.mark.parametrize("number, later", [(signal.SIGTERM, 2.1), (signal.SIGINT, 0.0)])
def test_a_second_signal_exits_at_once(number, later):
    script = Script(LOOP.format(saving=60))
    script.line()
    script.send(number)
    assert script.line() == "saving"
    time.sleep(later)
    began = time.monotonic()
    script.send(number)
    assert script.end()[0] == 128 + number
    assert time.monotonic() - began < 5


def test_before_there_is_anything_to_save_the_first_signal_exits_and_unwinds():
    script = Script(
        """
from run.signals import StopSignals
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
from run.signals import StopSignals
with StopSignals():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the main thread never gets to its handlers
    def take():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        time.sleep(60)
    threading.Thread(target=take).start()
    print("ready")
    ctypes.CDLL(None).sleep(60)
"""
    )
    script.line()
    script.send(signal.SIGINT)
    time.sleep(0.3)
    assert script.process.poll() is None
    script.send(signal.SIGINT)
    assert script.end()[0] == 128 + signal.SIGINT


TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.mark.parametrize(
    "first, number, seconds, launched, second",
    [
        (INT, INT, 0.1, False, True),  # an impatient user
        (TERM, TERM, 0.1, False, False),  # SLURM, to srun and to the task
        (TERM, TERM, 2.5, False, True),
        (INT, TERM, 0.1, False, False),
        (INT, TERM, 2.5, False, True),
        (TERM, TERM, 1.9, True, False),  # torchrun passes on what its ranks have had, too
        (TERM, TERM, 300.0, True, False),  # at the time limit, still saving
        (INT, TERM, 9.0, True, False),  # another rank has left
        (INT, INT, 0.1, True, False),  # the terminal's, and torchrun's
        (INT, INT, 2.5, True, True),
        (HUP, HUP, 9.0, True, False),
    ],
)
def test_which_signals_are_a_second_request(first, number, seconds, launched, second):
    assert is_second_request(first, number, seconds, launched=launched) is second


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
from run.signals import StopSignals
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
