"""The pair under FSDP2, without any process ever holding a whole model.

Both models are built on the meta device, where the surgery is done, and sharded; then each rank reads its own rows.
Where mixers start from the teacher's attention, the teacher's layers are gathered one at a time, and each whole mixer
is made, calibrated and cut into rows before the next. Weights are those of `run.build`'s way to the bit.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from arguments import Arguments
from distill.initialization import (
    attention_half,
    calibrate_mixer,
    mlp_half,
    start_mixer,
    student_config,
    visit_layers,
)
from hardware.devices import default_dtype
from hardware.parallel import copy_rows
from hardware.sharded_weights import WeightFiles, copy_shard, materialise, read_weights, return_free_memory
from model_utils import (
    apply_replacements,
    as_teacher,
    check_layers,
    is_distilled,
    load_config,
    student_name,
    teacher_tensors,
)
from models import LlambaConfig, LlambaForCausalLM
from models.modeling_llamba import LlambaMixer
from run.pair import Models
from run.plan import mixer_options
from utils import FROM_TEACHER, UserError

log = logging.getLogger(__name__)


@dataclass
class Sources:
    """Where the pair's weights come from: names as they were given, and the local folders that hold them."""

    teacher: str
    student: str
    teacher_folder: str
    student_folder: str  # or from_teacher
    commits: Mapping[str, str]  # of what comes from the Hub

    @property
    def builds(self) -> bool:
        """True for a student that is built to the teacher's sizes."""
        return self.student == FROM_TEACHER


def find_sources(teacher: str, student: str, commits: Mapping[str, str]) -> Sources:
    """Folders, or the Hub's cache of commits that are there already."""
    teacher_folder = weights_folder(teacher, commits.get("teacher_model"))
    student_folder = student if student == FROM_TEACHER else weights_folder(student, commits.get("student_model"))
    return Sources(teacher, student, teacher_folder, student_folder, commits)


def student_sizes(sources: Sources) -> LlambaConfig:
    """The configuration of a student that has weights of its own."""
    commit = sources.commits.get("student_model")
    return load_config(sources.student, config_class=LlambaConfig, local_files_only=True, revision=commit)


def weights_folder(name: str, commit: str | None) -> str:
    """The local folder of a model: itself, or its snapshot in the Hub's cache."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else snapshot_download(name, revision=commit, local_files_only=True)


def meta_pair(args: Arguments, sources: Sources, device: torch.device, need: str) -> tuple[Any, Any]:
    """(teacher, student) after the surgery: on the meta device, but what of the teacher stays whole is read.

    The teacher is None where nothing needs it.
    """
    dtype = getattr(torch, args.dtype)
    parameter_dtype = torch.float32 if dtype == torch.float16 else dtype
    config = load_config(sources.teacher, local_files_only=True, revision=sources.commits.get("teacher_model"))
    teacher: Any = None if need == "never" else meta_teacher(args, sources, config, dtype, device)
    sizes = student_config(config, **mixer_options(args)) if sources.builds else student_sizes(sources)
    sizes._attn_implementation = args.attn_implementation
    with torch.device("meta"), default_dtype(parameter_dtype):
        student = LlambaForCausalLM(sizes)
    if sizes.tie_embeddings:
        student.lm_head.weight = student.backbone.embedding.weight
    if not sources.builds:
        student.config._name_or_path, student.config.dtype = sources.student, parameter_dtype
    if is_distilled(sizes):
        log.info("%s is a distilled student: its weights, sizes and layers are kept as they are", sources.student)
    else:
        apply_replacements(student, teacher, check_layers(args.layers, config.num_hidden_layers))
        student.config.teacher_model = args.teacher_model
    backbone = student.backbone
    if backbone.rotary_emb is not None:
        backbone.rotary_emb = type(backbone.rotary_emb)(backbone.attention_config).to(device)
    return teacher, student


def meta_teacher(
    args: Arguments, sources: Sources, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> Any:
    """A teacher whose layers are on the meta device; embedding, final norm and head are read, whole."""
    config = copy.deepcopy(config)
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=args.attn_implementation)
    as_teacher(teacher)
    if config.tie_word_embeddings:
        teacher.lm_head.weight = teacher.model.embed_tokens.weight
    teacher.model.rotary_emb = type(teacher.model.rotary_emb)(teacher.config).to(device)
    layers, teacher.model.layers = teacher.model.layers, nn.ModuleList()
    materialise(teacher, device)
    read_teacher(sources, teacher)
    teacher.model.layers = layers
    return teacher


def read_teacher(sources: Sources, model: nn.Module, prefix: str = "") -> None:
    """Fill a teacher's parameters, or this rank's rows, from its files; `prefix` leads from its names to theirs."""
    files = WeightFiles(Path(sources.teacher_folder))
    plain = "model.embed_tokens.weight" not in files  # a backbone saved alone
    read_weights(
        ((prefix + name, p) for name, p in model.named_parameters()),
        files,
        lambda name: name.removeprefix("model.") if plain else name,
    )


def fill(sources: Sources, models: Models, calibration: Callable[[], torch.Tensor]) -> None:
    """Memory and values for a sharded pair's own rows (`models`: a `run.pair.Models` after `distribute`)."""
    teacher, student = models.teacher, models.student
    if teacher is not None:
        for index, layer in enumerate(teacher.model.layers):
            materialise(layer, models.teacher_device)
            read_teacher(sources, layer, f"model.layers.{index}.")
    materialise(models.student_loss, models.device)
    own = dict(student.named_parameters())
    fresh = is_fresh(sources)
    if not fresh:
        read_student(sources, student, own, fresh)
        return
    assert teacher is not None
    given = transferred(student, teacher)
    if sources.builds:
        start_mixers(student, teacher, calibration().to(models.teacher_device))
    else:
        read_student(sources, student, {name: p for name, p in own.items() if name not in given}, fresh)


def is_fresh(sources: Sources) -> bool:
    """True for a student that takes its start from the teacher's weights."""
    if sources.builds:
        return True
    return not is_distilled(student_sizes(sources))


def transferred(student: LlambaForCausalLM, teacher: PreTrainedModel) -> set[str]:
    """Copy the teacher's rows into transferred and replaced tensors; returns their names in the student."""
    targets = dict(student.named_parameters(remove_duplicate=False))
    written = set()
    for source, tensor in teacher_tensors(teacher):
        name = student_name(source, student.config.attention_layers)
        if name is not None:
            copy_shard(targets[name], tensor)
            written.add(name)
    log.info("transferred %d tensors, each rank its own rows", len(written))
    return written


def read_student(sources: Sources, student: LlambaForCausalLM, wanted: dict[str, Any], fresh: bool) -> None:
    """Fill parameters from a student's files, in which nothing may be missing or without a place.

    fresh: of published mixers those of replaced layers have none, and are passed over.
    """
    files = WeightFiles(Path(sources.student_folder))
    replaced = [f"backbone.layers.{index}." for index in student.config.attention_layers]
    known = {name for name, _ in student.named_parameters(remove_duplicate=False)}
    surplus = sorted(files.file_of.keys() - known)
    if fresh:
        surplus = [name for name in surplus if not name.startswith(tuple(replaced))]
    if surplus:
        raise UserError(f"{sources.student}: unexpected keys: {', '.join(surplus[:8])}")
    read_weights(wanted.items(), files)


@torch.no_grad()
def start_mixers(student: LlambaForCausalLM, teacher: PreTrainedModel, tokens: torch.Tensor) -> None:
    """`distill.initialization`'s start and calibration for shards; tokens int64 [b, t] on the teacher's device."""

    def gathered(layer: Any, *given: Any) -> Any:
        layer.unshard()
        return attention_half(layer, *given)

    def finished(layer: Any, *given: Any) -> Any:
        hidden = mlp_half(layer, *given)
        layer.reshard()
        return hidden

    errors = []
    weight: Any = student.backbone.embedding.weight
    for visit in visit_layers(teacher.model, tokens, halves=(gathered, finished)):
        if visit.index in student.config.attention_layers:
            continue
        with torch.device("meta"), default_dtype(weight.dtype):
            mixer = LlambaMixer(student.config)
        mixer.to_empty(device=weight.device)
        start_mixer(mixer, visit.attention, teacher.config)
        errors.append(calibrate_mixer(mixer, visit))
        own: Any = student.backbone.layers[visit.index].mixer
        places = dict(own.named_parameters())
        for name, whole in mixer.named_parameters():
            copy_rows(places[name], whole)
        del mixer, whole, places
        return_free_memory()
    log.info("mixers calibrated: mean relative error %.3f", sum(errors) / max(len(errors), 1))
