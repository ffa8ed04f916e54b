"""Held-out KL, agreement and perplexity of a student beside its teacher."""

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from utils import UserError, progress_bar

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from data import Batch
    from distill.teacher import TeacherStates
    from models import LlambaForCausalLM


def held_out_figures(
    student: "LlambaForCausalLM",
    teacher: "PreTrainedModel",
    batches: Iterable[Any],
    tokens: int,
    device: "torch.device",
) -> dict[str, float]:
    """`figures_of` a student and a teacher that are whole models on this process' devices."""
    from distill.distillation import StudentLoss
    from distill.teacher import OwnTeacher

    head = teacher.get_output_embeddings().weight.to(device)
    student_loss, states = StudentLoss(student, head), OwnTeacher(teacher, device)
    was_training = student.training
    student.eval()
    there = (batch.to(device) for batch in batches)
    figures = figures_of(lambda batch: held_out_sums(student_loss, states, head, batch), there, tokens)
    student.train(was_training)
    return figures


def held_out_sums(
    student_loss: "nn.Module",
    teacher_states: "TeacherStates",
    teacher_head: "torch.Tensor",
    batch: "Batch",
) -> "torch.Tensor":
    """float64 [5] on the host: KL, agreement, the student's and the teacher's cross-entropy, tokens of a batch.

    student_loss: a `distillation.StudentLoss`, also replicated or sharded. The batch is on its device.
    """
    import torch

    from distill.losses import chunked_kd_loss

    teacher_hidden = teacher_states.of(batch)
    one = torch.ones((), device=batch.tokens.device)
    terms = student_loss(batch.inputs, batch.labels, batch.valid, batch.position_ids, teacher_hidden, one)
    options: dict[str, Any] = dict(kl_weight=0.0, ce_weight=1.0)
    own = chunked_kd_loss(teacher_hidden, teacher_head, None, None, batch.labels, batch.valid, **options)
    row = (terms.kl_sum, terms.agree_sum, terms.ce_sum, own.ce_sum, terms.tokens)
    return torch.stack([value.double() for value in row]).cpu()


def figures_of(
    sums_of: Callable[[Any], Any],
    batches: Iterable[Any],
    tokens: int,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """KL(teacher || student) at temperature 1, top-1 agreement and both perplexities over at least `tokens` tokens.

    `batches` yields `data.Batch`, of which `sums_of` gives `held_out_sums` (only valid positions count), over all
    ranks. Returns kl (nats a token), top1_agreement (0 to 1), student_perplexity,
    teacher_perplexity, perplexity_ratio, tokens; nothing once `stop()` says so. Raises `UserError` where there is no
    token.
    """
    import torch

    sums = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad(), progress_bar("held-out text", tokens, " tokens") as bar:
        for batch in batches:
            sums += sums_of(batch)
            bar.update(min(int(sums[4]), tokens) - bar.n)
            if stop():
                return {}
            if sums[4] >= tokens:
                break
    kl, agree, student_ce, teacher_ce, count = sums.tolist()
    if not count:
        raise UserError("the held-out data holds no whole sequence: use more text or a smaller --seq_length")
    return {
        "kl": kl / count,
        "top1_agreement": agree / count,
        "student_perplexity": math.exp(min(student_ce / count, 700.0)),
        "teacher_perplexity": math.exp(min(teacher_ce / count, 700.0)),
        "perplexity_ratio": math.exp(min((student_ce - teacher_ce) / count, 700.0)),
        "tokens": count,
    }
