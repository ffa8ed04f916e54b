"""transformers' own decoder layers in a hybrid: which classes they are, and what a forward pass hands them.

Shapes: b batch, t time, d d_model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def attention_module(model_type: str) -> Any:
    """transformers' modelling module of an architecture: its decoder layer and rotary embedding are used as is."""
    return import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def attention_parts(model_type: str) -> tuple[type[nn.Module], type[nn.Module]]:
    """(decoder layer class, rotary embedding class) of `attention_cfg["model_type"]`."""
    module, prefix = attention_module(model_type), model_type.capitalize()
    return getattr(module, f"{prefix}DecoderLayer"), getattr(module, f"{prefix}RotaryEmbedding")


MASK_MAKERS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


def masks_for_generation(
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None = None,
    **unused: Any,
) -> dict[str, Any]:
    """The masks that `generate` makes ahead of a compilable step, by kind of layer; attention_mask [b, seen + t].

    In transformers' place, which would not tell a mixer of padding in a single token: a prompt may be read token by
    token. Each is sized by the cache of the first layer of its kind.
    """
    first = {kind: index for index, kind in reversed(list(enumerate(config.layer_types)))}
    masks = {
        kind: MASK_MAKERS[kind](
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            layer_idx=index,
        )
        for kind, index in first.items()
        if kind in MASK_MAKERS
    }
    if attention_mask is not None:
        tokens = attention_mask[:, -inputs_embeds.shape[1] :]  # strides that grow would compile every step anew
        masks["linear_attention"] = tokens.clone(memory_format=torch.contiguous_format)
    return masks


def padding_mask(attention_mask: Any, t: int) -> Tensor | None:
    """What a mixer is told of padding: the mask [b, t] of the tokens at hand; ValueError for a mask of pairs."""
    if isinstance(attention_mask, dict):
        return attention_mask.get("linear_attention")
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        shape = list(attention_mask.shape)
        raise ValueError(f"attention_mask {shape}: a mixer takes a mask of tokens [batch, length], not of pairs")
    return attention_mask[:, -t:]


@contextmanager
def recorded_weights(layers: Sequence[Any], weights: list[Tensor]) -> Iterator[None]:
    """Collect the attention weights [b, heads, t, seen + t] of decoder layers, which return none themselves.

    Only the implementation "eager" computes them.
    """

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if output[1] is not None:
            weights.append(output[1])

    hooks = [layer.self_attn.register_forward_hook(keep) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class AttentionInputs:
    """Positions, rotary embedding and masks of a forward pass, shared by transformers' decoder layers.

    hidden [b, t, d]; position_ids [b, t] or None for one document from the cache's end on. Only given positions are
    searched for packed documents: transformers asks the device whether there are any, and the CPU waits for that.
    attention_mask: [b, seen + t], or [b, 1, t, seen + t], or a dict of the latter by kind of layer (of `generate`).
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        rotary_emb: Any,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Any = None,
        cache: Cache | None = None,
        layers: Sequence[int] = (0,),
    ):
        self.config = config
        self.masks = (
            attention_mask
            if isinstance(attention_mask, dict)
            else self._masks(hidden, position_ids, attention_mask, cache, layers)
        )
        if position_ids is None:
            seen = cache.get_seq_length(layers[0]) if cache is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen)[None]
        self.position_ids = position_ids
        self.rotary = rotary_emb(hidden, position_ids=position_ids)

    def _masks(
        self,
        hidden: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None,
        layers: Sequence[int],
    ) -> dict[str, Any]:
        """A mask for each kind of layer, sized by the cache of the first layer of that kind."""
        plain = attention_mask is None and cache is None and position_ids is None
        return {
            kind: None
            if plain and kind == "full_attention" and self.config._attn_implementation == "sdpa"  # knows "causal"
            else MASK_MAKERS[kind](
                config=self.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
                layer_idx=index,
            )
            for kind, index in {self.mask_type(index): index for index in reversed(layers)}.items()
        }

    def mask_type(self, index: int) -> str:
        """`full_attention` or `sliding_attention`, as the architecture's own model chooses for a layer."""
        types = getattr(self.config, "layer_types", None)
        if types:
            return types[index]
        return "sliding_attention" if getattr(self.config, "sliding_window", None) else "full_attention"

    def for_layer(self, index: int) -> dict[str, Any]:
        """Arguments of a decoder layer's forward."""
        mask = self.masks[self.mask_type(index)]
        return {"attention_mask": mask, "position_ids": self.position_ids, "position_embeddings": self.rotary}
