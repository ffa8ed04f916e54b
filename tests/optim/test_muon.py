"""Muon against its definition in float64, its exact masters, which matrices it takes, and a resumed run."""

import copy

import pytest
import torch
from torch import nn

from arguments import parse_arguments
from hardware.ranks import Ranks
from helpers import runs
from helpers.teachers import TEACHERS, make_student, make_teacher
from helpers.updates import step_alike
from optim.build import build_optimizer, muon_groups
from optim.masters import join_master
from optim.muon import COEFFICIENTS, ITERATIONS, MOMENTUM, SIZE, Muon, orthogonalised
from optim.step import clip_and_step
from run.inputs import choose_parallel
from utils import UserError


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 40, 96), (2, 96, 40), (1, 9, 64), (2, 1, 7), (1, 1, 1)])
def test_singular_values_become_about_1_and_vectors_stay(shape):
    matrices = torch.randn(shape, dtype=torch.float64)
    left, before, right = torch.linalg.svd(matrices, full_matrices=False)
    turned = left.mT @ orthogonalised(matrices) @ right.mT
    values = turned.diagonal(dim1=-2, dim2=-1)
    assert (turned - torch.diag_embed(values)).abs().max() < 1e-10
    large = before / before.norm(dim=-1, keepdim=True) > 0.01  # smaller ones are not there after five iterations
    assert ((values > 0.65) & (values < 1.25))[large].all() and (values > 0).all()


def test_no_momentum_gives_no_step():
    assert torch.equal(orthogonalised(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


def reference(weight, gradients, rows, lr, decay):
    """Muon's updates one after the other, in float64, each singular value by the scalar iteration."""
    master, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    a, b, c = COEFFICIENTS
    for gradient in gradients:
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient.double()
        ahead = MOMENTUM * momentum + (1 - MOMENTUM) * gradient.double()
        steps = []
        for part in ahead.split(rows):
            u, s, v = torch.linalg.svd(part, full_matrices=False)
            s = s / s.norm()
            for _ in range(ITERATIONS):
                s = a * s + b * s**3 + c * s**5
            steps.append(SIZE * max(part.shape) ** 0.5 * (u * s) @ v)
        master = master * (1 - lr * decay) - lr * torch.cat(steps)
    return master


class Mixer(nn.Module):
    """Two equal in_proj of three matrices each, as a mixer names them, and a plain one."""

    in_proj_rows = (24, 16, 5)

    def __init__(self, dtype):
        super().__init__()
        self.in_proj = nn.Linear(32, 45, bias=False, dtype=dtype)
        self.inner = nn.ModuleList(
            [nn.Linear(32, 45, bias=True, dtype=dtype), nn.Linear(8, 30, bias=False, dtype=dtype)]
        )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_updates_are_those_of_the_definition(dtype, tolerance):
    module = Mixer(dtype)
    optimizer = build_optimizer("muon", module, lr=1e-2, weight_decay=0.1)
    rows = {module.in_proj: [24, 16, 5], module.inner[0]: [45], module.inner[1]: [30]}
    start = {linear: linear.weight.detach().clone() for linear in rows}
    seen = {linear: [] for linear in rows}
    for _ in range(4):
        for p in module.parameters():
            p.grad = torch.randn_like(p) * torch.exp(torch.randn(()))
        for linear in rows:
            seen[linear].append(linear.weight.grad.clone())
        optimizer.step()
    masters = optimizer.master_weights()
    for linear, parts in rows.items():
        wanted = reference(start[linear], seen[linear], parts, 1e-2, 0.1)
        moved = (wanted - start[linear].double()).norm()
        assert (masters[linear.weight].double() - wanted).norm() < tolerance * moved
    assert masters[module.in_proj.weight].dtype == torch.promote_types(dtype, torch.float32)


def test_updates_are_as_large_as_adamws():
    """Root mean square about 0.2 lr, for square, wide and tall matrices."""
    for m, n in ((64, 64), (32, 128), (128, 32)):
        linear = nn.Linear(n, m, bias=False)
        before = linear.weight.detach().clone()
        linear.weight.grad = torch.randn(m, n)
        build_optimizer("muon", linear, lr=1e-3, weight_decay=0.0).step()
        size = (linear.weight - before).square().mean().sqrt().item()
        assert 0.13e-3 < size < 0.25e-3


def test_300_small_updates_in_bf16_lose_nothing():
    """At lr 1e-5 a bf16 weight of 0.02 cannot move by one update; its master does, as far as float32 does."""
    torch.manual_seed(1)
    exact = nn.Linear(96, 64, bias=False)
    exact.weight.data = (torch.randn(64, 96) * 0.02).bfloat16().float()
    rounded = copy.deepcopy(exact).bfloat16()
    start, goal = exact.weight.detach().clone(), torch.randn(64, 96) * 0.02
    optimizers = [build_optimizer("muon", module, lr=1e-5, weight_decay=0.1) for module in (exact, rounded)]
    for _ in range(300):
        noise = torch.randn(64, 96)
        for module, optimizer in zip((exact, rounded), optimizers):
            module.weight.grad = (start - goal + 0.05 * noise).to(module.weight.dtype)
            optimizer.step()
    given = optimizers[1].master_weights()[rounded.weight]
    assert (given - exact.weight).norm() < 1e-2 * (exact.weight - start).norm()
    assert torch.equal(join_master(rounded.weight.detach(), optimizers[1].state[rounded.weight]["low"]), given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_step_leaves_everything_as_it_is(bad):
    module = Mixer(torch.bfloat16)
    optimizer = build_optimizer("muon", module, lr=1e-2, weight_decay=0.1)

    def step(spoil):
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        if spoil:
            module.in_proj.weight.grad[3, 4] = bad
        return clip_and_step(optimizer, module.parameters(), 1.0)

    step(False)
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()["state"]))
    assert step(True)[1] == 1
    after = (module.state_dict(), optimizer.state_dict()["state"])
    for one, other in zip(before, after):
        assert str(one) == str(other)
    step(False)
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_it_takes_the_layers_matrices_and_nothing_else():
    teacher = make_teacher(TEACHERS["grouped queries"])
    student = make_student(teacher, [1])
    names = {p: name for name, p in student.named_parameters()}
    groups = muon_groups(student, 0.1)
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())
    taken = {names[p]: group["rows"] for group in groups if "rows" in group for p in group["params"]}
    kinds = {name.split(".", 3)[-1] for name in taken}
    assert kinds == {
        "mixer.in_proj.weight", "mixer.out_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
        "mlp.down_proj.weight", *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
    }  # fmt: skip
    mixer = student.backbone.layers[0].mixer
    assert taken["backbone.layers.0.mixer.in_proj.weight"] == [64, 64, 64, 64, 4] == list(mixer.in_proj_rows)
    assert {name for group in groups if "rows" not in group for name in map(names.get, group["params"])} >= {
        "backbone.embedding.weight", "lm_head.weight", "backbone.layers.0.mixer.conv1d.weight"
    }  # fmt: skip
    student.backbone.requires_grad_(False)
    assert all("rows" not in group for group in muon_groups(student, 0.1))


def test_state_of_a_bf16_matrix_is_4_bytes_an_entry():
    linear = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    optimizer = build_optimizer("muon", linear, lr=1e-3, weight_decay=0.1)
    linear.weight.grad = torch.randn_like(linear.weight)
    optimizer.step()
    assert sum(v.numel() * v.element_size() for v in optimizer.state[linear.weight].values()) == 4 * 64 * 32


def test_sharding_it_is_a_users_mistake():
    ranks = Ranks(0, 0, 2, 2)
    line = ["--optimizer", "muon", "--device", "cpu"]
    with pytest.raises(UserError, match=r"--optimizer muon .* --parallel ddp"):
        choose_parallel(parse_arguments([*line, "--parallel", "fsdp"]), ranks)
    assert choose_parallel(parse_arguments(line), ranks) == "ddp"


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit(tiny_teacher, sources, tmp_path, run_script):
    options = dict(
        optimizer="muon", layer_weight=2.0, dtype="bfloat16", hidden_tokens=512, save_interval=4, keep_checkpoints=9,
        skip_stage2=True,
    )  # fmt: skip
    whole, again = tmp_path / "whole", tmp_path / "again"
    done = run_script("train.py", *runs.flags(tiny_teacher, sources, whole, **options))
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"checkpoint-4", "checkpoint-8"} <= {path.name for path in whole.iterdir()}
    runs.copy_up_to(whole, "checkpoint-8", again)
    done = run_script("train.py", *runs.flags(tiny_teacher, sources, again, **options))
    assert done.returncode == 0 and "checkpoint-8" in done.stdout + done.stderr, done.stderr[-2000:]
    assert runs.losses(again) == runs.losses(whole)
    wanted, found = runs.weights(whole / "final"), runs.weights(again / "final")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_updates_are_the_eager_ones(dtype):
    module = Mixer(dtype).cuda()
    twin, start = copy.deepcopy(module), module.in_proj.weight.detach().float().clone()
    eager = Muon(muon_groups(module, 0.1), lr=1e-2)
    kernel = Muon(muon_groups(twin, 0.1), lr=1e-2, kernel=True)
    step_alike(module, eager, twin, kernel)
    ours, theirs = kernel.master_weights()[twin.in_proj.weight], eager.master_weights()[module.in_proj.weight]
    assert (ours - theirs).norm() < 1e-2 * (theirs - start).norm()
