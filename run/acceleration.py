"""What the flags ask of speed and memory, applied once to both models, and one trial step of everything compiled."""

import logging
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import nn

from arguments import Arguments
from data import Batch
from distill.distillation import kd_micro_step
from hardware.compilation import compile_layers, compiles_here, uncompile_layers
from hardware.fp8 import check_fp8, quantise_teacher_fp8
from hardware.ranks import Ranks
from hardware.recomputation import set_activation_checkpointing
from hardware.settings import StepSettings
from loop.forms import MicroStep
from models import LlambaForCausalLM
from optim.build import build_optimizer
from optim.moments import block_length
from run.pair import Models

log = logging.getLogger(__name__)


def compiles(args: Arguments) -> bool:
    """torch.compile is on by default on CUDA and off on the CPU."""
    return args.device.startswith("cuda") and not args.no_compile


def step_settings(args: Arguments) -> StepSettings:
    """What a step's memory depends on, of the flags."""
    same = [field.name for field in fields(StepSettings) if field.name not in ("dtype", "teacher_device", "compiled")]
    return StepSettings(
        **{name: getattr(args, name) for name in same},
        dtype=getattr(torch, args.dtype),
        teacher_device=args.teacher_device or args.device,
        compiled=compiles(args),
    )


def captures(args: Arguments, models: Models, ranks: Ranks) -> bool:
    """CUDA graphs are on by default where one device does everything and gradients go the ordinary way."""
    alone = ranks.alone and models.device == models.teacher_device
    return alone and compiles(args) and not (args.no_cuda_graphs or args.update_in_backward or args.document_reset)


def accelerate(args: Arguments, models: Models, modes: str | Sequence[str]) -> None:
    """Apply checkpointing, the fp8 teacher and compilation to a pair (`run.pair.Models`), in place."""
    set_activation_checkpointing(models.student, modes)
    if args.teacher_fp8 and models.teacher is not None:
        check_fp8(models.teacher_device)
        log.info("teacher in fp8: %.2f GiB of matrices", quantise_teacher_fp8(models.teacher))
    if not compiles(args):
        return
    if models.dtype != torch.float32:
        # The only float32 product of a bf16 step mixes chunk states; TF32 keeps more of them than their bf16 sources.
        torch.set_float32_matmul_precision("high")
    pair = [model for model in (models.teacher, models.student) if model is not None]
    for model in pair:
        compile_layers(model)


def kd_step(args: Arguments, models: Models) -> MicroStep:
    """The KD stages' micro step; hard labels alone ask no teacher."""
    return kd_micro_step(models.student_loss, models.teacher_states if args.kl_weight > 0 else None)


def try_step(args: Arguments, models: Models) -> None:
    """Everything compiled, once, at the shapes of the run: the KD stages' own micro step, and an update.

    If anything fails to compile, everything runs eagerly, and `args.no_compile` says so from then on. On every rank
    of a sharded pair, or of a host's teacher; leaves no gradient behind.
    """
    if not compiles(args):
        return
    log.info("compiling: a trial step ...")
    micro_step = kd_step(args, models)

    def step() -> None:
        micro_step(trial_batch(args, models.device), torch.ones((), device=models.device))
        _try_optimizer(args, models.student)

    if not compiles_here("a layer, the loss or the optimizer", step):
        args.no_compile = True
        if hasattr(models.student_loss, "reset_iter_state"):  # FSDP2's, in the middle of a backward pass
            models.student_loss.reset_iter_state()
        models.student_loss.options["compile"] = False
        for model in (models.teacher, models.student):
            if model is not None:
                uncompile_layers(model)
    models.student_loss.zero_grad(set_to_none=True)


def trial_batch(args: Arguments, device: torch.device) -> Batch:
    """A batch of the KD stages' shape; with `--document_reset` of two documents, so that attention gets its mask."""
    shape = (args.batch_size, args.seq_length)
    positions = None
    if args.document_reset:
        positions = (torch.arange(shape[1]) % max(1, shape[1] // 2)).expand(shape).contiguous()
    tokens = torch.zeros((shape[0], shape[1] + 1), dtype=torch.long)
    valid = torch.ones(shape, dtype=torch.bool)
    return Batch(tokens, valid, positions, []).to(device)


def _try_optimizer(args: Arguments, student: LlambaForCausalLM) -> None:
    """An update of a small tensor of each kind of block that the matrices divide into, and a linear layer's."""
    matrices = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
    kinds = {(block_length(p) or 64, p.dtype, p.device) for p in matrices}
    tensors = (torch.zeros(2, width, dtype=dtype, device=device) for width, dtype, device in kinds)
    dtype, device = student.lm_head.weight.dtype, student.lm_head.weight.device
    linear = nn.Linear(64, 64, bias=False, dtype=dtype, device=device)
    small = nn.ModuleList([nn.ParameterList(tensors), linear])
    for parameter in small.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(args.optimizer, small, lr=args.max_lr, weight_decay=args.weight_decay, kernel=True).step()
