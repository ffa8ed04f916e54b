"""Held-out text has flags and checks of its own, and no layers are chosen on it."""

import itertools

import pytest

import train
from arguments import parse_arguments
from checkpoints.origins import Origins
from distill.layer_choice import first_rows
from helpers import runs
from model_utils import get_tokenizer
from run.text import RunText
from utils import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher):
    return get_tokenizer(str(tiny_teacher))


@pytest.fixture
def text(tiny_teacher, tokenizer, sources, tmp_path):
    """Make the RunText of a run with these flags."""

    def make(origins=None, **changes):
        argv = runs.flags(tiny_teacher, sources, tmp_path / "out", **{"eval_dataset": sources["heldout"], **changes})
        return RunText(parse_arguments(argv), tokenizer, origins=origins or Origins())

    return make


@pytest.fixture
def folder(tmp_path, documents):
    """Held-out text in a subset, a split and a column of its own."""
    place = tmp_path / "held" / "part"
    place.mkdir(parents=True)
    for split, texts in (("train", documents[:2]), ("test", documents[2:4])):
        runs.write_rows(place / f"{split}.jsonl.gz", [{"body": text, "text": None} for text in texts])
    return place.parent


def start(loader) -> list[int]:
    return next(iter(loader)).tokens[0].tolist()


def test_it_has_a_subset_a_split_and_a_column_of_its_own(text, folder, tokenizer, documents):
    own = dict(eval_dataset_subset="part", eval_dataset_split="test", eval_dataset_text_field="body")
    found = start(text(eval_dataset=folder, **own).held_out_loader())
    assert found == tokenizer(documents[2]).input_ids[:65]
    for flag, value in (("subset", "no"), ("split", "no"), ("text_field", "no")):
        with pytest.raises(UserError, match=r"--eval_dataset_subset no|--eval_dataset_split no|no column no"):
            text(eval_dataset=folder, **{**own, f"eval_dataset_{flag}": value}).held_out_loader()


def test_a_run_begun_before_goes_on_with_stage_1s_subset_and_split(text, folder, tokenizer, documents):
    flags = dict(eval_dataset=folder, eval_dataset_text_field="body", dataset_subset="part", dataset_split="test")
    before = text(Origins(text_version=1), **flags, document_reset=True).held_out_loader()
    assert start(before) == tokenizer(documents[2]).input_ids[:65]
    assert next(iter(before)).position_ids is None
    flags |= dict(dataset_subset="elsewhere", dataset_split="train")  # was passed over where it was not there
    assert start(text(Origins(text_version=1), **flags).held_out_loader()) == tokenizer(documents[0]).input_ids[:65]


def test_every_evaluation_has_the_same_batches_with_documents_apart(text, tokenizer):
    run = text(document_reset=True)
    first = list(run.held_out_loader())
    list(itertools.islice(run.held_out_loader(), 2))
    again = list(run.held_out_loader())
    assert len(first) == len(again) > 5
    assert all(a.tokens.equal(b.tokens) and a.valid.equal(b.valid) for a, b in zip(first, again))
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ends = sum(int((batch.tokens[:, :-1] == separator).sum()) for batch in first)
    starts = sum(int((batch.position_ids[:, 1:] == 0).sum()) for batch in first)
    assert 0 < starts <= ends


def test_bad_rows_are_treated_as_the_flag_says(text, tmp_path, documents):
    row = f'{{"text": "{"word " * 500}"}}\n'
    (tmp_path / "bad.jsonl").write_text(row + "{broken\n" + row)
    assert list(text(eval_dataset=tmp_path / "bad.jsonl", on_bad_data="skip").held_out_loader())
    with pytest.raises(UserError, match=r"bad.jsonl: line 2 \(byte \d+\): not JSON"):
        list(text(eval_dataset=tmp_path / "bad.jsonl").held_out_loader())


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(eval_dataset="{tmp}/none"), "{tmp}/none: no such file or folder"),
        (dict(eval_dataset_subset="no"), "--eval_dataset_subset no: {heldout} is a file"),
        (dict(eval_dataset="{train}", layers="auto:2"), "of which {train} is in --eval_dataset {train} too"),
        (dict(choice_dataset="{heldout}", layers="auto:2"), "auto:K chooses on --choice_dataset {heldout}"),
        (dict(choice_dataset="{tmp}/none", layers="auto:2"), "{tmp}/none: no such file or folder"),
        (dict(choice_dataset="{heldout}"), "--choice_dataset needs --layers auto:K"),
    ],
)
def test_mistakes_are_found_before_models_are_loaded(
    tiny_teacher, sources, tmp_path, capsys, monkeypatch, flags, words
):
    names = {**sources, "tmp": tmp_path}
    changes = {"eval_dataset": "{heldout}", **flags}
    argv = runs.flags(tiny_teacher, sources, tmp_path / "out", **{k: v.format(**names) for k, v in changes.items()})
    monkeypatch.setattr("run.build.get_teacher_model", lambda *args, **options: pytest.fail("models are loaded"))
    assert train.main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert words.format(**names) in line


def test_layers_are_chosen_on_training_text(text, sources, tokenizer, documents):
    run = text(layers="auto:2")
    run.check_choice()
    tokens, *_ = first_rows(run.choice_loader(), 256)
    assert tokens.equal(first_rows(run.loader("stage1"), 256)[0])
    other = text(layers="auto:2", choice_dataset=sources["conversations"], shuffle_buffer=0)
    other.check_choice()
    assert tokenizer.decode(start(other.choice_loader())).startswith("<|im_start|>user\nWhat is topic 0?")
