"""Figures of each layer against whole models with hooks; sample texts; and that neither changes a run."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

import train
from conftest import tiny_llama_config
from distill.initialization import student_from_teacher
from evaluation.diagnostics import GREEDY, as_numbers, continuations, gradient_norms, layer_figures
from helpers import runs
from model_utils import (
    apply_replacements,
    as_teacher,
    get_student_model,
    get_teacher_model,
    get_tokenizer,
    transfer_teacher_weights,
)


def pair(layers):
    torch.manual_seed(0)
    teacher = as_teacher(LlamaForCausalLM(tiny_llama_config(initializer_range=0.1)))
    student = student_from_teacher(teacher, dtype=torch.float32, device="cpu")
    transfer_teacher_weights(student, teacher, replaced=layers)
    apply_replacements(student, teacher, layers)
    return teacher, student.train()


def outputs_of(layers, run):
    """What each layer gives while `run` is called."""
    found = []
    hooks = [layer.register_forward_hook(lambda module, args, out: found.append(out)) for layer in layers]
    run()
    for hook in hooks:
        hook.remove()
    return [out[0] if isinstance(out, tuple) else out for out in found]


@pytest.mark.parametrize("layers", [[], [1, 2]])
@pytest.mark.parametrize("packed", [False, True])
def test_distances_and_decays_are_those_of_the_whole_models(layers, packed):
    teacher, student = pair(layers)
    tokens = torch.randint(0, 512, (2, 40))
    positions = (torch.arange(40) % 25).expand(2, -1).contiguous() if packed else None
    first, where = tokens[:1], None if positions is None else positions[:1]
    ours = outputs_of(student.backbone.layers, lambda: student.backbone(first, position_ids=where))
    theirs = outputs_of(teacher.model.layers, lambda: teacher.model(first, position_ids=where, use_cache=False))
    expected = {f"layers/hidden_distance_{i}": ((a - b).norm() / b.norm()).item() for i, (a, b) in
                enumerate(zip(ours, theirs))}  # fmt: skip
    before = [student.backbone.embedding(first), *ours]
    for index, layer in enumerate(student.backbone.layers):
        if index not in layers:
            decays = layer.mixer.decays(layer.input_layernorm(before[index]))
            expected[f"layers/mean_decay_{index}"] = decays.mean().item()
    figures = layer_figures(student, teacher, tokens, positions)
    assert as_numbers(figures) == pytest.approx(expected, rel=1e-4)
    assert not any(value.requires_grad for value in figures.values())


def test_an_exact_copy_has_no_distance():
    teacher, student = pair([0, 1, 2, 3])
    figures = as_numbers(layer_figures(student, teacher, torch.randint(0, 512, (1, 20)), None))
    assert list(figures) == [f"layers/hidden_distance_{i}" for i in range(4)]
    assert all(value == pytest.approx(0, abs=1e-5) for value in figures.values())


def test_gradient_norms():
    _, student = pair([1])
    student.backbone.layers[2].requires_grad_(False)
    student(torch.randint(0, 512, (1, 20))).logits.square().mean().backward()
    norms = as_numbers(gradient_norms(student, 2.0))
    assert list(norms) == [f"layers/grad_norm_{i}" for i in (0, 1, 3)]
    for index in (0, 1, 3):
        gradients = [p.grad.flatten() for p in student.backbone.layers[index].parameters()]
        assert norms[f"layers/grad_norm_{index}"] == pytest.approx(torch.cat(gradients).norm().item() / 2)


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny_teacher, documents):
    """A run with everything on, and its text sources: one step of alignment, four of each loop."""
    folder = tmp_path_factory.mktemp("watched")
    sources = runs.write_sources(folder / "text", documents)
    (folder / "prompts.txt").write_text("The first\n\nclass Thing:\n")
    options = dict(hidden_tokens=256, max_steps=4, second_dataset_tokens=256, save_interval=4, keep_checkpoints=9)
    watch = dict(diagnostics_interval=2, sample_interval=4, sample_prompts=folder / "prompts.txt")
    assert train.main(runs.flags(tiny_teacher, sources, folder / "run", **options, **watch)) == 0
    return folder, sources, options, watch


def test_a_run_is_the_same_unwatched(watched, tiny_teacher):
    folder, sources, options, _ = watched
    plain = runs.flags(tiny_teacher, sources, folder / "plain", **options, diagnostics_interval=0)
    assert train.main(plain) == 0
    assert runs.losses(folder / "run") == runs.losses(folder / "plain")
    weights = [(folder / run / "final" / "model.safetensors").read_bytes() for run in ("run", "plain")]
    assert weights[0] == weights[1]


def test_what_is_written(watched, tiny_teacher):
    folder = watched[0]
    rows = [row for row in runs.metrics(folder / "run") if "layers/grad_norm_0" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert "layers/mean_decay_0" not in rows[0] and 0 < rows[-1]["layers/mean_decay_0"] < 1
    assert all(f"layers/{kind}_{i}" in rows[-1] for kind in ("grad_norm", "hidden_distance") for i in range(4))
    assert [row["stage_begins"] for row in runs.metrics(folder / "run") if "stage_begins" in row] == [
        "hidden", "stage1", "stage2",
    ]  # fmt: skip
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in samples] == [
        (4, "The first"), (4, "class Thing:"), (8, "The first"), (8, "class Thing:"),
    ]  # fmt: skip
    tokenizer, teacher = get_tokenizer(str(tiny_teacher)), get_teacher_model(str(tiny_teacher), dtype=torch.float32)
    student = get_student_model(str(folder / "run" / "final"), teacher, dtype=torch.float32)
    prompts = ["The first", "class Thing:"]
    assert [row["teacher"] for row in samples[2:]] == continuations(teacher, tokenizer, prompts)
    assert [row["student"] for row in samples[2:]] == continuations(student, tokenizer, prompts)
    given = tokenizer("The first", return_tensors="pt", add_special_tokens=False).input_ids
    written = student.generate(given, attention_mask=torch.ones_like(given), **{**GREEDY, "use_cache": False})
    assert samples[2]["student"] == tokenizer.decode(written[0, given.shape[1] :], skip_special_tokens=True)


def test_a_resumed_run_writes_its_samples_once(watched, tiny_teacher):
    """Cut back to the checkpoint at step 6, as a kill after step 8 would leave it."""
    import shutil

    folder, sources, options, watch = watched
    run = folder / "resumed"
    shutil.copytree(folder / "run", run)
    for name in ("final", "checkpoint-8"):
        shutil.rmtree(run / name)
    assert (run / "checkpoint-6").is_dir()
    assert train.main(runs.flags(tiny_teacher, sources, run, **options, **watch)) == 0
    for name in ("samples.jsonl", "metrics.jsonl"):
        kept, whole = ((place / name).read_text().splitlines() for place in (run, folder / "run"))
        assert len(kept) == len(whole)
    assert (run / "samples.jsonl").read_text() == (folder / "run" / "samples.jsonl").read_text()
