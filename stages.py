"""From flags to stages: the inputs checked, the pair built, and for each stage its step, optimizer and schedule."""

import argparse
import functools
import gc
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import parallel
from acceleration import UpdateInBackward, accelerate, compiles
from arguments import FROM_TEACHER, UserError, auto_layers
from cuda_graphs import CapturedMicroStep, captures
from distillation import DistillationStep, kd_micro_step
from initialization import calibrate_mixers, student_config
from layer_choice import choose_layers
from memory import GIB, MemoryEstimate, estimate_memory
from model_files import fetch_model
from model_utils import (
    apply_replacements,
    check_layers,
    check_pair,
    check_teacher_config,
    describe_parameters,
    freeze,
    get_student_model,
    get_teacher_model,
    get_tokenizer,
    is_distilled,
    load_config,
    share_frozen_weights,
    transfer_teacher_weights,
)
from models import LlambaConfig, LlambaForCausalLM
from mohawk import AlignmentStep, trained_mixers
from optimizer import build_optimizer, build_schedule
from origins import Origins
from parallel import Ranks
from stage_text import RunText, stage_names
from teacher import HostTeacher, OwnTeacher, TeacherNeed, teacher_need
from trainer import Stage

log = logging.getLogger(__name__)


@dataclass
class Models:
    """The pair, the text that it learns from, and how the student's parts are run."""

    teacher: PreTrainedModel | None  # None where nothing from here on needs it
    student: LlambaForCausalLM
    text: RunText
    device: torch.device
    teacher_device: torch.device
    dtype: torch.dtype
    teacher_head: torch.Tensor | None = None  # [V, d] on the student's device, wherever the teacher goes
    step: Any = None  # the student with its loss; from `distribute` on under DDP or FSDP2
    hidden_states: Any = None  # where the teacher's come from (teacher.py)

    @property
    def tokenizer(self) -> Any:
        return self.text.tokenizer


@dataclass
class Inputs:
    """What is known before any weight is loaded."""

    text: RunText
    estimate: MemoryEstimate | None  # of a training step on a GPU
    teacher_need: TeacherNeed
    parallel: str = "none"  # or ddp, fsdp


def check_inputs(
    args: argparse.Namespace, student_source: str, names: Collection[str], origins: Origins, ranks: Ranks
) -> Inputs:
    """What can be wrong with the models, found from their configurations alone, and what they will take.

    names: of the stages that are still to run.
    """
    fetch_model("--teacher_model", args.teacher_model, args)
    teacher = load_config(args.teacher_model, local_files_only=True)
    check_teacher_config(teacher, args.teacher_model)
    fetch_model("--student_model", student_source, args)
    if args.layer_weight and teacher.num_hidden_layers < 2:
        raise UserError("--layer_weight: the teacher has one layer, which the loss matches already; leave it out")
    longest = teacher.max_position_embeddings
    lengths = {"seq_length": args.seq_length}
    if args.matrix_tokens:
        lengths["matrix_seq_length"] = args.matrix_seq_length
    for flag, length in lengths.items():
        if length > longest:
            raise UserError(f"--{flag} {length}: the teacher has {longest} positions; use at most that many")
    if student_source == FROM_TEACHER:
        student = student_config(teacher, args.expand)
    else:
        student = load_config(student_source, config_class=LlambaConfig, local_files_only=True)
        check_pair(student, teacher, student_source)
    check_layers(args.layers, teacher.num_hidden_layers)
    need = teacher_need(args, names, fresh=not is_distilled(student))
    way, estimate = parallel.choose_parallel(args, ranks), None
    if args.device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(args.device)
        way, estimate = settle_parallel(teacher, student, args, way, free, ranks, need)
        log.info("estimated peak of a step: %s; free %.1f of %.1f GiB", estimate.describe(), free / GIB, total / GIB)
    if way in ("ddp", "fsdp"):
        log.info("%d ranks, %s", ranks.world_size, "replicated" if way == "ddp" else "sharded")
    text = RunText(args, get_tokenizer(args.teacher_model, local_files_only=True), ranks)
    return Inputs(text, estimate, need, way)


def settle_parallel(
    teacher: Any,
    student: LlambaConfig,
    args: argparse.Namespace,
    way: str,
    free: float | None,
    ranks: Ranks,
    need: TeacherNeed = "throughout",
) -> tuple[str, MemoryEstimate]:
    """`way` with auto settled (ddp where a step fits into every rank's `free` bytes, else fsdp), and its estimate."""
    estimated = functools.partial(estimate_memory, teacher, student, args, free, teacher_need=need)
    if way != "fsdp":
        estimate = estimated(replicated=way != "none")
        if way != "auto":
            return way, estimate
        if not ranks.agree(free is not None and estimate.needed > free)[0]:
            return "ddp", estimate
        if args.optimizer == "muon":
            raise UserError(
                "--optimizer muon: the models do not fit whole on every rank; use adamw8bit, which shards"
            )
    return "fsdp", estimated(ranks.world_size)


def build_models(args: argparse.Namespace, student_source: str, inputs: Inputs, devices: Any, ranks: Ranks) -> Models:
    """Load the pair and do the surgery, unless the student is a checkpoint that already had it."""
    (device, teacher_device), text = devices, inputs.text
    dtype = getattr(torch, args.dtype)
    options = dict(attn_implementation=args.attn_implementation, local_files_only=True)
    teacher: Any = None
    if inputs.teacher_need != "never":
        fetch_model("--teacher_model", args.teacher_model, args, weights=True)
        teacher = get_teacher_model(args.teacher_model, dtype=dtype, device=teacher_device, **options)
    fetch_model("--student_model", student_source, args, weights=True)
    parameter_dtype = torch.float32 if dtype == torch.float16 else dtype
    student = get_student_model(
        student_source, teacher, dtype=parameter_dtype, device=device, expand=args.expand, **options
    )
    if is_distilled(student.config):
        log.info("%s is a distilled student: its weights, sizes and layers are kept as they are", student_source)
    else:
        layers = check_layers(args.layers, teacher.config.num_hidden_layers)
        transfer_teacher_weights(student, teacher, replaced=layers)
        apply_replacements(student, teacher, layers)
        student.config.teacher_model = args.teacher_model
        if student_source == FROM_TEACHER:
            tokens = text.calibration_tokens(stage_names(args)[0])
            calibrate_mixers(student, teacher, tokens.to(teacher_device))
        if auto_layers(args.layers) is not None:
            chosen = ranks.first(lambda: choose_layers(args, teacher, student, text.choice_loader))
            apply_replacements(student, teacher, chosen)
    freeze(
        student,
        mlp=args.freeze_mlp,
        replaced_layers=args.freeze_replaced_layers,
        embeddings=args.freeze_embeddings,
    )
    if teacher is not None:
        share_frozen_weights(student, teacher)
    if inputs.teacher_need == "at the start":
        teacher = None
        gc.collect()  # a model holds itself in circles
    student.train()
    log.info(describe_parameters(student, teacher))
    models = Models(teacher, student, text, device, teacher_device, dtype)
    on_cpu = "none" if args.gradient_checkpointing == "auto" else args.gradient_checkpointing
    accelerate(args, models, inputs.estimate.modes if inputs.estimate else on_cpu)
    connect(args, models, ranks)
    return models


def connect(args: argparse.Namespace, models: Models, ranks: Ranks) -> None:
    """Make of the pair what steps and evaluations are made of: head, step, and where hidden states come from."""
    if models.teacher is not None:
        # detached: a teacher that moves to another device takes its parameters along
        models.teacher_head = models.teacher.get_output_embeddings().weight.detach().to(models.device)
    models.step = DistillationStep(
        models.student,
        models.teacher_head,  # also with hard labels alone: evaluations compare with the teacher
        temperature=args.temperature,
        kl_weight=args.kl_weight,
        ce_weight=args.ce_weight,
        layer_weight=args.layer_weight,
        compile=compiles(args),
        autocast=torch.float16 if models.dtype == torch.float16 else None,
    )
    if models.teacher is not None:
        models.hidden_states = hidden_states(args, models, ranks)


def serves_host(args: argparse.Namespace, ranks: Ranks) -> bool:
    """True where one teacher, on a device that is no rank's, serves all ranks of a host."""
    return not ranks.alone and args.teacher_device is not None


def hidden_states(args: argparse.Namespace, models: Models, ranks: Ranks) -> OwnTeacher | HostTeacher:
    """Where the teacher's hidden states come from. A host's teacher moves to its device, and goes on other ranks."""
    if not serves_host(args, ranks):
        return OwnTeacher(models.teacher, models.device, every_layer=args.layer_weight > 0)
    teacher: Any = models.teacher
    place = torch.device(args.teacher_device)
    if ranks.local_rank == 0:
        teacher.to(place)
    else:
        teacher.model.layers = nn.ModuleList()
    models.teacher_device = place
    return HostTeacher(teacher, models.device, place, ranks)


def distribute(args: argparse.Namespace, models: Models, way: str) -> None:
    """Replicate or shard the pair for the KD stages, once; the alignment stages before them are replicated."""
    if way == "ddp":
        models.step = parallel.replicate(models.step)
    elif way == "fsdp":
        models.step = parallel.shard(models.step, models.device)
        if isinstance(models.hidden_states, OwnTeacher):
            parallel.shard_layers(models.hidden_states.backbone, models.teacher_device)


def build_stage(
    args: argparse.Namespace, name: str, models: Models, loader: Any, total: int, ranks: Ranks, way: str = "none"
) -> Stage:
    """A fresh stage: optimizer and schedule of its own, ready for `trainer.run_stage`; `way` is Inputs.parallel."""
    distils = name in ("stage1", "stage2")
    micro_step, module = distillation(args, models, way) if distils else alignment(args, name, models)
    rates = {"matrix": args.matrix_lr, "hidden": args.hidden_lr}
    max_lr = rates.get(name, args.max_lr)
    optimizer = build_optimizer(
        args.optimizer,
        module,
        lr=max_lr,
        weight_decay=args.weight_decay,
        kernel=compiles(args),
    )
    schedule = build_schedule(
        optimizer,
        total,
        max_lr=max_lr,
        min_lr=args.min_lr,
        warmup_ratio=args.warmup_ratio,
        decay_ratio=args.decay_ratio,
    )
    if args.update_in_backward:
        optimizer = UpdateInBackward(optimizer, args.grad_clip)  # type: ignore[assignment]
    stage = Stage(
        name=name,
        loader=loader,
        micro_step=micro_step,
        trainable=module,
        optimizer=optimizer,
        schedule=schedule,
        total_steps=total,
        accumulation=args.grad_accumulation_steps,
        grad_clip=args.grad_clip,
        device=models.device,
        scaler=torch.amp.GradScaler(models.device.type) if models.dtype == torch.float16 else None,
        open_ended=name == "stage1" and args.epochs > 0,
        ranks=ranks,
    )
    stage.ahead = distils and args.kl_weight > 0 and models.hidden_states.ahead
    if captures(args, models, ranks):
        stage.micro_step = CapturedMicroStep(stage.micro_step, stage.parameters(), models.device)
    if not ranks.alone:
        synchronise(stage, models, way if distils else "none")
    return stage


def synchronise(stage: Stage, models: Models, way: str) -> None:
    """Average gradients over ranks once an optimizer step: in its last backward pass, or after it ("none")."""
    if way == "fsdp":
        stage.synchronise = models.step.set_requires_gradient_sync
    elif way == "ddp":
        stage.synchronise = lambda last: setattr(models.step, "require_backward_grad_sync", last)
        stage.finish_gradients = lambda: parallel.average_gradients([models.student.lm_head.weight])
    else:
        stage.finish_gradients = lambda: parallel.average_gradients(stage.parameters())


def alignment(args: argparse.Namespace, name: str, models: Models) -> tuple[Any, nn.Module]:
    """(micro step, what it trains) of the "matrix" or "hidden" stage."""
    half = torch.float16 if models.dtype == torch.float16 else None
    tokens = models.text.calibration_tokens(name)
    align = AlignmentStep(name, models.teacher, models.student, tokens, autocast=half, compile=compiles(args))
    return align, trained_mixers(models.student)


def distillation(args: argparse.Namespace, models: Models, way: str) -> tuple[Any, nn.Module]:
    """(micro step, what it trains) of the KD stages."""
    if type(models.step) is DistillationStep:  # neither DDP's nor, by FSDP2's subclass, sharded yet
        distribute(args, models, way)
    return kd_micro_step(models.step, models.hidden_states if args.kl_weight > 0 else None), models.step
