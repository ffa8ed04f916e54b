"""The distillation loss: a dense reference, and a chunked form that never holds [tokens, vocabulary].

Per token: kl_weight * T^2 * CE(softmax(teacher / T), log_softmax(student / T)) + ce_weight * CE(labels), in float32
(float64 for float64 inputs). The cross-entropy with the teacher differs from KL by the teacher's entropy, which has
no gradient; the reported KL has it taken off, so identical models score 0 (Hinton et al., arXiv 1503.02531, for T^2).

Shapes: n tokens, d width, V vocabulary, m tokens of a chunk.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hardware.compilation import maybe_compiled

# The student's logits of a chunk, m * V. Each chunk reads and writes the head's whole float32 gradient once, so it
# should be large. As a kernel or compiled, only two buffers live: these, and the teacher's for an eighth of the rows
# at a time; 2.25 * 2**28 bytes (0.56 GiB) in bf16. Eagerly, about eight float32 temporaries of a chunk: 32 MiB each.
CHUNK_LOGITS_COMPILED, CHUNK_LOGITS_EAGER = 2**28, 2**23
PARTS_COMPILED = 8


class KDTerms(NamedTuple):
    """`loss` carries the gradient; the sums over valid tokens are detached float32 (or float64) scalars."""

    loss: Tensor  # grad_scale * loss_sum
    loss_sum: Tensor  # kl_weight * T^2 * soft cross-entropy + ce_weight * hard cross-entropy
    kl_sum: Tensor  # KL(teacher || student) at temperature 1
    ce_sum: Tensor  # hard-label cross-entropy of the student
    agree_sum: Tensor  # tokens whose top choice is the teacher's
    tokens: Tensor  # valid tokens
    layer_sum: Tensor | None = None  # `layer_distance`, mean over layers, where it is asked for


def token_terms(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    valid: Tensor,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor]:
    """Sums [5] (loss, kl, ce, agree, tokens) and the gradient of the loss sum in the student's logits [m, V].

    student and teacher logits [m, V], labels int64 [m], valid bool [m]. Written out by hand, so that it compiles
    into a few passes over the logits: the gradient is kl_weight * T * (q_T - p_T) + ce_weight * (q - onehot).
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    logits = student.to(wide)
    count = valid.to(wide)
    log_q = logits.log_softmax(-1)
    ce = -log_q.gather(-1, labels[:, None])[:, 0]
    loss, kl, agree = torch.zeros_like(ce), torch.zeros_like(ce), torch.zeros_like(ce)
    gradient = torch.zeros_like(logits)
    if teacher is not None:
        target = teacher.to(wide)
        log_p = target.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        agree = (logits.argmax(-1) == target.argmax(-1)).to(wide)
        soft_q = log_q if temperature == 1.0 else (logits / temperature).log_softmax(-1)
        p = log_p.exp() if temperature == 1.0 else (target / temperature).softmax(-1)
        loss = kl_weight * temperature**2 * -(p * soft_q).sum(-1)
        gradient = (kl_weight * temperature) * (soft_q.exp() - p)
    if ce_weight:
        loss = loss + ce_weight * ce
        index = torch.arange(logits.shape[-1], device=logits.device)
        onehot = (index == labels[:, None]).to(wide)
        gradient = gradient + ce_weight * (log_q.exp() - onehot)
    rows = torch.stack((loss, kl, ce, agree, torch.ones_like(ce)))
    sums = torch.where(valid, rows, 0.0).sum(-1)
    return sums, torch.where(valid[:, None], gradient * count[:, None], 0.0)


def token_sums(
    student: Tensor, teacher: Tensor | None, labels: Tensor, valid: Tensor, temperature: float, kl_weight: float,
    ce_weight: float,
) -> Tensor:  # fmt: skip
    """The sums of `token_terms` alone, for evaluation."""
    return token_terms(student, teacher, labels, valid, temperature, kl_weight, ce_weight)[0]


def scaled_terms(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    valid: Tensor,
    scale: Tensor,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
) -> Tensor:
    """`token_terms`, with the scaled gradient written over the student's logits (scaled before a float16 cast)."""
    sums, gradient = token_terms(student, teacher, labels, valid, temperature, kl_weight, ce_weight)
    student.copy_(gradient * scale)
    return sums


def _row_function(kernel: bool, compile: bool) -> Any:
    """`scaled_terms` as one Triton kernel, compiled, or as it is."""
    if not kernel:
        return maybe_compiled(scaled_terms, compile)
    from distill import loss_kernel

    return loss_kernel.fused_scaled_terms


def _need_teacher(kl_weight: float, teacher: Tensor | None) -> None:
    if kl_weight and teacher is None:
        raise ValueError(f"kl_weight is {kl_weight}, but no teacher was given: only kl_weight 0 goes without one")


def dense_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    valid: Tensor,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    grad_scale: float | Tensor = 1.0,
) -> KDTerms:
    """The reference: whole logits [n, V], autograd for the gradient. See the module's docstring for the formula."""
    _need_teacher(kl_weight, teacher_logits)
    wide = torch.promote_types(student_logits.dtype, torch.float32)
    logits, mask = student_logits.to(wide), valid.to(wide)
    ce = F.cross_entropy(logits, labels, reduction="none")
    loss, kl, agree = ce_weight * ce, torch.zeros_like(ce), torch.zeros_like(ce)
    if teacher_logits is not None:
        target = teacher_logits.to(wide)
        soft = F.cross_entropy(logits / temperature, (target / temperature).softmax(-1), reduction="none")
        loss = loss + kl_weight * temperature**2 * soft
        kl = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        agree = (logits.argmax(-1) == target.argmax(-1)).to(wide)
    total = (loss * mask).sum()
    kl_sum, ce_sum, agree_sum = ((value.detach() * mask).sum() for value in (kl, ce, agree))
    return KDTerms(total * grad_scale, total.detach(), kl_sum, ce_sum, agree_sum, mask.sum())


def chunked_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    valid: Tensor,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    grad_scale: float | Tensor = 1.0,
    head_grad: Tensor | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
) -> KDTerms:
    """The same loss from hidden states, a chunk of tokens at a time, gradients computed in the forward pass.

    student_hidden [..., d], student_head [V, d], teacher_hidden [..., d_t] and teacher_head [V, d_t] (None: hard
    labels alone), labels int64 [...], valid bool [...]. The head's gradient accumulates in float32: into
    `head_grad` [V, d] in place if given (autograd then sees none), else it is returned through autograd. No tensor
    of n * V numbers is ever made. Raises ValueError when the vocabularies differ, or when kl_weight asks for a
    teacher that is not given.
    """
    _need_teacher(kl_weight, teacher_hidden if teacher_head is not None else None)
    if teacher_head is not None and teacher_head.shape[0] != student_head.shape[0]:
        raise ValueError(f"student head has {student_head.shape[0]} rows, the teacher's {teacher_head.shape[0]}")
    hidden = student_hidden.flatten(0, -2)
    teacher_rows = None if teacher_hidden is None else teacher_hidden.detach().flatten(0, -2)
    most = CHUNK_LOGITS_COMPILED if compile else CHUNK_LOGITS_EAGER
    fits = most // student_head.shape[0]
    chunk = chunk_size or max(1, min(hidden.shape[0], fits - fits % 256 if fits >= 256 else fits))
    options = (temperature, kl_weight, ce_weight)
    data = (teacher_rows, teacher_head, labels.flatten(), valid.flatten())
    if not torch.is_grad_enabled() or not (hidden.requires_grad or student_head.requires_grad):
        sums = _evaluate(hidden, student_head.to(hidden.dtype), *data, options, chunk, compile)
        return KDTerms(sums[0] * grad_scale, *sums)
    loss, sums = _ChunkedKD.apply(hidden, student_head, *data, options, grad_scale, head_grad, chunk, compile)
    return KDTerms(loss, *sums)


def _evaluate(
    hidden: Tensor,
    head: Tensor,
    teacher_rows: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    valid: Tensor,
    options: tuple[float, float, float],
    chunk: int,
    compile: bool,
) -> Tensor:
    function = maybe_compiled(token_sums, compile)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    sums = torch.zeros(5, dtype=wide, device=hidden.device)
    for rows in slices(hidden.shape[0], part_rows(chunk, compile)):
        logits = hidden[rows] @ head.T
        target = None if teacher_rows is None or teacher_head is None else teacher_rows[rows] @ teacher_head.T
        sums += function(logits, target, labels[rows], valid[rows], *options)
    return sums


class _ChunkedKD(torch.autograd.Function):
    """Forward makes the gradients of hidden states and head; backward hands them out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        student_head: Tensor,
        teacher_rows: Tensor | None,
        teacher_head: Tensor | None,
        labels: Tensor,
        valid: Tensor,
        options: tuple[float, float, float],
        grad_scale: float | Tensor,
        head_grad: Tensor | None,
        chunk: int,
        compile: bool,
    ) -> tuple[Tensor, Tensor]:
        function = _row_function(compile and hidden.is_cuda and teacher_rows is not None, compile)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = student_head.to(hidden.dtype)  # cast here: through autograd its gradient would be rounded to float16
        scale = torch.ones((), dtype=wide, device=hidden.device).mul_(grad_scale)  # no copy from the host to wait for
        sums = torch.zeros(5, dtype=wide, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        buffer = head_grad
        if buffer is None and ctx.needs_input_grad[1]:
            buffer = torch.zeros_like(head, dtype=wide)
        elif not ctx.needs_input_grad[1]:
            buffer = None
        for rows in slices(hidden.shape[0], chunk):
            logits = hidden[rows] @ head.T
            for part in slices(logits.shape[0], part_rows(chunk, compile)):
                inner = slice(rows.start + part.start, rows.start + part.stop)
                target = (
                    None if teacher_rows is None or teacher_head is None else teacher_rows[inner] @ teacher_head.T
                )
                sums += function(logits[part], target, labels[inner], valid[inner], scale, *options)
            if hidden_grad is not None:
                torch.mm(logits, head, out=hidden_grad[rows])
            if buffer is not None:
                accumulate_product(buffer, logits.T, hidden[rows])
            del logits, target  # before the next chunk's are made
        ctx.head_given = head_grad is not None
        ctx.save_for_backward(hidden_grad, None if ctx.head_given else buffer)
        ctx.mark_non_differentiable(sums)
        return sums[0] * scale, sums

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Any, ...]:
        hidden_grad, head_grad = ctx.saved_tensors
        factor = outputs[0]
        if hidden_grad is not None:
            hidden_grad = hidden_grad * factor.to(hidden_grad.dtype)
        if head_grad is not None:
            head_grad = head_grad * factor
        return hidden_grad, head_grad, *(None,) * 9


def layer_distance(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Sum over valid tokens of |s - t|^2 / |t|^2 for hidden states s, t [b, t, d] after one layer; valid bool [b, t].

    Relative to each token's own size: the hidden states of a sequence's first token can be a hundred times as large
    as the others' ("massive activations", arXiv 2402.17762), and would be all that an absolute distance sees.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    distance = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-20)
    return torch.where(valid, distance, 0.0).sum()


def mean_layer_distance(
    student_states: Sequence[Tensor], teacher_states: Tensor, valid: Tensor, compile: bool
) -> Tensor:
    """The mean of `layer_distance` over all layers but the last, a scalar.

    student_states: its `hidden_states`, L + 1 of [b, t, d]; teacher_states [L, b, t, d]: `teacher_hidden` of every
    layer.
    """
    distance = maybe_compiled(layer_distance, compile)
    pairs = zip(student_states[1:-1], teacher_states[:-1], strict=True)
    return torch.stack([distance(mine, target, valid) for mine, target in pairs]).mean()


def part_rows(chunk: int, compile: bool) -> int:
    """Rows of the teacher's logits that are alive at a time."""
    return -(-chunk // PARTS_COMPILED) if compile else chunk


def slices(n: int, size: int) -> list[slice]:
    """0 .. n in pieces of `size`, the last one maybe shorter."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place: total float32 [V, d] (or wider), left [V, m] and right [m, d] of any dtype.

    On a GPU the product of bf16 operands adds to float32 in its own epilogue: nothing is rounded in between and
    nothing of [V, d] is allocated. Elsewhere it goes by tiles of rows.
    """
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for rows in range(0, total.shape[0], 4096):
            tile = slice(rows, rows + 4096)
            total[tile].addmm_(left[tile].to(total.dtype), right.to(total.dtype))
