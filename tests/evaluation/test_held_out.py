"""Evaluation while training: what a run reports on held-out text, and that its best checkpoint is kept."""

import json

import pytest
import torch

import evaluate
import train
from evaluation.held_out import held_out_figures
from helpers import runs

EVERY = {"kl", "top1_agreement", "student_perplexity", "perplexity_ratio", "tokens"}


@pytest.fixture(scope="module")
def sharp_teacher(tmp_path_factory, tiny_teacher):
    """The tiny teacher with an opinion: its logits are far from uniform, so that there is something to learn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("sharp")
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, sharp_teacher, sources):
    """A run that gets better by alignment, and then worse by a rate that is far too high; one checkpoint is kept."""
    output = tmp_path_factory.mktemp("run")
    argv = runs.flags(
        sharp_teacher, sources, output, eval_dataset=sources["heldout"], eval_interval=4, eval_tokens=1000,
        hidden_tokens=10 * 128, hidden_lr=5e-3, max_steps=8, max_lr=1, grad_clip=1e9, keep_checkpoints=1,
        second_dataset_tokens=256, optimizer="adamw",
    )  # fmt: skip
    assert train.main(argv) == 0
    return output


def evaluations(run):
    return [row for row in runs.metrics(run) if "eval/kl" in row]


def test_the_figures_come_at_the_start_the_interval_and_the_end_of_each_stage(run):
    rows = evaluations(run)
    assert [row["step"] for row in rows] == [0, 4, 8, 10, 12, 16, 18, 20]
    for row in rows:
        assert {f"eval/{name}" for name in EVERY} <= row.keys()
        assert 1000 <= row["eval/tokens"] <= 1000 + 2 * 64
        assert row["eval/kl"] > 0 and 0 <= row["eval/top1_agreement"] <= 1


def test_hard_labels_alone_are_still_judged_by_the_teacher(sharp_teacher, sources, tmp_path):
    argv = runs.flags(
        sharp_teacher, sources, tmp_path, eval_dataset=sources["heldout"], eval_interval=2, eval_tokens=500,
        kl_weight=0, ce_weight=1, max_steps=2, skip_stage2=True,
    )  # fmt: skip
    assert train.main(argv) == 0
    assert all(row["eval/kl"] > 0.1 and row["eval/top1_agreement"] > 0 for row in evaluations(tmp_path))


def test_the_teachers_own_figures_come_once(run):
    rows = evaluations(run)
    assert ["eval/teacher_perplexity" in row for row in rows] == [True] + [False] * 7
    teacher = rows[0]["eval/teacher_perplexity"]
    for row in rows:
        assert row["eval/student_perplexity"] / teacher == pytest.approx(row["eval/perplexity_ratio"], rel=1e-5)


def test_the_best_checkpoint_is_kept(run, sharp_teacher, sources):
    """Whatever --keep_checkpoints prunes; and it is the model whose figures were reported."""
    rows = evaluations(run)
    best = min(rows, key=lambda row: row["eval/kl"])
    assert best["step"] in (4, 8, 10), "the run was meant to get better and then worse"
    folders = {path.name for path in run.iterdir() if path.is_dir()}
    stable = {f"stable-{stage}" for stage in ("hidden", "stage1", "stage2")}
    assert folders == {f"checkpoint-{best['step']}", "checkpoint-20", "final"} | stable
    kept = run / f"checkpoint-{best['step']}"
    manifests = {name: json.loads((run / name / "manifest.json").read_text()) for name in folders}
    assert {name for name, manifest in manifests.items() if manifest["best"]} == {kept.name}
    found = figures_of(kept, sharp_teacher, sources)
    for name in EVERY:
        assert found[name] == pytest.approx(best[f"eval/{name}"], rel=1e-5)


def figures_of(folder, teacher, sources):
    from model_utils import get_student_model, get_teacher_model, get_tokenizer

    flags = ["--student", str(folder), "--teacher", str(teacher), "--seq_length", "64", "--batch_size", "2"]
    batches = evaluate.held_out_batches(evaluate.parse(flags), str(sources["heldout"]), get_tokenizer(str(teacher)))
    frozen = get_teacher_model(str(teacher), dtype=torch.float32)
    student = get_student_model(str(folder), frozen, dtype=torch.float32)
    return held_out_figures(student, frozen, batches, 1000, torch.device("cpu"))


def test_the_card_has_them(run):
    rows = evaluations(run)
    card = (run / "final" / "README.md").read_text()
    assert f"KL(teacher, student) {rows[-1]['eval/kl']:.4f} nats a token" in card and "at step 20" in card
    best = min(rows, key=lambda row: row["eval/kl"])
    assert f"lowest held-out KL of the run: {best['eval/kl']:.4f} at step {best['step']}" in card


def test_without_the_flags_nothing_is_evaluated(tiny_teacher, sources, tmp_path):
    argv = runs.flags(tiny_teacher, sources, tmp_path / "run", max_steps=2, skip_stage2=True)
    assert train.main(argv) == 0
    assert not evaluations(tmp_path / "run")
