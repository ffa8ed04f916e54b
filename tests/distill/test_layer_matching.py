"""--layer_weight: every layer's distance to the teacher's hidden states as a term of the loss."""

import weakref

import pytest
import torch

from arguments import parse_arguments
from benchmarks.presets import preset
from distill.distillation import StudentLoss
from distill.losses import layer_distance
from distill.teacher import OwnTeacher, teacher_hidden
from hardware.memory import estimate_memory
from hardware.ranks import Ranks
from helpers import runs
from helpers.stages import batches_of, make_stage
from helpers.teachers import TEACHERS, make_student, make_teacher
from optim.muon import STACKED
from run.acceleration import step_settings
from run.flag_checks import validate
from run.inputs import choose_parallel
from trainer import accumulate
from utils import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 7, 16)])
def test_distance_is_relative_to_each_tokens_size(shape):
    ours, theirs = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    theirs[0, 0] *= 1000
    valid = torch.rand(shape[:2]) < 0.7
    valid[0, 0] = True
    wanted = sum(
        float(((ours[b, t] - theirs[b, t]) ** 2).sum() / (theirs[b, t] ** 2).sum())
        for b, t in valid.nonzero().tolist()
    )
    assert layer_distance(ours, theirs, valid).item() == pytest.approx(wanted, rel=1e-12)
    assert layer_distance(theirs, theirs, valid) == 0
    nothing = layer_distance(ours, torch.zeros_like(theirs), torch.zeros_like(valid))
    assert nothing == 0 and not nothing.isnan()


def test_it_has_no_gradient_where_nothing_is_valid_and_the_right_one_elsewhere():
    ours = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    theirs, valid = torch.randn(2, 5, 4, dtype=torch.float64), torch.rand(2, 5) < 0.5
    assert torch.autograd.gradcheck(lambda x: layer_distance(x, theirs, valid), ours)
    layer_distance(ours, theirs, valid).backward()
    assert (ours.grad[~valid] == 0).all() and (ours.grad[valid] != 0).all()


def test_every_layers_hidden_states_are_the_models_own():
    teacher = make_teacher(TEACHERS["grouped queries"])
    student = make_student(teacher, [1])
    tokens = torch.randint(0, 512, (2, 11))
    states = teacher_hidden(teacher, tokens, every_layer=True)
    own = teacher(tokens, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == len(own) - 1 and all(torch.equal(a, b) for a, b in zip(states, own[1:]))
    assert torch.equal(states[-1], teacher_hidden(teacher, tokens))
    found = student(tokens, output_hidden_states=True).hidden_states
    assert len(found) == len(own) and torch.equal(student.lm_head(found[-1]), student(tokens).logits)
    assert student(tokens).hidden_states is None


def gradients(teacher, student, tokens, valid, size, weight):
    """Gradients and sums of one window of `size` sequences a micro step."""
    student.zero_grad()
    stage = make_stage(teacher, student, [], layer_weight=weight)
    window = [batch.to(CPU) for batch in batches_of(tokens, valid, size)]
    sums = accumulate(stage, window, lambda: False)
    return [p.grad.clone() for p in student.parameters()], sums


def test_gradients_are_those_of_the_definition_whatever_the_micro_batches():
    teacher = make_teacher(TEACHERS["grouped queries"]).double()
    student = make_student(teacher, [1]).double()
    tokens, valid = torch.randint(0, 512, (4, 14)), torch.rand(4, 13) < 0.6
    without, _ = gradients(teacher, student, tokens, valid, 4, 0.0)
    student.zero_grad()
    theirs = teacher(tokens[:, :-1], output_hidden_states=True, use_cache=False).hidden_states[1:-1]
    ours = student(tokens[:, :-1], output_hidden_states=True).hidden_states[1:-1]
    each = [((a - b).square().sum(-1) / b.square().sum(-1))[valid].sum() for a, b in zip(ours, theirs, strict=True)]
    distance = sum(each) / len(each)
    (3.0 * distance / valid.sum()).backward()
    wanted = [g + (0 if p.grad is None else p.grad) for g, p in zip(without, student.parameters())]
    for size in (4, 2, 1):
        found, sums = gradients(teacher, student, tokens, valid, size, 3.0)
        for a, b in zip(found, wanted):  # the attention layer's norms and rotary positions are float32
            assert (a - b).norm() <= 1e-6 * b.norm() + 1e-9
        assert sums["layer_distance"].item() == pytest.approx(distance.item())


def test_a_teacher_that_gives_its_last_layer_alone_is_an_error():
    teacher = make_teacher(TEACHERS["grouped queries"])
    step = StudentLoss(make_student(teacher, [1]), teacher.lm_head.weight, layer_weight=1.0)
    tokens, valid = torch.randint(0, 512, (4, 6)), torch.ones(4, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="every layer"):
        step(tokens, tokens, valid, None, teacher_hidden(teacher, tokens), torch.ones(()))


def test_a_window_keeps_no_states_and_an_evaluation_makes_the_last_alone(monkeypatch):
    teacher = make_teacher(TEACHERS["grouped queries"])
    made, start = [], OwnTeacher.start

    def seen(self, batch):
        coming = start(self, batch)
        made.append(weakref.ref(coming.states))
        return coming

    monkeypatch.setattr(OwnTeacher, "start", seen)
    stage = make_stage(teacher, make_student(teacher, [1]), [], layer_weight=1.0)
    tokens, valid = torch.randint(0, 512, (4, 6)), torch.ones(4, 5, dtype=torch.bool)
    window = [batch.to(CPU) for batch in batches_of(tokens, valid, 2)]
    accumulate(stage, window, lambda: False)
    assert len(made) == 2 and not any(ref() is not None for ref in made)
    with torch.no_grad():
        assert OwnTeacher(teacher, CPU, every_layer=True).of(window[0]).shape == (2, 5, 64)


def test_a_batch_that_is_prepared_outlasts_an_evaluation():
    teacher = make_teacher(TEACHERS["grouped queries"])
    own, forwards = OwnTeacher(teacher, CPU, ahead=True), []
    own.backbone.register_forward_pre_hook(lambda *_: forwards.append(1))
    tokens, valid = torch.randint(0, 512, (4, 6)), torch.ones(4, 5, dtype=torch.bool)
    following, held_out = (b.to(CPU) for b in batches_of(tokens, valid, 2))
    own.prepare(following)
    assert torch.equal(own.of(held_out), teacher_hidden(teacher, tokens[2:, :-1]))
    assert torch.equal(own.of(following), teacher_hidden(teacher, tokens[:2, :-1]))
    assert len(forwards) == 2 and own.coming is None


def test_layers_outputs_are_let_go_unless_they_are_asked_for():
    student = make_student(make_teacher(TEACHERS["grouped queries"]), [1]).eval()
    alive, seen = [], []

    def look(module, inputs, output):
        seen.append(weakref.ref(output))
        alive.append(sum(ref() is not None for ref in seen))

    for layer in student.backbone.layers:
        layer.register_forward_hook(look)
    with torch.no_grad():
        student(torch.randint(0, 512, (1, 6)))
    assert max(alive) <= 2


def test_memory_is_counted():
    sizes = preset("smollm2")
    line = ["--layers", "2", "--device", "cpu", "--seq_length", "512", "--gradient_checkpointing", "none"]
    held = []
    for flags in ([], ["--layer_weight", "1"], ["--optimizer", "muon"]):
        args = parse_arguments([*line, *flags])
        held.append(estimate_memory(sizes.teacher, sizes.student, step_settings(args)))
    state = 512 * 576 * (59 * 2 + 29 * 4)  # states of 30 layers and gradients of 29 in bf16, differences in float32
    assert held[1].allocated - held[0].allocated == pytest.approx(state)
    assert held[2].parts["update"] <= 38 * STACKED


def test_flags_that_leave_no_teacher_are_a_users_mistake():
    alone = ["--layer_weight", "1", "--device", "cpu"]
    with pytest.raises(UserError, match=r"--layer_weight .* --kl_weight above 0"):
        validate(parse_arguments([*alone, "--kl_weight", "0", "--ce_weight", "1"]))
    with pytest.raises(UserError, match=r"--layer_weight .* --teacher_device"):
        choose_parallel(parse_arguments([*alone, "--teacher_device", "cpu"]), Ranks(0, 0, 2, 2))


@pytest.mark.slow
def test_a_run_tells_the_distance_and_evaluates_as_ever(tiny_teacher, sources, tmp_path, run_script):
    shared = dict(skip_stage2=True, eval_dataset=sources["heldout"], eval_interval=4, eval_tokens=256)
    done = run_script("train.py", *runs.flags(tiny_teacher, sources, tmp_path, layer_weight=4.0, **shared))
    assert done.returncode == 0, done.stderr[-2000:]
    distances = [row["train/layer_distance"] for row in runs.metrics(tmp_path) if "train/loss" in row]
    assert len(distances) == 8 and all(0 < distance < 1 for distance in distances)
    assert [row["step"] for row in runs.metrics(tmp_path) if row.get("eval/kl", 0) > 0] == [0, 4, 8]
