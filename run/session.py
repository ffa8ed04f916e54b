"""A run's surroundings: where it stands, what it saves and resumes from, whom it tells.

`Session` binds the pieces that know files, flags and W&B (checkpoints, tracker, signals, clock) to the loop's
`Services`, so that `train.py` stays an outline and `trainer.py` knows nothing of them.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch

from arguments import Arguments
from checkpoints.files import distinct_weights
from checkpoints.lock import RunLock
from checkpoints.model_card import model_card
from checkpoints.origins import Origins
from checkpoints.run_state import rng_state
from checkpoints.store import CheckpointStore
from distill.forms import DeviceBatch, Progress, Stage
from distill.meter import TooManyBadSteps
from evaluation.diagnostics import PROMPTS, as_numbers, continuations, gradient_norms, layer_figures
from evaluation.held_out import figures_of, held_out_sums
from hardware.memory import MemoryEstimate, estimate_memory, oom_advice
from hardware.parallel import is_sharded, reshard, whole_optimizer_state, whole_weights
from hardware.ranks import RankFailed, RankLost, Ranks, SharedMistake
from hardware.settings import TeacherNeed
from hub.hub_files import DataStreamLost
from model_utils import frozen_names, load_config
from optim.saved_state import named_state
from optim.schedule import Phases
from plot_metrics import plot_runs
from run.acceleration import step_settings
from run.build import Models
from run.flag_checks import read_prompts
from run.resume import Start, choose_start
from run.resumption import Resumption
from run.signals import SaveClock, StopSignals
from run.text import RunText
from run.tracking import Tracker
from text.row_readers import BadData
from trainer import Services
from utils import UserError, format_line, library_versions, mask_secrets

log = logging.getLogger(__name__)


class Session:
    """One run from its first step to its last, across as many processes as it takes."""

    def __init__(self, args: Arguments, signals: StopSignals, ranks: Ranks, lock: RunLock):
        self.args, self.signals, self.ranks, self.lock = args, signals, ranks, lock
        self.output_dir = Path(args.output_dir)
        self.store = CheckpointStore(self.output_dir, keep=args.keep_checkpoints, log=log.warning, held=lock.held)
        self.progress = Progress()
        self.clock = SaveClock(args.save_minutes)
        self.models: Models | None = None
        self.estimate: MemoryEstimate | None = None
        start = ranks.first(self._choose_start)
        self.finished = start is not None and start.finished
        self.resumed = Resumption(start, args, ranks) if start is not None else None
        self.origins = Origins()
        wandb_id: str | None = None
        if self.resumed is not None:
            self.progress = self.resumed.progress
            metadata = self.resumed.standing.metadata
            self.origins = Origins.recorded(metadata, vars(args), self.resumed.state.get("loader"))
            wandb_id = metadata.get("wandb_run_id")
        self.micro_steps_saved = self.progress.micro_step
        self.prompts = read_prompts(args.sample_prompts) if args.sample_prompts else PROMPTS
        self.teachers_samples: list[str] = []
        self.whole_frozen: dict[str, torch.Tensor] = {}  # of a sharded student, gathered once
        self.unprepared: Stage | None = None  # a stage whose first save has no host memory yet
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

    def phases(self, name: str, text: RunText) -> Phases:
        """The optimizer steps of a stage, and of its warm-up and cooldown."""
        if self.resumed is not None and name == self.resumed.interrupted:
            return self.resumed.phases(text)
        return Phases.of(text.total_steps(name), self.args.warmup_ratio, self.args.decay_ratio)

    def stretches(self, name: str, phases: Phases) -> list[list[int]]:
        """Those of an interrupted stage's schedule, as long as its plan is the same."""
        kept = self.steps_done(name) and phases.total == self.progress.stage_total
        return [list(stretch) for stretch in self.progress.stage_stretches] if kept else []

    def check_position(self, loaders: dict[str, Any], text: RunText) -> None:
        """Raise a `UserError` where a resumed stage cannot go on, before any model is loaded."""
        if self.resumed is not None:
            self.resumed.check(loaders, text)

    def begin(self) -> None:
        """Tell W&B the sizes, and take the held-out figures before the first step."""
        assert self.models is not None
        parameters = list(self.models.student.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters) - trainable
        layers = self.models.student.config.attention_layers
        self.tracker.summary(
            {"parameters/trainable": trainable, "parameters/frozen": frozen, "attention_layers": layers}
        )
        if self.resumed is None and self.args.eval_dataset:
            self.log_metrics(self.progress.optimizer_step, self.evaluate(self.progress))

    def enter(self, stage: Stage) -> None:
        """Begin a stage anew, or put an interrupted one back where it stood."""
        self.tracker.summary({f"{stage.name}/steps": stage.total_steps})
        self.unprepared = stage
        stage.loader.stop_requested = lambda: self.signals.stop_requested
        assert self.models is not None
        if self.resumed is not None:
            self.resumed.put_back(stage, self.models.student)
        if not self.steps_done(stage.name):
            self.progress.begin(stage.name, stage.total_steps)
            self._align(stage)
            self.tracker.mark_stage(stage.name, self.progress.optimizer_step)
        self.progress.stage_total, self.progress.stage_warmup = stage.total_steps, stage.warmup
        if not stage.stretches:  # a stage anew, or of another plan
            self.progress.stage_expected, self.progress.stage_stretches = 0, []

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
            log_metrics=self.log_metrics,
            save=self.save,
            save_stable=None if args.no_stable_checkpoint else self.save_stable,
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
            found = layer_figures(student, teacher, batch.inputs, batch.position_ids)
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
        if not self.teachers_samples and models.teacher is not None:  # greedy and frozen: always the same
            self.teachers_samples = continuations(models.teacher, models.tokenizer, prompts)
        written = continuations(models.student, models.tokenizer, prompts)
        rows = [list(row) for row in zip(prompts, written, self.teachers_samples)]
        self.tracker.samples(["prompt", "student", "teacher"], rows, step=step)

    def evaluate(self, progress: Progress) -> dict[str, float]:
        """Held-out figures as `eval/...` (the teacher's own once); a new best KL makes a save due."""
        assert self.models is not None
        args, models = self.args, self.models
        assert models.hidden_states is not None and models.teacher_head is not None  # --eval_dataset needs them
        ranks, pair = self.ranks, (models.step, models.hidden_states, models.teacher_head)
        batches = ranks.together(models.text.held_out_loader)
        figures = figures_of(
            lambda batch: ranks.sum(ranks.together(lambda: held_out_sums(*pair, batch, models.device))),
            ranks.in_step(batches),
            args.eval_tokens,
            stop=lambda: self.ranks.agree(self.signals.stop_requested)[0],
        )
        reshard(models.step)  # else a stage that begins now would train parameters that are thrown away
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
            self.estimate = estimate_memory(teacher, models.student.config, step_settings(args), teacher_need=need)
        if self.estimate is None:
            return f"out of memory on {args.device} while the models were loaded"
        return oom_advice(self.estimate, step_settings(args))

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
        assert self.models is not None
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
        assert self.models is not None
        named = self.models.student.named_parameters()
        exact = {n: p.detach() for n, p in named if p.dtype != self.models.dtype}
        return whole_weights(exact, {}, first=self.ranks.is_first) if is_sharded(self.models.student) else exact

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
