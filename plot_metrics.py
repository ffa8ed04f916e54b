"""Pictures of one or several runs from their metrics.jsonl, the same panels that W&B shows.

python plot_metrics.py RUN [RUN ...] --output comparison.png [--x tokens|step]
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flags.reading import HelpFormatter
from run.metrics_file import read_metrics

PANELS = (
    ("align/loss", "alignment error (matrix, hidden)", "log"),
    ("train/loss", "distillation loss, nats a token", "log"),
    ("train/kl", "KL(teacher || student), nats a token", "log"),
    ("train/top1_agreement", "top-1 agreement", "linear"),
    ("train/grad_norm", "gradient norm", "log"),
    ("train/lr", "learning rate", "linear"),
    ("train/tokens_per_second", "tokens/s", "linear"),
    ("eval/kl", "held-out KL, nats a token", "log"),
    ("eval/top1_agreement", "held-out top-1 agreement", "linear"),
    ("eval/perplexity_ratio", "held-out perplexity ratio", "linear"),
    ("data/wait_seconds", "waiting for data (s a step)", "linear"),
    ("layers/grad_norm", "gradient norm of a layer: mean, range", "log"),
    ("layers/mean_decay", "decay of a mixer: mean, range", "linear"),
    ("layers/hidden_distance", "hidden states' distance by layer: mean, range", "linear"),
    ("layers/relative_error", "alignment error of a mixer: mean, range", "linear"),
)
ALIGNS = ("matrix", "hidden")  # their loss is a relative error, and has a panel of its own
SMOOTHING_POINTS = 100  # a line with more points than this also gets a running mean
Line = tuple[list[float], list[float]]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def series(
    rows: Sequence[dict[str, Any]], name: str, x: str, pick: Callable[[Sequence[float]], float] = mean
) -> list[Line]:
    """Lines (x, y) of a metric; an evaluation takes the tokens of the training row before it.

    A training metric breaks where a stage begins: the stages' losses are different quantities. Of a metric with a
    value a layer (`layers/grad_norm_3`), `pick` makes one.
    """
    tokens, lines = 0.0, [([], [])]  # type: float, list[Line]
    for row in rows:
        tokens = row.get("train/tokens") or tokens
        if "stage_begins" in row and name.startswith(("align/", "train/", "layers/")) and lines[-1][0]:
            lines.append(([], []))
        if values := values_of(row, name):
            lines[-1][0].append(float(row["step"] if x == "step" else tokens))
            lines[-1][1].append(float(pick(values)))
    return [line for line in lines if line[0]]


def values_of(row: dict[str, Any], name: str) -> list[float]:
    """A metric's finite values in a row: one, or one a layer."""
    if name in ("align/loss", "train/loss"):
        mine = (row.get("stage") in ALIGNS) == (name == "align/loss")
        row = {name: row.get("train/loss") if mine else None}
    by_layer = f"{name}_" if name.startswith("layers/") else None
    found = [row[key] for key in row if key.startswith(by_layer)] if by_layer else [row.get(name)]
    return [value for value in found if isinstance(value, int | float) and math.isfinite(value)]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def plot_runs(files: Sequence[Path], output: Path, *, x: str = "step") -> Path:
    """Draw every panel that at least one run has; raises ValueError when there is nothing to draw."""
    from matplotlib.figure import Figure  # pyplot, for windows, takes a quarter longer to import

    runs = {path.resolve(): read_metrics(path) for path in files}
    labels = run_labels(list(runs))
    shown = [panel for panel in PANELS if any(series(rows, panel[0], x) for rows in runs.values())]
    if not shown:
        raise ValueError("no metrics to draw")
    columns = min(3, len(shown))
    height = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.1 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False, sharex=True)
    for axis, (name, title, scale) in zip(axes.flat, shown):
        for number, (rows, label) in enumerate(zip(runs.values(), labels)):
            lines, marked = series(rows, name, x), name.startswith("eval/")
            draw_lines(axis, lines, f"C{number}", label, smooth=name != "train/lr" and not marked, marked=marked)
            if name.startswith("layers/"):
                for low, high in zip(series(rows, name, x, min), series(rows, name, x, max)):
                    axis.fill_between(low[0], low[1], high[1], color=f"C{number}", alpha=0.15, linewidth=0)
            draw_stages(axis, rows, x, f"C{number}" if len(runs) > 1 else "gray", named=len(runs) == 1)
        dress(axis, title, scale, x)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    figure.suptitle(labels[0] if len(runs) == 1 else "runs side by side", fontsize="large")
    if len(runs) > 1:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(output, dpi=110)
    return output


def dress(axis: Any, title: str, scale: str, x: str) -> None:
    """Title, grid and scales; a logarithm only for positive values over a wide range, its ticks in plain numbers."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter, StrMethodFormatter

    axis.set_title(title, fontsize="medium")
    axis.margins(y=0.16)  # room for the stages' names above the curves
    axis.set_xlabel("tokens" if x == "tokens" else "optimizer step")
    axis.tick_params(labelbottom=True)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.25)
    values = [y for line in axis.lines if line.get_gid() == "metric" for y in line.get_ydata()]
    if scale == "log" and values and min(values) > 0 and max(values) > 4 * min(values):
        axis.set_yscale("log")
        if max(values) / min(values) < 1000:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        formatter = ScalarFormatter(useOffset=False)
        formatter.set_powerlimits((-3, 5))
        axis.yaxis.set_major_formatter(formatter)


def draw_lines(axis: Any, lines: list[Line], colour: str, label: str, *, smooth: bool, marked: bool = False) -> None:
    """A metric of one run, with a running mean over it where a line has many points; `marked`: each is to be seen."""
    for xs, ys in lines:
        many = smooth and len(ys) > SMOOTHING_POINTS
        marker = "o" if len(ys) < 3 or marked else None
        axis.plot(xs, ys, color=colour, alpha=0.3 if many else 1.0, marker=marker, markersize=4, gid="metric")
        if many:
            axis.plot(xs, running_mean(ys, len(ys) // 40), color=colour)
    if lines:
        axis.plot([], [], color=colour, label=label)


def draw_stages(axis: Any, rows: Sequence[dict[str, Any]], x: str, colour: str, *, named: bool) -> None:
    """A dotted line where a stage after the first begins, and with `named` each stage's name beside it."""
    tokens, begun = 0.0, 0
    for row in rows:
        tokens = row.get("train/tokens") or tokens
        if "stage_begins" not in row:
            continue
        place = row["step"] if x == "step" else tokens
        if begun:
            axis.axvline(place, color=colour, linestyle=":", linewidth=1)
        if named:
            text = axis.annotate(
                row["stage_begins"], (place, 1.0), xycoords=("data", "axes fraction"), va="top",
                xytext=(5, -4), textcoords="offset points", fontsize="x-small", color="dimgray",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}, annotation_clip=True,
            )  # fmt: skip
            text.set_in_layout(False)  # with a single point, a stage's start lies far outside the axes
        begun += 1


def run_labels(paths: Sequence[Path]) -> list[str]:
    """The runs' folder names, with as many folders above as it takes to tell them apart."""
    folders = [path.parent if path.is_file() else path for path in paths]
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        labels = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
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
