"""A run that ended goes on: a longer stage, a second one, more epochs, another cooldown; as if planned so."""

import shutil

import pytest
import torch

import train
from arguments import parse_arguments
from checkpoints.run_state import read_metadata
from helpers import runs
from helpers.checkpoint_tools import flip_bit
from run import saving
from run.resume import choose_start

pytestmark = pytest.mark.slow

# stage 1: 2 steps of warm-up, the cooldown after step 7; stage 2: no warm-up with a ratio up to 0.2
SMALL = dict(seq_length=32, batch_size=1, max_steps=10, warmup_ratio=0.2, decay_ratio=0.3, second_dataset_tokens=64)
ALONE = dict(SMALL, skip_stage2=True)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(saving, "plot_runs", lambda *_: None)


@pytest.fixture
def run(tiny_teacher, sources, capfd):
    """Run train.py in this process; returns (exit status, what it printed and logged)."""

    def run(output, **options):
        status = train.main(runs.flags(tiny_teacher, sources, output, **options))
        return status, "".join(capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def ended(tmp_path_factory, tiny_teacher, sources):
    """A finished run of one stage, with checkpoint-8 in its cooldown."""
    output = tmp_path_factory.mktemp("ended") / "run"
    assert train.main(runs.flags(tiny_teacher, sources, output, **ALONE, save_interval=4)) == 0
    return output


def rates(output):
    return [row["train/lr"] for row in runs.metrics(output) if "train/loss" in row]


def names(output):
    return {path.name for path in output.iterdir() if path.is_dir()}


def assert_equal_runs(one, other):
    """The same log, and the same weights to the bit."""
    assert runs.losses(one) == runs.losses(other)
    assert rates(one) == rates(other)
    ours, theirs = runs.weights(one / "final"), runs.weights(other / "final")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("options", [dict(dtype="bfloat16", optimizer="adamw"), dict(dtype="float16")], ids=str)
def test_stopped_and_extended_equals_planned_so(tmp_path, run, options):
    """Stage 1 from 10 to 20 steps after stage 2, which runs again; the warm-up keeps its two steps."""
    options = {**SMALL, **options}
    assert run(tmp_path / "run", **options)[0] == 0
    assert names(tmp_path / "run") == {"stable-stage1", "stable-stage2", "checkpoint-10", "checkpoint-12", "final"}
    longer = {**options, "max_steps": 20}
    status, text = run(tmp_path / "run", **longer)
    assert status == 0, text
    assert "stable-stage1" in text and "--max_steps was 10 and is 20" in text
    assert run(tmp_path / "planned", **{**longer, "warmup_ratio": 0.1})[0] == 0
    assert len(rates(tmp_path / "planned")) == 22
    assert_equal_runs(tmp_path / "run", tmp_path / "planned")
    assert read_metadata(tmp_path / "run" / "final")["progress"]["optimizer_step"] == 22
    status, text = run(tmp_path / "run", **longer)
    assert status == 0 and "nothing to do" in text


def test_extended_twice_stopped_between_and_in_a_cooldown(tmp_path, run, ended):
    """10 -> 20 -> 40 steps: the second from a run that was stopped in the first extension's cooldown."""
    output = tmp_path / "run"
    shutil.copytree(ended, output)
    for name in ("final", "checkpoint-10"):
        shutil.rmtree(output / name)  # as if stopped at step 8, of 10: in the cooldown
    assert run(output, **{**ALONE, "max_steps": 20}, save_interval=4, keep_checkpoints=9)[0] == 0
    runs.copy_up_to(output, "checkpoint-15", tmp_path / "again")  # in the cooldown once more
    shutil.copytree(output / "stable-stage1", tmp_path / "again" / "stable-stage1")
    assert read_metadata(tmp_path / "again" / "stable-stage1")["progress"]["stage_step"] == 14
    status, text = run(tmp_path / "again", **{**ALONE, "max_steps": 40})
    assert status == 0 and "resuming " + str(tmp_path / "again" / "stable-stage1") in text, text
    assert run(tmp_path / "planned", **{**ALONE, "max_steps": 40, "warmup_ratio": 0.05})[0] == 0
    assert_equal_runs(tmp_path / "again", tmp_path / "planned")


def test_an_extension_is_resumed_as_any_run(tmp_path, run, ended):
    shutil.copytree(ended, tmp_path / "run")
    longer = {**ALONE, "max_steps": 20, "save_interval": 4, "keep_checkpoints": 9}
    assert run(tmp_path / "run", **longer)[0] == 0
    runs.copy_up_to(tmp_path / "run", "checkpoint-15", tmp_path / "stopped")
    status, text = run(tmp_path / "stopped", **longer)
    assert status == 0 and "resuming " + str(tmp_path / "stopped" / "checkpoint-15") in text, text
    assert_equal_runs(tmp_path / "stopped", tmp_path / "run")


def test_a_second_stage_is_added(tmp_path, run, ended):
    shutil.copytree(ended, tmp_path / "run")
    status, text = run(tmp_path / "run", **SMALL, save_interval=4)
    assert status == 0 and "--skip_stage2 was True and is False" in text, text
    assert run(tmp_path / "planned", **SMALL)[0] == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "planned")


def test_an_alignment_stage_and_stage_2_grow_after_the_end(tmp_path, run):
    """The hidden stage goes on from its stable end and all after it runs again; then stage 2 from its own."""
    options = dict(SMALL, max_steps=3, warmup_ratio=0, hidden_tokens=192)
    assert run(tmp_path / "run", **options)[0] == 0
    for name, longer in (("hidden", dict(hidden_tokens=320)), ("stage2", dict(second_dataset_tokens=128))):
        options = {**options, **longer}
        status, text = run(tmp_path / "run", **options)
        assert status == 0 and f"resuming {tmp_path / 'run' / f'stable-{name}'}" in text, text
    assert run(tmp_path / "planned", **options)[0] == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "planned")


def test_more_epochs(tmp_path, run, sources, documents):
    """A pass of about 10 steps, then two: the second pass, the warm-up and the cooldown of a run of two."""
    short = tmp_path / "short.jsonl.gz"
    runs.write_rows(short, [{"text": text[:150]} for text in documents[10:14]])
    options = {**ALONE, "dataset_name": short, "epochs": 1, "epoch_step_hint": 8}
    assert run(tmp_path / "run", **options)[0] == 0
    steps = len(rates(tmp_path / "run"))
    assert steps >= 8
    status, text = run(tmp_path / "run", **{**options, "epochs": 2})
    assert status == 0 and "--epochs was 1 and is 2" in text, text
    assert run(tmp_path / "planned", **{**options, "epochs": 2, "warmup_ratio": 0.125})[0] == 0
    assert len(rates(tmp_path / "run")) > 1.5 * steps
    assert_equal_runs(tmp_path / "run", tmp_path / "planned")


@pytest.mark.parametrize("hint", [3, 40], ids=["a hint too small", "a hint too large"])
def test_more_epochs_than_a_wrong_hint_foresaw(tmp_path, run, sources, documents, hint):
    """The second run knows the text's length. A pass that ended before any cooldown goes on from its end."""
    short = tmp_path / "short.jsonl.gz"
    runs.write_rows(short, [{"text": text[:300]} for text in documents[10:14]])
    options = {**ALONE, "dataset_name": short, "epochs": 1, "epoch_step_hint": hint, "warmup_ratio": 0.05}
    assert run(tmp_path / "run", **options)[0] == 0
    steps = len(rates(tmp_path / "run"))
    assert 10 < steps < 28  # of 40 the cooldown would begin after 28
    assert "stable-stage1" in names(tmp_path / "run")
    stable = read_metadata(tmp_path / "run" / "stable-stage1")["progress"]
    assert stable["stage_step"] == (steps if hint > steps else last_full(rates(tmp_path / "run")))
    shutil.copytree(tmp_path / "run", tmp_path / "without")
    if hint > steps:  # its own end is the same state
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{steps}")
    status, text = run(tmp_path / "run", **{**options, "epochs": 2})
    assert status == 0 and f"resuming {tmp_path / 'run' / 'stable-stage1'}" in text, text
    found = rates(tmp_path / "run")
    warmup = round(hint * 0.05)
    assert abs(len(found) - 2 * steps) <= 1
    assert found[steps] > 5e-4 and found[-1] < 3e-4 and sorted(found[warmup:], reverse=True) == found[warmup:]
    if hint > steps:  # then the length was known exactly
        assert found[warmup : round(0.7 * 2 * steps)] == [1e-3] * (round(0.7 * 2 * steps) - warmup)
    if hint > steps:
        shutil.rmtree(tmp_path / "without" / "stable-stage1")
        status, text = run(tmp_path / "without", **{**options, "epochs": 2})
        assert status == 0, text
        assert_equal_runs(tmp_path / "run", tmp_path / "without")


def last_full(found):
    return max(step for step, rate in enumerate(found, 1) if rate == 1e-3)


def test_a_second_cooldown(tmp_path, run, ended):
    """Shorter: as planned so. Longer: at once at the rate of its closed form, and the log says so."""
    refused, text = run(ended, **{**ALONE, "decay_ratio": 0.1})
    assert refused == 2 and "--decay_ratio was 0.3 and is 0.1" in text and "--resume_force" in text
    for ratio in (0.1, 0.6):
        output = tmp_path / f"{ratio}"
        shutil.copytree(ended, output)
        status, text = run(output, **{**ALONE, "decay_ratio": ratio}, resume_force=True)
        assert status == 0 and "step 7" in text, text
        assert ("falls at once" in text) == (ratio > 0.5)
        if ratio < 0.5:
            assert run(tmp_path / "planned", **{**ALONE, "decay_ratio": ratio})[0] == 0
            assert_equal_runs(output, tmp_path / "planned")
        else:  # 1 - sqrt(steps into the cooldown / its six steps)
            expected = [1e-3] * 6 + [1e-3 * (1 - (k / 6) ** 0.5) for k in (4, 5)] + [1e-5]
            assert rates(output)[1:7] == expected[:6]
            assert rates(output)[7:] == pytest.approx(expected[6:])


def start_of(ended, tiny_teacher, sources, **options):
    argv = runs.flags(tiny_teacher, sources, ended, **{**ALONE, **options})
    return choose_start(ended / "checkpoint-10", vars(parse_arguments(argv)), world_size=1, force=True)


@pytest.mark.parametrize(("least", "bounds"), [("2e-5", False), ("6e-4", True)])
def test_a_least_rate_that_bounds_the_warmup_is_said(ended, tiny_teacher, sources, caplog, least, bounds):
    """Its first step took half the highest rate: a run with a least rate above that would have begun otherwise."""
    start = start_of(ended, tiny_teacher, sources, min_lr=least)
    assert start.folder == ended / "stable-stage1"
    assert ("--min_lr bounds its warm-up" in caplog.text) == bounds


def test_batches_that_are_as_large_a_step_are_listed(tmp_path, run, tiny_teacher, sources):
    """They need no force, and no others are taken for such."""
    options = {**ALONE, "batch_size": 4, "max_steps": 4}
    assert run(tmp_path / "run", **options, save_interval=2, keep_checkpoints=9)[0] == 0
    runs.copy_up_to(tmp_path / "run", "checkpoint-2", tmp_path / "again")
    other = {**options, "batch_size": 2, "grad_accumulation_steps": 2}
    status, text = run(tmp_path / "again", **other)
    assert status == 0 and len(rates(tmp_path / "again")) == 4, text
    for flag in ("--batch_size was 4 and is 2", "--grad_accumulation_steps was 1 and is 2"):
        assert f"changed from here on: {flag} (a step takes as many sequences)" in text
    assert run(tmp_path / "run", **other)[0] == 0  # finished: nothing to do
    assert run(tmp_path / "run", **{**other, "batch_size": 3})[0] == 2


def test_a_pass_that_ended_before_its_cooldown_cannot_cool_down_again(tmp_path, run, sources, documents):
    short = tmp_path / "short.jsonl.gz"
    runs.write_rows(short, [{"text": text[:150]} for text in documents[10:14]])
    options = {**ALONE, "dataset_name": short, "epochs": 1, "epoch_step_hint": 40}
    assert run(tmp_path / "run", **options)[0] == 0
    for resume in ("auto", tmp_path / "run" / "stable-stage1"):
        status, text = run(tmp_path / "run", **{**options, "decay_ratio": 0.1}, resume=resume, resume_force=True)
        lines = [line for line in text.splitlines() if line.startswith("error:")]
        assert status == 2 and len(lines) == 1 and "no step left for them" in lines[0], text


def test_without_a_stable_checkpoint(tmp_path, run):
    """The run says that it cannot be extended; by force it goes on from the cooled-down weights."""
    options = {**ALONE, "no_stable_checkpoint": True}
    assert run(tmp_path / "run", **options)[0] == 0
    assert names(tmp_path / "run") == {"checkpoint-10", "final"}
    longer = {**options, "max_steps": 14}
    for resume in ("auto", tmp_path / "run" / "checkpoint-10"):
        status, text = run(tmp_path / "run", **longer, resume=resume)
        assert status == 2 and "stable-stage1" in text and "--resume_force" in text
        assert len([line for line in text.splitlines() if line.startswith("error:")]) == 1
    status, text = run(tmp_path / "run", **longer, resume_force=True)
    assert status == 0 and "cooled down" in text, text
    assert rates(tmp_path / "run")[10:] == pytest.approx([*[1e-3 * (1 - (k / 4) ** 0.5) for k in (1, 2, 3)], 1e-5])


def test_a_damaged_stable_checkpoint(tmp_path, run, ended):
    """Is not gone on from: what is there besides has cooled down."""
    shutil.copytree(ended, tmp_path / "run")
    flip_bit(tmp_path / "run" / "stable-stage1" / "trainer_state.pt", 700)
    status, text = run(tmp_path / "run", **{**ALONE, "max_steps": 20})
    assert status == 2 and "holds no checkpoint from before" in text
    assert len([line for line in text.splitlines() if line.startswith("error:")]) == 1


def test_a_named_checkpoint_is_extended_from_the_stable_one_beside_it(tmp_path, run, ended):
    shutil.copytree(ended, tmp_path / "run")
    named = tmp_path / "run" / "checkpoint-10"
    assert run(tmp_path / "run", **{**ALONE, "max_steps": 20}, resume=named, resume_force=True)[0] == 0
    assert len(rates(tmp_path / "run")) == 20 and rates(tmp_path / "run")[7:14] == [1e-3] * 7
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "in 20 optimizer steps" in card


def test_stable_checkpoints_do_not_count_among_those_to_keep(tmp_path, run):
    assert run(tmp_path / "run", **SMALL, save_interval=1, keep_checkpoints=1)[0] == 0
    assert names(tmp_path / "run") == {"stable-stage1", "stable-stage2", "checkpoint-12", "final"}
