"""The loop: one normalisation for a whole step, no wait in a micro step, and what it tells."""

import torch
from torch import nn

from distill.distillation import kd_micro_step
from distill.teacher import OwnTeacher
from helpers.stages import batches_of, make_stage
from helpers.teachers import TEACHERS, make_student, make_teacher
from loop.forms import Progress
from trainer import Services, accumulate, run_stage, windows


def test_one_times_eight_has_the_gradients_of_two_times_four():
    teacher = make_teacher(TEACHERS["grouped queries"]).double()
    student = make_student(teacher, [1]).double()
    tokens, valid = torch.randint(0, 512, (8, 13)), torch.rand(8, 12) < 0.6
    gradients = []
    for size in (8, 4, 1):
        student.zero_grad()
        stage = make_stage(teacher, student, [], ce_weight=0.3, temperature=2.0)
        window = [b.to(torch.device("cpu")) for b in batches_of(tokens, valid, size)]
        sums = accumulate(stage, window, lambda: False)
        gradients.append([p.grad.clone() for p in student.parameters()])
        assert sums["tokens"] == valid.sum()
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(gradients[0], other))


def test_a_run_tells_means_over_whole_updates_and_saves_at_the_end():
    teacher = make_teacher(TEACHERS["grouped queries"])
    student = make_student(teacher, [1]).train()
    tokens = torch.randint(0, 512, (12, 17))
    stage = make_stage(teacher, student, batches_of(tokens, torch.ones(12, 16, dtype=torch.bool), 2), 3, steps=2)
    told, saved = [], []
    progress = Progress()
    progress.begin("stage1", 2)
    services = Services(lambda p, figures: told.append(figures), lambda p, s: saved.append(p.as_dict()))
    assert run_stage(stage, progress, services)
    assert [row["train/optimizer_step"] for row in told] == [1, 2]
    assert told[1]["train/tokens"] == 12 * 16 and progress.micro_step == 6
    assert saved[-1]["stage_done"] and saved[-1]["loader"] == {"position": 6}
    assert 0 <= told[0]["train/top1_agreement"] <= 1 and told[0]["train/kl"] > 0


def test_the_teacher_is_no_part_of_the_graph():
    teacher = make_teacher(TEACHERS["grouped queries"])
    student = make_student(teacher, [1])
    stage = make_stage(teacher, student, batches_of(torch.randint(0, 512, (2, 9)), torch.ones(2, 8).bool(), 2))
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p not in set(stage.parameters()) for p in teacher.parameters())
    progress = Progress()
    progress.begin("stage1", 1)
    run_stage(stage, progress, Services(lambda *a: None, lambda *a: None))
    assert all(p.grad is None for p in teacher.parameters())


def test_a_spike_is_seen_although_a_log_line_is_a_mean_over_many_steps():
    teacher = make_teacher(TEACHERS["grouped queries"])
    told = {}
    for interval in (1, 4):
        torch.manual_seed(3)
        student = make_student(teacher, [1])
        batches = batches_of(torch.randint(0, 512, (8, 9)), torch.ones(8, 8, dtype=torch.bool), 2)
        stage = make_stage(teacher, student, batches, steps=4)
        rows, sizes, plain = [], iter((1.0, 50.0, 1.0, 1.0)), stage.micro_step

        def micro_step(batch, scale, plain=plain, sizes=sizes):
            sums = plain(batch, scale)
            return sums | {"loss": sums["loss"] * next(sizes)}

        stage.micro_step = micro_step
        progress = Progress()
        progress.begin("stage1", 4)
        services = Services(lambda p, f, rows=rows: rows.append(f), lambda *a: None, log_interval=interval)
        run_stage(stage, progress, services)
        told[interval] = rows
    (whole,), each = told[4], told[1]
    assert whole["train/loss_max"] == max(row["train/loss"] for row in each) > 3 * whole["train/loss"]
    assert whole["train/grad_norm_max"] == max(row["train/grad_norm"] for row in each)
    assert all(row["train/loss_max"] == row["train/loss"] for row in each)


def test_windows_keep_a_short_last_one():
    assert [len(w) for w in windows(iter(range(7)), 3)] == [3, 3, 1]


def test_the_teacher_a_batch_ahead_changes_nothing():
    """Its forward pass for batch n + 1 stands before the student's for n; weights and the loader's position agree."""
    results = []
    tokens = torch.randint(0, 512, (6, 9))
    torch.manual_seed(0)
    teacher = make_teacher(TEACHERS["grouped queries"])
    base = make_student(teacher, [1])
    start = {name: p.clone() for name, p in base.state_dict().items()}
    for ahead in (False, True):
        base.load_state_dict(start)
        batches = batches_of(tokens, torch.ones(6, 8).bool(), 1)
        stage = make_stage(teacher, base, batches, 2, steps=2)
        own = OwnTeacher(teacher, torch.device("cpu"), ahead=ahead)
        stage.micro_step, stage.ahead = kd_micro_step(stage.trainable, own), own.ahead
        order = []
        hooks = [
            own.backbone.register_forward_hook(lambda *_, order=order: order.append("teacher")),
            base.backbone.register_forward_hook(lambda *_, order=order: order.append("student")),
        ]
        progress = Progress()
        progress.begin("stage1", 2)
        run_stage(stage, progress, Services(lambda *a: None, lambda *a: None))
        for hook in hooks:
            hook.remove()
        pairs = ["teacher", "student"] * 4
        assert order == (["teacher", *pairs] if ahead else pairs)
        assert progress.loader == {"position": 4}
        results.append(nn.utils.parameters_to_vector(base.parameters()).detach().clone())
    assert torch.equal(*results)


def test_a_tied_bf16_heads_gradient_accumulates_in_float32():
    teacher = make_teacher(TEACHERS["wide heads, biases, tied"]).bfloat16()
    student = make_student(teacher, [1]).bfloat16()
    assert student.lm_head.weight is student.backbone.embedding.weight
    stage = make_stage(teacher, student, [])
    batches = batches_of(torch.randint(0, 512, (4, 9)), torch.ones(4, 8, dtype=torch.bool), 1)
    accumulate(stage, [b.to(torch.device("cpu")) for b in batches], lambda: False)
    assert student.lm_head.weight.grad.dtype == torch.float32
