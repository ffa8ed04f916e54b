"""The mixer that engines serve: `--mixer mamba2`, with and without a z_bias."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import train
from conftest import tiny_llama_config
from distill.initialization import calibrate_mixers, fitted_half_lives, student_from_teacher, visit_layers
from helpers import runs
from helpers.teachers import make_teacher
from models import LlambaConfig
from models.modeling_llamba import LlambaMixer

SIZES = {"d_state": 8, "n_v_heads": 4, "n_qk_heads": 4, "expand": 1, "chunk_size": 16, "mixer": "mamba2"}


def make_mixer(**changes) -> LlambaMixer:
    mixer = LlambaMixer(LlambaConfig(vocab_size=96, d_model=48, n_layer=1, ssm_cfg={**SIZES, **changes})).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return mixer


def by_recurrence(mixer: LlambaMixer, u: torch.Tensor) -> torch.Tensor:
    """arXiv 2405.21060's mixer token by token, without SiLU after the convolution and without a gated norm."""
    H, P, N = mixer.n_v_heads, mixer.d_head, mixer.d_state
    xBC, z, raw = mixer.in_proj(u).split([mixer.d_conv, mixer.d_inner, H], -1)
    conv = mixer.conv1d
    mixed = F.conv1d(F.pad(xBC.transpose(1, 2), (3, 0)), conv.weight, conv.bias, groups=mixer.d_conv).transpose(1, 2)
    x, B, C = mixed.split([H * P, H * N, H * N], -1)
    x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (H, N)), C.unflatten(-1, (H, N))
    dt = torch.log1p(torch.exp(raw + mixer.dt_bias))
    state, outputs = u.new_zeros(len(u), H, N, P), []
    for t in range(u.shape[1]):
        decay = torch.exp(-torch.exp(mixer.A_log) * dt[:, t])[..., None, None]
        state = decay * state + B[:, t, :, :, None] * (dt[:, t, :, None] * x[:, t])[:, :, None]
        outputs.append(torch.einsum("bhn,bhnp->bhp", C[:, t], state) + mixer.D[:, None] * x[:, t])
    gate = z if mixer.z_bias is None else z + mixer.z_bias
    return mixer.out_proj(torch.stack(outputs, 1).flatten(2) * F.silu(gate))


@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("z_bias", [True, False])
def test_the_mixer_is_its_definition_gradients_included(length, z_bias):
    mixer = make_mixer(z_bias=z_bias)
    u = torch.randn(2, length, 48, dtype=torch.float64)
    upstream = torch.randn_like(u)
    found = [mixer(u), *torch.autograd.grad(mixer(u), list(mixer.parameters()), upstream)]
    wanted = by_recurrence(mixer, u)
    wanted = [wanted, *torch.autograd.grad(wanted, list(mixer.parameters()), upstream)]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(found, wanted))
    assert ("z_bias" in dict(mixer.named_parameters())) is z_bias


def test_a_teachers_student_starts_with_the_fitted_half_lives():
    teacher = make_teacher(tiny_llama_config(num_hidden_layers=2))
    tokens = torch.randint(0, 512, (2, 64))
    student = student_from_teacher(teacher, dtype=torch.float32, device="cpu", mixer="mamba2")
    visits = list(visit_layers(teacher.model, tokens))
    lives = [fitted_half_lives(layer.mixer, visit) for layer, visit in zip(student.backbone.layers, visits)]
    calibrate_mixers(student, teacher, tokens)
    for layer, visit, wanted in zip(student.backbone.layers, visits, lives):
        mixer, mean = layer.mixer, visit.u.mean((0, 1))
        assert torch.allclose(math.log(0.5) / mixer.decays(mean).log(), wanted, rtol=1e-3)
        step = F.softplus(mixer.in_proj.weight[-mixer.n_v_heads :] @ mean + mixer.dt_bias)
        assert torch.allclose(step, mixer.A_log.exp(), rtol=1e-3)


def test_without_a_z_bias_the_gate_is_neutral_on_the_mean_input():
    teacher = make_teacher(tiny_llama_config(num_hidden_layers=2))
    tokens = torch.randint(0, 512, (2, 64))
    student = student_from_teacher(teacher, dtype=torch.float32, device="cpu", mixer="mamba2", z_bias=False)
    calibrate_mixers(student, teacher, tokens)
    for layer, visit in zip(student.backbone.layers, visit_layers(teacher.model, tokens)):
        z = layer.mixer._project_in(visit.u.mean((0, 1))[None, None])[1]
        assert torch.allclose(F.silu(z), torch.ones_like(z), atol=1e-4)


def test_a_run_and_its_student_elsewhere(tmp_path, tiny_teacher, sources):
    """All stages; greedy tokens with the cache are those without."""
    options = dict(mixer="mamba2", no_z_bias=True, max_steps=3, hidden_tokens=512, matrix_tokens=256)
    options |= dict(matrix_seq_length=32)
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "run", **options)) == 0
    final = tmp_path / "run" / "final"
    student = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=True).eval()
    assert student.config.ssm_cfg["mixer"] == "mamba2" and not student.config.ssm_cfg["z_bias"]
    assert any(name.endswith("mixer.dt_bias") for name in runs.weights(final))
    tokens = torch.randint(3, 512, (2, 20))
    mask = torch.ones_like(tokens)
    options = dict(attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(student.generate(tokens, **options), student.generate(tokens, use_cache=False, **options))


@pytest.mark.parametrize("changes", [{"mixer": "mamba3"}, {"n_qk_heads": 2}])
def test_configurations_that_cannot_be(changes):
    with pytest.raises(ValueError, match="mixer"):
        LlambaConfig(ssm_cfg={**SIZES, **changes})
