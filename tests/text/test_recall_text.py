"""Generated text that asks for memory: a document is its number, and nothing in it is the evaluation's."""

import re

import pytest

from evaluation.recall_tasks import KEY_WORDS, NEVER_TRAINED, TASKS, rows_of_length
from text.recall_text import FEWEST_WORDS, SHORTEST, RecallText, Vocabulary
from utils import UserError

# What the evaluation's prompts are recognised by, a pattern a task.
MARKS = {
    "phone_book": r"(?m)^[A-Z]\w+ (\w\. )?[A-Z]\w+: \d{3}-\d{4}$|Phone book|The number again",
    "key_value": r"(?m)^\w+-\d+ = \d+$",
    "near_keys": r"\w+-\w+-\d+ holds|Again:",
    "copy": r"Read the sentence aloud|number \d\d said that",
    "variables": r"(?m)^\w+ = \w+$|print\(|# prints",
    "table": r"person . city . metal|^The (city|metal|animal) of ",
    "needle": r"secret code|What was the code",
    "needles": r"secret code|What was the code",
    "reverse": r"lives in house|Who lives in",
    "classification": r"word: \w+ label:",
}


@pytest.fixture(scope="module")
def text(documents):
    return RecallText(Vocabulary.of(documents, KEY_WORDS, "text"), 42, 512)


@pytest.fixture(scope="module")
def made(text):
    return [text.document(number) for number in range(1500)]


def test_a_document_is_a_function_of_seed_and_number(text, made, documents):
    again = RecallText(Vocabulary.of(documents, KEY_WORDS, "text"), 42, 512)
    assert [again.document(number) for number in (900, 3, 77)] == [made[900], made[3], made[77]]
    assert RecallText(text.vocabulary, 43, 512).document(3) != made[3]
    assert len(set(made)) == len(made)


def test_lengths_reach_from_short_to_a_whole_sequence(text, made):
    lengths = sorted(map(len, made))
    assert lengths[len(made) // 10] < 2.5 * SHORTEST and lengths[-len(made) // 10] > 0.5 * text.longest
    assert lengths[-1] < 2.5 * text.longest


def test_answers_stand_in_what_comes_before(text):
    answers = 0
    for number in range(300):
        seen = ""
        for part, is_answer in text.parts(number):
            assert not is_answer or part.strip() in seen, (number, part)
            answers += is_answer
            seen += part
    assert answers > 1000


def test_training_has_no_word_and_no_template_of_the_evaluation(made):
    text = "\n".join(made)
    assert KEY_WORDS.isdisjoint(re.findall(r"[^\W\d_]+", text.lower()))
    for task, mark in MARKS.items():
        row = rows_of_length(task, 200, 1, lambda words: len(words) // 3)[0]
        assert re.search(mark, row.prompt), task  # the mark is one
        assert not re.search(mark, text), (task, re.search(mark, text))
    assert set(MARKS) == set(TASKS) and len(NEVER_TRAINED) >= 3


def test_every_key_and_value_of_the_evaluation_is_excluded():
    for task in TASKS:
        row = rows_of_length(task, 300, 5, lambda words: len(words) // 3)[0]
        assert all(word in KEY_WORDS for word in re.findall(r"[a-z]{3,}", row.answer.lower())), (task, row.answer)


def test_a_text_of_few_words_is_refused():
    with pytest.raises(UserError, match=f"rows: 2 different words .* needs {FEWEST_WORDS}: .* --recall_share 0"):
        Vocabulary.of(["two words"], (), "rows")
