"""Figures as their readers get them: metrics.jsonl, a real offline W&B run parsed back, the plot, masked secrets."""

import html
import json
import shutil
import signal
import socket
import time

import pytest

from arguments import parse_arguments
from conftest import ROOT
from helpers import runs, warm
from helpers.launching import wait_until
from helpers.wandb_runs import LoopbackWandb, OfflineRun
from plot_metrics import plot_runs
from run.metrics_file import read_metrics
from run.tracking import Tracker
from run.wandb_run import folded, wandb_settings
from utils import format_duration, format_line


@pytest.fixture(autouse=True)
def runs_of_wandb_stand_in_their_folders(monkeypatch):
    monkeypatch.delenv("WANDB_DIR", raising=False)


wandb = pytest.importorskip("wandb")


@pytest.mark.slow
def test_an_offline_run_holds_metrics_config_and_axes(tmp_path, tiny_teacher, documents, run_script):
    sources = runs.write_sources(tmp_path / "text", documents)
    secret, other, key, password = "hf_" + "a" * 30, "hf_" + "b" * 30, "0123456789" * 4, "correcthorse"
    argv = runs.flags(
        tiny_teacher, sources, tmp_path / "run", wandb=True, wandb_mode="offline", max_steps=3, skip_stage2=True,
        wandb_run_name=f"tiny {other}", wandb_project=f"project-{secret}", log_file=tmp_path / "log",
        second_dataset_name=f"https://user:{password}@host/text.jsonl",
    )  # fmt: skip
    env = {"WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline", "HF_TOKEN": secret, "WANDB_API_KEY": key}
    done = run_script("train.py", *argv, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "output").write_text(done.stdout + done.stderr)
    sent = OfflineRun(tmp_path)
    history, config, metrics = sent.history, sent.config, sent.metrics
    assert sent.exit_code == 0 and sent.alerts == []
    losses = [row["train/loss"] for row in history if "train/loss" in row]
    assert losses == [row["train/loss"] for row in runs.metrics(tmp_path / "run") if "train/loss" in row]
    for name in ("kl", "top1_agreement", "lr", "grad_norm", "tokens", "tokens_per_second", "optimizer_step"):
        assert any(f"train/{name}" in row for row in history), name
    assert config["max_steps"] == 3 and config["seq_length"] == 64
    assert ("train/*", "train/tokens") in metrics
    for path in tmp_path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [text for text in (secret, other, key, password) if text.encode() in content], path


@pytest.mark.slow
def test_layers_samples_stages_and_resume_in_an_offline_run(tmp_path, tiny_teacher, documents, run_script):
    """A run cut back to step 3, as a kill would leave it, goes on as the same W&B run."""
    sources, run = runs.write_sources(tmp_path / "text", documents), tmp_path / "run"
    argv = runs.flags(
        tiny_teacher, sources, run, wandb=True, wandb_mode="offline", hidden_tokens=128, max_steps=4,
        skip_stage2=True, diagnostics_interval=2, sample_interval=4, eval_dataset=sources["heldout"], eval_tokens=128,
        eval_interval=5, save_interval=2, keep_checkpoints=9, layers="auto:2", choice_tokens=64,
    )  # fmt: skip
    ids = []
    for part in ("first", "second"):
        (tmp_path / part).mkdir()
        done = run_script("train.py", *argv, env={"WANDB_DIR": str(tmp_path / part), "WANDB_MODE": "offline"})
        assert done.returncode == 0, done.stderr[-2000:]
        sent = OfflineRun(tmp_path / part)
        history, config, summary = sent.history, sent.config, sent.summary
        ids.append(sent.run_id)
        for name in ("final", "checkpoint-5", "stable-stage1"):  # checkpoint-3 is then the newest
            shutil.rmtree(run / name)
        if part == "second":
            assert [row["train/optimizer_step"] for row in history if "train/loss" in row] == [4, 5]
            break
        layers = [row for row in history if "layers/by_layer/path" in row]
        assert [row["train/optimizer_step"] for row in layers] == [2, 4]
        drawn = (sent.folder / layers[-1]["layers/by_layer/path"]).read_text()
        assert drawn.count("<tr>") == 5 and all(f">{name}<" in drawn for name in ("grad norm", "hidden distance"))
        assert layers[-1]["layers/grad_norm_max"] >= layers[-1]["layers/grad_norm_mean"] > 0
        assert layers[-1]["layers/grad_norm_max_layer"] in range(4)
        chosen = json.loads((run / "layer_choice.json").read_text())["layers"]
        assert summary["attention_layers"] == chosen and config["layers"] == ["auto:2"]
        assert layers[-1]["layers/mean_decay_max_layer"] not in chosen
        assert [(row["train/stage_number"], row["train/optimizer_step"]) for row in history
                if "train/stage_number" in row] == [(1, 0), (2, 1)]  # fmt: skip
        assert summary["hidden/first_step"] == 0 and summary["stage1/first_step"] == 1
        evaluated = [(row["train/optimizer_step"], row["train/tokens"]) for row in history if "eval/kl" in row]
        assert evaluated == [(0, 0), (1, 128), (5, 640)]
        texts = next(row["samples/texts/path"] for row in history if "samples/texts/path" in row)
        shown = (sent.folder / texts).read_bytes().decode()  # as it is: random models write control characters
        written = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        assert len(written) == 4 and all(
            html.escape(text) in shown for row in written for text in list(row.values())[1:]
        )
        panels = {name for name, axis in sent.metrics if axis == "train/tokens"}
        assert {f"{panel}/*" for panel in ("train", "eval", "perf", "data", "layers", "samples")} <= panels
        assert all("train/tokens" in row for row in history if "_step" in row)
        assert summary["eval/kl"] == min(row["eval/kl"] for row in history if "eval/kl" in row)
        for row in history:
            assert {name.split("/")[0] for name in row if not name.startswith("_")} <= {
                "train", "eval", "perf", "data", "layers", "samples",
            }  # fmt: skip
    assert ids[0] == ids[1]


def test_metrics_are_cut_where_a_run_resumes(tmp_path):
    tracker = Tracker(tmp_path)
    for step in range(1, 5):
        tracker.log({"train/loss": 1.0 / step, "bad": float("nan")}, step=step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train')
    tracker.truncate_after(2)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["bad"] is None


def test_pictures_of_two_runs(tmp_path):
    for run in ("a", "b"):
        tracker = Tracker(tmp_path / run)
        for step in range(1, 150):
            tracker.log({"train/loss": 3.0 / step, "train/kl": 1.0 / step, "train/tokens": step * 100}, step=step)
    picture = plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "out.png", x="tokens")
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 10_000
    with pytest.raises(ValueError, match="no metrics to draw"):
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "metrics.jsonl").write_text("")
        plot_runs([tmp_path / "c"], tmp_path / "none.png")


def test_durations_and_lines():
    assert format_duration(5) == "0:05" and format_duration(3723) == "1:02:03"
    assert format_duration(90061) == "1d 01:01:01" and format_duration(float("inf")) == "?"
    line = format_line({"stage": "stage1", "stage_step": 3, "stage_total": 9, "train/loss": 1.5})
    assert line.startswith("stage1 3/9") and "\n" not in line


def test_readme_leads_to_every_flag():
    assert "docs/flags.md" in (ROOT / "README.md").read_text()
    listed = (ROOT / "docs" / "flags.md").read_text()
    assert all(f"`--{name}`" in listed for name in vars(parse_arguments([])))


def figures(step, kl):
    return {"eval/kl": kl, "eval/top1_agreement": 1 - kl, "eval/perplexity_ratio": 1 + kl, "train/tokens": 10 * step}


def start(folder, **settings):
    tracker = Tracker(folder)
    tracker.start_wandb({"seed": 1}, **{"project": "tiny", **settings})
    return tracker


def test_a_loopback_server_gets_exit_code_alerts_and_the_best_figures(tmp_path, monkeypatch):
    with LoopbackWandb() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        tracker = start(tmp_path, mode="online")
        for step, kl in ((1, 0.5), (2, 0.2), (3, 0.4)):
            tracker.log(figures(step, kl), step=step)
        tracker.alert("updates were skipped", "1 by step 3")
        tracker.close(143)
        wandb.teardown()
        run = server.runs[tracker.wandb_id]
    assert run["exit_code"] == 143 and run["alerts"] == ["updates were skipped"] and run["project"] == "tiny"
    assert [row["eval/kl"] for row in run["history"]] == [0.5, 0.2, 0.4]
    assert (run["summary"]["eval/kl"], run["summary"]["eval/top1_agreement"], run["summary"]["eval/best_step"]) == (
        0.2, 0.8, 2,
    )  # fmt: skip
    assert [row["train/tokens"] for row in run["history"]] == [10, 20, 30]


@pytest.mark.slow
def test_a_server_that_never_answers_costs_20_seconds_and_the_run_is_offline(tmp_path, monkeypatch, caplog):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        began = time.monotonic()
        with caplog.at_level("INFO"):
            tracker = start(tmp_path, mode="online")
        assert time.monotonic() - began < 20
        tracker.log(figures(1, 0.5), step=1)
        tracker.close()
        wandb.teardown()
    offline = OfflineRun(next(tmp_path.rglob("offline-run-*")))
    assert [row["eval/kl"] for row in offline.history] == [0.5] and offline.exit_code == 0
    command = next(line for line in caplog.text.splitlines() if "wandb sync" in line)
    assert command.endswith(str(offline.folder.parent))


def test_a_flag_that_is_given_beats_wandbs_environment(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_settings(parse_arguments([]))["project"] == "elsewhere"
    given = wandb_settings(parse_arguments(["--wandb_project", "llamba-distill", "--wandb_mode", "online"]))
    assert (given["project"], given["mode"], given["entity"]) == ("llamba-distill", "online", None)


def test_figures_of_layers_are_folded():
    row = folded({"layers/grad_norm_0": 1.0, "layers/grad_norm_7": 3.0, "train/loss": 2.0, "stage": "stage1",
                  "data/wait_seconds_rank_0": 0.1, "data/wait_seconds_rank_1": 0.4})  # fmt: skip
    assert row == {
        "train/loss": 2.0, "layers/grad_norm_mean": 2.0, "layers/grad_norm_max": 3.0, "layers/grad_norm_max_layer": 7,
        "data/slowest_rank": 1,
    }  # fmt: skip


def test_a_run_is_rebuilt_from_its_metrics(tmp_path, run_script):
    """Parts of a run that was killed and resumed become one, in which steps only grow."""
    tracker = Tracker(tmp_path)
    tracker.mark_stage("stage1", 0)
    for step in (1, 2, 3):
        tracker.log({"train/loss": 1.0 / step, "train/tokens": 10 * step}, step=step)
        tracker.log(figures(step, 0.5 / step), step=step)
    resumed = Tracker(tmp_path)
    resumed.truncate_after(2)
    resumed.log({"train/loss": 9.0, "train/tokens": 30}, step=3)
    done = run_script("sync_wandb.py", tmp_path, "--wandb_mode", "offline", "--wandb_project", "rebuilt")
    assert done.returncode == 0 and "wandb sync" in done.stdout, done.stderr
    run = OfflineRun(tmp_path)
    assert [row["_step"] for row in run.history] == [0, 1, 2, 3] and run.project == "rebuilt"
    assert [row.get("train/loss") for row in run.history] == [None, 1.0, 0.5, 9.0]
    assert run.history[2]["eval/kl"] == 0.25 and run.summary["eval/kl"] == 0.25
    assert run.exit_code == 1  # there is no checkpoint that says it was finished


def test_what_cannot_be_rebuilt_is_one_line(tmp_path, run_script):
    done = run_script("sync_wandb.py", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no metrics.jsonl" in done.stderr


@pytest.mark.slow
def test_how_a_run_ends_arrives_at_the_server(tmp_path, tiny_teacher, sources):
    """Exit status 143 after SIGTERM, 4 after a breakdown, and nothing at all of a run with bad input."""
    with LoopbackWandb() as server:

        def run(name, **changes):
            argv = runs.flags(
                tiny_teacher, sources, tmp_path / name, wandb=True, wandb_run_name=name, skip_stage2=True, **changes
            )
            return warm.start("train.py", argv, tmp_path / f"{name}.log", environment=server.environment())

        bad = run("bad", layers=99)
        assert bad.finish(60) == 2 and server.requests == 0
        broken = run("broken", max_lr="1e30", max_bad_steps=2, max_steps=20, grad_clip="1e30", warmup_ratio=0)
        stopped = run("stopped", max_steps=100_000)
        wait_until(
            lambda: any(len(sent["history"]) > 2 for sent in server.runs.values() if "stopped" in sent["names"])
        )
        stopped.send_signal(signal.SIGTERM)
        assert (broken.finish(90), stopped.finish(60)) == (4, 143)
    sent = {sent["names"].pop(): sent for sent in server.runs.values()}
    assert {name: run["exit_code"] for name, run in sent.items()} == {"broken": 4, "stopped": 143}
    assert "stopped with exit status 4" in sent["broken"]["alerts"] and not sent["stopped"]["alerts"]
