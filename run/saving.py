"""What a run writes, and when: checkpoints with everything to go on from, and the student at the end."""

import logging
from typing import Any

import torch

from checkpoints.files import distinct_weights
from checkpoints.model_card import model_card
from checkpoints.run_state import rng_state
from hardware.parallel import is_sharded, whole_optimizer_state, whole_weights
from loop.forms import Progress, Stage
from model_utils import frozen_names
from optim.saved_state import named_state
from plot_metrics import plot_runs
from run.beginning import Beginning
from run.pair import Models
from run.signals import SaveClock
from utils import UserError, library_versions, mask_secrets

log = logging.getLogger(__name__)


class Saving:
    """Checkpoints of one run, by the loop's clock and at its ends."""

    def __init__(self, begun: Beginning, models: Models):
        self.args, self.ranks, self.lock, self.models = begun.args, begun.ranks, begun.lock, models
        self.output_dir, self.store, self.progress = begun.output_dir, begun.store, begun.progress
        self.origins, self.tracker = begun.origins, begun.tracker
        self.clock = SaveClock(begun.args.save_minutes)
        self.micro_steps_saved = self.progress.micro_step
        self.whole_frozen: dict[str, torch.Tensor] = {}  # of a sharded student, gathered once
        self.unprepared: Stage | None = None  # a stage whose first save has no host memory yet

    def save_due(self, progress: Progress) -> bool:
        """True when `--save_interval` micro steps or `--save_minutes` have passed, and at a new best evaluation."""
        self._take_snapshot_memory()  # here, since this is asked after each optimizer step
        passed = progress.micro_step - self.micro_steps_saved >= self.args.save_interval or self.clock.due()
        return passed or progress.best.get("step") == progress.optimizer_step

    def _take_snapshot_memory(self) -> None:
        """After a stage's first step, when the optimizer's state is there: in the background, for its first save."""
        stage, self.unprepared = self.unprepared, None
        if stage is None or not self.ranks.is_first or is_sharded(stage.trainable):
            return
        student = self.models.student
        self.store.prepare(model=student, trainer_state=self._trainer_state(stage), frozen=frozen_names(student))

    def save(self, progress: Progress, stage: Stage) -> None:
        """Write `checkpoint-<step>`: whole state, so that a resumed run equals one never interrupted."""
        self.micro_steps_saved = progress.micro_step
        best = progress.best.get("step") == progress.optimizer_step
        name = f"checkpoint-{progress.optimizer_step}"
        self.ranks.together(lambda: self._write(name, self._trainer_state(stage), best=best))
        self.clock.restart()

    def save_stable(self, progress: Progress, stage: Stage) -> None:
        """Write `stable-<stage>`, from which a longer run or another cooldown goes on."""
        self.ranks.together(lambda: self._write(f"stable-{stage.name}", self._trainer_state(stage)))
        self.clock.restart()

    def save_final(self) -> None:
        """Write `final`: the student alone, to be used, not resumed; then the plot."""
        self.ranks.together(lambda: self._write("final", {}, finished=True))
        self.ranks.together(self._check_written)
        if not self.ranks.is_first:
            return
        try:
            plot_runs([self.output_dir], self.output_dir / "loss.png")
        except (OSError, ValueError) as error:
            log.warning("loss.png could not be drawn: %s", error)

    def _check_written(self) -> None:
        self.lock.check()
        if not self.store.wait():
            raise UserError(f"--output_dir {self.output_dir}: the final model could not be written (see the log)")

    def _write(self, name: str, state: dict[str, Any], *, finished: bool = False, best: bool = False) -> None:
        student: Any = self.models.student
        frozen, weights = frozen_names(student), None
        if is_sharded(student):
            weights = whole_weights(distinct_weights(student), self.whole_frozen, first=self.ranks.is_first)
            self.whole_frozen = {name: tensor for name, tensor in weights.items() if name in frozen}
        if not self.ranks.is_first:
            return
        progress = self.progress.as_dict()
        progress.pop("loader")
        metadata = {
            "progress": progress,
            "finished": finished,
            "flags": mask_secrets(vars(self.args)),
            "attention_layers": student.config.attention_layers,
            "ranks": self.ranks.world_size,
            "versions": library_versions(),
            **self.origins.as_metadata(),
            "wandb_run_id": self.tracker.wandb_id,
        }
        self.store.save(
            name,
            model=student,
            tokenizer=self.models.tokenizer,
            trainer_state=state,
            metadata=metadata,
            frozen=frozen,
            dtype=self.models.dtype,
            best=best,
            weights=weights,
            model_card=model_card(metadata),
        )

    def _trainer_state(self, stage: Stage) -> dict[str, Any]:
        sharded, optimizer = is_sharded(stage.trainable), stage.optimizer
        state = whole_optimizer_state(optimizer, self.ranks) if sharded else optimizer.state_dict()
        return {
            "optimizer": named_state(state, optimizer, self.models.student),
            "scaler": stage.scaler.state_dict() if stage.scaler is not None else None,
            "loader": self.progress.loader,
            "rng": rng_state(),
            "weights": self._exact_weights(),
        }

    def _exact_weights(self) -> dict[str, torch.Tensor]:
        """Parameters that `model.safetensors` rounds to `--dtype` (float16 keeps float32 parameters)."""
        named = self.models.student.named_parameters()
        exact = {n: p.detach() for n, p in named if p.dtype != self.models.dtype}
        return whole_weights(exact, {}, first=self.ranks.is_first) if is_sharded(self.models.student) else exact
