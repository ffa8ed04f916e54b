"""Real runs on several ranks: by torchrun, or started one by one, so that each exit status is the rank's own."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time

from conftest import ROOT
from helpers import runs, warm


def launch(ranks, flags):
    """A finished train.py on `ranks` warm ranks, or by itself (0): all that it wrote. Every status has to be 0."""
    statuses, _, output = end_ranks(*start_ranks(max(ranks, 1), flags), 300)
    assert not any(statuses), output[-3000:]
    return output


def torchrun(ranks, flags, script="train.py", shutdown_timeout=30):
    """The process of a script under torchrun on `ranks` processes (0: without torchrun), started as by nohup."""
    command = [sys.executable, str(ROOT / script)]
    if ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += ["--signals-to-handle=SIGTERM,SIGINT", f"--shutdown-timeout={shutdown_timeout}"]
        command += [str(ROOT / script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = None if ranks == 0 else lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  a pipe that nobody reads would stop the run when it is full
    process = subprocess.Popen(
        [*command, *flags], text=True, env=environment, stdout=log, stderr=subprocess.STDOUT, preexec_fn=quiet
    )
    process.log = log
    return process


def ended(process, seconds=60):
    """All that a process wrote, once it has ended by itself."""
    process.wait(timeout=seconds)
    process.log.seek(0)
    return process.log.read()


def ranks_of(process):
    """pid of each rank under a torchrun process."""
    found = {}
    for child in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split():
        with open(f"/proc/{child}/environ", "rb") as file:
            rank = re.search(rb"(?:^|\0)RANK=(\d+)", file.read())
        if rank:
            found[int(rank[1])] = int(child)
    return found


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def start_long_run(folder, tiny_teacher, sources, script="train.py", shutdown_timeout=30, **changes):
    flags = runs.flags(tiny_teacher, sources, folder, skip_stage2=True, max_steps=100_000, **changes)
    return torchrun(2, flags, script=script, shutdown_timeout=shutdown_timeout)


def start_ranks(count, flags, script="train.py", fresh=False, **variables):
    """A script on `count` ranks without a launcher, whose exit statuses are the ranks' own: their processes.

    They are warm, unless `fresh`.
    """
    log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115  it lives as long as the processes
    processes = []
    for ours in warm.environments(count):
        ours |= {"OMP_NUM_THREADS": "1", **variables}
        if fresh:
            command, ours = [sys.executable, str(ROOT / script), *flags], {**os.environ, **ours}
            processes.append(subprocess.Popen(command, env=ours, stdout=log, stderr=subprocess.STDOUT))
        else:
            processes.append(warm.start(script, flags, log.name, environment=ours))
    return processes, log


def end_ranks(processes, log, seconds=120):
    """(exit status of each rank, seconds between the first end and the last, everything that was written)."""
    first = None
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes):
        if first is None and any(process.poll() is not None for process in processes):
            first = time.monotonic()
        if time.monotonic() > end:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    log.seek(0)
    return [process.wait() for process in processes], time.monotonic() - (first or time.monotonic()), log.read()
