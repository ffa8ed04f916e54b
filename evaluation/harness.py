"""lm-evaluation-harness on a checkpoint."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import UserError

# Names for several tasks: what papers on such students report, as the harness calls it and with its own defaults.
SUITES = {
    "standard": ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "mmlu", "gsm8k", "ifeval"),
}


def with_suite(tasks: Sequence[str], suite: str | None) -> list[str]:
    """The tasks of a suite, then those named beside it, each once."""
    return list(dict.fromkeys([*(SUITES[suite] if suite else ()), *tasks]))


def harness_figures(
    model: str,
    tasks: Sequence[str],
    *,
    device: str,
    dtype: str,
    attn_implementation: str,
    batch_size: int,
    limit: float | None,
    include_path: str,
    offline: bool,
) -> dict[str, Any]:
    """lm-evaluation-harness results of a checkpoint folder or hub id: {task: {metric: value}}.

    Raises `UserError` when it fails. In a process of its own, started elsewhere: it imports a package that is named
    like `evaluate.py`.
    """
    folder = Path(model)
    options = {
        "--model": "hf",
        "--model_args": f"pretrained={folder.resolve() if folder.is_dir() else model},"
        f"trust_remote_code=True,dtype={dtype},attn_implementation={attn_implementation}",
        "--tasks": ",".join(tasks),
        "--device": device,
        "--batch_size": str(batch_size),
    }
    if limit is not None:
        options["--limit"] = f"{limit:g}"
    if include_path:
        options["--include_path"] = str(Path(include_path).resolve())
    env = {**os.environ, "HF_HUB_OFFLINE": "1"} if offline else None
    with tempfile.TemporaryDirectory() as scratch:
        options["--output_path"] = scratch
        command = [sys.executable, "-m", "lm_eval", *itertools.chain(*options.items())]
        if subprocess.run(command, cwd=scratch, env=env).returncode:
            raise UserError(f"--tasks {' '.join(tasks)}: lm-evaluation-harness failed (its own words are above)")
        results = json.loads(next(Path(scratch).rglob("results_*.json")).read_text())["results"]
    return {task: {k: v for k, v in found.items() if isinstance(v, float)} for task, found in results.items()}
