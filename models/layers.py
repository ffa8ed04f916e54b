"""What of a layer is as in every Llama: the norm and the MLP."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration_llamba import LlambaConfig
from .state_space import decay_dtype


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
