"""Optimizers that lose no update, their state, the schedule as a table, and the clipped step."""

import copy

import pytest
import torch
from torch import nn

from helpers.updates import step_alike
from optim.adamw8bit import AdamW8bit
from optim.build import build_optimizer, parameter_groups
from optim.masters import join_master, split_master
from optim.moments import RATIO, block_length, step_scalars, update_blocks
from optim.schedule import Phases, build_schedule
from optim.step import clip_and_step, gradient_norm


def test_the_two_halves_are_the_exact_master():
    values = torch.randn(100_000) * torch.exp(torch.randn(100_000) * 8)
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int32) + (0x3F80 << 16) + 0x8000).view(torch.float32)
    for master in (values, ties, torch.zeros(3), -values):
        high, low = split_master(master)
        assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
        assert torch.equal(join_master(high, low), master)
        assert ((high.float() - master).abs() <= master.abs() * 2**-8).all()


def train(name, dtype, spread=0.0, steps=300, lr=1e-5):
    """A noisy quadratic from the same start with the same noise; returns (start, end) of the master weights.

    spread: standard deviation of the logarithm of the gradients' sizes within a row.
    """
    generator = torch.Generator().manual_seed(5)
    start = (torch.randn(100, 192, generator=generator) * 0.02).bfloat16().float()
    goal = torch.randn(100, 192, generator=generator) * 0.02
    size = torch.exp(spread * torch.randn(100, 192, generator=generator))
    module = nn.Linear(192, 100, bias=False)
    module.weight.data = start.clone().to(dtype)
    if name == "plain":
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    else:
        optimizer = build_optimizer(name, module, lr=lr, weight_decay=0.1)
    for _ in range(steps):
        noise = torch.randn(100, 192, generator=generator) * torch.exp(torch.randn(100, 1, generator=generator))
        module.weight.grad = ((start - goal + 0.05 * noise) * size).to(dtype)
        optimizer.step()
    masters = getattr(optimizer, "master_weights", dict)()
    return start, masters.get(module.weight, module.weight.detach().float())


@pytest.mark.parametrize("name, spread, bound", [
    ("adamw", 0.0, 1e-2), ("adamw", 3.0, 1e-2), ("adamw8bit", 0.0, 1e-2), ("adamw8bit", 1.0, 1.5e-2),
    ("adamw8bit", 3.0, 6e-2),
])  # fmt: skip
def test_300_small_updates_in_bf16_end_where_float32_ends(name, spread, bound):
    """Also where gradients differ in size within a block: at spread 3 by 7 orders of magnitude."""
    start, wanted = train("adamw", torch.float32, spread)
    _, given = train(name, torch.bfloat16, spread)
    _, lost = train("plain", torch.bfloat16, spread)
    moved = (wanted - start).norm()
    assert (given - wanted).norm() / moved < bound
    assert (lost - wanted).norm() / moved > 0.3


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_100_equal_gradients_move_every_bf16_weight_all_the_way(name):
    """lr 1e-5 is a twelfth of the spacing of bf16 at 0.02: without masters 7% of the way."""
    module = nn.Linear(192, 100, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(module.weight, std=0.02)
    start = module.weight.detach().float()
    optimizer = build_optimizer(name, module, lr=1e-5, weight_decay=0.0)
    for _ in range(100):
        module.weight.grad = torch.full_like(module.weight, 1e-2)
        optimizer.step()
    master = optimizer.master_weights()[module.weight]
    assert torch.allclose(start - master, torch.tensor(1e-3), rtol=0.02)
    assert (module.weight.float() - master).abs().max() <= master.abs().max() * 2**-8
    assert (module.weight.float() < start).float().mean() > 0.99


def test_no_update_blows_up_after_a_spike():
    """A spike hides its block's other entries; while it fades they get no gradient, the worst case for 8 bits."""
    module = nn.Linear(256, 4, bias=False)
    optimizer = build_optimizer("adamw8bit", module, lr=1e-3, weight_decay=0.0)
    for step in range(1, 120):
        gradient = torch.randn(4, 256) * 3e-4 if step < 52 else torch.zeros(4, 256)
        if step == 20:
            gradient[:, 0] = 1e3
        module.weight.grad = gradient
        before = module.weight.detach().clone()
        optimizer.step()
        corrected = RATIO / (1 - 0.9**step) * (1 - 0.95**step) ** 0.5
        assert (module.weight - before).abs().max() < 1e-3 * corrected * 1.02


def test_gradient_norm_is_float32_for_bf16_gradients():
    gradients = [torch.randn(300, 200).bfloat16(), torch.randn(50).bfloat16(), torch.randn(70, 80)]
    wanted = torch.cat([g.double().flatten() for g in gradients]).norm()
    for some, exact in ((gradients, wanted), (gradients[:1], gradients[0].double().norm())):
        norm = gradient_norm(some)
        assert norm.dtype == torch.float32 and norm.item() == pytest.approx(exact.item(), rel=1e-5)
    assert gradient_norm([]) == 0


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_a_closure_is_called(name):
    module = nn.Linear(64, 3)
    before = module.weight.detach().clone()
    optimizer = build_optimizer(name, module, lr=1e-2, weight_decay=0.0)

    def closure():
        loss = module(torch.ones(64)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0 and not torch.equal(module.weight, before)


def test_adamw_is_torchs():
    module, twin = nn.Linear(8, 5), nn.Linear(8, 5)
    twin.load_state_dict(module.state_dict())
    ours = build_optimizer("adamw", module, lr=1e-2, weight_decay=0.1)
    theirs = torch.optim.AdamW(parameter_groups(twin, 0.1), lr=1e-2, betas=(0.9, 0.95))
    step_alike(module, ours, twin, theirs)
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(module.parameters(), twin.parameters()))


def test_no_decay_on_vectors():
    groups = parameter_groups(nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)]), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [p.ndim for p in groups[0]["params"]] == [2] and {p.ndim for p in groups[1]["params"]} == {1}


def test_bytes_of_state():
    module = nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16)
    optimizer = build_optimizer("adamw8bit", module, lr=1e-3, weight_decay=0.1)
    module.weight.grad = torch.randn_like(module.weight)
    optimizer.step()
    state = optimizer.state[module.weight]
    assert sum(v.numel() * v.element_size() for v in state.values()) / module.weight.numel() < 4.1


def test_block_lengths_divide_rows():
    assert block_length(torch.zeros(3, 4096)) == 256 and block_length(torch.zeros(3, 576)) == 192
    assert block_length(torch.zeros(3, 1, 4)) is None and block_length(torch.zeros(4096)) is None
    assert block_length(torch.zeros(3, 577)) is None


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_goes_on_bit_for_bit(name, dtype, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(192, 70), nn.LayerNorm(70), nn.Linear(70, 3)).to(dtype)
    optimizer = build_optimizer(name, module, lr=1e-3, weight_decay=0.1)
    gradients = [[torch.randn_like(p) for p in module.parameters()] for _ in range(6)]

    def step(module, optimizer, index):
        for p, g in zip(module.parameters(), gradients[index]):
            p.grad = g.clone()
        clip_and_step(optimizer, list(module.parameters()), 1.0)

    for index in range(3):
        step(module, optimizer, index)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(module)
    restored = build_optimizer(name, twin, lr=1e-3, weight_decay=0.1)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for index in range(3, 6):
        step(module, optimizer, index)
        step(twin, restored, index)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters()))
    masters, again = optimizer.master_weights(), restored.master_weights()
    assert all(torch.equal(masters[p], again[q]) for p, q in zip(module.parameters(), twin.parameters()))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_gradient_changes_nothing(name, value):
    module = nn.Sequential(nn.Linear(128, 10), nn.LayerNorm(10)).bfloat16()
    optimizer = build_optimizer(name, module, lr=1e-2, weight_decay=0.1)
    parameters = list(module.parameters())

    def fill():
        for p in parameters:
            p.grad = torch.randn_like(p)

    fill()
    _, bad = clip_and_step(optimizer, parameters, 1.0)
    assert bad == 0
    before = copy.deepcopy([p.detach() for p in parameters])
    state = copy.deepcopy(optimizer.state_dict()["state"])
    fill()
    parameters[0].grad[0, 0] = value
    norm, bad = clip_and_step(optimizer, parameters, 1.0)
    assert bad == 1 and not torch.isfinite(norm)
    assert all(torch.equal(p, q) for p, q in zip(parameters, before))
    after = optimizer.state_dict()["state"]
    for index in state:
        for key, kept in state[index].items():
            assert torch.equal(torch.as_tensor(kept), torch.as_tensor(after[index][key])), key


def test_clipping_is_by_the_global_norm():
    module, twin = nn.Linear(64, 64), nn.Linear(64, 64)
    twin.load_state_dict(module.state_dict())
    optimizers = [build_optimizer("adamw", m, lr=1e-2, weight_decay=0.0) for m in (module, twin)]
    for p, q in zip(module.parameters(), twin.parameters()):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    norm, _ = clip_and_step(optimizers[0], list(module.parameters()), 0.5)
    wanted = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    optimizers[1].step()
    assert torch.allclose(norm, wanted)
    for p, q in zip(module.parameters(), twin.parameters()):
        ours, theirs = optimizers[0].state[p]["exp_avg"], optimizers[1].state[q]["exp_avg"]
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-9)


TABLES = {
    (1, 0.1, 0.1): [1.0, 0.001],
    (2, 0.0, 0.0): [1.0, 0.001, 0.001],
    (10, 0.1, 0.1): [1.0] * 9 + [0.001, 0.001],
    (10, 0.0, 0.2): [1.0] * 8 + [0.2928932, 0.001, 0.001],
    (20, 0.1, 0.2): [0.5] + [1.0] * 15 + [0.5, 0.2928932, 0.1339746, 0.001, 0.001],
    (4, 0.5, 0.5): [0.5, 1.0, 0.2928932, 0.001, 0.001],
}


@pytest.mark.parametrize("case", TABLES)
def test_schedule_step_by_step(case):
    total, warmup, decay = case
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-5)
    schedule = build_schedule(optimizer, Phases.of(total, warmup, decay), max_lr=1e-5, min_lr=1e-8)
    rates = []
    for _ in TABLES[case]:
        rates.append(schedule.get_last_lr()[0] / 1e-5)
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(TABLES[case], rel=1e-5)


def blocks(shape, dtype, device="cuda"):
    """A weight, its low half, codes and scales at the start, as `update_blocks` takes them."""
    weight = (0.02 * torch.randn(shape, device=device)).to(dtype)
    low = torch.zeros(shape, dtype=torch.int16, device=device) if dtype == torch.bfloat16 else weight
    codes = [torch.zeros(shape, dtype=kind, device=device) for kind in (torch.int8, torch.uint8)]
    return [weight, low, *codes, torch.zeros(shape[0], 1, device=device)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(37, 192), (16, 256), (5, 64), (1, 144)])
def test_the_kernel_is_its_definition(dtype, shape):
    from optim import optimizer_kernel

    wanted = blocks(shape, dtype)
    given = [tensor.clone() for tensor in wanted]
    if dtype == torch.float32:
        given[1] = given[0]
    scalars = step_scalars(torch.tensor([9.0, 1.0], device="cuda"), 1e-3, 0.1, torch.tensor(1.7, device="cuda"))
    for found in (torch.ones((), device="cuda"), torch.zeros((), device="cuda")):  # skipped, then done
        before = [tensor.clone() for tensor in given]
        grad = torch.randn(shape, device="cuda")
        update_blocks(wanted[0], grad, *wanted[1:], scalars[1], found)
        optimizer_kernel.fused_update_blocks(given[0], grad, *given[1:], scalars, 1, found)
        assert all(torch.equal(a, b) for a, b in zip(before, given)) == bool(found)
    weights = [join_master(x[0], x[1]) if dtype == torch.bfloat16 else x[0] for x in (wanted, given)]
    assert (weights[0] - weights[1]).abs().max() < 1e-8
    assert all((a.int() - b.int()).abs().max() <= 1 for a, b in zip(wanted[2:4], given[2:4]))  # a last bit's rounding
    assert torch.allclose(wanted[4], given[4], rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_kernel_steps_equal_eager_ones():
    module = nn.Linear(512, 300, bias=False, dtype=torch.bfloat16, device="cuda")
    start, twin = module.weight.detach().float(), copy.deepcopy(module)
    eager = AdamW8bit(parameter_groups(module, 0.1), lr=1e-3)
    kernel = AdamW8bit(parameter_groups(twin, 0.1), lr=1e-3, kernel=True)
    step_alike(module, eager, twin, kernel)
    ours, theirs = kernel.master_weights()[twin.weight], eager.master_weights()[module.weight]
    # a last bit of the moments decides how their codes are rounded, so the two differ by a few codes
    assert (ours - theirs).norm() / (theirs - start).norm() < 1e-2
