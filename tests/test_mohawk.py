"""The alignment stages against independent float64 references, and what they do to a real student."""

import copy

import pytest
import torch

import runs
import train
from models.modeling_llamba import AttentionInputs
from mohawk import AlignmentStep, attention_matrix, trained_mixers
from test_model_utils import TEACHERS, make_student, make_teacher
from trainer import DeviceBatch

PROBE = torch.arange(60).view(3, 20)


def pair(name="grouped queries", layers=(1,)):
    teacher = make_teacher(TEACHERS[name]).double()
    student = make_student(teacher, list(layers)).double()
    with torch.no_grad():
        for mixer in trained_mixers(student):
            for p in mixer.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return teacher, student


def batch_of(tokens, position_ids=None, valid=None):
    valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    return DeviceBatch(tokens, tokens, valid, position_ids, [], {})


def layer_inputs(teacher, tokens, position_ids=None):
    """(u, attention output) of each layer, from the teacher's own forward pass by hooks."""
    seen = []
    for layer in teacher.model.layers:
        layer.self_attn.register_forward_hook(
            lambda m, args, kwargs, out: seen.append((kwargs["hidden_states"], out[0])), with_kwargs=True
        )
    teacher.model(tokens, position_ids=position_ids, use_cache=False)
    for layer in teacher.model.layers:
        layer.self_attn._forward_hooks.clear()
    return seen


def slow_matrix(mixer, u):
    """M[i, j] = C_i . B_j prod a_k, entry by entry; B and C from a plain convolution."""
    projected = mixer.in_proj(u)[..., : mixer.d_conv].transpose(1, 2)
    padded = torch.nn.functional.pad(projected, (3, 0))
    mixed = torch.nn.functional.conv1d(padded, mixer.conv1d.weight, mixer.conv1d.bias, groups=mixer.d_conv)
    _, B, C = mixed.transpose(1, 2).split([mixer.d_inner, *[mixer.n_qk_heads * mixer.d_state] * 2], -1)
    B, C = (part.unflatten(-1, (mixer.n_qk_heads, mixer.d_state)) for part in (B, C))
    a = mixer.decays(u)
    b, t, H = a.shape
    rows = []
    for i in range(t):
        row = [torch.zeros(b, H, dtype=u.dtype)] * t
        decay = torch.ones(b, H, dtype=u.dtype)
        for j in range(i, -1, -1):
            row[j] = (C[:, i] * B[:, j]).sum(-1) * decay
            decay = decay * a[:, j]
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


@pytest.mark.parametrize("name", ["grouped queries", "mistral, sliding", "qwen3", "wide heads, biases, tied"])
def test_attention_matrix_is_the_teachers(name):
    teacher = make_teacher(TEACHERS[name], "eager").double()
    tokens = torch.randint(0, 512, (2, 20))
    wanted = teacher.model(tokens, output_attentions=True, use_cache=False).attentions
    hidden = teacher.model.embed_tokens(tokens)
    shared = AttentionInputs(teacher.config, teacher.model.rotary_emb, hidden, layers=range(4))
    for index, (u, _) in enumerate(layer_inputs(teacher, tokens)):
        given = attention_matrix(teacher.model.layers[index].self_attn, u, shared.for_layer(index))
        assert torch.allclose(given, wanted[index].double(), atol=1e-6)


@pytest.mark.parametrize("kind", ["matrix", "hidden"])
@pytest.mark.parametrize("t", [1, 13])
def test_losses_and_gradients_equal_dense_references(kind, t):
    teacher, student = pair()
    tokens, valid = torch.randint(0, 512, (2, t)), torch.rand(2, t) < 0.8
    reference = copy.deepcopy(student)
    sums = AlignmentStep(kind, teacher, student, PROBE)(batch_of(tokens, valid=valid), torch.tensor(0.7))
    total, probed = 0.0, layer_inputs(teacher, PROBE)
    for index, (u, attended) in enumerate(layer_inputs(teacher, tokens)):
        if index == 1:
            continue
        mixer = reference.backbone.layers[index].mixer
        if kind == "hidden":
            size = probed[index][1].square().sum(-1).mean()
            rows = (mixer(u) - attended).square().sum(-1) / size
        else:
            hidden = teacher.model.embed_tokens(tokens)
            shared = AttentionInputs(teacher.config, teacher.model.rotary_emb, hidden, layers=range(4))
            wanted = attention_matrix(teacher.model.layers[index].self_attn, u, shared.for_layer(index))
            hidden = teacher.model.embed_tokens(PROBE)
            shared = AttentionInputs(teacher.config, teacher.model.rotary_emb, hidden, layers=range(4))
            probe = attention_matrix(teacher.model.layers[index].self_attn, probed[index][0], shared.for_layer(index))
            size = probe.square().sum(-1).mean((0, 2))
            rows = ((slow_matrix(mixer, u) - wanted).square().sum(-1) / size[:, None]).mean(1)
        total = total + (rows * valid).sum() / 3
    (0.7 * total).backward()
    assert sums["loss"].item() == pytest.approx(total.item(), rel=1e-7)
    for p, q in zip(trained_mixers(student).parameters(), trained_mixers(reference).parameters()):
        if q.grad is None or not q.grad.any():
            assert p.grad is None or p.grad.abs().max() < 1e-12
        else:
            assert (p.grad - q.grad).norm() <= 1e-7 * q.grad.norm()
    assert all(p.grad is None for p in student.backbone.layers[1].parameters())


@pytest.mark.parametrize("kind", ["matrix", "hidden"])
def test_batch_and_accumulation_give_the_same_gradients(kind):
    teacher, student = pair()
    tokens = torch.randint(0, 512, (4, 12))
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None].expand(4, -1)
    gradients = []
    for parts in (1, 2):
        student.zero_grad()
        for rows in tokens.chunk(parts):
            AlignmentStep(kind, teacher, student, PROBE)(batch_of(rows, positions[: len(rows)]), torch.tensor(1 / 48))
        gradients.append([p.grad for p in trained_mixers(student).parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*gradients))


def test_one_layers_activations_at_a_time():
    """What autograd keeps is freed before the next layer's forward pass begins."""
    teacher, student = pair(layers=())
    alive, peak = [0], [0]

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            alive[0] += tensor.numel()
            peak[0] = max(peak[0], alive[0])

        def __del__(self):
            alive[0] -= self.tensor.numel()

    tokens = torch.randint(0, 512, (1, 32))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        AlignmentStep("hidden", teacher, student, PROBE)(batch_of(tokens), torch.tensor(1.0))
        whole = peak[0]
        peak[0] = 0
        mixer = student.backbone.layers[0].mixer
        mixer(torch.randn(1, 32, 64, dtype=torch.float64)).sum().backward()
    assert whole < 1.5 * peak[0]


@pytest.mark.slow
def test_the_stages_run_align_and_hand_over(tmp_path, tiny_teacher, documents):
    sources = runs.write_sources(tmp_path / "text", documents)
    argv = runs.flags(
        tiny_teacher, sources, tmp_path / "run", matrix_tokens=2048, hidden_tokens=6144, hidden_lr=1e-3,
        matrix_seq_length=32,
        max_steps=2, skip_stage2=True,
    )  # fmt: skip
    assert train.main(argv) == 0
    rows = [row for row in runs.metrics(tmp_path / "run") if "train/loss" in row]
    losses = {
        stage: [r["train/loss"] for r in rows if r["stage"] == stage] for stage in ("matrix", "hidden", "stage1")
    }
    assert [len(values) for values in losses.values()] == [32, 48, 2]
    for stage in ("matrix", "hidden"):
        assert sum(losses[stage][-8:]) < sum(losses[stage][:8])
    assert "layers/mean_decay_0" in rows[0] and "layers/squared_error_1" not in rows[0]
