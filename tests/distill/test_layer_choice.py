"""`--layers auto:K`: the greedy ranking against brute force on whole models, and the choice across runs."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

import train
from arguments import parse_arguments
from conftest import tiny_llama_config
from data import Batch
from distill.initialization import calibrate_mixers, student_config, student_from_teacher
from distill.layer_choice import FILE, Hybrid, first_rows, rank_layers
from evaluation.held_out import held_out_figures
from helpers import runs
from model_utils import apply_replacements, as_teacher, transfer_teacher_weights
from models import LlambaForCausalLM
from run.build import auto_choice


def pair(seed: int, *, published: bool = False):
    """A tiny teacher whose layers matter, and a student with all its mixers."""
    torch.manual_seed(seed)
    teacher = as_teacher(LlamaForCausalLM(tiny_llama_config(initializer_range=0.15)))
    if published:
        student = LlambaForCausalLM(student_config(teacher.config))
    else:
        student = student_from_teacher(teacher, dtype=torch.float32, device="cpu")
    transfer_teacher_weights(student, teacher)
    if not published:
        calibrate_mixers(student, teacher, torch.randint(0, 512, (2, 32)))
    return teacher, student.eval()


def text(*, packed: bool) -> Batch:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 512, (2, 33), generator=generator)
    positions, valid = None, torch.ones(2, 32, dtype=torch.bool)
    if packed:
        positions = (torch.arange(32) % 20).expand(2, -1).contiguous()
        valid[:, 19] = False
    return Batch(tokens=tokens, valid=valid, position_ids=positions, document_ids=[])


def brute_force(teacher, student, layers, batch) -> float:
    """KL of a whole model with these layers replaced."""
    whole = copy.deepcopy(student)
    apply_replacements(whole, teacher, layers)
    return held_out_figures(whole, teacher, [batch], 1, torch.device("cpu"))["kl"]


@pytest.mark.parametrize(("seed", "published", "packed"), [(0, False, False), (1, False, True), (2, True, False)])
def test_greedy_ranking_agrees_with_brute_force(seed, published, packed):
    teacher, student = pair(seed, published=published)
    batch = text(packed=packed)
    ranking, kl, alone = rank_layers(Hybrid(teacher, student, batch.tokens, batch.valid, batch.position_ids))
    assert sorted(ranking) == [0, 1, 2, 3] and kl[4] == pytest.approx(0, abs=1e-6)
    expected = [brute_force(teacher, student, [i for i in range(4) if i != index], batch) for index in range(4)]
    assert alone == pytest.approx(expected, rel=1e-4)
    left = {0, 1, 2, 3}
    while left:
        costs = {index: brute_force(teacher, student, sorted(left - {index}), batch) for index in left}
        best = min(costs, key=lambda index: costs[index])
        assert ranking[len(left) - 1] == best
        assert kl[len(left) - 1] == pytest.approx(costs[best], rel=1e-4)
        left.remove(best)


def test_answers_count_as_much_as_everything_else():
    teacher, student = pair(0)
    batch = text(packed=False)
    answers = torch.zeros_like(batch.valid)
    answers[0, 5:9] = True
    rows = batch.tokens, batch.valid, None
    both = Hybrid(teacher, student, *rows, answers)
    alone = [Hybrid(teacher, student, batch.tokens, batch.valid & part, None) for part in (answers, ~answers)]
    for index in range(4):
        expected = [hybrid.kl_with_mixer(index) for hybrid in alone]
        assert both.kl_with_mixer(index) == pytest.approx(sum(expected) / 2, rel=1e-5)
        assert expected[0] != pytest.approx(expected[1], rel=1e-3)


def test_the_first_rows():
    class Loader(list):
        closed = False

        def close(self):
            self.closed = True

    loader = Loader([text(packed=True)] * 3)
    tokens, valid, positions = first_rows(loader, 70)
    assert tokens.shape == (3, 33) and valid.shape == positions.shape == (3, 32) and loader.closed
    assert first_rows(Loader([text(packed=False)]), 1)[0].shape == (1, 33)


def test_a_run_with_its_own_choice(tmp_path, tiny_teacher, documents):
    sources = runs.write_sources(tmp_path / "text", documents)
    options = dict(layers="auto:2", choice_tokens=128, max_steps=3, second_dataset_name="", eval_tokens=128)
    chosen = runs.flags(tiny_teacher, sources, tmp_path / "auto", **options, eval_dataset=sources["heldout"])
    assert train.main(chosen) == 0
    choice = json.loads((tmp_path / "auto" / FILE).read_text())
    assert choice["layers"] == sorted(choice["ranking"][:2]) and choice["tokens"] == 128
    assert (
        json.loads((tmp_path / "auto" / "final" / "config.json").read_text())["attention_layers"] == choice["layers"]
    )
    shown = " ".join(map(str, choice["layers"]))
    assert f"attention layers kept: {shown}\n" in (tmp_path / "auto" / "final" / "README.md").read_text()

    by_hand = runs.flags(tiny_teacher, sources, tmp_path / "hand", **(options | {"layers": choice["layers"]}))
    assert train.main(by_hand) == 0
    assert runs.losses(tmp_path / "auto") == runs.losses(tmp_path / "hand")

    again = runs.flags(tiny_teacher, sources, tmp_path / "again", **options, eval_dataset=sources["heldout"])
    assert train.main(again) == 0
    repeated = json.loads((tmp_path / "again" / FILE).read_text())
    assert repeated | {"seconds": 0} == choice | {"seconds": 0}


def test_a_saved_choice_is_taken_up_only_for_the_same_flags(tmp_path):
    teacher, student = pair(0)
    args = parse_arguments(
        ["--layers", "auto:2", "--output_dir", str(tmp_path), "--choice_tokens", "32", "--choice_recall_share", "0"]
    )

    class Loader(list):
        close = list.clear

    def choose(args):
        loader = Loader([text(packed=False)])
        return auto_choice(
            args, teacher, student, SimpleNamespace(choice_loader=lambda: loader, choice_sequences=None)
        )

    found = choose(args)
    saved = json.loads((tmp_path / FILE).read_text())
    other = sorted({0, 1, 2, 3} - set(found))
    (tmp_path / FILE).write_text(json.dumps(saved | {"layers": other}))
    assert choose(args) == other
    for name, value in (("seed", 1), ("expand", 2)):
        (tmp_path / FILE).write_text(json.dumps(saved | {"layers": other}))
        setattr(args, name, value)
        assert choose(args) == found
        setattr(args, name, saved["made_for"][name])
    (tmp_path / FILE).write_text("{")
    assert choose(args) == found
