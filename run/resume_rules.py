"""Which flags a resumed run may change, and what a change does: the one table behind behaviour, errors and docs.

`python -m run.resume_rules` prints it as docs/resuming.md has it. A flag that is not in `RULES` changes nothing of
the result and may always change (`arguments.FREE_FLAGS`).
"""

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["length", "forced", "before", "never"]
STAGES = ("matrix", "hidden", "stage1", "stage2")
PRETRAINING_TEXT, KD = STAGES[:3], STAGES[2:]


@dataclass(frozen=True)
class Rule:
    """How a flag may change on resume.

    length: freely as long as the run only becomes longer, else with --resume_force; forced: with --resume_force;
    before: with --resume_force, until a stage that uses it is under way; never: not at all.
    """

    kind: Kind
    effect: str  # of a change; for "never" the reason
    stages: tuple[str, ...] = STAGES  # that use the flag


RULES: dict[str, Rule] = {
    "teacher_model": Rule("forced", "teaches from the next step on; layers copied from the old one stay"),
    "student_model": Rule("never", "the student is the checkpoint's"),
    "layers": Rule("never", "the student's layers are the checkpoint's"),
    "expand": Rule("never", "the student's sizes are the checkpoint's"),
    "mixer": Rule("never", "the student's mixers are the checkpoint's"),
    "no_z_bias": Rule("never", "the student's mixers are the checkpoint's"),
    "choice_dataset": Rule("never", "the layers are chosen"),
    "choice_recall_share": Rule("never", "the layers are chosen"),
    "choice_tokens": Rule("never", "the layers are chosen"),
    "freeze_mlp": Rule("forced", "optimizer state dropped for what is frozen, fresh for what is thawed"),
    "freeze_replaced_layers": Rule("forced", "as --freeze_mlp"),
    "freeze_embeddings": Rule("forced", "as --freeze_mlp"),
    "attn_implementation": Rule("forced", "from the next step on"),
    "dataset_name": Rule("forced", "another place of the same files; other text before it is read", PRETRAINING_TEXT),
    "dataset_subset": Rule("forced", "as --dataset_name", PRETRAINING_TEXT),
    "dataset_split": Rule("forced", "as --dataset_name", PRETRAINING_TEXT),
    "dataset_revision": Rule("forced", "as --dataset_name", PRETRAINING_TEXT),
    "dataset_text_field": Rule("before", "other text", PRETRAINING_TEXT),
    "mix": Rule("forced", "from the next sequence on; a source that stays goes on where it was", PRETRAINING_TEXT),
    "recall_share": Rule("forced", "as --mix"),
    "no_dataset_streaming": Rule("before", "another order of the text", PRETRAINING_TEXT),
    "shuffle_buffer": Rule("before", "another order of the text"),
    "seed": Rule("before", "another order of the text"),
    "seq_length": Rule("forced", "from the next token on; a stage measured in tokens keeps their number"),
    "document_reset": Rule("forced", "from the next batch on"),
    "on_bad_data": Rule("forced", "from the next row on"),
    "second_dataset_name": Rule("forced", "as --dataset_name", ("stage2",)),
    "skip_stage2": Rule("length", "stage 2 is added or left out", ("stage2",)),
    "second_dataset_epochs": Rule("length", "a longer or shorter stage", ("stage2",)),
    "second_dataset_tokens": Rule("length", "a longer or shorter stage", ("stage2",)),
    "second_dataset_text_field": Rule("before", "other text", ("stage2",)),
    "second_mix": Rule("forced", "as --mix", ("stage2",)),
    "second_dataset_subset": Rule("forced", "as --dataset_name", ("stage2",)),
    "second_dataset_split": Rule("forced", "as --dataset_name", ("stage2",)),
    "second_dataset_revision": Rule("forced", "as --dataset_name", ("stage2",)),
    "max_steps": Rule("length", "a longer or shorter stage", ("stage1",)),
    "epochs": Rule("length", "a longer or shorter stage", ("stage1",)),
    "epoch_step_hint": Rule("forced", "another length of the schedule", ("stage1",)),
    "batch_size": Rule("forced", "from the next batch on; a stage measured in tokens keeps their number"),
    "grad_accumulation_steps": Rule("forced", "as --batch_size"),
    "optimizer": Rule("forced", "the new one starts with fresh state"),
    "max_lr": Rule("forced", "the schedule's rate from the next step on", KD),
    "min_lr": Rule("forced", "as --max_lr"),
    "warmup_ratio": Rule("forced", "as --max_lr"),
    "decay_ratio": Rule("forced", "as --max_lr; on a finished run a second cooldown from the stable checkpoint"),
    "weight_decay": Rule("forced", "from the next step on"),
    "grad_clip": Rule("forced", "from the next step on"),
    "temperature": Rule("forced", "from the next step on", KD),
    "kl_weight": Rule("forced", "from the next step on", KD),
    "ce_weight": Rule("forced", "from the next step on", KD),
    "layer_weight": Rule("forced", "from the next step on", KD),
    "matrix_tokens": Rule("length", "a longer or shorter stage", ("matrix",)),
    "matrix_seq_length": Rule("forced", "as --seq_length", ("matrix",)),
    "matrix_lr": Rule("forced", "as --max_lr", ("matrix",)),
    "hidden_tokens": Rule("length", "a longer or shorter stage", ("hidden",)),
    "hidden_lr": Rule("forced", "as --max_lr", ("hidden",)),
    "dtype": Rule("forced", "masters are joined when it widens; weights are rounded when it narrows"),
    "update_in_backward": Rule("forced", "from the next step on"),
    "teacher_fp8": Rule("forced", "from the next step on"),
}  # fmt: skip

UNKNOWN = Rule("never", "no rule says what a change would do")
LENGTH_FLAGS = frozenset(name for name, rule in RULES.items() if rule.kind == "length")
COOLDOWN_FLAGS = frozenset({"decay_ratio", "min_lr"})  # of no effect on the steps before a cooldown


def markdown_table() -> str:
    """The rules as a table."""
    kinds = {
        "length": "longer: freely; shorter: by force",
        "forced": "by force",
        "before": "by force, before its stage begins",
        "never": "no",
    }
    rows = [f"| `--{name}` | {kinds[rule.kind]} | {_marked(rule.effect)} |" for name, rule in RULES.items()]
    return "\n".join(["| flag | may change | what a change does |", "| --- | --- | --- |", *rows])


def _marked(effect: str) -> str:
    return re.sub(r"--\w+", lambda found: f"`{found[0]}`", effect)


if __name__ == "__main__":
    print(markdown_table())
