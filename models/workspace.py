"""The tensors of one decoding step at fixed addresses, and the CUDA graph that is recorded on them.

Shapes: b batch, S capacity in tokens; others as in decoding.py.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention import attention_module
from .cache import FixedKeyValues, FixedState, Length
from .layers import CONV_WIDTH
from .state_space import decay_dtype

BLOCK = 256  # tokens: capacities are multiples of it
ONE_AT_A_TIME = threading.Lock()  # torch captures one graph at a time in a process


def capacity_for(tokens: int) -> int:
    """Tokens rounded up, by an eighth at most from 4096 on, so that calls of nearly one length share a graph."""
    block = max(BLOCK, 1 << max(tokens.bit_length() - 4, 0))
    return -(-tokens // block) * block


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs of a device are captured on: torch's own is of one device for good."""
    return torch.cuda.Stream(device)


class Workspace:
    """What a step of `batch` rows reads and writes; `capacity` 0 is for a student without attention layers.

    tokens, positions and now [b, 1] are a step's inputs (now: False where the token is padding); seen bool [b, S]:
    the tokens that are no padding; place [1]: where in the cache the next token goes; layers: what each layer keeps.
    """

    def __init__(self, model: Any, batch: int, capacity: int):
        config, device, dtype = model.config, model.device, model.dtype
        self.batch, self.capacity, self.length = batch, capacity, Length()
        self.tokens, self.positions = (torch.zeros(batch, 1, dtype=torch.long, device=device) for _ in range(2))
        self.now = torch.ones(batch, 1, dtype=torch.bool, device=device)
        self.seen = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.layers: list[Any] = []
        for index, layer in enumerate(model.backbone.layers):
            if index in config.attention_layers:
                shape: tuple[int, ...] = (batch, config.num_key_value_heads, capacity, config.head_dim)
                keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                self.layers.append(FixedKeyValues(keys, values, self.length))
            else:
                mixer = layer.mixer
                keys = torch.zeros(batch, CONV_WIDTH - 1, mixer.d_conv, dtype=dtype, device=device)
                shape = (batch, mixer.n_v_heads, mixer.d_state, mixer.d_head)
                values = torch.zeros(shape, dtype=decay_dtype(dtype), device=device)
                self.layers.append(FixedState(keys, values, self.length))
        self.graph: Any = None
        self.logits: Any = None

    def step(self, model: Any, mixers: Callable[..., Tensor], attention: Callable[..., Tensor]) -> Tensor:
        """Logits [b, 1, vocabulary] of `tokens`; what is kept moves on by a token, but for the length on the host.

        mixers, attention: `mixer_step` and `attention_step`, or what they are compiled to.
        """
        backbone, config = model.backbone, model.config
        hidden = backbone.embedding(self.tokens)
        # A graph reads the whole of what there is room for; without one, keys are read as far as they go.
        end = self.capacity if hidden.is_cuda else self.length.tokens + 1
        if config.attention_layers:
            rotary = backbone.rotary_emb(hidden, position_ids=self.positions)
            rotate = attention_module(config.attention_cfg["model_type"]).apply_rotary_pos_emb
            visible = self._visible(end, config.sliding_window)
        for kind, layer, kept in zip(config.layer_types, backbone.layers, self.layers):
            if kind == "linear_attention":
                hidden = mixers(layer, hidden, kept.keys, kept.values, self.now)
            else:
                keys, values = kept.keys[:, :, :end], kept.values[:, :, :end]
                hidden = attention(layer, hidden, rotary, rotate, keys, values, self.place, visible[kind])
        self.place += 1
        return model.lm_head(backbone.final_layernorm(hidden))

    def _visible(self, end: int, window: int | None) -> dict[str, Tensor]:
        """What the token sees of the first `end`, bool [b, end], by kind of layer.

        Itself in any case: a softmax over nothing would be NaN, which zeros in later products do not take away.
        """
        seen = self.seen[:, :end]
        seen.index_copy_(1, self.place, self.now)
        visible = {"full_attention": seen.index_fill(1, self.place, True)}
        if window is not None:
            recent = torch.arange(end, device=seen.device) > self.place - window
            visible["sliding_attention"] = visible["full_attention"] & recent
        return visible

    def record(self, model: Any, mixers: Callable[..., Tensor], attention: Callable[..., Tensor]) -> None:
        """Record one step as a CUDA graph; nothing may be kept yet, and nothing is afterwards."""
        stream = torch.cuda.Stream(model.device)
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets libraries allocate what they keep
                self.step(model, mixers, attention)
        torch.cuda.current_stream(model.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Others may use the device meanwhile: a streamer's reader, say.
        options: Any = {"stream": capture_stream(model.device), "capture_error_mode": "thread_local"}
        with ONE_AT_A_TIME, torch.cuda.graph(graph, **options):
            self.logits = self.step(model, mixers, attention)
        self.graph = graph
        self.clear()

    def clear(self) -> None:
        """Nothing is kept: all zeros, but for keys and values, which are not read before they are written."""
        self.length.tokens = 0
        self.now.fill_(True)
        self.seen.zero_()
        self.place.zero_()
        for layer in self.layers:
            layer.is_initialized = False
            if isinstance(layer, FixedState):
                layer.keys.zero_()
                layer.values.zero_()

    def take(self, other: "Workspace", rows: Tensor | None = None) -> None:
        """What another one keeps, which has no more capacity: all its rows, or those at `rows` [b]."""
        pairs = [(self.seen[:, : other.capacity], other.seen), (self.now, other.now)]
        for mine, theirs in zip(self.layers, other.layers):
            room = theirs.keys.shape[2] if isinstance(mine, FixedKeyValues) else None
            pairs += [(mine.keys[:, :, :room], theirs.keys), (mine.values[:, :, :room], theirs.values)]
            mine.is_initialized = theirs.is_initialized
        for target, source in pairs:
            target.copy_(source if rows is None else source[rows.to(source.device)])
        self.place.copy_(other.place)
        self.length.tokens = other.length.tokens

    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return self.seen.nbytes + sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
