"""From answers to figures: shares with 95% intervals, paired against the teacher's rows, and one figure for all.

Recall share: the mean over cells (task and length) of student / teacher, each ratio capped at 1, over the cells in
which the teacher reaches TEACHER_KNOWS. Intervals are of the paired bootstrap over rows (Efron 1979): in a resample
both models answer the same rows, so that what is hard for both does not widen the difference.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evaluation.recall import Answers, Cells, as_tensor
from evaluation.recall_tasks import DEPTHS, NEVER_TRAINED
from evaluation.report import MODELS

TEACHER_KNOWS = 0.2
RESAMPLES = 1000


def recall_summary(
    cells: Cells, student: Mapping[str, Answers], teacher: Mapping[str, Answers]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures by cell, recall shares), everything from 0 to 1.

    A cell's: student and teacher; student_interval and difference_interval, [low, high]; generated, by model, of the
    rows that were generated; depths, by model, in ten parts of the context from its beginning. Shares: all kinds,
    those that generated training text has a counterpart of (trained) and those that it has none of (never_trained),
    each as {share, interval, cells, of}; share is None where the teacher knows no cell.
    """
    generator = torch.Generator().manual_seed(0)
    figures: dict[str, Any] = {}
    resampled: dict[str, tuple[Tensor, Tensor]] = {}
    for name, rows in cells.items():
        ours, theirs = as_tensor(student[name].right), as_tensor(teacher[name].right)
        drawn = torch.randint(len(rows), (RESAMPLES, len(rows)), generator=generator)
        means = ours[drawn].mean(1), theirs[drawn].mean(1)
        resampled[name] = means
        figures[name] = {
            "student": ours.mean().item(),
            "teacher": theirs.mean().item(),
            "student_interval": interval(means[0]),
            "difference_interval": interval(means[0] - means[1]),
        }
        if student[name].generated and teacher[name].generated:
            pair = zip(MODELS, (student[name].generated, teacher[name].generated))
            figures[name]["generated"] = {model: as_tensor(right).mean().item() for model, right in pair}
        if "@" in name:
            figures[name]["depths"] = {
                model: [right[depth::DEPTHS].mean().item() for depth in range(min(DEPTHS, len(rows)))]
                for model, right in zip(MODELS, (ours, theirs))
            }
    kinds = {name: name.partition("@")[0].partition("/")[0] for name in cells}
    groups = {
        "all": list(cells),
        "trained": [name for name in cells if kinds[name] not in NEVER_TRAINED],
        "never_trained": [name for name in cells if kinds[name] in NEVER_TRAINED],
    }
    return figures, {group: recall_share(names, figures, resampled) for group, names in groups.items()}


def recall_share(
    names: list[str], figures: dict[str, Any], resampled: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """The share over some cells, its interval, how many cells count and of how many."""
    known = [name for name in names if figures[name]["teacher"] >= TEACHER_KNOWS]
    found: dict[str, Any] = {"share": None, "interval": None, "cells": len(known), "of": len(names)}
    if known:
        ratios = [min(1.0, figures[name]["student"] / figures[name]["teacher"]) for name in known]
        drawn = [(ours / theirs.clamp_min(1e-9)).clamp_max(1.0) for ours, theirs in map(resampled.get, known)]  # type: ignore[misc]
        found |= {"share": sum(ratios) / len(ratios), "interval": interval(torch.stack(drawn).mean(0))}
    return found


def interval(values: Tensor) -> list[float]:
    """The middle 95% of resampled figures, [low, high]."""
    return torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
