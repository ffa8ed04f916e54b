"""Every user's mistake is one line that names the flag and what would be right, exit status 2, nothing lost."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import download_fineweb_all
import download_fineweb_subset
import evaluate
import train
from helpers import runs


def complaint(capsys, argv: list[str]) -> str:
    """Run train.py in this process; returns its one line on stderr."""
    try:
        status = train.main(argv)
    except SystemExit as stop:
        status = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert status == 2
    assert len(lines) == 1, lines
    return lines[0]


FLAG_CASES = {
    "batch below 1": (dict(batch_size=0), "--batch_size: '0' is not a whole number of at least 1"),
    "accumulation below 1": (dict(grad_accumulation_steps=-3), "--grad_accumulation_steps"),
    "steps below 1": (dict(max_steps=0), "--max_steps: '0'"),
    "sequence below 1": (dict(seq_length=0), "--seq_length: '0'"),
    "not a number": (dict(max_lr="fast"), "--max_lr: 'fast' is not a number above 0"),
    "negative rate": (dict(max_lr="-1e-5"), "--max_lr"),
    "infinite rate": (dict(max_lr="inf"), "--max_lr: 'inf'"),
    "temperature 0": (dict(temperature=0), "--temperature: '0' is not a number above 0"),
    "negative weight": (dict(kl_weight="-1"), "--kl_weight"),
    "both loss weights 0": (dict(kl_weight=0, ce_weight=0), "--kl_weight 0 and --ce_weight 0"),
    "warmup and decay": (dict(warmup_ratio=0.7, decay_ratio=0.5), "0.7 + --decay_ratio 0.5 is above 1"),
    "alignment rates crossed": (
        dict(hidden_tokens=64, hidden_lr="1e-6"),
        "--min_lr 1e-05 is above --hidden_lr 1e-06",
    ),
    "matrix sequence too long": (
        dict(matrix_tokens=64, matrix_seq_length=4096),
        "--matrix_seq_length 4096: the teacher has 2048 positions",
    ),
    "rates crossed": (dict(min_lr="1e-2"), "--min_lr 0.01 is above --max_lr 0.001"),
    "unknown device": (dict(device="tpu"), "--device: 'tpu' is not a device"),
    "absent CUDA device": (dict(device="cuda:7"), "--device cuda:7: this machine has no such CUDA device"),
    "absent teacher device": (dict(teacher_device="cuda:7"), "cuda:7"),
    "unknown dtype": (dict(dtype="int8"), "--dtype: invalid choice: 'int8'"),
    "layer out of range": (dict(layers=[1, 9]), "--layers 9: the teacher has layers 0 to 3"),
    "layer that is no number": (dict(layers="all"), "--layers: 'all' is not a layer's index or auto:K"),
    "no layer to choose": (dict(layers="auto:0"), "--layers: 'auto:0' is not a layer's index or auto:K"),
    "a choice of no number": (dict(layers="auto:x"), "--layers: 'auto:x' is not a layer's index or auto:K"),
    "more layers to choose than there are": (dict(layers="auto:99"), "--layers auto:99: the teacher has 4 layers"),
    "no head at all": (dict(expand=0), "--expand: '0' is not a whole number of at least 1"),
    "more heads than have a memory": (dict(expand=5), "--expand: '5' is above 4"),
    "a choice beside layers": (dict(layers=["auto:2", 1]), "--layers auto:2 1: auto:K stands alone"),
    "sequence too long": (dict(seq_length=4096), "--seq_length 4096: the teacher has 2048 positions"),
    "unknown flag": (dict(learning_rate=1), "unrecognized arguments: --learning_rate"),
    "unknown optimizer": (dict(optimizer="sgd"), "--optimizer: invalid choice: 'sgd'"),
    "evaluation without text": (dict(eval_interval=5), "--eval_interval needs --eval_dataset"),
    "prompts without an interval": (dict(sample_prompts="/nowhere"), "--sample_prompts needs --sample_interval"),
    "no prompts": (dict(sample_prompts="/nowhere", sample_interval=1), "--sample_prompts /nowhere: cannot be read"),
    "empty prompts": (dict(sample_prompts="/dev/null", sample_interval=1), "/dev/null holds no prompt"),
    "missing text field": (dict(dataset_text_field="body"), "body.*id, text|body.*text"),
    "no data folder": (dict(dataset_name="/nowhere/text"), "/nowhere/text"),
    "no teacher folder": (dict(teacher_model="/nowhere/model"), "/nowhere/model does not exist"),
    "no student folder": (dict(student_model="/nowhere/model"), "/nowhere/model does not exist"),
    "no checkpoint to resume": (dict(resume="/nowhere/checkpoint-3"), "checkpoint-3: there is no such folder"),
    "no flash attention": (dict(attn_implementation="flash_attention_2"), "flash-attn is not installed"),
}


@pytest.mark.parametrize("case", FLAG_CASES)
def test_wrong_flags(capsys, tmp_path, tiny_teacher, sources, case):
    import re

    changes, expected = FLAG_CASES[case]
    line = complaint(capsys, runs.flags(tiny_teacher, sources, tmp_path / "run", **changes))
    assert re.search(expected.replace("+", r"\+").replace("(", r"\("), line), line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_text_that_is_too_short_or_empty(capsys, tmp_path, tiny_teacher, sources):
    short = tmp_path / "short.jsonl.gz"
    runs.write_rows(short, [{"text": "few words"}])
    assert "short.jsonl.gz" in complaint(
        capsys, runs.flags(tiny_teacher, sources, tmp_path / "run", dataset_name=short)
    )
    runs.write_rows(short, [])
    assert "short.jsonl.gz" in complaint(
        capsys, runs.flags(tiny_teacher, sources, tmp_path / "run", dataset_name=short)
    )
    (tmp_path / "empty").mkdir()
    assert "empty" in complaint(
        capsys, runs.flags(tiny_teacher, sources, tmp_path / "run", dataset_name=tmp_path / "empty")
    )


def test_output_folder_that_cannot_be_written(capsys, tmp_path, tiny_teacher, sources):
    (tmp_path / "file").write_text("not a folder")
    line = complaint(capsys, runs.flags(tiny_teacher, sources, tmp_path / "file" / "run"))
    assert "--output_dir" in line and "is a file, not a folder" in line


def test_log_file_that_cannot_be_written(capsys, tmp_path, tiny_teacher, sources):
    line = complaint(capsys, runs.flags(tiny_teacher, sources, tmp_path / "run", log_file=tmp_path))
    assert "--log_file" in line


def test_folder_without_config_or_weights(capsys, tmp_path, tiny_teacher, sources):
    folder = tmp_path / "model"
    folder.mkdir()
    line = complaint(capsys, runs.flags(folder, sources, tmp_path / "run"))
    assert "has no config.json" in line
    (folder / "config.json").write_text((tiny_teacher / "config.json").read_text())
    assert "has no weights" in complaint(capsys, runs.flags(folder, sources, tmp_path / "run"))


def test_another_vocabulary(capsys, tmp_path, tiny_teacher, sources):
    from models import LlambaConfig, LlambaForCausalLM

    sizes = dict(vocab_size=1024, d_model=64, n_layer=4, mlp_cfg={"intermediate_size": 128})
    ssm = {"n_v_heads": 4, "n_qk_heads": 4, "d_state": 16}
    LlambaForCausalLM(LlambaConfig(**sizes, ssm_cfg=ssm)).save_pretrained(tmp_path / "student")
    line = complaint(capsys, runs.flags(tiny_teacher, sources, tmp_path / "run", student_model=tmp_path / "student"))
    assert "vocabulary has 1024 entries, the teacher's 512" in line


def test_another_architecture(capsys, tmp_path, sources):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    line = complaint(capsys, runs.flags(tmp_path, sources, tmp_path / "run"))
    assert "supported are llama, mistral, qwen2, qwen3" in line


def test_offline_names_what_is_missing(capsys, tmp_path, sources):
    argv = runs.flags("some-owner/some-model", sources, tmp_path / "run", local_files_only=True)
    line = complaint(capsys, argv)
    assert "some-owner/some-model" in line and "--local_files_only" in line


def test_wandb_without_a_login(capsys, tmp_path, tiny_teacher, sources, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    argv = runs.flags(tiny_teacher, sources, tmp_path / "run", wandb=True)
    assert "not logged in" in complaint(capsys, argv)


def test_resume_none_does_not_overwrite_a_run(capsys, tmp_path, tiny_teacher, sources):
    folder = tmp_path / "run" / "checkpoint-5"
    folder.mkdir(parents=True)
    (folder / "kept").write_text("precious")
    line = complaint(capsys, runs.flags(tiny_teacher, sources, tmp_path / "run", resume="none"))
    assert "--resume none" in line and (folder / "kept").read_text() == "precious"
    assert os.listdir(tmp_path / "run" / "checkpoint-5") == ["kept"]


def test_a_password_in_a_wrong_flag_is_masked(capsys, tmp_path, tiny_teacher, sources):
    for changes in (dict(dataset_name="https://user:correcthorse@host/x.jsonl"), dict(hf_token="hf_" + "a" * 30)):
        line = complaint(capsys, runs.flags(tiny_teacher, sources, tmp_path / "run", **changes))
        assert "***" in line and "correcthorse" not in line and "aaaa" not in line


def test_a_llama_as_student_and_a_device_that_is_not_there(capsys, tmp_path, tiny_teacher, sources):
    line = complaint(capsys, runs.flags(tiny_teacher, sources, tmp_path / "run", student_model=tiny_teacher))
    assert "is a llama model, not a Llamba" in line and "from_teacher" in line
    line = complaint(capsys, runs.flags(tiny_teacher, sources, tmp_path / "run", teacher_device="cuda:33"))
    assert "--teacher_device cuda:33: this machine has no such CUDA device" in line


def test_evaluate_names_the_model_of_a_run(tmp_path, capsys):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    assert evaluate.main(["--student", str(tmp_path), "--teacher", "x", "--device", "cpu"]) == 2
    assert f"its model is {tmp_path / 'final'}" in capsys.readouterr().err


@pytest.mark.parametrize("script", [evaluate, download_fineweb_all, download_fineweb_subset])
def test_help_shows_defaults(script, capsys):
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: 600.0)" in shown and "(default: None)" not in shown
