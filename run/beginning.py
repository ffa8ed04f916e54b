"""Before a run has its models: the folder that it writes to, where it stands there, and whom it tells."""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arguments import Arguments
from checkpoints.lock import RunLock
from checkpoints.origins import Origins
from checkpoints.store import CheckpointStore
from evaluation.diagnostics import PROMPTS
from hardware.ranks import RankFailed, RankLost, Ranks, SharedMistake
from loop.forms import Progress
from optim.schedule import Phases
from run.flag_checks import read_prompts
from run.resume import Start, choose_start
from run.resumption import Resumption
from run.text import RunText
from run.tracking import Tracker
from utils import UserError

log = logging.getLogger(__name__)


class Beginning:
    """Where a run stands when it begins: anew, or where a checkpoint stood; its folder and its tracker."""

    def __init__(self, args: Arguments, ranks: Ranks, lock: RunLock):
        self.args, self.ranks, self.lock = args, ranks, lock
        self.output_dir = Path(args.output_dir)
        self.store = CheckpointStore(
            self.output_dir, keep=args.keep_checkpoints, log=log.warning, held=lock.held, writes=not args.dry_run
        )
        self.progress = Progress()
        start = ranks.first(self._choose_start)
        self.finished = start is not None and start.finished
        self.resumed = Resumption(start, args, ranks) if start is not None else None
        self.origins = Origins()
        if self.resumed is not None:
            self.progress = self.resumed.progress
            metadata = self.resumed.standing.metadata
            self.origins = Origins.recorded(metadata, vars(args), self.resumed.state.get("loader"))
        self.prompts = read_prompts(args.sample_prompts) if args.sample_prompts else PROMPTS
        self.later_steps: Callable[[str], float] = lambda stage: 0.0  # see Forecast.later_steps
        self.status = 0  # the run's exit status, as far as is known
        self.tracker = Tracker(self.output_dir, main_process=ranks.is_first and not args.dry_run, held=lock.held)
        if self.resumed is not None:
            self.tracker.wandb_id = self.resumed.standing.metadata.get("wandb_run_id")
        if not self.finished:
            self.tracker.truncate_after(self.progress.optimizer_step if self.resumed else -1)

    def _choose_start(self) -> Start | None:
        folder = self.store.resolve(self.args.resume)
        if folder is None:
            return None
        force = self.args.resume_force
        return choose_start(folder, vars(self.args), world_size=self.ranks.world_size, force=force)

    @property
    def student_source(self) -> str:
        """Where the student's weights come from: the checkpoint to resume from, else `--student_model`."""
        return str(self.resumed.start.folder) if self.resumed is not None else self.args.student_model

    def stages_left(self, names: list[str]) -> list[str]:
        """The stages still to run, the interrupted one first."""
        if not self.progress.stage:
            return names
        if self.progress.stage not in names:
            raise UserError(f"--resume: the checkpoint stands in {self.progress.stage}, which the flags leave out")
        return names[names.index(self.progress.stage) + self.progress.stage_done :]

    def steps_done(self, name: str) -> int:
        """Optimizer steps of a stage that were taken before."""
        return self.resumed.done if self.resumed is not None and name == self.resumed.interrupted else 0

    def schedule(self, name: str, text: RunText) -> tuple[Phases, list[list[int]]]:
        """The optimizer steps of a stage, of its warm-up and cooldown, and how they are stretched."""
        if self.resumed is not None and name == self.resumed.interrupted:
            return self.resumed.schedule(text)
        return Phases.of(text.total_steps(name), self.args.warmup_ratio, self.args.decay_ratio), []

    def check_position(self, loaders: dict[str, Any], text: RunText) -> None:
        """Raise a `UserError` where a resumed stage cannot go on, before any model is loaded."""
        if self.resumed is not None:
            self.resumed.check(loaders, text)

    def leave_together(self) -> None:
        """Once all ranks have come to an end: wait for the checkpoint that the first may still be writing."""
        self.store.wait()
        with contextlib.suppress(RankLost, RankFailed, SharedMistake):
            self.ranks.agree()

    def close(self) -> None:
        """Wait for the checkpoint in flight and close the tracker."""
        self.store.wait()
        self.tracker.close(self.status)
