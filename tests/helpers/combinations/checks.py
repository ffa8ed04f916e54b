"""What must hold of every run, whatever its flags: formulas and comparisons of its own, no stored numbers."""

import functools
import json
import math
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from helpers import runs
from helpers.combinations import warm
from helpers.combinations.pair import Pair
from helpers.combinations.rows import CHANGED, Result
from helpers.combinations.table import Row

# Of a mixer, what the matrix of stage "matrix" does not see: its gradient is zero by its mathematics.
OUTSIDE_THE_MATRIX = (".mixer.D", ".mixer.z_bias", ".mixer.out_proj.weight")
WAY = 0.05  # share of the sum of a stage's rates that some entry of a tensor must move
TIMES = ("per_second", "seconds", "memory")


def check(result: Result, pair: Pair, *, exactly: bool = True) -> None:
    """Every invariant of a row's runs; raises one AssertionError that tells all that do not hold.

    exactly: as on a CPU, where a resumed run repeats every bit, and not only its losses to rounding.
    """
    broken = {name: told for name in result.statuses if (told := failure(check_ended, result, name))}
    checks: list[tuple[str, Callable[..., None]]] = [
        ("whole", check_rates),
        ("whole", check_movement),
        ("whole", functools.partial(check_final, pair=pair, exactly=exactly)),
        ("resumed", check_same if exactly else check_similar),
        ("changed", check_rates),
        ("changed", check_movement),
        ("changed", check_decay),
        ("plain", check_plain),
    ]
    told = list(broken.values())
    if "whole" not in broken:  # which the others are compared with
        ended = result.statuses.keys() - broken.keys()
        told += [failure(check, result, name) for name, check in checks if name in ended]
    assert not any(told), "\n".join([f"{result.plan.row}", *filter(None, told)])


def failure(check: Callable[..., None], result: Result, name: str) -> str | None:
    """What a check has to say against a run."""
    try:
        check(result, name)
    except AssertionError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{name}, {place.name}: {error or place.line}"
    return None


def check_ended(result: Result, name: str) -> None:
    """A run ended as it should, without a traceback."""
    statuses = result.statuses[name]
    log = result.log(name)
    wanted = 143 if name == "stopped" else 0
    ranks = 1 if name == "plain" else result.plan.ranks
    assert statuses == [wanted] * ranks and "Traceback" not in log, f"exit {statuses}\n{log[-1500:]}"


def steps_of(output: Path) -> list[dict[str, Any]]:
    """The lines of optimizer steps; what is not finite stands there as null and comes back as NaN."""
    lines = [line for line in runs.metrics(output) if "train/loss" in line]
    return [{key: math.nan if value is None else value for key, value in line.items()} for line in lines]


# learning rates


def check_rates(result: Result, name: str) -> None:
    """The logged learning rates are those of warm-up, plateau and 1 - sqrt cooldown, stage by stage."""
    row, changed = result.plan.row, name == "changed"
    found = {}
    for line in steps_of(result.output(name)):
        found.setdefault(line["stage"], []).append(line)
    wanted = dict(result.plan.steps)
    if changed and row["change"] == "max_steps":
        wanted["stage1"] = result.plan.longer
    counted = {stage: len(lines) for stage, lines in found.items()}
    assert counted == wanted, f"steps {counted} and not {wanted}"
    for stage, lines in found.items():
        total = lines[-1]["stage_total"]
        assert total == wanted[stage] or (row["length"] == "epochs" and abs(total - wanted[stage]) <= 1), stage
        before, behind = rates_around_a_change(result, stage, total) if changed else [schedule(row, stage, total)] * 2
        since = result.plan.change_step - lines[0]["step"] + 1
        for index, line in enumerate(lines):
            rate = (before if index < since else behind)[index]
            told = f"{stage}, step {index + 1} of {total}: rate {line['train/lr']:.4g} and not {rate:.4g}"
            assert math.isclose(line["train/lr"], rate, rel_tol=1e-6), told


def rates_around_a_change(result: Result, stage: str, total: int) -> tuple[list[float], list[float]]:
    """Rates of a stage's steps as they were planned before the forced resume, and as they are behind it."""
    row, planned = result.plan.row, result.plan.steps[stage]
    before = schedule(row, stage, total if row["length"] == "epochs" else planned)
    if row["change"] == "rates":
        return before, schedule(row | CHANGED, stage, total)
    return before, schedule(row, stage, total, warm_up=round(planned * row["warmup_ratio"]))


def schedule(row: Row, stage: str, total: int, warm_up: int | None = None) -> list[float]:
    """Rates of a stage's steps: warm-up (its own share of the steps unless given), plateau, 1 - sqrt cooldown."""
    highest = {"matrix": row["matrix_lr"], "hidden": row["hidden_lr"]}.get(stage, row["max_lr"])
    warm_up = round(total * row["warmup_ratio"]) if warm_up is None else warm_up
    cooldown = min(round(total * row["decay_ratio"]), total - warm_up)
    rates = []
    for step in range(1, total + 1):
        if step == total > 1:
            rates.append(row["min_lr"])
        elif step <= warm_up:
            rates.append(highest * step / warm_up)
        elif step <= total - cooldown:
            rates.append(highest)
        else:
            done = (step - (total - cooldown)) / cooldown
            rates.append(max(highest * (1 - math.sqrt(done)), row["min_lr"]))
    return rates


# what moves


def check_movement(result: Result, name: str) -> None:
    """In each stage every tensor that it trains moves as its rates say, and no other moves at all."""
    row, before = result.plan.row, 0
    if name == "changed":
        row, before = row | result.plan.change, result.plan.change_step
    lines = [line for line in steps_of(result.output(name)) if line["step"] > before]
    still = [line["step"] for line in lines if not line["train/grad_norm"] > 0 and not skipped(line, row)]
    assert not still, f"no gradients at steps {still}"
    for stage in dict.fromkeys(line["stage"] for line in lines):
        steps = [line["step"] for line in lines if line["stage"] == stage]
        # the first stage's start is nowhere: its first step's end is
        begin, end = (result.saved(name, step) for step in (max(steps[0] - 1, 1), steps[-1]))
        start = int(begin.name.removeprefix("checkpoint-"))
        moving = [line for line in lines if start < line["step"] <= steps[-1] and not skipped(line, row)]
        way = WAY * sum(line["train/lr"] for line in moving)
        compare_movement(begin, end, stage, row, way)


def skipped(line: dict[str, Any], row: Row) -> bool:
    """A float16 step that overflowed: it halves the loss scale and updates nothing."""
    return row["dtype"] == "float16" and math.isnan(line["train/grad_norm"])


def compare_movement(begin: Path, end: Path, stage: str, row: Row, way: float) -> None:
    first, last = (runs.weights(checkpoint) for checkpoint in (begin, end))
    assert first.keys() == last.keys(), f"{begin.name} to {end.name}: {sorted(first.keys() ^ last.keys())}"
    for name in first:
        start = first[name].to(last[name].dtype)  # where a forced resume changed it, a frozen tensor is rounded
        moved = (last[name].double() - start.double()).abs().max().item()
        if not trains(name, stage, row, set(first)):
            assert moved == 0, f"{stage} moves {name}, which it does not train, by {moved}"
        elif way / WAY > spacing(start) and not (stage == "matrix" and name.endswith(OUTSIDE_THE_MATRIX)):
            assert moved >= way, f"{stage} moves {name} by {moved:.2g}, its rates by {way / WAY:.2g}"


def spacing(tensor: torch.Tensor) -> float:
    """What the largest entry must move by to be another number of its dtype."""
    return tensor.abs().max().item() * torch.finfo(tensor.dtype).eps


def trains(name: str, stage: str, row: Row, names: set[str]) -> bool:
    """Whether a stage trains a tensor, from the flags alone."""
    if stage in ("matrix", "hidden"):
        return ".mixer." in name
    if ".layers." not in name:
        return not (row["freeze_embeddings"] and ("embedding" in name or "lm_head" in name))
    layer = name[: name.index(".", name.index(".layers.") + len(".layers.")) + 1]
    replaced = any(other.startswith(f"{layer}self_attn.") for other in names)
    if replaced and row["freeze_replaced_layers"]:
        return False
    return not (row["freeze_mlp"] and ".mlp." in name)


def check_decay(result: Result, name: str) -> None:
    """A resume with a large weight decay forgets the matrices that it began with; what its own steps add is new."""
    row, begin = result.plan.row, result.plan.change_step
    behind = [line for line in steps_of(result.output("changed")) if line["step"] > begin]
    if row["change"] != "rates" or any(skipped(line, row) for line in behind):
        return
    start = runs.weights(result.output("whole") / f"checkpoint-{begin}")
    kept = {}
    for run in ("whole", "changed"):
        end = runs.weights(result.output(run) / f"checkpoint-{sum(result.plan.steps.values())}")
        pairs = [(start[key].double(), end[key].double()) for key in start if key.endswith("out_proj.weight")]
        kept[run] = (sum((a * b).sum() for a, b in pairs) / sum((a * a).sum() for a, _ in pairs)).item()
    assert kept["changed"] < 0.5 * kept["whole"], f"shares of the weights at step {begin} that are left: {kept}"


# the same numbers


def exact(line: dict[str, Any]) -> dict[str, Any]:
    """What of a line of metrics does not depend on the clock."""
    return {key: value for key, value in line.items() if not any(word in key for word in TIMES)}


def check_same(result: Result, name: str) -> None:
    """Interrupted and resumed is uninterrupted, bit for bit."""
    whole, resumed = (result.output(run) for run in ("whole", "resumed"))
    assert re.search(r"resuming .*checkpoint-", result.log("resumed")), "the resumed run began anew"
    lines, others = ([exact(line) for line in runs.metrics(output)] for output in (whole, resumed))
    assert others == lines, first_difference(lines, others)
    weights, found = (runs.weights(output / "final") for output in (whole, resumed))
    assert weights.keys() == found.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, found[name]), f"{name} is not that of the run that was not interrupted"


def check_similar(result: Result, name: str) -> None:
    """Interrupted and resumed has the losses of uninterrupted, to rounding."""
    pairs = zip(*(steps_of(result.output(run)) for run in ("whole", "resumed")), strict=True)
    for line, other in pairs:
        close = math.isclose(line["train/loss"], other["train/loss"], rel_tol=2e-2)
        assert line["step"] == other["step"] and close, f"step {line['step']}: {other} and not {line}"


def first_difference(lines: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    for line, other in zip(lines, others):
        if line != other:
            keys = [key for key in line | other if line.get(key) != other.get(key)]
            told = ", ".join(f"{key} {other.get(key)} and not {line.get(key)}" for key in keys[:3])
            return f"step {line['step']} ({line.get('stage')}): {told}"
    return f"{len(others)} lines and not {len(lines)}"


def check_plain(result: Result, name: str) -> None:
    """The same global batches on one rank, in one micro step, without updates in the backward pass.

    Exact arithmetic would give the same figures. Rounding does not, and Adam takes steps of full size where a
    gradient is nothing but rounding: so the first step is compared closely, and the others more loosely step by step.
    """
    row = result.plan.row
    first, later = {"float32": (1e-5, 5e-3), "bfloat16": (2e-2, 5e-2), "float16": (5e-3, 2e-2)}[row["dtype"]]
    # Updates in the backward pass clip by another rule, after which nothing need be equal.
    other_rule = row["update_in_backward"] and row["grad_clip"] < 1
    pairs = list(zip(steps_of(result.output("whole")), steps_of(result.output("plain"))))
    assert len(pairs) == len(steps_of(result.output("plain"))) == len(steps_of(result.output("whole")))
    for index, (line, plain) in enumerate(pairs):
        if (index and other_rule) or skipped(line, row) or skipped(plain, row):
            break
        figures = {"train/loss": 1, "train/ce": 1, "train/kl": 10, "train/grad_norm": 50 if index else 10}
        for key, times in figures.items():
            if key in plain:
                within = times * (later * index if index else first)
                told = f"step {line['step']}, {key}: {line[key]} and plainly {plain[key]}"
                assert math.isclose(line[key], plain[key], rel_tol=within, abs_tol=1e-6), told


# the result


def check_final(result: Result, name: str, pair: Pair, exactly: bool) -> None:
    """`final` loads by the Auto class, as the project's own class does, and has the KL that the run logged last."""
    output, report = result.output("whole"), result.folder / "final.json"
    teacher = pair.teacher(result.plan.row["teacher_model"])
    arguments = (
        str(output / "final"),
        str(teacher),
        str(pair.sources["heldout"]),
        pair.stretch * result.plan.row["seq_length"],
        str(report),
        str(pair.flags.get("device", "cpu")),
    )
    log = result.folder / "final.log"
    status = warm.call(final_figures, arguments, log, timeout=60 if exactly else 200)
    assert status == 0, f"figures of final: exit {status}\n{log.read_text()[-5000:]}"
    figures = json.loads(report.read_text())
    assert figures["equal"], "the Auto class and the project's own give different logits"
    logged = [line["eval/kl"] for line in runs.metrics(output) if "eval/kl" in line]
    close = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}[result.plan.row["dtype"]]
    close = close if exactly else max(close, 2e-2)
    told = f"KL of final {figures['kl']:.5g}, logged {logged}"
    assert math.isclose(figures["kl"], logged[-1], rel_tol=close), told


def final_figures(final: str, teacher: str, text: str, length: int, report: str, device: str) -> None:
    """In a process of its own: load `final` in both ways; KL(teacher || final) over the first 4 sequences."""
    import gzip

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models import LlambaForCausalLM

    with gzip.open(text, "rt") as file:
        document = json.loads(next(file))["text"]
    tokens = AutoTokenizer.from_pretrained(final, trust_remote_code=True)(document)["input_ids"]
    rows = torch.tensor(tokens[: 4 * (length + 1)]).view(4, length + 1)[:, :-1].to(device)
    options: dict[str, Any] = {"dtype": torch.float32}
    student = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=True, **options).eval().to(device)
    own = LlambaForCausalLM.load(final, **options).eval().to(device)
    theirs = AutoModelForCausalLM.from_pretrained(teacher, **options).eval().to(device)
    with torch.no_grad():
        logits = student(rows).logits
        equal = torch.equal(logits, own(rows).logits)
        p, q = theirs(rows).logits.log_softmax(-1), logits.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    Path(report).write_text(json.dumps({"equal": equal, "kl": kl}))
