"""A document starts as the tokenizer itself starts a text; runs begun before this rule go on without."""

import functools
import itertools
import json
import shutil

import pytest
import torch

import train
from checkpoints.origins import Origins
from data import SourceSpec, build_loader
from evaluation.diagnostics import continuations
from evaluation.recall import forced_answers
from evaluation.recall_tasks import RecallRow
from helpers import checkpoint_tools, runs
from text import documents as module
from text.documents import DocumentEncoder
from text.text_sources import TEXT_VERSION
from utils import UserError

OPTIONS = dict(max_steps=2, save_interval=1, second_dataset_name="", eval_interval=2, keep_checkpoints=9)


@pytest.fixture(scope="module")
def bos_teacher(tmp_path_factory, tiny_teacher):
    """The tiny teacher with a tokenizer that puts its BOS before every text, as Llama 3's does."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bos") / "teacher"
    shutil.copytree(tiny_teacher, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(bos_teacher):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bos_teacher)
    assert tokenizer("text").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


def loader(sources, tokenizer, *, version=TEXT_VERSION, prefetch=0, **options):
    spec = SourceSpec(str(sources["train"]), shuffle_buffer=options.pop("shuffle_buffer", 7), version=version)
    options = {"seq_length": 32, "batch_size": 2, "epochs": 1, "prefetch": prefetch, **options}
    return build_loader(spec, tokenizer, **options)


def flat(batches) -> list[int]:
    return torch.cat([batch.tokens.flatten() for batch in batches]).tolist()


def test_what_a_tokenizer_adds_at_the_end_is_no_part_of_a_start(tokenizer):
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    both = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>")
    start, *_, end = both("some text").input_ids
    segments = list(DocumentEncoder(both).segments("some text"))
    assert segments[0].tolist() == [start] and segments[-1].tolist() != [end]


def test_packed_text_is_what_the_tokenizer_makes_of_each_document(sources, tokenizer, documents, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 50)  # a document in many pieces still starts once
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    expected = [token for text in documents[10:60] for token in [*tokenizer(text).input_ids, separator]]
    found = flat(loader(sources, tokenizer, shuffle_buffer=0))
    assert found[: len(expected)] == expected


def test_a_start_is_predicted_from_no_other_document(sources, tokenizer):
    bos, started = tokenizer.bos_token_id, 0
    for batch in itertools.islice(loader(sources, tokenizer, document_reset=True), 400):
        starts = (batch.tokens == bos)[:, :-1]
        assert (batch.position_ids[starts] == 0).all()
        assert not batch.valid[(batch.tokens == bos)[:, 1:]].any()
        started += int(starts.sum())
    assert started > 10


@pytest.mark.parametrize("version", [1, TEXT_VERSION])
def test_any_state_resumes_with_the_documents_of_its_version(sources, tokenizer, version):
    """The new loader knows nothing of the old rule until it is given an old state."""
    whole = list(loader(sources, tokenizer, version=version))
    assert (tokenizer.bos_token_id in flat(whole)) == (version > 1)
    for taken in range(1, 60, 3):
        first = loader(sources, tokenizer, version=version)
        list(itertools.islice(first, taken))
        state = json.loads(json.dumps(first.state_dict()))
        second = loader(sources, tokenizer)
        second.load_state_dict(state)
        rest = itertools.islice(second, 30)
        assert all(a.tokens.equal(b.tokens) for a, b in zip(rest, whole[taken : taken + 30], strict=True))
        assert second.state_dict()["version"] == version


def test_a_state_of_the_future_is_one_line(sources, tokenizer):
    state = loader(sources, tokenizer).state_dict()
    with pytest.raises(UserError, match="saved by a newer version"):
        loader(sources, tokenizer).load_state_dict({**state, "version": TEXT_VERSION + 1})


class Echo:
    """Remembers the prompts that a model is given."""

    training, device = False, torch.device("cpu")

    def __init__(self):
        self.given = []

    def eval(self):
        return self

    train = lambda self, mode: self  # noqa: E731

    def generate(self, given, **options):
        self.given.append(given[0].tolist())
        return given

    def __call__(self, input_ids, logits_to_keep, **options):
        self.given.append(input_ids[0].tolist())
        return type("Output", (), {"logits": torch.zeros(1, logits_to_keep, 512)})


def test_samples_and_recall_start_in_the_same_way(tokenizer):
    model = Echo()
    continuations(model, tokenizer, ["The first"])
    forced_answers(model, tokenizer, [RecallRow("The first", " word")], torch.device("cpu"))
    assert model.given == [tokenizer("The first").input_ids, tokenizer("The first word").input_ids[:-1]]


@pytest.mark.slow
def test_a_run_begun_before_goes_on_as_it_was_made(tmp_path, bos_teacher, sources, monkeypatch):
    """Its training text, its mixers' calibration and its held-out figures; a new run of the same flags differs."""
    flags = dict(OPTIONS, eval_dataset=sources["heldout"], eval_tokens=128, hidden_tokens=256, diagnostics_interval=0)
    line = lambda name: runs.flags(bos_teacher, sources, tmp_path / name, **flags)  # noqa: E731
    with monkeypatch.context() as before:
        before.setattr("run.beginning.Origins", functools.partial(Origins, text_version=1))
        assert train.main(line("old")) == 0
    runs.copy_up_to(tmp_path / "old", "checkpoint-1", tmp_path / "resumed")
    checkpoint_tools.edit_metadata(tmp_path / "resumed" / "checkpoint-1", lambda found: found.pop("text_version"))
    assert train.main(line("resumed")) == 0
    assert runs.losses(tmp_path / "resumed") == runs.losses(tmp_path / "old")
    assert held_out(tmp_path / "resumed") == held_out(tmp_path / "old")
    metadata = json.loads((tmp_path / "resumed" / "final" / "training_state.json").read_text())
    assert metadata["text_version"] == 1
    assert train.main(line("new")) == 0
    assert runs.losses(tmp_path / "old") != runs.losses(tmp_path / "new")


def held_out(run):
    return [row["eval/kl"] for row in runs.metrics(run) if "eval/kl" in row]
