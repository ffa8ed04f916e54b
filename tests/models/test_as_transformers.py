"""What transformers' own models do with configurations, arguments, sizes and devices."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.teachers import TEACHERS, make_student, make_teacher
from models import LlambaConfig, LlambaForCausalLM


@pytest.fixture
def student():
    return make_student(make_teacher(TEACHERS["grouped queries"]), [1])


TOKENS = torch.arange(3, 23).view(2, 10)


def test_resized_embeddings_come_back(student, tmp_path):
    """A size that is no multiple of 8 is kept, and so are the published sizes, which are rounded up."""
    student.resize_token_embeddings(505)
    student.save_pretrained(tmp_path)
    again = LlambaForCausalLM.load(str(tmp_path)).eval()
    assert again.lm_head.weight.shape == (505, 64) and again.config.vocab_size == 505
    assert torch.equal(again(TOKENS).logits, student(TOKENS).logits)
    assert LlambaConfig(vocab_size=505).vocab_size == 512


def test_tied_embeddings_by_either_name():
    sizes = {"d_model": 32, "n_layer": 1, "vocab_size": 64, "ssm_cfg": {"n_v_heads": 4, "n_qk_heads": 4}}
    for name in ("tie_word_embeddings", "tie_embeddings"):
        config = LlambaConfig(**sizes, **{name: True})
        assert config.tie_word_embeddings and config.tie_embeddings
        model = LlambaForCausalLM(config)
        assert model.lm_head.weight is model.backbone.embedding.weight


def test_the_configuration_says_what_is_returned(student):
    student.config.use_cache = False
    assert student(TOKENS).past_key_values is None
    student.config.use_cache = student.config.output_hidden_states = True
    output = student(TOKENS)
    assert len(output.past_key_values.layers) == 4 and len(output.hidden_states) == 5
    plain = student.backbone(TOKENS, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], output.hidden_states[-1])
    assert isinstance(student(TOKENS, return_dict=False), tuple)


def test_the_attention_implementation_can_change(student):
    teachers = student.backbone.attention_config._attn_implementation
    wanted = student(TOKENS).logits
    student.set_attn_implementation("eager")
    output = student(TOKENS, output_attentions=True)
    assert teachers == "sdpa" and torch.allclose(output.logits, wanted, atol=1e-5)
    (weights,) = output.attentions
    assert weights.shape == (2, 4, 10, 10) and torch.allclose(weights.sum(-1), torch.ones(2, 4, 10))
    student.set_attn_implementation("sdpa")
    assert torch.equal(student(TOKENS).logits, wanted)


def test_checkpointed_layers_keep_no_cache(student):
    student.train().gradient_checkpointing_enable()
    output = student(TOKENS, labels=TOKENS, use_cache=True)
    output.loss.backward()
    assert output.past_key_values is None and student.lm_head.weight.grad is not None


def test_mistaken_inputs_are_one_line(student):
    embedded = student.backbone.embedding(TOKENS)
    assert torch.equal(student(inputs_embeds=embedded).logits, student(TOKENS).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        student(TOKENS, inputs_embeds=embedded)
    with pytest.raises(ValueError, match="a mask of tokens"):
        student(TOKENS, attention_mask=torch.ones(2, 1, 10, 10, dtype=torch.bool))


def test_an_assistants_state_cannot_go_back(student):
    teacher = make_teacher(TEACHERS["grouped queries"])
    with pytest.raises(NotImplementedError, match="cannot go back"):
        teacher.generate(TOKENS[:1], assistant_model=student, max_new_tokens=4, use_cache=True)


@pytest.mark.parametrize("items", [5, 18])
def test_the_loss_is_divided_by_what_a_trainer_says(student, items):
    """`num_items_in_batch` is of the whole optimizer step; labels that are shifted already stay where they are."""
    mean = student(TOKENS, labels=TOKENS).loss
    assert torch.allclose(student(TOKENS, labels=TOKENS, num_items_in_batch=items).loss, mean * 18 / items)
    shifted = torch.nn.functional.pad(TOKENS[:, 1:], (0, 1), value=-100)
    assert torch.allclose(student(TOKENS, labels=TOKENS, shift_labels=shifted).loss, mean)
    assert not torch.allclose(student(TOKENS, labels=TOKENS, shift_labels=shifted.flip(1)).loss, mean)


def test_layers_that_lie_on_the_disk(student, tmp_path):
    """Their weights come through the hooks of the modules that hold them; a layer of either kind is one piece."""
    student.save_pretrained(tmp_path / "model")
    assert {"LlambaBlock", "LlamaDecoderLayer"} <= set(
        LlambaForCausalLM.load(str(tmp_path / "model"))._no_split_modules
    )
    whole = {
        "backbone.embedding": "cpu",
        "backbone.final_layernorm": "cpu",
        "lm_head": "cpu",
        "backbone.rotary_emb": "cpu",
    }
    places = {f"backbone.layers.{index}": "disk" for index in range(4)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", trust_remote_code=True, device_map=whole | places, offload_folder=tmp_path / "weights"
    )
    assert model.backbone.layers[0].mixer.in_proj.weight.device.type == "meta"
    assert torch.allclose(model(TOKENS).logits, student(TOKENS).logits, atol=1e-5)
