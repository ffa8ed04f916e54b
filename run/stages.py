"""From flags to a stage: its micro step, optimizer, schedule, and how its ranks average gradients."""

import torch
from torch import nn

from arguments import Arguments
from data import TextLoader
from distill.distillation import StudentLoss
from distill.mohawk import AlignmentMicroStep, trained_mixers
from hardware.cuda_graphs import CapturedMicroStep
from hardware.parallel import average_gradients, widen_gradients
from hardware.ranks import Ranks
from loop.forms import MicroStep, Stage
from loop.gradient_check import without_gradient
from optim.build import build_optimizer
from optim.schedule import Phases, build_schedule
from optim.update_in_backward import UpdateInBackward
from run.acceleration import captures, compiles, kd_step
from run.build import Models, distribute
from run.plan import sequence_length


def build_stage(
    args: Arguments,
    name: str,
    models: Models,
    loader: TextLoader,
    phases: Phases,
    ranks: Ranks,
    parallel: str = "none",
    *,
    done: int = 0,
    stretches: list[list[int]] | None = None,
) -> Stage:
    """A stage with a fresh optimizer and its own schedule, `done` steps on, ready for `trainer.run_stage`.

    parallel: Inputs.parallel; stretches: those of an interrupted stage (optim/stretch.py), which the loop adds to.
    """
    stretches = [] if stretches is None else stretches
    distils = name in ("stage1", "stage2")
    micro_step, module = distillation(args, models, parallel) if distils else alignment(args, name, models)
    rates = {"matrix": args.matrix_lr, "hidden": args.hidden_lr}
    max_lr = rates.get(name, args.max_lr)
    optimizer = build_optimizer(
        args.optimizer,
        module,
        lr=max_lr,
        weight_decay=args.weight_decay,
        kernel=compiles(args),
    )
    schedule = build_schedule(optimizer, phases, max_lr=max_lr, min_lr=args.min_lr, done=done, stretches=stretches)
    if args.update_in_backward:
        optimizer = UpdateInBackward(optimizer, args.grad_clip)  # type: ignore[assignment]
    stage = Stage(
        name=name,
        loader=loader,
        micro_step=micro_step,
        trainable=module,
        optimizer=optimizer,
        schedule=schedule,
        total_steps=phases.total,
        warmup=phases.warmup,
        stable_end=phases.stable_end,
        accumulation=args.grad_accumulation_steps,
        grad_clip=args.grad_clip,
        device=models.device,
        scaler=torch.amp.GradScaler(models.device.type) if models.dtype == torch.float16 else None,
        open_ended=name == "stage1" and args.epochs > 0,
        stretches=stretches,
        ranks=ranks,
        without_gradient=without_gradient(
            name,
            seq_length=sequence_length(args, name),
            mixers=models.student.config.n_layer > len(models.student.config.attention_layers),
            hard_labels=args.ce_weight > 0,
        ),
    )
    teacher = models.teacher_states
    stage.ahead = distils and args.kl_weight > 0 and teacher is not None and teacher.ahead
    if captures(args, models, ranks):
        stage.micro_step = CapturedMicroStep(stage.micro_step, stage.parameters(), models.device)
    if not ranks.alone:
        synchronise(stage, models, parallel if distils else "none")
    return stage


def synchronise(stage: Stage, models: Models, parallel: str) -> None:
    """Average gradients over ranks: in an optimizer step's last backward pass, after it ("none"), or in each."""
    if parallel == "fsdp" and models.whole_gradients:
        stage.synchronise = models.student_loss.set_requires_gradient_sync
    elif parallel == "fsdp":
        stage.synchronise = lambda last: widen_gradients(stage.parameters())
    elif parallel == "ddp":
        stage.synchronise = lambda last: setattr(models.student_loss, "require_backward_grad_sync", last)
        stage.average_gradients = lambda: average_gradients([models.student.lm_head.weight])
    else:
        stage.average_gradients = lambda: average_gradients(stage.parameters())


def alignment(args: Arguments, name: str, models: Models) -> tuple[MicroStep, nn.Module]:
    """(micro step, what it trains) of the "matrix" or "hidden" stage."""
    half = torch.float16 if models.dtype == torch.float16 else None
    tokens = models.text.calibration_tokens(name)
    assert models.teacher is not None
    align = AlignmentMicroStep(name, models.teacher, models.student, tokens, autocast=half, compile=compiles(args))
    return align, trained_mixers(models.student)


def distillation(args: Arguments, models: Models, parallel: str) -> tuple[MicroStep, nn.Module]:
    """(micro step, what it trains) of the KD stages."""
    if type(models.student_loss) is StudentLoss:  # neither DDP's nor, by FSDP2's subclass, sharded yet
        distribute(args, models, parallel)
    return kd_step(args, models), models.student_loss
