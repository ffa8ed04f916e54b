"""Ranks whose batches hold different numbers of valid tokens: loss and gradients are means over the tokens of all."""

import pytest
import torch

import train
from checkpoints.run_state import read_trainer_state
from data import SourceSpec, build_loader
from helpers import runs
from helpers.launching import launch
from model_utils import get_tokenizer

pytestmark = pytest.mark.slow

LENGTH = 64
# Targets at a document's end do not count, nor do rows that fill the last global batch of the pass.
UNEQUAL = dict(
    seq_length=LENGTH, document_reset=True, shuffle_buffer=0, epochs=1, epoch_step_hint=4, hidden_tokens=1024,
    dtype="float32", optimizer="adamw", skip_stage2=True, grad_accumulation_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory, documents, sources):
    """Sequences of a long document beside sequences of very short ones, 6 global batches of 2 x 2 and a part."""
    words = " ".join(documents[20:40]).split()
    rows = []
    for start in range(0, 360, 60):
        rows.append({"text": " ".join(words[start : start + 60])})
        rows += [{"text": word[:3]} for word in words[start : start + 40]]
    path = tmp_path_factory.mktemp("unequal") / "train.jsonl.gz"
    runs.write_rows(path, rows)
    return {**sources, "train": path}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_teacher, text):
    """One rank with a batch of 4: what two ranks with 2 each have to equal."""
    folder = tmp_path_factory.mktemp("alone")
    assert train.main(runs.flags(tiny_teacher, text, folder, batch_size=4, **UNEQUAL)) == 0
    return folder


def valid_tokens(text, teacher, rank):
    """Valid tokens of each batch of a rank."""
    spec = SourceSpec(name=str(text["train"]), shuffle_buffer=0)
    options = dict(seq_length=LENGTH, batch_size=2, rank=rank, world_size=2, epochs=1, document_reset=True)
    return [int(batch.valid.sum()) for batch in build_loader(spec, get_tokenizer(str(teacher)), **options)]


def test_the_ranks_are_unequal(text, tiny_teacher):
    ours, theirs = (valid_tokens(text, tiny_teacher, rank) for rank in (0, 1))
    assert len(ours) == len(theirs) and ours[-1] > 3 * theirs[-1]
    assert sum(abs(one - other) > 0.1 * one for one, other in zip(ours, theirs)) > len(ours) / 2


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_unequal_ranks_equal_one(parallel, alone, text, tiny_teacher, tmp_path):
    """In the hidden stage, whose gradients are averaged after the backward pass, and in stage 1."""
    launch(2, runs.flags(tiny_teacher, text, tmp_path, batch_size=2, parallel=parallel, **UNEQUAL))
    expected, found = runs.losses(alone), runs.losses(tmp_path)
    assert [step for step, *_ in found] == [step for step, *_ in expected] and len(expected) > 5
    for (step, loss, norm), (_, other_loss, other_norm) in zip(expected, found):
        assert other_loss == pytest.approx(loss, rel=5e-6), step
        assert other_norm == pytest.approx(norm, rel=5e-5), step
    weights, others = (runs.weights(folder / "final") for folder in (alone, tmp_path))
    for name, weight in weights.items():
        assert torch.linalg.vector_norm(others[name] - weight) <= 5e-5 * weight.norm(), name


OVERFLOWS = {**UNEQUAL, "dtype": "float16", "kl_weight": 1e3, "epochs": 0, "max_steps": 6}


def test_unequal_ranks_skip_an_overflow_together(text, tiny_teacher, tmp_path):
    """An overflow in one rank's shards is one for all: DDP, with whole gradients on each, skips the same steps."""
    runs_of = {}
    for parallel in ("ddp", "fsdp"):
        folder = tmp_path / parallel
        launch(2, runs.flags(tiny_teacher, text, folder, batch_size=2, parallel=parallel, **OVERFLOWS))
        scaler = read_trainer_state(folder / "checkpoint-8")["scaler"]
        runs_of[parallel] = scaler, [row for row in runs.metrics(folder) if "train/loss" in row]
    (scaler, rows), (other_scaler, others) = runs_of.values()
    assert scaler == other_scaler and scaler["scale"] < 65536
    assert [row["train/bad_steps"] for row in others] == [row["train/bad_steps"] for row in rows]
    assert 0 < rows[-1]["train/bad_steps"] < 4
    for row, other in zip(rows, others, strict=True):
        assert other["train/loss"] == pytest.approx(row["train/loss"], rel=2e-3)
