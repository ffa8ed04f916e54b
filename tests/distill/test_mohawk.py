"""The alignment stages against independent float64 references, and what they do to a real student."""

import copy
import functools
import json

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import train
from conftest import tiny_llama_config
from data import Batch
from distill.initialization import attention_half, attention_matrix, mlp_half, visit_layers
from distill.mohawk import AlignmentMicroStep, hidden_loss, matrix_loss, trained_mixers
from helpers import runs
from helpers.teachers import TEACHERS, make_student, make_teacher
from models.modeling_llamba import AttentionInputs

PROBE = torch.arange(60).view(3, 20)


def pair(name="grouped queries", layers=(1,), expand=1):
    teacher = make_teacher(TEACHERS[name]).double()
    student = make_student(teacher, list(layers), expand).double()
    with torch.no_grad():
        for mixer in trained_mixers(student):
            for p in mixer.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return teacher, student


def batch_of(tokens, position_ids=None, valid=None):
    valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    return Batch(torch.cat([tokens, tokens[:, :1]], 1), valid, position_ids, [])


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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", TEACHERS)
def test_attention_matrix_is_the_teachers(name, packed):
    teacher = make_teacher(TEACHERS[name], "eager").double()
    tokens = torch.randint(0, 512, (2, 20))
    positions = torch.cat((torch.arange(7), torch.arange(13)))[None].expand(2, -1) if packed else None
    wanted = teacher.model(tokens, position_ids=positions, output_attentions=True, use_cache=False).attentions
    for visit in visit_layers(teacher.model, tokens, positions):
        # Flash attention is given no mask: the matrix has its own, from the positions.
        options = {**visit.options, "attention_mask": None}
        given = attention_matrix(visit.attention, visit.u, options)
        assert torch.allclose(given, wanted[visit.index].double(), atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", TEACHERS)
def test_the_walk_sees_what_the_teachers_own_forward_sees(name, packed):
    teacher = make_teacher(TEACHERS[name])
    tokens = torch.randint(0, 512, (2, 20))
    positions = torch.cat((torch.arange(7), torch.arange(13)))[None].expand(2, -1) if packed else None
    wanted = layer_inputs(teacher, tokens, positions)
    visits = list(visit_layers(teacher.model, tokens, positions))
    assert [visit.index for visit in visits] == [0, 1, 2, 3]
    for visit, (u, attended) in zip(visits, wanted):
        assert torch.equal(visit.u, u) and torch.equal(visit.attended, attended)


@pytest.mark.parametrize("kind", ["matrix", "hidden"])
@pytest.mark.parametrize(("t", "expand"), [(1, 1), (13, 1), (13, 3)])
def test_losses_and_gradients_equal_dense_references(kind, t, expand):
    teacher, student = pair(expand=expand)
    tokens, valid = torch.randint(0, 512, (2, t)), torch.rand(2, t) < 0.8
    reference = copy.deepcopy(student)
    sums = AlignmentMicroStep(kind, teacher, student, PROBE)(batch_of(tokens, valid=valid), torch.tensor(0.7))
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
            attention = teacher.model.layers[index].self_attn
            wanted = attention_matrix(attention, u, shared.for_layer(index))
            hidden = teacher.model.embed_tokens(PROBE)
            shared = AttentionInputs(teacher.config, teacher.model.rotary_emb, hidden, layers=range(4))
            probe = attention_matrix(attention, probed[index][0], shared.for_layer(index))
            size = probe.square().sum(-1).mean((0, 2))
            copies = slow_matrix(mixer, u).chunk(expand, 1)  # each with a matrix for every head of the attention
            rows = ((sum(copies) - wanted).square().sum(-1) / size[:, None]).mean(1)
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
def test_a_mixer_learns_the_same_alone(kind):
    """The gradient of a layer's mixer does not know of the others, but for the mean over layers."""
    teacher, student = pair(layers=())
    tokens = torch.randint(0, 512, (2, 12))
    AlignmentMicroStep(kind, teacher, student, PROBE)(batch_of(tokens), torch.tensor(1.0))
    together = [p.grad for p in student.backbone.layers[2].mixer.parameters() if p.grad is not None]
    student.zero_grad()
    alone = AlignmentMicroStep(kind, teacher, student, PROBE)
    alone.mixers = {2: alone.mixers[2]}
    alone(batch_of(tokens), torch.tensor(0.25))
    apart = [p.grad for p in student.backbone.layers[2].mixer.parameters() if p.grad is not None]
    assert len(together) == len(apart) > 2
    assert all(torch.equal(a, b) for a, b in zip(together, apart))
    assert all(p.grad is None for p in student.backbone.layers[3].parameters())


@pytest.mark.parametrize("kind", ["matrix", "hidden"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_close(kind, dtype):
    """float16 is a float16 teacher with float32 student weights under autocast."""
    teacher, student = pair()
    tokens, positions = torch.randint(0, 512, (2, 24)), torch.arange(12).repeat(2).expand(2, -1)
    scale = torch.tensor(1 / 48)
    exact = AlignmentMicroStep(kind, teacher, student, PROBE)(batch_of(tokens, positions), scale)
    wanted = torch.cat([p.grad.flatten() for p in trained_mixers(student).parameters() if p.grad is not None])
    student.zero_grad()
    half = dtype == torch.float16
    teacher, student = teacher.to(dtype), student.to(torch.float32 if half else dtype)
    step = AlignmentMicroStep(kind, teacher, student, PROBE, autocast=dtype if half else None)
    sums = step(batch_of(tokens, positions), scale)
    given = torch.cat([p.grad.flatten() for p in trained_mixers(student).parameters() if p.grad is not None])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert sums["loss"].dtype == torch.float32
    assert sums["loss"].item() == pytest.approx(exact["loss"].item(), rel=tolerance)
    assert (given.double() - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("kind", ["matrix", "hidden"])
def test_compiled_is_eager_and_its_trial_leaves_no_gradient(kind, monkeypatch):
    """In one graph each; the trial must not run the hooks that update weights in the backward pass."""
    whole = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    teacher, student = pair(layers=())
    tokens, scale = torch.randint(0, 512, (2, 12)), torch.tensor(1.0)
    results, hooks = [], []
    first = trained_mixers(student)[0].in_proj.weight
    first.register_post_accumulate_grad_hook(hooks.append)
    for compile in (False, True):
        student.zero_grad()
        step = AlignmentMicroStep(kind, teacher, student, PROBE, compile=compile)
        sums = step(batch_of(tokens), scale)
        results.append((sums["loss"], [p.grad for p in trained_mixers(student).parameters() if p.grad is not None]))
        assert (step.loss is not {"matrix": matrix_loss, "hidden": hidden_loss}[kind]) == compile
        assert (step.halves != (attention_half, mlp_half)) == compile
    (loss, gradients), (compiled_loss, compiled_gradients) = results
    assert len(hooks) == 2
    assert torch.allclose(loss, compiled_loss, rtol=1e-9)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(gradients, compiled_gradients))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["matrix", "hidden"])
def test_a_teacher_on_another_device(kind):
    teacher, student = pair()
    tokens, scale = torch.randint(0, 512, (2, 12)), torch.tensor(1.0)
    wanted = AlignmentMicroStep(kind, teacher, student, PROBE)(batch_of(tokens), scale)["loss"]
    step = AlignmentMicroStep(kind, teacher, student.to("cuda"), PROBE)
    batch = batch_of(tokens).to(torch.device("cuda"))
    assert step(batch, scale.cuda())["loss"].item() == pytest.approx(wanted.item(), rel=1e-9)


@pytest.mark.parametrize("kind", ["matrix", "hidden"])
def test_batch_and_accumulation_give_the_same_gradients(kind):
    teacher, student = pair()
    tokens = torch.randint(0, 512, (4, 12))
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None].expand(4, -1)
    gradients = []
    for parts in (1, 2):
        student.zero_grad()
        for rows in tokens.chunk(parts):
            AlignmentMicroStep(kind, teacher, student, PROBE)(
                batch_of(rows, positions[: len(rows)]), torch.tensor(1 / 48)
            )
        gradients.append([p.grad for p in trained_mixers(student).parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*gradients))


@pytest.mark.parametrize("kind", ["matrix", "hidden"])
def test_packed_documents_are_aligned_as_documents_alone(kind):
    teacher, student = pair()
    step, tokens = AlignmentMicroStep(kind, teacher, student, PROBE), torch.randint(0, 512, (2, 12))
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None].expand(2, -1)
    results = []
    for parts in ([(tokens, positions)], [(tokens[:, :5], None), (tokens[:, 5:], None)], [(tokens, None)]):
        student.zero_grad()
        sums = [step(batch_of(*part), torch.tensor(1.0)) for part in parts]
        gradients = torch.cat([p.grad.flatten() for p in trained_mixers(student).parameters() if p.grad is not None])
        results.append((sum(s["loss"] for s in sums), sum(s["layers/squared_error_3"] for s in sums), gradients))
    packed, alone, leaking = results
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(packed, alone))
    assert not torch.allclose(packed[0], leaking[0], rtol=1e-6)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made under it that were alive at one time; views of `there` are not counted."""

    def __init__(self, there):
        super().__init__()
        self.there = {tensor.untyped_storage()._cdata for tensor in there}
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.there:
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return made


@pytest.mark.parametrize("kind", ["matrix", "hidden"])
def test_one_layers_activations_at_a_time(kind):
    """Eight layers take no more memory than two: all of a layer is freed before the next one runs."""
    peaks, tokens = {}, torch.randint(0, 512, (1, 96))
    for layers in (2, 8):
        teacher = make_teacher(tiny_llama_config(num_hidden_layers=layers))
        student = make_student(teacher, [])
        step = AlignmentMicroStep(kind, teacher, student, PROBE)
        step(batch_of(tokens), torch.tensor(1.0))  # makes the gradients, which stay
        weights = [*teacher.parameters(), *student.parameters()]
        with LiveBytes([*weights, *(p.grad for p in weights if p.grad is not None)]) as live:
            step(batch_of(tokens), torch.tensor(1.0))
        peaks[layers] = live.peak
    assert peaks[2] > 20 * tokens.numel() * 64 * 4  # it did see a layer's activations
    assert peaks[8] < 1.02 * peaks[2]


@pytest.mark.slow
@pytest.mark.parametrize("expand", [1, 2])
def test_the_stages_run_align_and_hand_over(tmp_path, tiny_teacher, documents, expand):
    sources = runs.write_sources(tmp_path / "text", documents)
    argv = runs.flags(
        tiny_teacher, sources, tmp_path / "run", matrix_tokens=2048, hidden_tokens=6144, hidden_lr=1e-3,
        matrix_seq_length=32,
        max_steps=2, skip_stage2=True, expand=expand,
    )  # fmt: skip
    assert train.main(argv) == 0
    sizes = json.loads((tmp_path / "run" / "final" / "config.json").read_text())["ssm_cfg"]
    assert [sizes[name] for name in ("n_v_heads", "n_qk_heads", "expand")] == [4 * expand, 4 * expand, expand]
    rows = [row for row in runs.metrics(tmp_path / "run") if "train/loss" in row]
    losses = {
        stage: [r["train/loss"] for r in rows if r["stage"] == stage] for stage in ("matrix", "hidden", "stage1")
    }
    assert [len(values) for values in losses.values()] == [32, 48, 2]
    for stage in ("matrix", "hidden"):
        assert sum(losses[stage][-8:]) < sum(losses[stage][:8])
    assert "layers/mean_decay_0" in rows[0] and "layers/relative_error_1" not in rows[0]
    squares = [rows[0][f"layers/relative_error_{index}"] ** 2 for index in (0, 2, 3)]
    assert sum(squares) / 3 == pytest.approx(rows[0]["train/loss"], rel=1e-5)
