"""float16: exact float32 weights and loss scale from a checkpoint, and clipping of unscaled gradients."""

import pytest
import torch
from torch import nn

import train
from checkpoints.run_state import read_trainer_state
from helpers import runs
from optim.build import build_optimizer
from optim.step import clip_and_step

# Each KD stage overflows at the first scale, 65536, and in two steps finds one at which it does not.
OVERFLOWS = dict(
    dtype="float16", kl_weight=1e3, max_steps=8, hidden_tokens=512, second_dataset_tokens=512, save_interval=2,
    keep_checkpoints=99,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_teacher, sources):
    folder = tmp_path_factory.mktemp("whole")
    assert train.main(runs.flags(tiny_teacher, sources, folder, **OVERFLOWS)) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["checkpoint-4", "checkpoint-10", "checkpoint-12"])
def test_a_resumed_run_ends_with_the_same_float32_weights(checkpoint, whole, tiny_teacher, sources, tmp_path):
    """From the ends of the hidden stage and of stage 1, and from within stage 1, where the scale has moved."""
    bad = [row["train/bad_steps"] for row in runs.metrics(whole) if "train/loss" in row]
    assert 0 < bad[9] == bad[11] < 4 and bad[11] < bad[15] < bad[11] + 4
    again = tmp_path / "again"
    runs.copy_up_to(whole, checkpoint, again)
    assert train.main(runs.flags(tiny_teacher, sources, again, **OVERFLOWS)) == 0
    assert runs.losses(again) == runs.losses(whole)
    wanted, found = (read_trainer_state(folder / "checkpoint-16") for folder in (whole, again))
    assert wanted["scaler"] == found["scaler"]
    assert wanted["weights"].keys() == found["weights"].keys()
    for name, weight in wanted["weights"].items():
        assert weight.dtype == torch.float32 and torch.equal(weight, found["weights"][name]), name
    ends = [runs.weights(folder / "final") for folder in (whole, again)]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
def test_clipping_is_of_unscaled_gradients(name):
    """A scale is a power of 2: scaled gradients give the update, and the norm, of plain ones to the bit."""
    torch.manual_seed(0)
    modules = [nn.Linear(64, 64), nn.Linear(64, 64)]
    modules[1].load_state_dict(modules[0].state_dict())
    optimizers = [build_optimizer(name, module, lr=1e-2, weight_decay=0.1) for module in modules]
    scaler, norms = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    for size in (0.01, 1.0, 0.1):  # below grad_clip, above it, below it again
        for p, q in zip(modules[0].parameters(), modules[1].parameters()):
            p.grad = size * torch.randn_like(p) / 64
            q.grad = 1024 * p.grad
        norms.append(clip_and_step(optimizers[0], list(modules[0].parameters()), 0.5)[0])
        scaled, bad = clip_and_step(optimizers[1], list(modules[1].parameters()), 0.5, scaler=scaler)
        assert scaled == norms[-1] and not bad
    assert min(norms) < 0.5 < max(norms)
    assert all(torch.equal(p, q) for p, q in zip(modules[0].parameters(), modules[1].parameters()))


def test_an_overflow_halves_the_scale_and_good_updates_double_it():
    module = nn.Linear(4, 4)
    optimizer = build_optimizer("adamw", module, lr=1e-2, weight_decay=0.0)
    scaler, scales = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2), []
    before = module.weight.detach().clone()
    for value in (torch.inf, 1.0, 1.0, 1.0, torch.nan, 1.0, 1.0):
        for p in module.parameters():
            p.grad = torch.full_like(p, value)
        _, bad = clip_and_step(optimizer, list(module.parameters()), 1.0, scaler=scaler)
        assert bool(bad) == (value != 1.0)
        scales.append(scaler.get_scale())
        assert torch.equal(before, module.weight) == (len(scales) == 1)
    assert scales == [4.0, 4.0, 8.0, 8.0, 4.0, 4.0, 8.0]  # an overflow begins the count anew
