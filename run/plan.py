"""From flags to a plan: which stages a run has, in which order, and how long each is."""

import math
from collections.abc import Mapping
from typing import Any

from arguments import Arguments

Length = tuple[str, int]  # unit and number


def stage_lengths(flags: Mapping[str, Any]) -> dict[str, Length]:
    """The length of each stage that the flags ask for, in their order: in tokens, passes ("epochs") or steps."""
    lengths: dict[str, Length] = {}
    for name in ("matrix", "hidden"):
        if flags[f"{name}_tokens"]:
            lengths[name] = "tokens", flags[f"{name}_tokens"]
    lengths["stage1"] = ("epochs", flags["epochs"]) if flags["epochs"] else ("steps", flags["max_steps"])
    if flags["second_dataset_name"] and not flags["skip_stage2"]:
        lengths["stage2"] = "tokens", flags["second_dataset_tokens"] * flags["second_dataset_epochs"]
    return lengths


def stage_names(args: Arguments) -> list[str]:
    """The stages that the flags ask for, in their order."""
    return list(stage_lengths(vars(args)))


def mixer_options(args: Arguments) -> dict[str, Any]:
    """What of `distill.initialization.student_config` the flags say."""
    return {"expand": args.expand, "mixer": args.mixer, "z_bias": not args.no_z_bias}


def sequences_a_step(flags: Mapping[str, Any], ranks: int) -> int:
    """Sequences of an optimizer step, over all ranks."""
    return flags["batch_size"] * flags["grad_accumulation_steps"] * ranks


def sequence_length(args: Arguments, name: str) -> int:
    """Tokens of a stage's sequences."""
    return args.matrix_seq_length if name == "matrix" else args.seq_length


def tokens_a_step(flags: Mapping[str, Any], name: str, ranks: int) -> int:
    """Tokens that an optimizer step of a stage takes, over all ranks."""
    return sequences_a_step(flags, ranks) * flags["matrix_seq_length" if name == "matrix" else "seq_length"]


def planned_steps(args: Arguments, name: str, ranks: int) -> int:
    """Optimizer steps of a stage whose number the flags alone say (not one that is measured in passes)."""
    flags = vars(args)
    unit, number = stage_lengths(flags)[name]
    return number if unit == "steps" else max(1, math.ceil(number / tokens_a_step(flags, name, ranks)))
