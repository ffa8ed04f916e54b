"""export.py: an exact form of what there is one of, one line for what there is none of, nothing half written."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteMoeHybridForCausalLM, Qwen2Config

import export
import model_utils
from conftest import tiny_llama_config
from helpers.servable import checkpoint_of, differs_before_a_near_tie, greedy, servable_student
from helpers.teachers import LLAMA3_ROPE, SIZES
from serving import proof, standard
from serving.card import write_card
from serving.gguf_model import gguf_refusals, pairs_side_by_side
from serving.standard import refusals, wider_heads

BIASED = tiny_llama_config(attention_bias=True, tie_word_embeddings=True)
STUDENTS = {
    "mixers alone": dict(layers=[]),
    "hybrid": dict(layers=[1, 3]),
    "attention alone": dict(layers=[0, 1, 2, 3]),
    "two heads for each": dict(layers=[0], expand=2),
    "a bias of the gate": dict(layers=[2], z_bias=True),
    "biases everywhere, tied": dict(layers=[1], config=BIASED, z_bias=True),
    "llama3 rope": dict(layers=[1, 2], config=tiny_llama_config(rope_parameters=LLAMA3_ROPE)),
    "qwen2": dict(layers=[1, 2], config=Qwen2Config(**SIZES)),
}


def run(model, output, *flags, kind="granite") -> int:
    return export.main([f"--model={model}", f"--output={output}", f"--format={kind}", *flags])


@pytest.mark.parametrize("kind", STUDENTS)
def test_transformers_own_class_computes_what_the_student_computes(kind, tmp_path, tokenizer_dir):
    """At every length to 300, and with its cache for two prompts of different lengths at once."""
    student = servable_student(**STUDENTS[kind])
    assert run(checkpoint_of(student, tmp_path / "own", tokenizer_dir), tmp_path / "out") == 0
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(native, GraniteMoeHybridForCausalLM)
    tokens = torch.randint(3, 512, (2, 300))
    with torch.no_grad():
        wanted, found = (model(tokens).logits.log_softmax(-1) for model in (student, native))
    assert (wanted - found).abs().max() < 2e-4
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, :5] = 0
    prompts = tokens[:, :17]
    if student.config.ssm_cfg["bias"]:  # transformers' class adds in_proj's bias at padding too
        prompts, mask = prompts[:1], mask[:1]
    endless = [native.config.vocab_size]  # an end that does not come: the student beside it knows none
    options = dict(max_new_tokens=12, eos_token_id=endless, do_sample=False, pad_token_id=0)
    for row, there, new in zip(prompts, mask.bool(), native.generate(prompts, attention_mask=mask, **options)):
        own = greedy(student, row[there].tolist(), 12)
        assert not differs_before_a_near_tie(own, new[17:].tolist())


def test_what_is_written_beside_the_weights(tmp_path, tokenizer_dir, capsys):
    own = checkpoint_of(servable_student([1]), tmp_path / "own", tokenizer_dir)
    assert run(own, tmp_path / "out") == 0
    card, told = (tmp_path / "out" / "README.md").read_text(), capsys.readouterr().out
    assert "vllm serve" in card and str(tmp_path) not in card
    assert next(line for line in told.splitlines() if "KL" in line) in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["mamba", "attention", "mamba", "mamba"] and "auto_map" not in config
    here, there = (AutoTokenizer.from_pretrained(folder) for folder in (tokenizer_dir, tmp_path / "out"))
    assert here("Some text.").input_ids == there("Some text.").input_ids
    assert here.chat_template == there.chat_template
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own"]


def test_a_card_says_what_the_licence_of_the_teacher_asks(tmp_path):
    config = servable_student([1]).config
    config.teacher_model = "meta-llama/Llama-3.2-1B-Instruct"
    write_card(tmp_path, config, "granitehybrid", "q8_0", "a sentence", "commands")
    card = (tmp_path / "README.md").read_text()
    assert "base_model: meta-llama/Llama-3.2-1B-Instruct" in card and "Built with Llama" in card


def test_bfloat16_loses_no_digit_of_a_bfloat16_student(tmp_path, tokenizer_dir, capsys):
    own = checkpoint_of(servable_student([1]), tmp_path / "own", tokenizer_dir, torch.bfloat16)
    assert run(own, tmp_path / "out") == 0
    assert "rounded" not in capsys.readouterr().out
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert weights["model.layers.0.mamba.in_proj.weight"].dtype == torch.bfloat16
    assert run(own, tmp_path / "wide", "--dtype=float32") == 0
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide").state_dict()
    exact = [name for name in wide if ".mamba.norm" not in name and torch.equal(weights[name].float(), wide[name])]
    assert len(exact) == len(wide) - 3  # all but the norms' sqrt(eps), in three layers


def test_an_export_that_computes_something_else_is_not_kept(tmp_path, tokenizer_dir, monkeypatch, capsys):
    own = checkpoint_of(servable_student([1]), tmp_path / "own", tokenizer_dir)
    monkeypatch.setattr(standard, "HALF", standard.HALF * 1.25)
    assert run(own, tmp_path / "out") == 1
    assert "differs from the student: KL" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    monkeypatch.undo()
    monkeypatch.setattr(standard, "LINEAR", 2.0**-6)
    monkeypatch.setattr(standard, "HALF", 2.0**-7)
    assert run(own, tmp_path / "out") == 1, "a convolution that is not small enough for a linear SiLU"


def test_interrupted_it_leaves_nothing(tmp_path, tokenizer_dir, monkeypatch):
    own = checkpoint_of(servable_student([1]), tmp_path / "own", tokenizer_dir)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "prove_granite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(own, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(ssm_cfg={"mixer": "llamba"}), "--mixer mamba2"),
        (dict(ssm_cfg={"activation": "silu"}), "activation 'silu'"),
        (dict(ssm_cfg={"expand": 1.5, "n_v_heads": 6, "n_qk_heads": 6}), "d_inner 96"),
        (dict(attention_cfg={"model_type": "qwen3"}), "norms of queries"),
        (dict(attention_cfg={"sliding_window": 8}), "sliding window"),
        (dict(attention_cfg={"head_dim": 32}), "head_dim 32"),
        (dict(mlp_cfg={"bias": True}), "biases in the MLP"),
        (dict(mlp_cfg={"act_fn": "gelu"}), "'gelu'"),
        (dict(lm_head_bias=True), "the head"),
    ],
)
def test_what_has_no_exact_form(changes, why):
    config = servable_student([1]).config
    assert refusals(config) == [] and gguf_refusals(config) == []
    for name, value in changes.items():
        setattr(config, name, {**getattr(config, name), **value} if isinstance(value, dict) else value)
    assert [why in line for line in refusals(config)] == [True]


@pytest.mark.parametrize(
    "changes, why",
    [
        (dict(ssm_cfg={"z_bias": True}), "--no_z_bias"),
        (dict(ssm_cfg={"expand": 3, "n_v_heads": 12, "n_qk_heads": 12}), "2 d_model"),
        (dict(attention_cfg={"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}), "'yarn'"),
    ],
)
def test_what_llama_cpp_has_no_place_for(changes, why):
    config = servable_student([1]).config
    for name, value in changes.items():
        setattr(config, name, {**getattr(config, name), **value})
    assert refusals(config) == []
    assert [why in line and "--format granite" in line for line in gguf_refusals(config)] == [True]


def test_a_mistake_is_one_line_before_anything_is_loaded(tmp_path, tokenizer_dir, monkeypatch, capsys):
    own = checkpoint_of(servable_student([1], mixer="llamba", z_bias=True), tmp_path / "own", tokenizer_dir)
    monkeypatch.setattr(model_utils, "get_student_model", None)  # never called
    taken = tmp_path / "taken"
    (taken / "folder").mkdir(parents=True)
    cases = {
        "--dtype float16": (own, tmp_path / "out", "--dtype=float16"),
        "--dtype q8_0": (own, tmp_path / "out", "--dtype=q8_0"),
        "holds files already": (own, taken),
        "is a file, not a folder": (own, own / "config.json"),
        "train with --mixer mamba2": (own, tmp_path / "out"),
        "does not exist": (tmp_path / "nothing", tmp_path / "out"),
    }
    capsys.readouterr()
    for complaint, (model, *rest) in cases.items():
        assert run(model, *rest) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1, error
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run(own, tmp_path / "out", kind="gguf") == 2
    assert (
        capsys.readouterr().err
        == "error: --format gguf needs the package gguf: pip install -r requirements-export.txt\n"
    )


def test_zeros_that_fill_heads_up_and_pairs_side_by_side():
    rows = torch.arange(10.0)[:, None]
    assert wider_heads(rows, 0, 2, 4, 6)[:, 0].tolist() == [0, 1, 2, 3, 0, 0, 4, 5, 6, 7, 0, 0, 8, 9]
    assert wider_heads(rows.T, 1, 2, 4, 4).shape == (1, 10)
    assert pairs_side_by_side(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
