"""A small KD stage over given batches, for tests of the loop itself."""

from dataclasses import dataclass

import torch

from data import Batch
from distill.distillation import StudentLoss, kd_micro_step
from distill.teacher import OwnTeacher
from loop.forms import Stage
from optim.build import build_optimizer
from optim.schedule import Phases, build_schedule


@dataclass
class Batches:
    """A loader's face over a list."""

    items: list
    waited_seconds: float = 0.0
    position: int = 0

    def __iter__(self):
        while self.position < len(self.items):
            self.position += 1
            yield self.items[self.position - 1]

    def state_dict(self):
        return {"position": self.position}


def batches_of(tokens, valid, size):
    return [
        Batch(tokens=tokens[i : i + size], valid=valid[i : i + size], position_ids=None, document_ids=[f"d{i}"])
        for i in range(0, len(tokens), size)
    ]


def make_stage(teacher, student, batches, accumulation=1, steps=10, **options):
    module = StudentLoss(student, teacher.lm_head.weight, **options)

    own = OwnTeacher(teacher, torch.device("cpu"), every_layer=module.layer_weight > 0)
    optimizer = build_optimizer("adamw", module, lr=1e-3, weight_decay=0.1)
    schedule = build_schedule(optimizer, Phases.of(steps, 0.1, 0.1), max_lr=1e-3, min_lr=1e-5)
    return Stage(
        "stage1", Batches(batches), kd_micro_step(module, own), module, optimizer, schedule, steps, accumulation
    )
