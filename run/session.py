"""A run with its models: what its stages begin with, and what the loop calls.

`train.py` stays an outline, and `trainer.py` knows nothing of files, flags and W&B: `run/beginning.py` knows where
the run stands, `run/saving.py` writes, `run/telling.py` tells.
"""

import logging

from hardware.ranks import RankFailed, SharedMistake
from hub.hub_files import DataStreamLost
from loop.forms import Stage
from loop.meter import TooManyBadSteps
from run.beginning import Beginning
from run.pair import Models
from run.saving import Saving
from run.signals import StopSignals
from run.telling import Telling
from run.wandb_run import wandb_settings
from run.written import write_config
from text.row_readers import BadData
from trainer import Services
from utils import mask_secrets

log = logging.getLogger(__name__)


class Session:
    """One run from its first step to its last, across as many processes as it takes."""

    def __init__(self, begun: Beginning, signals: StopSignals, models: Models):
        self.args, self.ranks, self.lock, self.models = begun.args, begun.ranks, begun.lock, models
        self.begun, self.signals, self.progress, self.resumed = begun, signals, begun.progress, begun.resumed
        self.saving, self.telling = Saving(begun, models), Telling(begun, signals, models)

    def begin(self) -> None:
        """Start W&B, tell it the sizes, and take the held-out figures before the first step."""
        if self.ranks.is_first:
            write_config(self.args, self.begun.origins)
        if self.args.wandb:
            self.begun.tracker.start_wandb(mask_secrets(vars(self.args)), **wandb_settings(self.args))
        parameters = list(self.models.student.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters) - trainable
        layers = self.models.student.config.attention_layers
        self.begun.tracker.summary(
            {"parameters/trainable": trainable, "parameters/frozen": frozen, "attention_layers": layers}
        )
        if self.resumed is None and self.args.eval_dataset:
            self.telling.log_metrics(self.progress.optimizer_step, self.telling.evaluate(self.progress))

    def enter(self, stage: Stage) -> None:
        """Begin a stage anew, or put an interrupted one back where it stood."""
        self.begun.tracker.summary({f"{stage.name}/steps": stage.total_steps})
        self.saving.unprepared = stage
        stage.loader.stop_requested = lambda: self.signals.stop_requested
        if self.resumed is not None:
            self.resumed.put_back(stage, self.models.student)
        if not self.begun.steps_done(stage.name):
            self.progress.begin(stage.name, stage.total_steps)
            self._align(stage)
            self.begun.tracker.mark_stage(stage.name, self.progress.optimizer_step)
        self.begun.tracker.bar.begin(stage.name, self.progress.stage_step, stage.total_steps)
        self.progress.stage_total, self.progress.stage_warmup = stage.total_steps, stage.warmup
        if stage.stretches != self.progress.stage_stretches:  # of another plan, or over steps of another size
            self.progress.stage_stretches = [list(stretch) for stretch in stage.stretches]
            self.progress.stage_expected = stage.stretches[-1][1] if stage.stretches else 0

    def _align(self, stage: Stage) -> None:
        """`--resume_step`: log and schedule start there; weights, optimizer and data do not."""
        if self.args.resume_step and self.resumed is None and self.progress.optimizer_step == 0:
            self.progress.optimizer_step = self.progress.stage_step = self.args.resume_step
            for _ in range(self.args.resume_step):
                stage.schedule.step()
            log.warning("--resume_step aligns the log and the schedule only; data starts anew")

    def services(self) -> Services:
        """What the loop calls."""
        args = self.args
        return Services(
            log_metrics=self.telling.log_metrics,
            save=self.saving.save,
            save_stable=None if args.no_stable_checkpoint else self.saving.save_stable,
            save_due=self.saving.save_due,
            stop_requested=self.stop_requested,
            save_requested=self.signals.take_save_request,
            evaluate=self.telling.evaluate if args.eval_dataset else None,
            diagnose=self.telling.diagnose,
            sample=self.telling.sample,
            log_interval=args.log_interval,
            eval_interval=args.eval_interval,
            max_bad_steps=args.max_bad_steps,
            save_before_raising=(TooManyBadSteps, RankFailed, SharedMistake, DataStreamLost, BadData),
        )

    def stop_requested(self) -> bool:
        """Whether a signal asks to stop; raises `LockTaken` once the folder is another run's."""
        self.lock.check()
        return self.signals.stop_requested

    def stopped(self) -> int:
        """The exit status after a signal, once the checkpoint is written: when one rank leaves, all are ended."""
        self.begun.store.wait()
        self.begun.status = max(self.ranks.gather(self.signals.exit_code))
        return self.begun.status
