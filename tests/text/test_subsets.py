"""A subset that is not there is refused with those that are; what a stage reads is in the log."""

import logging
import re

import pytest

import train
from arguments import RESULT_FLAGS, parse_arguments
from checkpoints.origins import flags_as_made
from helpers import runs
from model_utils import get_tokenizer
from run.resume import changed_flags
from run.text import RunText
from text.text_sources import SourceSpec, find_files
from utils import UserError

DEFAULT = "CC-MAIN-2014-49"
CONFIGS = "configs:\n- config_name: default\n  data_files: data/*/*\n- config_name: sample\n  data_files: no/*\n"


@pytest.fixture
def folder(tmp_path, documents):
    for name in ("data/A", "B"):
        (tmp_path / "in" / name).mkdir(parents=True)
        runs.write_rows(tmp_path / "in" / name / "x.jsonl.gz", [{"text": text} for text in documents[:3]])
    return tmp_path / "in"


def test_what_is_not_there_is_refused_and_what_is_there_named(folder):
    with pytest.raises(UserError, match=rf"^--dataset_subset C: {folder} has none such in split train; there: B, A "):
        find_files(SourceSpec(str(folder), subset="C"))
    with pytest.raises(UserError, match=r"^--eval_dataset_subset C: "):
        find_files(SourceSpec(str(folder), subset="C", flag="--eval_dataset_"))
    with pytest.raises(
        UserError, match=r"^--dataset_subset C: .* is a file, which has none; use --dataset_subset ''"
    ):
        find_files(SourceSpec(str(folder / "B" / "x.jsonl.gz"), subset="C"))
    with pytest.raises(UserError, match=r"^--second_dataset_split other: "):
        find_files(SourceSpec(str(folder), split="other", flag="--second_dataset_"))


def test_a_configuration_whose_files_are_not_mirrored_is_not_there(folder):
    (folder / "README.md").write_text(f"---\n{CONFIGS}---\n")
    with pytest.raises(UserError, match=r"--dataset_subset sample: .*; there: B, A, default, sample"):
        find_files(SourceSpec(str(folder), subset="sample"))


@pytest.mark.parametrize("flag", ["dataset_subset", "second_dataset_subset"])
def test_a_run_with_a_wrong_subset_is_one_line(folder, tiny_teacher, sources, tmp_path, capsys, flag):
    changes = {"dataset_name": folder, "second_dataset_name": folder, flag: "CC-MAIN-2099-99"}
    assert train.main(runs.flags(tiny_teacher, sources, tmp_path / "out", **changes)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: --{flag} CC-MAIN-2099-99: {folder} has none such in split train; there: B, A")
    assert not list((tmp_path / "out").glob("*.jsonl")) and not list((tmp_path / "out").glob("checkpoint*"))


def test_the_default_subset_is_never_in_the_way(folder):
    subset = lambda name, *more: parse_arguments(["--dataset_name", str(name), *more]).dataset_subset  # noqa: E731
    assert subset("HuggingFaceFW/fineweb-edu") == DEFAULT
    assert subset(folder) == subset(folder / "B" / "x.jsonl.gz") == ""
    assert subset(folder, "--dataset_subset", "C") == "C"
    (folder / "data" / DEFAULT).mkdir()
    assert subset(folder) == DEFAULT


@pytest.mark.parametrize("version", [None, 2])
def test_a_run_begun_when_a_wrong_subset_meant_all_is_resumed_with_none(folder, version):
    """The same command where it was the default; else with '', as the refusal of the wrong one says."""
    now = vars(parse_arguments(["--dataset_name", str(folder)]))
    metadata = {"flags": {**now, "dataset_subset": DEFAULT}, **({"text_version": version} if version else {})}
    changed = list(map(str, changed_flags(flags_as_made(metadata), now)))
    assert changed == ([] if version is None else [f"--dataset_subset was {DEFAULT} and is ''"])
    assert "dataset_subset" in RESULT_FLAGS


def test_the_log_says_how_much_a_stage_reads(tiny_teacher, sources, folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    args = parse_arguments(runs.flags(tiny_teacher, sources, tmp_path / "out", dataset_name=folder))
    for name in ("stage1", "stage2"):
        RunText(args, get_tokenizer(str(tiny_teacher))).loader(name)
    lines = re.findall(r"(stage\d) reads (\S+): (\d+) files of ([\d,]+) bytes", caplog.text)
    sizes = [sum(path.stat().st_size for path in folder.rglob("*.gz")), sources["conversations"].stat().st_size]
    assert [(name, int(count), int(size.replace(",", ""))) for name, _, count, size in lines] == [
        ("stage1", 2, sizes[0]), ("stage2", 1, sizes[1]),
    ]  # fmt: skip
