"""Pictures from metrics.jsonl: what is read, where lines break, how runs are told apart, and the script itself."""

import json
import math

import pytest

from plot_metrics import plot_runs, run_labels, running_mean, series
from run.metrics_file import read_metrics

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder, steps=30, stage2=20, speed=1.0):
    folder.mkdir(parents=True)
    rows = []
    for step in range(steps):
        if step in (0, stage2):
            rows.append({"step": step, "stage_begins": f"stage{1 + (step > 0)}"})
        loss = 1 + speed * math.exp(-step / 8)
        rows.append({"step": step + 1, "train/tokens": 64 * (step + 1), "train/loss": loss, "train/kl": loss - 1})
        if step % 10 == 9:
            rows.append({"step": step + 1, "eval/kl": loss - 1, "eval/top1_agreement": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_lines_that_were_cut_off_are_passed_over(tmp_path):
    run = write_run(tmp_path / "run")
    whole = read_metrics(run)
    file = run / "metrics.jsonl"
    good = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(good[:5]) + b'{"step": 5, "tra\xff\xfe\n5\n' + b"".join(good[5:]) + b'{"step": 31, "tr')
    assert read_metrics(run) == read_metrics(file) == whole


def test_a_training_line_breaks_where_a_stage_begins_and_an_evaluation_does_not(tmp_path):
    rows = read_metrics(write_run(tmp_path / "run"))
    lines = series(rows, "train/loss", "step")
    assert [(xs[0], xs[-1]) for xs, _ in lines] == [(1, 20), (21, 30)]
    assert [xs for xs, _ in series(rows, "eval/kl", "step")] == [[10, 20, 30]]
    assert [xs for xs, _ in series(rows, "eval/kl", "tokens")] == [[640, 1280, 1920]]
    assert series(rows, "train/nothing", "step") == []


def test_missing_values_leave_no_points():
    rows = [{"step": 1, "train/loss": None}, {"step": 2, "train/loss": math.nan}, {"step": 3, "train/loss": 2}]
    assert series(rows, "train/loss", "step") == [([3.0], [2.0])]


def test_a_metric_with_a_value_a_layer(tmp_path, monkeypatch):
    rows = [{"step": 2, "layers/x_0": 1.0, "layers/x_10": 5.0, "layers/x_1": None}, {"step": 3, "train/loss": 1.0}]
    assert series(rows, "layers/x", "step") == [([2.0], [3.0])]
    assert series(rows, "layers/x", "step", min) == [([2.0], [1.0])]
    assert series(rows, "layers/x", "step", max) == [([2.0], [5.0])]
    figures = drawn(monkeypatch)
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        lines = [{"step": step, **{f"layers/mean_decay_{i}": step / (i + 9) for i in range(4)}} for step in (1, 2, 3)]
        (tmp_path / run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "out.png")
    (axis,) = [axis for axis in figures[0].axes if axis.get_visible()]
    assert axis.get_title() == "decay of a mixer: mean, range" and len(axis.collections) == 2


def test_running_mean():
    assert running_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    runs = [write_run(tmp_path / name / "run") for name in "ab"]
    assert run_labels(runs) == ["a/run", "b/run"]
    assert run_labels([tmp_path / "x", tmp_path / "y" / "metrics.jsonl"]) == ["x", "metrics.jsonl"]
    assert run_labels([runs[0] / "metrics.jsonl"]) == ["run"]


def drawn(monkeypatch):
    """Keeps the figures that `plot_runs` writes."""
    from matplotlib.figure import Figure

    figures, write = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), write(self, *args, **kw)))
    return figures


@pytest.mark.parametrize("x", ["step", "tokens"])
def test_panels_legend_and_stage_marks(tmp_path, monkeypatch, x):
    figures = drawn(monkeypatch)
    runs = [write_run(tmp_path / name, speed=i + 1) for i, name in enumerate("ab")]
    picture = plot_runs(runs, tmp_path / "out.png", x=x)
    assert picture.read_bytes().startswith(PNG)
    (figure,) = figures
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert list(panels) == [
        "distillation loss, nats a token", "KL(teacher || student), nats a token", "held-out KL, nats a token",
        "held-out top-1 agreement",
    ]  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    kl = panels["KL(teacher || student), nats a token"]
    assert kl.get_yscale() == "log"  # a range of e^(29/8)
    assert panels["distillation loss, nats a token"].get_yscale() == "linear"  # a range below 4
    dotted = [line.get_xdata()[0] for line in kl.lines if line.get_linestyle() == ":"]
    assert dotted == [20 if x == "step" else 1280] * 2
    kept = [line for line in kl.lines if line.get_gid() == "metric"]
    assert len(kept) == 4 and kept[0].get_xdata()[-1] == (20 if x == "step" else 1280)


def test_one_run_names_its_stages(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    plot_runs([write_run(tmp_path / "run")], tmp_path / "out.png")
    assert [text.get_text().strip() for text in figures[0].axes[0].texts] == ["stage1", "stage2"]
    assert not figures[0].legends


def test_a_single_point_far_from_its_stages_start(tmp_path, recwarn):
    rows = [{"step": 0, "stage_begins": "stage1"}, {"step": 60, "train/loss": 3.0, "train/kl": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plot_runs([tmp_path], tmp_path / "out.png")
    assert not [str(warning.message) for warning in recwarn if "layout" in str(warning.message)]


def test_values_that_no_logarithm_takes(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 31, "train/kl": 0.0}) + "\n")
    plot_runs([run], tmp_path / "out.png")
    assert figures[0].axes[1].get_yscale() == "linear"


def test_the_script(tmp_path, run_script):
    runs = [write_run(tmp_path / name) for name in "ab"]
    done = run_script("plot_metrics.py", *runs, "--output", "out.png", "--x", "tokens", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(PNG)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    for wrong in ([tmp_path / "none"], [tmp_path / "empty"], [runs[0], "--output", tmp_path / "no" / "folder.png"]):
        done = run_script("plot_metrics.py", *wrong, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


def test_an_alignment_error_is_no_distillation_loss(tmp_path, monkeypatch):
    figures, rows = drawn(monkeypatch), [{"step": 0, "stage_begins": "hidden", "stage": "hidden"}]
    for step, stage in ((1, "hidden"), (2, "hidden"), (3, "stage1"), (4, "stage1")):
        rows.append({"step": step, "stage": stage, "train/loss": 0.5 * step})
    rows.append({"step": 4, "eval/kl": 0.25})
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plot_runs([tmp_path], tmp_path / "out.png")
    shown = {axis.get_title(): axis for axis in figures[0].axes if axis.get_visible()}
    align, distil = shown["alignment error (matrix, hidden)"], shown["distillation loss, nats a token"]
    assert [list(axis.lines[0].get_ydata()) for axis in (align, distil)] == [[0.5, 1.0], [1.5, 2.0]]
    assert shown["held-out KL, nats a token"].lines[0].get_marker() == "o"
    assert figures[0].get_suptitle() == tmp_path.name
