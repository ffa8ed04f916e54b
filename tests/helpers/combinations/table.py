"""Which flags are combined, with which values, and which combinations are refused.

`python tests/helpers/combinations/table.py` makes `array.json` anew: rows in which every allowed pair of values
stands at least once. A new flag that changes results gets a line in FACTORS, or one in EXEMPT that says why not.
"""

import itertools
import json
import random
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ARRAY = Path(__file__).with_name("array.json")

# Names are flags, except for: way (how many ranks, and how they share the models), length (what ends stage 1),
# stop (how the run is interrupted), change (what a forced resume changes). The first value is the plain one.
FACTORS: dict[str, list[Any]] = {
    "way": ["alone", "ddp", "fsdp", "host"],
    "teacher_model": ["untied", "tied"],
    "student_model": ["from_teacher", "llamba", "distilled"],
    "layers": ["1", "-1", "auto:1"],
    "expand": [1, 2],
    "mixer": ["llamba", "mamba2"],
    "no_z_bias": [False, True],
    "freeze_mlp": [False, True],
    "freeze_replaced_layers": [False, True],
    "freeze_embeddings": [False, True],
    "attn_implementation": ["sdpa", "eager"],
    "no_dataset_streaming": [False, True],
    "shuffle_buffer": [16, 0],
    "recall_share": [0.0, 0.3],
    "seq_length": [48, 32],
    "document_reset": [False, True],
    "matrix_tokens": [0, 3],  # steps
    "matrix_seq_length": [24, 40],
    "matrix_lr": [1e-2, 2e-2],
    "hidden_tokens": [0, 3],  # steps
    "hidden_lr": [1e-2, 2e-2],
    "skip_stage2": [False, True],
    "second_dataset_epochs": [1, 3],
    "length": ["steps", "epochs", "epochs, hint"],
    "batch_size": [2, 1],
    "grad_accumulation_steps": [1, 2],
    "optimizer": ["adamw", "adamw8bit", "muon"],
    "dtype": ["float32", "bfloat16", "float16"],
    "max_lr": [1e-2, 2e-2],
    "min_lr": [1e-4, 0.0],
    "warmup_ratio": [0.0, 0.5],
    "decay_ratio": [0.0, 0.5],
    "weight_decay": [0.0, 0.1],
    "grad_clip": [100.0, 0.1],
    "seed": [1, 2],
    "temperature": [1.0, 2.0],
    "kl_weight": [1.0, 0.0],
    "ce_weight": [0.0, 0.5],
    "layer_weight": [0.0, 1.0],
    "update_in_backward": [False, True],
    "gradient_checkpointing": ["none", "selective", "full"],
    "stop": ["signal within a stage", "kill within a stage", "kill at a stage's end"],
    "change": ["rates", "max_steps", "dtype", "freeze_mlp", "optimizer"],
}

SEVERAL = ["ddp", "fsdp", "host"]
# Each is refused in one line wherever all its factors have one of their values; `test_combinations.py` sees to it.
REFUSED: list[dict[str, list[Any]]] = [
    {"kl_weight": [0.0], "ce_weight": [0.0]},
    {"kl_weight": [0.0], "layer_weight": [1.0]},
    {"expand": [2], "student_model": ["distilled"]},
    {"expand": [1], "student_model": ["llamba"]},
    {"mixer": ["mamba2"], "student_model": ["llamba", "distilled"]},
    {"no_z_bias": [True], "student_model": ["llamba", "distilled"]},
    {"update_in_backward": [True], "grad_accumulation_steps": [2]},
    {"update_in_backward": [True], "way": SEVERAL},
    {"update_in_backward": [True], "dtype": ["float16"]},
    {"optimizer": ["muon"], "way": ["fsdp"]},
    {"way": ["host"], "layer_weight": [1.0]},
    {"way": ["host"], "matrix_tokens": [3]},
    {"way": ["host"], "hidden_tokens": [3]},
]
# Not refused, but without a meaning that could be tested.
MEANINGLESS: list[dict[str, list[Any]]] = [
    {"student_model": ["distilled"], "layers": ["-1", "auto:1"]},  # its layers are those that it has
    {"change": ["max_steps"], "length": ["epochs", "epochs, hint"]},  # which ignore it
    {
        "recall_share": [0.3],
        "length": ["epochs", "epochs, hint"],
    },  # a pass takes more steps: tests/text/test_mixture.py
    # the end of the only stage is that of the run
    {"stop": ["kill at a stage's end"], "skip_stage2": [True], "matrix_tokens": [0], "hidden_tokens": [0]},
]

# Flags that no factor is named after, and the factor that sets them.
SET_BY = {
    "epochs": "length",
    "epoch_step_hint": "length",
    "max_steps": "change",
    "second_dataset_tokens": "second_dataset_epochs",  # so that the stage's steps stay as many
}
EXEMPT = {
    "choice_tokens": "how much text auto:K measures on; tests/distill/test_layer_choice.py",
    "choice_dataset": "as choice_tokens",
    "choice_recall_share": "as choice_tokens",
    "dataset_name": "paths; tests/text/test_text_sources.py and test_documents.py read every kind",
    "dataset_subset": "as dataset_name",
    "dataset_split": "as dataset_name",
    "dataset_revision": "of the hub alone; tests/run/test_network_training.py",
    "dataset_text_field": "as dataset_name",
    "mix": "as dataset_name; tests/text/test_mixture.py",
    "second_mix": "as mix",
    "second_dataset_name": "as dataset_name",
    "second_dataset_subset": "as dataset_name",
    "second_dataset_split": "as dataset_name",
    "second_dataset_revision": "as dataset_revision",
    "second_dataset_text_field": "as dataset_name",
    "on_bad_data": "needs broken files; tests/text/test_documents.py",
    "teacher_fp8": "on new cards alone; tests/hardware/test_acceleration.py",
}


def violates(row: Row, rule: dict[str, list[Any]]) -> bool:
    """True where a row has every value of a rule."""
    return all(row[name] in values for name, values in rule.items())


def plain_row() -> Row:
    """Every factor at its plain value."""
    return {name: values[0] for name, values in FACTORS.items()}


def refused_rows() -> list[Row]:
    """For each rule of REFUSED a row that breaks it and no other."""
    rows = []
    for rule in REFUSED:
        row = plain_row() | {name: values[0] for name, values in rule.items()}
        for other in REFUSED:
            free = [name for name in other if name not in rule]
            if other is not rule and violates(row, other):
                row[free[0]] = next(value for value in FACTORS[free[0]] if value not in other[free[0]])
        assert [other for other in REFUSED if violates(row, other)] == [rule], rule
        rows.append(row)
    return rows


def covering_array(strength: int = 2) -> list[Row]:
    """Rows that hold every allowed combination of `strength` values; some seconds for pairs, minutes for triples."""
    from covertable import make

    rules = [_excluded(rule) for rule in REFUSED + MEANINGLESS]
    return make(FACTORS, strength=strength, constraints=rules, salt="e")  # of a few that were tried the shortest


def _excluded(rule: dict[str, list[Any]]) -> dict[str, Any]:
    parts = [{"operator": "in", "left": name, "values": values} for name, values in rule.items()]
    return {"operator": "not", "condition": {"operator": "and", "conditions": parts}}


def sample(seed: int, count: int) -> list[Row]:
    """`count` random rows that no rule excludes."""
    rng, rows = random.Random(seed), []
    while len(rows) < count:
        row = {name: rng.choice(values) for name, values in FACTORS.items()}
        if not any(violates(row, rule) for rule in REFUSED + MEANINGLESS):
            rows.append(row)
    return rows


def missing_pairs(rows: list[Row]) -> list[tuple[str, Any, str, Any]]:
    """Allowed pairs of values that stand in no row: counted here, not by what made the array."""
    missing = []
    for one, other in itertools.combinations(FACTORS, 2):
        found = {(row.get(one), row.get(other)) for row in rows}
        for pair in itertools.product(FACTORS[one], FACTORS[other]):
            both = dict(zip((one, other), pair))
            refused = any(rule.keys() <= both.keys() and violates(both, rule) for rule in REFUSED + MEANINGLESS)
            if pair not in found and not refused:
                missing.append((one, pair[0], other, pair[1]))
    return missing


def load() -> list[Row]:
    """The rows of `array.json`."""
    return json.loads(ARRAY.read_text())


if __name__ == "__main__":
    made = covering_array()
    ARRAY.write_text("[\n" + ",\n".join(json.dumps(row) for row in made) + "\n]\n")
    print(f"{len(made)} rows in {ARRAY}")
