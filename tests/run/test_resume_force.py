"""--resume_force: what may change takes effect, exactly; what may not is one line."""

import pytest
import torch

import train
from checkpoints.run_state import read_trainer_state
from helpers import runs
from optim.masters import join_master
from run import saving

pytestmark = pytest.mark.slow

# stage 1: 3 steps of warm-up, the cooldown after step 9; checkpoints at 6 and at the stages' ends
OPTIONS = dict(
    seq_length=32, batch_size=1, max_steps=12, warmup_ratio=0.25, decay_ratio=0.25, second_dataset_tokens=64,
    save_interval=6, keep_checkpoints=9, dtype="bfloat16",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr(saving, "plot_runs", lambda *_: None)


@pytest.fixture(scope="module")
def ended(tmp_path_factory, tiny_teacher, sources):
    output = tmp_path_factory.mktemp("ended") / "run"
    assert train.main(runs.flags(tiny_teacher, sources, output, **OPTIONS)) == 0
    return output


@pytest.fixture
def go_on(tmp_path, tiny_teacher, sources, ended, capfd):
    """Go on from a checkpoint of `ended` with changed flags; (folder, exit status, what was printed and logged)."""

    def go_on(checkpoint="checkpoint-6", source=ended, force=True, **changes):
        output = tmp_path / "run"
        runs.copy_up_to(source, checkpoint, output)
        options = {**OPTIONS, "skip_stage2": checkpoint == "checkpoint-6", **changes}
        status = train.main(runs.flags(tiny_teacher, sources, output, **options, resume_force=force))
        return output, status, "".join(capfd.readouterr())

    return go_on


def falling(rate, over, count, floor):
    """The library's cooldown of `over` steps, its first `count`, and then the floor."""
    return [rate * (1 - (k / over) ** 0.5) for k in range(1, count + 1)] + [floor]


RATES = {  # changed flags: rates from step 7 on
    "rates": (dict(max_lr="2e-3", min_lr="2e-5"), [2e-3, 2e-3, 2e-3, *falling(2e-3, 3, 2, 2e-5)]),
    "fewer steps": (dict(max_steps=8), falling(1e-3, 2, 1, 1e-5)),  # 3 of warm-up as before
    "total and shape": (dict(max_steps=16, decay_ratio=0.5), [1e-3, 1e-3, *falling(1e-3, 8, 7, 1e-5)]),
    "warm-up": (dict(warmup_ratio=0.75), [7e-3 / 9, 8e-3 / 9, 1e-3, *falling(1e-3, 3, 2, 1e-5)]),
}


@pytest.mark.parametrize("case", RATES)
def test_the_schedule_is_that_of_the_flags_from_the_step_it_stands_at(go_on, case):
    changes, expected = RATES[case]
    output, status, text = go_on(**changes)
    assert status == 0, text
    assert [row["train/lr"] for row in runs.metrics(output) if "train/loss" in row][6:] == pytest.approx(expected)
    assert all(f"changed from here on: --{name} was " in text for name in changes)


def moved(output, checkpoint, source):
    """Names of the weights that differ between a checkpoint and the end."""
    before, after = runs.weights(source / checkpoint), runs.weights(output / "final")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name].float(), after[name].float())}


WIDER = {  # checkpoint, other changes
    "float32": ("checkpoint-6", dict(dtype="float32")),
    "float16": ("checkpoint-6", dict(dtype="float16")),
    "a part frozen at once": ("checkpoint-6", dict(dtype="float32", freeze_mlp=True)),
    "another optimizer at once": ("checkpoint-6", dict(dtype="float32", optimizer="muon", freeze_embeddings=True)),
    "a stage's end": ("checkpoint-12", dict(dtype="float32")),
    "a stage's end in float16": ("checkpoint-12", dict(dtype="float16", freeze_mlp=True)),
}


@pytest.mark.parametrize("case", WIDER)
def test_a_wider_dtype_goes_on_from_the_joined_masters(go_on, ended, case):
    """The next step starts from the exact masters, not from the bf16 weights, also where it does not train."""
    checkpoint, changes = WIDER[case]
    saved = read_trainer_state(ended / checkpoint)["optimizer"]
    output, status, text = go_on(checkpoint, **changes, max_lr="1e-12", min_lr="1e-12", weight_decay=0)
    assert status == 0, text
    end = output / max((path.name for path in output.glob("checkpoint-*")), key=lambda name: int(name[11:]))
    exact = read_trainer_state(end)["weights"] if changes["dtype"] == "float16" else {}
    after, before = {**runs.weights(end), **exact}, runs.weights(ended / checkpoint)
    checked = 0
    for index, name in enumerate(saved["names"]):
        state = saved["state"][index]
        master = state["master"] if "master" in state else join_master(before[name], state["low"])
        assert (after[name] - master).abs().max() < 1e-10, name
        checked += not torch.equal(master, before[name].float())
    assert checked > 20


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_in_a_wider_dtype_every_tensor_trains(go_on, ended, dtype):
    output, status, text = go_on(dtype=dtype)
    assert status == 0 and "--dtype was bfloat16" in text, text
    assert moved(output, "checkpoint-6", ended) == set(runs.weights(ended / "final"))


def test_frozen_and_thawed(go_on, ended, tiny_teacher, sources):
    """MLPs frozen from step 6 on stay as they are and have no state; thawed again they train, with fresh state."""
    output, status, text = go_on(freeze_mlp=True)
    assert status == 0, text
    names = set(runs.weights(ended / "final"))
    assert moved(output, "checkpoint-6", ended) == {name for name in names if ".mlp." not in name}
    saved = read_trainer_state(output / "checkpoint-12")["optimizer"]
    assert not any(".mlp." in name for name in saved["names"])
    longer = {**OPTIONS, "skip_stage2": True, "max_steps": 16, "resume": output / "stable-stage1"}
    argv = runs.flags(tiny_teacher, sources, output, **longer, resume_force=True)
    frozen = runs.weights(output / "stable-stage1")
    assert train.main(argv) == 0
    after, state = runs.weights(output / "final"), read_trainer_state(output / "checkpoint-16")["optimizer"]
    assert all(not torch.equal(frozen[name], after[name]) for name in names)
    steps = {
        name: int(state["state"][i]["step"]) for i, name in enumerate(state["names"]) if "m" in state["state"][i]
    }
    assert {count for name, count in steps.items() if ".mlp." in name} == {7}
    assert {count for name, count in steps.items() if ".mlp." not in name} == {16}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_another_optimizer_starts_with_fresh_state_and_says_so(go_on, ended, optimizer):
    output, status, text = go_on(optimizer=optimizer, max_lr="1e-2")  # for a bf16 bias near 1 to move as well
    assert status == 0 and f"{optimizer} starts with fresh state" in text, text
    assert moved(output, "checkpoint-6", ended) == set(runs.weights(ended / "final"))


REFUSED = {
    "layers": ("checkpoint-6", dict(layers=["1", "2"]), "--layers was 1 and is 1 2"),
    "sizes": ("checkpoint-6", dict(expand=2), "--expand was 1 and is 2"),
    "order of the text": ("checkpoint-6", dict(seed=7), "--seed was 42 and is 7"),
    "column": ("checkpoint-6", dict(dataset_text_field="id"), "--dataset_text_field"),
    "steps behind": ("checkpoint-6", dict(max_steps=5), "stands at its step 6"),
    "a stage that is over": ("checkpoint-12", dict(max_steps=9), "stage1, which alone uses it, is over"),
    "an end": ("final", dict(max_lr="1e-5", skip_stage2=False), "its run is finished"),
    "a stage before": ("checkpoint-6", dict(hidden_tokens=128), "hidden comes before stage1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_not_change_is_refused_in_one_line(go_on, case):
    checkpoint, changes, complaint = REFUSED[case]
    output, status, text = go_on(checkpoint, **changes)
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert status == 2 and len(lines) == 1 and complaint in lines[0], text
    assert [path.name for path in output.iterdir() if path.is_dir()] == [checkpoint]


def test_a_change_needs_the_flag_and_is_listed(go_on):
    _, status, text = go_on(force=False, max_lr="2e-3", weight_decay=0, log_interval=5)
    line = next(line for line in text.splitlines() if line.startswith("error:"))
    assert status == 2 and "--max_lr was 0.001 and is 0.002" in line and "--weight_decay was 0.1 and is 0.0" in line
    assert "--resume_force" in line and "log_interval" not in line


def test_a_stage_that_is_measured_in_tokens_takes_the_rest_of_them(go_on, ended):
    """Stage 2 from its stable end with sequences of half the length: twice the steps that were left."""
    output, status, text = go_on("stable-stage2", seq_length=16, second_dataset_tokens=64, skip_stage2=False)
    assert status == 0, text
    rows = [row for row in runs.metrics(output) if row.get("stage") == "stage2" and "train/loss" in row]
    assert rows[-1]["train/tokens"] == 12 * 32 + 64 and len(rows) == 3
