"""The figures of `evaluate.py` as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

MODELS = ("student", "teacher")

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def print_table(report: dict[str, Any]) -> None:
    """The report as aligned columns."""
    for name, value in report.get("held_out", {}).items():
        print(f"{name:<28}{value:>14.4f}")
    if report.get("recall"):
        print_recall(report["recall"], report["recall_share"])
    for title, rows in generation_tables(report.get("generation", [])).items():
        if rows:
            print(f"\n{title:<28}{'student':>14}{'teacher':>14}")
        for name, pair in rows.items():
            print(f"{name:<28}{pair['student']:>14.3f}{pair['teacher']:>14.3f}")
    for task, figures in report.get("harness", {}).items():
        print(f"\n{task}")
        for name, value in figures.items():
            print(f"  {name:<26}{value:>14.4f}")


def generation_tables(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Titles to {size: {model: figure}}."""
    figures = {
        "generated tokens a second": ("tokens_per_second", 1.0),
        "first token, ms": ("first_token_seconds", 1e3),
        "peak, GiB": ("peak_bytes", 2.0**-30),
    }
    tables: dict[str, Any] = {title: {} for title in figures}
    for title, (key, scale) in figures.items():
        for row in rows:
            size = f"context {row['context']}, batch {row['batch']}"
            tables[title].setdefault(size, {})[row["model"]] = row[key] * scale
    return tables


def print_recall(recall: dict[str, Any], shares: dict[str, Any]) -> None:
    """Both models' shares of right answers by task and length, with 95% intervals; the figures over all."""
    heads = ("student", "95%", "teacher", "difference, 95%", "generated", "teacher's")
    print(f"\n{'recall':<22}" + "".join(f"{head:>16}" for head in heads))
    for name, found in recall.items():
        written = [f"{found['generated'][model]:.3f}" if "generated" in found else "" for model in MODELS]
        columns = [f"{found['student']:.3f}", as_range(found["student_interval"]), f"{found['teacher']:.3f}"]
        columns += [as_range(found["difference_interval"]), *written]
        print(f"{name:<22}" + "".join(f"{column:>16}" for column in columns))
    for group, found in shares.items():
        known = f"{found['cells']} of {found['of']} cells, in which the teacher reaches 20%"
        share = "none" if found["share"] is None else f"{found['share']:.3f} ({as_range(found['interval'])})"
        print(f"recall share, {group.replace('_', ' ')} kinds: {share}, over {known}")


def as_range(ends: list[float]) -> str:
    """An interval as text."""
    return f"{ends[0]:.3f}..{ends[1]:.3f}"


def draw(report: dict[str, Any], path: Path) -> None:
    """Recall by depth and length, rate and memory by context, for both models; the held-out figures in the title."""
    from matplotlib.figure import Figure  # pyplot, for windows, takes a quarter longer to import

    maps = list(MODELS) if any("@" in name for name in report.get("recall", {})) else []
    lines = ["tokens_per_second", "peak_bytes"] if "generation" in report else []
    count = max(1, len(maps) + len(lines))
    figure = Figure(figsize=(4 + 4 * count, 4.5), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    if maps:
        draw_recall(report["recall"], axes[: len(maps)])
    for name, axis in zip(lines, axes[len(maps) :]):
        draw_generation(report["generation"], name, axis, {"teacher": "tab:gray", "student": "tab:blue"})
    if not maps and not lines:
        axes[0].axis("off")
    held = report.get("held_out")
    if held:
        figure.suptitle(
            f"KL {held['kl']:.3f} nats, top-1 agreement {held['top1_agreement']:.1%}, "
            f"perplexity ratio {held['perplexity_ratio']:.3f}"
        )
    figure.savefig(path, dpi=120)


def draw_recall(recall: dict[str, Any], axes: Sequence["Axes"]) -> None:
    """A heat map for each model: how often what stands at a depth of the context is right, by length, over tasks."""
    lengths = sorted({int(name.partition("@")[2]) for name in recall if "@" in name})
    for model, axis in zip(MODELS, axes):
        rows = [
            np.mean([found["depths"][model] for name, found in recall.items() if name.endswith(f"@{length}")], axis=0)
            for length in lengths
        ]
        axis.imshow(np.array(rows), vmin=0, vmax=1, aspect="auto", cmap="viridis")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", color="w" if value < 0.6 else "k")
        axis.set(xlabel="depth, tenths of the context", title=f"{model}: right answers, %")
        axis.set_yticks(range(len(lengths)), [f"{length} tokens" for length in lengths])
        axis.set_xticks(range(len(rows[0])))


def draw_generation(rows: list[dict[str, Any]], key: str, axis: "Axes", colours: dict[str, str]) -> None:
    """Rate or memory by context: a line for each model and number of rows."""
    scale = 2.0**-30 if key == "peak_bytes" else 1.0
    for index, batch in enumerate(sorted({row["batch"] for row in rows})):
        for model, colour in colours.items():
            of = sorted(
                (row["context"], row[key] * scale) for row in rows if (row["model"], row["batch"]) == (model, batch)
            )
            label = f"{model}, batch {batch}"
            axis.plot(*zip(*of), marker="os^vD"[index % 5], color=colour, label=label)
    axis.set(xlabel="context, tokens", ylabel="peak memory, GiB" if scale < 1 else "generated tokens a second")
    axis.set_ylim(bottom=0)
    axis.legend()
