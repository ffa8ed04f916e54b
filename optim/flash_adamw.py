"""pytorch-optimizer's FlashAdamW on exact masters: the 16 bits that a bf16 weight lacks stand beside it."""

from typing import Any

import torch
from pytorch_optimizer import FlashAdamW
from torch import Tensor

MASTER_BITS = 32  # of 16-bit weights; without them a rate of 1e-5 moves no bf16 weight of 0.02


class ExactFlashAdamW(FlashAdamW):
    """`FlashAdamW` with 32-bit masters wherever weights have 16.

    State: 2.13 bytes a parameter, 4.13 beside 16-bit weights.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any):
        narrow = any(p.dtype != torch.float32 for group in groups for p in group["params"])
        super().__init__(groups, master_weight_bits=MASTER_BITS if narrow else None, **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The library's, but the width of masters stays this run's: older states had none."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["master_byte_width"] = self.master_byte_width

    def master_weights(self) -> dict[Tensor, Tensor]:
        """The float32 weights that the parameters are rounded from."""
        return {p: self.get_param_fp32(p.detach(), state) for p, state in self.state.items()}
