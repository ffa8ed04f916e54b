"""The Llamba student: Mamba-2 mixers in a Llama's residual stack, with attention at chosen layers.

Shapes: b batch, t time, d d_model.
A checkpoint carries this file and those that it imports, so that it loads anywhere.
"""

from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .attention import (
    AttentionInputs,
    attention_module,
    attention_parts,
    masks_for_generation,
    padding_mask,
    recorded_weights,
)
from .cache import MixerState, layers_with_states
from .configuration_llamba import LlambaConfig
from .fast_path import FastCache, read_in_parts, wants_fast_path
from .layers import LlambaMLP, LlambaRMSNorm
from .mixer import LlambaMixer

__all__ = [
    "AttentionInputs",
    "LlambaBlock",
    "LlambaForCausalLM",
    "LlambaMixer",
    "LlambaModel",
    "LlambaRMSNorm",
    "MixerState",
    "attention_module",
]

logger = logging.get_logger(__name__)
# What `generate` hands on for a token where nothing unusual is asked for.
LEAN = {"next_sequence_length", "past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}


class LlambaBlock(GradientCheckpointingLayer):
    """h += mixer(norm(h)); h += mlp(norm(h))."""

    def __init__(self, config: LlambaConfig):
        super().__init__()
        self.input_layernorm = LlambaRMSNorm(config.d_model, config.norm_epsilon)
        self.mixer = LlambaMixer(config)
        self.post_attention_layernorm = LlambaRMSNorm(config.d_model, config.norm_epsilon)
        self.mlp = LlambaMLP(config)

    def forward(
        self,
        hidden: Tensor,
        resets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MixerState | None = None,
    ) -> Tensor:
        hidden = hidden + self.mixer(self.input_layernorm(hidden), resets, attention_mask, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class LlambaPreTrainedModel(PreTrainedModel):
    config_class = LlambaConfig
    config: LlambaConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlambaBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LlambaMixer):
            for name in ("z_bias", "dt_bias", "A_log"):
                if getattr(module, name) is not None:
                    nn.init.zeros_(getattr(module, name))
            nn.init.ones_(module.D)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        super().set_attn_implementation(*args, **kwargs)
        backbone = self.base_model
        if isinstance(backbone, LlambaModel):
            backbone.share_attn_implementation()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """transformers' own; a size that is not rounded up is one that a configuration must not round up either."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        if self.config.vocab_size % self.config.pad_vocab_size_multiple:
            self.config.pad_vocab_size_multiple = 1
        return embedding


class LlambaModel(LlambaPreTrainedModel):
    """The backbone: embedding, layers, final norm; a rotary embedding for its attention layers, if any."""

    def __init__(self, config: LlambaConfig):
        super().__init__(config)
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(self._make_layer(index) for index in range(config.n_layer))
        self.final_layernorm = LlambaRMSNorm(config.d_model, config.norm_epsilon)
        self.attention_config: Any = None
        self.rotary_emb: nn.Module | None = None
        if config.attention_layers:
            self.attention_config = config.attention_config()
            self.attention_config._attn_implementation = config._attn_implementation
            layer_class, rotary_class = attention_parts(self.attention_config.model_type)
            for index in config.attention_layers:
                self.layers[index] = layer_class(self.attention_config, index)
            self.rotary_emb = rotary_class(self.attention_config)
            self._no_split_modules = [*LlambaPreTrainedModel._no_split_modules, layer_class.__name__]
        self.gradient_checkpointing = False
        self.post_init()

    def _make_layer(self, index: int) -> nn.Module:
        """A mixer block, or a place holder where an attention layer will stand."""
        return nn.Identity() if index in self.config.attention_layers else LlambaBlock(self.config)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def share_attn_implementation(self) -> None:
        """Attention layers compute as the configuration says: they and their masks have one of their own."""
        layers: list[Any] = [self.layers[index] for index in self.config.attention_layers]
        configs = [layer.self_attn.config for layer in layers] + ([self.attention_config] if layers else [])
        for config in configs:
            config._attn_implementation = self.config._attn_implementation

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **unknown: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm [b, t, d] for input_ids [b, t]; on request every layer's input too.

        position_ids [b, t] that restart at 0 without a cache or mask mark packed documents, which are kept apart:
        attention by transformers' own packed mask, mixers by resetting convolution and state. attention_mask
        [b, seen + t], or a dict of masks as `generate` makes it; also [b, 1, t, seen + t] where all layers are
        attention. Raises ValueError for both or none of input_ids and inputs_embeds [b, t, d].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: the cache is off")
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if isinstance(past_key_values, FastCache):
            past_key_values.reserve(*hidden.shape[:2])
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        record = self.config.output_attentions if output_attentions is None else output_attentions
        calls = self._calls(hidden, position_ids, attention_mask, past_key_values, use_cache)
        weights: list[Tensor] = []
        attention = [self.layers[index] for index in self.config.attention_layers]
        with recorded_weights(attention, weights) if record else nullcontext():
            states = self._run(hidden, calls, keep)
        if isinstance(past_key_values, FastCache):
            past_key_values.advance(hidden.shape[1], attention_mask)
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=past_key_values,
            hidden_states=tuple(states) if keep else None,
            attentions=tuple(weights) if record else None,
        )

    def _run(self, hidden: Tensor, calls: list[dict[str, Any]], keep: bool | None) -> list[Tensor]:
        """The final hidden states [b, t, d], behind the inputs of every layer if they are to be kept."""
        states = []
        for layer, options in zip(self.layers, calls):
            if keep:
                states.append(hidden)
            hidden = layer(hidden, **options)
        return [*states, self.final_layernorm(hidden)]

    def _calls(
        self,
        hidden: Tensor,
        position_ids: Tensor | None,
        attention_mask: Any,
        cache: Cache | None,
        use_cache: bool | None,
    ) -> list[dict[str, Any]]:
        """Arguments of every layer's forward pass beside the hidden states."""
        caches = layers_with_states(cache, self.config)
        packed = position_ids is not None and cache is None and attention_mask is None
        resets = position_ids == 0 if packed else None
        mixers = len(self.config.attention_layers) < len(self.layers)
        padding = padding_mask(attention_mask, hidden.shape[1]) if mixers else None
        calls: list[dict[str, Any]] = [
            {"resets": resets, "attention_mask": padding, "cache": caches[index] if caches else None}
            for index in range(len(self.layers))
        ]
        if indices := self.config.attention_layers:
            attention = AttentionInputs(
                self.attention_config, self.rotary_emb, hidden, position_ids, attention_mask, cache, indices
            )
            for index in indices:
                calls[index] = attention.for_layer(index) | {"past_key_values": cache, "use_cache": use_cache}
        return calls


class LlambaForCausalLM(LlambaPreTrainedModel, GenerationMixin):
    """The backbone with its head; loads from and saves to the published weight names."""

    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: LlambaConfig):
        super().__init__(config)
        self.backbone = LlambaModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @classmethod
    def load(cls, name: str, **options: Any) -> "LlambaForCausalLM":
        """Load a folder or hub id with every key accounted for; see `loading.load_student`."""
        from .loading import load_student

        return load_student(cls, name, **options)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def set_attention_layers(
        self, layers: dict[int, nn.Module], teacher_config: PreTrainedConfig, rotary_emb: nn.Module
    ) -> None:
        """Put whole decoder layers at the given indices and write them into the configuration."""
        if not layers:
            return
        backbone = self.backbone
        for index, layer in layers.items():
            attention: Any = layer.self_attn
            attention.layer_idx = index
            backbone.layers[index] = layer
        self.config.attention_layers = sorted({*self.config.attention_layers, *layers})
        self.config.attention_cfg = LlambaConfig.describe_attention(teacher_config)
        self.config._attn_implementation = teacher_config._attn_implementation
        backbone.attention_config, backbone.rotary_emb = deepcopy(teacher_config), rotary_emb

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, t, vocab] (the last `logits_to_keep` positions); with `labels` [b, t] the shifted mean loss.

        `options` are the loss's: `num_items_in_batch` divides the sum in place of the tokens at hand (a Trainer's
        accumulation), `shift_labels` are labels that are shifted already. Others are passed over.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        given = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, position_ids=position_ids)
        inputs: dict[str, Any] = dict(attention_mask=attention_mask, past_key_values=past_key_values, **given)
        inputs["use_cache"] = use_cache
        wanted = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        recorded = any(getattr(self.config, key) if flag is None else flag for key, flag in wanted.items())
        if past_key_values is not None and not recorded and not torch.is_grad_enabled():
            if isinstance(past_key_values, FastCache) and labels is None:
                logits = past_key_values.next_logits(self, inputs)
                if logits is not None:
                    return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
            kept = logits_to_keep if isinstance(logits_to_keep, int) else 0
            output = read_in_parts(self.backbone, inputs, kept)
        else:
            output = self.backbone(**inputs, **wanted, return_dict=True)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' own; for a token on the fast path only what it takes, since the device waits meanwhile."""
        cache, length = kwargs.get("past_key_values"), kwargs.get("next_sequence_length")
        if isinstance(cache, FastCache) and length == 1 and cache.get_seq_length() and not kwargs.keys() - LEAN:
            positions = kwargs.get("position_ids")
            lean = dict(input_ids=input_ids[:, -1:], attention_mask=kwargs.get("attention_mask"), use_cache=True)
            return lean | dict(
                past_key_values=cache, position_ids=positions if positions is None else positions[:, -1:]
            )
        generation: Any = super()
        return generation.prepare_inputs_for_generation(input_ids, *args, **kwargs)

    create_masks_for_generate = staticmethod(masks_for_generation)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *sizes: Any, **more: Any
    ) -> Any:
        """A `FastCache` where the call can take the fast path; else transformers' own, with mixers' states in it.

        These are put in at once, since they know their length and what compiles.
        """
        generation: Any = super()
        given = model_kwargs.get("past_key_values")
        if given is None and wants_fast_path(self, generation_config, generation_mode):
            model_kwargs["past_key_values"] = FastCache(self, generation_config.max_length)
            return None
        result = generation._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, *sizes, **more
        )
        if isinstance(given, FastCache):
            given.go_on(self, generation_config, generation_mode)
        else:
            layers_with_states(model_kwargs.get("past_key_values"), self.config)
        return result

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """`generate()` passes over arguments that it does not know."""


LlambaConfig.register_for_auto_class()
LlambaModel.register_for_auto_class("AutoModel")
LlambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
