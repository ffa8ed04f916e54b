"""Everything that can be wrong with a run's inputs, found before any weight is loaded."""

import functools
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from arguments import Arguments
from checkpoints.origins import Origins
from distill.initialization import student_config
from hardware.devices import check_device
from hardware.memory import MemoryEstimate, estimate_memory
from hardware.ranks import Ranks
from hardware.settings import TeacherNeed, WholeUntil
from hub.model_files import fetch_model
from model_utils import check_layers, check_pair, check_teacher_config, get_tokenizer, is_distilled, load_config
from models import LlambaConfig
from run.acceleration import step_settings
from run.plan import mixer_options
from run.student_flags import settle_flags
from run.text import RunText
from utils import FROM_TEACHER, UserError, auto_layers

log = logging.getLogger(__name__)

ALIGNMENT = "the alignment stages"


@dataclass
class Inputs:
    """What is known before any weight is loaded."""

    text: RunText
    teacher: PreTrainedConfig
    student: LlambaConfig
    estimate: MemoryEstimate | None  # of a training step on a GPU
    teacher_need: TeacherNeed
    parallel: str = "none"  # or ddp, fsdp
    whole_for: Collection[str] = ()  # what keeps shards from being made before any weight is read


def fetch(args: Arguments, flag: str, name: str, *, weights: bool = False, commit: str | None = None) -> str | None:
    """`hub.model_files.fetch_model` as the flags have it."""
    return fetch_model(
        flag,
        name,
        local_files_only=args.local_files_only,
        network_patience=args.network_patience,
        weights=weights,
        commit=commit,
    )


def check_inputs(
    args: Arguments, student_source: str, names: Collection[str], origins: Origins, ranks: Ranks
) -> Inputs:
    """What can be wrong with the models, found from their configurations alone, and what they will take.

    names: of the stages that are still to run.
    """
    commits: Any = origins.commits
    origins.note(
        "teacher_model", fetch(args, "--teacher_model", args.teacher_model, commit=commits.get("teacher_model"))
    )
    local: dict[str, Any] = dict(local_files_only=True, revision=commits.get("teacher_model"))
    teacher = load_config(args.teacher_model, **local)
    check_teacher_config(teacher, args.teacher_model)
    found = fetch(args, "--student_model", student_source, commit=commits.get("student_model"))
    origins.note("student_model", found)  # of a checkpoint there is none, and the one that is recorded stays
    if args.layer_weight and teacher.num_hidden_layers < 2:
        raise UserError("--layer_weight: the teacher has one layer, which the loss matches already; leave it out")
    longest = teacher.max_position_embeddings
    lengths = {"seq_length": args.seq_length}
    if args.matrix_tokens:
        lengths["matrix_seq_length"] = args.matrix_seq_length
    for flag, length in lengths.items():
        if length > longest:
            raise UserError(f"--{flag} {length}: the teacher has {longest} positions; use at most that many")
    if student_source == FROM_TEACHER:
        student = student_config(teacher, **mixer_options(args))
    else:
        student = load_config(student_source, config_class=LlambaConfig, local_files_only=True, revision=found)
        check_pair(student, teacher, student_source)
        if student_source == args.student_model:  # else it is a checkpoint that the run goes on from
            settle_flags(args, student, teacher, student_source)
    check_layers(args.layers, teacher.num_hidden_layers)
    fresh = not is_distilled(student)
    need, whole_for = teacher_need(args, names, fresh=fresh), whole_models_for(args, names, ranks, fresh=fresh)
    parallel, estimate = choose_parallel(args, ranks), None
    if args.device.startswith("cuda"):
        free = torch.cuda.mem_get_info(args.device)[0] if torch.cuda.is_available() else None  # not in a dry run
        parallel, estimate = settle_parallel(teacher, student, args, parallel, free, ranks, need, whole_for)
    if parallel in ("ddp", "fsdp"):
        log.info("%d ranks, %s", ranks.world_size, "replicated" if parallel == "ddp" else "sharded")
    text = RunText(args, get_tokenizer(args.teacher_model, **local), ranks, origins)
    return Inputs(text, teacher, student, estimate, need, parallel, whole_for)


def choose_parallel(args: Arguments, ranks: Ranks) -> str:
    """What `--parallel` asks for: none on one rank, ddp, fsdp, or auto where only an estimate can tell.

    Raises `UserError` for flags that work on one rank alone. The CPU replicates.
    """
    if ranks.alone:
        return "none"
    if args.update_in_backward:
        raise UserError("--update_in_backward works on one rank; under torchrun use --parallel fsdp to save memory")
    if args.layer_weight and args.teacher_device:
        raise UserError("--layer_weight needs a teacher on every rank; leave --teacher_device out under torchrun")
    if args.optimizer == "muon" and args.parallel == "fsdp":
        raise UserError("--optimizer muon updates whole matrices; use --parallel ddp, or --optimizer adamw8bit")
    return "ddp" if args.parallel == "auto" and not args.device.startswith("cuda") else args.parallel


def teacher_need(args: Arguments, names: Collection[str], *, fresh: bool) -> TeacherNeed:
    """When a run of the stages `names` needs the teacher's weights; `fresh`: the student takes its start from them.

    Figures by layer, which are on by default, are no reason: they leave out the distance to a teacher that is not
    there.
    """
    aligns = "matrix" in names or "hidden" in names
    if args.kl_weight > 0 or args.eval_dataset or args.sample_interval or aligns:
        return "throughout"
    return "at the start" if fresh else "never"


def serves_host(args: Arguments, ranks: Ranks) -> bool:
    """True where one teacher, on a device that is no rank's, serves all ranks of a host."""
    return not ranks.alone and args.teacher_device is not None


def whole_models_for(args: Arguments, names: Collection[str], ranks: Ranks, *, fresh: bool) -> list[str]:
    """What every rank needs whole models for before it shards them (FSDP2); nothing: they are never whole.

    names: of the stages that are still to run; fresh: layers may have to be chosen.
    """
    reasons = {
        ALIGNMENT: not {"matrix", "hidden"}.isdisjoint(names),
        "--layers auto:K": fresh and auto_layers(args.layers) is not None,
        "--teacher_device": serves_host(args, ranks),
        "--teacher_fp8": args.teacher_fp8,
    }
    return [reason for reason, applies in reasons.items() if applies]


def settle_parallel(
    teacher: PreTrainedConfig,
    student: LlambaConfig,
    args: Arguments,
    parallel: str,
    free: float | None,
    ranks: Ranks,
    need: TeacherNeed = "throughout",
    whole_for: Collection[str] = (),
) -> tuple[str, MemoryEstimate]:
    """`parallel` with auto settled (ddp where a step fits every rank's `free` bytes, else fsdp), and the estimate.

    Shards' gradients are reduced in each micro step, unless there is room for whole ones without more recomputation.
    """
    settings = step_settings(args)
    estimated = functools.partial(estimate_memory, teacher, student, settings, free, teacher_need=need)
    if parallel != "fsdp":
        estimate = estimated(replicated=parallel != "none")
        if parallel != "auto":
            return parallel, estimate
        if not ranks.agree(free is not None and estimate.needed > free)[0]:
            return "ddp", estimate
        if args.optimizer == "muon":
            raise UserError(
                "--optimizer muon: the models do not fit whole on every rank; use adamw8bit, which shards"
            )
    whole_until: WholeUntil = "aligned" if ALIGNMENT in whole_for else "loaded" if whole_for else ""
    estimated = functools.partial(estimated, whole_until=whole_until)
    estimate = estimated(ranks.world_size)
    if args.grad_accumulation_steps > 1 and free is not None:
        whole = estimated(ranks.world_size, whole_gradients=True)
        if not ranks.agree(whole.needed > free or whole.modes != estimate.modes)[0]:
            return "fsdp", whole
    return "fsdp", estimate


def check_devices(args: Arguments, ranks: Ranks) -> tuple[torch.device, torch.device]:
    """(student's device, the one that the teacher is loaded on); under torchrun `args.device` becomes the rank's own.

    A `--teacher_device` under torchrun serves all ranks of a host, so no rank may have it for its student.
    """
    args.device = ranks.device(args.device)
    if args.dry_run and not torch.cuda.is_available():  # the plan of a run elsewhere
        return torch.device("cpu"), torch.device("cpu")
    own = check_device(args.device)
    if own.type == "cuda":
        torch.cuda.set_device(own)  # Triton's kernels and CUDA graphs are launched on the current device
    if args.teacher_device is None:
        return own, own
    teacher_device = check_device(args.teacher_device, "--teacher_device")
    if ranks.alone:
        return own, teacher_device
    if teacher_device.type == "cuda" and (teacher_device.index or 0) < ranks.local_world_size:
        raise UserError(
            f"--teacher_device {args.teacher_device} is a student's device under torchrun; name one from "
            f"cuda:{ranks.local_world_size} on, or leave it out for a teacher on every rank"
        )
    if args.matrix_tokens or args.hidden_tokens:
        raise UserError(
            f"--teacher_device {args.teacher_device}: the alignment stages need a teacher on every rank; leave it out"
        )
    return own, own
