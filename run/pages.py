"""HTML of tables, for W&B and for a run's report: no script, no style sheet, nothing to fetch."""

import html
import math
from collections.abc import Sequence
from typing import Any

CELL = "padding:2px 8px;border-bottom:1px solid #ddd;text-align:left;vertical-align:top"
HUE = (31, 119, 180)  # the darkest shade


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain table; texts keep their line breaks."""
    head = "".join(f'<th style="{CELL}">{html.escape(str(name))}</th>' for name in columns)
    body = "".join(
        "<tr>"
        + "".join(f'<td style="{CELL};white-space:pre-wrap">{html.escape(shown(value))}</td>' for value in row)
        + "</tr>"
        for row in rows
    )
    return f'<table style="border-collapse:collapse"><tr>{head}</tr>{body}</table>'


def shaded_table(columns: Sequence[str], labels: Sequence[str], rows: Sequence[Sequence[float | None]]) -> str:
    """A heat map with its numbers: one label and a list of numbers a row, each column shaded over its own range."""
    head = "".join(f'<th style="{CELL}">{html.escape(name)}</th>' for name in columns)
    ranges = [_range([row[index] for row in rows]) for index in range(len(columns) - 1)]
    body = "".join(
        f'<tr><th style="{CELL}">{html.escape(label)}</th>'
        + "".join(_shaded(value, *limits) for value, limits in zip(row, ranges))
        + "</tr>"
        for label, row in zip(labels, rows)
    )
    return f'<table style="border-collapse:collapse"><tr>{head}</tr>{body}</table>'


def shown(value: Any) -> str:
    """A cell's text: numbers in four digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _range(values: Sequence[float | None]) -> tuple[float, float]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return (min(known), max(known)) if known else (0.0, 0.0)


def _shaded(value: float | None, low: float, high: float) -> str:
    if value is None:
        return f'<td style="{CELL}"></td>'
    depth = (value - low) / (high - low) if high > low and math.isfinite(value) else 0.0
    red, green, blue = (round(255 + (shade - 255) * depth) for shade in HUE)
    ink = "#fff" if depth > 0.6 else "#000"
    return f'<td style="{CELL};background:rgb({red},{green},{blue});color:{ink}">{shown(value)}</td>'
