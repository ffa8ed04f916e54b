"""The figures of `evaluate.py` as a table and as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def print_table(report: dict[str, Any]) -> None:
    """The report as aligned columns."""
    for name, value in report.get("held_out", {}).items():
        print(f"{name:<28}{value:>14.4f}")
    tables = {"recall": report.get("recall", {}), **generation_tables(report.get("generation", []))}
    for title, rows in tables.items():
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


def draw(report: dict[str, Any], path: Path) -> None:
    """Recall by number of pairs, rate and memory by context, for both models; the held-out figures in the title."""
    from matplotlib.figure import Figure  # pyplot, for windows, takes a quarter longer to import

    panels = ["recall"] * ("recall" in report) + ["tokens_per_second", "peak_bytes"] * ("generation" in report)
    figure = Figure(figsize=(4 + 4 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)
    colours = {"teacher": "tab:gray", "student": "tab:blue"}
    for name, axis in zip(panels, axes[0]):
        if name == "recall":
            draw_recall(report[name], axis, colours)
        else:
            draw_generation(report["generation"], name, axis, colours)
    if not panels:
        axes[0, 0].axis("off")
    held = report.get("held_out")
    if held:
        figure.suptitle(
            f"KL {held['kl']:.3f} nats, top-1 agreement {held['top1_agreement']:.1%}, "
            f"perplexity ratio {held['perplexity_ratio']:.3f}"
        )
    figure.savefig(path, dpi=120)


def draw_recall(recall: dict[str, Any], axis: "Axes", colours: dict[str, str]) -> None:
    """A line for each model and task."""
    for task, style in zip(sorted({name.split("/")[0] for name in recall}), ("o-", "s--")):
        pairs = sorted(int(name.split("/")[1]) for name in recall if name.startswith(task))
        for model, colour in colours.items():
            values = [recall[f"{task}/{count}"][model] for count in pairs]
            axis.plot(pairs, values, style, color=colour, label=f"{model}, {task.replace('_', ' ')}")
    axis.set(xlabel="pairs in context", ylabel="accuracy", ylim=(-0.03, 1.03))
    axis.set_xscale("log")
    axis.minorticks_off()
    counts = sorted({int(name.split("/")[1]) for name in recall})
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.legend()


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
