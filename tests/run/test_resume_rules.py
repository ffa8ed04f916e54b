"""Which flags a resumed run may change: the table is complete, and what is compared, refused and allowed."""

import json
from pathlib import Path

import pytest

from arguments import RESULT_FLAGS, parse_arguments
from conftest import ROOT
from optim.schedule import Phases, wsd_multiplier
from run.resume import Standing, changed_flags
from run.resume_rules import RULES, STAGES, markdown_table
from utils import mask_secrets


def now_with(*argv):
    return vars(parse_arguments(list(argv)))


def flags(*argv):
    """As a checkpoint has them."""
    return json.loads(json.dumps(mask_secrets(vars(parse_arguments(list(argv))))))


def test_every_flag_that_changes_the_result_has_a_rule():
    assert RULES.keys() == RESULT_FLAGS
    assert all(set(rule.stages) <= set(STAGES) and rule.effect for rule in RULES.values())


def test_the_page_has_the_table():
    assert markdown_table() in (ROOT / "docs" / "resuming.md").read_text()


def test_only_flags_that_change_the_result_are_compared():
    saved = flags("--max_lr", "1e-4", "--output_dir", "a", "--layers", "3")
    assert changed_flags(saved, now_with("--max_lr", "1e-4", "--output_dir", "b", "--wandb")) == []
    now = now_with("--layers", "1", "2", "--dataset_subset", "")
    assert list(map(str, changed_flags(saved, now, layers=[3]))) == [
        "--dataset_subset was CC-MAIN-2014-49 and is ''",
        "--layers was 3 and is 1 2",
        "--max_lr was 0.0001 and is 1e-05",
    ]
    del saved["temperature"]  # a checkpoint of before there was such a flag
    now = now_with("--max_lr", "1e-4", "--temperature", "2")
    assert list(map(str, changed_flags(saved, now))) == ["--temperature was 1.0 and is 2.0"]


@pytest.mark.parametrize("layers", [(), ("--layers", "3", "1"), ("--layers", "1", "3", "-1"), ("--layers", "auto:2")])
def test_layers_that_are_not_given_or_are_the_same(layers):
    assert changed_flags(flags("--layers", "auto:2"), now_with(*layers), layers=[1, 3]) == []


GROWTH = {  # before, after: the names that change, and whether the run only becomes longer
    "more steps": ("--max_steps 10", "--max_steps 20", {"max_steps"}, True),
    "fewer steps": ("--max_steps 10", "--max_steps 5", {"max_steps"}, False),
    "a second stage": ("--skip_stage2", "--second_dataset_tokens 5", {"skip_stage2", "second_dataset_tokens"}, True),
    "no second stage": ("", "--skip_stage2", {"skip_stage2"}, False),
    "a longer second stage": ("", "--second_dataset_epochs 5", {"second_dataset_epochs"}, True),
    "fewer epochs of more tokens": (
        "--second_dataset_epochs 4 --second_dataset_tokens 10",
        "--second_dataset_epochs 2 --second_dataset_tokens 30",
        {"second_dataset_epochs", "second_dataset_tokens"},
        True,
    ),
    "another text for a second stage": ("", "--second_dataset_name x", {"second_dataset_name"}, False),
    "more passes": ("--epochs 1", "--epochs 2 --max_steps 7", {"epochs"}, True),
    "passes for steps": ("", "--epochs 1", {"epochs"}, False),
    "an alignment stage": ("", "--hidden_tokens 9 --hidden_lr 1", {"hidden_tokens", "hidden_lr"}, True),
    "settings of no stage": ("--skip_stage2", "--skip_stage2 --matrix_lr 1 --second_dataset_split x", set(), True),
}


@pytest.mark.parametrize("case", GROWTH)
def test_what_only_makes_a_run_longer(case):
    before, after, names, grows = GROWTH[case]
    found = changed_flags(flags(*before.split()), now_with(*after.split()))
    assert {change.name for change in found} == names
    assert all(change.grows for change in found) == grows


@pytest.mark.parametrize(
    ("total", "ratios"), [(1, (0.1, 0.1)), (2, (0, 0)), (20, (0.1, 0.2)), (10, (1, 0)), (9, (0, 1))]
)
def test_up_to_the_stable_end_a_longer_stage_takes_the_same_rates(total, ratios):
    """And not one step further: there the cooldown begins, unless the stage is the shorter one's last step itself."""
    short = Phases.of(total, *ratios)
    for longer in (Phases.of(total + 1, *ratios, short.warmup), Phases.of(5 * total, *ratios, short.warmup)):
        assert longer.warmup == short.warmup and longer.stable_end >= short.stable_end
        rates = [[wsd_multiplier(phases, 1e-3)(k) for k in range(1, total + 2)] for phases in (short, longer)]
        assert rates[0][: short.stable_end] == rates[1][: short.stable_end]
    assert rates[0][short.stable_end] != rates[1][short.stable_end]


@pytest.mark.parametrize(("step", "cooled"), [(5, 0), (80, 0), (81, 1), (100, 20)])
def test_a_checkpoint_of_before_says_where_its_schedule_stood(step, cooled):
    """Its warm-up and cooldown follow from its flags, and flags that it does not know were at their defaults."""
    known = flags("--max_steps", "100", "--decay_ratio", "0.2", "--warmup_ratio", "0.07")
    del known["no_stable_checkpoint"], known["hidden_tokens"]
    progress = {"stage": "stage1", "stage_step": step, "stage_total": 100, "optimizer_step": step}
    standing = Standing(Path("checkpoint"), {"flags": known, "progress": progress, "text_version": 2})
    assert (standing.progress.stage_warmup, standing.progress.stage_cooled) == (7, cooled)
    assert standing.flags["hidden_tokens"] == 0 and standing.has_cooled == (cooled > 0)
