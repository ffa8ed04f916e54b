"""Distil a Llama teacher into a hybrid Mamba-2 student. `python train.py --help` lists every flag."""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from arguments import Arguments, parse_arguments
from run.flag_checks import validate
from utils import UserError, complain, setup_logging, wait_passively

if TYPE_CHECKING:
    from data import TextLoader
    from hardware.ranks import Ranks
    from loop.forms import Stage
    from run.inputs import Inputs
    from run.session import Session

log = logging.getLogger("train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command-line flags; returns the exit status.

    0: finished. 2: a user's mistake, in one line. 3: out of memory. 4: training or its data broke down, with a
    checkpoint of the last good state once training has begun. 5: another rank is gone. 128+N: stopped by signal N,
    with a checkpoint.
    """
    args = parse_arguments(argv)
    wait_passively(args.device)
    try:
        validate(args)
        status = on_ranks(args)
    except UserError as error:
        complain(str(error))
        status = 2
    if "RANK" in os.environ:
        leave_at_once(status)  # seen after FSDP2: a C++ thread aborts the interpreter's own end
    return status


def on_ranks(args: Arguments) -> int:
    """Join the other ranks, if there are any, and run; the exit status."""
    setup_logging(None if args.dry_run else args.log_file, rank=int(os.environ.get("RANK", "0")))
    log.info("loading libraries ...")
    from hardware.ranks import RankFailed, launched

    try:
        with launched(args.device) as ranks:
            status = distill(args, ranks)
            if not ranks.alone and 0 < status < 128:
                leave_at_once(status)  # in good order it would wait for ranks that are gone or stuck
    except RankFailed as error:
        log.error("stopped before the first step: %s", error)
        return 4
    return status


def leave_at_once(status: int) -> None:
    """End this process without the interpreter's own end; everything is written and closed by now."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def distill(args: Arguments, ranks: "Ranks") -> int:
    """Check -> build -> stages -> close."""
    from checkpoints.lock import RunLock
    from hardware.devices import enable_determinism, seed_everything
    from run.beginning import Beginning
    from run.build import build_models
    from run.failure import failure_status, memory_advice
    from run.inputs import check_devices, check_inputs
    from run.plan import stage_names
    from run.session import Session
    from run.signals import StopSignals
    from run.terminal import SignOfLife, quiet_libraries, stands_at
    from run.written import tell_placement, tell_plan
    from trainer import run_stage

    quiet_libraries()
    devices = ranks.together(lambda: check_devices(args, ranks))
    if args.deterministic:
        enable_determinism()
    seed_everything(args.seed)
    with contextlib.ExitStack() as held:
        alive = held.enter_context(SignOfLife())
        lock = RunLock(Path(args.output_dir))  # the first rank's alone is taken; it alone writes

        def take_lock() -> None:
            held.enter_context(lock)

        if not args.dry_run:  # which writes nothing
            ranks.first(take_lock)
        signals = held.enter_context(StopSignals())
        signals.leave_at_once = True  # nothing to save before the first step
        begun = ranks.together(lambda: Beginning(args, ranks, lock))
        alive.where = functools.partial(stands_at, begun.progress)
        advice = functools.partial(memory_advice, args)
        try:
            if begun.finished:
                log.info("%s holds a finished run: nothing to do", args.output_dir)
                return 0
            names, origins = begun.stages_left(stage_names(args)), begun.origins
            inputs = ranks.together(lambda: check_inputs(args, begun.student_source, names, origins, ranks))
            advice = functools.partial(memory_advice, args, inputs.estimate)
            loaders = ranks.together(lambda: inputs.text.open(names, fresh=begun.resumed is None))
            ranks.together(lambda: begun.check_position(loaders, inputs.text))
            origins.check_same(ranks.gather(origins.commits))
            ranks.together(lambda: tell_plan(args, begun, inputs, names, devices[0]))
            if args.dry_run:
                return 0
            models = ranks.together(lambda: build_models(args, begun.student_source, inputs, devices, ranks))
            advice = functools.partial(memory_advice, args, inputs.estimate, models)
            tell_placement(ranks, models)
            session = Session(begun, signals, models)
            ranks.together(session.begin)
            signals.leave_at_once = False
            for name in names:
                stage = ranks.together(functools.partial(prepare_stage, args, name, session, inputs, loaders[name]))
                with contextlib.closing(stage):
                    log.info(
                        "%s: %s%d optimizer steps", name, "about " * stage.open_ended, session.progress.stage_end
                    )
                    if not run_stage(stage, session.progress, session.services()):
                        return session.stopped()
            session.saving.save_final()
        except Exception as error:
            return failure_status(error, begun, advice)
        except SystemExit as left:  # a signal before the first step
            begun.status = int(left.code or 0)
            raise
        finally:
            begun.close()
        log.info("finished: %s", Path(args.output_dir) / "final")
    return 0


def prepare_stage(args: Arguments, name: str, session: "Session", inputs: "Inputs", loader: "TextLoader") -> "Stage":
    """A stage at its beginning, or where an interrupted one stood."""
    from run.stages import build_stage

    models, done = session.models, session.begun.steps_done(name)
    phases, stretches = session.begun.schedule(name, inputs.text)
    stage = build_stage(
        args, name, models, loader, phases, session.ranks, inputs.parallel, done=done, stretches=stretches
    )
    session.enter(stage)
    return stage


if __name__ == "__main__":
    sys.exit(main())
