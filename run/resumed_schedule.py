"""The schedule of a stage that goes on: the one that it had or, where its length or its steps' size changed, anew."""

import math

from optim.schedule import Phases
from optim.stretch import last_step
from run.plan import stage_lengths, tokens_a_step
from run.resume import Standing
from run.text import RunText

Schedule = tuple[Phases, list[list[int]]]  # a plan, and its stretches (optim/stretch.py)


def resumed_schedule(standing: Standing, text: RunText, share: float | None, *, keeps_warmup: bool) -> Schedule:
    """Of the stage that a checkpoint stands in.

    A stage that is measured in tokens or passes takes the rest of them, whatever a step has taken so far. A plan that
    was stretched (`--epochs`) is stretched on over steps of another size, so that the rate goes on from where it is;
    a longer or shorter stage has a plan of its own. The warm-up keeps its number of steps, with `keeps_warmup`.

    share: of the text of all passes, what lies behind, where the checkpoint's loader knows it.
    """
    progress, args = standing.progress, text.args
    before, now = standing.flags, vars(args)
    unit, number = stage_lengths(now)[progress.stage]
    hint = "epoch_step_hint"
    same = stage_lengths(before)[progress.stage] == (unit, number) and (unit != "epochs" or before[hint] == now[hint])
    stretches = [list(stretch) for stretch in progress.stage_stretches]
    if same and (unit == "steps" or step_size(standing) == step_size(standing, text)):
        total = progress.stage_total
    elif unit == "steps":
        total, stretches = number, []
    else:
        total = progress.stage_step + steps_left(standing, text, share)
        if same and stretches:
            stretches += [[progress.stage_step, total]] if total > progress.stage_step else []
            total = progress.stage_total
        else:
            stretches = []
    warmup = progress.stage_warmup
    if not stretches:  # as many steps as it took
        warmup = last_step(warmup, progress.stage_total, progress.stage_stretches)
    return Phases.of(total, args.warmup_ratio, args.decay_ratio, warmup if keeps_warmup else None), stretches


def step_size(standing: Standing, text: RunText | None = None) -> int:
    """Tokens of an optimizer step before, or with the flags and ranks of now."""
    flags, ranks = (standing.flags, standing.ranks) if text is None else (vars(text.args), text.ranks.world_size)
    return tokens_a_step(flags, standing.progress.stage, ranks)


def steps_left(standing: Standing, text: RunText, share: float | None) -> int:
    """Optimizer steps of today's size for what is left of the tokens or passes; 0 or less where none is."""
    progress, flags = standing.progress, standing.flags
    passes, name = text.args.epochs, progress.stage
    hinted_anew = flags["epoch_step_hint"] != text.args.epoch_step_hint
    if name != "stage1" or not flags["epochs"] or hinted_anew:
        whole: float = text.total_steps(name) * step_size(standing, text)
    else:  # what is known of the text's length by now, not what was thought at first
        behind = progress.stage_tokens
        whole = behind if share == 1 else behind + (progress.stage_end - progress.stage_step) * step_size(standing)
        whole *= passes / flags["epochs"]
    return math.ceil((whole - progress.stage_tokens) / step_size(standing, text))
