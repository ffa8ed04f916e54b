"""What `evaluate.py` writes into a student's card: the Hub's own form of results, and a table for people."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from checkpoints.files import MANIFEST, read_manifest
from utils import write_whole

CARD = "README.md"
BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"
NAMES = {
    "kl": "KL(teacher, student), nats a token",
    "top1_agreement": "top-1 agreement",
    "student_perplexity": "perplexity",
    "perplexity_ratio": "perplexity, times the teacher's",
}


def card_rows(report: dict[str, Any]) -> list[tuple[str, str, str, float]]:
    """(data set, its short name, figure, value) of everything in a report that is one number of the student's."""
    text = Path(str(report["flags"].get("dataset_name", ""))).name or "held-out text"
    rows = [(text, text, name, report["held_out"][name]) for name in NAMES if name in report.get("held_out", {})]
    for name, entry in (report.get("recall_share") or {}).items():
        if entry.get("share") is not None:
            rows.append(("recall in context", "recall", f"{name}, share of the teacher's", entry["share"]))
    for task, figures in (report.get("harness") or {}).items():
        rows += [(task, task, name, value) for name, value in figures.items() if isinstance(value, float)]
    return rows


def with_evaluation(card: str, report: dict[str, Any], name: str) -> str:
    """A card with a report's figures, in the place of those of an evaluation before."""
    from huggingface_hub import EvalResult, ModelCard

    rows = card_rows(report)
    lines = [f"| {text} | {NAMES.get(figure, figure)} | {value:.4g} |" for text, _, figure, value in rows]
    table = "\n".join([BEGIN, "| text or task | figure | value |", "| --- | --- | --- |", *lines, END])
    card = re.sub(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", "\n\n", card, flags=re.DOTALL)
    head, separator, rest = card.partition("\nThe licences of the teacher")
    made: Any = ModelCard(f"{head.rstrip()}\n\n{table}\n{separator}{rest}")
    data = made.data
    data.model_name = name
    data.eval_results = [
        EvalResult(
            task_type="text-generation", dataset_type=short, dataset_name=text,
            metric_type=figure, metric_name=NAMES.get(figure, figure), metric_value=value,
        )
        for text, short, figure, value in rows
    ]  # fmt: skip
    return str(made)


def write_into_card(folder: Path, report: dict[str, Any]) -> bool:
    """Put a report's figures into the card of a checkpoint's folder; False where it has none.

    The manifest, which has the card's hash, does without it meanwhile: the checkpoint is undamaged at any moment.
    """
    path = folder / CARD
    if not path.is_file():
        return False
    content = with_evaluation(path.read_text(encoding="utf-8"), report, folder.absolute().parent.name).encode()
    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if manifest is not None:
        manifest["files"].pop(CARD, None)
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    write_whole(path, content)
    if manifest is not None:
        manifest["files"][CARD] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    return True
