"""What a run will do and take, before it does: the plan that `--dry_run` prints and every run's log begins with."""

import logging
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from arguments import Arguments
from hardware.memory import GIB, STATE_BYTES, MemoryEstimate, estimate_memory
from hardware.meta_models import meta_student
from hardware.operations import alignment_operations, distillation_operations
from optim.schedule import Phases
from run.acceleration import step_settings
from run.beginning import Beginning
from run.inputs import Inputs
from run.measuring import free_bytes, measured_rate
from run.plan import sequence_length, tokens_a_step
from utils import auto_layers, existing_folder, format_count, format_duration

log = logging.getLogger(__name__)

STATED_RATE = 500e12  # operations a second: the 8B pair on one H100, 9,268 tokens/s at 64% of its ceiling
RATES = {"matrix": "matrix_lr", "hidden": "hidden_lr"}


@dataclass(frozen=True)
class Forecast:
    """The run from here on, from flags and configurations alone; `lines` is what people read."""

    args: Arguments
    inputs: Inputs
    phases: dict[str, Phases]  # of the stages that are left
    done: dict[str, int]  # optimizer steps of theirs that were taken before
    ranks: int

    @classmethod
    def of(cls, args: Arguments, begun: Beginning, inputs: Inputs, names: list[str]) -> "Forecast":
        """The forecast of the stages `names`."""
        phases = {name: begun.schedule(name, inputs.text)[0] for name in names}
        return cls(args, inputs, phases, {name: begun.steps_done(name) for name in names}, begun.ranks.world_size)

    @cached_property
    def student(self) -> Any:
        """The student as it trains, on the meta device."""
        return meta_student(self.inputs.teacher, self.inputs.student, step_settings(self.args))

    @cached_property
    def teacher(self) -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.inputs.teacher)

    @cached_property
    def estimate(self) -> MemoryEstimate:
        """The peak of a step, on a CPU too."""
        if self.inputs.estimate is not None:
            return self.inputs.estimate
        settings, need = step_settings(self.args), self.inputs.teacher_need
        return estimate_memory(self.inputs.teacher, self.inputs.student, settings, teacher_need=need)

    def tokens(self, name: str) -> int:
        """Tokens of a stage from here on."""
        return (self.phases[name].total - self.done[name]) * tokens_a_step(vars(self.args), name, self.ranks)

    def seconds(self, rate: float) -> dict[str, float]:
        """Each stage's seconds, at `rate` operations a second on each rank."""
        found = {}
        for name in self.phases:
            count = alignment_operations if name in RATES else distillation_operations
            operations = count(self.teacher, self.student, sequence_length(self.args, name))
            found[name] = operations * self.tokens(name) / (rate * self.ranks)
        return found

    def later_steps(self, stage: str) -> float:
        """How many steps of a stage take as long as all later stages, by their operations."""
        operations, names = self.seconds(1.0), list(self.phases)
        steps = self.phases[stage].total - self.done[stage]
        later = sum(operations[name] for name in names[names.index(stage) + 1 :])
        return later / (operations[stage] / steps) if steps else 0.0

    def rate(self, device: torch.device | None) -> tuple[float | None, str]:
        """(operations a second, where they are from): measured on `device` if it has room, else stated for a GPU."""
        rate = measured_rate(self.args, self.inputs, self.estimate, device) if device is not None else None
        if rate is not None:
            return rate, f"at {rate / 1e12:.3g} TFLOP/s, measured here on random weights"
        if self.args.device == "cpu":
            return None, "--dry_run measures it"
        return STATED_RATE, f"at {STATED_RATE / 1e12:.0f} TFLOP/s a GPU, as an H100 has it at 8B"

    def checkpoints(self) -> tuple[float, int]:
        """(bytes of the largest checkpoint, how many will be kept beside the one that is being written)."""
        args, size = self.args, getattr(torch, self.args.dtype).itemsize
        trained = sum(p.numel() for p in self.student.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in self.student.parameters())
        state = STATE_BYTES[args.optimizer][args.dtype != "bfloat16"] + (4 if args.dtype == "float16" else 0)
        kept = args.keep_checkpoints + (not args.no_stable_checkpoint) * len(self.phases)
        return everything * size + trained * state, kept + bool(args.eval_dataset and args.eval_interval) + 1

    def lines(self, device: torch.device | None = None) -> list[str]:
        """The plan in lines; with `device`, a step is measured there."""
        return [
            *(self._stage(name, phases) for name, phases in self.phases.items()),
            self._models(),
            self._memory(),
            self._disk(),
            self._time(device),
        ]

    def _stage(self, name: str, phases: Phases) -> str:
        args, done = self.args, self.done[name]
        rate = getattr(args, RATES.get(name, "max_lr"))
        shape = [f"rate up to {rate:g}"]
        if phases.warmup:
            shape.append(f"over {phases.warmup:,}")
        if phases.cooldown:
            shape.append(f"down to {args.min_lr:g} in the last {phases.cooldown:,}")
        about = "about " * bool(name == "stage1" and args.epochs)
        left = f" from step {done:,} on" if done else ""
        steps = f"{about}{phases.total:,} optimizer steps of {tokens_a_step(vars(args), name, self.ranks):,}{left}"
        return f"{name}: {format_count(self.tokens(name))} tokens in {steps}; {', '.join(shape)}"

    def _models(self) -> str:
        parameters = [(p.numel(), p.requires_grad) for p in self.student.parameters()]
        trained = sum(size for size, trains in parameters if trains)
        frozen = sum(size for size, trains in parameters) - trained
        kept, chosen = self.student.config.attention_layers, auto_layers(self.args.layers)
        fresh = not self.inputs.student.attention_layers
        layers = f"{chosen}, to be chosen," if chosen and fresh else " ".join(map(str, kept)) or "none"
        total = self.student.config.n_layer
        sizes = f"{format_count(trained)} parameters trained, {format_count(frozen)} frozen"
        return f"attention layers: {layers} of {total}; {sizes}"

    def _memory(self) -> str:
        where = torch.device(self.args.device)
        if where.type == "cuda" and not torch.cuda.is_available():
            return f"memory: {self.estimate.describe()}; there is no GPU here to compare with"
        return f"memory: {self.estimate.describe()}; free here {free_bytes(where) / GIB:.1f} GiB"

    def _disk(self) -> str:
        size, kept = self.checkpoints()
        free = shutil.disk_usage(existing_folder(Path(self.args.output_dir))).free
        short = "" if free > size * (kept + 1) else ": too little, lower --keep_checkpoints or free some"
        return f"disk: at most {kept} checkpoints of {bytes_text(size)}; {bytes_text(free)} free{short}"

    def _time(self, device: torch.device | None) -> str:
        rate, source = self.rate(device)
        if rate is None:
            return f"time: not known beforehand; {source}"
        seconds = self.seconds(rate)
        each = ", ".join(f"{name} {format_duration(value)}" for name, value in seconds.items())
        several = f" ({each})" if len(seconds) > 1 else ""
        return f"time: about {format_duration(sum(seconds.values()))}{several} {source}; evaluations come on top"


def bytes_text(size: float) -> str:
    """`12.3 GiB`, or smaller units."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"
