"""The project's pages as a reader meets them: their blocks of commands, and a place where these run as they stand.

    with Desk(folder, hub) as desk:
        for block in blocks("docs/running.md"):
            status, output = desk.run(block.code, block.language)

A desk is a folder that looks like the repository, one shell for all blocks of a page, as in one terminal, and
commands on PATH that make small what is large: `torchrun` and `nohup` are real, `python SCRIPT` is a warm process
(`warm_python.py`), scripts get further flags (`SMALL`), and a GPU's name becomes the CPU's. Models and text come from
a loopback Hub under their own names.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import ROOT
from helpers import warm

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")), "benchmarks/README.md"]
SMALL = {
    "train.py": "--device cpu --max_steps ${STEPS:-2} --seq_length 64 --choice_tokens 128 --eval_tokens 256 "
    "--second_dataset_tokens 128 --second_dataset_epochs 1 --shuffle_buffer 16 --batch_size 1 --network_patience 5",
    "evaluate.py": "--device cpu --tokens 256 --seq_length 64 --recall_pairs --recall_lengths --speed_tokens 2 "
    "--network_patience 5",
    "generate.py": "--device cpu --max_new_tokens 4 --network_patience 5",
    "download_fineweb_subset.py": "--max_samples 40 --network_patience 5",
    "download_fineweb_all.py": "--network_patience 5",
    "download_all.py": "--network_patience 5",
}
# Each word in turn goes from the front of the arguments to their end; on the way a GPU becomes the CPU and an
# alignment short. Before a script under torchrun comes the number of processes, which then overrides the page's.
WRAPPER = """#!/bin/sh
last=
for word; do
    shift
    case "$last$word" in
        *cuda|*cuda:*) word=cpu ;;
        --hidden_tokens?*|--matrix_tokens?*) word=128 ;;
        *.py) {before} ;;
    esac
    set -- "$@" "$word"
    case "$word" in --*) last=$word ;; *) last= ;; esac
done
case " $* " in
{cases}
esac
{launch}
"""
REAL = 'exec "$REAL_PYTHON"'
CLIENT = ROOT / "tests/helpers/warm_python.py"
ENDED = "@@ the block ended with status"


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """Each command in one line, without comments."""
        lines = [re.sub(r"(^| +)#.*", "", line) for line in self.code.replace("\\\n", " ").splitlines()]
        return [" ".join(line.split()) for line in lines if line.strip()]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in its order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [Block(page, text.count("\n", 0, match.start()) + 2, match[1], match[2]) for match in found]


def write_commands(folder: Path) -> None:
    """`python` and `torchrun` for PATH, which hand on to the real ones."""
    cases = "\n".join(f'    *" {script} "*) set -- "$@" {flags} ;;' for script, flags in SMALL.items())
    kinds = {
        "python": (f'case "$1" in *.py) exec "$REAL_PYTHON" -S {CLIENT} "$WARM" "$@" ;; esac\n{REAL}', ":"),
        "torchrun": (f"{REAL} -m torch.distributed.run", 'set -- "$@" --nproc_per_node=2'),
    }
    folder.mkdir()
    for name, (launch, before) in kinds.items():
        (folder / name).write_text(WRAPPER.format(before=before, cases=cases, launch=f'{launch} "$@"'))
        (folder / name).chmod(0o755)


class Desk:
    """A shell in a folder that looks like the repository, with the Hub of the tests for the Hub."""

    def __init__(self, folder: Path, hub: Any):
        self.folder, self.scratch = folder / "repository", folder
        self.folder.mkdir()
        for path in ROOT.iterdir():
            if path.suffix in (".py", ".txt", ".toml") or path.name in ("Makefile", "docs", "benchmarks"):
                (self.folder / path.name).symlink_to(path)
        write_commands(folder / "bin")
        beside = Path(sys.executable).parent  # hf and the other programs of this environment
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))}
        self.environment = {
            **inherited,
            **hub.environment(folder / "home"),
            "HF_TOKEN": "a-token",
            "PATH": f"{folder / 'bin'}:{beside}:{os.environ['PATH']}",
            "REAL_PYTHON": sys.executable,
            "WARM": str(folder / "warm"),
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> "Desk":
        self.output = (self.scratch / "output").open("a")  # as the warm processes do
        self.requests = socket.socket(socket.AF_UNIX)
        self.requests.bind(self.environment["WARM"])
        self.requests.listen()
        threading.Thread(target=self._answer, daemon=True).start()
        self.shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._type("set -m")  # jobs, as in a terminal
        return self

    def _answer(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=serve, args=(self.requests.accept()[0],), daemon=True).start()

    def __exit__(self, *error: Any) -> None:
        self.requests.close()
        self.shell.kill()
        self.shell.wait()
        for process in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if process.resolve() == self.folder.resolve():
                    os.kill(int(process.parent.name), signal.SIGKILL)
        self.output.close()

    def run(self, code: str, language: str = "bash", seconds: float = 300) -> tuple[int, str]:
        """(status, output) of some code typed into the shell; the status is that of the first command that fails."""
        file = self.scratch / "typed"
        file.write_text(code)
        since = os.stat(self.output.name).st_size
        line = f". {file} < /dev/null" if language == "bash" else f"python - < {file}"
        self._type("failed=0; trap 'now=$?; [ $failed != 0 ] || failed=$now' ERR")
        self._type(f"{line}; echo; echo {ENDED} $failed")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            written = Path(self.output.name).read_bytes()[since:].decode(errors="replace")
            if match := re.search(rf"^{ENDED} (\d+)$", written, re.M):
                return int(match[1]), written[: match.start()].rstrip()
            time.sleep(0.05)
        return -1, written

    def _type(self, line: str) -> None:
        assert self.shell.stdin is not None
        self.shell.stdin.write(f"{line}\n")
        self.shell.stdin.flush()


def serve(line: socket.socket) -> None:
    """Run what `warm_python.py` asks for on a connection, with its output for the output."""
    with line, line.makefile("rw") as files:
        asked = json.loads(files.readline())
        stdout, stderr = (f"/proc/{asked['pid']}/fd/{number}" for number in (1, 2))
        place = {"environment": asked["environment"], "cwd": asked["cwd"]}
        process = warm.start(asked["script"], asked["flags"], stdout, stderr=stderr, **place)
        with contextlib.suppress(BrokenPipeError):  # killed
            print(process.pid, file=files, flush=True)
            print(process.wait(), file=files, flush=True)
