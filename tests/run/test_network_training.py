"""Real train.py processes that stream text and models from a loopback Hub whose network fails in mid-training."""

import gzip
import json
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers import runs
from helpers.hub_server import LoopbackHub
from text.blocks import draw_order

FILES, STEPS, SEED = 8, 130, 42
README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: train-*
---
"""
CHARACTERS = 2500  # a document
CHANGES = dict(seq_length=128, batch_size=4, max_steps=STEPS, second_dataset_name="", log_interval=10, seed=SEED)

SCRIPT = "tests/helpers/train_little_ahead.py"


@pytest.fixture(scope="module")
def repository(tmp_path_factory, documents):
    """Eight files of ten documents, parquet and JSONL.GZ in turns."""
    folder = tmp_path_factory.mktemp("repository")
    texts = [text[at : at + CHARACTERS] for text in documents for at in range(0, len(text) - CHARACTERS, CHARACTERS)]
    for number in range(FILES):
        mine = texts[number::FILES][:10]
        if number % 2:
            with gzip.open(folder / f"train-{number}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in mine)
        else:
            pq.write_table(pa.table({"text": mine}), folder / f"train-{number}.parquet")
    (folder / "README.md").write_text(README)
    return folder


@pytest.fixture(scope="module")
def late_files():
    """The names, up to the ending, of the three files that the first pass reads last."""
    return [f"/train-{number}." for number in draw_order(FILES, SEED, 0)[-3:]]


@pytest.fixture(scope="module")
def hub(repository, tiny_teacher):
    with LoopbackHub() as server:
        server.add("datasets", "org/text", repository)
        server.add("datasets", "org/gated", repository, gated=True)
        server.add("models", "org/teacher", tiny_teacher)
        yield server


def command(output, **changes):
    """The flags of a run on the Hub's text."""
    sources = {"train": "org/text", "conversations": ""}
    return runs.flags("org/teacher", sources, output, **{**CHANGES, **changes})  # type: ignore[arg-type]


@pytest.fixture
def train(hub, tmp_path_factory, run_script):
    """Run train.py through the Hub; returns the CompletedProcess. Its faults end with the test."""
    shared = tmp_path_factory.getbasetemp() / "hub-home"

    def run(output, home=shared, **changes):
        return run_script(SCRIPT, *command(output, **changes), env=hub.environment(home))

    yield run
    hub.faults.clear()


@pytest.fixture(scope="module")
def undisturbed(hub, tmp_path_factory, run_script):
    """The same run over a network without faults, and with caches of its own."""
    output, home = tmp_path_factory.mktemp("undisturbed") / "run", tmp_path_factory.mktemp("home")
    done = run_script(SCRIPT, *command(output), env=hub.environment(home))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trying again" not in done.stdout + done.stderr
    return output


def fail_once_training(hub, output, *faults):
    """Arrange faults as soon as the first figures of a run are there: its start reads from every file."""

    def watch():
        deadline = time.monotonic() + 120
        while not ((output / "metrics.jsonl").exists() and runs.losses(output)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for match, kind, options in faults:
            hub.fail(match, kind, **options)

    threading.Thread(target=watch, daemon=True).start()


def log_of(done):
    """What the run told, in its order; one line at a time and no traceback."""
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text[-3000:]
    return text


def assert_same_result(output, undisturbed):
    assert runs.losses(output) == runs.losses(undisturbed)
    assert len(runs.losses(output)) == STEPS // CHANGES["log_interval"]
    ours, theirs = runs.weights(output / "final"), runs.weights(undisturbed / "final")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_faults_in_mid_training_are_ridden_out(hub, train, undisturbed, late_files, tmp_path):
    first, second, third = late_files
    fail_once_training(
        hub,
        tmp_path / "run",
        (first, "status", dict(status=429, retry_after=2)),
        (first, "status", dict(status=500, count=2)),
        (second, "cut", {}),
        (second, "truncate", {}),
        (third, "stall", dict(seconds=4.0)),
    )
    done = train(tmp_path / "run", network_patience=60)
    log = log_of(done)
    assert done.returncode == 0, log[-2000:]
    assert [fault.count for fault in hub.faults] == [0] * 5
    assert log.count("trying again in") == 6 and log.count("the network is back after") == 3
    assert "429" in log and "trying again in 2 s (patience left: 60 s)" in log
    assert log.index("stage1 10/130, step 10, loss") < log.index("trying again in") < log.index("stage1 130/130")
    assert_same_result(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_an_outage_longer_than_the_patience_stops_with_a_checkpoint_and_resumes(
    hub, train, undisturbed, late_files, tmp_path
):
    fail_once_training(hub, tmp_path / "run", (late_files[0], "status", dict(status=503, count=10**6)))
    lost = train(tmp_path / "run", network_patience=2)
    log = log_of(lost)
    assert lost.returncode == 4, log[-2000:]
    (line,) = [line for line in log.splitlines() if "stopped, with a checkpoint" in line]
    assert "the network did not recover within --network_patience 2 s" in line and "503" in line
    reached = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert 10 < reached < STEPS and not (tmp_path / "run" / "final").exists()
    hub.faults.clear()
    resumed = train(tmp_path / "run", network_patience=60)
    assert resumed.returncode == 0, log_of(resumed)[-2000:]
    assert f"step {reached}" in log_of(resumed)
    assert_same_result(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["", "model.safetensors"], ids=["checks", "calibration"])
def test_a_network_lost_before_the_first_step_is_one_line(hub, train, tmp_path, after):
    """While the first text is read for the checks, or while the mixers' start is measured on it."""
    hub.requests.clear()
    hub.fail("/train-0.", "status", status=503, count=10**6, after=after)
    done = train(tmp_path / "run", home=tmp_path / "home", network_patience=1)
    assert ("transferred" in log_of(done)) == bool(after)
    (line,) = [line for line in log_of(done).splitlines() if "stopped" in line]
    assert done.returncode == 4, done.stderr[-2000:]
    assert "--network_patience 1 s" in line and "before the first checkpoint" in line
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.slow
def test_gated_text_without_a_token_is_one_line(train, tmp_path):
    done = train(tmp_path / "run", dataset_name="org/gated")
    errors = [line for line in log_of(done).splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr[-2000:]
    assert "org/gated is gated: accept its licence" in errors[0] and "hf auth login" in errors[0]
