"""Where a run goes on: from which checkpoint, and whether the flags allow it.

A checkpoint is on the path of a plan (the stages that the flags ask for, with their lengths) if a run planned so from
the start, with the same number of warm-up steps, would have come through it. The newest checkpoint mostly is. If a
stage is to become longer whose cooldown has begun, it is not, and the run goes back to the last one that is: by
construction `stable-<stage>`, the state at the end of the stable phase.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from arguments import RESULT_FLAGS, build_parser, is_given
from checkpoints.files import TRAINER_STATE, damage
from checkpoints.origins import flags_as_made
from checkpoints.run_folder import CHECKPOINT
from checkpoints.run_state import read_metadata
from loop.forms import Progress
from optim.schedule import Phases
from run.plan import Length, sequences_a_step, stage_lengths
from run.resume_rules import COOLDOWN_FLAGS, LENGTH_FLAGS, RULES, STAGES, UNKNOWN, Rule
from run.student_flags import STUDENT_FLAGS, named_layers
from utils import UserError, auto_layers, mask_secrets

log = logging.getLogger(__name__)

Flags = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """A flag that differs from a checkpoint's."""

    name: str
    before: Any
    after: Any
    grows: bool  # by it the run only becomes longer

    @property
    def rule(self) -> Rule:
        return RULES.get(self.name, UNKNOWN)

    def __str__(self) -> str:
        return f"--{self.name} was {_shown(self.before)} and is {_shown(self.after)}"


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "''" if value == "" else str(value)


@dataclass(frozen=True)
class Standing:
    """A checkpoint: with which flags it was made, and where it stands."""

    folder: Path
    metadata: dict[str, Any]

    @cached_property
    def flags(self) -> Flags:
        """Those that it does not know yet were at their defaults."""
        return with_defaults(flags_as_made(self.metadata))

    @property
    def finished(self) -> bool:
        return self.metadata.get("finished", False)

    @property
    def ranks(self) -> int:
        return self.metadata.get("ranks", 1)

    @property
    def sequences_a_step(self) -> int:
        return sequences_a_step(self.flags, self.ranks)

    @cached_property
    def progress(self) -> Progress:
        """Without the loader's state. What older checkpoints do not say is worked out from their flags."""
        known = dict(self.metadata["progress"])
        if "stage_warmup" not in known:
            phases = Phases.of(known["stage_total"], self.flags["warmup_ratio"], self.flags["decay_ratio"])
            known["stage_warmup"] = phases.warmup
            known["stage_cooled"] = max(0, known["stage_step"] - phases.stable_end)
        return Progress(**known)

    @property
    def has_cooled(self) -> bool:
        """True from the first step of the cooldown on: no longer stage comes through here."""
        return self.progress.stage_cooled > 0

    def warmup_is_bounded(self, flags: Flags) -> bool:
        """True where `--min_lr` lifts steps of its stage's warm-up."""
        stage, warmup = self.progress.stage, self.progress.stage_warmup
        return flags["min_lr"] * warmup > flags[f"{stage}_lr" if stage in ("matrix", "hidden") else "max_lr"]


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run resumes from, and the flags that differ from its own."""

    folder: Path
    finished: bool = False  # there is nothing to do
    lengthens: bool = False  # goes on in its stage even if that had ended
    changes: tuple[Change, ...] = ()
    even: tuple[Change, ...] = ()  # that cancel out


def with_defaults(flags: Flags) -> Flags:
    """Flags, with those that a checkpoint does not know yet at their defaults."""
    return {**mask_secrets(vars(build_parser().parse_args([]))), **flags}


def is_longer(before: Length | None, after: Length | None) -> bool:
    """True if a stage is added or becomes longer; of another unit, it counts as longer."""
    if before is None or after is None:
        return before is None and after is not None
    return after[1] > before[1] if after[0] == before[0] else True


def changed_flags(saved: Flags, current: Flags, *, layers: list[int] | None = None) -> list[Change]:
    """Flags that change the result or the length, and differ, by name; `layers` are the student's own.

    A flag that a checkpoint does not know yet was at its default. Flags of stages that neither run has are passed
    over, and those of a stage that is added only make the run longer.
    """
    masked, saved = mask_secrets(current), with_defaults(saved)
    names = sorted(RESULT_FLAGS & current.keys())
    before, after = stage_lengths(saved), stage_lengths(masked)
    changes = []
    for name in names:
        used = [stage for stage in RULES.get(name, UNKNOWN).stages if stage in before or stage in after]
        if not used or saved[name] == masked[name] or _means_the_same(name, saved, current, layers):
            continue
        added = all(stage not in before for stage in used)
        lengthens = name in LENGTH_FLAGS and all(
            stage in after and before[stage][0] == after[stage][0] and before[stage][1] <= after[stage][1]
            for stage in used
            if stage in before
        )
        changes.append(Change(name, saved[name], masked[name], added or lengthens))
    return changes


def _means_the_same(name: str, saved: Flags, current: Flags, layers: list[int] | None) -> bool:
    """True where another value changes nothing: a length that is not used, layers that are not given or the same."""
    if name in STUDENT_FLAGS and not is_given(current[name]):
        return True
    if name == "layers":
        return layers is not None and named_layers(current[name]) == set(layers)
    if name.startswith("choice_"):
        return auto_layers(saved["layers"]) is None
    if name == "max_steps":
        return bool(saved["epochs"] and current["epochs"])
    if name == "epoch_step_hint":
        return not (saved["epochs"] or current["epochs"])
    return False


def choose_start(newest: Path, current: Flags, *, world_size: int, force: bool) -> Start:
    """What a run with the flags `current` goes on from, given the checkpoint that `--resume` stands for.

    Raises `UserError`, in one line, for flags that may not change or need --resume_force, and where no checkpoint is
    left that a longer run could come through.
    """
    return _Choice(Standing(newest, read_metadata(newest)), current, world_size, force).start()


class _Choice:
    """The newest checkpoint, the plan that the flags ask for, and what differs."""

    def __init__(self, newest: Standing, current: Flags, world_size: int, force: bool):
        self.newest, self.current, self.world_size, self.force = newest, current, world_size, force
        self.changes, self.even = self._changes(newest)
        self.plan, self.before = stage_lengths(current), stage_lengths(newest.flags)
        self.longer = [stage for stage in self.plan if is_longer(self.before.get(stage), self.plan[stage])]
        later = STAGES[STAGES.index(newest.progress.stage) + 1 :]
        is_last = not any(stage in self.before or stage in self.plan for stage in later)
        self.is_over = newest.finished or (newest.progress.stage_done and is_last)
        cooled = newest.progress.stage_cooled > 0  # a pass may end before
        self.cools_again = self.is_over and cooled and any(c.name in COOLDOWN_FLAGS for c in self.changes)

    def _changes(self, standing: Standing) -> tuple[list[Change], list[Change]]:
        """What differs, and what differs but cancels out: as many sequences a step in other batches."""
        same = standing.sequences_a_step == sequences_a_step(self.current, self.world_size)
        even = ("batch_size", "grad_accumulation_steps") if same else ()
        found = changed_flags(standing.flags, self.current, layers=standing.metadata.get("attention_layers"))
        return [c for c in found if c.name not in even], [c for c in found if c.name in even]

    def start(self) -> Start:
        newest = self.newest
        self._refuse([change for change in self.changes if change.rule.kind == "never"])
        if not self.changes:
            return Start(newest.folder, newest.finished, even=tuple(self.even))
        if self.is_over and not self.longer and not self.cools_again:
            raise UserError(
                f"--resume: {newest.folder} was made with other flags: {self._listed()}; its run is finished and has "
                "no step left for them: ask for a longer stage as well, with --resume_force, or start anew with "
                "another --output_dir"
            )
        chosen = newest if self._is_on_path(newest) else self._found()
        if chosen.progress.stage not in self.plan:
            raise UserError(f"--resume: {chosen.folder} stands in {chosen.progress.stage}, which the flags leave out")
        self._check_stages(chosen.progress)
        if not self.force and not all(change.grows for change in self.changes):
            raise UserError(
                f"--resume: {newest.folder} was made with other flags: {self._listed()} "
                "(--resume_force goes on all the same; a new --output_dir starts anew)"
            )
        if chosen is not newest:
            log.info(
                "%s: up to here a run planned so would have been the same, so it goes on from here", chosen.folder
            )
        stage = chosen.progress.stage
        again = (self.cools_again or self.longer) and any(change.name == "min_lr" for change in self.changes)
        if again and any(chosen.warmup_is_bounded(flags) for flags in (chosen.flags, self.current)):
            log.warning("%s: --min_lr bounds its warm-up, which in a run planned so would differ", chosen.folder)
        lengthens = is_longer(stage_lengths(chosen.flags)[stage], self.plan[stage])
        return Start(chosen.folder, lengthens=lengthens, changes=tuple(self.changes), even=tuple(self.even))

    def _listed(self) -> str:
        return "; ".join(map(str, self.changes))

    def _is_on_path(self, standing: Standing) -> bool:
        """True if a run with this plan comes through a checkpoint that can be resumed.

        What was changed by force before it, or is now, need not be the same; what the flags of the newest
        checkpoint and of now agree on must be.
        """
        own, stage = stage_lengths(standing.flags), standing.progress.stage
        if standing.finished or stage not in self.plan or not (standing.folder / TRAINER_STATE).is_file():
            return False
        before = STAGES[: STAGES.index(stage)]
        if any(is_longer(own.get(name), self.plan.get(name)) for name in before):
            return False
        if standing is not self.newest and not self._agrees(standing):
            return False
        lengthened = is_longer(own[stage], self.plan[stage]) or (self.cools_again and stage == [*self.plan][-1])
        return not (lengthened and standing.has_cooled)

    def _agrees(self, standing: Standing) -> bool:
        """True if an older checkpoint differs from the plan in nothing that the newest does not differ in."""
        allowed = {change.name for change in self.changes} | LENGTH_FLAGS
        if not standing.has_cooled:
            allowed |= COOLDOWN_FLAGS
        own, stage = stage_lengths(standing.flags), standing.progress.stage
        before = STAGES[: STAGES.index(stage)]
        same_stages = all(own.get(name) == self.plan.get(name) for name in before)
        return same_stages and {change.name for change in self._changes(standing)[0]} <= allowed

    def _found(self) -> Standing:
        """The checkpoint that shares most with the plan; by force one that has cooled down, if there is no other."""
        siblings = _siblings(self.newest.folder)
        for standing in siblings:
            if self._is_on_path(standing) and damage(standing.folder) is None:
                return standing
        stage = next((name for name in self.longer if name in self.before), self.newest.progress.stage)
        cooled = [s for s in (self.newest, *siblings) if s.progress.stage == stage and not s.finished]
        cooled = [standing for standing in cooled if self._agrees(standing)]
        if self.force and self.longer and cooled:
            log.warning("%s has cooled down: its learning rate rises again from here", cooled[0].folder)
            return cooled[0]
        first = next((name for name in self.longer if name not in self.before), stage)
        if STAGES.index(first) < STAGES.index(stage):
            raise UserError(
                f"--resume: {self._listed()}, but {first} comes before {stage}, which has begun; another "
                "--output_dir starts anew"
            )
        forced = "--resume_force goes on from its cooled-down weights, " if cooled and self.longer else ""
        raise UserError(
            f"--resume: {self._listed()}, but the run is past that point of {stage}, and "
            f"{self.newest.folder.absolute().parent} holds no checkpoint from before it (stable-{stage}, unless "
            f"--no_stable_checkpoint was given); {forced}another --output_dir starts anew"
        )

    def _check_stages(self, progress: Progress) -> None:
        """Refuse flags of stages that are over, and those that a stage under way cannot change."""
        over = STAGES[: STAGES.index(progress.stage)]
        if progress.stage_done and progress.stage not in self.longer:
            over = (*over, progress.stage)
        for change in self.changes:
            used = [stage for stage in change.rule.stages if stage in self.before or stage in self.plan]
            if all(stage in over for stage in used):
                raise UserError(
                    f"--resume: {change}, but {' and '.join(used)}, which alone {'use' if used[1:] else 'uses'} it, "
                    f"{'are' if used[1:] else 'is'} over; give the old value, or start anew with another --output_dir"
                )
        running = () if progress.stage_done or not progress.stage_step else (progress.stage,)
        under_way = [c for c in self.changes if c.rule.kind == "before" and set(running) & set(c.rule.stages)]
        self._refuse(under_way)

    def _refuse(self, changes: list[Change]) -> None:
        if changes:
            listed = "; ".join(f"{change} ({change.rule.effect})" for change in changes)
            raise UserError(
                f"--resume: {listed}: this may not change in a run, with --resume_force neither; give the old value, "
                "or start anew with another --output_dir"
            )


def _siblings(folder: Path) -> list[Standing]:
    """The checkpoints beside one that can be read, those that have come furthest first."""
    found = []
    for path in folder.absolute().parent.iterdir():
        if CHECKPOINT.fullmatch(path.name) and damage(path, hashes=False) is None:
            found.append(Standing(path, read_metadata(path)))
    return sorted(found, key=lambda standing: -standing.progress.optimizer_step)
