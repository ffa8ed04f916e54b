"""Before a run: --dry_run, the plan that every log begins with, --config and run.yaml, an empty --layers."""

import re

import pytest
import yaml

import train
from arguments import Arguments, parse_arguments
from benchmarks.presets import preset
from flags.config_file import config_text
from helpers import runs
from optim.schedule import Phases
from run.forecast import STATED_RATE, Forecast
from run.inputs import Inputs


def plan_of(output: str) -> dict[str, str]:
    """The plan's lines by their first word."""
    return dict(re.findall(r"plan: ([\w ]+): (.*)", output))


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path, tiny_teacher, sources, run_script):
    argv = runs.flags(tiny_teacher, sources, tmp_path / "run", log_file=tmp_path / "log", batch_size=4)
    done = run_script("train.py", *argv, "--dry_run")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())
    plan = plan_of(done.stdout)
    assert plan["stage1"].startswith("2.048k tokens in 8 optimizer steps of 256; rate up to 0.001")
    assert plan["stage2"].startswith("512 tokens in 2 optimizer steps of 256")
    assert plan["attention layers"] == "1 of 4; 242k parameters trained, 0 frozen"
    assert "measured here on random weights" in plan["time"] and "GiB" in plan["memory"]
    assert plan["disk"].startswith("at most 5 checkpoints of 1.4 MiB")
    assert re.search(r"stage1 reads .*: 1 files of [\d,]+ bytes", done.stdout)
    assert "max_lr: 0.001\n" in done.stdout and "second_dataset_epochs: 1\n" in done.stdout


@pytest.mark.slow
def test_a_dry_run_where_there_is_no_gpu_states_its_rate(tmp_path, tiny_teacher, sources, run_script):
    argv = runs.flags(tiny_teacher, sources, tmp_path / "run", device="cuda:0", dtype="bfloat16", skip_stage2=True)
    done = run_script("train.py", *argv, "--dry_run", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "there is no GPU here" in done.stdout and "at 500 TFLOP/s a GPU" in done.stdout


def test_the_default_flags_are_days_of_an_h100():
    """410M + 800M tokens of the 8B pair; measured frozen MLPs: 9,635 tokens/s on an H100 (docs/measurements.md)."""
    args, sizes = parse_arguments(["--freeze_mlp"]), preset("8b")
    inputs = Inputs(None, sizes.teacher, sizes.student, None, "throughout")
    phases = {"stage1": Phases.of(100_000, 0.1, 0.1), "stage2": Phases.of(195_313, 0.1, 0.1)}
    forecast = Forecast(args, inputs, phases, {"stage1": 0, "stage2": 0}, 1)
    assert forecast.tokens("stage1") == 409_600_000 and forecast.tokens("stage2") == 800_002_048
    hours = sum(forecast.seconds(STATED_RATE).values()) / 3600
    assert hours == pytest.approx(1_209_602_048 / 9_635 / 3600, rel=0.1)
    halves = Forecast(args, inputs, phases, {"stage1": 50_000, "stage2": 0}, 2)
    assert halves.seconds(STATED_RATE)["stage1"] == pytest.approx(forecast.seconds(STATED_RATE)["stage1"] / 2)


@pytest.mark.slow
def test_run_yaml_repeats_the_run(tmp_path, tiny_teacher, sources, run_script):
    argv = runs.flags(tiny_teacher, sources, tmp_path / "run", max_steps=3, skip_stage2=True, layers=[])
    first = run_script("train.py", *argv)
    assert first.returncode == 0, first.stderr[-2000:]
    assert plan_of(first.stdout)["attention layers"].startswith("none of 4")
    written = tmp_path / "run" / "run.yaml"
    again = run_script("train.py", "--config", written, "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr[-2000:]
    assert runs.losses(tmp_path / "again") == runs.losses(tmp_path / "run")
    other = yaml.safe_load((tmp_path / "again" / "run.yaml").read_text()) | {"output_dir": str(tmp_path / "run")}
    assert other == yaml.safe_load(written.read_text())
    same = run_script("train.py", "--config", written)
    assert same.returncode == 0 and "nothing to do" in same.stdout


def test_a_file_of_flags_and_what_overrides_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "max_lr: 1e-4\nfreeze_mlp: true\nlayers: [3, -1]\nwandb: false\nlog_file: null\ndataset_subset: ''\n"
    )
    args = parse_arguments(["--config", str(file), "--max_steps", "7"])
    assert (args.max_lr, args.freeze_mlp, args.layers, args.wandb, args.max_steps) == (1e-4, True, [3, -1], False, 7)
    assert args.log_file is None and args.dataset_subset == ""
    given = parse_arguments(["--max_lr", "1", "--freeze_mlp", "false", f"--config={file}", "--layers", "auto:2"])
    assert (given.max_lr, given.freeze_mlp, given.layers) == (1.0, False, ["auto:2"])


def test_every_flag_survives_a_file(tmp_path):
    words = ["--wandb", "--layers", "1", "2", "--max_lr", "1e-7", "--sample_prompts=--odd name", "--expand=2"]
    args = parse_arguments(words)
    file = tmp_path / "run.yaml"
    file.write_text(config_text(vars(args)))
    assert vars(parse_arguments(["--config", str(file)])) == vars(args) | {"config": str(file)}
    assert set(yaml.safe_load(file.read_text())) <= set(vars(Arguments()))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("max_step: 3", "max_step is no flag that a file can hold; did you mean max_steps?"),
        ("dry_run: true", "dry_run is no flag that a file can hold"),
        ("max_steps: none", "argument --max_steps: 'none' is not a whole number"),
        ("max_steps: {a: 1}", "max_steps: write one value or a list of them"),
        ("just words", "write a flag a line"),
        ("a: [", "is no YAML"),
        (None, "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path, capsys, content, complaint):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(file)])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and complaint in lines[0], lines


@pytest.mark.parametrize("words", [["--layers"], ["--layers", ""], ["--layers", "-1"]])
def test_no_layers(words):
    args = parse_arguments(words)
    assert [index for index in args.layers if index >= 0] == []
