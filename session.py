"""A run's surroundings: where it stands, what it saves and resumes from, whom it tells.

`Session` binds the pieces that know files, flags and W&B (checkpoints, tracker, signals, clock) to the loop's
`Services`, so that `train.py` stays an outline and `trainer.py` knows nothing of them.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from arguments import UserError
from checkpoints import (
    CheckpointStore,
    changed_flags,
    read_metadata,
    read_trainer_state,
    rng_state,
    set_rng_state,
)
from model_utils import frozen_names
from run_control import SaveClock, StopSignals, mask_secrets
from stages import Models, total_steps
from text_sources import DataStreamLost
from trainer import Progress, Services, Stage, TooManyBadSteps
from utils import Tracker, format_line, library_versions

log = logging.getLogger(__name__)


class Session:
    """One run from its first step to its last, across as many processes as it takes."""

    def __init__(self, args: argparse.Namespace, signals: StopSignals):
        self.args, self.signals = args, signals
        self.output_dir = Path(args.output_dir)
        self.store = CheckpointStore(self.output_dir, keep=args.keep_checkpoints, log=log.warning)
        self.progress = Progress()
        self.clock = SaveClock(args.save_minutes)
        self.models: Models | None = None
        self.micro_steps_since_save = 0
        self.finished = False
        self.trainer_state: dict[str, Any] = {}
        self.resumed_from = self.store.resolve(args.resume)
        self.wandb_id: str | None = None
        if self.resumed_from is not None:
            self._read(self.resumed_from)
        self.tracker = Tracker(
            self.output_dir,
            wandb_enabled=args.wandb,
            config=mask_secrets(vars(args)),
            project=args.wandb_project,
            run_name=args.wandb_run_name,
            entity=args.wandb_entity,
            mode=args.wandb_mode,
            run_id=self.wandb_id,
        )
        if self.resumed_from is not None:
            self.tracker.truncate_after(self.progress.optimizer_step)

    def _read(self, folder: Path) -> None:
        metadata = read_metadata(folder)
        changed = changed_flags(metadata["flags"], vars(self.args))
        if changed and not self.args.resume_force:
            raise UserError(
                f"--resume {folder.name}: these flags differ from the checkpoint's: {'; '.join(changed)} "
                "(--resume_force goes on all the same, --resume none starts anew in another --output_dir)"
            )
        self.finished = metadata.get("finished", False)
        self.wandb_id = metadata.get("wandb_run_id")
        if self.finished:
            return
        self.trainer_state = read_trainer_state(folder)
        self.progress = Progress(**metadata["progress"], loader=self.trainer_state["loader"])
        log.info("resuming from %s: %s, optimizer step %d", folder, self.progress.stage, self.progress.optimizer_step)

    @property
    def student_source(self) -> str:
        """Where the student's weights come from: the checkpoint to resume from, else `--student_model`."""
        return str(self.resumed_from) if self.resumed_from is not None else self.args.student_model

    def stages_left(self, names: list[str]) -> list[str]:
        """The stages still to run, the interrupted one first."""
        if not self.progress.stage:
            return names
        if self.progress.stage not in names:
            raise UserError(f"--resume: the checkpoint stands in {self.progress.stage}, which the flags leave out")
        return names[names.index(self.progress.stage) + self.progress.stage_done :]

    def total_steps(self, name: str, tokenizer: Any) -> int:
        """Optimizer steps of a stage; an interrupted stage keeps the number that it began with."""
        if self.progress.stage == name and self.trainer_state:
            return self.progress.stage_total
        return total_steps(self.args, name, tokenizer)

    def enter(self, stage: Stage) -> None:
        """Begin a stage anew, or put an interrupted one back where it stood."""
        if self.progress.stage != stage.name or not self.trainer_state:
            self.progress.begin(stage.name, stage.total_steps)
            self._align(stage)
            self.tracker.mark_stage(stage.name, self.progress.optimizer_step)
            return
        state, self.trainer_state = self.trainer_state, {}
        stage.optimizer.load_state_dict(state["optimizer"])
        stage.schedule.load_state_dict(state["schedule"])
        if stage.scaler is not None:
            stage.scaler.load_state_dict(state["scaler"])
        if self.progress.loader:
            stage.loader.load_state_dict(self.progress.loader)
        self._restore_weights(state["weights"])
        set_rng_state(state["rng"])

    def _align(self, stage: Stage) -> None:
        """`--resume_step`: log and schedule start there; weights, optimizer and data do not."""
        if self.args.resume_step and self.resumed_from is None and self.progress.optimizer_step == 0:
            self.progress.optimizer_step = self.progress.stage_step = self.args.resume_step
            for _ in range(self.args.resume_step):
                stage.schedule.step()
            log.warning("--resume_step aligns the log and the schedule only; data starts anew")

    def services(self) -> Services:
        args = self.args
        return Services(
            log_metrics=self.log_metrics,
            save=self.save,
            save_due=self.save_due,
            stop_requested=lambda: self.signals.stop_requested,
            save_requested=self.signals.take_save_request,
            log_interval=args.log_interval,
            max_bad_steps=args.max_bad_steps,
            save_before_raising=(TooManyBadSteps, DataStreamLost),
        )

    def log_metrics(self, progress: Progress, figures: dict[str, Any]) -> None:
        if "train/loss" in figures:
            log.info(format_line(figures))
        self.tracker.log(figures, step=progress.optimizer_step)

    def save_due(self, progress: Progress, micro_steps: int) -> bool:
        """True when `--save_interval` micro steps or `--save_minutes` have passed since the last save."""
        self.micro_steps_since_save += micro_steps
        return self.micro_steps_since_save >= self.args.save_interval or self.clock.due()

    def save(self, progress: Progress, stage: Stage) -> bool:
        """Write `checkpoint-<step>`: whole state, so that a resumed run equals one never interrupted."""
        self.micro_steps_since_save = 0
        self.clock.restart()
        return self._write(f"checkpoint-{progress.optimizer_step}", self._trainer_state(stage), finished=False)

    def save_final(self) -> bool:
        """Write `final`: the student alone, to be used, not resumed."""
        return self._write("final", {}, finished=True)

    def _write(self, name: str, state: dict[str, Any], *, finished: bool) -> bool:
        assert self.models is not None
        progress = self.progress.as_dict()
        progress.pop("loader")
        metadata = {
            "progress": progress,
            "finished": finished,
            "flags": mask_secrets(vars(self.args)),
            "versions": library_versions(),
            "wandb_run_id": self.tracker.run_id,
        }
        return self.store.save(
            name,
            model=self.models.student,
            tokenizer=self.models.tokenizer,
            trainer_state=state,
            metadata=metadata,
            frozen=frozen_names(self.models.student),
            dtype=self.models.dtype,
        )

    def _trainer_state(self, stage: Stage) -> dict[str, Any]:
        return {
            "optimizer": stage.optimizer.state_dict(),
            "schedule": stage.schedule.state_dict(),
            "scaler": stage.scaler.state_dict() if stage.scaler is not None else None,
            "loader": self.progress.loader,
            "rng": rng_state(),
            "weights": self._exact_weights(),
        }

    def _exact_weights(self) -> dict[str, torch.Tensor]:
        """Trainable parameters that `model.safetensors` rounds to `--dtype` (float16 keeps float32 parameters)."""
        assert self.models is not None
        named = self.models.student.named_parameters()
        return {n: p.detach() for n, p in named if p.requires_grad and p.dtype != self.models.dtype}

    @torch.no_grad()
    def _restore_weights(self, weights: dict[str, torch.Tensor]) -> None:
        assert self.models is not None
        named = dict(self.models.student.named_parameters())
        for name, value in weights.items():
            named[name].copy_(value)

    def close(self) -> None:
        """Wait for the checkpoint in flight and close the tracker."""
        self.store.wait()
        self.tracker.close()
