"""A run's surroundings: where it stands, what it saves and resumes from, whom it tells.

`Session` binds the pieces that know files, flags and W&B (checkpoints, tracker, signals, clock) to the loop's
`Services`, so that `train.py` stays an outline and `trainer.py` knows nothing of them.
"""

import argparse
import contextlib
import logging
from pathlib import Path
from typing import Any

import torch

from arguments import read_prompts
from checkpoints.files import distinct_weights
from checkpoints.lock import RunLock
from checkpoints.model_card import model_card
from checkpoints.origins import Origins, flags_as_made
from checkpoints.run_state import changed_flags, read_metadata, read_trainer_state, rng_state, set_rng_state
from checkpoints.store import CheckpointStore
from distill.forms import DeviceBatch, Progress, Stage
from distill.meter import TooManyBadSteps
from distill.teacher import TeacherNeed
from evaluation.diagnostics import PROMPTS, as_numbers, continuations, gradient_norms, layer_distances
from evaluation.held_out import figures_of, held_out_sums
from hardware.memory import MemoryEstimate, estimate_memory, oom_advice
from hardware.parallel import copy_rows, is_sharded, own_optimizer_state, whole_optimizer_state, whole_weights
from hardware.ranks import RankFailed, RankLost, Ranks, SharedMistake
from hub.hub_files import DataStreamLost
from model_utils import frozen_names, load_config
from plot_metrics import plot_runs
from run.build import Models
from run.plan import sequences_a_step
from run.signals import SaveClock, StopSignals
from run.text import RunText
from run.tracking import Tracker
from text.row_readers import BadData
from trainer import Services
from utils import UserError, format_line, library_versions, mask_secrets

log = logging.getLogger(__name__)


class Session:
    """One run from its first step to its last, across as many processes as it takes."""

    def __init__(self, args: argparse.Namespace, signals: StopSignals, ranks: Ranks, lock: RunLock):
        self.args, self.signals, self.ranks, self.lock = args, signals, ranks, lock
        self.output_dir = Path(args.output_dir)
        self.store = CheckpointStore(self.output_dir, keep=args.keep_checkpoints, log=log.warning, held=lock.held)
        self.progress = Progress()
        self.clock = SaveClock(args.save_minutes)
        self.models: Models | None = None
        self.estimate: MemoryEstimate | None = None
        self.finished = False
        self.origins = Origins()
        self.trainer_state: dict[str, Any] = {}
        self.resumed_from = ranks.first(lambda: self.store.resolve(args.resume))
        self.micro_steps_saved = 0
        self.prompts = read_prompts(args.sample_prompts) if args.sample_prompts else PROMPTS
        self.teachers_samples: list[str] = []
        self.whole_frozen: dict[str, torch.Tensor] = {}  # of a sharded student, gathered once
        self.unprepared: Stage | None = None  # a stage whose first save has no host memory yet
        wandb_id = self._read(self.resumed_from) if self.resumed_from is not None else None
        self.tracker = Tracker(
            self.output_dir,
            wandb_enabled=args.wandb and not self.finished,
            config=mask_secrets(vars(args)),
            project=args.wandb_project,
            run_name=args.wandb_run_name,
            entity=args.wandb_entity,
            mode=args.wandb_mode,
            run_id=wandb_id,
            main_process=ranks.is_first,
            held=lock.held,
        )
        if not self.finished:
            self.tracker.truncate_after(self.progress.optimizer_step if self.resumed_from else -1)

    def _read(self, folder: Path) -> str | None:
        """Take up a checkpoint: check its flags, read where it stands; returns its W&B run id."""
        metadata = read_metadata(folder)
        before = sequences_a_step(metadata["flags"], metadata.get("ranks", 1))
        now = sequences_a_step(vars(self.args), self.ranks.world_size)
        same_batch = ("batch_size", "grad_accumulation_steps") if before == now else ()
        changed = changed_flags(flags_as_made(metadata), vars(self.args), ignore=same_batch)
        if changed and not self.args.resume_force:
            raise UserError(
                f"--resume: {folder} was made with other flags: {'; '.join(changed)} "
                "(--resume_force goes on all the same; a new --output_dir starts anew)"
            )
        self.finished = metadata.get("finished", False)
        if not self.finished:
            self.trainer_state = read_trainer_state(folder)
        self.origins = Origins.recorded(metadata, vars(self.args), self.trainer_state.get("loader"))
        if not self.finished:
            self.progress = Progress(**metadata["progress"], loader=self.trainer_state["loader"])
            self.micro_steps_saved = self.progress.micro_step
            if before != now:
                log.warning(
                    "an optimizer step takes %d sequences from here on, not %d as before; no sequence is lost or "
                    "repeated (--grad_accumulation_steps can keep their number when that of the ranks changes)",
                    now, before,
                )  # fmt: skip
            log.info("resuming %s: %s, step %d", folder, self.progress.stage, self.progress.optimizer_step)
        return metadata.get("wandb_run_id")

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

    def total_steps(self, name: str, text: RunText) -> int:
        """Optimizer steps of a stage; an interrupted stage keeps the number that it began with."""
        if self.progress.stage == name and self.trainer_state:
            return self.progress.stage_total
        return text.total_steps(name)

    def begin(self) -> None:
        """Put exact weights back, tell W&B the sizes, take the held-out figures before the first step."""
        assert self.models is not None
        parameters = list(self.models.student.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters) - trainable
        layers = self.models.student.config.attention_layers
        self.tracker.summary(
            {"parameters/trainable": trainable, "parameters/frozen": frozen, "attention_layers": layers}
        )
        self._restore_weights(self.trainer_state.get("weights", {}))  # also where the next stage begins anew
        if self.resumed_from is None and self.args.eval_dataset:
            self.log_metrics(self.progress.optimizer_step, self.evaluate(self.progress))

    def enter(self, stage: Stage) -> None:
        """Begin a stage anew, or put an interrupted one back where it stood."""
        self.tracker.summary({f"{stage.name}/steps": stage.total_steps})
        self.unprepared = stage
        stage.loader.stop_requested = lambda: self.signals.stop_requested
        if self.progress.stage != stage.name or not self.trainer_state:
            self.progress.begin(stage.name, stage.total_steps)
            self._align(stage)
            self.tracker.mark_stage(stage.name, self.progress.optimizer_step)
            return
        state, self.trainer_state = self.trainer_state, {}
        optimizer = state["optimizer"]
        if is_sharded(stage.trainable):
            optimizer = own_optimizer_state(stage.optimizer, optimizer)
        stage.optimizer.load_state_dict(optimizer)
        stage.schedule.load_state_dict(state["schedule"])
        if stage.scaler is not None:
            stage.scaler.load_state_dict(state["scaler"])
        if self.progress.loader:
            stage.loader.load_state_dict(self.progress.loader)
        set_rng_state(state["rng"])

    def _align(self, stage: Stage) -> None:
        """`--resume_step`: log and schedule start there; weights, optimizer and data do not."""
        if self.args.resume_step and self.resumed_from is None and self.progress.optimizer_step == 0:
            self.progress.optimizer_step = self.progress.stage_step = self.args.resume_step
            for _ in range(self.args.resume_step):
                stage.schedule.step()
            log.warning("--resume_step aligns the log and the schedule only; data starts anew")

    def services(self) -> Services:
        """What the loop calls."""
        args = self.args
        return Services(
            log_metrics=self.log_metrics,
            save=self.save,
            save_due=self.save_due,
            stop_requested=self.stop_requested,
            save_requested=self.signals.take_save_request,
            evaluate=self.evaluate if args.eval_dataset else None,
            diagnose=self.diagnose,
            sample=self.sample,
            log_interval=args.log_interval,
            eval_interval=args.eval_interval,
            max_bad_steps=args.max_bad_steps,
            save_before_raising=(TooManyBadSteps, RankFailed, SharedMistake, DataStreamLost, BadData),
        )

    def stop_requested(self) -> bool:
        """Whether a signal asks to stop; raises `LockTaken` once the folder is another run's."""
        self.lock.check()
        return self.signals.stop_requested

    def log_metrics(self, step: int, figures: dict[str, Any]) -> None:
        if not figures:  # of an evaluation that was cut short
            return
        if "train/loss" in figures:
            log.info(format_line(figures))
        elif "eval/kl" in figures:
            log.info(
                "held out: KL %.4f, top-1 %.1f%%, perplexity ratio %.3f",
                figures["eval/kl"],
                100 * figures["eval/top1_agreement"],
                figures["eval/perplexity_ratio"],
            )
        self.tracker.log(figures, step=step)

    def diagnose(self, progress: Progress, stage: Stage, batch: DeviceBatch) -> None:
        """Every `--diagnostics_interval` steps: figures of each layer, before the update (`layers/...`)."""
        interval, step = self.args.diagnostics_interval, progress.optimizer_step + 1
        if interval and step % interval == 0:
            self.ranks.together(lambda: self._diagnose(progress, stage, batch, step))

    def _diagnose(self, progress: Progress, stage: Stage, batch: DeviceBatch, step: int) -> None:
        assert self.models is not None
        student, teacher = self.models.student, self.models.teacher
        figures = gradient_norms(student, stage.scaler.get_scale() if stage.scaler is not None else 1.0)
        if self.ranks.is_first and not is_sharded(student):
            found = layer_distances(student, teacher, batch.inputs, batch.position_ids)
            aligning = stage.name in ("matrix", "hidden")  # which have decays of their own, on the teacher's inputs
            figures |= {name: value for name, value in found.items() if not (aligning and "decay" in name)}
        self.tracker.log({"train/tokens": progress.tokens, **as_numbers(figures)}, step=step)

    def sample(self, progress: Progress) -> None:
        """Every `--sample_interval` steps: what student and teacher write, side by side."""
        interval, step = self.args.sample_interval, progress.optimizer_step
        if interval and step % interval == 0:
            self.ranks.together(lambda: self._sample(step) if self.prompts and self.ranks.is_first else None)

    def _sample(self, step: int) -> None:
        assert self.models is not None
        models, prompts = self.models, self.prompts
        if is_sharded(models.student):
            log.warning("--sample_interval: a sharded student writes no samples")
            self.prompts = []
            return
        if not self.teachers_samples:  # greedy and frozen: always the same
            self.teachers_samples = continuations(models.teacher, models.tokenizer, prompts)
        ours = continuations(models.student, models.tokenizer, prompts)
        rows = [list(row) for row in zip(prompts, ours, self.teachers_samples)]
        self.tracker.samples(["prompt", "student", "teacher"], rows, step=step)

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """Held-out figures as `eval/...` (the teacher's own once); a new best KL makes a save due."""
        assert self.models is not None
        args, models = self.args, self.models
        ranks, pair = self.ranks, (models.step, models.hidden_states, models.teacher_head)
        batches = ranks.together(models.text.held_out_loader)
        figures = figures_of(
            lambda batch: ranks.sum(ranks.together(lambda: held_out_sums(*pair, batch, models.device))),
            ranks.in_step(batches),
            args.eval_tokens,
            stop=lambda: self.ranks.agree(self.signals.stop_requested)[0],
        )
        if not figures:
            log.warning("the evaluation at step %d is left out: a signal asks to stop", progress.optimizer_step)
            return {}
        if progress.evaluation:
            del figures["teacher_perplexity"]
        progress.evaluation = {**progress.evaluation, **figures, "step": progress.optimizer_step}
        if figures["kl"] < progress.best.get("kl", float("inf")):
            progress.best = progress.evaluation
        return {"train/tokens": progress.tokens, **{f"eval/{name}": value for name, value in figures.items()}}

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
        assert self.models is not None
        student = self.models.student
        self.store.prepare(model=student, trainer_state=self._trainer_state(stage), frozen=frozen_names(student))

    def memory_advice(self) -> str:
        """The line for a run that is out of memory; on the CPU the estimate is made only now."""
        args, models = self.args, self.models
        if self.estimate is None and models is not None:
            commit = self.origins.commits.get("teacher_model")
            teacher = load_config(args.teacher_model, local_files_only=True, revision=commit)
            need: TeacherNeed = "never" if models.teacher is None else "throughout"
            self.estimate = estimate_memory(teacher, models.student.config, args, teacher_need=need)
        if self.estimate is None:
            return f"out of memory on {args.device} while the models were loaded"
        return oom_advice(self.estimate, args)

    def save(self, progress: Progress, stage: Stage) -> None:
        """Write `checkpoint-<step>`: whole state, so that a resumed run equals one never interrupted."""
        self.micro_steps_saved = progress.micro_step
        best = progress.best.get("step") == progress.optimizer_step
        name = f"checkpoint-{progress.optimizer_step}"
        self.ranks.together(lambda: self._write(name, self._trainer_state(stage), best=best))
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
        assert self.models is not None
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
            "wandb_run_id": self.tracker.run_id,
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
        return {
            "optimizer": whole_optimizer_state(optimizer, self.ranks) if sharded else optimizer.state_dict(),
            "schedule": stage.schedule.state_dict(),
            "scaler": stage.scaler.state_dict() if stage.scaler is not None else None,
            "loader": self.progress.loader,
            "rng": rng_state(),
            "weights": self._exact_weights(),
        }

    def _exact_weights(self) -> dict[str, torch.Tensor]:
        """Parameters that `model.safetensors` rounds to `--dtype` (float16 keeps float32 parameters)."""
        assert self.models is not None
        named = self.models.student.named_parameters()
        exact = {n: p.detach() for n, p in named if p.dtype != self.models.dtype}
        return whole_weights(exact, {}, first=self.ranks.is_first) if is_sharded(self.models.student) else exact

    @torch.no_grad()
    def _restore_weights(self, weights: dict[str, torch.Tensor]) -> None:
        assert self.models is not None
        named = dict(self.models.student.named_parameters())
        for name, value in weights.items():
            copy_rows(named[name], value)

    def stopped(self) -> int:
        """The exit status after a signal, once the checkpoint is written: when one rank leaves, all are ended."""
        self.store.wait()
        return max(self.ranks.gather(self.signals.exit_code))

    def leave_together(self) -> None:
        """Once all ranks have come to an end: wait for the checkpoint that the first may still be writing."""
        self.store.wait()
        with contextlib.suppress(RankLost, RankFailed, SharedMistake):
            self.ranks.agree()

    def close(self) -> None:
        """Wait for the checkpoint in flight and close the tracker."""
        self.store.wait()
        self.tracker.close()
