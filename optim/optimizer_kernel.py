"""One AdamW update of blocks with 8-bit moments as a Triton kernel: everything is read and written once.

`moments.update_blocks` is its definition, up to the last bits of quotients and roots. A compiled function takes the
host longer to call than most matrices take the device, so that the device would wait; a kernel does not.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from optim.masters import BETAS, EPS
from optim.moments import RATIO

ENTRIES = 2048  # of a program


@triton.jit
def _nearest(x):
    """x rounded to an integer, ties to even, for |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit(do_not_specialize=["blocks", "index"])
def _update_kernel(
    weight, grad, low, m, v, v_scale, scalars, found, blocks, index, WIDTH: tl.constexpr, LANES: tl.constexpr,
    ROWS: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, RATIO: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    live = row < tl.where(tl.load(found) > 0, 0, blocks)
    inside = live[:, None] & (lane < WIDTH)[None, :]
    at = row[:, None] * WIDTH + lane[None, :]
    scalars += index * 5
    lr, shrink, by_scale = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    by_correction1, by_root_correction2 = tl.load(scalars + 3), tl.load(scalars + 4)

    gradient = tl.load(grad + at, inside, 0.0).to(tl.float32) * by_scale
    part = tl.load(v + at, inside, 0).to(tl.float32) * (1 / 255)
    part = part * part
    root = part * part * tl.load(v_scale + row, live, 0.0)[:, None]
    first = tl.load(m + at, inside, 0).to(tl.float32) * (RATIO / 127) * root
    first = first * BETA1 + gradient * (1 - BETA1)
    root = tl.sqrt(root * root * BETA2 + gradient * gradient * (1 - BETA2))

    if SPLIT:
        high = tl.load(weight + at, inside, 0.0).to(tl.int16, bitcast=True).to(tl.int32)
        bits = (high << 16) + tl.load(low + at, inside, 0).to(tl.int32)
        master = bits.to(tl.float32, bitcast=True)
    else:
        master = tl.load(weight + at, inside, 0.0)
    updated = master * shrink - lr * (first * by_correction1) / (root * by_root_correction2 + EPS)
    if SPLIT:
        bits = updated.to(tl.int32, bitcast=True)
        high = (bits + 0x8000) >> 16
        tl.store(weight + at, high.to(tl.int16).to(tl.bfloat16, bitcast=True), inside)
        tl.store(low + at, (bits - (high << 16)).to(tl.int16), inside)
    else:
        tl.store(weight + at, updated, inside)

    scale = tl.max(root, 1)
    ratio = first / tl.maximum(root, 1e-30) * (127 / RATIO)
    inverse = 1.0 / tl.maximum(scale, 1e-37)
    roots = tl.sqrt(tl.sqrt(root * inverse[:, None])) * 255
    hashed = (root.to(tl.int32, bitcast=True) * -1640531527 >> 16) & 0xFFFF
    dither = (hashed.to(tl.float32) - 32767.5) * (1 / 65536)
    tl.store(m + at, tl.minimum(tl.maximum(_nearest(ratio), -127.0), 127.0).to(tl.int8), inside)
    tl.store(v + at, tl.minimum(tl.maximum(_nearest(roots + dither), 0.0), 255.0).to(tl.uint8), inside)
    tl.store(v_scale + row, scale, live)


def fused_update_blocks(
    weight: Tensor,
    grad: Tensor,
    low: Tensor,
    m: Tensor,
    v: Tensor,
    v_scale: Tensor,
    scalars: Tensor,
    index: int,
    found: Tensor,
) -> None:
    """As `moments.update_blocks` on contiguous tensors of one CUDA device, with row `index` of scalars [k, 5].

    m and v [n, w] give the blocks; weight, grad and low have as many entries.
    """
    blocks, width = m.shape
    lanes = triton.next_power_of_2(width)
    rows = ENTRIES // lanes
    kernel: Any = _update_kernel[(triton.cdiv(blocks, rows),)]
    kernel(
        weight, grad, low, m, v, v_scale, scalars, found, blocks, index, WIDTH=width, LANES=lanes, ROWS=rows,
        BETA1=BETAS[0], BETA2=BETAS[1], EPS=EPS, RATIO=RATIO, SPLIT=weight.dtype == torch.bfloat16, num_warps=4,
    )  # fmt: skip
