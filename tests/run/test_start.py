"""How mixers start: least-squares factors and half lives against references, and the benchmark of the choices."""

import json
import sys

import pytest
import torch
from torch import nn

from conftest import ROOT
from distill.initialization import (
    HALF_LIVES,
    attention_matrix,
    calibrate_mixers,
    decay_rows,
    fitted_half_lives,
    head_factors,
    spread_half_lives,
    student_from_teacher,
    visit_layers,
)
from helpers import runs
from helpers.teachers import TEACHERS, make_student, make_teacher

sys.path.insert(0, str(ROOT))


@pytest.mark.parametrize("name", ["grouped queries", "wide heads, biases, tied"])
@pytest.mark.parametrize("expand", [1, 2])
def test_factors_are_the_least_squares_solution(name, expand):
    """Against the heads' parts of the output written out and torch's own solver, in float64."""
    teacher = make_teacher(TEACHERS[name]).double()
    student = student_from_teacher(teacher, dtype=torch.float64, device="cpu", expand=expand)
    tokens = torch.randint(0, 512, (3, 40))
    for visit in visit_layers(teacher.model, tokens):
        mixer = student.backbone.layers[visit.index].mixer
        with torch.no_grad():  # copies that are alike would have no factors of their own
            mean = visit.u.mean((0, 1))
            mixer.in_proj.weight[-mixer.n_v_heads :] = decay_rows(
                mean, spread_half_lives(mixer.n_v_heads, (1.0, 32.0))
            )
        seen = []
        hook = mixer.out_proj.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            mixer(visit.u)
        hook.remove()
        y = seen[0].unflatten(-1, (mixer.n_v_heads, -1))
        weight = mixer.out_proj.weight.unflatten(-1, (mixer.n_v_heads, -1))
        parts = torch.einsum("bthp,dhp->btdh", y, weight).flatten(0, 2).detach()
        wanted = visit.attended - (0 if mixer.out_proj.bias is None else mixer.out_proj.bias)
        wanted = wanted.flatten()[:, None].detach()
        exact = torch.linalg.lstsq(parts, wanted).solution[:, 0]
        with torch.no_grad():
            given = head_factors(mixer, visit.u, visit.attended, per_head=True).double()
            whole = head_factors(mixer, visit.u, visit.attended, per_head=False).double()
        assert (parts @ (given - exact)).norm() < 1e-2 * (parts @ exact).norm()
        assert whole[0].item() == pytest.approx(
            max(torch.linalg.lstsq(parts.sum(1, keepdim=True), wanted).solution.item(), 1e-6), rel=1e-3
        )


def test_half_lives_are_what_they_say():
    """For an input that is the mean itself, the decay halves the state in just so many tokens."""
    mean = torch.randn(64, dtype=torch.float64)
    rows = decay_rows(mean, spread_half_lives(5, (2.0, 512.0)).double())
    decays = torch.exp(-nn.functional.softplus(rows @ mean))
    lives = -torch.log(torch.tensor(2.0, dtype=torch.float64)) / decays.log()
    assert torch.allclose(lives, torch.tensor([2.0, 8.0, 32.0, 128.0, 512.0], dtype=torch.float64), rtol=1e-4)
    assert decay_rows(mean, torch.ones(3).double()).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["grouped queries", "wide heads, biases, tied"])
def test_a_half_life_is_fitted_to_each_head(name):
    """Against the recurrence of each life, token by token, and least squares for each head, in float64."""
    torch.manual_seed(4)
    teacher = make_teacher(TEACHERS[name]).double()
    student = student_from_teacher(teacher, dtype=torch.float64, device="cpu")
    found = set()
    for visit in visit_layers(teacher.model, torch.randint(0, 512, (3, 33))):
        mixer = student.backbone.layers[visit.index].mixer
        with torch.no_grad():
            x, B, C, *_ = mixer.project(visit.u)
            wanted = attention_matrix(visit.attention, visit.u, visit.options) @ x.transpose(1, 2)
            for head, life in enumerate(fitted_half_lives(mixer, visit).tolist()):
                errors = []
                for candidate in HALF_LIVES:
                    state, rows = 0, []
                    for i in range(33):
                        outer = B[:, i, head, :, None] * x[:, i, head, None, :]
                        state = 0.5 ** (1 / candidate) * state + outer
                        rows.append((C[:, i, head, :, None] * state).sum(1))
                    y = torch.stack(rows, 1).flatten()[:, None]
                    o = wanted[:, head].flatten()[:, None]
                    errors.append((y @ torch.linalg.lstsq(y, o).solution - o).norm().item())
                assert errors[HALF_LIVES.index(life)] == pytest.approx(min(errors), rel=1e-9)
                found.add(life)
    assert len(found) > 1  # heads differ


@pytest.mark.parametrize("name", TEACHERS)
def test_more_heads_start_closer_to_the_attention(name):
    """Copies of each head with memories of their own: half lives by hand, and no larger an error in any layer."""
    teacher, tokens = make_teacher(TEACHERS[name]), torch.randint(0, 512, (4, 64))
    heads = teacher.config.num_attention_heads
    students = {expand: make_student(teacher, [1], expand) for expand in (1, 4)}
    one, four = (calibrate_mixers(student, teacher, tokens) for student in students.values())
    assert four.keys() == one.keys() == {0, 2, 3}
    assert all(four[index] <= one[index] + 1e-4 for index in one) and sum(four.values()) < sum(one.values())
    for visit in visit_layers(teacher.model, tokens):
        if visit.index != 1:
            few, many = (student.backbone.layers[visit.index].mixer for student in students.values())
            mean = visit.u.mean((0, 1))
            lives = [-1 / torch.log2(mixer.decays(mean)) for mixer in (few, many)]
            wanted = [
                (life / 8**copy if life > 4.5 else life * 8**copy) for copy in range(4) for life in lives[0].tolist()
            ]
            assert lives[1].tolist() == pytest.approx(wanted, rel=1e-2) and len(wanted) == 4 * heads


@pytest.mark.parametrize("split", [(1 / 3, 1 / 3, 1 / 3), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_split_changes_weights_but_not_the_output(split, per_head):
    teacher = make_teacher(TEACHERS["grouped queries"])
    tokens = torch.randint(0, 512, (4, 64))
    errors = []
    for choice in ((1.0, 0.0, 0.0), split):
        student = make_student(teacher, [1])
        errors.append(calibrate_mixers(student, teacher, tokens, split=choice, per_head=per_head))
    assert errors[0].keys() == {0, 2, 3}
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert all(error <= 1.001 for error in errors[1].values())  # no worse than a mixer that is silent


def test_a_factor_a_head_is_no_worse_than_one_a_layer():
    teacher, tokens = make_teacher(TEACHERS["grouped queries"]), torch.randint(0, 512, (4, 64))
    layer, head = (
        calibrate_mixers(make_student(teacher, []), teacher, tokens, per_head=per_head) for per_head in (False, True)
    )
    assert all(head[index] <= layer[index] + 1e-4 for index in layer) and head != layer


def test_the_benchmark_compares_starts_on_the_same_data(tmp_path, tiny_teacher, documents, capsys):
    from benchmarks import start

    sources = runs.write_sources(tmp_path / "text", documents)
    figures = tmp_path / "rows.jsonl"
    argv = [
        "--teacher_model",
        tiny_teacher,
        "--dataset_name",
        sources["train"],
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    argv += ["--steps", 3, "--batch_size", 2, "--seq_length", 64, "--lr", "1e-3", "--json", figures]
    rows = start.main([*map(str, argv), "--starts", "0", "1", "3", "14", "0"])
    assert [row["steps"] for row in rows] == [3] * 5
    first, again = rows[0], rows[-1]
    assert {k: v for k, v in first.items() if k != "seconds"} == {k: v for k, v in again.items() if k != "seconds"}
    assert len({row["start"] for row in rows}) == 4 and len({row["aligned"] for row in rows}) == 4
    assert [json.loads(line) for line in figures.read_text().splitlines()] == rows
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 7 and all(line.count("|") == 8 for line in table)
