"""Every combination of flags does what it says: a covering array of real runs, each checked against invariants.

The array holds every allowed pair of values of `helpers/combinations/table.py`, a row a test. Beside it stand
`-m combinations`, random rows (COMBINATIONS_SEED, COMBINATIONS_COUNT), and ten rows at SmolLM2's size on a GPU.
"""

import os
import re

import pytest

from arguments import RESULT_FLAGS
from helpers.combinations import table, warm
from helpers.combinations.checks import check
from helpers.combinations.pair import Pair
from helpers.combinations.rows import Plan, flags, run_row

ROWS = table.load()
SAMPLE = table.sample(int(os.environ.get("COMBINATIONS_SEED", "1")), int(os.environ.get("COMBINATIONS_COUNT", "100")))


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tokenizer_dir, documents):
    folder = tmp_path_factory.mktemp("pair")
    return Pair(folder, tokenizer_dir, documents)


@pytest.mark.slow  # 3 to 10 s of CPU a row
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_row(number, pair, tmp_path):
    check(run_row(ROWS[number], pair, tmp_path), pair)


@pytest.mark.slow
@pytest.mark.combinations
@pytest.mark.parametrize("number", range(len(SAMPLE)))
def test_random_row(number, pair, tmp_path):
    check(run_row(SAMPLE[number], pair, tmp_path), pair)


@pytest.mark.parametrize("row", table.refused_rows(), ids=[", ".join(rule) for rule in table.REFUSED])
def test_a_refused_combination_is_one_line(row, pair, tmp_path):
    output = tmp_path / "run"
    plan = Plan(row, pair.stage_steps)
    statuses = warm.train(flags(plan, pair, output), tmp_path / "log.log", ranks=plan.ranks)
    said = "".join(path.read_text() for path in tmp_path.glob("log*"))
    assert statuses == [2] * plan.ranks, said[-2000:]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search("--[a-z]", errors[0]) and "Traceback" not in said, said
    assert not list(output.rglob("*"))


def test_every_allowed_pair_of_values_stands_in_the_array():
    assert table.missing_pairs(ROWS) == [], "python tests/helpers/combinations/table.py makes the array anew"
    assert all(row.keys() == table.FACTORS.keys() for row in ROWS)
    assert not [row for row in ROWS for rule in table.REFUSED if table.violates(row, rule)]


def test_every_flag_that_changes_results_is_combined_or_exempt():
    combined = (table.FACTORS.keys() & RESULT_FLAGS) | table.SET_BY.keys()
    assert combined | table.EXEMPT.keys() == RESULT_FLAGS, (
        "each needs a line in FACTORS, SET_BY or EXEMPT of table.py"
    )
    assert not combined & table.EXEMPT.keys()
    assert set(table.SET_BY.values()) <= table.FACTORS.keys()
    assert all(len(values) > 1 for values in table.FACTORS.values())
