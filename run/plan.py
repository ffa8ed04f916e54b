"""From flags to a plan: which stages a run has, and how many optimizer steps each takes."""

import math
from collections.abc import Mapping
from typing import Any

from arguments import Arguments


def stage_names(args: Arguments) -> list[str]:
    """The stages that the flags ask for, in their order."""
    names = []
    if args.matrix_tokens:
        names.append("matrix")
    if args.hidden_tokens:
        names.append("hidden")
    names.append("stage1")
    if args.second_dataset_name and not args.skip_stage2:
        names.append("stage2")
    return names


def mixer_options(args: Arguments) -> dict[str, Any]:
    """What of `distill.initialization.student_config` the flags say."""
    return {"expand": args.expand, "mixer": args.mixer, "z_bias": not args.no_z_bias}


def sequences_a_step(flags: Mapping[str, Any], ranks: int) -> int:
    """Sequences of an optimizer step, over all ranks."""
    return flags["batch_size"] * flags["grad_accumulation_steps"] * ranks


def sequence_length(args: Arguments, name: str) -> int:
    """Tokens of a stage's sequences."""
    return args.matrix_seq_length if name == "matrix" else args.seq_length


def planned_steps(args: Arguments, name: str, world_size: int) -> int:
    """Optimizer steps of a stage whose number the flags alone say (not stage 1 with `--epochs`)."""
    tokens = {
        "matrix": args.matrix_tokens,
        "hidden": args.hidden_tokens,
        "stage2": args.second_dataset_tokens * args.second_dataset_epochs,
    }
    if name not in tokens:
        return args.max_steps
    sequences = sequences_a_step(vars(args), world_size)
    return max(1, math.ceil(tokens[name] / (sequences * sequence_length(args, name))))
