"""Figures of each layer and samples of text from both models, taken every so many steps of a run.

Both wait for the device, so they have intervals of their own; nothing here touches the random state, the gradients
or the weights.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.teacher import states_by_layer
from hardware.compilation import eagerly
from model_utils import decoder_layers
from models import LlambaForCausalLM
from models.modeling_llamba import AttentionInputs
from optim.step import gradient_norm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 1024  # tokens of the sequence that `layer_figures` looks at: its cost must not depend on --seq_length
GREEDY: dict[str, Any] = {
    "max_new_tokens": 48,
    "do_sample": False,
    "use_cache": True,
    "temperature": None,  # what a generation_config.json may say for sampling
    "top_p": None,
    "top_k": None,
}
PROMPTS = (
    "The history of",
    "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):",
    "Name three planets of the solar system:",
)


def gradient_norms(student: LlambaForCausalLM, scale: float = 1.0) -> dict[str, Tensor]:
    """`layers/grad_norm_<i>`: the 2-norm of each layer's gradients, divided by the loss scaler's `scale`.

    Scalars on the device; of sharded gradients over all ranks, which all have to ask. A layer without gradients
    (frozen, or updated in the backward pass) is left out.
    """
    norms = {}
    for index, layer in enumerate(decoder_layers(student)):
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        if gradients:
            norms[f"layers/grad_norm_{index}"] = gradient_norm(gradients) / scale
    return norms


@torch.no_grad()
def layer_figures(
    student: LlambaForCausalLM, teacher: PreTrainedModel | None, inputs: Tensor, positions: Tensor | None
) -> dict[str, Tensor]:
    """How far the student is from its teacher (None: no distance) after each layer, how long its mixers remember.

    `layers/hidden_distance_<i>`: norm of the difference of both models' hidden states after layer i, over the norm
    of the teacher's; `layers/mean_decay_<i>`: mean of a_t over heads and tokens. Scalars on their devices, from the
    first sequence of inputs int64 [b, t] alone; positions [b, t] restart at each document. Two layers' activations
    are alive at a time.
    """
    backbone: Any = student.backbone
    device = backbone.embedding.weight.device
    inputs = inputs[:1, :LONGEST]
    positions = None if positions is None else positions[:1, :LONGEST]
    hidden = backbone.embedding(inputs.to(device))
    resets = None if positions is None else positions.to(device) == 0
    replaced = student.config.attention_layers
    own = None
    if replaced:
        here = None if positions is None else positions.to(device)
        own = AttentionInputs(backbone.attention_config, backbone.rotary_emb, hidden, here, layers=replaced)
    targets: Iterable[Tensor | None] = itertools.repeat(None)
    if teacher is not None:
        where = None if positions is None else positions.to(teacher.device)
        targets = states_by_layer(teacher, inputs.to(teacher.device), where)
    figures: dict[str, Tensor] = {}
    with eagerly():
        for index, (layer, teacher_hidden) in enumerate(zip(backbone.layers, targets)):
            if own is not None and index in replaced:
                hidden = layer(hidden, past_key_values=None, use_cache=False, **own.for_layer(index))
            else:
                figures[f"layers/mean_decay_{index}"] = layer.mixer.decays(layer.input_layernorm(hidden)).mean()
                hidden = layer(hidden, resets)
            if teacher_hidden is not None:
                wide, target = hidden.float(), teacher_hidden.to(device).float()
                figures[f"layers/hidden_distance_{index}"] = (wide - target).norm() / target.norm()
    return figures


def as_numbers(figures: dict[str, Tensor]) -> dict[str, float]:
    """Device scalars as plain numbers, with one wait for each device."""
    numbers: dict[str, float] = {}
    for device in {value.device for value in figures.values()}:
        names = [name for name, value in figures.items() if value.device == device]
        numbers |= dict(zip(names, torch.stack([figures[name].double() for name in names]).tolist()))
    return {name: numbers[name] for name in figures}


@torch.no_grad()
def continuations(model: PreTrainedModel, tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str]) -> list[str]:
    """The model's greedy continuation of each prompt, as `GREEDY` says."""
    generate: Any = model.generate
    was_training = model.training
    model.eval()
    texts: list[str] = []
    with eagerly():
        for prompt in prompts:
            given = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
            written = generate(given, attention_mask=torch.ones_like(given), **GREEDY)
            texts.append(str(tokenizer.decode(written[0, given.shape[1] :], skip_special_tokens=True)))
    model.train(was_training)
    return texts
