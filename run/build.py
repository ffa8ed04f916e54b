"""From flags to the pair: load, transfer, replace, freeze, and connect both models."""

import gc
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from arguments import Arguments
from distill.distillation import StudentLoss
from distill.initialization import calibrate_mixers
from distill.layer_choice import choose_layers
from distill.teacher import HostTeacher, OwnTeacher, TeacherStates
from hardware.parallel import replicate, shard, shard_layers
from hardware.ranks import Ranks
from model_utils import (
    apply_replacements,
    check_layers,
    describe_parameters,
    freeze,
    get_student_model,
    get_teacher_model,
    is_distilled,
    share_frozen_weights,
    transfer_teacher_weights,
)
from models import LlambaForCausalLM
from run import sharded_build
from run.acceleration import accelerate, compiles, try_step
from run.inputs import Inputs, fetch
from run.pair import Models
from run.plan import mixer_options, stage_names
from run.text import RunText
from utils import FROM_TEACHER, auto_layers

log = logging.getLogger(__name__)

# What a choice depends on: another run in the same folder with the same values takes up the choice that is there.
CHOICE_MADE_FOR = (
    "layers teacher_model student_model expand mixer no_z_bias choice_tokens choice_dataset choice_recall_share "
    "dataset_name dataset_subset dataset_split dataset_revision dataset_text_field shuffle_buffer on_bad_data "
    "seq_length document_reset seed dtype"
).split()


def build_models(
    args: Arguments, student_source: str, inputs: Inputs, devices: tuple[torch.device, torch.device], ranks: Ranks
) -> Models:
    """Load the pair and do the surgery, unless the student is a checkpoint that already had it."""
    if starts_sharded(inputs):
        return build_sharded(args, student_source, inputs, devices, ranks)
    (device, teacher_device), text = devices, inputs.text
    dtype = getattr(torch, args.dtype)
    options: dict[str, Any] = dict(attn_implementation=args.attn_implementation, local_files_only=True)
    teacher: Any = None
    if inputs.teacher_need != "never":
        log.info("loading the teacher %s ...", args.teacher_model)
        commit = text.origins.commits.get("teacher_model")
        fetch(args, "--teacher_model", args.teacher_model, weights=True, commit=commit)
        teacher = get_teacher_model(
            args.teacher_model, dtype=dtype, device=teacher_device, revision=commit, **options
        )
    log.info("loading the student %s ...", student_source)
    commit = text.origins.commits.get("student_model")
    commit = fetch(args, "--student_model", student_source, weights=True, commit=commit)
    parameter_dtype = torch.float32 if dtype == torch.float16 else dtype
    student = get_student_model(
        student_source,
        teacher,
        dtype=parameter_dtype,
        device=device,
        mixers=mixer_options(args),
        revision=commit,
        **options,
    )
    if is_distilled(student.config):
        log.info("%s is a distilled student: its weights, sizes and layers are kept as they are", student_source)
    else:
        layers = check_layers(args.layers, teacher.config.num_hidden_layers)
        transfer_teacher_weights(student, teacher, replaced=layers)
        apply_replacements(student, teacher, layers)
        student.config.teacher_model = args.teacher_model
        if student_source == FROM_TEACHER:
            log.info("fitting the new mixers to some text ...")
            tokens = text.calibration_tokens(stage_names(args)[0])
            calibrate_mixers(student, teacher, tokens.to(teacher_device))
        if auto_layers(args.layers) is not None:
            chosen = ranks.first(lambda: auto_choice(args, teacher, student, text))
            apply_replacements(student, teacher, chosen)
    freeze_as_asked(args, student)
    if teacher is not None:
        share_frozen_weights(student, teacher)
    if inputs.teacher_need == "at the start":
        teacher = None
        gc.collect()  # a model holds itself in circles
    models = assemble(args, inputs, teacher, student, devices, ranks)
    try_step(args, models)
    return models


def freeze_as_asked(args: Arguments, student: LlambaForCausalLM) -> None:
    """Freeze what the flags leave out of training."""
    freeze(
        student,
        mlp=args.freeze_mlp,
        replaced_layers=args.freeze_replaced_layers,
        embeddings=args.freeze_embeddings,
    )


def assemble(
    args: Arguments,
    inputs: Inputs,
    teacher: PreTrainedModel | None,
    student: LlambaForCausalLM,
    devices: tuple[torch.device, torch.device],
    ranks: Ranks,
) -> Models:
    """The pair after its surgery, ready for steps: recomputation, compilation, head, step and hidden states."""
    student.train()
    log.info(describe_parameters(student, teacher))
    models = Models(teacher, student, inputs.text, *devices, getattr(torch, args.dtype))
    models.whole_gradients = inputs.estimate is not None and inputs.estimate.whole_gradients
    on_cpu = "none" if args.gradient_checkpointing == "auto" else args.gradient_checkpointing
    accelerate(args, models, inputs.estimate.modes if inputs.estimate else on_cpu)
    connect(args, models, ranks)
    return models


def auto_choice(args: Arguments, teacher: PreTrainedModel, student: LlambaForCausalLM, text: RunText) -> list[int]:
    """`distill.layer_choice.choose_layers` as the flags have it."""
    count = auto_layers(args.layers)
    assert count is not None
    return choose_layers(
        count,
        teacher,
        student,
        text.choice_loader,
        text.choice_sequences,
        recall_share=args.choice_recall_share,
        tokens=args.choice_tokens,
        made_for={name: getattr(args, name) for name in CHOICE_MADE_FOR},
        folder=Path(args.output_dir),
    )


def starts_sharded(inputs: Inputs) -> bool:
    """True where FSDP2's shards can be made before any weight is read; a line says why where they cannot."""
    if inputs.parallel != "fsdp":
        return False
    if inputs.whole_for:
        found = " and ".join(inputs.whole_for)
        log.warning("every rank loads whole models before it shards them: %s need them so", found)
    return not inputs.whole_for


def build_sharded(
    args: Arguments, student_source: str, inputs: Inputs, devices: tuple[torch.device, torch.device], ranks: Ranks
) -> Models:
    """`build_models` for FSDP2: sharded on the meta device, then each rank reads its own rows."""
    device, _ = devices
    log.info("loading the models in shards ...")
    commits = dict(inputs.text.origins.commits)
    if inputs.teacher_need != "never":
        commit = commits.get("teacher_model")
        fetch(args, "--teacher_model", args.teacher_model, weights=True, commit=commit)
    found = fetch(args, "--student_model", student_source, weights=True, commit=commits.get("student_model"))
    sources = sharded_build.find_sources(
        args.teacher_model, student_source, commits | ({"student_model": found} if found else {})
    )
    teacher, student = sharded_build.meta_pair(args, sources, device, inputs.teacher_need)
    freeze_as_asked(args, student)
    models = assemble(args, inputs, teacher, student, devices, ranks)
    distribute(args, models, "fsdp")
    first = stage_names(args)[0]
    sharded_build.fill(sources, models, lambda: inputs.text.calibration_tokens(first))
    if inputs.teacher_need == "at the start":
        models.teacher = models.teacher_head = models.teacher_states = None
        models.student_loss.teacher_head[0] = None
        del teacher
        gc.collect()
    try_step(args, models)
    return models


def connect(args: Arguments, models: Models, ranks: Ranks) -> None:
    """Give the pair its distillation step, the teacher's head, and the source of the teacher's hidden states."""
    if models.teacher is not None:
        # detached: a teacher that moves to another device takes its parameters along
        models.teacher_head = models.teacher.get_output_embeddings().weight.detach().to(models.device)
    models.student_loss = StudentLoss(
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
        models.teacher_states = connect_teacher(args, models, models.teacher, ranks)


def connect_teacher(args: Arguments, models: Models, teacher: PreTrainedModel, ranks: Ranks) -> TeacherStates:
    """The source of the teacher's hidden states.

    With one teacher for a host, its first rank moves it to `--teacher_device`; the others drop their copy's layers.
    """
    if args.teacher_device is None or ranks.alone:
        return OwnTeacher(teacher, models.device, every_layer=args.layer_weight > 0)
    place = torch.device(args.teacher_device)
    if ranks.local_rank == 0:
        teacher.to(place)  # type: ignore[arg-type]
    else:
        teacher.model.layers = nn.ModuleList()
    models.teacher_device = place
    return HostTeacher(teacher, models.device, place, ranks)


def distribute(args: Arguments, models: Models, parallel: str) -> None:
    """Replicate or shard the pair for the KD stages, once; the alignment stages before them are replicated."""
    if parallel == "ddp":
        models.student_loss = replicate(models.student_loss)
    elif parallel == "fsdp":
        models.student_loss = shard(models.student_loss, models.device)
        if isinstance(models.teacher_states, OwnTeacher):
            shard_layers(models.teacher_states.backbone, models.teacher_device)
