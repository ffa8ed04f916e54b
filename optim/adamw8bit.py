"""AdamW with 8-bit moments on exact master weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from optim.masters import MasterAdamW, advance, join_master, local
from optim.moments import EAGER_SLICE, block_length, step_scalars, update_blocks


class AdamW8bit(MasterAdamW):
    """AdamW on exact float32 masters with 8-bit moments in blocks of at most 256 (cf. arXiv 2110.02861).

    A bf16 matrix has an int16 `low` beside it (weight and low are the float32 master). uint8 codes hold the root of
    the second moment, with a float32 scale a block; int8 codes hold the first moment divided by that root, which is
    what an update is made of, so that no entry loses precision to a larger neighbour (`encode_moments`). Blocks
    never cross rows, so that sharding rows over ranks leaves them whole. State: 2 + 1 + 1 + 4/256 = 4.02 bytes a
    parameter. Vectors, and matrices whose rows do not divide into blocks, are few and small: they take the
    reference's exact update.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, kernel: bool = False):
        """`kernel`: update by the Triton kernel (`optimizer_kernel`), on CUDA devices."""
        super().__init__(params, lr)
        self.kernel = kernel

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        exact = [p for p in parameters if block_length(local(p)) is None]
        if exact:
            self._fused_step(exact, group)
        blocked = [p for p in parameters if block_length(local(p)) is not None]
        if not blocked:
            return
        scale, found = self._controls(local(blocked[0]).device)
        states = [self._block_state(p) for p in blocked]
        steps = [state["step"] for state in states]
        advance(steps, found)
        scalars = step_scalars(torch.stack(steps), group["lr"], group["weight_decay"], scale)
        for index, (p, state) in enumerate(zip(blocked, states)):
            gradient: Any = p.grad
            self._update_blocks(local(p.detach()), local(gradient), state, scalars, index, found)

    def _update_blocks(
        self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], scalars: Tensor, index: int, found: Tensor
    ) -> None:
        low, m, v, v_scale = state.get("low", weight), state["m"], state["v"], state["v_scale"]
        if self.kernel:
            from optim import optimizer_kernel

            optimizer_kernel.fused_update_blocks(weight, grad.contiguous(), low, m, v, v_scale, scalars, index, found)
            return
        weight, grad, low = weight.view(m.shape), grad.reshape(m.shape), low.view(m.shape)
        size = max(1, EAGER_SLICE // m.shape[1])  # so that the float32 temporaries stay small
        for start in range(0, len(m), size):
            rows = slice(start, start + size)
            update_blocks(weight[rows], grad[rows], low[rows], m[rows], v[rows], v_scale[rows], scalars[index], found)

    def _block_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            data = local(p.detach())
            if data.dtype == torch.bfloat16:
                state["low"] = torch.zeros_like(data, dtype=torch.int16)
            block = block_length(data)
            assert block is not None
            rows = data.numel() // block
            for name, dtype in (("m", torch.int8), ("v", torch.uint8)):
                state[name] = torch.zeros(rows, block, dtype=dtype, device=data.device)
            state["v_scale"] = torch.zeros(rows, 1, device=data.device)
            state["step"] = torch.zeros((), device=data.device)
        return state

    def _master(self, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        return join_master(weight, state["low"]) if "low" in state else super()._master(weight, state)
