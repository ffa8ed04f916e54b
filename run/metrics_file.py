"""The rows of a run's metrics.jsonl, for whoever draws, sends or sums them up."""

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines with a step, or of a run folder's metrics.jsonl; raises OSError without one.

    A line that was cut off, by a kill at the end or by a full disk in the middle, is passed over.
    """
    file = path / "metrics.jsonl" if path.is_dir() else path
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows
