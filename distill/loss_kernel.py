"""The loss's row function as one Triton kernel: logits are read twice and the gradient written once.

`losses.token_terms` is its definition. What the compiler makes of that splits each row's reductions and reads the
logits four times; here a program walks along one row of the student's and one of the teacher's, keeping for each
lane the running maximum and the sums relative to it (online softmax, arXiv 1805.02867), and then once more for the
gradient, which replaces the student's logits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # entries of a row at a time


@triton.jit
def _factor(maximum, exponent):
    """exp(exponent): what a lane's sums relative to its running maximum are multiplied by; nothing seen yet: 0."""
    return tl.where(maximum == float("-inf"), 0.0, tl.exp(exponent))


@triton.jit
def _grown(maximum, x):
    """(new running maximum, factor for sums relative to the old one) of each lane."""
    larger = tl.maximum(maximum, x)
    return larger, _factor(maximum, maximum - larger)


@triton.jit
def _first_of_largest(value, index):
    """(largest value, lowest index of it) over lanes."""
    top = tl.max(value, 0)
    return top, tl.min(tl.where(value == top, index, 2147483647), 0)


@triton.jit
def _row_kernel(
    student, teacher, labels, valid, scale, rows_out, V, student_stride, teacher_stride,
    temperature, kl_weight, ce_weight, SOFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    lane, label = tl.arange(0, BLOCK), tl.load(labels + row)
    zero = tl.zeros([BLOCK], tl.float32)
    s_max, t_max = zero - float("inf"), zero - float("inf")
    s_sum, t_sum, t_times_t, t_times_gap = zero, zero, zero, zero  # of exp(s), exp(t), exp(t) t, exp(t) (t - s)
    s_top, t_top = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    s_at_label = zero
    s_soft, t_soft, t_soft_times_s = zero, zero, zero  # the same at the temperature
    for start in range(0, V, BLOCK):
        inside = start + lane < V
        s = tl.load(student + start + lane, inside, float("-inf")).to(tl.float32)
        t = tl.load(teacher + start + lane, inside, float("-inf")).to(tl.float32)
        s_at_label += tl.where(start + lane == label, s, 0.0)
        s_top = tl.where(s > s_max, start + lane, s_top)
        t_top = tl.where(t > t_max, start + lane, t_top)
        if SOFT:
            s_new, t_new = tl.maximum(s_max, s), tl.maximum(t_max, t)
            s_keep = _factor(s_max, (s_max - s_new) / temperature)
            t_keep = _factor(t_max, (t_max - t_new) / temperature)
            t_part = tl.where(inside, tl.exp((t - t_new) / temperature), 0.0)
            s_soft = s_soft * s_keep + tl.where(inside, tl.exp((s - s_new) / temperature), 0.0)
            t_soft = t_soft * t_keep + t_part
            t_soft_times_s = t_soft_times_s * t_keep + tl.where(inside, t_part * s, 0.0)
        s_max, s_factor = _grown(s_max, s)
        t_max, t_factor = _grown(t_max, t)
        p = tl.where(inside, tl.exp(t - t_max), 0.0)
        s_sum = s_sum * s_factor + tl.where(inside, tl.exp(s - s_max), 0.0)
        t_sum = t_sum * t_factor + p
        t_times_t = t_times_t * t_factor + tl.where(inside, p * t, 0.0)
        t_times_gap = t_times_gap * t_factor + tl.where(inside, p * (t - s), 0.0)

    s_best, s_choice = _first_of_largest(s_max, s_top)
    t_best, t_choice = _first_of_largest(t_max, t_top)
    s_lane = _factor(s_max, s_max - s_best)
    t_lane = _factor(t_max, t_max - t_best)
    s_total, t_total = tl.sum(s_sum * s_lane, 0), tl.sum(t_sum * t_lane, 0)
    s_lse, t_lse = s_best + tl.log(s_total), t_best + tl.log(t_total)
    kl = tl.sum(t_times_gap * t_lane, 0) / t_total - t_lse + s_lse
    ce = s_lse - tl.sum(s_at_label, 0)
    if SOFT:
        s_lane = _factor(s_max, (s_max - s_best) / temperature)
        t_lane = _factor(t_max, (t_max - t_best) / temperature)
        s_soft_total, t_soft_total = tl.sum(s_soft * s_lane, 0), tl.sum(t_soft * t_lane, 0)
        mean_s = tl.sum(t_soft_times_s * t_lane, 0) / t_soft_total
        soft = (s_best - mean_s) / temperature + tl.log(s_soft_total)
    else:
        s_soft_total, t_soft_total = s_total, t_total
        soft = kl + t_lse - tl.sum(t_times_t * t_lane, 0) / t_total
    counts = tl.load(valid + row).to(tl.int1)
    loss = kl_weight * temperature * temperature * soft + ce_weight * ce
    rows_out += row * 5
    tl.store(rows_out, tl.where(counts, loss, 0.0))
    tl.store(rows_out + 1, tl.where(counts, kl, 0.0))
    tl.store(rows_out + 2, tl.where(counts, ce, 0.0))
    tl.store(rows_out + 3, tl.where(counts & (s_choice == t_choice), 1.0, 0.0))
    tl.store(rows_out + 4, tl.where(counts, 1.0, 0.0))

    factor = tl.load(scale)
    for start in range(0, V, BLOCK):
        inside = start + lane < V
        s = tl.load(student + start + lane, inside, float("-inf")).to(tl.float32)
        t = tl.load(teacher + start + lane, inside, float("-inf")).to(tl.float32)
        if SOFT:
            q = tl.exp((s - s_best) / temperature) / s_soft_total
            p = tl.exp((t - t_best) / temperature) / t_soft_total
        else:
            q, p = tl.exp(s - s_best) / s_soft_total, tl.exp(t - t_best) / t_soft_total
        gradient = kl_weight * temperature * (q - p)
        if ce_weight != 0.0:
            hit = tl.where(start + lane == label, 1.0, 0.0)
            gradient += ce_weight * (tl.exp(s - s_lse) - hit)
        gradient = tl.where(counts, gradient * factor, 0.0)
        tl.store(student + start + lane, gradient.to(student.dtype.element_ty), inside)


def fused_scaled_terms(
    student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor, scale: Tensor, temperature: float,
    kl_weight: float, ce_weight: float,
) -> Tensor:  # fmt: skip
    """As `losses.scaled_terms`: sums [5], the scaled gradient in the place of the student's logits [m, V].

    student and teacher bf16, fp16 or float32 on one CUDA device, labels int64 [m], valid bool [m], scale 0-d float32.
    """
    rows, V = student.shape
    terms = torch.empty(rows, 5, dtype=torch.float32, device=student.device)
    kernel: Any = _row_kernel[(rows,)]
    kernel(
        student, teacher, labels, valid, scale, terms, V, student.stride(0), teacher.stride(0),
        float(temperature), float(kl_weight), float(ce_weight), SOFT=temperature != 1.0, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return terms.sum(0)  # in a fixed order: a run repeats itself
