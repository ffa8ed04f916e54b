"""Put a checkpoint back: progress, weights, optimizer, loss scale, position in the text, random generators."""

import logging
from dataclasses import replace
from typing import Any

import torch

from arguments import Arguments
from checkpoints.run_state import read_metadata, read_trainer_state, set_rng_state
from hardware.parallel import copy_rows, is_sharded
from hardware.ranks import Ranks
from loop.forms import Progress, Stage
from models import LlambaForCausalLM
from optim.saved_state import join_saved_masters, load_optimizer_state, own_memory
from optim.schedule import Phases
from optim.stretch import last_step
from run.plan import sequences_a_step, stage_lengths
from run.resume import Standing, Start
from run.resumed_schedule import resumed_schedule
from run.student_flags import keep_flags
from run.text import RunText
from utils import UserError

log = logging.getLogger(__name__)


class Resumption:
    """The checkpoint that a run goes on from; `state` is let go once it has been put back."""

    def __init__(self, start: Start, args: Arguments, ranks: Ranks):
        """Reads where the checkpoint stands and says what is changed; a finished one has nothing to put back."""
        self.start, self.args, self.ranks = start, args, ranks
        self.standing = Standing(start.folder, read_metadata(start.folder))
        self.changed = {change.name for change in start.changes}
        self.state: dict[str, Any] = {}
        self._schedule: tuple[Phases, list[list[int]]] | None = None
        self.progress = Progress()
        keep_flags(args, self.standing.flags)
        if not start.finished:
            self.state = read_trainer_state(start.folder)
            self.progress = replace(self.standing.progress, loader=self.state["loader"])
            self.progress.stage_done = self.progress.stage_done and not start.lengthens
            self._tell()
        self.interrupted = "" if start.finished or self.progress.stage_done else self.progress.stage
        self.done = self.progress.stage_step if self.interrupted else 0

    def _tell(self) -> None:
        for change in self.start.changes:
            log.info("changed from here on: %s (%s)", change, change.rule.effect)
        for change in self.start.even:
            log.info("changed from here on: %s (a step takes as many sequences)", change)
        before, now = self.standing.sequences_a_step, sequences_a_step(vars(self.args), self.ranks.world_size)
        if before != now:
            log.warning(
                "an optimizer step takes %d sequences from here on, not %d as before; no sequence is lost or "
                "repeated (--grad_accumulation_steps can keep their number when that of the ranks changes)",
                now, before,
            )  # fmt: skip
        stage, step = self.progress.stage, self.progress.optimizer_step
        log.info("resuming %s: %s, step %d", self.start.folder, stage, step)

    def schedule(self, text: RunText) -> tuple[Phases, list[list[int]]]:
        """The steps of the interrupted stage, and their stretches, worked out once."""
        if self._schedule is None:
            share, keeps_warmup = self.progress.loader.get("share"), "warmup_ratio" not in self.changed
            self._schedule = resumed_schedule(self.standing, text, share, keeps_warmup=keeps_warmup)
        return self._schedule

    def check(self, loaders: dict[str, Any], text: RunText) -> None:
        """Raise a `UserError` where the interrupted stage cannot go on: with other text, or with no step left."""
        name, done = self.interrupted, self.done
        if name not in loaders:
            return
        if self.progress.loader:
            loaders[name].load_state_dict(self.progress.loader)
        phases, stretches = self.schedule(text)
        by_passes = stage_lengths(vars(self.args))[name][0] == "epochs"  # then the text ends it, whatever was planned
        telling = self.changed & {"epochs", "epoch_step_hint"} if by_passes else self.changed
        if telling and done >= phases.total:
            raise UserError(
                f"--resume: with {', '.join(f'--{flag}' for flag in sorted(self.changed))} changed {name} has "
                f"{phases.total} steps, and the run stands at its step {done} already; ask for more, or start anew "
                "with another --output_dir"
            )
        stable_end = last_step(phases.stable_end, phases.total, stretches)
        if self.changed and not self.progress.stage_cooled and done > stable_end:
            log.warning(
                "%s: the learning rate falls at once, since its cooldown of %d steps has begun before step %d; in a "
                "longer stage it would begin later", name, phases.cooldown, done,
            )  # fmt: skip

    def put_back(self, stage: Stage, student: LlambaForCausalLM) -> None:
        """Weights, optimizer, loss scale, text and random generators as they were, onto the first stage that runs.

        At the end of the stage before it only weights (a file may hold them rounded, in a narrower --dtype too) and
        random generators are.
        """
        state, self.state = self.state, {}
        if not state:
            return
        restore_weights(student, state["weights"])
        join_saved_masters(student, state["optimizer"])
        set_rng_state(state["rng"])
        if stage.name != self.interrupted:
            return
        flags, args = self.standing.flags, self.args
        if flags["optimizer"] != args.optimizer:
            log.warning("%s starts with fresh state; that of %s is dropped", args.optimizer, flags["optimizer"])
        load_optimizer_state(
            stage.optimizer,
            state["optimizer"],
            student,
            same_kind=flags["optimizer"] == args.optimizer,
            same_dtype=flags["dtype"] == args.dtype,
            sharded=is_sharded(stage.trainable),
        )
        if stage.scaler is not None and state["scaler"] is not None:
            stage.scaler.load_state_dict(state["scaler"])
        if self.progress.loader:
            stage.loader.load_state_dict(self.progress.loader)


@torch.no_grad()
def restore_weights(student: LlambaForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    """Write whole tensors into a student's parameters, or each rank's rows of them into its shards."""
    named = dict(student.named_parameters())
    for name, value in weights.items():
        own_memory(named[name])
        copy_rows(named[name], value)
