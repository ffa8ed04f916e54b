"""The pair as a run holds it: both models, the text that they read, and how the student's parts are run."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.teacher import TeacherStates
from models import LlambaForCausalLM
from run.text import RunText


@dataclass
class Models:
    """The pair, the text that it learns from, and how the student's parts are run."""

    teacher: PreTrainedModel | None  # None where nothing from here on needs it
    student: LlambaForCausalLM
    text: RunText
    device: torch.device
    teacher_device: torch.device
    dtype: torch.dtype
    teacher_head: torch.Tensor | None = None  # [V, d] on the student's device, wherever the teacher goes
    student_loss: Any = None  # a `StudentLoss`; from `distribute` on under DDP or FSDP2
    teacher_states: TeacherStates | None = None
    whole_gradients: bool = False  # sharded: each rank keeps them whole until an optimizer step's last micro step

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.text.tokenizer
