"""Published shapes from 0.1B to 70B on the meta device: the whole surgery, and the sizes that come out of it."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import arguments
from distill.initialization import calibrate_mixers, start_mixer, student_config, student_from_teacher, visit_layers
from hardware.memory import estimate_memory
from helpers.teachers import SIZES, TEACHERS, make_student, make_teacher
from model_utils import (
    DROPPED,
    SUPPORTED_TEACHERS,
    _pattern,
    apply_replacements,
    as_teacher,
    check_teacher_config,
    freeze,
    teacher_tensors,
    transfer_teacher_weights,
)
from models import LlambaConfig, LlambaForCausalLM
from run.acceleration import step_settings


def sizes(width, mlp, layers, heads, kv, vocabulary, positions, tied=False, **rest):
    """The fields of a config.json, in the order in which model cards state them."""
    return dict(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, max_position_embeddings=positions,
        tie_word_embeddings=tied, **rest,
    )  # fmt: skip


def llama3_rope(factor):
    return {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip


def default_rope(theta):
    return {"rope_type": "default", "rope_theta": theta}


def llama(*figures, **rest):
    return LlamaConfig(**sizes(*figures, **rest))


def mistral(*figures, **rest):
    return MistralConfig(**sizes(*figures, **rest))


def qwen2(*figures, **rest):
    return Qwen2Config(**sizes(*figures, **rest))


def qwen3(*figures, **rest):
    return Qwen3Config(**sizes(*figures, **rest))


L3 = dict(rms_norm_eps=1e-5, rope_parameters=llama3_rope(8.0))
L32 = dict(rms_norm_eps=1e-5, rope_parameters=llama3_rope(32.0))
SMOL = dict(rms_norm_eps=1e-5, rope_parameters=default_rope(100000.0))
Q25 = dict(rms_norm_eps=1e-6, rope_parameters=default_rope(1000000.0))
Q3 = dict(rms_norm_eps=1e-6, rope_parameters=default_rope(1000000.0), head_dim=128)
# name: (configuration, parameters as published)
SHAPES = {
    "Llama-3.2-1B": (llama(2048, 8192, 16, 32, 8, 128256, 131072, True, head_dim=64, **L32), 1_235_814_400),
    "Llama-3.2-3B": (llama(3072, 8192, 28, 24, 8, 128256, 131072, True, head_dim=128, **L32), 3_212_749_824),
    "Llama-3.1-8B": (llama(4096, 14336, 32, 32, 8, 128256, 131072, **L3), 8_030_261_248),
    "Llama-3.1-70B": (llama(8192, 28672, 80, 64, 8, 128256, 131072, **L3), 70_553_706_496),
    "Llama-2-7B": (llama(4096, 11008, 32, 32, 32, 32000, 4096), 6_738_415_616),
    "Llama-2-13B": (llama(5120, 13824, 40, 40, 40, 32000, 4096), 13_015_864_320),
    "Llama-2-70B": (llama(8192, 28672, 80, 64, 8, 32000, 4096), 68_976_648_192),
    "TinyLlama-1.1B": (llama(2048, 5632, 22, 32, 4, 32000, 2048), 1_100_048_384),
    "SmolLM2-135M": (llama(576, 1536, 30, 9, 3, 49152, 8192, True, **SMOL), 134_515_008),
    "SmolLM2-360M": (llama(960, 2560, 32, 15, 5, 49152, 8192, True, **SMOL), 361_821_120),
    "SmolLM2-1.7B": (llama(2048, 8192, 24, 32, 32, 49152, 8192, True, **SMOL), 1_711_376_384),
    "a Llama with every bias": (
        llama(512, 1024, 4, 8, 2, 1000, 2048, attention_bias=True, mlp_bias=True),
        2 * 1000 * 512 + 512 + 4 * (2 * 513 * 512 + 2 * 513 * 128 + 2 * 513 * 1024 + 1025 * 512 + 2 * 512),
    ),
    "Mistral-7B-v0.1": (mistral(4096, 14336, 32, 32, 8, 32000, 32768, sliding_window=4096), 7_241_732_096),
    "Mistral-7B-v0.3": (mistral(4096, 14336, 32, 32, 8, 32768, 32768, sliding_window=None), 7_248_023_552),
    "Qwen2.5-0.5B": (qwen2(896, 4864, 24, 14, 2, 151936, 32768, True, **Q25), 494_032_768),
    "Qwen2.5-1.5B": (qwen2(1536, 8960, 28, 12, 2, 151936, 32768, True, **Q25), 1_543_714_304),
    "Qwen2.5-7B": (qwen2(3584, 18944, 28, 28, 4, 152064, 32768, **Q25), 7_615_616_512),
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, 8, 151936, 40960, True, **Q3), 596_049_920),
    "Qwen3-4B": (qwen3(2560, 9728, 36, 32, 8, 151936, 40960, True, **Q3), 4_022_468_096),
    "Qwen3-8B": (qwen3(4096, 12288, 36, 32, 8, 151936, 40960, **Q3), 8_190_735_360),
}  # fmt: skip


def distinct(model):
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_goes_through_the_surgery(name):
    config, published = SHAPES[name]
    check_teacher_config(config, name)
    with torch.device("meta"):
        teacher = as_teacher(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    assert distinct(teacher) == published
    layers = [1, config.num_hidden_layers - 1]
    student = student_from_teacher(teacher, dtype=torch.bfloat16, device="meta")
    heads, inner = config.num_attention_heads, teacher.model.layers[0].self_attn.q_proj.out_features
    bias = getattr(config, "attention_bias", False)
    mixer = student.backbone.layers[0].mixer
    assert mixer.in_proj.weight.shape == (4 * inner + heads, config.hidden_size)
    assert mixer.out_proj.weight.shape == (config.hidden_size, inner)
    per_mixer = mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel() + inner + 5 * 3 * inner + heads
    per_mixer += (4 * inner + heads + config.hidden_size) * bias
    assert sum(p.numel() for p in mixer.parameters()) == per_mixer

    attention = sum(p.numel() for p in teacher.model.layers[0].self_attn.parameters())
    written = transfer_teacher_weights(student, teacher, layers)
    apply_replacements(student, teacher, layers)
    mixers = config.num_hidden_layers - len(layers)
    assert distinct(student) == published + mixers * (per_mixer - attention)
    account_for_every_key(student, teacher, layers, written)
    trainable, frozen = freeze(student, mlp=True, replaced_layers=True)
    assert trainable + frozen == distinct(student)
    assert (student.lm_head.weight is student.backbone.embedding.weight) == config.tie_word_embeddings


def account_for_every_key(student, teacher, layers, written):
    """Outside the replaced layers: written by the table, or a mixer's own; the teacher's are written or attention."""
    names = {n for n, _ in student.named_parameters(remove_duplicate=False)}
    replaced = {n for n in names if any(f".layers.{i}." in n for i in layers)}
    own = {n for n in names - replaced if ".mixer." in n}
    assert set(written) == names - replaced - own
    assert len(written) == len(set(written))
    kept = [n for n, _ in teacher_tensors(teacher) if not any(f".layers.{i}." in n for i in layers)]
    dropped = [n for n in kept if _pattern(n)[0] in DROPPED]
    assert all(".self_attn." in n for n in dropped) and len(dropped) + len(written) == len(kept)


@pytest.mark.parametrize(
    "name", ["Llama-3.2-1B", "Llama-3.1-70B", "a Llama with every bias", "Qwen2.5-7B", "Qwen3-4B"]
)
def test_the_memory_estimate_runs(name):
    config, published = SHAPES[name]
    argv = ["--device", "cpu", "--layers", "1", "--seq_length", "1024", "--freeze_mlp"]
    args = arguments.parse_arguments(argv)
    estimate = estimate_memory(config, student_config(config), step_settings(args))
    assert estimate.parts["teacher weights"] == 2 * published
    assert estimate.allocated > estimate.parts["student weights"] + 2 * published and "GiB" in estimate.describe()


def test_heads_that_do_not_divide_the_width_survive_the_configuration():
    """Qwen3-4B: 32 heads of 128 on a width of 2560, so that the mixer is 1.6 times as wide as the model."""
    config = student_config(SHAPES["Qwen3-4B"][0])
    assert config.d_inner == 4096 and LlambaConfig(**config.to_dict()).d_inner == 4096


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", "phi3", "qwen3_moe", "olmo2"])
def test_other_architectures_are_told_what_is_supported(tmp_path, capsys, model_type):
    import train

    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    argv = ["--teacher_model", str(tmp_path), "--device", "cpu", "--output_dir", str(tmp_path / "run")]
    assert train.main(argv) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert f"'{model_type}' is not supported; supported are {', '.join(SUPPORTED_TEACHERS)}" in line


class LinearAttention(nn.Module):
    """Un-decayed linear attention with the teacher's own projections, head by head: what a mixer starts as."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, u):
        a = self.attention
        shape = (*u.shape[:2], -1, a.head_dim)
        q, k, v = (projection(u).view(shape) for projection in (a.q_proj, a.k_proj, a.v_proj))
        if hasattr(a, "q_norm"):  # without the division by the size
            q, k = q * a.q_norm.weight, k * a.k_norm.weight
        k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], 2) for part in (k, v))
        scores = torch.einsum("bihn,bjhn->bhij", q, k).tril() * a.head_dim**-0.5
        return a.o_proj(torch.einsum("bhij,bjhp->bihp", scores, v).flatten(2))


@pytest.mark.parametrize("name", TEACHERS)
def test_a_mixer_starts_as_linear_attention_with_every_bias(name):
    """With decays of 1 (A_log very negative by a constant input) it is exactly that."""
    teacher = make_teacher(TEACHERS[name]).double()
    student = student_from_teacher(teacher, dtype=torch.float64, device="cpu")
    u = torch.randn(2, 11, 64, dtype=torch.float64)
    u[..., 0] = 1.0
    for layer, theirs in zip(student.backbone.layers, teacher.model.layers):
        mixer, attention = layer.mixer, theirs.self_attn
        start_mixer(mixer, attention, teacher.config)
        with torch.no_grad():
            mixer.in_proj.weight[-mixer.n_v_heads :, 0] = -60.0
            given, wanted = mixer(u), LinearAttention(attention)(u)
        assert (given - wanted).norm() < 1e-9 * wanted.norm()


def test_what_a_mixer_cannot_carry_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        make_student(make_teacher(TEACHERS["grouped queries"]), [1])
        assert not caplog.records
        make_student(make_teacher(TEACHERS["qwen3"]), [1])
    assert len(caplog.records) == 1 and "norms of queries and keys" in caplog.text


@pytest.mark.parametrize("name", ["mistral, sliding", "qwen2, sliding in half", "qwen3, biases"])
def test_hybrids_generate_as_they_compute_and_survive_saving(tmp_path, name):
    teacher = make_teacher(TEACHERS[name])
    student = make_student(teacher, [1, 3])
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 24))
    whole = student(tokens, use_cache=False).logits
    student.save_pretrained(tmp_path)
    again = LlambaForCausalLM.load(str(tmp_path)).eval()
    assert torch.equal(again(tokens, use_cache=False).logits, whole)
    cache, parts = None, []
    for chunk in (tokens[:, :10], *tokens[:, 10:].split(1, 1)):
        output = student(chunk, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


@pytest.mark.parametrize("name", TEACHERS)
def test_calibration_lowers_the_error_of_every_mixer(name):
    teacher = make_teacher(TEACHERS[name])
    student = make_student(teacher, [1])
    tokens = torch.randint(0, 512, (4, 64))
    before = {}
    for visit in visit_layers(teacher.model, tokens):
        if visit.index != 1:
            given = student.backbone.layers[visit.index].mixer(visit.u)
            before[visit.index] = ((given - visit.attended).norm() / visit.attended.norm()).item()
    after = calibrate_mixers(student, teacher, tokens)
    assert after.keys() == before.keys() == {0, 2, 3}
    assert all(after[i] <= before[i] for i in after)
