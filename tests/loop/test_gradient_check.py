"""Every stage trains what it should: hooks of a stage end with it, a tensor without a gradient stops the run."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train
from helpers import runs
from helpers.launching import end_ranks, start_ranks
from helpers.stages import batches_of, make_stage
from helpers.teachers import TEACHERS, make_student, make_teacher
from loop import gradient_check
from loop.forms import Stage
from loop.gradient_check import GradientCheck, UntrainedTensors, kind_of, without_gradient
from loop.meter import HostCopy
from optim.build import build_optimizer
from optim.step import clip_and_step
from optim.update_in_backward import UpdateInBackward
from trainer import accumulate

THREE_STAGES = dict(hidden_tokens=512, max_steps=3, second_dataset_tokens=384)
ONE = torch.ones(())


@pytest.mark.slow
def test_updates_in_the_backward_pass_train_every_stage_as_updates_after_it(tiny_teacher, sources, tmp_path):
    """With a grad_clip that never binds both ways are the same mathematics, in each of three stages."""
    ends = {}
    for in_backward in (False, True):
        folder = tmp_path / str(in_backward)
        options = dict(optimizer="adamw", grad_clip=1e9, update_in_backward=in_backward, **THREE_STAGES)
        assert train.main(runs.flags(tiny_teacher, sources, folder, **options)) == 0
        ends[in_backward] = runs.losses(folder), runs.weights(folder / "final")
    (wanted, weights), (found, others) = ends[False], ends[True]
    assert len(found) == len(wanted) == 4 + 3 + 3
    for (_, loss, norm), (_, other_loss, other_norm) in zip(wanted, found):
        assert other_loss == pytest.approx(loss, rel=1e-5) and other_norm == pytest.approx(norm, rel=1e-4)
    for name, weight in weights.items():
        assert (others[name] - weight).norm() <= 1e-4 * weight.norm(), name


@pytest.mark.slow
def test_hooks_that_a_stage_leaves_behind_stop_the_next(tiny_teacher, sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(UpdateInBackward, "close", lambda self: None)
    argv = runs.flags(tiny_teacher, sources, tmp_path, update_in_backward=True, **THREE_STAGES)
    assert train.main(argv) == 4
    error = capsys.readouterr().out.splitlines()[-1]
    assert "stopped, with a checkpoint: stage1: the first update had no gradient for " in error
    assert "mixer.in_proj.weight (3 of 3)" in error
    assert "mlp" not in error  # which the hidden stage did not train: no hook was left on it
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_stop_together(parallel, tiny_teacher, sources, tmp_path):
    flags = runs.flags(tiny_teacher, sources, tmp_path, parallel=parallel, **THREE_STAGES)
    statuses, _, output = end_ranks(*start_ranks(2, flags, script="tests/helpers/train_without_a_gradient.py"))
    assert statuses == [4, 4], output[-3000:]
    lines = [line for line in output.splitlines() if "no gradient for final_layernorm.weight (1 of 1)" in line]
    assert len(lines) == 2 and all("stopped, with a checkpoint: stage1" in line for line in lines), output[-3000:]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, named",
    [
        ({"matrix_tokens": 8, "matrix_seq_length": 2}, "matrix: no gradient in D, out_proj.weight, z_bias: "),
        ({"seq_length": 1, "attn_implementation": "eager"}, "stage1: no gradient in self_attn.k_proj.weight, self_a"),
        ({"layers": [0, 1, 2, 3]}, "a student of replaced layers alone begins as its teacher"),
        ({"document_reset": True, "layer_weight": 1.0, "optimizer": "muon", "dtype": "bfloat16"}, None),
    ],
    ids=["matrix", "one position", "all replaced", "all tensors"],
)
def test_what_has_no_gradient_by_its_mathematics_is_exempt_and_named(
    flags, named, tiny_teacher, sources, tmp_path, capsys
):
    argv = runs.flags(tiny_teacher, sources, tmp_path, **{**dict(skip_stage2=True, max_steps=2), **flags})
    assert train.main(argv) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "no gradient" in line]
    if named is None:
        assert not lines
    else:
        assert len(lines) == 1 and named in lines[0]


def stage_of(module, optimizer=None, **more):
    optimizer = optimizer or build_optimizer("adamw", module, lr=1e-8, weight_decay=0.0)
    return Stage("stage1", None, None, module, optimizer, None, 1, **more)  # type: ignore[arg-type]


def two_layers():
    module = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])})
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 1e-30)  # its square is 0 in float32
    return module


def test_every_tensor_needs_a_gradient_of_its_own():
    GradientCheck(stage_of(two_layers())).push(ONE, 0 * ONE, 1e-8)
    for change in ("none", "zero", "held by no optimizer"):
        module, optimizer = two_layers(), None
        bias = module["layers"][1].bias
        if change == "held by no optimizer":
            optimizer = torch.optim.SGD([p for p in module.parameters() if p is not bias], lr=1.0)
        else:
            bias.grad = None if change == "none" else torch.zeros(3)
        with pytest.raises(UntrainedTensors, match=r"no gradient for bias \(1 of 2\); "):
            GradientCheck(stage_of(module, optimizer)).push(ONE, 0 * ONE, 1e-8)
        bias.requires_grad_(False)
        GradientCheck(stage_of(module)).push(ONE, 0 * ONE, 1e-8)


def test_only_an_update_that_counts_is_judged_and_only_the_first():
    module = two_layers()
    check = GradientCheck(stage_of(module))
    module["layers"][0].weight.grad = None
    check.push(ONE, ONE, 1e-8)  # skipped
    check.push(0 * ONE, 0 * ONE, 1e-8)  # no valid token
    check.push(ONE, 0 * ONE, 0.0)  # no rate
    with pytest.raises(UntrainedTensors):
        check.push(ONE, 0 * ONE, 1e-8)
    module["layers"][0].weight.grad = torch.ones(3, 3)
    check = GradientCheck(stage_of(module))
    check.push(ONE, 0 * ONE, 1e-8)
    module["layers"][0].weight.grad = None
    check.push(ONE, 0 * ONE, 1e-8)


def test_on_a_gpu_it_is_judged_a_step_later_or_at_the_stages_end(monkeypatch):
    """Figures are on their way until then; the gradients they are of may be gone."""

    class OnItsWay(HostCopy):
        def __init__(self, values):
            super().__init__(values)
            self.event = SimpleNamespace(synchronize=lambda: None)

    monkeypatch.setattr(gradient_check, "HostCopy", OnItsWay)
    for judge in (lambda check: check.flush(), lambda check: check.push(ONE, 0 * ONE, 1e-8)):
        module = two_layers()
        module["layers"][1].bias.grad = None
        check = GradientCheck(stage_of(module))
        check.push(ONE, 0 * ONE, 1e-8)
        module["layers"][1].bias.grad = torch.ones(3)
        with pytest.raises(UntrainedTensors, match=r"bias \(1 of 2\)"):
            judge(check)


def test_it_costs_less_than_a_thousandth_of_a_stage_of_100_steps():
    """After the first update that counts it costs nothing; that one costs less than a tenth of a step."""
    teacher = make_teacher(TEACHERS["grouped queries"])
    tokens = torch.randint(0, 512, (4, 65))
    batches = batches_of(tokens, torch.ones(4, 64, dtype=torch.bool), 4)
    stage = make_stage(teacher, make_student(teacher, [1]), batches)
    window = [batch.to(stage.device) for batch in batches]
    times = {"step": [], "check": []}
    for _ in range(5):
        stage.optimizer.zero_grad()
        began = time.process_time()
        sums = accumulate(stage, window, lambda: False)
        clip_and_step(stage.optimizer, stage.parameters(), 1.0)
        times["step"].append(time.process_time() - began)
        check = GradientCheck(stage)
        began = time.process_time()
        check.push(sums["tokens"], 0 * ONE, 1e-3)
        times["check"].append(time.process_time() - began)
    assert check.done and min(times["check"]) < 0.1 * min(times["step"])


def test_a_rank_without_a_tensors_rows_or_without_tokens_asks_the_others():
    module = two_layers()
    module["layers"][1].bias.grad = None
    others = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])  # what they have: the last bias's gradient, and tokens
    ranks = SimpleNamespace(sum=lambda own: own + others)
    GradientCheck(stage_of(module, ranks=ranks)).push(0 * ONE, 0 * ONE, 1e-8)
    module["layers"][0].bias.grad = None
    with pytest.raises(UntrainedTensors, match=r"bias \(1 of 2\)"):
        GradientCheck(stage_of(module, ranks=ranks)).push(0 * ONE, 0 * ONE, 1e-8)


def test_an_update_in_the_backward_pass_counts_what_it_has_seen():
    module = two_layers()
    optimizer = UpdateInBackward(build_optimizer("adamw", module, lr=1e-3, weight_decay=0.0), 1.0)
    stage = stage_of(module, optimizer)
    optimizer.zero_grad()
    module["layers"][1](module["layers"][0](torch.ones(3))).sum().backward()
    GradientCheck(stage).push(ONE, optimizer.end_step()[1], 1e-3)
    optimizer.zero_grad()
    module["layers"][0](torch.ones(3)).sum().backward()
    with pytest.raises(UntrainedTensors, match=r"weight \(1 of 2\), bias \(1 of 2\)"):
        GradientCheck(stage).push(ONE, optimizer.end_step()[1], 1e-3)
    optimizer.zero_grad()
    stage.close()
    module["layers"][0](torch.ones(3)).sum().backward()
    assert module["layers"][0].weight.grad is not None


def test_kinds_are_names_without_layers_and_wrappers():
    assert kind_of("module.student.backbone.layers.3.mixer.in_proj.weight") == "mixer.in_proj.weight"
    assert kind_of("student.backbone.embedding.weight") == "embedding.weight" and kind_of("2.D") == "D"


def test_exempt_are_these_and_no_others():
    mixed = dict(seq_length=64, mixers=True, hard_labels=False)
    for stage in ("hidden", "stage1", "stage2"):
        assert without_gradient(stage, **mixed) == {}
        assert without_gradient(stage, **mixed | {"mixers": False, "hard_labels": True}) == {}
    assert without_gradient("matrix", **mixed).keys() == {"D", "z_bias", "out_proj"}
    assert without_gradient("stage1", **mixed | {"seq_length": 1}).keys() == {
        "self_attn.q_", "self_attn.k_", "A_log", "mixer.A_log",
    }  # fmt: skip
    assert without_gradient("stage1", **mixed | {"mixers": False}).keys() == {""}
