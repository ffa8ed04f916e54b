"""The student as a model: published names, sizes, mixer, saving and loading, remote code, hybrids."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers.teachers import TEACHERS, make_student, make_teacher
from models import LlambaConfig, LlambaForCausalLM, LlambaMixer
from models.modeling_llamba import LlambaRMSNorm
from models.state_space import ssd_matrix


def make_config(**changes):
    ssm = {"d_state": 8, "n_v_heads": 4, "n_qk_heads": 2, "expand": 1.5, "chunk_size": 16} | changes.pop("ssm", {})
    mlp = {"intermediate_size": 64, "bias": False, "act_fn": "silu"} | changes.pop("mlp", {})
    return LlambaConfig(**{"vocab_size": 96, "d_model": 48, "n_layer": 3, "ssm_cfg": ssm, "mlp_cfg": mlp} | changes)


def make_model(**changes):
    model = LlambaForCausalLM(make_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def test_the_published_names_and_shapes():
    heads_of_each = {"n_v_heads": 4, "n_qk_heads": 2}
    config = LlambaConfig(
        d_model=256, n_layer=2, vocab_size=1000, mlp_cfg={"intermediate_size": 512}, ssm_cfg=heads_of_each
    )
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LlambaForCausalLM(config).state_dict().items()}
    inner, states, heads = 256, 2 * 64, 4
    block = {
        "input_layernorm.weight": (256,),
        "mixer.in_proj.weight": (2 * inner + 2 * states + heads, 256),
        "mixer.z_bias": (inner,),
        "mixer.conv1d.weight": (inner + 2 * states, 1, 4),
        "mixer.conv1d.bias": (inner + 2 * states,),
        "mixer.D": (heads,),
        "mixer.out_proj.weight": (256, inner),
        "post_attention_layernorm.weight": (256,),
        "mlp.gate_proj.weight": (512, 256),
        "mlp.up_proj.weight": (512, 256),
        "mlp.down_proj.weight": (256, 512),
    }
    expected = {f"backbone.layers.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    expected |= {"backbone.embedding.weight": (1000, 256), "backbone.final_layernorm.weight": (256,)}
    assert shapes == expected | {"lm_head.weight": (1000, 256)}


def test_the_published_sizes_of_8b():
    with torch.device("meta"):
        model = LlambaForCausalLM(LlambaConfig())
    mixer = 12320 * 4096 + 4096 * 4096 + 4096 + 5 * 8192 + 32
    assert model.num_parameters() == 2 * 128256 * 4096 + 32 * (mixer + 3 * 4096 * 14336 + 2 * 4096) + 4096
    assert model.backbone.layers[0].mixer.in_proj.weight.shape == (12320, 4096)


def test_every_option_adds_what_it_names():
    names = set(make_model(lm_head_bias=True, mlp={"bias": True}, ssm={"bias": True}).state_dict())
    plain = set(make_model().state_dict())
    layers = [f"backbone.layers.{i}." for i in range(3)]
    linear = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mixer.in_proj", "mixer.out_proj"]
    assert names - plain == {"lm_head.bias"} | {f"{layer}{name}.bias" for layer in layers for name in linear}
    assert make_model(vocab_size=97, pad_vocab_size_multiple=8).lm_head.weight.shape == (104, 48)


@pytest.mark.parametrize("ssm", [{"n_v_heads": 3, "n_qk_heads": 2}, {"n_v_heads": 5, "n_qk_heads": 5}])
def test_sizes_that_do_not_divide_are_one_line(ssm):
    with pytest.raises(ValueError, match=r"^ssm_cfg: .* is not a multiple of .*$"):
        make_config(ssm=ssm)


def test_norms_equal_llamas():
    ours, theirs = LlambaRMSNorm(64, 1e-5), LlamaRMSNorm(64, 1e-5)
    with torch.no_grad():
        ours.weight.normal_()
        theirs.weight.copy_(ours.weight)
    for dtype in (torch.float32, torch.bfloat16):
        hidden = 3 * torch.randn(4, 64).to(dtype)
        assert torch.equal(ours.to(dtype)(hidden), theirs.to(dtype)(hidden))


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_the_mixer_is_its_definition(activation):
    """in_proj, torch's own convolution, the materialised operator, gate, out_proj; in float64."""
    mixer = LlambaMixer(make_config(ssm={"activation": activation})).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    u = torch.randn(2, 37, 48, dtype=torch.float64)
    xBC, z, A_log = mixer.in_proj(u).split([72 + 32, 72, 4], -1)
    conv = mixer.conv1d
    mixed = F.conv1d(F.pad(xBC.transpose(1, 2), (3, 0)), conv.weight, conv.bias, groups=104).transpose(1, 2)
    mixed = F.silu(mixed) if activation == "silu" else mixed
    x, B, C = mixed.split([72, 16, 16], -1)
    x, B, C = x.unflatten(-1, (4, 18)), B.unflatten(-1, (2, 8)), C.unflatten(-1, (2, 8))
    y = torch.einsum("bhij,bjhp->bihp", ssd_matrix(-F.softplus(A_log), B, C), x) + mixer.D[:, None] * x
    wanted = mixer.out_proj(y.flatten(2) * F.silu(z + mixer.z_bias))
    assert torch.allclose(mixer(u), wanted, rtol=1e-10, atol=1e-12)
    assert torch.allclose(mixer.decays(u), torch.sigmoid(-A_log), rtol=1e-12)
    parts = mixer.project(u)
    assert all(torch.allclose(a, b) for a, b in zip(parts, (x, B, C, -F.softplus(A_log), z), strict=False))


def test_packed_documents_equal_documents_alone():
    """Starts nearer to each other than the convolution is wide, and in mid-chunk."""
    model = make_model().double()
    tokens = torch.randint(0, 96, (1, 50))
    lengths = [1, 2, 3, 17, 27]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model.backbone(tokens, position_ids=positions).last_hidden_state
        alone = torch.cat([model.backbone(part).last_hidden_state for part in tokens.split(lengths, 1)], 1)
    assert torch.allclose(packed, alone, rtol=1e-9, atol=1e-9)


def test_later_tokens_are_not_seen():
    model = make_model()
    tokens = torch.randint(0, 96, (2, 40))
    changed = tokens.clone()
    changed[:, 21:] = (changed[:, 21:] + 1) % 96
    assert torch.equal(logits(model, tokens)[:, :21], logits(model, changed)[:, :21])


def test_the_kept_state_holds_no_more_than_itself():
    """A slice of the prompt's activations would keep all of them in memory."""
    cache = make_model()(torch.randint(0, 96, (1, 500))).past_key_values
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
        assert layer.values.untyped_storage().nbytes() == layer.values.nbytes


@pytest.mark.parametrize("form", ["safetensors", "sharded", "pytorch_model.bin"])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded(tmp_path, form, tied):
    model = make_model(tie_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="30KB" if form == "sharded" else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or form == "sharded"
    if form == "pytorch_model.bin":
        weights = {n: p for n, p in model.state_dict().items() if not (tied and n == "lm_head.weight")}
        torch.save(weights, tmp_path / form)
        (tmp_path / "model.safetensors").unlink()
    else:
        saved = [name for path in tmp_path.glob("*.safetensors") for name in names_in(path)]
        assert len(saved) == len(set(saved)) and ("lm_head.weight" in saved) != tied
    again = LlambaForCausalLM.load(str(tmp_path)).eval()
    tokens = torch.randint(0, 96, (2, 20))
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert (again.lm_head.weight is again.backbone.embedding.weight) == tied
    assert LlambaForCausalLM.load(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def names_in(path):
    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_every_fault_of_the_keys_is_in_one_line(tmp_path, capfd):
    model = make_model()
    model.save_pretrained(tmp_path)
    weights = model.state_dict()
    del weights["backbone.layers.1.mixer.D"]
    weights["backbone.layers.0.mixer.surplus"] = torch.zeros(1)
    weights["backbone.layers.0.mixer.z_bias"] = torch.zeros(3)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError) as caught:
        LlambaForCausalLM.load(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: missing keys: backbone.layers.1.mixer.D; unexpected keys: backbone.layers.0.mixer.surplus; "
        "misshapen keys: backbone.layers.0.mixer.z_bias [3] instead of [72]"
    )
    assert "REPORT" not in "".join(capfd.readouterr())


def test_damaged_files_are_one_line(tmp_path):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"^.*weights cannot be read.*$"):
        LlambaForCausalLM.load(str(tmp_path))


def test_files_outside_the_folder_are_refused(tmp_path):
    folder = tmp_path / "model"
    make_model().save_pretrained(folder, max_shard_size="30KB")
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    shard = sorted(folder.glob("*.safetensors"))[0]
    (tmp_path / shard.name).write_bytes(shard.read_bytes())
    content = json.loads(text)
    content["weight_map"] = {n: f"../{s}" if s == shard.name else s for n, s in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not in the folder"):
        LlambaForCausalLM.load(str(folder))
    index.write_text(text)
    LlambaForCausalLM.load(str(folder))
    shard.unlink()
    shard.symlink_to(tmp_path / shard.name)
    with pytest.raises(ValueError, match="link out of the folder"):
        LlambaForCausalLM.load(str(folder))


def test_a_hybrids_config_keeps_what_the_teachers_layers_need():
    """Also where it is not the student's own: here eps, activation and the MLP's bias."""
    teacher = make_teacher(TEACHERS["wide heads, biases, tied"])
    teacher.config.rms_norm_eps = 1e-2
    for module in teacher.modules():
        if isinstance(module, LlamaRMSNorm):
            module.variance_epsilon = 1e-2
    student = make_student(teacher, [1, 2])
    student.config.norm_epsilon = 1e-5
    config = LlambaConfig.from_dict(json.loads(student.config.to_json_string()))
    assert config.attention_layers == [1, 2]
    again = LlambaForCausalLM(config).eval()
    again.load_state_dict(student.state_dict())
    assert again.backbone.layers[1].input_layernorm.variance_epsilon == 1e-2
    assert again.backbone.layers[1].mlp.gate_proj.bias is not None


REMOTE = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, again = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
tokens = torch.arange(3, 23)[None]
torch.save([model(tokens).logits, model.generate(tokens, max_new_tokens=8, do_sample=False)], again + "/results.pt")
model.save_pretrained(again)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pure", "hybrid"])
def test_loads_without_this_repository(tmp_path, kind):
    """A fresh process elsewhere, twice: from our checkpoint, and from what that process has saved."""
    teacher = make_teacher(TEACHERS["llama3 rope"])
    model = make_student(teacher, [1]) if kind == "hybrid" else make_model()
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        wanted = model(tokens).logits
    generated = model.generate(tokens, max_new_tokens=8, do_sample=False)
    folders = [tmp_path / name for name in ("first", "second", "third")]
    model.save_pretrained(folders[0])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(tmp_path / "home")}
    if "TRANSFORMERS_UNDER_TEST" in os.environ:  # another release's folder
        env["PYTHONPATH"] = os.environ["TRANSFORMERS_UNDER_TEST"]
    for source, target in itertools.pairwise(folders):
        target.mkdir()
        command = [sys.executable, "-c", REMOTE, str(source), str(target)]
        run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        found, continued = torch.load(target / "results.pt")
        assert torch.allclose(found, wanted, atol=1e-5) and torch.equal(continued, generated)


def test_generate_continues_a_given_cache():
    model = make_model()
    prompt = torch.randint(0, 96, (1, 30))
    options = dict(max_new_tokens=6, do_sample=False)
    whole = model.generate(prompt, **options)
    with torch.no_grad():
        cache = model(prompt[:, :20], use_cache=True).past_key_values
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options), whole)
    cache.reset()
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options), whole)


def test_checkpointed_layers_give_the_same_gradients():
    """transformers' own switch, as other trainers use it."""
    model = make_model().train()
    tokens = torch.randint(0, 96, (2, 20))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
