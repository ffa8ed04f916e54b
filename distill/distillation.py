"""A micro step of distillation: the teacher's hidden states, the student's forward pass, loss, backward pass."""

from typing import Any

import torch
from torch import nn

from data import Batch
from distill.losses import KDTerms, chunked_kd_loss, mean_layer_distance
from distill.teacher import TeacherStates
from loop.forms import MicroStep, Sums
from models import LlambaForCausalLM


class StudentLoss(nn.Module):
    """Student forward and loss as one module, so that DDP and FSDP2 see one forward with every parameter in it."""

    def __init__(
        self,
        student: LlambaForCausalLM,
        teacher_head: torch.Tensor | None,
        *,
        temperature: float = 1.0,
        kl_weight: float = 1.0,
        ce_weight: float = 0.0,
        layer_weight: float = 0.0,
        accumulate_head_in_place: bool = True,
        compile: bool = False,
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        self.student: Any = student
        self.teacher_head = [teacher_head]  # in a list: no parameter or buffer of this module
        self.options: dict[str, Any] = dict(
            temperature=temperature, kl_weight=kl_weight, ce_weight=ce_weight, compile=compile
        )
        self.layer_weight = layer_weight
        self.accumulate_head_in_place = accumulate_head_in_place
        self.autocast = autocast

    def forward(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        valid: torch.Tensor,
        position_ids: torch.Tensor | None,
        teacher_hidden: torch.Tensor | None,
        grad_scale: torch.Tensor,
    ) -> KDTerms:
        """Loss terms of one batch (see `losses.chunked_kd_loss`); inputs, labels int64 [b, t].

        teacher_hidden: `teacher.teacher_hidden`'s. With a `layer_weight` those of every layer, in training: the
        loss then has layer_weight * `losses.mean_layer_distance` besides. The last layer is the distillation term's.
        """
        matches = self.layer_weight > 0 and torch.is_grad_enabled()
        if matches and (teacher_hidden is None or teacher_hidden.ndim != 4):
            raise ValueError("a layer_weight needs the teacher's hidden states of every layer (every_layer=True)")
        with torch.autocast(inputs.device.type, self.autocast, enabled=self.autocast is not None):
            states = self.student.backbone(inputs, position_ids=position_ids, output_hidden_states=matches)
        if hasattr(self.student.lm_head, "unshard"):  # FSDP2 does so for a module's own forward, which is not used
            self.student.lm_head.unshard()
        head = self.student.lm_head.weight
        terms = chunked_kd_loss(
            states.last_hidden_state,
            head,
            teacher_hidden[-1] if matches and teacher_hidden is not None else teacher_hidden,
            self.teacher_head[0],
            labels,
            valid,
            grad_scale=grad_scale,
            head_grad=self._head_gradient(head),
            **self.options,
        )
        if not matches or teacher_hidden is None:
            return terms
        layer_sum = mean_layer_distance(states.hidden_states, teacher_hidden, valid, self.options["compile"])
        loss = terms.loss + self.layer_weight * grad_scale * layer_sum
        return terms._replace(loss=loss, layer_sum=layer_sum.detach())

    def _head_gradient(self, head: nn.Parameter) -> torch.Tensor | None:
        """The head's float32 gradient, accumulated in place; None leaves it to autograd (tied or distributed)."""
        if not (head.requires_grad and self.accumulate_head_in_place and torch.is_grad_enabled()):
            return None
        if head.grad is None and head.dtype in (torch.bfloat16, torch.float16):
            head.grad_dtype = torch.float32
        if head is self.student.backbone.embedding.weight:
            return None
        if head.grad is None:
            head.grad = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32))
        return head.grad


def kd_micro_step(student_loss: nn.Module, teacher: TeacherStates | None) -> MicroStep:
    """The micro step of the KD stages: the teacher (also for the batch that follows), student, loss, backward."""

    def micro_step(batch: Batch, grad_scale: torch.Tensor) -> Sums:
        hidden = None if teacher is None else teacher.of(batch)
        if teacher is not None and batch.following is not None:
            teacher.prepare(batch.following)
        terms = student_loss(batch.inputs, batch.labels, batch.valid, batch.position_ids, hidden, grad_scale)
        terms.loss.backward()
        sums = {
            "loss": terms.loss_sum,
            "kl": terms.kl_sum,
            "ce": terms.ce_sum,
            "top1_agreement": terms.agree_sum,
        }
        return sums if terms.layer_sum is None else {**sums, "layer_distance": terms.layer_sum}

    return micro_step
