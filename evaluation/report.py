"""The figures of `evaluate.py` as a table and as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def print_table(report: dict[str, Any]) -> None:
    """The report as aligned columns."""
    for name, value in report.get("held_out", {}).items():
        print(f"{name:<28}{value:>14.4f}")
    for section in ("recall", "tokens_per_second"):
        figures = report.get(section)
        if not figures:
            continue
        print(f"\n{section:<28}{'student':>14}{'teacher':>14}")
        rows = figures if section == "recall" else {"generate, batch 1": figures}
        for name, pair in rows.items():
            print(f"{name:<28}{pair['student']:>14.3f}{pair['teacher']:>14.3f}")
    for task, figures in report.get("harness", {}).items():
        print(f"\n{task}")
        for name, value in figures.items():
            print(f"  {name:<26}{value:>14.4f}")


def draw(report: dict[str, Any], path: Path) -> None:
    """Recall by number of pairs and speed, for both models; the held-out figures in the title."""
    from matplotlib.figure import Figure  # pyplot, for windows, takes a quarter longer to import

    panels = [name for name in ("recall", "tokens_per_second") if name in report]
    figure = Figure(figsize=(4 + 4 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, max(1, len(panels)), squeeze=False)
    colours = {"teacher": "tab:gray", "student": "tab:blue"}
    for name, axis in zip(panels, axes[0]):
        if name == "recall":
            draw_recall(report[name], axis, colours)
        else:
            bars = axis.bar(list(colours), [report[name][model] for model in colours], color=list(colours.values()))
            axis.bar_label(bars, fmt="%.1f")
            axis.set(ylabel="generated tokens a second, batch 1")
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
