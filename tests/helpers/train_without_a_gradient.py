"""train.py whose second stage loses the gradient of the final norm on its way to the optimizer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train
from run import stages

plain = stages.build_stage


def build_stage(args, name, models, *others, **named):
    stage = plain(args, name, models, *others, **named)
    average = stage.average_gradients

    def lose():
        average()
        models.student.backbone.final_layernorm.weight.grad = None

    if name == "stage1":
        stage.average_gradients = lose
    return stage


stages.build_stage = build_stage
sys.exit(train.main())
