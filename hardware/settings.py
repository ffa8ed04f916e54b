"""What a step's memory and speed depend on, of all that a run is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

TeacherNeed = Literal["never", "at the start", "throughout"]
WholeUntil = Literal["", "loaded", "aligned"]  # how far every rank holds whole models that it shards then


@dataclass
class StepSettings:
    """Values of flags under the flags' own names; `run.acceleration.step_settings` makes it of them."""

    device: str
    teacher_device: str  # the student's, where there is one device
    dtype: torch.dtype  # of products; parameters are float32 under float16
    layers: Sequence[int | str]  # replaced ones, or auto:K
    freeze_mlp: bool
    freeze_replaced_layers: bool
    freeze_embeddings: bool
    attn_implementation: str
    batch_size: int
    seq_length: int
    grad_accumulation_steps: int
    document_reset: bool
    layer_weight: float
    optimizer: str
    update_in_backward: bool
    teacher_fp8: bool
    gradient_checkpointing: str
    compiled: bool

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    @property
    def one_device(self) -> bool:
        """True where teacher and student share a device."""
        return self.teacher_device == self.device
