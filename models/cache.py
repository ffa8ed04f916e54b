"""What a mixer keeps between the tokens of a generation."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class MixerState(CacheLayerMixin):
    """A mixer's constant-size cache: `keys` the last K-1 inputs of the convolution, `values` the state.

    Held under the names that transformers' cache layers use, so that reordering (beam search), offloading and
    resetting are transformers' own.
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        self.dtype, self.device = key_states.dtype, key_states.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Replace the convolution's inputs [b, K-1, I+2GN] and the state [b, H, N, P]."""
        self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, *args: Any) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.cumulative_length + length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.keys, self.values = (state[indices.to(state.device)] for state in (self.keys, self.values))
