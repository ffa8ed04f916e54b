"""The student's plain layers: norm, MLP, and a mixer's input projection and convolution.

A layer's weights are read in its own forward alone, so that what wraps or hooks a layer (adapters, offloading) works.
Shapes: b batch, t time, d d_model, c channels, K convolution width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_llamba import LlambaConfig
from .state_space import decay_dtype

CONV_WIDTH = 4
SMALL = 1 << 22  # entries of a weight: see `vector_product`


class LlambaRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 or better."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(decay_dtype(hidden.dtype))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(hidden.dtype)


class LlambaMLP(nn.Module):
    """SwiGLU: down(act(gate(u)) * up(u))."""

    def __init__(self, config: LlambaConfig):
        super().__init__()
        width, bias = config.mlp_cfg["intermediate_size"], config.mlp_cfg["bias"]
        self.gate_proj = nn.Linear(config.d_model, width, bias=bias)
        self.up_proj = nn.Linear(config.d_model, width, bias=bias)
        self.down_proj = nn.Linear(width, config.d_model, bias=bias)
        self.act_fn = ACT2FN[config.mlp_cfg["act_fn"]]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


def vector_product(linear: nn.Module, u: Tensor) -> Tensor:
    """linear(u) for u [b, 1, d]; in a compiled step of one row, small weights are multiplied by what compiles to one
    kernel with its surroundings: a library's takes 4 us however small they are, and is better where they are large.
    """
    one_row = torch.compiler.is_compiling() and u.shape[0] == u.shape[1] == 1
    if not one_row or not isinstance(linear, nn.Linear) or linear.weight.numel() > SMALL:
        return linear(u)
    y = (linear.weight * u[0]).sum(-1)[None, None]
    return y if linear.bias is None else y + linear.bias


class FilledLinear(nn.Linear):
    """A linear map of any number of rows: where that is no multiple of 8, products with it would be slow."""

    def forward(self, u: Tensor, keep_fill: bool = False) -> Tensor:
        """u [b, t, d] -> [b, t, rows]; with `keep_fill` rows is rounded up to 8, and the last ones are zeros."""
        fill = -self.out_features % 8
        if not fill or u.shape[-2] == 1:  # a token's time is that of reading weights: a filled copy would double it
            return super().forward(u)
        bias = None if self.bias is None else F.pad(self.bias, (0, fill))
        filled = F.linear(u, F.pad(self.weight, (0, 0, 0, fill)), bias)
        return filled if keep_fill else filled[..., : self.out_features]


class CausalConv1d(nn.Conv1d):
    """Causal depthwise convolution as K shifted products, which compile into one kernel with what surrounds it."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, CONV_WIDTH, groups=channels, bias=True)

    def forward(self, padded: Tensor, resets: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """padded [b, K-1+t, c] -> [b, t, c]; a tap that would reach over a document's start (resets) is left out."""
        t = padded.shape[1] - (CONV_WIDTH - 1)
        assert self.bias is not None
        weight = self.weight.to(padded.dtype)
        if t == 1 and not torch.is_grad_enabled():
            return (padded * weight[:, 0].T).sum(1, keepdim=True) + self.bias.to(padded.dtype)
        mixed = self.bias.to(padded.dtype) + weight[:, 0, -1] * padded[:, CONV_WIDTH - 1 :]
        documents = None if resets is None else F.pad(resets.long().cumsum(-1), (CONV_WIDTH - 1, 0))
        for shift in range(1, CONV_WIDTH):
            start = CONV_WIDTH - 1 - shift
            earlier = padded[:, start : start + t]
            if documents is not None:
                same = documents[:, start : start + t] == documents[:, CONV_WIDTH - 1 :]
                earlier = earlier * same[..., None]
            mixed = mixed + weight[:, 0, -1 - shift] * earlier
        return mixed
