"""Exact float32 master weights beside bf16 parameters, and AdamW on them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
EPS = 1e-8


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [..] -> (bf16 rounded half up, int16 low half): together exactly the float32.

    hi = (bits + 0x8000) >> 16 rounds ties away from zero in magnitude; the low half is then what is missing, in
    [-32768, 32767]. `.to(bfloat16)` rounds ties to even, and its remainder would overflow 16 bits.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_master(weight: Tensor, low: Tensor) -> Tensor:
    """The exact float32 from its bf16 weight and int16 low half."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)


class _SkippingOptimizer(torch.optim.Optimizer):
    """Reads `grad_scale` and `found_inf` as torch's fused optimizers do under GradScaler: no host sync to skip."""

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but without casting state to the parameters' dtype: masters and 8-bit codes keep theirs."""
        given = state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})
        order = [p for group in self.param_groups for p in group["params"]]
        for index, values in given.items():
            parameter = order[index]
            device = local(parameter).device
            self.state[parameter] = {
                key: value.detach().to(device, copy=True) if torch.is_tensor(value) else value
                for key, value in values.items()
            }

    def _controls(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(grad_scale, found_inf) as float32 scalars on the device: gradients are divided by the first."""
        one = torch.ones((), device=device)
        scale = one if self.grad_scale is None else self.grad_scale.to(device).view(())
        found = torch.zeros_like(one) if self.found_inf is None else self.found_inf.to(device).view(())
        return scale, found


class MasterAdamW(_SkippingOptimizer):
    """The reference: torch's fused AdamW on float32 masters (the parameters themselves where they are float32).

    State a bf16 parameter: master, exp_avg, exp_avg_sq in float32 (12 bytes). arXiv 1711.05101.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None and local(p).numel()]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """One update of parameters of a group that have gradients."""
        self._fused_step(parameters, group)

    def _fused_step(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self._exact_state(p) for p in parameters]
        masters = [state.get("master", local(p.detach())) for state, p in zip(states, parameters)]
        scale, found = self._controls(masters[0].device)
        gradients = [local(p.grad).to(m.dtype) for p, m in zip(parameters, masters) if p.grad is not None]
        averages, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        options: dict[str, Any] = dict(lr=group["lr"], beta1=BETAS[0], beta2=BETAS[1], eps=EPS)
        options |= dict(weight_decay=group["weight_decay"], amsgrad=False, maximize=False)
        torch._fused_adamw_(
            masters, gradients, averages, squares, [], steps, **options, grad_scale=scale, found_inf=found
        )
        advance(steps, found)  # to the next step's number
        split = [(local(p.detach()), m) for p, m in zip(parameters, masters) if local(p).dtype != m.dtype]
        if split:
            torch._foreach_copy_([weight for weight, _ in split], [master for _, master in split])

    def _exact_state(self, p: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            data = local(p.detach())
            wide = torch.promote_types(data.dtype, torch.float32)
            if wide != data.dtype:
                state["master"] = data.to(wide)
            state["exp_avg"] = torch.zeros_like(data, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(data, dtype=wide)
            state["step"] = torch.ones((), device=data.device)
        return state

    def master_weights(self) -> dict[Tensor, Tensor]:
        """The exact float32 weights that the parameters are rounded from."""
        return {p: self._master(local(p.detach()), state) for p, state in self.state.items()}

    def _master(self, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        return state.get("master", weight)


def advance(steps: list[Tensor], found: Tensor) -> None:
    """Count one more update unless it was skipped (a list of addends: for a lone tensor the CPU would wait)."""
    torch._foreach_add_(steps, [1 - found] * len(steps))
