"""transformers' own common model tests for a hybrid, for mixers only and for attention layers only.

What stays failing is in `STAYS`, with its reason; docs/transformers.md lists it with what Llama and Bamba do there.
"""

import unittest
from pathlib import Path

import pytest
import torch
from transformers.models.auto import modeling_auto

from helpers.transformers_suite import common_tests
from models import LlambaConfig, LlambaForCausalLM, LlambaModel

modeling, configuration, training = common_tests()
pytestmark = pytest.mark.slow

ATTENTION = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "attention_dropout": 0.0,
}

STAYS = {"test_attention_outputs": "asks for attention weights of every layer, of which a mixer has none"}


class Sizes:
    """What the common tests ask a model's tester for: sizes, a configuration, inputs."""

    batch_size = 13
    seq_length = 7
    is_training = True
    vocab_size = 104
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    causal_lm_class = LlambaForCausalLM
    base_model_class = LlambaModel

    def __init__(self, attention_layers):
        self.attention_layers = attention_layers

    def fields(self):
        ssm = {"d_state": 8, "n_v_heads": 4, "n_qk_heads": 2, "expand": 1, "chunk_size": 16}
        return {
            "vocab_size": self.vocab_size,
            "d_model": self.hidden_size,
            "n_layer": self.num_hidden_layers,
            "mlp_cfg": {"intermediate_size": 48, "bias": False, "act_fn": "silu"},
            "ssm_cfg": ssm | {"activation": "identity", "bias": False, "mixer": "llamba", "z_bias": True},
            "attention_layers": self.attention_layers,
            "attention_cfg": dict(ATTENTION) if self.attention_layers else None,
        }

    def get_config(self):
        return LlambaConfig(**self.fields(), pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def prepare_config_and_inputs_for_common(self):
        tokens = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class CommonTests(modeling.ModelTesterMixin, training.TrainingTesterMixin, modeling.GenerationTesterMixin):
    """The suite for one kind of student; `attention_layers` says which."""

    all_model_classes = (LlambaModel, LlambaForCausalLM)
    attention_layers: tuple[int, ...] = ()
    model_tester = None

    @pytest.fixture(autouse=True)
    def known_to_auto_classes(self, monkeypatch):
        """The tests look a class's name up to learn which labels it takes."""
        monkeypatch.setitem(modeling_auto.MODEL_MAPPING_NAMES, "llamba", "LlambaModel")
        monkeypatch.setitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "llamba", "LlambaForCausalLM")

    def setUp(self):
        self.model_tester = Sizes(list(self.attention_layers))
        self.config_tester = configuration.ConfigTester(self, config_class=LlambaConfig, **self.model_tester.fields())

    def test_config(self):
        self.config_tester.run_common_tests()


class HybridTest(CommonTests, unittest.TestCase):
    attention_layers = (1,)

    @pytest.mark.xfail(strict=True, reason=STAYS["test_attention_outputs"])
    def test_attention_outputs(self):
        super().test_attention_outputs()


@pytest.mark.parametrize("name", STAYS)
def test_the_page_lists_what_stays_failing(name):
    page = (Path(__file__).resolve().parents[2] / "docs/transformers.md").read_text(encoding="utf-8")
    assert f"`{name}`" in page


class MixersTest(CommonTests, unittest.TestCase):
    has_attentions = False


class AttentionTest(CommonTests, unittest.TestCase):
    attention_layers = (0, 1)
