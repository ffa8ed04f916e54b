"""Parameter groups, optimizers that never lose an update in bf16, the WSD schedule, and the clipped step.

A bf16 weight of 0.02 has a spacing of 1.2e-4: at a learning rate of 1e-5 no single update moves it. The optimizers
here update an exact float32 master weight instead: `adamw` keeps it whole, `adamw8bit` and `muon` (muon.py) keep the
16 bits that the bf16 weight lacks beside it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from arguments import UserError

BETAS = (0.9, 0.95)
EPS = 1e-8
RATIO = math.sqrt((1 - BETAS[0]) ** 2 / (1 - BETAS[1]) / (1 - BETAS[0] ** 2 / BETAS[1]))  # |m| <= RATIO * sqrt(v)
BLOCK = 256  # elements that share one scale
EAGER_SLICE = 2**22  # elements of an eager update


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with decay; norms, biases, D and z_bias (1-d) without."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    plain = [p for p in trainable if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str, module: nn.Module, *, lr: float, weight_decay: float, kernel: bool = False
) -> torch.optim.Optimizer:
    """`adamw` (float32 masters and moments), `adamw8bit` (exact masters, 8-bit moments), `muon` or `flashadamw`."""
    if name == "muon":
        from muon import Muon, muon_groups

        return Muon(muon_groups(module, weight_decay), lr=lr, kernel=kernel)
    groups = parameter_groups(module, weight_decay)
    if name == "adamw":
        return MasterAdamW(groups, lr=lr)
    if name == "adamw8bit":
        return AdamW8bit(groups, lr=lr, kernel=kernel)
    try:
        from pytorch_optimizer import FlashAdamW
    except ImportError as error:
        raise UserError("--optimizer flashadamw needs a pytorch-optimizer that has FlashAdamW") from error
    return FlashAdamW(groups, lr=lr, betas=BETAS, eps=EPS)


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

    def __init__(self, params: Any, lr: float):
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


class AdamW8bit(MasterAdamW):
    """AdamW on exact float32 masters with 8-bit moments in blocks of at most 256 (cf. arXiv 2110.02861).

    A bf16 matrix has an int16 `low` beside it (weight and low are the float32 master). uint8 codes hold the root of
    the second moment, with a float32 scale a block; int8 codes hold the first moment divided by that root, which is
    what an update is made of, so that no entry loses precision to a larger neighbour (`encode_moments`). Blocks
    never cross rows, so that sharding rows over ranks leaves them whole. State: 2 + 1 + 1 + 4/256 = 4.02 bytes a
    parameter. Vectors, and matrices whose rows do not divide into blocks, are few and small: they take the
    reference's exact update.
    """

    def __init__(self, params: Any, lr: float, kernel: bool = False):
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
            import optimizer_kernel

            optimizer_kernel.update_blocks(weight, grad.contiguous(), low, m, v, v_scale, scalars, index, found)
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


def block_length(tensor: Tensor) -> int | None:
    """The largest divisor of a matrix's row length in [64, 256]; None for vectors and rows without one."""
    if tensor.ndim < 2 or tensor.dtype not in (torch.bfloat16, torch.float32):
        return None
    width = tensor[0].numel()
    return next((n for n in range(min(BLOCK, width), 63, -1) if width % n == 0), None)


def advance(steps: list[Tensor], found: Tensor) -> None:
    """Count one more update unless it was skipped (a list of addends: for a lone tensor the CPU would wait)."""
    torch._foreach_add_(steps, [1 - found] * len(steps))


def step_scalars(steps: Tensor, lr: float, weight_decay: float, scale: Tensor) -> Tensor:
    """[lr, 1 - lr * weight_decay, 1 / scale, 1 / (1 - beta1^k), (1 - beta2^k)^-0.5] for each step k of `steps`."""
    rows = [
        torch.full_like(steps, lr),
        torch.full_like(steps, 1 - lr * weight_decay),
        (1 / scale).expand_as(steps),
        1 / (1 - BETAS[0] ** steps),
        (1 - BETAS[1] ** steps).rsqrt(),
    ]
    return torch.stack(rows, dim=1)


def update_blocks(
    weight: Tensor, grad: Tensor, low: Tensor, m: Tensor, v: Tensor, v_scale: Tensor, scalars: Tensor, found: Tensor
) -> None:
    """One AdamW update of blocks [n, w] in place; where `found` is 1 everything stays as it is.

    weight bf16 with low int16, or float32 (then `low` is the weight itself); m int8 and v uint8 codes with float32
    scales [n, 1] (`encode_moments`); scalars as `step_scalars` makes them; found 0-d.
    """
    lr, shrink, by_scale, by_correction1, by_root_correction2 = scalars.unbind()
    is_split = weight.dtype == torch.bfloat16
    master = join_master(weight, low) if is_split else weight
    gradient = grad.to(torch.float32) * by_scale
    first, root = decode_moments(m, v, v_scale)
    first = first * BETAS[0] + gradient * (1 - BETAS[0])
    root = (root * root * BETAS[1] + gradient * gradient * (1 - BETAS[1])).sqrt()
    updated = master * shrink - lr * (first * by_correction1) / (root * by_root_correction2 + EPS)
    new_m, new_v, new_scale = encode_moments(first, root)
    keep = found > 0
    updated = torch.where(keep, master, updated)
    if is_split:
        high, rest = split_master(updated)
        weight.copy_(high)
        low.copy_(rest)
    else:
        weight.copy_(updated)
    m.copy_(torch.where(keep, m, new_m.to(torch.int8)))
    v.copy_(torch.where(keep, v, new_v.to(torch.uint8)))
    v_scale.copy_(torch.where(keep, v_scale, new_scale))


def encode_moments(first: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the first moment and of the second one's root, both [n, w], and the roots' scales [n, 1].

    The root, divided by the largest of its block, is coded by its fourth root: small entries keep their relative
    precision (2% at a hundredth of the largest, where a plain square root has 5%). The first moment is coded as its
    ratio to the root, evenly in [-RATIO, RATIO]: by Cauchy-Schwarz over both averages, no gradients lead outside,
    so it needs no scale, and a root rounded to 0 takes its first moment with it: no update can blow up.
    Roots decay by 2.5% a step at most, less than half a code below 80: rounded to nearest they would stay there. They
    are rounded up or down in proportion instead, by a hash of their own bits, so that a resumed run repeats itself.
    """
    scale = root.amax(-1, keepdim=True)
    ratio = first / root.clamp(min=1e-30) * (127 / RATIO)
    roots = (root * (1 / scale.clamp(min=1e-37))).sqrt().sqrt() * 255
    hashed = (root.view(torch.int32) * -1640531527 >> 16) & 0xFFFF  # Knuth's multiplicative hash
    dither = (hashed.to(torch.float32) - 32767.5) * (1 / 65536)
    return ratio.round().clamp(-127, 127), (roots + dither).round().clamp(0, 255), scale


def decode_moments(m: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(first moment, root of the second moment) in float32 from codes [n, w] and scales [n, 1]."""
    part = v.to(torch.float32) * (1 / 255)
    part = part * part
    root = part * part * scale
    return m.to(torch.float32) * (RATIO / 127) * root, root


def build_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, *, max_lr: float, min_lr: float,
    warmup_ratio: float, decay_ratio: float,
) -> LambdaLR:  # fmt: skip
    """pytorch-optimizer's WSD schedule over optimizer steps, shifted by one: step k (from 1) takes multiplier k.

    The library's first multiplier is 0, which would waste the first step; its last is `min_lr`. The cooldown is the
    library's default, floored at `min_lr`; past the end the rate stays there.
    """
    warmup, decay = round(total_steps * warmup_ratio), round(total_steps * decay_ratio)
    multiplier = wsd_multiplier(total_steps, min(warmup, total_steps), decay, min_lr / max_lr)
    return LambdaLR(optimizer, lambda done: multiplier(done + 1))


def wsd_multiplier(total: int, warmup: int, decay: int, floor: float) -> Callable[[int], float]:
    """multiplier(k) of optimizer step k, counted from 1, from pytorch-optimizer's own schedule."""
    from pytorch_optimizer.lr_scheduler import get_wsd_schedule

    decay = min(decay, total - warmup)
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    library: Any = get_wsd_schedule(probe, warmup, total - warmup - decay, decay, min_lr_ratio=floor)

    def multiplier(step: int) -> float:
        if step >= total:
            return 1.0 if step == total == 1 else floor
        return max(floor, library.lr_lambdas[0](step))

    return multiplier


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], grad_clip: float, scaler: Any = None
) -> tuple[Tensor, Tensor]:
    """One update with gradients clipped to norm `grad_clip`; returns (norm before clipping, 1.0 if skipped).

    A non-finite norm skips the update on the device: the CPU does not wait. Clipping is folded into `grad_scale`,
    so that gradients are read once more but never rewritten. Optimizers without these controls, and a GradScaler,
    cost one synchronisation.
    """
    if hasattr(optimizer, "finish_step"):  # it has updated during the backward pass
        return optimizer.finish_step()
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


def _update_loss_scale(scaler: Any, overflowed: bool) -> None:
    """GradScaler's own rule: halve on overflow, double after `growth_interval` good updates."""
    state = scaler.state_dict()
    if overflowed:
        state["scale"], state["_growth_tracker"] = state["scale"] * state["backoff_factor"], 0
    else:
        state["_growth_tracker"] += 1
        if state["_growth_tracker"] == state["growth_interval"]:
            state["scale"], state["_growth_tracker"] = state["scale"] * state["growth_factor"], 0
    scaler.load_state_dict(state)
