"""Several sources in one stage: shares come out, the order is one for all ranks, and a resume is exact."""

import itertools
import json

import pytest

import train
from data import SourceSpec, build_loader, estimate_steps_per_epoch
from helpers import runs
from model_utils import get_tokenizer
from text.mixture import MixedSpec, source_shares

LENGTH = 48
SHARES = {"other": 0.2, "recall": 0.3}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return get_tokenizer(str(tokenizer_dir))


@pytest.fixture(scope="module")
def make(tokenizer, sources):
    """A loader of the training text with held-out text (20%) and generated text (30%) beside it."""

    def loader(shares=SHARES, **options):
        options = {"batch_size": 2, "prefetch": 0, "seq_length": LENGTH, **options}
        kinds = {"other": SourceSpec(str(sources["heldout"]), shuffle_buffer=0), "recall": None}
        mixed = [MixedSpec(name, share, kinds[name]) for name, share in shares.items()]
        main = SourceSpec(str(sources["train"]), shuffle_buffer=7)
        return build_loader(main, tokenizer, mixed=mixed, **options)

    return loader


def taken(loader, count):
    return [row for batch in itertools.islice(loader, count) for row in batch.tokens.tolist()]


def test_shares_come_out_to_a_sequence_at_every_point(make):
    loader = make(batch_size=1)
    for number, _ in enumerate(itertools.islice(loader, 60), 1):
        shares = source_shares(loader.state_dict())
        assert all(abs(shares[name] - share) * number <= 1 for name, share in SHARES.items()), (number, shares)
    assert shares == {"main": 0.5, "other": 0.2, "recall": 0.3}
    assert loader.stats["sequences"] == 60 and loader.stats["tokens"] >= 60 * (LENGTH + 1)


def test_each_source_gives_what_it_gives_alone(make):
    mixed, alone = taken(make(), 50), taken(make({}), 50)
    generated = [row for row in taken(make({"recall": 0.9}), 50) if row not in alone]
    assert [row for row in mixed if row in alone] == alone[:50]
    assert [row for row in mixed if row in generated] == generated[:30]


def test_every_number_of_ranks_reads_the_same_order(make):
    whole = taken(make(batch_size=6), 10)
    ranks = [make(batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    steps = zip(*(itertools.islice(iter(loader), 10) for loader in ranks))
    assert [row for step in steps for batch in step for row in batch.tokens.tolist()] == whole


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resume_gives_what_would_have_come(make, prefetch):
    whole = taken(make(), 40)
    for at in (1, 2, 3, 11, 39):
        first = make(prefetch=prefetch)
        taken(first, at)
        state = json.loads(json.dumps(first.state_dict()))
        second = make(batch_size=1, prefetch=prefetch)
        second.load_state_dict(state)
        assert taken(second, 2 * (40 - at)) == whole[2 * at :]
        assert second.stats["sequences"] == 80


def test_other_shares_go_on_where_each_source_was(make):
    first = make()
    taken(first, 20)
    state = json.loads(json.dumps(first.state_dict()))
    second = make({"recall": 0.5}, batch_size=1)
    second.load_state_dict(state)
    rows, before = taken(second, 20), taken(make(), 20)
    assert not [row for row in rows if row in before]
    later = taken(make(), 60)
    assert sum(row in later for row in rows) == 20
    alone = make({}, batch_size=1)
    alone.load_state_dict(state)
    assert taken(alone, 10) == [row for row in rows if row in taken(make({}), 60)][:10]
    plain = make({})
    taken(plain, 5)
    begun = make({"recall": 0.5}, batch_size=1)
    begun.load_state_dict(json.loads(json.dumps(plain.state_dict())))
    assert taken(begun, 20)[::2] == taken(make({}), 10)[10:20]


def test_the_pass_over_the_main_source_ends_the_mixture(make):
    ended, alone = list(make(epochs=1, batch_size=1)), list(make({}, epochs=1, batch_size=1))
    assert abs(len(ended) - 2 * len(alone)) <= 2
    assert sum(batch.valid.sum().item() < LENGTH for batch in ended) == 1  # the last of the pass, filled up


def test_a_pass_is_estimated_longer_by_what_is_mixed_in(sources, tokenizer):
    options = dict(seq_length=LENGTH)
    spec = SourceSpec(str(sources["train"]))
    plain = estimate_steps_per_epoch(spec, tokenizer, sequences_per_step=2, **options)
    mixed = estimate_steps_per_epoch(spec, tokenizer, sequences_per_step=2 * 0.5, **options)
    assert abs(mixed - 2 * plain) <= 1


@pytest.mark.slow
def test_a_run_with_a_mixture_is_resumed_bit_for_bit_and_with_other_shares_by_force(
    tiny_teacher, sources, tmp_path, capfd
):
    flags = dict(
        mix=[f"{sources['heldout']}=0.25"], recall_share=0.25, second_mix=["recall=0.5"], hidden_tokens=512,
        save_interval=5, keep_checkpoints=9, layers="auto:1", choice_tokens=256,
    )  # fmt: skip
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train.main(runs.flags(tiny_teacher, sources, whole, **flags)) == 0
    runs.copy_up_to(whole, "checkpoint-9", part)
    assert train.main(runs.flags(tiny_teacher, sources, part, **flags)) == 0
    assert runs.bits(part / "final") == runs.bits(whole / "final") and runs.losses(part) == runs.losses(whole)
    stage1 = [row for row in runs.metrics(whole) if row.get("stage") == "stage1"][-1]
    assert stage1[f"data/share/{sources['heldout']}"] == stage1["data/share/recall"] == 0.25
    stage2 = [row for row in runs.metrics(whole) if row.get("stage") == "stage2"][-1]
    assert stage2["data/share/recall"] == 0.5 and f"data/share/{sources['heldout']}" not in stage2
    other = tmp_path / "other"
    runs.copy_up_to(whole, "checkpoint-9", other)
    changed = {**flags, "mix": ["recall=0.5"]}
    capfd.readouterr()
    assert train.main(runs.flags(tiny_teacher, sources, other, **changed)) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "--mix was" in error and "--resume_force" in error
    assert train.main(runs.flags(tiny_teacher, sources, other, **changed, resume_force=True)) == 0
    assert runs.losses(other)[:9] == runs.losses(whole)[:9] and runs.losses(other)[9:] != runs.losses(whole)[9:]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"mix": ["x"]}, "argument --mix: 'x' is not NAME[:SUBSET[:SPLIT[:FIELD]]]=SHARE"),
        ({"mix": ["recall=1"]}, "'recall=1' is not NAME"),
        ({"mix": ["a:b:c:d:e=0.1"]}, "'a:b:c:d:e=0.1' is not NAME"),
        ({"mix": ["a=0.1", "a=0.2"]}, "--mix: a is named twice"),
        ({"mix": ["a=0.6"], "recall_share": 0.4}, "--mix: the shares (a 0.6, recall 0.4) leave nothing"),
        ({"second_mix": ["a=0.6", "recall=0.4"]}, "--second_mix: the shares (a 0.6, recall 0.4) leave nothing"),
        ({"mix": ["{train}:no=0.1"]}, "--mix {train}:no: subset no: {train} is a file"),
        ({"mix": ["/not/there=0.1"]}, "/not/there: no such file or folder"),
    ],
)
def test_a_mistake_is_one_line(tiny_teacher, sources, tmp_path, capsys, flags, words):
    fill = lambda text: text.replace("{train}", str(sources["train"]))  # noqa: E731
    flags = {name: [fill(v) for v in value] if isinstance(value, list) else value for name, value in flags.items()}
    try:
        status = train.main(runs.flags(tiny_teacher, sources, tmp_path / "out", **flags))
    except SystemExit as error:
        status = error.code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert status == 2 and fill(words) in line
