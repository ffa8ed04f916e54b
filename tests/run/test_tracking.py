"""Figures as their readers get them: metrics.jsonl, a real offline W&B run parsed back, the plot, masked secrets."""

import json
import shutil
import struct

import pytest

from arguments import parse_arguments
from conftest import ROOT
from helpers import runs
from plot_metrics import plot_runs, read_metrics
from run.tracking import Tracker
from utils import format_duration, format_line

wandb = pytest.importorskip("wandb")


def offline_records(folder):
    """Every record of an offline run directory: protocol buffers in LevelDB's log format after W&B's 7-byte header.

    Blocks of 32 KiB hold pieces with a header of checksum (4), length (2), type (1: whole, 2: first, 3: middle,
    4: last); a block's last 6 bytes or fewer are padding.
    """
    from wandb.proto import wandb_internal_pb2

    data = next(folder.rglob("run-*.wandb")).read_bytes()
    assert data[:4] == b":W&B"
    position, message = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if kind == 0:
            break
        message = (b"" if kind in (1, 2) else message) + data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record


def values_of(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def parse_back(folder):
    """(history rows, configuration, (metric, its x axis) pairs, summary, run id) of an offline run directory."""
    history, config, metrics, summary, run_id = [], {}, set(), {}, ""
    for record in offline_records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(values_of(record.history.item))
        elif kind == "run":
            config, run_id = values_of(record.run.config.update), record.run.run_id
        elif kind == "metric":
            metrics.add((record.metric.name or record.metric.glob_name, record.metric.step_metric))
        elif kind == "summary":
            summary |= values_of(record.summary.update)
    return history, config, metrics, summary, run_id


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
    history, config, metrics, _, _ = parse_back(tmp_path)
    losses = [row["train/loss"] for row in history if "train/loss" in row]
    assert losses == [row["train/loss"] for row in runs.metrics(tmp_path / "run") if "train/loss" in row]
    for name in ("kl", "top1_agreement", "lr", "grad_norm", "tokens", "tokens_per_second", "optimizer_step"):
        assert any(f"train/{name}" in row for row in history), name
    assert config["max_steps"] == 3 and config["seq_length"] == 64
    assert ("train/*", "train/optimizer_step") in metrics
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
        history, config, metrics, summary, run_id = parse_back(tmp_path / part)
        ids.append(run_id)
        for name in ("final", "checkpoint-5", "stable-stage1"):  # checkpoint-3 is then the newest
            shutil.rmtree(run / name)
        if part == "second":
            assert [row["train/optimizer_step"] for row in history if "train/loss" in row] == [4, 5]
            break
        layers = [row for row in history if "layers/grad_norm_0" in row]
        assert [row["train/optimizer_step"] for row in layers] == [2, 4]
        for kind in ("grad_norm", "hidden_distance"):
            assert all(f"layers/{kind}_{index}" in layers[-1] for index in range(4))
        chosen = json.loads((run / "layer_choice.json").read_text())["layers"]
        assert summary["attention_layers"] == chosen and config["layers"] == ["auto:2"]
        mixers = [name for name in layers[-1] if name.startswith("layers/mean_decay_")]
        assert sorted(mixers) == [f"layers/mean_decay_{index}" for index in range(4) if index not in chosen]
        assert [(row["train/stage_number"], row["train/optimizer_step"]) for row in history
                if "train/stage_number" in row] == [(1, 0), (2, 1)]  # fmt: skip
        assert summary["hidden/first_step"] == 0 and summary["stage1/first_step"] == 1
        evaluated = [(row["train/optimizer_step"], row["train/tokens"]) for row in history if "eval/kl" in row]
        assert evaluated == [(0, 0), (1, 128), (5, 640)]
        table = next(row for row in history if row.get("samples/texts/_type") == "table-file")
        content = json.loads(next((tmp_path / part).rglob(table["samples/texts/path"])).read_text())
        assert content["columns"] == ["step", "prompt", "student", "teacher"]
        written = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
        assert content["data"] == [list(row.values()) for row in written] and len(written) == 4
        panels = {name for name, axis in metrics if axis == "train/optimizer_step"}
        assert {f"{panel}/*" for panel in ("train", "eval", "perf", "data", "layers", "samples")} <= panels
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
