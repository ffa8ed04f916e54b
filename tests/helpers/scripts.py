"""A Python process that a test talks to: it prints lines and takes signals."""

import os
import signal
import subprocess
import sys

from conftest import ROOT


class Script:
    """A Python process that runs `code`, prints lines and takes signals."""

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
