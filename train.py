"""Distil a Llama teacher into a hybrid Mamba-2 student. `python train.py --help` lists every flag."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arguments import complain, parse_arguments, validate
from utils import UserError

log = logging.getLogger("train")
RANK_LOST = 5  # exit status


def main(argv: Sequence[str] | None = None) -> int:
    """Run with command-line flags; returns the exit status.

    0: finished. 2: a user's mistake, in one line. 3: out of memory. 4: training or its data broke down, with a
    checkpoint of the last good state once training has begun. 5: another rank is gone. 128+N: stopped by signal N,
    with a checkpoint.
    """
    args = parse_arguments(argv)
    try:
        validate(args)
        from hardware.parallel import launched

        with launched(args.device) as ranks:
            status = distill(args, ranks)
            if status == RANK_LOST:
                leave_at_once(status)  # in good order it would wait for the rank that is gone
        if not ranks.alone:
            leave_at_once(status)  # seen after FSDP2: a C++ thread aborts the interpreter's own end
        return status
    except UserError as error:
        complain(str(error))
        return 2


def leave_at_once(status: int) -> None:
    """End this process without the interpreter's own end; everything is written and closed by now."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def distill(args: argparse.Namespace, ranks: Any) -> int:
    """Check -> build -> stages -> close."""
    from checkpoints.lock import RunLock
    from hardware.devices import enable_determinism, seed_everything
    from run.build import build_models
    from run.inputs import check_devices, check_inputs
    from run.plan import stage_names
    from run.session import Session
    from run.signals import StopSignals
    from run.stages import build_stage
    from trainer import run_stage
    from utils import setup_logging

    setup_logging(args.log_file, rank=ranks.rank)
    devices = ranks.together(lambda: check_devices(args, ranks))
    if args.deterministic:
        enable_determinism()
    seed_everything(args.seed)
    with contextlib.ExitStack() as held:

        def lock_folder() -> None:
            held.enter_context(RunLock(Path(args.output_dir)))

        ranks.first(lock_folder)
        signals = held.enter_context(StopSignals())
        signals.leave_at_once = True  # nothing to save before the first step
        session = Session(args, signals, ranks)
        try:
            if session.finished:
                log.info("%s holds a finished run: nothing to do", args.output_dir)
                return 0
            names = session.stages_left(stage_names(args))
            student, origins = session.student_source, session.origins
            inputs = ranks.together(lambda: check_inputs(args, student, names, origins, ranks))
            session.estimate, text = inputs.estimate, inputs.text
            loaders = ranks.together(lambda: text.open(names, fresh=session.resumed_from is None))
            session.models = ranks.together(lambda: build_models(args, student, inputs, devices, ranks))
            session.begin()
            signals.leave_at_once = False
            for name in names:
                total = session.total_steps(name, text)
                stage = build_stage(args, name, session.models, loaders[name], total, ranks, inputs.parallel)
                with contextlib.closing(stage):
                    session.enter(stage)
                    log.info("%s: %d optimizer steps", name, stage.total_steps)
                    if not run_stage(stage, session.progress, session.services()):
                        return session.stopped()
            session.save_final()
        except Exception as error:
            return failure_status(error, session)
        finally:
            session.close()
        log.info("finished: %s", Path(args.output_dir) / "final")
    return 0


def failure_status(error: Exception, session: Any) -> int:
    """One line for what a run cannot go on from, and its exit status; anything unexpected is raised again."""
    from distill.gradient_check import UntrainedTensors
    from distill.meter import TooManyBadSteps
    from hardware.memory import is_out_of_memory
    from hardware.parallel import is_loss_of_rank
    from hub.hub_files import DataStreamLost
    from trainer import AnotherRankStopped

    if is_out_of_memory(error):
        log.error(session.memory_advice())
        return 3
    if isinstance(error, TooManyBadSteps | DataStreamLost | AnotherRankStopped | UntrainedTensors):
        session.store.wait()
        saved = session.store.folder.complete()
        log.error("stopped, %s: %s", "with a checkpoint" if saved else "before the first checkpoint", error)
        return 4
    if not session.ranks.alone and is_loss_of_rank(error):
        saved = session.store.folder.complete()
        log.error("another rank is gone; the last checkpoint is %s", saved[0].name if saved else "none yet")
        return RANK_LOST
    raise error


if __name__ == "__main__":
    sys.exit(main())
