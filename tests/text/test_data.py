"""Packing, order, state, ranks: what the loader gives is exact, whole and the same however it is run."""

import gzip
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import data
from conftest import ROOT
from data import BadData, PackedTextDataset, SourceSpec, build_loader, estimate_steps_per_epoch, estimate_tokens
from text.blocks import draw_order
from utils import UserError

SHARED = ROOT.parent / "shared" / "data"
LENGTH = 32


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Sources that are loaded at once go to a folder of this test run."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def texts(documents) -> list[str]:
    """300 short documents of a few sentences."""
    lines = [line.strip() for text in documents for line in text.splitlines() if len(line.strip()) > 40]
    return [" ".join(lines[i : i + 1 + i % 3]) for i in range(0, 900, 3)]


def write_jsonl(path: Path, texts, compressed=False) -> Path:
    opener = gzip.open if compressed else open
    with opener(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return path


def write_parquet(path: Path, texts, group=20, column="text") -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=group)
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory, texts) -> Path:
    """Three files in three formats, 100 documents each."""
    folder = tmp_path_factory.mktemp("source")
    write_parquet(folder / "a.parquet", texts[:100])
    write_jsonl(folder / "b.jsonl", texts[100:200])
    write_jsonl(folder / "c.jsonl.gz", texts[200:], compressed=True)
    return folder


def loader(folder, tokenizer, *, batch_size=2, **options):
    spec_names = set(SourceSpec.__dataclass_fields__)
    spec = {name: options.pop(name) for name in list(options) if name in spec_names}
    spec = {"shuffle_buffer": 37, **spec}
    return build_loader(
        SourceSpec(str(folder), **spec),
        tokenizer,
        seq_length=options.pop("seq_length", LENGTH),
        batch_size=batch_size,
        **{"prefetch": 0, "epochs": 1, **options},
    )


def rows(batches) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens.tolist()]


def same(first, second) -> bool:
    return first.tokens.equal(second.tokens) and first.valid.equal(second.valid)


def test_sequences_are_the_documents_joined_and_cut(folder, texts, tokenizer):
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    expected = []
    for text in texts:
        expected += [*tokenizer.encode(text, add_special_tokens=False), separator]
    batches = list(loader(folder, tokenizer, shuffle_buffer=0))
    found = list(itertools.chain.from_iterable(rows(batches)))
    assert found[: len(expected)] == expected
    assert sum(batch.valid.sum().item() for batch in batches) == len(expected) - -(-len(expected) // (LENGTH + 1))


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_gives_the_uninterrupted_batches(folder, tokenizer, streaming, prefetch):
    options = dict(streaming=streaming, prefetch=prefetch, epochs=2)
    whole = list(loader(folder, tokenizer, **options))
    for taken in range(1, len(whole), 29):
        first = loader(folder, tokenizer, **options)
        begun = list(itertools.islice(first, taken))
        state = json.loads(json.dumps(first.state_dict()))
        second = loader(folder, tokenizer, **options)
        second.load_state_dict(state)
        rest = list(itertools.islice(second, 40))
        expected = whole[: taken + 40]
        assert len(begun + rest) == len(expected)
        assert all(same(a, b) for a, b in zip(begun + rest, expected))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_one_order(folder, tokenizer, world):
    alone = rows(loader(folder, tokenizer, batch_size=1))
    ranks = [list(loader(folder, tokenizer, rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    together = [row for step in zip(*ranks) for row in rows(step)]
    valid = torch.cat([batch.valid for step in zip(*ranks) for batch in step])
    assert together[: len(alone)] == alone
    assert not valid[len(alone) :].any()


@pytest.mark.parametrize("streaming", [True, False])
def test_every_epoch_has_all_documents_in_a_new_order(folder, texts, tokenizer, streaming):
    given = loader(folder, tokenizer, streaming=streaming, epochs=3)
    tokens = torch.cat([batch.tokens.flatten() for batch in given])
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ends = (tokens == separator).nonzero().flatten()[: 3 * len(texts)].tolist()
    found = [tokenizer.decode(tokens[begin:end]) for begin, end in zip([0, *(end + 1 for end in ends[:-1])], ends)]
    epochs = [found[i * len(texts) : (i + 1) * len(texts)] for i in range(3)]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert given.stats["documents"] == 3 * len(texts)
    again = torch.cat([batch.tokens.flatten() for batch in loader(folder, tokenizer, streaming=streaming, epochs=3)])
    other = loader(folder, tokenizer, streaming=streaming, epochs=3, seed=43)
    assert tokens.equal(again) and not tokens.equal(torch.cat([batch.tokens.flatten() for batch in other]))


def test_the_order_is_the_same_on_every_machine():
    assert draw_order(8, 42, 0, 1).tolist() == [6, 1, 5, 0, 4, 2, 7, 3]
    assert sorted(draw_order(1000, 1).tolist()) == list(range(1000))


@pytest.mark.parametrize("world", [1, 4])
def test_a_run_of_two_ranks_goes_on_with_another_number(folder, tokenizer, world):
    alone = rows(loader(folder, tokenizer, batch_size=1, epochs=2))
    pair = [loader(folder, tokenizer, rank=rank, world_size=2, epochs=2) for rank in range(2)]
    for rank in pair:
        list(itertools.islice(rank, 7))
    states = [rank.state_dict() for rank in pair]
    assert states[0] == states[1] and states[0]["sequences"] == 28
    ranks = [loader(folder, tokenizer, rank=rank, world_size=world, batch_size=3, epochs=2) for rank in range(world)]
    for rank in ranks:
        rank.load_state_dict(states[0])
    together = [row for step in zip(*ranks) for row in rows(step)]
    assert together[: len(alone) - 28] == alone[28:]


def test_an_exhausted_loader_stays_exhausted_and_endless_goes_on(folder, tokenizer):
    once = loader(folder, tokenizer)
    assert list(once) and not list(once)
    more = loader(folder, tokenizer)
    more.load_state_dict(once.state_dict())
    assert not list(more)
    endless = loader(folder, tokenizer, epochs=None, prefetch=2)
    assert len(list(itertools.islice(endless, 2000))) == 2000
    endless.close()
    assert len(json.dumps(endless.state_dict())) < 500


def test_the_state_belongs_to_its_source_and_order(folder, tokenizer, tmp_path, texts):
    state = loader(folder, tokenizer).state_dict()
    with pytest.raises(UserError, match="--seed"):
        loader(folder, tokenizer, seed=1).load_state_dict(state)
    write_jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(UserError, match="files are not those"):
        loader(tmp_path, tokenizer).load_state_dict(state)


def test_document_reset_numbers_each_document(folder, tokenizer):
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for batch in itertools.islice(loader(folder, tokenizer, document_reset=True, batch_size=3), 60):
        for tokens, valid, positions in zip(batch.tokens, batch.valid, batch.position_ids):
            expected, place = [], 0
            for token in tokens.tolist():
                expected.append(place)
                place = 0 if token == separator else place + 1
            assert positions.tolist() == expected[:-1]
            assert valid.tolist() == [next_place != 0 for next_place in expected[1:]]
    assert loader(folder, tokenizer).dataset and next(iter(loader(folder, tokenizer))).position_ids is None


@pytest.fixture
def flawed(tmp_path, texts) -> Path:
    lines = [json.dumps({"text": text}) for text in texts[:40]]
    lines[10:10] = [
        '{"text": ""}',
        '{"text": null}',
        "{broken",
        '{"text": 3}',
        '{"text": "\\ud800"}',
        '{"text": " \\n"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_bad_rows_are_skipped_and_counted(flawed, tokenizer, streaming, prefetch, caplog):
    given = loader(flawed, tokenizer, on_bad_data="skip", streaming=streaming, prefetch=prefetch)
    tokens = sum(batch.valid.sum().item() for batch in given)
    assert tokens > 500
    assert {name: given.stats[name] for name in ("documents", "skipped_empty", "bad")} == {
        "documents": 40,
        "skipped_empty": 3,
        "bad": 3,
    }
    assert "a.jsonl: line 13" in caplog.text and "a.jsonl:14: the column holds int" in caplog.text


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_bad_row_is_an_error_where_it_stands(flawed, tokenizer, prefetch):
    given = loader(flawed, tokenizer, shuffle_buffer=0, prefetch=prefetch)
    taken = []
    with pytest.raises(BadData, match=r"a.jsonl: line 13 \(byte \d+\): not JSON"):
        taken.extend(given)
    whole = list(loader(flawed, tokenizer, shuffle_buffer=0, on_bad_data="skip"))
    assert 3 < len(taken) < len(whole)
    assert all(same(a, b) for a, b in zip(taken, whole))


def test_mistakes_are_found_before_training(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", ["Too short."])
    with pytest.raises(UserError, match=r"no column body; its columns are: text"):
        loader(tmp_path, tokenizer, text_field="body")
    with pytest.raises(UserError, match=r"tokens in all, fewer than one sequence of 33"):
        loader(tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"tokens in all, fewer than one sequence"):
        loader(tmp_path, tokenizer, epochs=None, streaming=False)
    write_jsonl(tmp_path / "a.jsonl", ["", " "])
    with pytest.raises(UserError, match=r"empty dataset"):
        loader(tmp_path, tokenizer)


def test_a_worker_that_fails_tells_the_consumer(folder, tokenizer, monkeypatch):
    given = loader(folder, tokenizer, prefetch=2, epochs=None)
    batches = iter(given)
    next(batches)

    def fail(*args):
        raise RuntimeError("the tokenizer broke")

    monkeypatch.setattr(given.dataset.encoder, "encode", fail)
    with pytest.raises(RuntimeError, match="the tokenizer broke"):
        for _ in range(5000):
            next(batches)


def test_closing_ends_the_threads(folder, tokenizer):
    def running() -> int:
        return sum(thread.name == "data" for thread in threading.enumerate())

    before = running()
    given = loader(folder, tokenizer, prefetch=2, epochs=None)
    assert running() == before  # nothing runs before it is asked for
    batches = iter(given)
    next(batches)
    assert running() == before + 3  # reading, tokenising, packing
    given.close()
    assert running() == before
    list(itertools.islice(given, 3))  # a dropped iterator closes too
    assert running() == before


def test_a_process_ends_with_a_loader_in_use(folder, tokenizer_dir):
    code = (
        f"from transformers import AutoTokenizer\nfrom data import *\n"
        f"t = AutoTokenizer.from_pretrained({str(tokenizer_dir)!r})\n"
        f"b = iter(build_loader(SourceSpec({str(folder)!r}), t, seq_length=32, batch_size=1))\nnext(b)\nprint('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_waiting_consumer_can_be_asked_to_stop(folder, tokenizer, monkeypatch):
    given = loader(folder, tokenizer, prefetch=2)
    forever = threading.Event()
    monkeypatch.setattr(given.dataset.encoder, "encode", lambda texts: forever.wait(30))
    given.stop_requested = lambda: True
    assert not list(given)
    forever.set()


@pytest.mark.parametrize("name", ["a.parquet", "b.jsonl", "c.jsonl.gz"])
def test_the_estimate_of_an_epoch(folder, tokenizer, name):
    given = loader(folder / name, tokenizer)
    list(given)
    assert estimate_tokens(SourceSpec(str(folder / name)), tokenizer) == pytest.approx(
        given.stats["tokens"], rel=0.01
    )
    steps = estimate_steps_per_epoch(SourceSpec(str(folder / name)), tokenizer, seq_length=32, sequences_per_step=4)
    assert steps == pytest.approx(given.stats["sequences"] / 4, abs=2)


@pytest.mark.slow
def test_the_estimate_holds_when_only_a_sample_is_read(documents, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SAMPLED_CHARACTERS", 1 << 17)
    texts = [text[i : i + 700] for text in documents for i in range(0, len(text), 700)]
    texts = [texts[i] for i in draw_order(len(texts), 0)]
    expected = sum(len(tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts)
    for name in ("a.parquet", "b.jsonl", "c.jsonl.gz"):
        path = tmp_path / name
        write_parquet(path, texts) if name == "a.parquet" else write_jsonl(path, texts, name.endswith("gz"))
        assert estimate_tokens(SourceSpec(str(path)), tokenizer) == pytest.approx(expected, rel=0.1)


def test_sequences_without_a_loader(folder, tokenizer):
    dataset = PackedTextDataset(SourceSpec(str(folder), shuffle_buffer=37), tokenizer, seq_length=LENGTH, epochs=1)
    first = list(itertools.islice(dataset, 30))
    state = dataset.state_dict()
    rest = list(dataset)
    expected = [row for batch in loader(folder, tokenizer, batch_size=1) for row in batch.tokens]
    assert all(s.tokens.equal(e) for s, e in zip(first + rest, expected)) and len(first + rest) == len(expected)
    again = PackedTextDataset(SourceSpec(str(folder), shuffle_buffer=37), tokenizer, seq_length=LENGTH, epochs=1)
    again.load_state_dict(state)
    assert all(a.tokens.equal(b.tokens) for a, b in zip(again, rest))


def test_conversations_resume_exactly(tokenizer):
    if not (SHARED / "hermes_like").exists():
        pytest.skip("no shared test corpus here")
    options = dict(shuffle_buffer=100, prefetch=2, seq_length=256)
    whole = list(itertools.islice(loader(SHARED / "hermes_like", tokenizer, **options), 90))
    first = loader(SHARED / "hermes_like", tokenizer, **options)
    list(itertools.islice(first, 61))
    second = loader(SHARED / "hermes_like", tokenizer, **options)
    second.load_state_dict(first.state_dict())
    assert all(same(a, b) for a, b in zip(itertools.islice(second, 29), whole[61:]))


@pytest.mark.slow
@pytest.mark.parametrize("taken", [500, 3500])
def test_resume_with_more_documents_than_the_buffer(tokenizer, taken):
    """What the datasets library loses: a shuffle buffer of 1,000 in a stream of 13,000 documents."""
    source = SHARED / "fineweb_like" / "CC-MAIN-2014-49"
    if not source.exists():
        pytest.skip("no shared test corpus here")
    options = dict(shuffle_buffer=1000, prefetch=2, seq_length=2048)
    whole = loader(source, tokenizer, **options)
    state, expected = {}, []
    for number, batch in enumerate(whole, 1):
        if number == taken // 2:
            state = whole.state_dict()
        if number > taken // 2:
            expected.append(batch)
        if len(expected) == 50:
            break
    whole.close()
    second = loader(source, tokenizer, **options)
    second.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(itertools.islice(second, 50), expected))


READ_AND_TELL_PEAK = """
import re, sys
from transformers import AutoTokenizer
from data import SourceSpec, build_loader
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
loader = build_loader(SourceSpec(sys.argv[1]), tokenizer, seq_length=8192, batch_size=4, epochs=1, prefetch=8)
for number, batch in enumerate(loader):
    if number == 60:
        break
peak = re.search("VmHWM:\\\\s*([0-9]+) kB", open("/proc/self/status").read())[1]  # ru_maxrss has the parent's in it
print(loader.stats["tokens"], int(peak) >> 10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind, most", [("parquet", 300), ("jsonl", 240)])
def test_a_document_of_100_mb_is_no_memory_spike(tmp_path, tokenizer_dir, documents, kind, most):
    """Peaks of real processes, in MiB above that of the same text in documents of 40 kB."""
    text = " ".join(documents)
    text = (text * (100_000_000 // len(text) + 1))[:100_000_000]
    peaks = {}
    for name, rows in {
        "small": [text[at : at + 40_000] for at in range(0, 8_000_000, 40_000)],
        "huge": ["a first one", text, "a last one"],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        if kind == "parquet":
            pq.write_table(pa.table({"text": rows}), folder / "a.parquet")
        else:
            (folder / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        command = [sys.executable, "-c", READ_AND_TELL_PEAK, str(folder), str(tokenizer_dir)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        tokens, peaks[name] = map(int, done.stdout.split())
        assert tokens > 1_500_000
    print(kind, peaks)
    assert peaks["huge"] - peaks["small"] < most
