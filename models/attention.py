"""transformers' own decoder layers in a hybrid: which classes they are, and what a forward pass hands them.

Shapes: b batch, t time, d d_model.
"""

from collections.abc import Sequence
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


class AttentionInputs:
    """Positions, rotary embedding and masks of a forward pass, shared by transformers' decoder layers.

    hidden [b, t, d]; position_ids [b, t] or None for one document from the cache's end on. Only given positions are
    searched for packed documents: transformers asks the device whether there are any, and the CPU waits for that.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        rotary_emb: Any,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        layers: Sequence[int] = (0,),
    ):
        self.config = config
        plain = attention_mask is None and cache is None and position_ids is None
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        self.masks = {
            kind: None
            if plain and kind == "full_attention" and config._attn_implementation == "sdpa"  # which knows "causal"
            else makers[kind](
                config=config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
                layer_idx=layers[0],
            )
            for kind in {self.mask_type(index) for index in layers}
        }
        if position_ids is None:
            seen = cache.get_seq_length(layers[0]) if cache is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen)[None]
        self.position_ids = position_ids
        self.rotary = rotary_emb(hidden, position_ids=position_ids)

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
