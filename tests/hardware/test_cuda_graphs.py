"""A step as a CUDA graph gives what it gives without."""

import weakref

import pytest
import torch
from torch import nn

from hardware.cuda_graphs import CapturedMicroStep
from helpers import runs

OPTIONS = dict(max_steps=14, save_interval=4, grad_accumulation_steps=2, freeze_mlp=True, second_dataset_tokens=1024)


@pytest.mark.gpu
def test_a_run_with_graphs_equals_one_without(tmp_path, tiny_teacher, sources, run_script):
    """Alignment and distillation, accumulated gradients, evaluations in between: losses and weights to the bit."""
    options = {**OPTIONS, "device": "cuda:0", "dtype": "bfloat16", "deterministic": True, "hidden_tokens": 2048}
    options |= {"eval_dataset": sources["heldout"], "eval_interval": 5}
    for name, flags in (("graphs", {}), ("none", {"no_cuda_graphs": True})):
        done = run_script("train.py", *runs.flags(tiny_teacher, sources, tmp_path / name, **options, **flags))
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
        assert ("runs as one CUDA graph" in done.stdout) == (name == "graphs"), done.stdout[-2000:]
    assert runs.losses(tmp_path / "graphs") == runs.losses(tmp_path / "none")
    assert runs.bits(tmp_path / "graphs" / "final") == runs.bits(tmp_path / "none" / "final")


def test_gradients_return_to_where_the_graph_adds_to_them():
    kept, dropped, replaced = (nn.Parameter(torch.ones(3)) for _ in range(3))
    step = CapturedMicroStep(lambda *_: {}, [kept, dropped, replaced], torch.device("cpu"))
    step.gradients = [(p, torch.full((3,), 7.0)) for p in (kept, dropped, replaced)]
    kept.grad, replaced.grad = step.gradients[0][1], torch.full((3,), 2.0)
    step._restore_gradients()
    assert all(p.grad is buffer for p, buffer in step.gradients)
    assert [p.grad[0].item() for p in (kept, dropped, replaced)] == [7.0, 0.0, 2.0]


def test_a_step_without_room_keeps_no_gradients_alive(monkeypatch):
    parameter = nn.Parameter(torch.ones(3))

    def micro_step(batch, scale):
        (parameter.sum() * scale).backward()
        return {"loss": scale}

    monkeypatch.setattr(CapturedMicroStep, "_has_room", lambda self: False)
    step = CapturedMicroStep(micro_step, [parameter], torch.device("cpu"))
    for _ in range(4):
        assert step(None, torch.ones(()))["loss"] == 1
        gradient, parameter.grad = weakref.ref(parameter.grad), None
        assert gradient() is None
