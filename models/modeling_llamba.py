"""The Llamba student: Mamba-2 mixers in a Llama's residual stack, with attention at chosen layers.

Shapes: b batch, t time, d d_model, I d_inner, H x-heads, G B/C-heads, P = I / H, N state size, K convolution width.
A checkpoint carries this file and those that it imports, so that it loads anywhere.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention import AttentionInputs, attention_module, attention_parts
from .cache import MixerState
from .configuration_llamba import LlambaConfig
from .layers import LlambaMLP, LlambaRMSNorm
from .state_space import decay_dtype, ssd_chunked, ssd_step

__all__ = [
    "AttentionInputs",
    "LlambaBlock",
    "LlambaForCausalLM",
    "LlambaMixer",
    "LlambaModel",
    "MixerState",
    "attention_module",
]

CONV_WIDTH = 4


class LlambaMixer(nn.Module):
    """Mamba-2: in_proj -> causal convolution -> state-space operator -> gate -> out_proj.

    `ssm_cfg["mixer"]`: "llamba", the discrete form that is published, log a_t = -softplus(A_log_t); or "mamba2", the
    form of arXiv 2405.21060, which others serve: dt_t = softplus(raw_t + dt_bias), log a_t = -exp(A_log) dt_t, and
    what enters the state is multiplied by dt_t (on B's side: each head has its own).
    """

    def __init__(self, config: LlambaConfig):
        super().__init__()
        ssm = config.ssm_cfg
        self.d_inner, self.d_state, self.chunk_size = config.d_inner, ssm["d_state"], ssm["chunk_size"]
        self.n_v_heads, self.n_qk_heads = ssm["n_v_heads"], ssm["n_qk_heads"]
        self.d_head = self.d_inner // self.n_v_heads
        groups = self.n_qk_heads * self.d_state
        self.d_conv = self.d_inner + 2 * groups
        self.in_proj_rows = (self.d_inner, groups, groups, self.d_inner, self.n_v_heads)  # x, B, C, z, A_log
        self.in_proj = nn.Linear(config.d_model, sum(self.in_proj_rows), bias=ssm["bias"])
        self.z_bias = nn.Parameter(torch.zeros(self.d_inner)) if ssm["z_bias"] else None
        self.dt_bias: Any = None
        self.A_log: Any = None
        if ssm["mixer"] == "mamba2":
            self.dt_bias = nn.Parameter(torch.zeros(self.n_v_heads))
            self.A_log = nn.Parameter(torch.zeros(self.n_v_heads))
        self.conv1d: Any = nn.Conv1d(self.d_conv, self.d_conv, CONV_WIDTH, groups=self.d_conv, bias=True)
        self.D = nn.Parameter(torch.ones(self.n_v_heads))
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=ssm["bias"])
        self.activation = nn.Identity() if ssm["activation"] == "identity" else ACT2FN[ssm["activation"]]

    def project(
        self, u: Tensor, resets: Tensor | None = None, mask: Tensor | None = None, past: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [b,t,H,P], B and C [b,t,G,N], log a [b,t,H], z [b,t,I], and the convolution's inputs [b,K-1+t,..].

        u [b, t, d]; resets bool [b, t]; mask [b, t] is 0 at padding; past [b, K-1, I+2GN] precedes the sequence.
        """
        xBC, z, raw = self._project_in(u)
        if mask is not None:
            xBC = xBC * mask[..., None].to(xBC.dtype)
        padded = F.pad(xBC, (0, 0, CONV_WIDTH - 1, 0)) if past is None else torch.cat((past, xBC), dim=1)
        mixed = self.activation(self._convolve(padded, u.shape[1], resets))
        if mask is not None:
            mixed = mixed * mask[..., None].to(mixed.dtype)
        groups = self.n_qk_heads * self.d_state
        x, B, C = mixed.split([self.d_inner, groups, groups], dim=-1)
        x = x.unflatten(-1, (self.n_v_heads, self.d_head))
        B, C = (part.unflatten(-1, (self.n_qk_heads, self.d_state)) for part in (B, C))
        log_decay, dt = self._log_decay(raw)
        if dt is not None:
            B = (B * dt[..., None]).to(B.dtype)
        return x, B, C, log_decay, z, padded

    def _log_decay(self, raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """log a_t and the step sizes dt_t (None for "llamba"), both [b, t, H] in float32 or better."""
        wide = decay_dtype(raw.dtype)
        if self.A_log is None:
            return -F.softplus(raw.to(wide)), None
        dt = F.softplus(raw.to(wide) + self.dt_bias.to(wide))
        return -torch.exp(self.A_log.to(wide)) * dt, dt

    def _project_in(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """in_proj's xBC [b, t, I+2GN], z [b, t, I] and what the decays come from [b, t, H].

        Rows that are no multiple of 8 would make every product with them slow: they are filled up with zeros.
        """
        weight: Tensor = self.in_proj.weight
        bias: Tensor | None = self.in_proj.bias
        fill = -weight.shape[0] % 8
        if fill:
            weight = F.pad(weight, (0, 0, 0, fill))
            bias = None if bias is None else F.pad(bias, (0, fill))
        projected = F.linear(u, weight, bias) if fill else self.in_proj(u)
        xBC, z, raw, _ = projected.split([self.d_conv, self.d_inner, self.n_v_heads, fill], dim=-1)
        return xBC, z, raw

    def _convolve(self, padded: Tensor, t: int, resets: Tensor | None) -> Tensor:
        """Causal depthwise convolution as K shifted products, which compile into one kernel with what surrounds it.

        padded [b, K-1+t, I+2GN] -> [b, t, I+2GN]; a tap that would reach over a document's start is left out.
        """
        weight = self.conv1d.weight.to(padded.dtype)
        mixed = self.conv1d.bias.to(padded.dtype) + weight[:, 0, -1] * padded[:, CONV_WIDTH - 1 :]
        documents = None if resets is None else F.pad(resets.long().cumsum(-1), (CONV_WIDTH - 1, 0))
        for shift in range(1, CONV_WIDTH):
            start = CONV_WIDTH - 1 - shift
            earlier = padded[:, start : start + t]
            if documents is not None:
                same = documents[:, start : start + t] == documents[:, CONV_WIDTH - 1 :]
                earlier = earlier * same[..., None]
            mixed = mixed + weight[:, 0, -1 - shift] * earlier
        return mixed

    def decays(self, u: Tensor) -> Tensor:
        """a_t for inputs u [b, t, d]: [b, t, H], float32 or better."""
        rows = self.in_proj.weight[-self.n_v_heads :]
        bias = None if self.in_proj.bias is None else self.in_proj.bias[-self.n_v_heads :]
        return self._log_decay(F.linear(u, rows, bias))[0].exp()

    def forward(
        self,
        u: Tensor,
        resets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: MixerState | None = None,
    ) -> Tensor:
        """u [b, t, d] -> [b, t, d]; `cache` is read and replaced by the state after the last token."""
        past = state = None
        if cache is not None and cache.is_initialized:
            past, state = cache.keys, cache.values
        x, B, C, log_decay, z, padded = self.project(u, resets, attention_mask, past)
        if state is not None and u.shape[1] == 1:
            y, state = ssd_step(x[:, 0], log_decay[:, 0], B[:, 0], C[:, 0], self.D, state)
            y = y[:, None]
        else:
            y, state = ssd_chunked(
                x, log_decay, B, C, self.D, chunk_size=self.chunk_size, resets=resets, initial_state=state
            )
        if cache is not None:
            # A copy: a view would keep the convolution's inputs of the whole prompt alive.
            cache.update(padded[:, -(CONV_WIDTH - 1) :].clone(), state)
            cache.cumulative_length += u.shape[1]
        gate = F.silu(z if self.z_bias is None else z + self.z_bias.to(z.dtype))
        return self.out_proj(y.flatten(2) * gate)


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
        self.post_init()

    def _make_layer(self, index: int) -> nn.Module:
        """A mixer block, or a place holder where an attention layer will stand."""
        return nn.Identity() if index in self.config.attention_layers else LlambaBlock(self.config)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm [b, t, d] for input_ids [b, t]; on request every layer's input too.

        position_ids [b, t] that restart at 0 without a cache or mask mark packed documents, which are kept apart:
        attention by transformers' own packed mask, mixers by resetting convolution and state.
        """
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        caches = self._layer_caches(past_key_values)
        packed = position_ids is not None and past_key_values is None and attention_mask is None
        resets = position_ids == 0 if packed else None
        padding = self._padding(attention_mask, hidden.shape[1])
        attention = None
        if self.config.attention_layers:
            indices = self.config.attention_layers
            attention = AttentionInputs(
                self.attention_config, self.rotary_emb, hidden, position_ids, attention_mask, past_key_values, indices
            )
        inputs = []
        for index, layer in enumerate(self.layers):
            if output_hidden_states:
                inputs.append(hidden)
            if attention is not None and index in self.config.attention_layers:
                options = attention.for_layer(index)
                hidden = layer(hidden, past_key_values=past_key_values, use_cache=use_cache, **options)
            else:
                hidden = layer(hidden, resets, padding, caches[index] if caches else None)
        hidden = self.final_layernorm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*inputs, hidden) if output_hidden_states else None,
        )

    def _layer_caches(self, cache: Cache | None) -> list[Any] | None:
        """The cache's layers, with a `MixerState` wherever a mixer stands and nothing is cached yet."""
        if cache is None:
            return None
        while len(cache.layers) < len(self.layers):
            cache.layers.append(DynamicLayer())
        for index in range(len(self.layers)):
            is_mixer = index not in self.config.attention_layers
            if is_mixer and not isinstance(cache.layers[index], MixerState):
                cache.layers[index] = MixerState()
        return cache.layers

    def _padding(self, attention_mask: Tensor | None, t: int) -> Tensor | None:
        """The mask [b, t] of the tokens at hand, or None when a mixer has nothing to mask."""
        return None if attention_mask is None or t == 1 else attention_mask[:, -t:]


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
        backbone.attention_config, backbone.rotary_emb = teacher_config, rotary_emb

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int | Tensor = 0,
        **unknown: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, t, vocab] (the last `logits_to_keep` positions); with `labels` [b, t] the shifted mean loss.

        Arguments that this model has no use for are passed over.
        """
        use_cache = not self.training if use_cache is None else use_cache
        output = self.backbone(
            input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """`generate()` passes over arguments that it does not know."""


LlambaConfig.register_for_auto_class()
LlambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
