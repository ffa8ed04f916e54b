"""The 8-bit code of AdamW's moments, and an update of whole blocks of them."""

import math

import torch
from torch import Tensor

from optim.masters import BETAS, EPS, join_master, split_master

RATIO = math.sqrt((1 - BETAS[0]) ** 2 / (1 - BETAS[1]) / (1 - BETAS[0] ** 2 / BETAS[1]))  # |m| <= RATIO * sqrt(v)
BLOCK = 256  # elements that share one scale
EAGER_SLICE = 2**22  # elements of an eager update


def block_length(tensor: Tensor) -> int | None:
    """The largest divisor of a matrix's row length in [64, 256]; None for vectors and rows without one."""
    if tensor.ndim < 2 or tensor.dtype not in (torch.bfloat16, torch.float32):
        return None
    width = tensor[0].numel()
    return next((n for n in range(min(BLOCK, width), 63, -1) if width % n == 0), None)


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
