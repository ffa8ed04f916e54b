"""Surgery: transfer with every key accounted for, replacement, parity with the teacher, freezing, sharing."""

import pytest
import torch
from transformers import GPT2Config

from conftest import tiny_llama_config
from distill.initialization import student_from_teacher
from distill.teacher import teacher_hidden
from helpers.teachers import TEACHERS, make_student, make_teacher
from model_utils import (
    check_layers,
    check_pair,
    check_teacher_config,
    freeze,
    get_student_model,
    get_teacher_model,
    load_config,
    share_frozen_weights,
    transfer_teacher_weights,
)
from models import LlambaConfig, LlambaForCausalLM
from utils import UserError


@pytest.mark.parametrize("name", TEACHERS)
def test_with_every_layer_replaced_the_logits_are_the_teachers(name):
    teacher = make_teacher(TEACHERS[name])
    student = make_student(teacher, range(4))
    tokens = torch.randint(0, 512, (2, 40))
    assert torch.equal(student(tokens, use_cache=False).logits, teacher(tokens).logits)


@pytest.mark.parametrize("name", TEACHERS)
def test_our_walk_through_the_teacher_is_its_own_forward(name):
    teacher = make_teacher(TEACHERS[name])
    tokens = torch.randint(0, 512, (2, 40))
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None].expand(2, -1)
    for where in (None, positions):
        wanted = teacher.model(tokens, position_ids=where, use_cache=False).last_hidden_state
        assert torch.equal(teacher_hidden(teacher, tokens, where), wanted)


@pytest.mark.parametrize("name", ["grouped queries", "mistral, sliding"])
def test_packed_documents_reach_the_replaced_layers(name):
    teacher = make_teacher(TEACHERS[name])
    student = make_student(teacher, range(4))
    tokens = torch.randint(0, 512, (2, 40))
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None].expand(2, -1)
    ours = student(tokens, position_ids=positions, use_cache=False).logits
    assert torch.equal(ours, teacher(tokens, position_ids=positions, use_cache=False).logits)
    assert not torch.allclose(ours, teacher(tokens, use_cache=False).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_hybrid_survives_saving(tmp_path, attention):
    teacher = make_teacher(TEACHERS["llama3 rope"], attention)
    student = make_student(teacher, [1, 3])
    student.save_pretrained(tmp_path)
    again = LlambaForCausalLM.load(str(tmp_path), attn_implementation=attention).eval()
    tokens = torch.randint(0, 512, (2, 40))
    assert again.config.attention_layers == [1, 3]
    assert torch.equal(again(tokens, use_cache=False).logits, student(tokens, use_cache=False).logits)


def test_document_leak():
    """Changing document 1 leaves document 2's logits untouched, in the teacher and in the student."""
    teacher = make_teacher(TEACHERS["grouped queries"])
    student = make_student(teacher, [2])
    positions = torch.cat((torch.arange(15), torch.arange(25)))[None]
    tokens = torch.randint(0, 512, (1, 40))
    changed = tokens.clone()
    changed[:, :15] = (changed[:, :15] + 1) % 512
    for model in (teacher, student):
        before, after = (model(t, position_ids=positions, use_cache=False).logits for t in (tokens, changed))
        assert torch.equal(before[:, 15:], after[:, 15:])
        assert not torch.equal(before[:, :15], after[:, :15])
        leaking = model(changed, use_cache=False).logits - model(tokens, use_cache=False).logits
        assert leaking[:, 15:].abs().max() > 0


def test_transfer_copies_by_the_table_and_leaves_mixers_alone():
    teacher = make_teacher(TEACHERS["wide heads, biases, tied"])
    student = student_from_teacher(teacher, dtype=torch.float32, device="cpu")
    mixers = {n: p.clone() for n, p in student.named_parameters() if ".mixer." in n}
    written = transfer_teacher_weights(student, teacher, replaced=[1])
    named = dict(student.named_parameters(remove_duplicate=False))
    assert torch.equal(named["lm_head.weight"], teacher.model.embed_tokens.weight)
    assert torch.equal(named["backbone.layers.0.mlp.up_proj.bias"], teacher.model.layers[0].mlp.up_proj.bias)
    assert not any(".layers.1." in name for name in written)
    assert all(torch.equal(named[name], value) for name, value in mixers.items())
    expected = {n for n, _ in student.named_parameters() if ".mixer." not in n and ".layers.1." not in n}
    assert expected <= set(written)


def test_a_teacher_tensor_without_a_place_is_an_error():
    teacher = make_teacher(TEACHERS["grouped queries"])
    student = student_from_teacher(teacher, dtype=torch.float32, device="cpu")
    teacher.model.layers[0].extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(UserError, match=r"model\.layers\.0\.extra"):
        transfer_teacher_weights(student, teacher)


def test_replacements_are_copies_that_train():
    teacher = make_teacher(TEACHERS["grouped queries"])
    student = make_student(teacher, [0])
    ours = student.backbone.layers[0].self_attn.q_proj.weight
    assert ours.requires_grad and ours.data_ptr() != teacher.model.layers[0].self_attn.q_proj.weight.data_ptr()
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("name", ["grouped queries", "wide heads, biases, tied"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_frozen_weights_are_held_once_and_trainable_ones_never(name, embeddings):
    teacher = make_teacher(TEACHERS[name])
    student = make_student(teacher, [1])
    freeze(student, mlp=True, replaced_layers=True, embeddings=embeddings)
    saved = share_frozen_weights(student, teacher)
    teachers = {p.data_ptr() for p in teacher.parameters()}
    shared = [n for n, p in student.named_parameters() if p.data_ptr() in teachers]
    trainable = {n for n, p in student.named_parameters() if p.requires_grad}
    assert saved == sum(p.numel() * 4 for n, p in student.named_parameters() if n in shared)
    assert not trainable & set(shared)
    assert {"backbone.layers.0.mlp.up_proj.weight", "backbone.layers.1.self_attn.q_proj.weight"} <= set(shared)
    for module in (student.backbone.embedding, student.lm_head):
        assert (module.weight.data_ptr() in teachers) == embeddings != module.weight.requires_grad


def test_nothing_left_to_train_is_an_error():
    student = make_student(make_teacher(TEACHERS["grouped queries"]), range(4))
    student.backbone.final_layernorm.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        freeze(student, mlp=True, replaced_layers=True, embeddings=True)


def test_layer_indices():
    assert check_layers([3, -1, 0, 3], 4) == [0, 3]
    assert check_layers([-1], 4) == []
    with pytest.raises(UserError, match="--layers 4: the teacher has layers 0 to 3"):
        check_layers([4], 4)


def test_wrong_pairs_and_teachers_are_named():
    with pytest.raises(UserError, match=r"gpt2.*supported are llama, mistral, qwen2, qwen3"):
        check_teacher_config(GPT2Config(), "some/gpt2")
    with pytest.raises(UserError, match="vocabulary has 128256 entries, the teacher's 512"):
        check_pair(LlambaConfig(), tiny_llama_config(), "student")
    with pytest.raises(UserError, match="d_model/hidden_size is 32, but the teacher's is 64"):
        check_pair(LlambaConfig(vocab_size=512, d_model=32), tiny_llama_config(), "student")


def test_folders_that_are_not_models(tmp_path, tiny_teacher):
    with pytest.raises(UserError, match="does not exist"):
        load_config(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no config\.json"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text((tiny_teacher / "config.json").read_text())
    with pytest.raises(UserError, match="no weights"):
        load_config(str(tmp_path))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen"])
def test_checkpoint_keys_are_accounted_for(tmp_path, tiny_teacher, fault):
    from safetensors.torch import load_file, save_file

    teacher = get_teacher_model(str(tiny_teacher), dtype=torch.float32)
    make_student(teacher, [1]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "backbone.layers.0.mixer.z_bias"
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        name = "backbone.layers.0.mixer.dt_bias"
        tensors[name] = torch.zeros(4)
    else:
        tensors[name] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{fault} keys?: .*{name}") as raised:
        get_student_model(str(tmp_path), teacher, dtype=torch.float32)
    assert "\n" not in str(raised.value)
