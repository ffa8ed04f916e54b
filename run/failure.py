"""How a run ends that cannot go on: one line for what went wrong, and its exit status."""

import logging
from collections.abc import Callable

from arguments import Arguments
from checkpoints.lock import LockTaken
from hardware.memory import MemoryEstimate, estimate_memory, is_out_of_memory, oom_advice
from hardware.ranks import RankFailed, SharedMistake, is_loss_of_rank
from hardware.settings import TeacherNeed
from hub.hub_files import DataStreamLost
from loop.gradient_check import UntrainedTensors
from loop.meter import TooManyBadSteps
from model_utils import load_config
from run.acceleration import step_settings
from run.beginning import Beginning
from run.pair import Models
from utils import UserError

log = logging.getLogger(__name__)

RANK_LOST = 5  # exit status


def failure_status(error: Exception, begun: Beginning, advice: Callable[[], str]) -> int:
    """One line for what a run cannot go on from, and its exit status; anything unexpected is raised again.

    advice: the line for a run that is out of memory, `memory_advice` with what is known by then. W&B gets an alert,
    and `begun.status` for its end.
    """
    begun.status = 2 if isinstance(error, UserError) else 1
    try:
        begun.status = _status(error, begun, advice)
    finally:
        begun.tracker.alert(f"stopped with exit status {begun.status}", str(error), level="ERROR")
    return begun.status


def _status(error: Exception, begun: Beginning, advice: Callable[[], str]) -> int:
    if isinstance(error, SharedMistake):
        begun.leave_together()
        raise error
    if is_out_of_memory(error):
        log.error(advice())
        begun.ranks.report(error)
        return 3
    reported = begun.ranks.reported()
    if isinstance(error, TooManyBadSteps | DataStreamLost | LockTaken | RankFailed | UntrainedTensors):
        begun.leave_together()
        own = error.__cause__ if isinstance(error, RankFailed) else None  # what failed on this rank
        if isinstance(own, Exception) and is_out_of_memory(own):
            log.error(advice())
        elif own is not None and not isinstance(own, DataStreamLost | LockTaken | TooManyBadSteps):
            log.error("what went wrong on this rank:", exc_info=own)
        saved = begun.store.folder.complete()
        log.error("stopped, %s: %s", "with a checkpoint" if saved else "before the first checkpoint", error)
        return 3 if isinstance(own, Exception) and is_out_of_memory(own) else 4
    if not begun.ranks.alone and is_loss_of_rank(error):
        saved = begun.store.folder.complete()
        last = f"the last checkpoint is {saved[0].name if saved else 'none yet'}"
        log.error("another rank is gone%s; %s", f" ({reported})" if reported else "", last)
        return 4 if reported else RANK_LOST
    raise error


def memory_advice(args: Arguments, estimate: MemoryEstimate | None = None, models: Models | None = None) -> str:
    """The line for a run that is out of memory; on the CPU the estimate is made only now."""
    if estimate is None and models is not None:
        commit = models.text.origins.commits.get("teacher_model")
        teacher = load_config(args.teacher_model, local_files_only=True, revision=commit)
        need: TeacherNeed = "never" if models.teacher is None else "throughout"
        estimate = estimate_memory(teacher, models.student.config, step_settings(args), teacher_need=need)
    if estimate is None:
        return f"out of memory on {args.device} while the models were loaded"
    return oom_advice(estimate, step_settings(args))
