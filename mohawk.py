"""The first two stages of MOHAWK (arXiv 2408.10189): align each mixer with the attention that it replaces.

Both walk through the teacher layer by layer. Every mixer sees the teacher's own layer input, so layers are
independent: one layer's loss is back-propagated before the next layer runs, and only one layer's activations are
alive at a time. Losses are sums over tokens, divided by sizes that are measured once, on the stage's first
sequences (`Sizes`), so that 1 x 8 and 2 x 4 (batch x accumulation) have the same gradients.

* "matrix": rows of the mixer's sequence-mixing matrix (from C, B and the decays; no D, no convolution of x) against
  rows of the attention matrix, squared distance over the mean squared norm of a head's rows, mean over heads.
* "hidden": the mixer's output against the attention's output, squared distance over the latter's mean square.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from models import LlambaForCausalLM
from models.modeling_llamba import AttentionInputs, attention_module
from models.state_space import decay_dtype, ssd_matrix
from trainer import DeviceBatch, Sums


def trained_mixers(student: LlambaForCausalLM) -> nn.ModuleList:
    """The mixers, all that these stages train; replaced layers have none."""
    layers: Any = student.backbone.layers
    return nn.ModuleList(layer.mixer for layer in layers if hasattr(layer, "mixer"))


class AlignmentStep:
    """A micro step of the "matrix" or "hidden" stage for `trainer.run_stage`."""

    def __init__(
        self,
        kind: str,
        teacher: Any,
        student: LlambaForCausalLM,
        tokens: Tensor,
        *,
        autocast: torch.dtype | None = None,
    ):
        """`tokens` int64 [b, t]: a few sequences of the stage's own text, to measure the attention's sizes on."""
        self.loss: Callable[..., tuple[Tensor, Tensor]] = {"matrix": matrix_loss, "hidden": hidden_loss}[kind]
        self.size = {"matrix": matrix_size, "hidden": hidden_size}[kind]
        self.teacher, self.student, self.autocast = teacher.model, student, autocast
        layers: Any = student.backbone.layers
        self.mixers: dict[int, Any] = {i: layer.mixer for i, layer in enumerate(layers) if hasattr(layer, "mixer")}
        self.sizes: dict[int, Tensor] = {}
        for index, attention, u, attended, options in self._walk(tokens, None):
            if index in self.mixers:
                device = self.mixers[index].D.device
                self.sizes[index] = self.size(attention, u, attended, options).to(device)

    def _walk(self, inputs: Tensor, positions: Tensor | None) -> Iterator[tuple[int, Any, Tensor, Tensor, Any]]:
        """(layer, attention module, its input u, its output, its options) of every teacher layer in turn."""
        teacher = self.teacher
        device = teacher.embed_tokens.weight.device
        positions = None if positions is None else positions.to(device)
        with torch.no_grad():
            hidden = teacher.embed_tokens(inputs.to(device))
            layers = range(len(teacher.layers))
            shared = AttentionInputs(teacher.config, teacher.rotary_emb, hidden, positions, layers=layers)
        for index, layer in enumerate(teacher.layers):
            options = shared.for_layer(index)
            with torch.no_grad():
                u = layer.input_layernorm(hidden)
                attended = layer.self_attn(hidden_states=u, past_key_values=None, **options)[0]
            yield index, layer.self_attn, u, attended, options
            with torch.no_grad():
                hidden = hidden + attended
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def __call__(self, batch: DeviceBatch, grad_scale: Tensor) -> Sums:
        """Forward and backward of every mixer on one batch; figures as sums over valid tokens."""
        sums: Sums = {}
        for index, attention, u, attended, options in self._walk(batch.inputs, batch.position_ids):
            if index in self.mixers:
                self._align(index, attention, u, attended, options, batch, grad_scale, sums)
        return sums

    def _align(
        self,
        index: int,
        attention: Any,
        u: Tensor,
        attended: Tensor,
        options: dict[str, Any],
        batch: DeviceBatch,
        grad_scale: Tensor,
        sums: Sums,
    ) -> None:
        mixer = self.mixers[index]
        device = batch.inputs.device
        u, attended = u.to(device), attended.to(device)
        resets = None if batch.position_ids is None else batch.position_ids == 0
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            rows, decay = self.loss(mixer, attention, u, attended, options, resets, self.sizes[index])
        total = (rows * batch.valid).sum()
        (total * (grad_scale / len(self.mixers))).backward()
        share = total.detach() / len(self.mixers)
        sums["loss"] = sums["loss"] + share if "loss" in sums else share
        sums[f"layers/squared_error_{index}"] = total.detach()
        sums[f"layers/mean_decay_{index}"] = (decay * batch.valid).sum().detach()


def hidden_size(attention: Any, u: Tensor, attended: Tensor, options: dict[str, Any]) -> Tensor:
    """Mean squared norm of the attention's output, a scalar."""
    return attended.to(decay_dtype(u.dtype)).square().sum(-1).mean()


def hidden_loss(
    mixer: Any,
    attention: Any,
    u: Tensor,
    attended: Tensor,
    options: dict[str, Any],
    resets: Tensor | None,
    size: Tensor,
) -> tuple[Tensor, Tensor]:
    """Per-token relative squared error of the mixer's output [b, t], and mean decay [b, t]; u, attended [b, t, d]."""
    wide = decay_dtype(u.dtype)
    return (mixer(u, resets).to(wide) - attended.to(wide)).square().sum(-1) / size, mean_decay(mixer, u)


@torch.no_grad()
def matrix_size(attention: Any, u: Tensor, attended: Tensor, options: dict[str, Any]) -> Tensor:
    """Mean squared norm of each head's rows, [H, 1]."""
    return attention_matrix(attention, u, options).square().sum(-1).mean((0, 2))[:, None]


def matrix_loss(
    mixer: Any,
    attention: Any,
    u: Tensor,
    attended: Tensor,
    options: dict[str, Any],
    resets: Tensor | None,
    size: Tensor,
) -> tuple[Tensor, Tensor]:
    """Per-row relative squared distance of mixing and attention matrices, mean over heads [b, t], and mean decay."""
    _, B, C, A_log, _, _ = mixer.project(u, resets)
    with torch.no_grad():
        wanted = attention_matrix(attention, u, options)
    distance = (ssd_matrix(A_log, B, C, resets) - wanted).square().sum(-1)  # [b, H, t]
    return (distance / size).mean(1), mean_decay(mixer, u)


@torch.no_grad()
def mean_decay(mixer: Any, u: Tensor) -> Tensor:
    """The mean over heads of a_t [b, t]."""
    return mixer.decays(u).mean(-1)


def attention_matrix(attention: Any, u: Tensor, options: dict[str, Any]) -> Tensor:
    """softmax(q k^T) [b, H, t, t] of one decoder layer's attention for normalised inputs u [b, t, d].

    With rotary positions, grouped queries, q and k norms, and the mask that the layer itself is given (none means
    causal). float32 or better.
    """
    wide = decay_dtype(u.dtype)
    shape = (*u.shape[:-1], -1, attention.head_dim)
    q, k = attention.q_proj(u).view(shape), attention.k_proj(u).view(shape)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    rotate = attention_module(attention.config.model_type).apply_rotary_pos_emb
    q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *options["position_embeddings"])
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * attention.scaling
    return (scores + additive_mask(options["attention_mask"], scores)).softmax(-1)


def additive_mask(mask: Tensor | None, scores: Tensor) -> Tensor:
    """The layer's mask as numbers to add to scores [b, H, t, t]: -inf where nothing is seen."""
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_fill(~mask, -torch.inf)
    return mask.to(scores.dtype)
