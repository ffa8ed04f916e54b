"""Recall in context: questions of every kind, answers forced and generated in batches, figures, intervals."""

import random

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from conftest import tiny_llama_config
from evaluation import recall
from evaluation.recall import Answers, begins_with, forced_answers, greedy_texts, recall_answers, recall_cells
from evaluation.recall_summary import TEACHER_KNOWS, recall_summary
from evaluation.recall_tasks import CLASSES, NEVER_TRAINED, TASKS, rows_of_length
from helpers.teachers import make_student

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="module")
def hybrid():
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(tiny_llama_config(initializer_range=0.15)).eval()
    return make_student(teacher, [1])


@pytest.mark.parametrize("task", TASKS)
def test_a_question_is_as_long_as_asked_and_answered_by_its_context_alone(task, tokenizer):
    count = lambda text: len(tokenizer(text).input_ids)  # noqa: E731
    rows = rows_of_length(task, 400, 20, count)
    assert rows == rows_of_length(task, 400, 20, count) and len({row.prompt for row in rows}) == 20
    lengths = [count(row.prompt + row.answer) for row in rows]
    assert 0.8 * 400 < sum(lengths) / 20 < 1.1 * 400
    assert sorted({round(row.depth, 2) for row in rows}) == [round(0.05 + 0.1 * place, 2) for place in range(10)]
    for row in rows:
        context = row.prompt.rpartition("\n")[0]
        assert row.answer.strip() in context and row.answer.startswith(" ")


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"classification", "variables", "table"}))
def test_what_is_asked_for_stands_at_its_depth(task):
    for depth in (0.05, 0.45, 0.95):
        row = TASKS[task](random.Random(3), 60, depth)
        found = row.prompt.index(row.answer.strip()) / len(row.prompt)
        assert abs(found - depth) < 0.2, (depth, row.prompt)


def test_a_label_is_that_of_the_words_of_its_class():
    for seed in range(20):
        row = TASKS["classification"](random.Random(seed), 40, 0.5)
        *lines, last = row.prompt.splitlines()
        shown = [tuple(line.removeprefix("word: ").split(" label: ")) for line in lines]
        word = last.split()[1]
        (own,) = [{each.lower() for each in words} for words in CLASSES if word in {each.lower() for each in words}]
        assert {label for each, label in shown if each in own} == {row.answer.strip()}
        assert word not in dict(shown)


def test_batches_answer_as_rows_alone(tokenizer, hybrid, monkeypatch):
    rows = [
        row for task in TASKS for row in rows_of_length(task, 150, 3, lambda text: len(tokenizer(text).input_ids))
    ]
    for number, row in enumerate(rows):  # every other answer is what the model holds most likely
        if number % 2:
            tokens = tokenizer(row.prompt, return_tensors="pt").input_ids
            row.answer = tokenizer.decode(hybrid(tokens).logits[0, -1].argmax())
    alone = [forced_answers(hybrid, tokenizer, [row], CPU)[0] for row in rows]
    assert forced_answers(hybrid, tokenizer, rows, CPU) == alone and 3 < sum(alone) < len(rows)
    monkeypatch.setattr(recall, "BATCH_TOKENS", 700)
    assert forced_answers(hybrid, tokenizer, rows, CPU) == alone


def test_generating_in_a_batch_is_generating_alone(tokenizer, hybrid):
    prompts = ["The first", "A list of names:\nb, c, d and more of them", "x"]
    alone = [greedy_texts(hybrid, tokenizer, [prompt], 8, CPU)[0] for prompt in prompts]
    assert greedy_texts(hybrid, tokenizer, prompts, 8, CPU) == alone and len(set(alone)) == 3
    given = tokenizer(prompts[1], return_tensors="pt").input_ids
    written = hybrid.generate(given, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, given.shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True) == alone[1]


def test_what_is_generated_must_be_the_answer():
    assert begins_with(" 345\nnext", " 345") and begins_with("345", " 345") and begins_with(" otter.", " otter")
    assert (
        not begins_with(" 3456", " 345") and not begins_with(" 34", " 345") and not begins_with(" It is 345", " 345")
    )


def cells_and_answers(tokenizer):
    cells = recall_cells(tokenizer, [], [128], 100, ["needle", "key_value", "copy"])
    teacher = {"needle@128": 80, "key_value@128": 50, "copy@128": 10}
    student = {"needle@128": 40, "key_value@128": 60, "copy@128": 0}
    right = lambda count: Answers([number < count for number in range(100)])  # noqa: E731
    return cells, *({name: right(count) for name, count in found.items()} for found in (student, teacher))


def test_the_share_is_its_definition(tokenizer):
    figures, shares = recall_summary(*cells_and_answers(tokenizer))
    assert figures["needle@128"]["student"] == 0.4 and figures["needle@128"]["teacher"] == 0.8
    assert figures["copy@128"]["teacher"] < TEACHER_KNOWS
    assert shares["all"]["share"] == pytest.approx((0.4 / 0.8 + 1) / 2) and shares["all"]["cells"] == 2
    assert shares["never_trained"]["share"] == 0.5 and shares["never_trained"]["of"] == 1
    assert shares["trained"]["share"] == 1 and shares["trained"]["cells"] == 1
    low, high = shares["never_trained"]["interval"]
    assert 0.3 < low < 0.5 < high < 0.65
    assert set(NEVER_TRAINED) < set(TASKS)


def test_intervals_are_paired(tokenizer):
    cells, student, teacher = cells_and_answers(tokenizer)
    figures, _ = recall_summary(cells, teacher, teacher)
    assert all(found["difference_interval"] == [0, 0] for found in figures.values())
    low, high = figures["key_value@128"]["student_interval"]
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.025) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.025)
    none = {name: Answers([False] * 100) for name in cells}
    assert recall_summary(cells, student, none)[1]["all"] == {"share": None, "interval": None, "cells": 0, "of": 3}


def test_answers_stop_when_asked(tokenizer, hybrid):
    cells = recall_cells(tokenizer, [2], [], 2)
    assert recall_answers(hybrid, tokenizer, cells, CPU, stop=lambda: True) == {}
    found = recall_answers(hybrid, tokenizer, cells, CPU, generated=1)
    assert [len(each.right) for each in found.values()] == [2, 2]
    assert [len(each.generated) for each in found.values()] == [1, 1]
