"""From a row of the table to the flags of its runs, and the runs themselves."""

import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import runs
from helpers.combinations import warm
from helpers.combinations.pair import Pair
from helpers.combinations.table import SEVERAL, Row

CHANGED = {"max_lr": 3e-2, "min_lr": 1e-3, "decay_ratio": 0.25, "weight_decay": 20.0}  # `change: rates`
PLAIN = {"way": "alone", "grad_accumulation_steps": 1, "update_in_backward": False, "gradient_checkpointing": "none"}
NOT_FLAGS = ("way", "teacher_model", "length", "stop", "change")


@dataclass(frozen=True)
class Plan:
    """What a row's runs do: how many ranks, how many steps, and after which of them something happens."""

    row: Row
    stage_steps: dict[str, int]  # of a run that has every stage

    @property
    def ranks(self) -> int:
        return 2 if self.row["way"] in SEVERAL else 1

    @property
    def sequences_a_step(self) -> int:
        return self.row["batch_size"] * self.row["grad_accumulation_steps"] * self.ranks

    @property
    def steps(self) -> dict[str, int]:
        """Optimizer steps of each stage of the row, in their order."""
        row = self.row
        out = {"matrix": not row["matrix_tokens"], "hidden": not row["hidden_tokens"], "stage2": row["skip_stage2"]}
        return {name: steps for name, steps in self.stage_steps.items() if not out.get(name)}

    @property
    def longer(self) -> int:
        """Stage 1's steps where the forced resume asks for more."""
        return self.stage_steps["stage1"] + 2

    @property
    def stop_step(self) -> int:
        """After which optimizer step the run is interrupted: early or late, by its seed."""
        steps, early = list(self.steps.values()), self.row["seed"] == 1
        if self.row["stop"] == "kill at a stage's end":
            return steps[0] if early or len(steps) == 1 else sum(steps[:-1])
        return 2 if early else sum(steps[:-1]) + 1

    @property
    def change_step(self) -> int:
        """After which optimizer step a resume with a changed flag goes on: the middle of stage 1."""
        return self.steps.get("matrix", 0) + self.steps.get("hidden", 0) + self.stage_steps["stage1"] // 2

    @property
    def change(self) -> dict[str, Any]:
        """The flags that the forced resume changes."""
        row = self.row
        return {
            "rates": CHANGED,
            "max_steps": {"max_steps": self.longer},
            "dtype": {"dtype": "bfloat16" if row["dtype"] == "float32" else "float32"},
            "freeze_mlp": {"freeze_mlp": not row["freeze_mlp"]},
            "optimizer": {"optimizer": "adamw8bit" if row["optimizer"] == "adamw" else "adamw"},
        }[row["change"]]

    @property
    def could_be_plainer(self) -> bool:
        """True where the same steps can be taken on one rank, in one micro step, with nothing else in the way."""
        return any(self.row[name] != value for name, value in PLAIN.items())

    def plainly(self) -> Row:
        return self.row | PLAIN | {"batch_size": self.sequences_a_step}


def changes(plan: Plan, pair: Pair) -> dict[str, Any]:
    """A row as changes for `runs.flags`: every factor that is a flag, and what the others stand for."""
    row, steps, each = plan.row, plan.stage_steps, plan.sequences_a_step
    length, matrix_length = (pair.stretch * row[name] for name in ("seq_length", "matrix_seq_length"))
    chosen = {name: value for name, value in row.items() if name not in NOT_FLAGS}
    chosen |= {
        "student_model": pair.student(row["student_model"], row["teacher_model"]),
        "seq_length": length,
        "matrix_seq_length": matrix_length,
        "matrix_tokens": steps["matrix"] * each * matrix_length if row["matrix_tokens"] else 0,
        "hidden_tokens": steps["hidden"] * each * length if row["hidden_tokens"] else 0,
        "max_steps": steps["stage1"],
        "second_dataset_tokens": steps["stage2"] * each * length // row["second_dataset_epochs"],
        "choice_tokens": 4 * length,
        "eval_dataset": pair.sources["heldout"],
        "eval_tokens": 4 * length,
        "eval_interval": 1000,  # at the ends of stages alone
        "keep_checkpoints": 99,
        "save_minutes": 0,
        "diagnostics_interval": 0,
        **pair.flags,
    }
    if row["way"] != "alone":
        chosen["parallel"] = "fsdp" if row["way"] == "fsdp" else "ddp"
        chosen["teacher_device"] = "cpu" if row["way"] == "host" else None
    if row["length"] != "steps":
        chosen["epochs"] = 1
        chosen["dataset_name"] = pair.one_pass((steps["stage1"] - 1) * each + 1, length)
        chosen["epoch_step_hint"] = steps["stage1"] if "hint" in row["length"] else 0
        chosen["choice_recall_share"] = 0  # one pass has too few words to generate text from
    return chosen


def flags(plan: Plan, pair: Pair, output: Path, **more: Any) -> list[str]:
    """The command line of a run."""
    return runs.flags(pair.teacher(plan.row["teacher_model"]), pair.sources, output, **(changes(plan, pair) | more))


@dataclass
class Result:
    """What a row left behind: a folder and logs for each of its runs, and their exit statuses by rank.

    Runs: whole; stopped, resumed; changed (a forced resume); plain (the same batches in a plainer way).
    """

    plan: Plan
    folder: Path
    statuses: dict[str, list[int]] = field(default_factory=dict)

    def output(self, name: str) -> Path:
        return self.folder / name

    def saved(self, name: str, step: int) -> Path:
        """The checkpoint of a step; of the next one where a GPU's log line, and what it sets off, comes later."""
        steps = {int(folder.name.removeprefix("checkpoint-")) for folder in self.output(name).glob("checkpoint-*")}
        return self.output(name) / f"checkpoint-{min(saved for saved in steps if saved >= step)}"

    def log(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}.*log")))


class RowRuns:
    """The runs of a row."""

    def __init__(self, row: Row, pair: Pair, folder: Path):
        self.plan, self.pair = Plan(row, pair.stage_steps), pair
        self.result = Result(self.plan, folder)

    def run(self, name: str, *, output: str = "", at: Sequence[warm.At] = (), plan: Plan | None = None, **more: Any):
        plan = plan or self.plan
        argv = flags(plan, self.pair, self.result.output(output or name), **more)
        log = self.result.folder / f"{name}.log"
        self.result.statuses[name] = warm.train(argv, log, ranks=plan.ranks, at=at)

    def whole(self) -> None:
        """Saved after its first step, and where others go on, beside the ends of stages."""
        steps = {1, self.plan.stop_step, self.plan.change_step}
        self.run("whole", at=[after(step, signal.SIGUSR1) for step in steps])

    def resumed(self) -> None:
        if self.plan.row["stop"] == "signal within a stage":
            self.run("stopped", output="resumed", at=[after(self.plan.stop_step, signal.SIGTERM)])
        else:
            self.copy_as_killed(self.plan.stop_step, "resumed")
        self.run("resumed")

    def changed(self) -> None:
        self.copy_as_killed(self.plan.change_step, "changed")
        self.run("changed", resume_force=True, eval_dataset="", eval_interval=0, **self.plan.change)

    def plain(self) -> None:
        plan = Plan(self.plan.plainly(), self.plan.stage_steps)
        self.run("plain", plan=plan, eval_dataset="", eval_interval=0)

    def copy_as_killed(self, step: int, name: str) -> None:
        """The whole run's folder as a kill leaves it when the checkpoint of `step` was just written."""
        checkpoint, copy = self.result.saved("whole", step), self.result.output(name)
        copy.mkdir()
        shutil.copy(checkpoint.parent / "metrics.jsonl", copy)
        shutil.copytree(checkpoint, copy / checkpoint.name)


def run_row(row: Row, pair: Pair, folder: Path) -> Result:
    """All runs of a row, two at a time."""
    row_runs = RowRuns(row, pair, folder)
    plan = row_runs.plan
    changes(plan, pair)  # makes what is not there yet, before threads do
    alone: list[Callable[[], None]] = [row_runs.plain] if plan.could_be_plainer else []
    behind: list[Callable[[], None]] = [row_runs.changed]
    (alone if plan.row["stop"] == "signal within a stage" else behind).insert(0, row_runs.resumed)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(row_runs.whole)
        beside = [pool.submit(work) for work in alone]
        whole.result()
        if set(row_runs.result.statuses["whole"]) == {0}:
            beside += [pool.submit(work) for work in behind]
        for done in beside:
            done.result()
    return row_runs.result


def after(step: int, number: signal.Signals) -> warm.At:
    """A signal after an optimizer step: SIGUSR1 saves."""
    return rf"\bstep {step}, loss", number
