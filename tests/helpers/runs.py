"""Small real runs of train.py: the flags, the text, and what they left behind."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

FLAGS = {
    "--student_model": "from_teacher",
    "--layers": "1",
    "--seq_length": 64,
    "--batch_size": 2,
    "--device": "cpu",
    "--dtype": "float32",
    "--dataset_subset": "",
    "--max_steps": 8,
    "--second_dataset_tokens": 512,
    "--second_dataset_epochs": 1,
    "--shuffle_buffer": 16,
    "--max_lr": "1e-3",
    "--min_lr": "1e-5",
}


def write_sources(folder: Path, documents: list[str]) -> dict[str, Path]:
    """FineWeb-like training and held-out text and OpenHermes-like conversations as JSONL.GZ."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {name: folder / f"{name}.jsonl.gz" for name in ("train", "heldout", "conversations")}
    write_rows(sources["train"], [{"text": text, "id": f"doc-{i}"} for i, text in enumerate(documents[10:60])])
    write_rows(sources["heldout"], [{"text": text, "id": f"held-{i}"} for i, text in enumerate(documents[:3])])
    turns = [
        [{"from": "human", "value": f"What is topic {i}?"}, {"from": "gpt", "value": text[:400]}]
        for i, text in enumerate(documents[60:])
    ]
    write_rows(sources["conversations"], [{"conversations": turn, "system_prompt": None} for turn in turns])
    return sources


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def flags(teacher: Path, sources: dict[str, Path], output: Path, **changes: Any) -> list[str]:
    """Command-line flags of a small run; `changes` by flag name without dashes, None drops a flag, True sets one."""
    chosen: dict[str, Any] = {
        **FLAGS,
        "--teacher_model": teacher,
        "--dataset_name": sources["train"],
        "--second_dataset_name": sources["conversations"],
        "--output_dir": output,
        **{f"--{name}": value for name, value in changes.items()},
    }
    line: list[str] = []
    for name, value in chosen.items():
        if value is True:
            line.append(name)
        elif isinstance(value, list | tuple):
            line += [name, *map(str, value)]
        elif value is not None and value is not False:
            line += [name, str(value)]
    return line


def bits(folder: Path) -> dict[str, bytes]:
    """Every tensor of a folder's weights as its bytes, by name."""
    import torch

    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in weights(folder).items()}


def copy_up_to(output: Path, checkpoint: str, copy: Path) -> None:
    """A copy of a run's folder as it was when `checkpoint` was its newest; no other is kept."""
    shutil.copytree(output, copy)
    for later in [path for path in copy.iterdir() if path.is_dir() and path.name != checkpoint]:
        shutil.rmtree(later)


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every logged step."""
    rows = [row for row in metrics(output) if "train/loss" in row]
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in rows]


def weights(folder: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, by name."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
