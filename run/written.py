"""What a run says and writes of itself before its first step: its plan, and run.yaml, which repeats it."""

import functools
import logging
import os
import socket
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from arguments import Arguments, is_given
from checkpoints.origins import Origins
from distill.teacher import HostTeacher
from flags.config_file import config_text
from hardware.ranks import Ranks
from run.beginning import Beginning
from run.forecast import Forecast
from run.inputs import Inputs
from run.pair import Models
from utils import library_versions, mask_secrets, write_whole

log = logging.getLogger(__name__)
CONFIG = "run.yaml"


def tell_plan(args: Arguments, begun: Beginning, inputs: Inputs, names: list[str], device: torch.device) -> None:
    """The plan's lines in the log; in a dry run with every flag, and a step that is measured on `device`."""
    forecast = Forecast.of(args, begun, inputs, names)
    begun.later_steps = functools.cache(forecast.later_steps)
    if not begun.ranks.is_first:
        return
    if args.dry_run:
        flags = config_text(mask_secrets(in_order(args))).strip()
        log.info("flags:\n%s", flags)
    measured = device if args.dry_run and torch.device(args.device).type == device.type else None
    for line in forecast.lines(measured):
        log.info("plan: %s", line)
    if args.dry_run:
        log.info("nothing was written; without --dry_run the run begins")


def tell_placement(ranks: Ranks, models: Models) -> None:
    """Which process holds which model where, a line each; every rank asks."""
    if models.teacher is None:
        teacher = "no teacher"
    elif isinstance(models.teacher_states, HostTeacher) and ranks.local_rank:
        teacher = f"no teacher of its own: asks the first process' on {models.teacher_device}"
    else:
        serves = isinstance(models.teacher_states, HostTeacher)
        teacher = f"teacher on {models.teacher_device}" + f" for {ranks.local_world_size} students" * serves
    mine = f"process {os.getpid()} on {socket.gethostname()}: student on {models.device}, {teacher}"
    for rank, line in enumerate(ranks.gather(mine)):
        log.info("rank %d, %s", rank, line)


def in_order(args: Arguments) -> dict[str, Any]:
    """The flags in the order in which they are declared."""
    return {entry.name: getattr(args, entry.name) for group in Arguments.__bases__ for entry in fields(group)}


def write_config(args: Arguments, origins: Origins) -> None:
    """`run.yaml` in the output folder: the flags that were given or differ from their defaults, for `--config`."""
    defaults = vars(Arguments())
    flags = {name: value for name, value in in_order(args).items() if is_given(value) and value != defaults[name]}
    commits = [f"{flag}: commit {commit}" for flag, commit in origins.commits.items()]
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    comments = ["python train.py --config run.yaml goes on with this run; with another --output_dir it repeats it"]
    text = config_text(mask_secrets(flags), [*comments, *commits, versions])
    write_whole(Path(args.output_dir) / CONFIG, text.encode())
