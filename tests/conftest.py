"""Shared fixtures: a tiny real teacher with a real tokenizer, real text, and real processes."""

import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.durations import Durations

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


TRANSFORMERS_MARKS = (  # of transformers' own common tests, see helpers/transformers_suite.py
    "accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "is_training_test",
    "torch_compile_test", "order",
)  # fmt: skip


# Files that take longest, these first: two workers take a file each, and none should be left with a long one alone.
COSTLIEST = (
    "test_combinations.py", "test_docs.py", "test_parallel.py", "test_resume.py", "test_schedulers.py",
    "test_model_downloads.py", "test_data.py", "test_rank_failures.py", "test_train.py", "test_acceleration.py",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    import torch

    places = {name: place for place, name in enumerate(COSTLIEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))

    if "combinations" not in config.option.markexpr:  # minutes of random rows: by name alone
        items[:] = [item for item in items if "combinations" not in item.keywords]
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_configure(config):
    config.pluginmanager.register(Durations(), "durations")
    for mark in TRANSFORMERS_MARKS:
        config.addinivalue_line("markers", f"{mark}: a group of transformers' own tests")


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """English text that every Python carries: the language reference's help topics."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, documents) -> Path:
    """A byte-level BPE tokenizer of 512 entries with SmolLM2's kind of special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents[:40], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def tiny_llama_config(**changes):
    from transformers import LlamaConfig

    sizes = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    return LlamaConfig(**{**sizes, **changes})


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory, tokenizer_dir) -> Path:
    """A saved Llama with random weights (4 layers, d 64, grouped queries) and the tokenizer beside it."""
    import shutil

    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    LlamaForCausalLM(tiny_llama_config()).save_pretrained(folder)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory, documents) -> dict[str, Path]:
    """Training and held-out text and conversations as JSONL.GZ, a module's own."""
    from helpers import runs

    return runs.write_sources(tmp_path_factory.mktemp("text"), documents)


@pytest.fixture(scope="session")
def run_script():
    """Run a script in a process of its own; returns the CompletedProcess with text output.

    A fork of a process with everything imported, unless `fresh` or the environment say otherwise (`helpers/warm.py`).
    """
    from helpers import warm

    def run(script: str, *flags: object, timeout: float = 300, env=None, cwd=None, fresh=False):
        env = {"OMP_NUM_THREADS": "1", **(env or {})}
        cwd = cwd or (None if script.endswith(".py") else ROOT)
        if not fresh and warm.fits(env):
            return warm.run(script, flags, timeout, environment=env, cwd=cwd)
        program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
        command = [sys.executable, *program, *map(str, flags)]
        env = {**os.environ, **env}
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env)

    return run
