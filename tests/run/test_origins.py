"""Checkpoints record the commits of models and text; a resumed run keeps to them whatever was pushed since."""

import json
import shutil

import pytest
import torch

from checkpoints.model_card import model_card
from checkpoints.origins import Origins
from helpers import runs
from helpers.hub_server import COMMIT, LoopbackHub
from utils import UserError

NEW = "f" * 40
HUB_FLAGS = ("teacher_model", "dataset_name", "second_dataset_name", "eval_dataset")
FLAGS = {"teacher_model": "org/t", "student_model": "org/s", "dataset_name": "org/d", "dataset_revision": None}


def test_a_commit_is_kept_to_as_long_as_the_flags_name_the_same():
    commits = {"teacher_model": "a", "dataset_name": "b"}
    metadata = {"flags": FLAGS, "progress": {"stage": "stage1"}, **Origins(commits=commits).as_metadata()}
    assert Origins.recorded(metadata, FLAGS).commits == commits
    assert Origins.recorded(metadata, {**FLAGS, "dataset_revision": "v2"}).commits == {"teacher_model": "a"}
    assert Origins.recorded(metadata, {**FLAGS, "teacher_model": "org/u"}).commits == {"dataset_name": "b"}


def test_of_a_run_begun_before_the_data_states_commit_is_known():
    metadata = {"flags": FLAGS, "progress": {"stage": "hidden"}}
    found = Origins.recorded(metadata, FLAGS, {"commit": "c"})
    assert (found.commits, found.text_version) == ({"dataset_name": "c"}, 1)
    assert Origins.recorded(metadata, FLAGS, {"commit": None}).commits == {}


def test_ranks_that_found_different_commits_start_again():
    Origins().check_same([{"dataset_name": "a"}, {"dataset_name": "a"}])
    with pytest.raises(UserError, match=r"^--dataset_name: it was changed on the Hub while the run started"):
        Origins().check_same([{"dataset_name": "a"}, {"dataset_name": "b"}])


def test_the_card_names_them():
    flags = {**FLAGS, "second_dataset_name": "org/e", "skip_stage2": False, "eval_dataset": ""}
    progress = {"tokens": 1, "optimizer_step": 1, "evaluation": {}, "best": {}}
    metadata = {"flags": flags, "progress": progress, "versions": {}, "commits": {"teacher_model_commit": NEW}}
    assert f"teacher: `org/t` at commit {NEW}, student started from `org/s`\n" in model_card(metadata)


@pytest.mark.slow
def test_a_resumed_run_reads_what_it_was_begun_with(tiny_teacher, documents, tmp_path, run_script):
    """Teacher, text of both stages and held-out text are replaced on the Hub at step 1 of an interrupted run."""
    from transformers import AutoModelForCausalLM

    first, second = tmp_path / "first", tmp_path / "second"
    for folder, texts in ((first, documents[:40]), (second, documents[40:80])):
        for name in ("train", "more", "held"):
            (folder / name).mkdir(parents=True)
            rows = [{"text": name + text} for text in texts]
            runs.write_rows(folder / name / "train.jsonl.gz", rows)
    shutil.copytree(tiny_teacher, second / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(second / "teacher")
    sources = {"train": "org/train", "conversations": "org/more"}
    options = dict(
        max_steps=2, save_interval=1, keep_checkpoints=9, second_dataset_tokens=256, diagnostics_interval=0
    )
    options |= dict(eval_dataset="org/held", eval_interval=2, eval_tokens=128)
    with LoopbackHub() as hub:
        hub.add("models", "org/teacher", tiny_teacher)
        for name in ("train", "more", "held"):
            hub.add("datasets", f"org/{name}", first / name)

        def run(name, home):
            flags = runs.flags("org/teacher", sources, tmp_path / name, **options)
            done = run_script("train.py", *flags, env=hub.environment(tmp_path / home))
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
            return done.stdout

        assert "stage1 reads org/train: 1 files of " in run("whole", "home")
        for kind, name, folder in (("models", "teacher", second / "teacher"), *(
            ("datasets", name, second / name) for name in ("train", "more", "held")
        )):  # fmt: skip
            hub.push(kind, f"org/{name}", folder, NEW)
        runs.copy_up_to(tmp_path / "whole", "checkpoint-1", tmp_path / "resumed")
        run("resumed", "another home")
    assert runs.losses(tmp_path / "resumed") == runs.losses(tmp_path / "whole")
    held_out = [
        [row["eval/kl"] for row in runs.metrics(tmp_path / name) if "eval/kl" in row] for name in ("whole", "resumed")
    ]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 3
    for name in ("whole", "resumed"):
        found = json.loads((tmp_path / name / "final" / "training_state.json").read_text())["commits"]
        assert found == dict.fromkeys(map("{}_commit".format, HUB_FLAGS), COMMIT)
