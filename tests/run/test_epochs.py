"""`--epochs`: the text's end ends the stage, with an evaluation; a plan that was too short is said and stretched."""

import itertools
import json
import re
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import train
from data import SourceSpec, build_loader, estimate_tokens
from helpers import runs
from loop.forms import Progress
from optim.schedule import Phases, build_schedule
from optim.stretch import last_step, planned_step
from text import blocks
from trainer import _expect, _is_news
from utils import format_line


@pytest.fixture
def tokenizer(tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture
def even(tmp_path, documents):
    """Text in documents of a size, in a folder of four files of three formats."""
    text = " ".join(documents)
    texts = [text[at : at + 300] for at in range(0, 300 * 400, 300)]
    folder = tmp_path / "even"
    folder.mkdir()
    for number, name in enumerate(("a.parquet", "b.jsonl", "c.jsonl.gz", "d.parquet")):
        part = texts[100 * number : 100 * number + 100]
        if name.endswith("parquet"):
            pq.write_table(pa.table({"text": part}), folder / name, row_group_size=30, compression="none")
        elif name.endswith("gz"):
            runs.write_rows(folder / name, [{"text": each} for each in part])
        else:
            (folder / name).write_text("".join(json.dumps({"text": each}) + "\n" for each in part))
    return folder


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("shuffle_buffer", [7, 60, 10_000])
def test_the_state_knows_the_share_of_the_text_that_lies_behind(
    even, tokenizer, tmp_path, monkeypatch, streaming, shuffle_buffer
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(blocks, "TABLE_BLOCK", 64)
    spec = SourceSpec(
        str(even / "b.jsonl" if streaming else even), streaming=streaming, shuffle_buffer=shuffle_buffer
    )
    make = lambda: build_loader(spec, tokenizer, seq_length=64, batch_size=2, epochs=2, prefetch=0)  # noqa: E731
    loader = make()
    states = [loader.state_dict() for _ in loader]
    shares = [state["share"] for state in states]
    assert shares == sorted(shares) and shares[-1] == 1
    for number, share in enumerate(shares, 1):
        assert share == pytest.approx(number / len(shares), abs=0.03)
    for taken in range(1, len(states) - 1, 7):
        second = make()
        second.load_state_dict(states[taken - 1])
        assert next(iter(second)) and second.state_dict() == states[taken]


def test_shares_of_compressed_files_and_row_groups(even, tokenizer):
    """By stored bytes, so files of other formats weigh otherwise; in each it goes on evenly."""
    spec = SourceSpec(str(even), shuffle_buffer=7)
    loader = build_loader(spec, tokenizer, seq_length=64, batch_size=2, epochs=1, prefetch=0)
    shares = [loader.state_dict()["share"] for _ in loader]
    assert shares == sorted(shares) and shares[-1] == 1
    assert max(after - before for before, after in itertools.pairwise(shares)) < 0.05


def test_arrow_streams_tell_how_long_they_are(even, tokenizer, tmp_path):
    """Local ones, also a damaged one up to its damage; their pass is estimated in rows, as a parquet file's is."""
    table, folder = pq.read_table(even / "a.parquet"), tmp_path / "arrow"
    folder.mkdir()
    for name in ("a.arrow", "b.arrow"):
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            for batch in table.to_batches(max_chunksize=7):
                stream.write_batch(batch)
    whole = (folder / "b.arrow").read_bytes()
    (folder / "b.arrow").write_bytes(whole[: len(whole) // 2])
    spec = SourceSpec(str(folder), shuffle_buffer=7, on_bad_data="skip")
    loader = build_loader(spec, tokenizer, seq_length=64, batch_size=2, epochs=1, prefetch=0)
    shares = [loader.state_dict()["share"] for _ in loader]
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 20
    assert max(after - before for before, after in itertools.pairwise(shares)) < 0.05
    (folder / "b.arrow").unlink()
    rows, stored = (estimate_tokens(SourceSpec(str(path)), tokenizer) for path in (folder, even / "a.parquet"))
    assert rows == stored


def test_a_pass_of_unknown_length_that_is_longer_is_said_once(caplog):
    stage = SimpleNamespace(name="stage1", open_ended=True, stretches=[])
    for step in range(1, 20):
        _expect(Progress(stage_step=step, stage_total=10, stage_tokens=step), stage, [])
    assert [record.getMessage() for record in caplog.records] == [
        "stage1: longer than its 10 steps; the learning rate stays at its least"
    ]


def test_a_length_is_told_first_and_when_it_has_doubled():
    lengths = [10, 12, 19, 20, 30, 39, 40, 15]
    assert [length for count, length in enumerate(lengths, 1) if _is_news(lengths[:count])] == [10, 20, 40]


def test_an_endless_loaders_state_stays_as_it_was(even, tokenizer):
    loader = build_loader(SourceSpec(str(even)), tokenizer, seq_length=64, batch_size=2, prefetch=0)
    next(iter(loader))
    assert "share" not in loader.state_dict()


def rates(total, stretches, **ratios) -> list[float]:
    """Learning rates of every step, each stretch coming after the step that it names."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    ratios = {"warmup_ratio": 0.1, "decay_ratio": 0.2, **ratios}
    known: list[list[int]] = []
    schedule = build_schedule(optimizer, Phases.of(total, **ratios), max_lr=1.0, min_lr=0.01, stretches=known)
    found = []
    for step in range(1, (stretches[-1][1] if stretches else total) + 1):
        found.append(schedule.get_last_lr()[0])
        known.extend(stretch for stretch in stretches if stretch[0] == step)
        optimizer.step()
        schedule.step()
    return found


def test_without_a_stretch_the_schedule_is_the_plan():
    assert rates(50, []) == rates(50, [[50, 50]][:0]) and planned_step(7, 50, []) == 7


@pytest.mark.parametrize("stretches", [[[25, 100]], [[45, 60]], [[30, 80], [60, 200], [190, 195]]])
def test_a_stretched_schedule_ends_at_its_least_and_never_rises_again(stretches):
    plan, found = rates(50, []), rates(50, stretches)
    first = stretches[0][0]
    assert found[:first] == plan[:first]
    assert found[-1] == 0.01 < min(found[: stretches[-1][0]])
    assert all(after <= before for before, after in itertools.pairwise(found[5:]))
    last, end = stretches[-1]
    middle = planned_step(last + 1, 50, stretches) - planned_step(last, 50, stretches)
    assert middle == pytest.approx((50 - planned_step(last, 50, stretches)) / (end - last))
    assert planned_step(end, 50, stretches) == 50
    stable = last_step(40, 50, stretches)
    assert found[stable - 1] == 1 or stretches[0][0] > 40
    assert planned_step(stable, 50, stretches) <= 40 < planned_step(stable + 1, 50, stretches)


def test_a_line_never_says_more_steps_than_there_are():
    progress = Progress(stage="stage1", stage_step=4, stage_total=3)
    assert progress.stage_end == 4
    progress.stage_expected = 40
    assert progress.stage_end == 40
    assert "stage1 4/40" in format_line({"stage": "stage1", "stage_step": 4, "stage_total": progress.stage_end})


@pytest.mark.slow
def test_a_hint_that_is_far_too_small(tiny_teacher, even, sources, tmp_path, capsys):
    """It is said, the rate falls at the text's end alone, figures come at the end, and it resumes bit for bit."""
    options = dict(
        dataset_name=even / "b.jsonl", epochs=1, epoch_step_hint=4, second_dataset_name="", batch_size=14,
        eval_dataset=sources["heldout"], eval_interval=100, eval_tokens=256, save_interval=2, keep_checkpoints=99,
        decay_ratio=0.25, diagnostics_interval=0,
    )  # fmt: skip
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "run", **options)) == 0
    rows = [row for row in runs.metrics(tmp_path / "run") if "train/loss" in row]
    steps = rows[-1]["step"]
    assert steps > 8
    said = r"stage1: about (\d+) optimizer steps, not \d+: what is left of the schedule is stretched"
    told = list(map(int, re.findall(said, capsys.readouterr().out)))
    assert told and all(after >= 2 * before for before, after in itertools.pairwise(told))
    assert all(row["stage_step"] <= row["stage_total"] for row in rows)
    middle = rows[steps // 2]
    assert middle["stage_total"] == pytest.approx(steps, rel=0.15) and middle["perf/eta_seconds"] > 0
    progress = json.loads((tmp_path / "run" / "final" / "training_state.json").read_text())["progress"]
    expected = rates(4, progress["stage_stretches"], decay_ratio=0.25)
    for row, rate in zip(rows, expected):
        assert row["train/lr"] == pytest.approx(1e-3 * rate, rel=1e-6)
    assert rows[-3]["train/lr"] > 2e-5 and rows[-1]["train/lr"] < 3e-4
    evaluations = [row["step"] for row in runs.metrics(tmp_path / "run") if "eval/kl" in row]
    assert evaluations == [0, steps]
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert f"at step {steps}:" in card and f"in {steps} optimizer steps" in card

    for number in (6, steps // 2):  # half as much a step from there on, before anything was said and behind it
        copy = tmp_path / f"smaller-{number}"
        runs.copy_up_to(tmp_path / "run", f"checkpoint-{number - number % 2}", copy)
        smaller = {**options, "batch_size": 7, "resume_force": True}
        assert train.main(runs.flags(tiny_teacher, sources, copy, **smaller)) == 0
        found = [row["train/lr"] for row in runs.metrics(copy) if "train/loss" in row]
        assert len(found) == pytest.approx(2 * steps - number, abs=2)
        assert sorted(found[2:], reverse=True) == found[2:] and found[-4] > 2e-5 and found[-1] < 3e-4
    runs.copy_up_to(tmp_path / "run", "checkpoint-6", tmp_path / "resumed")
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "resumed", **options)) == 0
    again = [row for row in runs.metrics(tmp_path / "resumed") if "train/loss" in row]
    assert [(r["step"], r["train/loss"], r["train/lr"], r["stage_total"]) for r in again] == [
        (r["step"], r["train/loss"], r["train/lr"], r["stage_total"]) for r in rows
    ]
