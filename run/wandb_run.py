"""A run at Weights & Biases: its start, its rows, its end. `run/tracking.py` and `sync_wandb.py` send.

Nothing here waits for the network within a step: rows and HTML go into the client's own file, which its process
sends. (A `wandb.Table` would ask the server each time: measured with a server gone, 19 s a table.)
"""

import contextlib
import logging
import os
import re
import shlex
import sys
import threading
from pathlib import Path
from typing import Any

from arguments import Arguments, NotGivenName
from run.pages import shaded_table, table
from utils import mask_secrets

log = logging.getLogger(__name__)

START_SECONDS = 8  # beside the client's own 10 for its login: an unreachable server costs less than 20
END_SECONDS = 60  # for what the client has not sent by the end
AXIS = "train/tokens"
PANELS = ("train", "eval", "perf", "data", "layers", "samples")
BEST = {"eval/kl": min, "eval/top1_agreement": max, "eval/perplexity_ratio": min}
OF_A_LAYER = re.compile(r"(layers/\w+)_(\d+)")
OF_A_RANK = re.compile(r"data/wait_seconds_rank_(\d+)")


def wandb_settings(args: Arguments) -> dict[str, Any]:
    """Project, entity, name and mode: a flag that is given, else W&B's own environment variable, else the default."""
    settings = {}
    for name, value in (
        ("project", args.wandb_project),
        ("entity", args.wandb_entity),
        ("name", args.wandb_run_name),
        ("mode", args.wandb_mode),
    ):
        given = value is not None and not isinstance(value, NotGivenName)
        settings[name] = value if given else os.environ.get(f"WANDB_{name.upper()}", value)
    return settings


def folded(figures: dict[str, Any]) -> dict[str, Any]:
    """A row as W&B gets it: the figures of single layers as their mean, and the largest with its layer.

    `layers/grad_norm_0`, `_1`, ... become `layers/grad_norm_mean`, `_max` and `_max_layer`; of the ranks' waits the
    slowest rank is left, beside its seconds in `data/wait_seconds`.
    """
    row, groups, waits = {}, by_layer(figures), {}
    for name, value in figures.items():
        if rank := OF_A_RANK.fullmatch(name):
            waits[int(rank[1])] = value
        elif "/" in name and not OF_A_LAYER.fullmatch(name):
            row[name] = value
    for name, values in groups.items():
        worst = max(values, key=lambda layer: values[layer])
        row[f"{name}_mean"] = sum(values.values()) / len(values)
        row[f"{name}_max"], row[f"{name}_max_layer"] = values[worst], worst
    if waits:
        row["data/slowest_rank"] = max(waits, key=lambda rank: waits[rank])
    return row


def by_layer(figures: dict[str, Any]) -> dict[str, dict[int, float]]:
    """The numbers of single layers by figure (`layers/grad_norm`) and layer."""
    groups: dict[str, dict[int, float]] = {}
    for name, value in figures.items():
        if (found := OF_A_LAYER.fullmatch(name)) and value is not None:
            groups.setdefault(found[1], {})[int(found[2])] = value
    return groups


class WandbRun:
    """A started run. Every row carries the tokens so far, which are the axis of all charts."""

    def __init__(self, run: Any, *, reached: bool = True):
        self.run, self.id, self.reached = run, run.id, reached
        self.tokens = 0
        self.best: dict[str, float] = {}
        self.layers: dict[str, dict[int, float]] = {}
        run.define_metric(AXIS)
        run.define_metric("train/optimizer_step")
        for name in BEST:
            run.define_metric(name, step_metric=AXIS, summary="none")  # `log` writes the best into it
        for panel in PANELS:
            run.define_metric(f"{panel}/*", step_metric=AXIS)

    def log(self, figures: dict[str, Any], *, step: int, at: int | None = None) -> None:
        """One row of `metrics.jsonl`; `at`: the row's own place, for a run that is rebuilt, else the next."""
        self.tokens = figures.get(AXIS) or self.tokens
        row = {**folded(figures), AXIS: self.tokens, "train/optimizer_step": step}
        if groups := by_layer(figures):
            self.layers |= groups
            if "train/loss" not in figures:  # the figures by layer of every --diagnostics_interval
                row["layers/by_layer"] = _html(layer_table(self.layers))
        self.run.log(row, step=at)
        if self.note_best(figures):
            self.run.summary.update({**self.best, "eval/best_step": step})

    def note_best(self, figures: dict[str, Any]) -> bool:
        """Take up held-out figures; True where one is the best so far."""
        before = dict(self.best)
        for name, better in BEST.items():
            if (value := figures.get(name)) is not None:
                self.best[name] = better(value, self.best.get(name, value))
        return self.best != before

    def stage(self, name: str, number: int, step: int, *, at: int | None = None) -> None:
        """Where a stage begins."""
        self.run.log({"train/stage_number": number, AXIS: self.tokens, "train/optimizer_step": step}, step=at)
        self.run.summary.update({f"{name}/first_step": step})

    def samples(self, columns: list[str], rows: list[list[Any]], *, step: int, at: int | None = None) -> None:
        """Sample texts, side by side."""
        shown = _html(table(columns, rows))
        self.run.log({"samples/texts": shown, AXIS: self.tokens, "train/optimizer_step": step}, step=at)

    def summary(self, figures: dict[str, Any]) -> None:
        """Values of the whole run."""
        self.run.summary.update(figures)

    def alert(self, title: str, text: str, *, level: str = "WARN") -> None:
        """A message to whoever follows the run; the client sends one title at most once a minute."""
        self.run.alert(title=title, text=mask_secrets(text), level=level)

    def close(self, exit_code: int) -> None:
        """End with the run's exit status; what a server does not take within a minute stays in the folder."""
        sender = threading.Thread(target=self._finish, args=(exit_code,), daemon=True)
        sender.start()
        sender.join(END_SECONDS)
        if sender.is_alive():
            import wandb

            log.warning("W&B did not take everything within %d s; send it with: %s", END_SECONDS, self.command())
            wandb.teardown(exit_code)

    def _finish(self, exit_code: int) -> None:
        try:
            self.run.finish(exit_code=exit_code)
        except Exception as error:  # also what `teardown` makes of it
            log.warning("W&B did not end: %s; send the run with: %s", type(error).__name__, self.command())

    def command(self) -> str:
        """What sends this run's folder."""
        return f"wandb sync {shlex.quote(str(self.run.settings.sync_dir))}"


def layer_table(groups: dict[str, dict[int, float]]) -> str:
    """HTML: a row a layer, a column a figure, shaded by size."""
    layers = sorted({layer for values in groups.values() for layer in values})
    names = [name.removeprefix("layers/").replace("_", " ") for name in groups]
    rows = [[values.get(layer) for values in groups.values()] for layer in layers]
    return shaded_table(["layer", *names], [str(layer) for layer in layers], rows)


def _html(text: str) -> Any:
    import wandb

    return wandb.Html(text, inject=False)


def start_wandb(
    folder: Path,
    config: dict[str, Any],
    *,
    project: str,
    entity: str | None = None,
    name: str | None = None,
    mode: str = "online",
    run_id: str | None = None,
) -> WandbRun:
    """A W&B run, the same one where `run_id` is given; without a server that answers, an offline one."""
    os.environ.setdefault("WANDB_SILENT", "true")  # its own lines would stand between ours
    import wandb

    sys.argv[1:] = mask_secrets(sys.argv[1:])  # W&B records the command line
    options: dict[str, Any] = dict(
        dir=os.environ.get("WANDB_DIR", str(folder)),
        project=mask_secrets(project),
        entity=mask_secrets(entity),
        name=mask_secrets(name),
        id=run_id,
        resume="allow" if run_id else None,
        config=config,
    )
    try:
        run = wandb.init(mode=mode, settings=wandb.Settings(init_timeout=START_SECONDS), **options)  # type: ignore[arg-type]
    except Exception as error:
        if mode != "online":
            raise
        reason = str(error).partition("\n")[0]
        log.warning("W&B does not answer (%s: %s): the run is recorded offline", type(error).__name__, reason)
        with contextlib.suppress(Exception):  # what is left of the attempt
            wandb.teardown()
        run = wandb.init(mode="offline", **options)
    started = WandbRun(run)
    if run.settings.mode == "offline":
        log.info("W&B offline; once there is a network: %s", started.command())
    elif run.url:
        log.info("W&B: %s", run.url)
    return started
