"""One update: unscale, clip, step, and skip it where a gradient is not finite."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from optim.masters import _SkippingOptimizer


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    grad_clip: float,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, Tensor]:
    """One update with gradients clipped to norm `grad_clip`; returns (norm before clipping, 1.0 if skipped).

    A non-finite norm skips the update on the device: the CPU does not wait. Clipping is folded into `grad_scale`,
    so that gradients are read once more but never rewritten. Optimizers without these controls, and a GradScaler,
    cost one synchronisation.
    """
    if hasattr(optimizer, "end_step"):  # it has updated during the backward pass
        return optimizer.end_step()
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = gradient_norm(gradients)
    loss_scale = torch.ones_like(norm) if scaler is None else scaler.scale(torch.ones_like(norm))
    norm = norm / loss_scale
    bad = (~torch.isfinite(norm)).float()
    divisor = loss_scale * torch.clamp(norm / grad_clip, min=1.0)
    if isinstance(optimizer, _SkippingOptimizer):
        optimizer.grad_scale = torch.where(bad > 0, torch.ones_like(divisor), divisor)
        optimizer.found_inf = bad
        optimizer.step()
        optimizer.grad_scale = optimizer.found_inf = None
    elif not bool(bad):
        torch._foreach_div_(gradients, divisor)
        optimizer.step()
    if scaler is not None:
        _update_loss_scale(scaler, bool(bad))
    return norm, bad


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Global 2-norm, float32 scalar; of sharded tensors over all ranks. In bf16 each norm would keep only 8 bits."""
    if not gradients:
        return torch.zeros(())
    norms: list[Tensor] = []
    for dtype in dict.fromkeys(g.dtype for g in gradients):  # lists of one dtype take the fused kernel
        alike = [g for g in gradients if g.dtype == dtype]
        norms += torch._foreach_norm(alike, 2, dtype=torch.promote_types(dtype, torch.float32))
    total = torch.linalg.vector_norm(torch.stack(norms))
    total = total.full_tensor() if hasattr(total, "full_tensor") else total
    return total.float()


def _update_loss_scale(scaler: torch.amp.GradScaler, overflowed: bool) -> None:
    """GradScaler's own rule: halve on overflow, double after `growth_interval` good updates."""
    state = scaler.state_dict()
    if overflowed:
        state["scale"], state["_growth_tracker"] = state["scale"] * state["backoff_factor"], 0
    else:
        state["_growth_tracker"] += 1
        if state["_growth_tracker"] == state["growth_interval"]:
            state["scale"], state["_growth_tracker"] = state["scale"] * state["growth_factor"], 0
    scaler.load_state_dict(state)
