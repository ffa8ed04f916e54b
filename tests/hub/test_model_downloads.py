"""Real train.py processes whose teacher and tokenizer come from a loopback Hub that fails while they are fetched."""

import shutil

import pytest

from helpers import runs
from helpers.hub_server import COMMIT, LoopbackHub

WEIGHTS = f"/resolve/{COMMIT}/model.safetensors"


@pytest.fixture(scope="module")
def hub(tiny_teacher):
    with LoopbackHub() as server:
        server.add("models", "org/teacher", tiny_teacher)
        server.add("models", "org/gated", tiny_teacher, gated=True)
        yield server


@pytest.fixture
def train(hub, sources, tmp_path, run_script):
    """Run train.py for two steps with a teacher of the Hub; returns (CompletedProcess, its log without traceback)."""

    def run(teacher="org/teacher", home="home", endpoint=None, **changes):
        sizes = dict(max_steps=2, seq_length=64, batch_size=1, second_dataset_name="", log_interval=1)
        flags = runs.flags(teacher, sources, tmp_path / "run", **{**sizes, **changes})
        env = hub.environment(tmp_path / home)
        done = run_script("train.py", *flags, env={**env, "HF_ENDPOINT": endpoint or env["HF_ENDPOINT"]})
        log = done.stdout + done.stderr
        assert "Traceback" not in log, log[-3000:]
        return done, log

    yield run
    hub.faults.clear()


def errors(log):
    return [line for line in log.splitlines() if line.startswith("error:") or "stopped" in line]


@pytest.mark.slow
def test_short_faults_are_ridden_out_and_logged(hub, train, tmp_path):
    hub.fail("/api/models/org/teacher", "status", status=429, retry_after=2)
    hub.fail("/api/models/org/teacher", "status", status=500, count=2)
    hub.fail("/resolve/main/tokenizer.json", "status", status=503)
    hub.fail(WEIGHTS, "status", status=500, method="GET")
    hub.fail(WEIGHTS, "cut", method="GET")
    hub.fail(WEIGHTS, "stall", seconds=4.0, method="GET")
    hub.fail(WEIGHTS, "truncate", method="GET")
    done, log = train(network_patience=60)
    assert done.returncode == 0, log[-2000:]
    assert [fault.count for fault in hub.faults] == [0] * 7
    assert "--teacher_model org/teacher, tokenizer.json: " in log and "503" in log
    assert "--teacher_model org/teacher, model.safetensors: " in log and "500" in log
    assert "--teacher_model org/teacher: HfHubHTTPError: " in log and "429" in log
    assert "trying again in 2 s (patience left: 60 s)" in log and "the network is back after" in log
    assert runs.losses(tmp_path / "run") and (tmp_path / "run" / "final").is_dir()
    lengths = [path.stat().st_size for path in (tmp_path / "home").rglob("snapshots/*/model.safetensors")]
    assert lengths == [(hub.repositories["models", "org/teacher"] / "model.safetensors").stat().st_size]


@pytest.mark.slow
@pytest.mark.parametrize("match", ["/api/models/org/teacher", "/resolve/main/tokenizer.json"])
def test_an_outage_longer_than_the_patience_is_one_line(hub, train, match):
    hub.fail(match, "status", status=503, count=10**6)
    done, log = train(network_patience=1)
    (line,) = errors(log)
    assert done.returncode == 4, log[-2000:]
    assert "stopped, before the first checkpoint: --teacher_model org/teacher" in line and "503" in line
    assert "the network did not recover within --network_patience 1 s" in line


@pytest.mark.slow
def test_a_hub_that_is_not_there_is_one_line_unless_the_cache_has_the_model(train, tmp_path):
    nowhere = "http://127.0.0.1:9"
    done, log = train(endpoint=nowhere, network_patience=1)
    (line,) = errors(log)
    assert done.returncode == 4 and "--teacher_model org/teacher: the network did not recover" in line
    assert train()[0].returncode == 0
    shutil.rmtree(tmp_path / "run")
    done, log = train(endpoint=nowhere, network_patience=600)
    assert done.returncode == 0, log[-2000:]
    assert "the Hub cannot be reached" in log and "its copy in the cache is used" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(teacher="org/gone"), ["--teacher_model org/gone: not found on the Hub: check the name", "HF_TOKEN"]),
        (dict(teacher="org/gated"), ["--teacher_model org/gated is gated: accept its licence", "hf auth login"]),
        (dict(student_model="org/gone"), ["--student_model org/gone: not found on the Hub: check the name"]),
        (dict(teacher="a b"), ["--teacher_model a b", "Repo id"]),
        (dict(local_files_only=True), ["org/teacher is not in the cache, and --local_files_only forbids"]),
    ],
    ids=["teacher that is not there", "gated", "student that is not there", "no name", "offline"],
)
def test_a_models_mistake_is_one_line(train, changes, words):
    done, log = train(**changes)
    (line,) = errors(log)
    assert done.returncode == 2, log[-2000:]
    assert all(word in line for word in words), line
