"""The memory of a training step, estimated from configurations alone, before anything is loaded.

Weights, gradients and optimizer state are counted on a student built on the meta device. Activations are counted
on one layer of each kind (`activation_bytes.py`). What lives at once differs over a step, so the estimate follows
it: loss, backward pass layer by layer, update.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from distill.losses import CHUNK_LOGITS_COMPILED, CHUNK_LOGITS_EAGER, PARTS_COMPILED
from hardware.activation_bytes import saved_bytes
from hardware.meta_models import meta_student, teacher_sizes
from hardware.recomputation import MODES, set_activation_checkpointing
from hardware.settings import StepSettings, TeacherNeed, WholeUntil
from models import LlambaConfig
from optim.muon import STACKED

GIB = 2**30
CONTEXT = 0.6 * GIB  # kernels and libraries loaded on first use, outside torch's allocator
WORKSPACE = 0.1 * GIB  # cuBLAS workspaces and small tensors
MARGIN = 0.04  # of what is allocated: rounding and fragments of the allocator
# Bytes a trainable parameter of a matrix, for bf16 and for float32 parameters: the optimizers' docstrings.
STATE_BYTES = {"adamw": (12.0, 8.0), "adamw8bit": (4.03, 2.03), "muon": (4.0, 4.0)}
# Bytes a trainable parameter that live only during the update: float32 copies of all gradients, measured temporaries.
UPDATE_BYTES = {"adamw": (4.0, 0.0), "adamw8bit": (0.0, 0.0), "muon": (0.0, 0.0)}
# Bytes an entry of the matrices that muon updates together, eager and compiled: copies and products, counted.
MUON_BYTES = (38.0, 24.0)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the student's device at the step's peak, by what holds them; `modes` names each layer's mode."""

    parts: dict[str, float]
    modes: tuple[str, ...]
    savings: dict[str, float]  # flag -> bytes that it would save
    moment: str = ""  # where the peak is not a KD step's
    whole_gradients: bool = False  # under FSDP2: reduced in an optimizer step's last micro step alone

    @property
    def allocated(self) -> float:
        """Bytes from torch's allocator at the peak: what `torch.cuda.max_memory_allocated` will show."""
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """Bytes that the device must have free, with kernels and the allocator's fragments."""
        return self.allocated * (1 + MARGIN) + CONTEXT

    def describe(self) -> str:
        """One line: the peak and its breakdown in GiB, and the checkpointing mode."""
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.parts.items() if size >= 0.05 * GIB)
        when = f"{self.moment}; " if self.moment else ""
        return f"{self.allocated / GIB:.1f} GiB ({parts}); {when}gradient checkpointing {describe_modes(self.modes)}"


def describe_modes(modes: Sequence[str]) -> str:
    """`full`, or `selective in 20 of 32 layers, full in 12`."""
    counts = {mode: modes.count(mode) for mode in MODES if mode in modes}
    if len(counts) == 1:
        return next(iter(counts))
    (first, count), *others = counts.items()
    return ", ".join([f"{first} in {count} of {len(modes)} layers", *(f"{m} in {n}" for m, n in others)])


@dataclass(frozen=True)
class LayerCost:
    """Bytes of one layer: `saved` from forward to backward, `working` beside it while its backward pass runs."""

    saved: float
    working: float


class StepModel:
    """All that the estimate knows of a step: sizes by part, costs by layer and mode."""

    def __init__(
        self,
        teacher_config: PreTrainedConfig,
        student_config: LlambaConfig,
        settings: StepSettings,
        shards: int = 1,
        replicated: bool = False,
        teacher_need: TeacherNeed = "throughout",
        whole_gradients: bool = False,
        whole_until: WholeUntil = "",
    ):
        self.settings, self.shards, self.replicated, self.teacher_need = settings, shards, replicated, teacher_need
        self.whole_gradients, self.whole_until = whole_gradients, whole_until
        self.dtype, self.parameter_dtype = settings.dtype, settings.parameter_dtype
        self.student = meta_student(teacher_config, student_config, settings)
        self.same_device, self.compiled = settings.one_device, settings.compiled
        self.update_in_backward = settings.update_in_backward
        self.costs: dict[tuple[str, str], LayerCost] = {}
        self.constants = self._weights(teacher_config)

    def _weights(self, teacher_config: PreTrainedConfig) -> dict[str, float]:
        teacher, matrices = teacher_sizes(teacher_config)
        size = self.dtype.itemsize
        sharable = self.same_device and self.dtype == self.parameter_dtype
        frozen = sum(p.numel() for p in self.student.parameters() if not p.requires_grad)
        total = sum(p.numel() for p in self.student.parameters())
        own: float = (total - frozen if sharable else total) * self.parameter_dtype.itemsize
        teacher_bytes: float = teacher * size
        if self.settings.teacher_fp8:
            shared = frozen * size if sharable else 0
            teacher_bytes = (teacher - matrices) * size + matrices + shared
        copies = total * size if self.dtype == torch.float16 else 0  # autocast keeps its casts until the step's end
        wide = self.parameter_dtype.itemsize == 4
        state = 0.0
        for parameter in self._trainable():
            matrix = parameter.ndim > 1
            state += parameter.numel() * STATE_BYTES[self.settings.optimizer if matrix else "adamw"][wide]
        teacher_bytes = teacher_bytes if self.same_device else 0.0
        whole = total * self.parameter_dtype.itemsize  # nothing is shared or let go of yet
        self.loading = {"teacher weights": teacher_bytes, "student weights": float(whole)}
        if self.shards > 1:  # embeddings and heads are whole throughout a step; so are two of a teacher's layers
            ends, layers = (teacher - matrices) * size, self.student.config.n_layer
            if teacher_bytes and not self.settings.teacher_fp8:  # whose codes are buffers, and not sharded
                teacher_bytes = ends + (teacher_bytes - ends) * (1 / self.shards + 2 / layers)
            table: Any = self.student.backbone.embedding.weight
            distinct = {p: p.numel() for p in (table, self.student.lm_head.weight)}
            own = (total / self.shards + sum(distinct.values())) * self.parameter_dtype.itemsize
            state /= self.shards
            self.loading = {"teacher weights": teacher_bytes, "student weights": whole / self.shards}
            if self.whole_until:  # nor quantised or moved to another device yet
                self.loading = {"teacher weights": float(teacher * size), "student weights": float(whole)}
        teacher_bytes = teacher_bytes if self.teacher_need == "throughout" else 0.0
        return {"teacher weights": teacher_bytes, "student weights": own + copies, "optimizer state": state}

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    def head_gradient(self) -> float:
        """The head's gradient is float32; a tied one is added to the embedding's."""
        head = self.student.lm_head.weight
        return head.numel() * 4.0 if head.requires_grad else 0.0

    def buckets(self) -> float:
        """DDP's buckets: room for every gradient but the head's, from the start to the end of the run.

        Once a gradient is reduced it is a view of them (`gradient_as_bucket_view`); before, it has its own memory.
        """
        head = self.student.lm_head.weight
        held = [p for p in self._trainable() if p is not head] if self.replicated else []
        return float(sum(p.numel() * p.element_size() for p in held))

    def embedding_gradient(self) -> float:
        table: Any = self.student.backbone.embedding.weight
        if not table.requires_grad:
            return 0.0
        return table.numel() * table.element_size() * (2.0 if self.settings.grad_accumulation_steps > 1 else 1.0)

    def _layers(self) -> Any:
        return self.student.backbone.layers

    def layer_gradients(self) -> list[float]:
        return [
            float(sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad))
            for layer in self._layers()
        ]

    def kind(self, index: int) -> str:
        return "attention" if index in self.student.config.attention_layers else "mixer"

    def cost(self, index: int, mode: str) -> LayerCost:
        key = (self.kind(index), mode)
        if key not in self.costs:
            self.costs[key] = self._measure(index, mode)
        return self.costs[key]

    def _measure(self, index: int, mode: str) -> LayerCost:
        settings = self.settings
        set_activation_checkpointing(self.student, mode)
        saved = saved_bytes(self.student, index, settings.batch_size, settings.seq_length, self.compiled, self.dtype)
        set_activation_checkpointing(self.student, "none")
        tokens = settings.batch_size * settings.seq_length
        size = self.dtype.itemsize
        working = 3.0 * tokens * self.student.config.mlp_cfg["intermediate_size"] * size
        if mode != "none":
            working += max(0.0, self.cost(index, "none").saved - saved)
        if settings.document_reset and self.kind(index) == "attention":
            saved += settings.batch_size * settings.seq_length**2 * size  # the mask, as a bias
        return LayerCost(saved, working)

    def loss(self) -> float:
        """Logits of a chunk, the gradient of the hidden states, the teacher's hidden states."""
        config = self.student.config
        hidden = self.settings.batch_size * self.settings.seq_length * config.d_model * self.dtype.itemsize
        logits = self.settings.batch_size * self.settings.seq_length * config.vocab_size
        if self.compiled:
            chunk = (1 + 1 / PARTS_COMPILED) * min(CHUNK_LOGITS_COMPILED, logits) * self.dtype.itemsize
        else:
            chunk = 8.0 * min(CHUNK_LOGITS_EAGER, logits) * 4
        return chunk + 3.0 * hidden

    def matched(self) -> float:
        """What `--layer_weight` holds through a step: the teacher's states (a batch ahead: twice) and the gradients.

        The distances of all layers go backward before the first layer does. Eagerly each keeps a float32 difference.
        """
        if not self.settings.layer_weight:
            return 0.0
        layers = self.student.config.n_layer
        tokens = self.settings.batch_size * self.settings.seq_length * self.student.config.d_model
        differences = 0 if self.compiled else 4 * (layers - 1)
        states = layers * (1 if self.same_device else 2) + layers - 1
        return float(tokens * (states * self.dtype.itemsize + differences))

    def update(self) -> float:
        """What lives only while weights are updated: all of them together, or one in the backward pass.

        muon takes as many matrices together as STACKED says, or one that is larger.
        """
        held = 0.0
        if not self.update_in_backward:
            wide = self.parameter_dtype.itemsize == 4
            held = (
                sum(p.numel() for p in self._trainable()) * UPDATE_BYTES[self.settings.optimizer][wide] / self.shards
            )
        if self.settings.optimizer == "muon":
            backbone: Any = self.student.backbone
            largest = max(p.numel() for layer in backbone.layers for p in layer.parameters())
            held += MUON_BYTES[self.compiled] * (largest if self.update_in_backward else max(STACKED, largest))
        return held

    def estimate(self, modes: Sequence[str]) -> MemoryEstimate:
        """The moment of the step in which most is held."""
        costs = [self.cost(index, mode) for index, mode in enumerate(modes)]
        moments = self._moments(costs) if self.shards == 1 else self._sharded_moments(costs)
        peak = max(moments, key=lambda moment: sum(moment.values()))
        parts = {
            **self.constants,
            "gradient buckets": self.buckets(),
            "matched layers": self.matched(),
            **peak,
            "workspace": WORKSPACE,
        }
        savings = self._savings(parts, costs)
        options: dict[str, Any] = dict(modes=tuple(modes), savings=savings, whole_gradients=self.whole_gradients)
        found = [MemoryEstimate(parts, **options)]
        if self.teacher_need == "at the start" or self.whole_until:
            loading = self.loading | {"workspace": WORKSPACE}
            found.append(MemoryEstimate(loading, moment="while the models are loaded", **options))
        if self.whole_until == "aligned":
            found.append(MemoryEstimate(self.alignment(), moment="in the alignment stages", **options))
        return max(found, key=lambda estimate: estimate.allocated)

    def alignment(self) -> dict[str, float]:
        """Of an alignment step before the pair is sharded: mixers train one after the other, each on its own."""
        wide = self.parameter_dtype.itemsize == 4
        mixers = [p for layer in self._layers() if hasattr(layer, "mixer") for p in layer.mixer.parameters()]
        state = sum(p.numel() * STATE_BYTES[self.settings.optimizer if p.ndim > 1 else "adamw"][wide] for p in mixers)
        costs = [self.cost(index, "none") for index in range(len(self._layers()))]
        return {
            **self.loading,
            "optimizer state": float(state),
            "gradients": float(sum(p.numel() for p in mixers) * self.parameter_dtype.itemsize),
            "activations": max(cost.saved + cost.working for cost in costs),
            "workspace": WORKSPACE,
        }

    def _moments(self, costs: list[LayerCost]) -> list[dict[str, float]]:
        gradients = self.layer_gradients()
        head, embedding = self.head_gradient(), self.embedding_gradient()
        everything = sum(gradients) + head + embedding
        kept = everything if self.settings.grad_accumulation_steps > 1 else 0.0
        in_place = self.update_in_backward or self.replicated  # gradients leave their own memory as they come
        moments = [{"gradients": max(head, kept), "activations": sum(c.saved for c in costs), "loss": self.loss()}]
        update = self.update()
        for index in reversed(range(len(costs))):
            above = 0.0 if in_place else sum(gradients[index + 1 :])
            held = max(head + above + gradients[index], kept)
            alive = sum(c.saved for c in costs[: index + 1]) + costs[index].working
            beside = update if self.update_in_backward else 0.0
            moments.append({"gradients": held, "activations": alive, "loss": 0.0, "update": beside})
        last = head + embedding if in_place else everything
        moments.append({"gradients": last, "activations": 0.0, "update": update})
        return moments

    def _sharded_moments(self, costs: list[LayerCost]) -> list[dict[str, float]]:
        """Under FSDP2 a layer's gradients are whole until they are reduced, in float32, and the head's to the end.

        What micro steps have added up is a float32 shard of each gradient, or float32 and whole (`whole_gradients`).
        Beside what is kept of weights two layers are gathered, the one at work and the next.
        """
        size, adds = self.parameter_dtype.itemsize, self.settings.grad_accumulation_steps > 1
        trained = [sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in self._layers()]
        two = 2.0 * size * max(sum(p.numel() for p in layer.parameters()) for layer in self._layers())
        everything = sum(p.numel() for p in self._trainable())
        reduced = everything * (4.0 if adds else size) / self.shards
        kept = 0.0 if not adds else everything * 4.0 if self.whole_gradients else reduced
        head, table = self.head_gradient(), self.embedding_gradient() / (2 if adds else 1)
        activations = sum(c.saved for c in costs)
        moments = [
            {"gradients": kept + 2 * head, "activations": activations, "gathered layers": two, "loss": self.loss()}
        ]
        for index in reversed(range(len(costs))):
            above = 0.0 if adds else sum(trained[index + 1 :]) * size / self.shards
            held = kept + above + head + trained[index] * (size + 4.0)
            alive = sum(c.saved for c in costs[: index + 1]) + costs[index].working
            moments.append({"gradients": held, "activations": alive, "gathered layers": two})
        ends = 2 * head + table * (1 + 4.0 / size)  # each beside the float32 copy that is reduced
        moments.append({"gradients": reduced + ends, "activations": 0.0})
        moments.append({"gradients": reduced, "activations": 0.0, "update": self.update()})
        return moments

    def _savings(self, parts: dict[str, float], costs: list[LayerCost]) -> dict[str, float]:
        """What each flag would save, in bytes, roughly: for advice."""
        settings, activations = self.settings, parts["activations"]
        found: dict[str, float] = {}
        minimum = settings.batch_size * settings.seq_length * self.student.config.d_model * self.dtype.itemsize
        found["--gradient_checkpointing full"] = sum(c.saved for c in costs) - minimum * len(costs)
        if settings.batch_size > 1:
            share = 1 - 1 / settings.batch_size
            found["--batch_size 1 with more --grad_accumulation_steps"] = share * (
                activations + parts.get("loss", 0.0)
            )
        if settings.seq_length > 1024:
            found[f"--seq_length {settings.seq_length // 2}"] = 0.5 * activations
        backbone: Any = self.student.backbone
        per = self.parameter_dtype.itemsize * 2 + STATE_BYTES[settings.optimizer][self.parameter_dtype.itemsize == 4]
        for flag, modules in {
            "--freeze_mlp": [layer.mlp for layer in backbone.layers],
            "--freeze_embeddings": [nn.ModuleList([backbone.embedding, self.student.lm_head])],  # tied: counted once
        }.items():
            found[flag] = per * sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)
        if settings.optimizer != "adamw8bit":
            wide = self.parameter_dtype.itemsize == 4
            change = STATE_BYTES[settings.optimizer][wide] - STATE_BYTES["adamw8bit"][wide]
            found["--optimizer adamw8bit"] = change * sum(p.numel() for p in self._trainable())
        alone = self.shards == 1 and not self.replicated
        refused = self.update_in_backward or self.dtype == torch.float16
        if alone and not refused and settings.grad_accumulation_steps == 1:
            found["--update_in_backward"] = 0.9 * parts["gradients"]
        if self.same_device and parts["teacher weights"]:
            found["--teacher_device on another device"] = parts["teacher weights"]
            if not settings.teacher_fp8 and not settings.freeze_mlp:
                found["--teacher_fp8"] = 0.45 * parts["teacher weights"]
        return {flag: size for flag, size in found.items() if size > 0.02 * sum(parts.values())}


def estimate_memory(
    teacher_config: PreTrainedConfig,
    student_config: LlambaConfig,
    settings: StepSettings,
    free_bytes: float | None = None,
    shards: int = 1,
    replicated: bool = False,
    teacher_need: TeacherNeed = "throughout",
    whole_gradients: bool = False,
    whole_until: WholeUntil = "",
) -> MemoryEstimate:
    """The peak of a training step from the two configurations and the settings; nothing is loaded.

    `--gradient_checkpointing auto` takes the least recomputation with which the step fits into `free_bytes`: layers
    go from none to selective, then from selective to full, one at a time; on the CPU (`free_bytes` None) none.
    With `shards`, both models are sharded over that many ranks (FSDP2); `replicated`: whole on each of them (DDP).
    A teacher that is needed "at the start" alone is gone in a step: the peak is a step's or the loading's.
    whole_gradients: those of shards are reduced once an optimizer step, not in each of its micro steps.
    whole_until: shards are cut from whole models that every rank has loaded, or aligned the student's mixers on.
    """
    kinds = replicated, teacher_need, whole_gradients, whole_until
    step = StepModel(teacher_config, student_config, settings, shards, *kinds)
    layers = step.student.config.n_layer
    if settings.gradient_checkpointing != "auto":
        return step.estimate([settings.gradient_checkpointing] * layers)
    plain = step.estimate(["none"] * layers)
    if free_bytes is None or plain.needed <= free_bytes:
        return plain
    for light, heavy in itertools.pairwise(MODES):
        ladder = [[heavy] * count + [light] * (layers - count) for count in range(1, layers + 1)]
        if step.estimate(ladder[-1]).needed > free_bytes:
            continue
        return next(found for modes in ladder if (found := step.estimate(modes)).needed <= free_bytes)
    return step.estimate([MODES[-1]] * layers)


def oom_advice(estimate: MemoryEstimate, settings: StepSettings) -> str:
    """One line for a run that is out of memory: where it goes, and the flags that help, the best first."""
    ranked = sorted(estimate.savings.items(), key=lambda item: -item[1])
    if settings.gradient_checkpointing == "full":
        ranked = [item for item in ranked if "checkpointing" not in item[0]]
    flags = "; ".join(f"{flag} (about {size / GIB:.1f} GiB)" for flag, size in ranked) or "a larger device"
    peak = estimate.describe()
    return f"out of memory on {settings.device}; a step needs about {peak}. What helps most first: {flags}"


def is_out_of_memory(error: Exception) -> bool:
    """True for what torch, CUDA, cuBLAS and the CPU's allocator raise when memory ends."""
    texts = "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory", "start new thread"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)
