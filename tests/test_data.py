"""Packing, order, state, ranks: what the loader gives is exact, whole and the same however it is run."""

import gzip
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data import SourceSpec, build_loader

LENGTH = 32


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
def test_resume_gives_the_uninterrupted_batches(folder, tokenizer, streaming, prefetch, monkeypatch, tmp_path):
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
