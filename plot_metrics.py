"""Pictures of one or several runs from their metrics.jsonl, the same panels that W&B shows.

python plot_metrics.py RUN [RUN ...] --output comparison.png [--x tokens|step]
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PANELS = (
    ("train/loss", "loss (nats a token)", "linear"),
    ("train/kl", "KL(teacher || student)", "log"),
    ("train/top1_agreement", "top-1 agreement", "linear"),
    ("train/grad_norm", "gradient norm", "log"),
    ("train/lr", "learning rate", "linear"),
    ("train/tokens_per_second", "tokens/s", "linear"),
    ("eval/kl", "held-out KL", "log"),
    ("eval/perplexity_ratio", "held-out perplexity ratio", "linear"),
    ("data/wait_seconds", "waiting for data (s a step)", "linear"),
)
SMOOTHING_POINTS = 100  # a run with more points than this also gets a running mean


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl file or of a run's folder; a last line that was cut off is passed over."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    rows = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number != len(lines):
                raise ValueError(f"{file}:{number} is not JSON") from None
    return rows


def series(rows: Sequence[dict[str, Any]], name: str, x: str) -> tuple[list[float], list[float]]:
    """(x, y) of a metric; an evaluation takes the tokens of the training row before it."""
    tokens, xs, ys = 0.0, [], []
    for row in rows:
        tokens = row.get("train/tokens") or tokens
        if isinstance(row.get(name), int | float):
            xs.append(float(row["step"] if x == "step" else tokens))
            ys.append(float(row[name]))
    return xs, ys


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def plot_runs(files: Sequence[Path], output: Path, *, x: str = "step") -> Path:
    """Draw every panel that at least one run has; raises ValueError when there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = {path.resolve(): read_metrics(path) for path in files}
    shown = [panel for panel in PANELS if any(series(rows, panel[0], x)[0] for rows in runs.values())]
    if not shown:
        raise ValueError("no metrics to draw")
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.1 * lines), squeeze=False, layout="constrained"
    )
    for axis, (name, title, scale) in zip(axes.flat, shown):
        for number, (path, rows) in enumerate(runs.items()):
            draw_series(axis, *series(rows, name, x), f"C{number}", run_label(path))
            draw_stages(axis, rows, x)
        positive = all(y > 0 for rows in runs.values() for y in series(rows, name, x)[1])
        axis.set(title=title, xlabel="tokens" if x == "tokens" else "optimizer step")
        axis.set_yscale(scale if positive else "linear")
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    if len(runs) > 1:
        axes.flat[0].legend(fontsize="small")
    figure.savefig(output, dpi=110)
    plt.close(figure)
    return output


def draw_series(axis: Any, xs: list[float], ys: list[float], colour: str, label: str) -> None:
    """One line, with a running mean over it where there are many points."""
    many = len(ys) > SMOOTHING_POINTS
    marker = "o" if len(ys) < 3 else None
    axis.plot(xs, ys, color=colour, alpha=0.3 if many else 1.0, marker=marker, label=None if many else label)
    if many:
        axis.plot(xs, running_mean(ys, len(ys) // 40), color=colour, label=label)


def draw_stages(axis: Any, rows: Sequence[dict[str, Any]], x: str) -> None:
    """A dotted line where a stage after the first begins."""
    tokens, begun = 0.0, 0
    for row in rows:
        tokens = row.get("train/tokens") or tokens
        if "stage_begins" in row:
            begun += 1
            if begun > 1:
                axis.axvline(row["step"] if x == "step" else tokens, color="gray", linestyle=":", linewidth=1)


def run_label(path: Path) -> str:
    return (path.parent if path.is_file() else path).name


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders or metrics.jsonl files")
    parser.add_argument("--output", type=Path, default=Path("metrics.png"), help="picture to write")
    parser.add_argument("--x", choices=["tokens", "step"], default="tokens", help="horizontal axis")
    args = parser.parse_args(argv)
    try:
        print(plot_runs(args.runs, args.output, x=args.x))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
