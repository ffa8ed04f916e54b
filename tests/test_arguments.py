"""Flags: names and defaults as users know them, one line for a mistake, quick help, a table that cannot drift."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from arguments import FREE_FLAGS, RESULT_FLAGS, build_parser, parse_arguments
from conftest import ROOT
from flags.page import markdown_page
from helpers.durations import cpu_seconds
from run.flag_checks import validate, wandb_login
from utils import UserError, check_folder_writable

DEFAULTS = {
    "device": "cuda:0", "teacher_device": None, "dtype": "bfloat16", "layers": [10, 14, 17, 30], "max_steps": 100000,
    "epochs": 0, "batch_size": 1, "grad_accumulation_steps": 1, "seq_length": 4096,
    "dataset_name": "HuggingFaceFW/fineweb-edu", "dataset_subset": "CC-MAIN-2014-49", "dataset_split": "train",
    "dataset_revision": None, "dataset_text_field": "text", "no_dataset_streaming": False, "shuffle_buffer": 10000,
    "max_lr": 1e-5, "min_lr": 1e-8, "warmup_ratio": 0.1, "decay_ratio": 0.1, "weight_decay": 0.1, "grad_clip": 1.0,
    "temperature": 1.0, "kl_weight": 1.0, "ce_weight": 0.0, "log_interval": 1, "save_interval": 1000000,
    "output_dir": "distilled_llamba", "log_file": None, "second_dataset_name": "teknium/OpenHermes-2.5",
    "skip_stage2": False, "second_dataset_epochs": 4, "second_dataset_tokens": 200000000,
    "second_dataset_text_field": "text", "second_dataset_split": "train", "resume_step": 0,
    "local_files_only": False, "freeze_mlp": False, "freeze_replaced_layers": False, "wandb": False,
    "wandb_project": "llamba-distill", "wandb_run_name": None, "wandb_entity": None, "wandb_mode": "online",
    "teacher_model": "meta-llama/Llama-3.1-8B-Instruct", "student_model": "goombalab/Llamba-8B-untied-unaligned",
    "seed": 42, "attn_implementation": "sdpa", "resume": "auto", "resume_force": False, "keep_checkpoints": 2,
    "save_minutes": 30.0, "max_bad_steps": 10, "on_bad_data": "error", "network_patience": 600.0, "eval_interval": 0,
    "eval_dataset": "", "matrix_tokens": 0, "hidden_tokens": 0, "matrix_seq_length": 512,
    "gradient_checkpointing": "auto", "no_compile": False, "no_cuda_graphs": False, "teacher_fp8": False,
    "document_reset": False,
}  # fmt: skip


def flags(tmp_path: Path, *argv: str):
    return parse_arguments(["--output_dir", str(tmp_path / "run"), *argv])


def complaint(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_defaults():
    args = vars(parse_arguments([]))
    assert {name: args[name] for name in DEFAULTS} == DEFAULTS


def test_every_flag_has_a_group_and_a_help_text():
    parser = build_parser()
    grouped = {id(a) for group in parser._action_groups[2:] for a in group._group_actions}
    for action in parser._actions:
        assert action.help, action.dest
        assert action.dest == "help" or id(action) in grouped, action.dest


def test_result_flags_are_all_but_the_free_ones():
    assert set(vars(parse_arguments([]))) == RESULT_FLAGS | FREE_FLAGS
    assert not RESULT_FLAGS & FREE_FLAGS
    assert {"teacher_model", "layers", "max_lr", "batch_size", "seed", "dataset_name", "optimizer"} <= RESULT_FLAGS


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import sys, arguments; arguments.build_parser().format_help();"
        "print([m for m in ('torch', 'transformers', 'datasets', 'wandb', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    begun = cpu_seconds()  # other work may share the machine
    subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], cwd="/", capture_output=True, check=True)
    assert cpu_seconds() - begun < 0.5


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--device", "cuda:007"], ["--device", "'cuda:007'", "cuda:N"]),
        (["--device", "cuda:128"], ["--device", "'cuda:128'"]),
        (["--seed", str(2**63)], ["--seed", str(2**63), "largest"]),
        (["--seed", "-1"], ["--seed", "'-1'", "at least 0"]),
        (["--keep_checkpoints", "0"], ["--keep_checkpoints", "'0'", "at least 1"]),
        (["--warmup_ratio", "1.5"], ["--warmup_ratio", "'1.5'", "at most 1"]),
        (["--network_patience", "nan"], ["--network_patience", "'nan'"]),
        (["--batch_size", "two\nlines"], ["--batch_size"]),
        (["--unknown\nflag"], ["unrecognized", "\\n"]),
        (["--max_step", "5"], ["--max_step"]),  # no abbreviations: a typing error must not become another flag
        (["--optimizer"], ["--optimizer"]),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, argv, words):
    line = complaint(capsys, *argv)
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_cuda_is_its_first_device():
    assert parse_arguments(["--device", "cuda"]).device == "cuda:0"
    assert parse_arguments(["--teacher_device", "cuda:15"]).teacher_device == "cuda:15"


def test_home_is_expanded_where_the_shell_does_not(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse_arguments(["--output_dir=~/run", "--log_file=~/log"])
    assert (args.output_dir, args.log_file) == (str(tmp_path / "run"), str(tmp_path / "log"))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--warmup_ratio", "0.7", "--decay_ratio", "0.5"], "--warmup_ratio 0.7"),
        (["--kl_weight", "0"], "--ce_weight 0"),
        (["--min_lr", "1e-3"], "--min_lr 0.001 is above --max_lr"),
        (["--eval_interval", "5"], "--eval_dataset"),
        (["--update_in_backward", "--grad_accumulation_steps", "2"], "--grad_accumulation_steps 1"),
        (["--update_in_backward", "--dtype", "float16"], "--dtype float16.*use bfloat16"),
        (
            ["--document_reset", "--attn_implementation", "flash_attention_2", "--batch_size", "2"],
            "--batch_size 2: flash_attention_2 keeps documents apart",
        ),
    ],
)
def test_combinations(tmp_path, argv, message):
    with pytest.raises(UserError, match=message) as error:
        validate(flags(tmp_path, *argv))
    assert "\n" not in str(error.value)
    validate(flags(tmp_path))


def test_edges_that_are_allowed(tmp_path):
    validate(flags(tmp_path, "--warmup_ratio", "0.5", "--decay_ratio", "0.5"))
    validate(flags(tmp_path, "--min_lr", "1e-5"))
    validate(flags(tmp_path, "--kl_weight", "0", "--ce_weight", "1"))


def test_folders_are_tried_and_left_as_they_were(tmp_path):
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    check_folder_writable("--output_dir", tmp_path / "new" / "deeper")
    for folder in ("gone/run", "file/run", "x" * 300):
        with pytest.raises(UserError, match="--output_dir"):
            check_folder_writable("--output_dir", tmp_path / folder)
    with pytest.raises(UserError, match="--output_dir /proc/run: cannot write in /proc"):
        check_folder_writable("--output_dir", Path("/proc/run"))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_log_file_that_is_read_only(tmp_path):
    (tmp_path / "log").touch(mode=0o400)
    with pytest.raises(UserError, match=r"--log_file .* cannot be written"):
        validate(flags(tmp_path, "--log_file", str(tmp_path / "log")))


def test_wandb_login_is_found_without_the_package(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not wandb_login()
    (tmp_path / "netrc").write_text("machine wandb.example login user password " + "0" * 8 + "\n")
    assert not wandb_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example/")
    assert wandb_login()
    (tmp_path / "netrc").write_text("not a netrc file {")
    assert not wandb_login()
    monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", str(tmp_path / "identity"))
    assert wandb_login()


def test_the_page_of_flags_lists_every_flag_as_it_is():
    command = [sys.executable, str(ROOT / "arguments.py"), "--markdown"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
    for name in vars(parse_arguments([])):
        assert f"| `--{name}` |" in done.stdout
    advice = "write it anew: python arguments.py --markdown > docs/flags.md"
    assert done.stdout == f"{markdown_page(build_parser())}\n" == (ROOT / "docs" / "flags.md").read_text(), advice
