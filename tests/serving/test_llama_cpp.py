"""What llama.cpp computes with an exported GGUF, in a process of its own (xllamacpp)."""

import json
import shutil

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config

import export
from conftest import tiny_llama_config
from helpers.servable import checkpoint_of, differs_before_a_near_tie, greedy, servable_student
from helpers.teachers import LLAMA3_ROPE, SIZES
from serving import llama_cpp
from serving.gguf_model import write_gguf
from serving.gguf_vocabulary import REGEXES, GgufVocabulary
from serving.proof import kl_among, log_probabilities
from utils import UserError

pytest.importorskip("xllamacpp")

STUDENTS = {
    "mixers alone": dict(layers=[]),
    "hybrid": dict(layers=[1, 3]),
    "attention alone": dict(layers=[0, 1, 2, 3]),
    "two heads for each": dict(layers=[0], expand=2),
    "tied": dict(layers=[2], config=tiny_llama_config(tie_word_embeddings=True)),
    "llama3 rope": dict(layers=[1, 2], config=tiny_llama_config(rope_parameters=LLAMA3_ROPE)),
    "qwen2": dict(layers=[1, 2], config=Qwen2Config(**SIZES)),
}
LENGTHS = (1, 2, 3, 4, 5, 17, 64, 65, 300)


@pytest.fixture(scope="module")
def tokenizer():
    """512 tokens that are each some ASCII: of half a letter llama.cpp's server would tell no probabilities."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", *(f"t{index}" for index in range(6, 512))]
    vocab = {name: index for index, name in enumerate(names)}
    bare = Tokenizer(models.BPE(vocab, [("a", "b")]))
    bare.add_special_tokens(names[:3])
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<|im_start|>", eos_token="<|im_end|>")


@pytest.mark.parametrize("kind", STUDENTS)
def test_llama_cpp_computes_what_the_student_computes(kind, tmp_path, tokenizer):
    """Greedy tokens up to the first near-tie, log-probabilities at each; two requests at a time."""
    student = servable_student(**STUDENTS[kind])
    write_gguf(tmp_path / "model.gguf", student, tokenizer, "float32")
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in LENGTHS]
    answer = llama_cpp.ask(tmp_path / "model.gguf", prompts=prompts, new=8, top=512, parallel=2)
    checked = 0
    for prompt, found in zip(prompts, answer["completions"]):
        new = [token["id"] for token in found]
        assert not differs_before_a_near_tie(greedy(student, prompt, 8), new)
        rows = log_probabilities(student, torch.tensor(prompt + new[:-1]))[len(prompt) - 1 :]
        compared = [(row, token) for row, token in zip(rows, found) if token["top"]]
        assert max(kl_among(row, token["top"]) for row, token in compared) < 1e-8
        for row, token in compared:
            other = torch.tensor([token["top"][str(index)] for index in range(512)])
            assert (row - other).abs().max() < 5e-4
        checked += len(compared)
    assert checked > 4 * len(LENGTHS)


@pytest.mark.parametrize("dtype, most", [("float32", 1e-9), ("bfloat16", 5e-2), ("q8_0", 5e-2)])
def test_export_proves_what_it_writes(dtype, most, tmp_path, tokenizer_dir, capsys):
    own = checkpoint_of(servable_student([1]), tmp_path / "own", tokenizer_dir)
    flags = [f"--model={own}", f"--output={tmp_path / 'out'}", "--format=gguf", f"--dtype={dtype}"]
    assert export.main(flags) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if "KL" in line)
    assert 0 <= float(told.split()[4]) < most, told
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", f"model-{dtype}.gguf"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert told in card and f"llama-cli --model model-{dtype}.gguf" in card
    widths = {"float32": 4, "bfloat16": 2, "q8_0": 1.0625}
    matrices = 512 * 64 * 2 + 4 * 3 * 64 * 128 + 3 * (6 * 64 + 4) * 64 + 3 * 128 * 64 + (64 + 64 + 32 + 32) * 64
    assert 0 < (tmp_path / "out" / f"model-{dtype}.gguf").stat().st_size - matrices * widths[dtype] < 60000


def test_without_llama_cpp_it_says_that_nothing_was_compared(tmp_path, tokenizer_dir, monkeypatch, capsys):
    own = checkpoint_of(servable_student([1]), tmp_path / "own", tokenizer_dir)
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    assert export.main([f"--model={own}", f"--output={tmp_path / 'out'}", "--format=gguf"]) == 0
    assert "not compared" in capsys.readouterr().out
    assert "not compared" in (tmp_path / "out" / "README.md").read_text()


def test_where_llama_cpp_gives_up_the_reason_is_told_and_nothing_kept(tmp_path, tokenizer_dir, monkeypatch, capsys):
    """It ends the process over a wrong d_inner."""
    own = checkpoint_of(servable_student([1]), tmp_path / "own", tokenizer_dir)
    monkeypatch.setattr("serving.gguf_model.LLAMA_CPP_EXPAND", 1)
    assert export.main([f"--model={own}", f"--output={tmp_path / 'out'}", "--format=gguf"]) == 1
    assert "2 * n_embd == d_inner" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def cutters():
    """Pre-tokenizers by llama.cpp's name for them, as the tokenizers of that kind have them."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    yield "gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    yield "smollm", pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for regex, name in REGEXES.items():
        yield name, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level])


@pytest.mark.parametrize("name, cutter", cutters())
def test_texts_are_tokenised_alike(name, cutter, tmp_path, documents):
    """Words, numbers, white space, other scripts, special tokens, and a BOS where the tokenizer puts one."""
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = cutter, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bare.train_from_iterator([*documents[:20], "1234567890 12 123 3.14 2026"], trainer)
    if name == "llama-bpe":  # as Llama 3's: whole words before merges, and a BOS
        bare.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
        )
        described = json.loads(bare.to_str())
        described["model"]["ignore_merges"] = True
        bare = Tokenizer.from_str(json.dumps(described))
    fast = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<|begin|>", eos_token="<|im_end|>")
    assert GgufVocabulary(fast).cut == name
    texts = [
        "It's 1234567 o'clock, they'LL say:  2026-11-26!\n\n  indented\t\ttabs \n x = y[3:14]  ",
        "Größe, 漢字と仮名, русский, 🙂🙂 e\u0301",
        "<|im_start|>user\nHi<|im_end|>\n",
        documents[30][:2000],
    ]
    write_gguf(tmp_path / "model.gguf", servable_student([0], tiny_llama_config(vocab_size=704)), fast, "float32")
    assert llama_cpp.ask(tmp_path / "model.gguf", texts=texts)["tokens"] == [fast(text).input_ids for text in texts]


def test_a_tokenizer_of_another_kind_is_refused(tmp_path, tokenizer_dir):
    described = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    described["pre_tokenizer"] = {"type": "Whitespace"}
    shutil.copytree(tokenizer_dir, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"Llama 3.*--format granite"):
        GgufVocabulary(PreTrainedTokenizerFast.from_pretrained(tmp_path / "other"))
