"""Models on the meta device, from their configurations alone: sizes for the estimate, and what shards are made of."""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig

from hardware.devices import default_dtype
from hardware.settings import StepSettings
from model_utils import decoder_layers, freeze
from models import LlambaConfig, LlambaForCausalLM
from utils import auto_layers


def meta_student(
    teacher_config: PreTrainedConfig, student_config: LlambaConfig, settings: StepSettings
) -> LlambaForCausalLM:
    """The student as it will train, on the meta device: replaced layers in place, frozen parameters frozen."""
    config = copy.deepcopy(student_config)
    if not config.attention_layers:
        config.attention_layers = replaced_layers(settings.layers, config.n_layer)
        config.attention_cfg = LlambaConfig.describe_attention(teacher_config)
    config._attn_implementation = "eager" if settings.attn_implementation == "eager" else "sdpa"
    with torch.device("meta"), default_dtype(settings.parameter_dtype):
        student = LlambaForCausalLM(config)
    if config.tie_embeddings:
        student.lm_head.weight = student.backbone.embedding.weight
    freeze(
        student,
        mlp=settings.freeze_mlp,
        replaced_layers=settings.freeze_replaced_layers,
        embeddings=settings.freeze_embeddings,
    )
    return student.train()


def replaced_layers(layers: Sequence[int | str], n_layer: int) -> list[int]:
    """Indices that `--layers` asks for; `auto:K` counts as the first K, since only their number matters here."""
    count = auto_layers(layers)
    wanted = layers if count is None else range(count)
    return sorted({index for index in wanted if isinstance(index, int) and 0 <= index < n_layer})


def teacher_sizes(config: PreTrainedConfig) -> tuple[int, int]:
    """(parameters of the teacher, parameters of its layers' matrices)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(config)
    matrices = sum(p.numel() for layer in decoder_layers(teacher) for p in layer.parameters() if p.ndim > 1)
    return sum(p.numel() for p in teacher.parameters()), matrices
