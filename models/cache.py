"""What a mixer keeps between the tokens of a generation."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    StaticCache,
)
from transformers.utils import is_torchdynamo_compiling

from .configuration_llamba import LlambaConfig


class MixerState(CacheLayerMixin, LinearAttentionCacheLayerMixin):
    """A mixer's constant-size cache: `keys` the last K-1 inputs of the convolution, `values` the state.

    Held under the names that transformers' attention caches use, so that reordering (beam search), offloading and
    resetting are transformers' own; it is also a linear-attention layer to transformers, which then looks for masks
    and lengths at the attention layers. In a static cache tensors keep their addresses, so that one decoding step can
    be compiled or be a CUDA graph; elsewhere they are replaced, which saves a copy.
    """

    keys: Any
    values: Any
    dtype: Any
    device: Any
    supports_early_init = False  # its sizes are not those of keys and values

    def __init__(self, static: bool = False) -> None:
        CacheLayerMixin.__init__(self)
        self.is_compileable = static
        self.cumulative_length: Any = torch.zeros((), dtype=torch.long) if static else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:  # type: ignore[override]
        self.keys, self.values = key_states, value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        if self.is_compileable and not self.is_initialized:
            self.keys, self.values = key_states.clone(), value_states.clone()
            self.cumulative_length = self.cumulative_length.to(self.device)
            if not is_torchdynamo_compiling():
                for tensor in (self.keys, self.values, self.cumulative_length):
                    torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the convolution's inputs [b, K-1, I+2GN] and the state [b, H, N, P]."""
        if self.is_compileable and self.is_initialized:
            self.keys.copy_(key_states)
            self.values.copy_(value_states)
        else:
            self.lazy_initialization(key_states, value_states)
        return self.keys, self.values

    def advance(self, tokens: int) -> None:
        """Count tokens: in a static cache on the device, since a number would be compiled in."""
        self.cumulative_length += tokens

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0) -> Tensor:
        return self.update(conv_states, self.values)[0]

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0) -> Tensor:
        return self.update(self.keys, recurrent_states)[1]

    def get_seq_length(self, *args: Any) -> Any:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.cumulative_length + length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: rows become copies of the rows at beam_idx [b]."""
        if self.is_initialized:
            self.update(*(state.index_select(0, beam_idx.to(state.device)) for state in (self.keys, self.values)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = (state[indices.to(state.device)] for state in (self.keys, self.values))

    def activate_past_recording(self) -> None:
        """Raises NotImplementedError: assisted generation would need the states before tokens that are refused."""
        raise NotImplementedError(
            "a mixer's state cannot go back to an earlier token: a Llamba cannot assist a model"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Going back by nothing is allowed; raises NotImplementedError for anything else."""
        if tokens_to_remove:
            self.activate_past_recording()


class Length:
    """How many tokens a cache holds, shared by its layers."""

    tokens = 0


class FixedState(MixerState):
    """A mixer's state in tensors that are given, for a `FastCache`: it counts the tokens itself."""

    def __init__(self, keys: Tensor, values: Tensor, length: Length):
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.dtype, self.device = keys.dtype, keys.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.copy_(key_states)
        self.values.copy_(value_states)
        self.is_initialized = True
        return self.keys, self.values

    def advance(self, tokens: int) -> None:
        """The cache does, after all layers."""

    def get_seq_length(self, *args: Any) -> int:
        return self.length.tokens


class FixedKeyValues(CacheLayerMixin):
    """Keys and values [b, h, capacity, w] of an attention layer in tensors that are given, for a `FastCache`."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, length: Length):
        super().__init__()
        self.keys, self.values, self.length = keys, values, length  # type: ignore[assignment]
        self.dtype, self.device = keys.dtype, keys.device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to make."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values [b, h, t, w] of the tokens at hand; returns those of all tokens so far."""
        start, end = self.length.tokens, self.length.tokens + key_states.shape[2]
        keys: Any = self.keys
        values: Any = self.values
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.is_initialized = True
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length.tokens

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length.tokens + length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """As a mixer's state: going back by nothing is allowed; raises NotImplementedError for anything else."""
        if tokens_to_remove:
            raise NotImplementedError("a fast cache cannot go back to an earlier token")


def layers_with_states(cache: Cache | None, config: LlambaConfig) -> list[Any] | None:
    """The cache's layers, with a `MixerState` wherever a mixer stands and nothing is cached yet."""
    if cache is None:
        return None
    while len(cache.layers) < config.n_layer:
        cache.layers.append(DynamicLayer())
    for index in range(config.n_layer):
        is_mixer = index not in config.attention_layers
        if is_mixer and not isinstance(cache.layers[index], MixerState):
            cache.layers[index] = MixerState(static=isinstance(cache, StaticCache))
    return cache.layers
