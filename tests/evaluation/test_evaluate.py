"""evaluate.py in real processes on a real checkpoint: its figures, table, JSON, picture, and the lm-eval harness."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import train
from conftest import ROOT
from evaluation.recall import forced_answers
from evaluation.recall_tasks import PAIR_TASKS, TASKS, recall_rows
from helpers import runs

SMOLLM2 = ROOT / ".cache" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_teacher, sources):
    """`final` of a short run, a hybrid."""
    output = tmp_path_factory.mktemp("run")
    assert train.main(runs.flags(tiny_teacher, sources, output, max_steps=2, skip_stage2=True)) == 0
    return output / "final"


@pytest.fixture(scope="module")
def evaluated(student, tiny_teacher, sources, run_script, tmp_path_factory):
    """(output folder, process) of one run of the script with everything on."""
    output = tmp_path_factory.mktemp("figures") / "new"
    done = run_script(
        "evaluate.py", "--student", student, "--teacher", tiny_teacher, "--dataset_name", sources["heldout"],
        "--tokens", 3000, "--seq_length", 64, "--batch_size", 2, "--recall_pairs", 2, 5, "--recall_rows", 11,
        "--recall_lengths", 128, "--recall_generated", 2,
        "--speed_tokens", 8, "--speed_contexts", 12, "--speed_batches", 1, 2, "--device", "cpu", "--dtype", "float32",
        "--output_dir", output, cwd=output.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return output, done


def held_out_by_hand(student, teacher, sources):
    """The figures from whole logits in float64, batch by batch."""
    from data import SourceSpec, build_loader
    from model_utils import get_tokenizer

    spec = SourceSpec(name=str(sources["heldout"]), shuffle_buffer=0)
    loader = build_loader(spec, get_tokenizer(str(teacher)), seq_length=64, batch_size=2, epochs=1)
    ours = AutoModelForCausalLM.from_pretrained(student, trust_remote_code=True, dtype=torch.float64).eval()
    theirs = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64).eval()
    kl = agree = ce_ours = ce_theirs = count = 0.0
    for batch in loader:
        inputs, labels = batch.tokens[:, :-1], batch.tokens[:, 1:]
        with torch.no_grad():
            q, p = (model(inputs, use_cache=False).logits.log_softmax(-1)[batch.valid] for model in (ours, theirs))
        kl += F.kl_div(q, p, log_target=True, reduction="sum").item()
        agree += (q.argmax(-1) == p.argmax(-1)).sum().item()
        ce_ours += F.nll_loss(q, labels[batch.valid], reduction="sum").item()
        ce_theirs += F.nll_loss(p, labels[batch.valid], reduction="sum").item()
        count += batch.valid.sum().item()
        if count >= 3000:
            break
    return {
        "kl": kl / count,
        "top1_agreement": agree / count,
        "student_perplexity": math.exp(ce_ours / count),
        "teacher_perplexity": math.exp(ce_theirs / count),
        "perplexity_ratio": math.exp((ce_ours - ce_theirs) / count),
        "tokens": count,
    }


def test_the_held_out_figures_are_their_definitions(evaluated, student, tiny_teacher, sources):
    report = json.loads((evaluated[0] / "evaluation.json").read_text())
    wanted = held_out_by_hand(student, tiny_teacher, sources)
    assert report["held_out"].keys() == wanted.keys()
    for name, value in wanted.items():
        assert report["held_out"][name] == pytest.approx(value, rel=1e-4), name


def test_table_json_and_picture(evaluated):
    output, done = evaluated
    report = json.loads((output / "evaluation.json").read_text())
    by_pairs = {f"{task}/{pairs}" for task in PAIR_TASKS for pairs in (2, 5)}
    assert set(report["recall"]) == by_pairs | {f"{task}@128" for task in TASKS}
    assert all(0 <= figures[model] <= 1 for figures in report["recall"].values() for model in ("student", "teacher"))
    assert set(report["recall"]["needle@128"]["depths"]) == {"student", "teacher"}
    assert report["recall_share"]["all"]["of"] == 14 and report["recall_share"]["never_trained"]["of"] == 4
    rows = {(row["model"], row["batch"], row["context"]): row for row in report["generation"]}
    assert rows.keys() == {(name, batch, 12) for name in ("student", "teacher") for batch in (1, 2)}
    assert all(row["tokens_per_second"] > 0 and row["peak_bytes"] > 2**20 for row in rows.values())
    assert all(0 < row[f"first_{what}_seconds"] < 60 for row in rows.values() for what in ("token", "call"))
    assert re.search(r"^context 12, batch 2 +\d+\.\d+ +\d+\.\d+$", done.stdout, re.M)
    assert report["flags"]["seq_length"] == 64
    rows = dict(re.findall(r"^(\S+) +([\d.]+)$", done.stdout, re.M))
    for name, value in report["held_out"].items():
        assert float(rows[name]) == pytest.approx(value, abs=1e-4)
    assert re.search(r"^recall +student +95% +teacher +difference, 95% +generated +teacher's$", done.stdout, re.M)
    assert (output / "evaluation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_model_equals_itself(student, tiny_teacher, sources, tmp_path):
    """A hybrid of the teacher's own layers alone: no divergence, all agree, ratio 1."""
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    from distill.initialization import student_from_teacher
    from model_utils import apply_replacements, transfer_teacher_weights

    whole = student_from_teacher(teacher, dtype=torch.float32, device="cpu")
    transfer_teacher_weights(whole, teacher, replaced=range(4))
    apply_replacements(whole, teacher, range(4))
    whole.save_pretrained(tmp_path)
    flags = f"--student {tmp_path} --teacher {tiny_teacher} --dataset_name {sources['heldout']} --tokens 500"
    more = " --seq_length 64 --device cpu --dtype float32 --recall_pairs --recall_lengths --speed_tokens 0"
    assert evaluate.main((flags + more).split()) == 0
    held_out = json.loads((tmp_path / "evaluation.json").read_text())["held_out"]
    assert abs(held_out["kl"]) < 1e-6 and held_out["top1_agreement"] == 1
    assert held_out["perplexity_ratio"] == pytest.approx(1, abs=1e-6)


BAD = {
    "no student": (dict(student="/nowhere/model"), "--student /nowhere/model is no folder here: give --output_dir"),
    "student is no model": (dict(student="{empty}"), "has no config.json"),
    "teacher is not there": (dict(teacher="/nowhere/teacher"), "/nowhere/teacher does not exist"),
    "text is not there": (dict(dataset_name="/nowhere/text.jsonl"), "/nowhere/text.jsonl"),
    "column is not there": (dict(dataset_text_field="body"), "body"),
    "sequence too long": (dict(seq_length=10**6), "fewer than one sequence"),
    "no tokens": (dict(tokens=0), "--tokens: '0' is not a whole number of at least 1"),
    "too many pairs": (dict(recall_pairs=307), "--recall_pairs: '307' is above 306"),
    "device": (dict(device="tpu"), "--device: 'tpu' is not a device"),
    "limit": (dict(limit=-1), "--limit: '-1' is not a number above 0"),
    "output is a file": (dict(output_dir="{file}"), "is a file, not a folder"),
    "task folder": (dict(include_path="/nowhere/tasks"), "--include_path /nowhere/tasks: no such folder"),
    "nothing to do": (
        dict(dataset_name="", recall_pairs=None, recall_lengths=None, speed_tokens=0),
        "nothing to measure",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_before_anything_slow(
    case, student, tiny_teacher, sources, tmp_path, capfd, monkeypatch
):
    changes, wanted = BAD[case]
    places = {"empty": tmp_path / "empty", "file": tmp_path / "file"}
    places["empty"].mkdir()
    places["file"].touch()
    argv: list[str] = []
    flags = dict(student=student, teacher=tiny_teacher, dataset_name=sources["heldout"], device="cpu") | changes
    for name, value in flags.items():
        argv += [f"--{name}"] if value is None else [f"--{name}", str(value).format(**places)]
    monkeypatch.setattr("model_utils.AutoModelForCausalLM", None)  # nothing is loaded
    try:
        status = evaluate.main(argv)
    except SystemExit as stopped:
        status = stopped.code
    shown = capfd.readouterr().err
    assert status == 2 and shown.count("\n") == 1 and shown.startswith("error: ") and wanted in shown


@pytest.mark.parametrize("asked", ["--tasks arc_easy", "--suite standard"])
def test_tasks_without_the_harness_are_one_line(asked, student, tiny_teacher, capfd, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert evaluate.main(["--student", str(student), "--teacher", str(tiny_teacher), *asked.split()]) == 2
    assert capfd.readouterr().err == (
        f"error: {asked.split()[0]} needs lm-evaluation-harness: pip install -r requirements-eval.txt\n"
    )


STANDARD = "arc_easy arc_challenge hellaswag piqa winogrande mmlu gsm8k ifeval".split()


@pytest.mark.parametrize(
    ("flags", "tasks"),
    [
        ("", []),
        ("--tasks piqa lambada_openai piqa", ["piqa", "lambada_openai"]),
        ("--suite standard", STANDARD),
        ("--tasks lambada_openai piqa --suite standard", [*STANDARD, "lambada_openai"]),
    ],
)
def test_a_suite_stands_for_its_tasks(flags, tasks):
    assert evaluate.parse(f"--student RUN --teacher MODEL {flags}".split()).tasks == tasks


def test_a_suite_that_there_is_not_is_one_line(capfd):
    with pytest.raises(SystemExit) as stopped:
        evaluate.parse("--student RUN --teacher MODEL --suite hard".split())
    shown = capfd.readouterr().err
    assert stopped.value.code == 2 and shown.count("\n") == 1
    assert shown.startswith("error: argument --suite: invalid choice: 'hard'") and "standard" in shown


# recall


class Oracle:
    """Stands in for a model that answers everything right, but for the value's token `wrong` (from its end)."""

    def __init__(self, tokenizer, rows, wrong=None):
        self.texts = [tokenizer(row.prompt + row.answer, add_special_tokens=False).input_ids for row in rows]
        self.wrong = wrong

    def __call__(self, input_ids, logits_to_keep, use_cache):
        logits = torch.zeros(*input_ids.shape, 512)
        for place, given in enumerate(input_ids.tolist()):  # shorter rows are filled up on the right
            whole = next(text for text in self.texts if text[:-1] == given[: len(text) - 1])
            logits[place, : len(whole) - 1] = F.one_hot(torch.tensor(whole[1:]), 512).float()
            if self.wrong is not None:
                at = len(whole) - 1 - self.wrong
                logits[place, at] = logits[place, at].roll(1)
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


@pytest.mark.parametrize("task", PAIR_TASKS)
def test_a_row_is_right_when_every_token_of_its_value_is(task, tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    rows = recall_rows(task, 6, 10)
    cpu = torch.device("cpu")
    shortest = min(len(tokenizer(row.answer, add_special_tokens=False).input_ids) for row in rows)
    assert shortest > 1
    assert len({len(tokenizer(row.prompt + row.answer).input_ids) for row in rows}) > 1
    assert all(forced_answers(Oracle(tokenizer, rows), tokenizer, rows, cpu))
    for wrong in range(1, shortest + 1):
        assert not any(forced_answers(Oracle(tokenizer, rows, wrong), tokenizer, rows, cpu))
    prompts_last = max(len(tokenizer(row.answer, add_special_tokens=False).input_ids) for row in rows) + 1
    assert all(forced_answers(Oracle(tokenizer, rows, prompts_last), tokenizer, rows, cpu))


@pytest.mark.parametrize(("task", "pattern"), [("phone_book", r"{}: (\S+)"), ("key_value", r"{} = (\S+)")])
@pytest.mark.parametrize("pairs", [1, 8, 306])
def test_each_question_has_one_answer_in_its_context(task, pattern, pairs):
    rows = recall_rows(task, pairs, 5)
    assert rows == recall_rows(task, pairs, 5) and rows != recall_rows(task, pairs, 5, seed=1)
    for row in rows:
        context, _, cue = row.prompt.rpartition("\n")
        key = cue.rstrip(":= ")
        assert re.findall(pattern.format(re.escape(key)), context) == [row.answer.strip()]
        assert len(re.findall(r"[:=] \d", context)) == pairs


@pytest.mark.skipif(not (SMOLLM2 / "complete").exists(), reason="the demo's teacher is not there (make demo)")
def test_a_real_model_recalls_as_it_generates():
    """SmolLM2-135M looks numbers up in a short phone book, and exactly when it also writes them."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2).eval()
    found = []
    for row in recall_rows("phone_book", 6, 6):
        prompt = tokenizer(row.prompt, return_tensors="pt", add_special_tokens=False)
        tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        written = tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :]).startswith(row.answer)
        assert forced_answers(model, tokenizer, [row], torch.device("cpu")) == [written]
        found.append(written)
    assert sum(found) >= 3


# lm-evaluation-harness

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs pip install -r requirements-eval.txt"
)
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
target_delimiter: ""
"""
CHOICE = 'doc_to_choice: "{{[right, wrong]}}"\nmetric_list: [{metric: acc}]\n'
WRITE = "generation_kwargs: {until: ['\\n'], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Two tasks on local rows, none of which needs a download: choosing a continuation, and writing one."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"The number {i} is", "right": f" {i + 1}", "wrong": f" {i + 2}"} for i in range(7)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    choose = TASK.format(name="local_choice", path=path, kind="multiple_choice", target=0)
    write = TASK.format(name="local_writing", path=path, kind="generate_until", target='"{{right}}"')
    (folder / "choice.yaml").write_text(choose + CHOICE)
    (folder / "writing.yaml").write_text(write + WRITE)
    return folder, rows


def choices_by_hand(folder, rows):
    """Share of rows whose right continuation is the likelier one, from the model's own logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

    def likelihood(question, continuation):
        prompt, whole = (tokenizer(text).input_ids for text in (question, question + continuation))
        with torch.no_grad():
            scores = model(torch.tensor([whole])).logits.log_softmax(-1)[0]
        return sum(scores[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))

    right = [likelihood(r["question"], r["right"]) > likelihood(r["question"], r["wrong"]) for r in rows]
    return sum(right) / len(right)


@harness
def test_tasks_run_beside_the_figures(student, tiny_teacher, tasks, run_script, tmp_path):
    """Started in the repository's folder, where this script's name is also that of a package of the harness."""
    folder, rows = tasks
    done = run_script(
        "evaluate.py", "--student", student, "--teacher", tiny_teacher, "--recall_pairs",
        "--recall_lengths", "--speed_tokens", 0,
        "--tasks", "local_choice", "local_writing", "--include_path", folder, "--device", "cpu", "--dtype", "float32",
        "--output_dir", tmp_path, cwd=ROOT, env={"HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "evaluation.json").read_text())["harness"]
    assert figures["local_choice"]["acc,none"] == pytest.approx(choices_by_hand(student, rows))
    assert 0 <= figures["local_writing"]["exact_match,none"] <= 1
    assert re.search(r"^local_choice\n  acc,none +[\d.]+$", done.stdout, re.M)


@harness
def test_the_harness_alone_takes_a_checkpoint(student, tasks, tmp_path):
    folder, rows = tasks
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "local_choice", "--device", "cpu"),
        *("--model_args", f"pretrained={student},trust_remote_code=True,dtype=float32"),
        *("--include_path", str(folder), "--output_path", str(tmp_path / "results")),
    ]
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "results").rglob("results_*.json")).read_text())["results"]
    assert results["local_choice"]["acc,none"] == pytest.approx(choices_by_hand(student, rows))
