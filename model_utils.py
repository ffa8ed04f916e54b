"""The two models and the surgery between them: load, transfer, replace, freeze, share.

Order matters and is always the same (`run/build.py`): the student is loaded or built, the teacher's weights are
transferred, chosen layers are replaced by deep copies of the teacher's, parameters are frozen, and frozen tensors
that equal the teacher's share its storage.
"""

import copy
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from checkpoints.folder_checks import check_folder
from hub.hub_files import gated
from models import LlambaConfig, LlambaForCausalLM
from utils import FROM_TEACHER, UserError, auto_layers, format_count

log = logging.getLogger(__name__)


def decoder_layers(model: Any) -> nn.ModuleList:
    """The residual layers of a teacher (`model.layers`) or a student (`backbone.layers`)."""
    backbone = model.backbone if hasattr(model, "backbone") else model.model
    return backbone.layers


SUPPORTED_TEACHERS = ("llama", "mistral", "qwen2", "qwen3")

# Teacher tensor -> student tensor. `{i}` is the layer index. Every teacher tensor matches exactly one row.
TRANSFER = {
    "model.embed_tokens.weight": "backbone.embedding.weight",
    "model.norm.weight": "backbone.final_layernorm.weight",
    "lm_head.weight": "lm_head.weight",
    "model.layers.{i}.input_layernorm.weight": "backbone.layers.{i}.input_layernorm.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "backbone.layers.{i}.post_attention_layernorm.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "backbone.layers.{i}.mlp.gate_proj.weight",
    "model.layers.{i}.mlp.up_proj.weight": "backbone.layers.{i}.mlp.up_proj.weight",
    "model.layers.{i}.mlp.down_proj.weight": "backbone.layers.{i}.mlp.down_proj.weight",
    "model.layers.{i}.mlp.gate_proj.bias": "backbone.layers.{i}.mlp.gate_proj.bias",
    "model.layers.{i}.mlp.up_proj.bias": "backbone.layers.{i}.mlp.up_proj.bias",
    "model.layers.{i}.mlp.down_proj.bias": "backbone.layers.{i}.mlp.down_proj.bias",
}

# What a mixer layer has no place for. A replacement (a deep copy of the whole layer) brings these along.
DROPPED = tuple(
    f"model.layers.{{i}}.self_attn.{name}"
    for name in (
        *(f"{proj}_proj.{kind}" for proj in "qkvo" for kind in ("weight", "bias")),
        "q_norm.weight",
        "k_norm.weight",
    )
)


def load_config(
    name: str, *, config_class: Any = AutoConfig, local_files_only: bool = False, revision: str | None = None
) -> Any:
    """The configuration of a hub id (at a commit) or local folder; a `UserError` names what is missing."""
    require_model_folder(name)
    where: Any = dict(local_files_only=local_files_only, revision=revision or "main")
    try:
        if config_class is LlambaConfig:
            _require_llamba(name, config_class.get_config_dict(name, **where)[0])
        return config_class.from_pretrained(name, **where)
    except (OSError, ValueError) as error:
        raise UserError(_load_failure("configuration", name, local_files_only, error)) from error


def _require_llamba(name: str, content: dict[str, Any]) -> None:
    kind = content.get("model_type", LlambaConfig.model_type)  # the published checkpoints do not say
    if kind != LlambaConfig.model_type:
        raise UserError(
            f"--student_model {name}: is a {kind} model, not a Llamba; name it as the --teacher_model, and "
            "--student_model from_teacher makes a student of it"
        )


def get_tokenizer(name: str, *, local_files_only: bool = False, revision: str | None = None) -> Any:
    """The fast tokenizer of a hub id (at a commit) or local folder; a `UserError` names what is missing."""
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local_files_only, revision=revision or "main")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(_load_failure("tokenizer", name, local_files_only, error)) from error


def check_teacher_config(config: PreTrainedConfig, name: str) -> None:
    """Raise a `UserError` unless the teacher is of an architecture that the transfer table covers."""
    if config.model_type not in SUPPORTED_TEACHERS:
        raise UserError(
            f"--teacher_model {name}: architecture '{config.model_type}' is not supported; "
            f"supported are {', '.join(SUPPORTED_TEACHERS)}"
        )


def get_teacher_model(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    attn_implementation: str = "sdpa",
    local_files_only: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load the teacher: frozen, in eval mode, without cache, in `dtype` on `device`; of a hub id at a commit.

    Raises `UserError` for a folder without config or weights, or an architecture that is not supported.
    """
    where: dict[str, Any] = dict(local_files_only=local_files_only, revision=revision or "main")
    check_teacher_config(load_config(name, **where), name)
    try:
        options: dict[str, Any] = dict(dtype=dtype, attn_implementation=attn_implementation, **where)
        teacher = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_load_failure("teacher weights", name, local_files_only, error)) from error
    placed: Any = teacher
    return as_teacher(placed.to(device))


def as_teacher(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze a model and put it in eval mode without cache; returns the same model."""
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    return model


def get_student_model(
    name: str,
    teacher: PreTrainedModel | None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    attn_implementation: str = "sdpa",
    local_files_only: bool = False,
    mixers: dict[str, Any] | None = None,
    revision: str | None = None,
) -> LlambaForCausalLM:
    """Load the student from a hub id or folder, or build it to the teacher's sizes (`from_teacher`).

    attn_implementation: of the attention layers that a checkpoint of a hybrid holds. mixers: with `from_teacher`,
    what `distill.initialization.student_config` takes. revision: commit of a hub id.
    Raises `UserError` when the checkpoint is incomplete, has keys too few, too many or misshapen, or when its
    vocabulary or sizes do not fit the teacher's (where one is given).
    """
    if name == FROM_TEACHER:
        from distill.initialization import student_from_teacher

        assert teacher is not None
        return student_from_teacher(teacher, dtype=dtype, device=device, **(mixers or {}))
    require_model_folder(name)
    try:
        options: dict[str, Any] = dict(attn_implementation=attn_implementation, local_files_only=local_files_only)
        student = LlambaForCausalLM.load(name, dtype=dtype, revision=revision, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_load_failure("student", name, local_files_only, error)) from error
    if teacher is not None:
        check_pair(student.config, teacher.config, name)
    placed: Any = student
    return placed.to(device)


def check_pair(student: LlambaConfig, teacher: PreTrainedConfig, name: str) -> None:
    """Raise a `UserError` unless vocabulary, width, depth and MLP width of the two models agree."""
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"--student_model {name}: its vocabulary has {student.vocab_size} entries, the teacher's "
            f"{teacher.vocab_size}; distillation needs the same vocabulary"
        )
    sizes = {
        "d_model/hidden_size": (student.d_model, teacher.hidden_size),
        "n_layer/num_hidden_layers": (student.n_layer, teacher.num_hidden_layers),
        "mlp_cfg.intermediate_size": (student.mlp_cfg["intermediate_size"], teacher.intermediate_size),
    }
    for field, (own, wanted) in sizes.items():
        if own != wanted:
            raise UserError(f"--student_model {name}: {field} is {own}, but the teacher's is {wanted}")


def check_layers(layers: Sequence[int | str], n_layer: int) -> list[int]:
    """Sorted, unique layer indices; negative ones are passed over, one out of range is a `UserError`.

    None for `auto:K`, whose layers are chosen once there are weights, with K below the number of layers.
    """
    wanted = auto_layers(layers)
    if wanted is not None and wanted >= n_layer:
        raise UserError(f"--layers auto:{wanted}: the teacher has {n_layer} layers; use auto:1 to auto:{n_layer - 1}")
    chosen = sorted({index for index in layers if isinstance(index, int) and index >= 0})
    if chosen and chosen[-1] >= n_layer:
        raise UserError(f"--layers {chosen[-1]}: the teacher has layers 0 to {n_layer - 1}")
    return chosen


def is_distilled(config: LlambaConfig) -> bool:
    """True for the configuration of a checkpoint of this toolkit: its weights are already the student's own."""
    return getattr(config, "teacher_model", None) is not None


def student_name(source: str, replaced: Collection[int]) -> str | None:
    """The student's name of a teacher tensor, None for a known drop; raises `UserError` for one without a place."""
    pattern, layer = _pattern(source)
    if layer in replaced:
        return source.replace("model.", "backbone.", 1)
    if pattern in DROPPED:
        return None
    if pattern not in TRANSFER:
        raise UserError(f"teacher tensor {source} has no place in the student and is not a known drop")
    return TRANSFER[pattern].format(i=layer)


@torch.no_grad()
def transfer_teacher_weights(
    student: LlambaForCausalLM, teacher: PreTrainedModel, replaced: Collection[int] = ()
) -> list[str]:
    """Copy embedding, final norm, head, and each layer's norms and MLP from the teacher into the student.

    Layers in `replaced` are passed over: `apply_replacements` brings them whole. Returns the names of the student
    tensors that were written. Raises `UserError` if a teacher tensor is in neither table, if the student lacks the
    place for one, or if shapes differ.
    """
    targets = dict(student.named_parameters(remove_duplicate=False))
    written, dropped = [], []
    for source, tensor in teacher_tensors(teacher):
        pattern, layer = _pattern(source)
        if layer in replaced:
            continue
        if pattern in DROPPED:
            dropped.append(source)
            continue
        if pattern not in TRANSFER:
            raise UserError(f"teacher tensor {source} has no place in the student and is not a known drop")
        name = TRANSFER[pattern].format(i=layer)
        if name not in targets or targets[name].shape != tensor.shape:
            found = tuple(targets[name].shape) if name in targets else "nothing"
            raise UserError(
                f"teacher tensor {source} {tuple(tensor.shape)} does not fit {name} in the student: {found}"
            )
        targets[name].copy_(tensor)
        written.append(name)
    log.info(
        "transferred %d tensors (embedding, final norm, head; norms and MLP of %d layers); "
        "%d attention tensors have no place in a mixer layer",
        len(written),
        len({_pattern(name)[1] for name in written} - {None}),
        len(dropped),
    )
    return written


def teacher_tensors(teacher: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every teacher parameter by name, a tied head under `lm_head.weight` as well."""
    yield from teacher.named_parameters(remove_duplicate=False)
    named = dict(teacher.named_parameters(remove_duplicate=False))
    if "lm_head.weight" not in named:
        yield "lm_head.weight", named["model.embed_tokens.weight"]


def apply_replacements(
    student: LlambaForCausalLM, teacher: PreTrainedModel, layers: Sequence[int]
) -> LlambaForCausalLM:
    """Put deep copies of the teacher's whole layers at `layers` and bind its rotary embedding to the student.

    Works in place. The copies take the student's dtype and device and are trainable. Raises `UserError` for an
    index that the teacher does not have.
    """
    chosen = check_layers(layers, teacher.config.num_hidden_layers)
    weight = student.backbone.embedding.weight
    copies = {}
    for index in chosen:
        layer = copy.deepcopy(teacher.model.layers[index]).to(device=weight.device, dtype=weight.dtype)
        copies[index] = layer.requires_grad_(True).train(student.training)
    rotary = copy.deepcopy(teacher.model.rotary_emb).to(weight.device)
    student.set_attention_layers(copies, copy.deepcopy(teacher.config), rotary)
    if chosen:
        log.info("layers %s replaced by the teacher's own", " ".join(map(str, chosen)))
    return student


def freeze(
    student: LlambaForCausalLM, *, mlp: bool = False, replaced_layers: bool = False, embeddings: bool = False
) -> tuple[int, int]:
    """Freeze every MLP, every replaced layer, embedding and head; returns (trainable, frozen) parameter counts."""
    if embeddings:
        student.backbone.embedding.requires_grad_(False)
        student.lm_head.requires_grad_(False)
    for index, layer in enumerate(student.backbone.layers):
        if mlp:
            layer.mlp.requires_grad_(False)
        if replaced_layers and index in student.config.attention_layers:
            layer.requires_grad_(False)
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    if not trainable:
        raise UserError(
            "--freeze_mlp, --freeze_replaced_layers, --freeze_embeddings and --layers leave nothing to train"
        )
    return trainable, frozen


@torch.no_grad()
def share_frozen_weights(student: LlambaForCausalLM, teacher: PreTrainedModel) -> int:
    """Let frozen student tensors that equal the teacher's use its storage; returns the bytes saved.

    Only frozen tensors of the same device, dtype and value: nothing trainable is ever shared, and the teacher's
    tensors are never written to.
    """
    targets = {name: p for name, p in student.named_parameters() if not p.requires_grad}
    saved = 0
    for source, tensor in teacher_tensors(teacher):
        pattern, layer = _pattern(source)
        name = TRANSFER.get(pattern, pattern.replace("model.", "backbone.", 1)).format(i=layer)
        mine = targets.get(name)
        if mine is None or mine.data_ptr() == tensor.data_ptr():
            continue
        if mine.device == tensor.device and mine.dtype == tensor.dtype and torch.equal(mine, tensor):
            mine.data = tensor.data
            saved += tensor.numel() * tensor.element_size()
    if saved:
        log.info("frozen weights shared with the teacher: %.2f GiB held once", saved / 2**30)
    return saved


def frozen_names(student: nn.Module) -> set[str]:
    """Names of the parameters that do not train: a checkpoint writes them once a run."""
    return {name for name, p in student.named_parameters() if not p.requires_grad}


def describe_parameters(student: nn.Module, teacher: nn.Module | None) -> str:
    """One line with the sizes of both models."""
    trainable = format_count(sum(p.numel() for p in student.parameters() if p.requires_grad))
    own = f"student {format_count(sum(p.numel() for p in student.parameters()))} parameters, {trainable} trainable"
    if teacher is None:
        return f"{own}; no teacher is kept, since nothing of this run needs one from here on"
    return f"{own}; teacher {format_count(sum(p.numel() for p in teacher.parameters()))}"


def _pattern(name: str) -> tuple[str, int | None]:
    """`model.layers.3.mlp.up_proj.weight` -> (`model.layers.{i}.mlp.up_proj.weight`, 3)."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    if not match:
        return name, None
    return name.replace(f".layers.{match[1]}.", ".layers.{i}.", 1), int(match[1])


def require_model_folder(name: str) -> None:
    """Raise a `UserError` for a path without a sound model folder; a hub id passes."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_folder(folder)
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")):
            raise UserError(f"model folder {name} does not exist")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {name} has no config.json")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"model folder {name} has no weights (model.safetensors or pytorch_model.bin)")


def _cached_config(name: str) -> bool:
    """Whether the Hub's cache holds something of a model, so that it is not its absence that is to be told."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # no name of a model
        return False


def _load_failure(what: str, name: str, local_files_only: bool, error: BaseException) -> str:
    text = " ".join(str(error).split())
    if local_files_only and not Path(name).is_dir() and not _cached_config(name):
        return f"{what} of {name} is not in the cache, and --local_files_only forbids a download"
    if not local_files_only and "gated" in text.lower():
        return str(gated(name))
    return f"{what} of {name} cannot be loaded: {text[:500]}"
