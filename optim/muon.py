"""Muon: momentum whose singular values are all made 1, for the layers' matrices, on exact float32 masters.

The gradient of a matrix is dominated by a few directions; orthogonalising its momentum gives all of them the same
step (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/). Updates are scaled to the size that AdamW's
have, about 0.2 an entry, so that learning rates and weight decay mean the same (arXiv 2502.16982, section 2.2).
Embedding, head, convolutions and vectors are left to `AdamW8bit`.

A mixer's in_proj holds five matrices one above the other, which are orthogonalised apart.

Shapes: k matrices [m, n] of one shape, stacked.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hardware.compilation import maybe_compiled
from optim.adamw8bit import AdamW8bit
from optim.masters import join_master, split_master

MOMENTUM = 0.95
SIZE = 0.2  # root mean square of an update's entries, at learning rate 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd quintic that brings singular values in (0, 1] near 1
ITERATIONS = 5
STACKED = 2**25  # entries that are updated together


class Muon(AdamW8bit):
    """Muon for groups with `rows`, 8-bit AdamW for the others.

    State a bf16 matrix: int16 `low` (with the weight the exact float32 master) and bf16 `momentum`, 4 bytes an entry;
    a float32 matrix: float32 `momentum`.
    """

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        if "rows" not in group:
            super()._update(parameters, group)
            return
        alike: dict[Any, list[nn.Parameter]] = {}
        for p in parameters:
            gradient: Any = p.grad
            alike.setdefault((p.shape, p.dtype, gradient.dtype), []).append(p)
        for members in alike.values():
            size = max(1, STACKED // members[0].numel())
            for start in range(0, len(members), size):
                self._update_alike(members[start : start + size], group)

    def _update_alike(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """One update of matrices of one shape."""
        scale, found = self._controls(parameters[0].device)
        states = [self._matrix_state(p) for p in parameters]
        weights = [p.detach() for p in parameters]
        gradients: list[Any] = [p.grad for p in parameters]
        momenta = torch.stack([state["momentum"] for state in states])
        average, direction = maybe_compiled(momentum_step, self.kernel)(momenta, torch.stack(gradients), scale, found)
        step = torch.cat([orthogonalised(part) for part in direction.split(group["rows"], dim=1)], dim=1)
        lows = torch.stack([state["low"] for state in states]) if "low" in states[0] else None
        scales = row_scales(group["rows"], step) * group["lr"]
        shrink = torch.full_like(scales[0], 1 - group["lr"] * group["weight_decay"])
        move = maybe_compiled(move_masters, self.kernel)
        moved, low = move(torch.stack(weights), lows, step, scales, shrink, found)
        torch._foreach_copy_([state["momentum"] for state in states], list(average))
        torch._foreach_copy_(weights, list(moved))
        if low is not None:
            torch._foreach_copy_([state["low"] for state in states], list(low))

    def _matrix_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p.detach())
            if p.dtype == torch.bfloat16:
                state["low"] = torch.zeros_like(p.detach(), dtype=torch.int16)
        return state


def momentum_step(momenta: Tensor, gradients: Tensor, scale: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """(new momenta, Nesterov's direction) [k, m, n] for gradients over `scale`; the old where found is 1."""
    wide = torch.promote_types(momenta.dtype, torch.float32)
    before = momenta.to(wide)
    gradients = torch.where(found > 0, before, gradients.to(wide) / scale)
    average = before.lerp(gradients, 1 - MOMENTUM)
    return average.to(momenta.dtype), average.lerp(gradients, 1 - MOMENTUM).to(momenta.dtype)


def move_masters(
    weights: Tensor, lows: Tensor | None, step: Tensor, scales: Tensor, shrink: Tensor, found: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Weights [k, m, n] and their low halves after master * shrink - scales * step; as they are where found is 1.

    step [k, m, n], scales [m, 1], shrink [1].
    """
    masters = weights if lows is None else join_master(weights, lows)
    moved = masters * shrink - scales * step.to(masters.dtype)
    moved = torch.where(found > 0, masters, moved)
    return (moved, None) if lows is None else split_master(moved)


def row_scales(rows: Sequence[int], step: Tensor) -> Tensor:
    """SIZE * sqrt(max(m, n)) of the matrix that each row of `step` [k, sum of rows, n] belongs to, [sum of rows, 1].

    Filled on the device: a copy from the host would make it wait.
    """
    wide = torch.promote_types(step.dtype, torch.float32)
    width = step.shape[-1]
    sizes = [torch.full((m, 1), SIZE * max(m, width) ** 0.5, dtype=wide, device=step.device) for m in rows]
    return torch.cat(sizes)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [k, m, n] with their singular values brought into about [0.7, 1.2], their vectors kept.

    Newton-Schulz iteration x <- a x + (b y + c y^2) x with y = x x^T on the shorter side, in the inputs' dtype.
    """
    a, b, c = COEFFICIENTS
    wide = torch.promote_types(matrices.dtype, torch.float32)
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=wide)
    x = matrices / norms.clamp(min=1e-20).to(matrices.dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(ITERATIONS):
        y = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(y, y, y, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
