"""Floating-point operations that training cannot do without, counted on models; on the meta device, too."""

from typing import Any

from torch import nn

from models import LlambaForCausalLM
from models.modeling_llamba import LlambaBlock


def distillation_operations(teacher: Any, student: LlambaForCausalLM, length: int) -> float:
    """Operations a token of a distillation step on sequences of `length` tokens.

    2 a teacher weight, 4 a student weight and 2 more a trainable one, embeddings left out; causal attention added:
    2 * length * width forward a layer (half of the full square), and twice that backward.
    """
    operations = 2.0 * _weights(teacher.model.layers) + 2.0 * teacher.lm_head.weight.numel()
    everything = _weights(student.backbone.layers) + student.lm_head.weight.numel()
    trainable = sum(p.numel() for p in student.backbone.layers.parameters() if p.requires_grad and p.ndim > 1)
    trainable += student.lm_head.weight.numel() * student.lm_head.weight.requires_grad
    layers = teacher.config.num_hidden_layers + 3.0 * len(student.config.attention_layers)
    return operations + 4.0 * everything + 2.0 * trainable + _attention(teacher.config, length) * layers


def alignment_operations(teacher: Any, student: LlambaForCausalLM, length: int) -> float:
    """Operations a token of an alignment step: the teacher's layers forward, the mixers forward and backward."""
    mixers = [layer.mixer for layer in student.backbone.layers if isinstance(layer, LlambaBlock)]
    config = teacher.config
    teachers = 2.0 * _weights(teacher.model.layers) + _attention(config, length) * config.num_hidden_layers
    return teachers + 6.0 * sum(_weights(mixer) for mixer in mixers)


def _attention(config: Any, length: int) -> float:
    return 2.0 * length * config.num_attention_heads * config.head_dim


def _weights(layers: nn.Module) -> int:
    """Entries of the layers' matrices, fp8 ones included."""
    tensors = [*layers.parameters(), *(b for name, b in layers.named_buffers() if name.endswith("weight"))]
    return sum(t.numel() for t in tensors if t.ndim > 1)
