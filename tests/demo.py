"""`make demo`: alignment and both stages on a real pretrained teacher, on the CPU, in under 8 minutes after set-up.

The teacher is SmolLM2-135M-Instruct; the text is Python's own documentation (`pydoc_data.topics`) and conversations
in OpenHermes' schema made from the standard library's docstrings. Everything lies under `.cache/` and `runs/demo`.
"""

import gzip
import importlib
import inspect
import json
import pydoc_data.topics
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from smollm2 import smollm2_folder  # noqa: E402
from utils import wait_passively  # noqa: E402

TEACHER = ROOT / ".cache" / "SmolLM2-135M-Instruct"
TEXT = ROOT / ".cache" / "demo_text"
RUN = ROOT / "runs" / "demo"
DOCSTRING_MODULES = "json os re random shutil tempfile textwrap statistics string pathlib csv datetime heapq".split()
PROMPT = "The with statement in Python is used to"
SHARED = "--seq_length 256 --batch_size 2 --device cpu --dtype float32 --local_files_only --seed 42".split()


def write_text(folder: Path) -> None:
    """Training text, held-out text (every eighth topic) and conversations, each as JSONL.GZ."""
    folder.mkdir(parents=True, exist_ok=True)
    topics = [{"text": text, "id": name} for name, text in sorted(pydoc_data.topics.topics.items())]
    write_jsonl(folder / "train.jsonl.gz", [row for i, row in enumerate(topics) if i % 8])
    write_jsonl(folder / "heldout.jsonl.gz", topics[::8])
    write_jsonl(folder / "conversations.jsonl.gz", docstring_conversations())


def docstring_conversations() -> list[dict]:
    """Questions about standard-library functions, answered by their docstrings, in OpenHermes-2.5's schema."""
    rows = []
    for name in DOCSTRING_MODULES:
        module = importlib.import_module(name)
        for member, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) and not member.startswith("_") else None
            if text and len(text) > 80:
                question = f"What does {name}.{member} do in Python?"
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
                rows.append({"conversations": turns, "system_prompt": None, "id": f"{name}.{member}"})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def train() -> None:
    """`python train.py` with the demo's flags, its output passed through."""
    flags = [
        *SHARED,
        *("--teacher_model", TEACHER, "--student_model", "from_teacher"),
        *("--layers", *"0 2 4 6 8 10 12 14 16 18 20 22 24 26 28".split()),
        *("--dataset_name", TEXT / "train.jsonl.gz", "--dataset_subset", "", "--max_steps", 20),
        *("--second_dataset_name", TEXT / "conversations.jsonl.gz"),
        *("--second_dataset_tokens", 8 * 512, "--second_dataset_epochs", 1),
        *("--hidden_tokens", 32 * 512, "--hidden_lr", "2e-4"),
        *("--max_lr", "2e-4", "--min_lr", "1e-5", "--freeze_replaced_layers", "--freeze_mlp"),
        *("--eval_dataset", TEXT / "heldout.jsonl.gz", "--eval_interval", 60, "--eval_tokens", 2048),
        *("--output_dir", RUN, "--resume", "none"),
    ]
    subprocess.run([sys.executable, ROOT / "train.py", *map(str, flags)], check=True)


def evaluations() -> list[dict]:
    lines = map(json.loads, (RUN / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "eval/kl" in line]


def continuation(folder: Path) -> str:
    """Greedy continuation of the demo's prompt by the model in a folder, with `generate()`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split())


def main() -> None:
    wait_passively()
    smollm2_folder(TEACHER)
    write_text(TEXT)
    shutil.rmtree(RUN, ignore_errors=True)
    start = time.perf_counter()
    train()
    minutes = (time.perf_counter() - start) / 60
    first, last = evaluations()[0], evaluations()[-1]
    print(f"\nBoth stages took {minutes:.1f} minutes.")
    print(
        f"KL(teacher || student) on text that it did not train on: {first['eval/kl']:.3f} -> {last['eval/kl']:.3f} "
        f"(top-1 agreement {first['eval/top1_agreement']:.1%} -> {last['eval/top1_agreement']:.1%})"
    )
    print(f"\nprompt:  {PROMPT}\nteacher: {continuation(TEACHER)}\nstudent: {continuation(RUN / 'final')}")
    print(f"\ncheckpoint: {RUN / 'final'}\nplot:       {RUN / 'loss.png'}")


if __name__ == "__main__":
    main()
