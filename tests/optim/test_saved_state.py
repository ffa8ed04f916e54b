"""A saved optimizer's state on other parameters: wider, narrower, frozen, thawed, with other settings."""

import pytest
import torch
from torch import nn

from optim.build import build_optimizer
from optim.saved_state import join_saved_masters, load_optimizer_state, named_state
from utils import UserError


def make(name, dtype, *, frozen=(), weight_decay=0.1):
    """(model, optimizer) with the same weights every time, rounded to `dtype`."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(64, 128), "second": nn.Linear(128, 64), "head": nn.Linear(64, 10)})
    for part in frozen:
        model[part].requires_grad_(False)
    model.to(dtype)
    return model, build_optimizer(name, model, lr=1e-3, weight_decay=weight_decay)


def step(model, optimizer, seed):
    """One update with gradients that are the same whatever the parameters' dtype."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape).to(torch.bfloat16)
        parameter.grad = gradient.to(parameter.dtype) if parameter.requires_grad else None
    optimizer.step()


def saved_after(name, dtype, **options):
    """(model, optimizer, its state with names) after three updates."""
    model, optimizer = make(name, dtype, **options)
    for seed in range(3):
        step(model, optimizer, seed)
    return model, optimizer, named_state(optimizer.state_dict(), optimizer, model)


def exact(model, optimizer):
    masters = optimizer.master_weights()
    return {name: masters.get(p, p).detach().float() for name, p in model.named_parameters()}


def taken_over(name, dtype, old_model, saved, *, same_kind=True, same_dtype=False, **options):
    """(model, optimizer) with a checkpoint's weights, cast as loading does, and its optimizer state."""
    model, optimizer = make(name, dtype, **options)
    model.load_state_dict(old_model.state_dict())
    join_saved_masters(model, saved)
    flags = dict(same_kind=same_kind, same_dtype=same_dtype, sharded=False)
    load_optimizer_state(optimizer, saved, model, **flags)
    return model, optimizer


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
def test_a_wider_dtype_starts_from_the_exact_masters(name):
    old, before, saved = saved_after(name, torch.bfloat16)
    model, _ = taken_over(name, torch.float32, old, saved)
    for key, master in exact(old, before).items():
        assert torch.equal(dict(model.named_parameters())[key], master)
        assert not torch.equal(dict(old.named_parameters())[key].float(), master)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
def test_what_is_frozen_from_then_on_takes_its_master_too(name):
    """Without writing to the memory that a frozen parameter may share with the teacher."""
    old, before, saved = saved_after(name, torch.bfloat16)
    model, _ = make(name, torch.float32, frozen=["first"])
    model.load_state_dict(old.state_dict())
    shared = model["first"].weight.data
    join_saved_masters(model, saved)
    assert torch.equal(shared, old["first"].weight.float()) and not torch.equal(shared, model["first"].weight)
    assert all(torch.equal(p, exact(old, before)[key]) for key, p in model.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_wider_dtype_takes_the_same_steps_as_the_masters_would(name):
    """Moments included: whether the weights are float32 or bf16 with masters, equal gradients give equal masters."""
    old, before, saved = saved_after(name, torch.bfloat16)
    model, optimizer = taken_over(name, torch.float32, old, saved)
    step(old, before, 9)
    step(model, optimizer, 9)
    ours, theirs = exact(model, optimizer), exact(old, before)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
def test_a_narrower_dtype_starts_from_the_rounded_weights_and_loses_no_update_from_there(name):
    old, _, saved = saved_after(name, torch.float32)
    model, optimizer = taken_over(name, torch.bfloat16, old, saved)
    rounded = {key: p.detach().float() for key, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 1e-7
    step(model, optimizer, 9)
    moved = exact(model, optimizer)
    assert all((moved[key] != rounded[key]).float().mean() > 0.5 for key in rounded)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "muon"])
def test_state_goes_by_name_where_parameters_are_frozen_or_thawed(name):
    old, before, saved = saved_after(name, torch.bfloat16, frozen=["first"])
    model, optimizer = taken_over(name, torch.bfloat16, old, saved, same_dtype=True, frozen=["second"])
    parameters, states = dict(model.named_parameters()), before.state
    for key, parameter in old.named_parameters():
        found = optimizer.state.get(parameters[key], {})
        kept = key.startswith("head")
        assert bool(found) == kept
        if kept:
            assert all(torch.equal(found[entry], states[parameter][entry]) for entry in states[parameter])
    step(model, optimizer, 9)
    assert all(optimizer.state[parameters[key]] for key in ("first.weight", "first.bias"))


def test_rates_and_weight_decay_stay_this_runs():
    old, _, saved = saved_after("adamw8bit", torch.bfloat16)
    _, optimizer = taken_over("adamw8bit", torch.bfloat16, old, saved, same_dtype=True, weight_decay=0.7)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.7, 0.0]


def test_another_optimizer_takes_the_masters_and_nothing_else():
    old, before, saved = saved_after("adamw", torch.bfloat16)
    model, optimizer = taken_over("muon", torch.float32, old, saved, same_kind=False)
    assert not optimizer.state
    assert all(torch.equal(p, exact(old, before)[key]) for key, p in model.named_parameters())


def test_state_without_names_goes_by_order_and_only_where_that_is_certain():
    old, before, saved = saved_after("adamw", torch.bfloat16)
    del saved["names"]
    model, optimizer = taken_over("adamw", torch.bfloat16, old, saved, same_dtype=True)
    ours = exact(model, optimizer)
    assert all(torch.equal(ours[key], value) for key, value in exact(old, before).items())
    with pytest.raises(UserError, match="before names of parameters were kept"):
        taken_over("adamw", torch.bfloat16, old, saved, same_dtype=True, frozen=["first"])
    with pytest.raises(UserError, match="--dtype"):
        taken_over("adamw", torch.float32, old, saved)
