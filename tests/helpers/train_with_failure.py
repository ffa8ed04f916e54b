"""train.py in which one rank (FAIL_RANK) fails in one place (FAIL_IN), the FAIL_AT-th time that it comes there."""

import importlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train

PLACES = {  # name of a place: the function that fails there
    "loading": "run.build:get_student_model",
    "building": "run.stages:build_optimizer",
    "resuming": "run.resumption:read_trainer_state",
    "restoring": "run.resumption:set_rng_state",
    "training text": "data:TextLoader._collate",
    "held-out text": "run.text:RunText.held_out_loader",
    "evaluation": "run.telling:held_out_sums",
    "layer figures": "run.telling:layer_figures",
    "gradient norms": "run.telling:gradient_norms",
    "samples": "run.telling:continuations",
    "saving": "run.saving:frozen_names",
    "model card": "run.saving:model_card",
    "training step": "distill.distillation:chunked_kd_loss",
}


def failing(work, at=1):
    count = 0

    def call(*args, **options):
        nonlocal count
        count += 1
        if count == at:
            raise ValueError("made to fail")
        return work(*args, **options)

    return call


class FailsAtItsSecondBatch:
    """Held-out batches, the second of which cannot be had, or not be brought to a device."""

    def __init__(self, batches, to_device):
        self.batches, self.to_device = batches, to_device

    def __iter__(self):
        for index, batch in enumerate(self.batches):
            if index == 1 and not self.to_device:
                raise ValueError("made to fail")
            if index == 1:
                batch.to = failing(batch.to)
            yield batch


def fail_within_an_evaluation(to_device: bool) -> None:
    from run.text import RunText

    whole, opened = RunText.held_out_loader, []

    def loader(self):
        opened.append(whole(self))
        fails = len(opened) == int(os.environ["FAIL_AT"])
        return FailsAtItsSecondBatch(opened[-1], to_device) if fails else opened[-1]

    RunText.held_out_loader = loader


def patch(place: str) -> None:
    if place.startswith("held-out batch"):
        fail_within_an_evaluation(to_device=place.endswith("on its device"))
        return
    module, _, names = PLACES[place].partition(":")
    owner = importlib.import_module(module)
    *path, name = names.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, failing(getattr(owner, name), int(os.environ.get("FAIL_AT", 1))))


if os.environ.get("RANK", "0") == os.environ["FAIL_RANK"]:
    patch(os.environ["FAIL_IN"])
sys.exit(train.main())
