"""Send a whole run to Weights & Biases from its metrics.jsonl, as a new W&B run.

    python sync_wandb.py RUN [--wandb_mode offline]

for a run that was killed, was recorded offline in parts, or never reported: the parts of a resumed run become one,
and each optimizer step is one row, in order. Project, entity and name are the run's own unless given.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from arguments import Arguments
from flags.reading import Parser
from run.flag_checks import wandb_login
from run.metrics_file import read_metrics
from run.wandb_run import WandbRun, start_wandb, wandb_settings
from utils import SAMPLES, UserError, complain, setup_logging

log = logging.getLogger("sync_wandb")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="folder of a run (its --output_dir)")
    parser.add_argument("--wandb_project", help="W&B project (default: the run's own)")
    parser.add_argument("--wandb_entity", help="W&B entity (default: the run's own)")
    parser.add_argument("--wandb_run_name", help="W&B run name (default: the run's own, else its folder's)")
    parser.add_argument("--wandb_mode", choices=["online", "offline"], help="W&B mode (default: the run's own)")
    return parser.parse_args(argv)


def newest_metadata(folder: Path) -> dict[str, Any]:
    """`training_state.json` of the checkpoint that was written last; empty without one."""
    from checkpoints.files import METADATA, read_json

    found = sorted(folder.glob(f"*/{METADATA}"), key=lambda path: path.stat().st_mtime)
    return read_json(found[-1]) if found else {}


def settings_of(args: argparse.Namespace, flags: dict[str, Any]) -> dict[str, Any]:
    """What the command line says, else the run's own flags as `train.py` takes them."""
    known = {entry.name for entry in fields(Arguments)}
    own = Arguments(**{name: value for name, value in flags.items() if name in known})
    for name, value in vars(args).items():
        if name.startswith("wandb_") and value is not None:
            setattr(own, name, value)
    settings = wandb_settings(own)
    return settings | {"name": settings["name"] or args.run.absolute().name}


def send(run: WandbRun, rows: list[dict[str, Any]], samples: list[dict[str, Any]]) -> None:
    """Every row at its optimizer step, which is also its place: rows of one step become one."""
    begun, steps = 0, sorted({row["step"] for row in [*rows, *samples]})
    rows_of, texts_of = _by_step(rows), _by_step(samples)
    for step in steps:
        for row in rows_of.get(step, []):
            if "stage_begins" in row:
                begun += 1
                run.stage(row["stage_begins"], begun, step, at=step)
            else:
                run.log({name: value for name, value in row.items() if value is not None}, step=step, at=step)
        if texts := texts_of.get(step):
            columns = [name for name in texts[0] if name != "step"]
            run.samples(columns, [[text.get(name) for name in columns] for text in texts], step=step, at=step)


def _by_step(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    steps: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).append(row)
    return steps


def sync(args: argparse.Namespace) -> None:
    """Read the run's folder, and send it."""
    try:
        rows = read_metrics(args.run)
    except OSError as error:
        raise UserError(
            f"{args.run}: no metrics.jsonl there ({error.strerror}); name a run's --output_dir"
        ) from error
    if not rows:
        raise UserError(f"{args.run}/metrics.jsonl holds no figures; there is nothing to send")
    samples = read_metrics(args.run / SAMPLES) if (args.run / SAMPLES).exists() else []
    metadata = newest_metadata(args.run)
    flags = metadata.get("flags", {})
    settings = settings_of(args, flags)
    if settings["mode"] == "online" and not wandb_login():
        raise UserError("--wandb_mode online: not logged in; run 'wandb login' or use --wandb_mode offline")
    run = start_wandb(args.run, flags, **settings)
    send(run, rows, samples)
    run.summary({"attention_layers": metadata.get("attention_layers"), "versions": metadata.get("versions")})
    log.info("%d rows, up to step %d", len(rows), rows[-1]["step"])
    run.close(0 if metadata.get("finished") else 1)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    setup_logging(None)
    try:
        sync(args)
    except UserError as error:
        complain(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
