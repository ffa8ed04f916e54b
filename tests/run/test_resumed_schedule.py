"""The schedule of a stage that goes on with steps of another size, or with more passes, as its text turned out."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from arguments import parse_arguments
from optim.schedule import wsd_multiplier
from optim.stretch import planned_step
from run.resume import Standing
from run.resumed_schedule import resumed_schedule
from utils import mask_secrets

HINTED = "--epochs 1 --epoch_step_hint 20 --warmup_ratio 0.1 --decay_ratio 0.2 --seq_length 64 --batch_size 4"


def standing(flags=HINTED, *, step, stretches=(), expected=0, cooled=0, total=20, warmup=2):
    """A checkpoint of stage 1 whose steps took 256 tokens each."""
    saved = json.loads(json.dumps(mask_secrets(vars(parse_arguments(flags.split())))))
    progress = dict(
        stage="stage1", stage_step=step, stage_total=total, stage_warmup=warmup, stage_cooled=cooled,
        stage_expected=expected, stage_stretches=list(map(list, stretches)), stage_tokens=256 * step,
        optimizer_step=step,
    )  # fmt: skip
    return Standing(Path("checkpoint"), {"flags": saved, "progress": progress})


def text(flags=HINTED, ranks=1):
    args = parse_arguments(flags.split())
    return SimpleNamespace(
        args=args,
        ranks=SimpleNamespace(world_size=ranks),
        total_steps=lambda name: args.epoch_step_hint * args.epochs,
    )


def rates(schedule, first, last):
    phases, stretches = schedule
    multiplier = wsd_multiplier(phases, 0.01)
    return [multiplier(planned_step(step, phases.total, stretches)) for step in range(first, last + 1)]


STRETCHED = dict(stretches=[(10, 100)], expected=100)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("more", [dict(step=5), dict(step=30, **STRETCHED), dict(step=90, cooled=1, **STRETCHED)])
def test_other_ranks_take_what_is_left_of_the_text(more, ranks):
    """A hint is in steps of the run's first size. The rate goes on from where it was, and ends at its least."""
    kept = resumed_schedule(standing(**more), text(), 0.3, keeps_warmup=True)
    found = resumed_schedule(standing(**more), text(ranks=ranks), 0.3, keeps_warmup=True)
    step, end = more["step"], more.get("expected", 20)
    last = step + -(-(end - step) // ranks)
    behind = rates(kept, step, step)[0]
    assert rates(found, last, last) == [0.01] < rates(found, last - 1, last - 1)
    ahead = rates(found, step + 1, last)
    assert all(after <= before for before, after in itertools.pairwise([behind, *ahead]))
    assert ahead[0] > 0.6 * behind
    if ranks == 1:
        assert found == kept


def test_more_passes_after_a_hint_that_was_too_small():
    """From the stable end, at step 81 of 100 that were found: 200 steps, a warm-up of 2, the cooldown from 160 on."""
    schedule = resumed_schedule(standing(step=81, **STRETCHED), text(HINTED + " --epochs 2"), 0.81, keeps_warmup=True)
    phases, stretches = schedule
    assert (phases.total, phases.warmup, phases.stable_end, stretches) == (200, 2, 160, [])
    phases, _ = resumed_schedule(
        standing(step=81, **STRETCHED), text(HINTED + " --epochs 2", ranks=2), 0.81, keeps_warmup=True
    )
    assert phases.total == 81 + 60


def test_more_passes_after_a_pass_that_ended_early():
    """At step 12 of 20: its end is its length."""
    phases, stretches = resumed_schedule(standing(step=12), text(HINTED + " --epochs 3"), 1.0, keeps_warmup=True)
    assert (phases.total, phases.warmup, stretches) == (36, 2, [])


def test_a_stretched_warmup_keeps_the_steps_that_it_took():
    more = dict(step=12, stretches=[(10, 100)], expected=100, warmup=14)
    phases, _ = resumed_schedule(standing(**more), text(HINTED + " --epochs 2"), 0.12, keeps_warmup=True)
    assert phases.warmup == 46  # 10 + 4 steps of the plan at 90 steps for 10


@pytest.mark.parametrize(
    ("flags", "total"),
    [
        (HINTED.replace("hint 20", "hint 60"), 60),  # by force: what the new hint says
        (HINTED + " --epochs 0 --max_steps 40", 40),
        (HINTED + " --epochs 2 --epoch_step_hint 50", 100),
    ],
)
def test_another_hint_or_unit_is_taken_at_its_word(flags, total):
    phases, stretches = resumed_schedule(standing(step=15, **STRETCHED), text(flags), 0.15, keeps_warmup=True)
    assert (phases.total, stretches) == (total, [])


def test_passes_where_steps_were_counted():
    before = "--max_steps 20 --seq_length 64 --batch_size 4"
    phases, _ = resumed_schedule(standing(before, step=5), text(ranks=2), 0.1, keeps_warmup=True)
    assert phases.total == 5 + 18  # 20 steps of 512 tokens, of which 1,280 tokens lie behind
