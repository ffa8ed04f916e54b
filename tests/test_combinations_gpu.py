"""Ten rows of the combination test on a GPU at SmolLM2's size: 20 steps a stage, compiled, with CUDA graphs.

SMOLLM2 names a folder made by `python tests/smollm2.py FOLDER`; without it the teacher has SmolLM2's sizes and
random weights. Takes about a minute a row; `-k` chooses some.
"""

import os
from pathlib import Path
from typing import ClassVar

import pytest

from conftest import tiny_llama_config
from helpers import runs
from helpers.combinations import table
from helpers.combinations.checks import check
from helpers.combinations.pair import Pair
from helpers.combinations.rows import RowRuns

pytestmark = pytest.mark.gpu

SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rope_theta=100000.0,
)  # fmt: skip
ONE_RANK = {"way": "alone", "length": "steps", "student_model": "from_teacher"}
LAYERS = {"1": "9", "-1": "-1", "auto:1": "9"}  # measuring 30 layers takes longer than the run


class SmolLM2Pair(Pair):
    """A teacher of SmolLM2's size on a GPU."""

    stage_steps: ClassVar = dict.fromkeys(("matrix", "hidden", "stage1", "stage2"), 20)
    stretch = 16
    flags: ClassVar = {"device": "cuda:0"}

    def teacher(self, name: str) -> Path:
        folder = self.folder / f"teacher-{name}"
        if not folder.exists():
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

            torch.manual_seed(0)
            source = os.environ.get("SMOLLM2")
            model = LlamaForCausalLM(tiny_llama_config(**SMOLLM2, tie_word_embeddings=True))
            if source:
                model = AutoModelForCausalLM.from_pretrained(source)
            if name == "untied":
                model.config.tie_word_embeddings = False
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(source or self.tokenizer_dir).save_pretrained(folder)
        return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tokenizer_dir, documents):
    folder = tmp_path_factory.mktemp("smollm2")
    pair = SmolLM2Pair(folder, tokenizer_dir, documents)
    runs.write_rows(pair.sources["train"], [{"text": text} for text in documents])
    return pair


@pytest.mark.parametrize("number", range(10))
def test_row(number, pair, tmp_path):
    """Whole and, every other row, interrupted: its losses are then those of the whole run to rounding."""
    row = table.load()[number] | ONE_RANK
    row |= {"layers": LAYERS[row["layers"]], "max_lr": 1e-3, "matrix_lr": 1e-3, "hidden_lr": 1e-3}
    row_runs = RowRuns(row, pair, tmp_path)
    row_runs.whole()
    if number % 2 and row_runs.result.statuses["whole"] == [0]:
        row_runs.resumed()
    check(row_runs.result, pair, exactly=False)
    log = row_runs.result.log("whole")
    # transformers makes the mask of eager attention from a number on the host, which a graph cannot record
    eager = row["attn_implementation"] == "eager"
    captured = not (row["update_in_backward"] or row["document_reset"] or eager)
    assert "does not compile here" not in log
    assert ("runs as one CUDA graph" in log) == captured, log[-2000:]
