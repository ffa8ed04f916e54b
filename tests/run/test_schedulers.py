"""Signals as schedulers send them, to a launcher and its ranks alike, and the files for users to copy."""

import configparser
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from arguments import parse_arguments
from conftest import ROOT
from helpers import runs
from helpers.launching import ended, ranks_of, start_long_run, wait_until

pytestmark = pytest.mark.slow


def saved_steps(folder):
    return [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")]


def wait_for_steps(folder, count):
    wait_until(lambda: (folder / "metrics.jsonl").exists() and len(runs.losses(folder)) >= count)


@pytest.mark.parametrize("order", ["launcher first", "ranks first"])
def test_sigterm_to_torchrun_and_its_ranks_at_once_is_one_request(order, tiny_teacher, sources, tmp_path):
    """As SLURM and systemd send it: each rank takes its own signal, and the one that torchrun passes on."""
    process = start_long_run(tmp_path, tiny_teacher, sources, parallel="ddp")
    wait_for_steps(tmp_path, 4)
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
    wait_for_steps(tmp_path, 4)
    for pid in ranks_of(process).values():
        os.kill(pid, signal.SIGTERM)
    began = time.monotonic()
    output = ended(process, 60)
    assert time.monotonic() - began > 10
    assert saved_steps(tmp_path) == [runs.losses(tmp_path)[-1][0]], output[-2000:]


# the files on docs/schedulers.md

BLOCKS = dict(re.findall(r"^```(sh|ini)\n(.*?)^```$", (ROOT / "docs" / "schedulers.md").read_text(), re.M | re.S))
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks+=($!)
done
echo "${tasks[@]}" > tasks
highest=0
for task in "${tasks[@]}"; do
    wait "$task"; status=$?
    [ $status -gt $highest ] && highest=$status
done
exit $highest
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >> requeued; fi
"""


def unit():
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read_string(BLOCKS["ini"])
    return parser


def test_the_files_parse_and_their_flags_are_known(tmp_path):
    (tmp_path / "distil.sbatch").write_text(BLOCKS["sh"])
    subprocess.run(["bash", "-n", str(tmp_path / "distil.sbatch")], check=True)
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?(?: +#.*)?$", BLOCKS["sh"], re.M)
    assert len(options) == BLOCKS["sh"].count("#SBATCH") and dict(options)["signal"].startswith("TERM@")
    command = unit()["Service"]["ExecStart"]
    assert "$" not in command and "%" not in command
    for text in (BLOCKS["sh"], command):
        words = shlex.split(re.search(r"train\.py ([^'\n]*)", text)[1])
        assert parse_arguments(words).output_dir == "runs/llamba-8b"
    assert int(unit()["Service"]["TimeoutStopSec"]) > int(re.search(r"--shutdown-timeout=(\d+)", command)[1])


def write_commands(folder, **commands):
    for name, code in commands.items():
        (folder / name).write_text(code)
        (folder / name).chmod(0o755)


def test_the_sbatch_script_saves_is_requeued_and_goes_on(tiny_teacher, sources, tmp_path):
    """With srun and scontrol of a few lines, and the signal as SLURM sends it: to the tasks, not to the script."""
    output = tmp_path / "run"
    flags = runs.flags(tiny_teacher, sources, output, skip_stage2=True, max_steps=100_000, batch_size=1)
    python = f'#!/bin/bash\nexec {sys.executable} "$@" {shlex.join(flags)}\n'
    write_commands(tmp_path, srun=SRUN, scontrol=SCONTROL, python=python, **{"distil.sbatch": BLOCKS["sh"]})
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    slurm = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_NTASKS_PER_NODE": "2", "PATH": f"{tmp_path}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = 0
    for time_limit in (1, 2):
        with (tmp_path / "log").open("w") as log:
            job = subprocess.Popen(
                ["bash", "distil.sbatch"], cwd=tmp_path, env={**os.environ, **slurm}, stdout=log, stderr=log
            )
        wait_for_steps(output, done + 4)
        for pid in (tmp_path / "tasks").read_text().split():
            os.kill(int(pid), signal.SIGTERM)
        text = (tmp_path / "log").read_text()
        assert job.wait(timeout=60) == 0, text[-2000:]
        done = runs.losses(output)[-1][0]
        assert max(saved_steps(output)) == done
        assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n" * time_limit
    assert "resuming" in (tmp_path / "log").read_text()
    assert [step for step, *_ in runs.losses(output)] == list(range(1, done + 1))


def test_the_sbatch_script_is_not_requeued_for_a_mistake(tmp_path):
    python = "#!/bin/bash\nexit 2\n"
    write_commands(tmp_path, srun=SRUN, scontrol=SCONTROL, python=python, **{"distil.sbatch": BLOCKS["sh"]})
    slurm = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    slurm["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    job = subprocess.run(["bash", "distil.sbatch"], cwd=tmp_path, env={**os.environ, **slurm})
    assert job.returncode == 2 and not (tmp_path / "requeued").exists()


def test_the_systemd_unit_saves_on_stop_and_goes_on(tiny_teacher, sources, tmp_path):
    """Its command, stopped as `KillMode=control-group` says: every process at once."""
    flags = runs.flags(tiny_teacher, sources, tmp_path / "run", skip_stage2=True, max_steps=100_000, batch_size=1)
    words = shlex.split(unit()["Service"]["ExecStart"])
    command = [sys.executable, "-m", "torch.distributed.run", *words[1 : words.index("train.py") + 1], *flags]
    command[command.index("--nproc_per_node=8")] = "--nproc_per_node=2"
    done = 0
    for _ in range(2):
        with (tmp_path / "log").open("w") as log:
            service = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log
            )
        wait_for_steps(tmp_path / "run", done + 4)
        for pid in (service.pid, *ranks_of(service).values()):
            os.kill(pid, signal.SIGTERM)
        assert service.wait(timeout=90) != 0
        done = runs.losses(tmp_path / "run")[-1][0]
        assert max(saved_steps(tmp_path / "run")) == done, (tmp_path / "log").read_text()[-2000:]
    assert "resuming" in (tmp_path / "log").read_text()
