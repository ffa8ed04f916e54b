"""What a run says of itself on the way: log lines, held-out figures, figures of each layer, samples."""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from checkpoints.lock import LockTaken
from data import Batch
from evaluation.diagnostics import as_numbers, continuations, gradient_norms, layer_figures
from evaluation.held_out import figures_of, held_out_sums
from hardware.parallel import is_sharded, reshard
from hardware.ranks import RankFailed, first_line
from hub.hub_files import DataStreamLost
from loop.forms import Progress, Stage
from run.beginning import Beginning
from run.pair import Models
from run.signals import StopSignals
from utils import UserError, format_line

log = logging.getLogger(__name__)
T = TypeVar("T")


class Telling:
    """Figures and samples of one run, in its log, `metrics.jsonl` and W&B."""

    def __init__(self, begun: Beginning, signals: StopSignals, models: Models):
        self.args, self.ranks, self.signals, self.models = begun.args, begun.ranks, signals, models
        self.tracker, self.prompts = begun.tracker, begun.prompts
        self.teachers_samples: list[str] = []
        self.bad_steps = begun.progress.bad_steps
        self.later_steps: Callable[[str], float] = begun.later_steps

    def log_metrics(self, step: int, figures: dict[str, Any]) -> None:
        if not figures:  # of an evaluation that was cut short
            return
        if "train/loss" in figures:
            figures = self._with_run_eta(figures)
            log.info(format_line(figures))
            self._tell_skipped(step, figures.get("train/bad_steps", 0))
        elif "eval/kl" in figures:
            log.info(
                "held out: KL %.4f, top-1 %.1f%%, perplexity ratio %.3f",
                figures["eval/kl"],
                100 * figures["eval/top1_agreement"],
                figures["eval/perplexity_ratio"],
            )
        self.tracker.log(figures, step=step)

    def _with_run_eta(self, figures: dict[str, Any]) -> dict[str, Any]:
        """With the seconds left of the whole run: later stages take as long as their operations say."""
        left, later = figures.get("perf/eta_seconds"), self.later_steps(figures["stage"])
        if left is None:
            return figures
        return {**figures, "perf/run_eta_seconds": left + later * figures["perf/step_seconds"]}

    def _tell_skipped(self, step: int, bad_steps: int) -> None:
        if bad_steps > self.bad_steps:
            self.tracker.alert("updates were skipped", f"{bad_steps} by step {step}: non-finite loss or gradient")
        self.bad_steps = bad_steps

    def diagnose(self, progress: Progress, stage: Stage, batch: Batch) -> None:
        """Every `--diagnostics_interval` steps: figures of each layer, before the update (`layers/...`)."""
        interval, step = self.args.diagnostics_interval, progress.optimizer_step + 1
        if interval and step % interval == 0:
            self._beside(lambda: self._diagnose(progress, stage, batch, step))

    def _diagnose(self, progress: Progress, stage: Stage, batch: Batch, step: int) -> None:
        student, teacher = self.models.student, self.models.teacher
        figures = gradient_norms(student, stage.scaler.get_scale() if stage.scaler is not None else 1.0)
        if self.ranks.is_first and not is_sharded(student):
            found = layer_figures(student, teacher, batch.inputs, batch.position_ids)
            aligning = stage.name in ("matrix", "hidden")  # which have decays of their own, on the teacher's inputs
            figures |= {name: value for name, value in found.items() if not (aligning and "decay" in name)}
        self.tracker.log({"train/tokens": progress.tokens, **as_numbers(figures)}, step=step)

    def sample(self, progress: Progress) -> None:
        """Every `--sample_interval` steps: what student and teacher write, side by side."""
        self.tracker.bar.step(progress)
        interval, step = self.args.sample_interval, progress.optimizer_step
        if interval and step % interval == 0:
            self._beside(lambda: self._sample(step) if self.prompts and self.ranks.is_first else None)

    def _sample(self, step: int) -> None:
        models, prompts = self.models, self.prompts
        if is_sharded(models.student):
            log.warning("--sample_interval: a sharded student writes no samples")
            self.prompts = []
            return
        if not self.teachers_samples and models.teacher is not None:  # greedy and frozen: always the same
            self.teachers_samples = continuations(models.teacher, models.tokenizer, prompts)
        written = continuations(models.student, models.tokenizer, prompts)
        rows = [list(row) for row in zip(prompts, written, self.teachers_samples)]
        self.tracker.samples(["prompt", "student", "teacher"], rows, step=step)

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """Held-out figures as `eval/...` (the teacher's own once); a new best KL makes a save due."""
        try:
            figures = self._beside(self._held_out_figures)
        finally:  # else what is saved now, or a stage that begins, would have parameters that are thrown away
            reshard(self.models.student_loss)
        if not figures:
            log.warning("the evaluation at step %d is left out: a signal asks to stop", progress.optimizer_step)
            return {}
        if progress.evaluation:
            del figures["teacher_perplexity"]
        progress.evaluation = {**progress.evaluation, **figures, "step": progress.optimizer_step}
        if figures["kl"] < progress.best.get("kl", float("inf")):
            if progress.best:
                self.tracker.alert("new best", f"held-out KL {figures['kl']:.4f} at step {progress.optimizer_step}")
            progress.best = progress.evaluation
        return {"train/tokens": progress.tokens, **{f"eval/{name}": value for name, value in figures.items()}}

    def _held_out_figures(self) -> dict[str, float]:
        """All ranks agree before each forward pass, whose collectives wait for every one of them, and behind it."""
        models, ranks = self.models, self.ranks
        assert models.teacher_states is not None and models.teacher_head is not None  # --eval_dataset needs them
        pair = models.student_loss, models.teacher_states, models.teacher_head
        batches = ranks.together(models.text.held_out_loader)
        return figures_of(
            lambda batch: ranks.sum(ranks.together(lambda: held_out_sums(*pair, batch))),
            ranks.in_step(batch.to(models.device) for batch in batches),
            self.args.eval_tokens,
            stop=lambda: ranks.agree(self.signals.stop_requested)[0],
        )

    def _beside(self, work: Callable[[], T]) -> T:
        """Work beside training: what fails in it is a rank's failure, alone too, so that a checkpoint is saved.

        A mistake of the user's is told as such.
        """
        if not self.ranks.alone:
            return self.ranks.together(work)
        try:
            return work()
        except (UserError, DataStreamLost, LockTaken):
            raise
        except Exception as error:
            raise RankFailed(f"{type(error).__name__}: {first_line(error)}") from error
