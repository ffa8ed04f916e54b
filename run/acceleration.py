"""What the flags ask of speed and memory, applied once to both models, and one trial step of everything compiled."""

import argparse
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from distill.losses import chunked_kd_loss, layer_distances
from hardware.compilation import compile_layers, compiles_here, uncompile_layers
from hardware.fp8 import check_fp8, quantise_teacher_fp8
from hardware.recomputation import set_activation_checkpointing
from model_utils import teacher_hidden
from optim.build import build_optimizer
from optim.moments import block_length

log = logging.getLogger(__name__)


def compiles(args: argparse.Namespace) -> bool:
    """torch.compile is on by default on CUDA and off on the CPU."""
    return args.device.startswith("cuda") and not args.no_compile


def accelerate(args: argparse.Namespace, models: Any, modes: str | Sequence[str], *, trial: bool = True) -> None:
    """Apply checkpointing, the fp8 teacher and compilation to a pair (`build.Models`), in place.

    If anything fails to compile, everything runs eagerly, and `args.no_compile` says so from then on. Without
    `trial` that is left to `try_sharded`, for a pair that has no weights yet.
    """
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
    if not trial:
        return
    if not compiles_here("a layer, the loss or the optimizer", functools.partial(trial_step, args, models)):
        args.no_compile = True
        for model in pair:
            uncompile_layers(model)
    models.student.zero_grad(set_to_none=True)


def try_sharded(args: argparse.Namespace, models: Any) -> None:
    """The trial of a pair that is sharded already: a whole step, on every rank; leaves no gradient behind."""
    if not compiles(args):
        return

    def step() -> None:
        tokens = torch.zeros((args.batch_size, args.seq_length), dtype=torch.long, device=models.device)
        positions = None
        if args.document_reset:  # two documents, so that attention gets its mask
            positions = torch.arange(args.seq_length, device=models.device) % max(1, args.seq_length // 2)
            positions = positions.expand(tokens.shape).contiguous()
        hidden = models.hidden_states.backbone(tokens, positions) if args.kl_weight > 0 else None
        valid = torch.ones_like(tokens, dtype=torch.bool)
        one = torch.ones((), device=models.device)
        models.step(tokens, tokens, valid, positions, hidden, one).loss.backward()
        _try_optimizer(args, models.student)

    if not compiles_here("a layer, the loss or the optimizer", step):
        args.no_compile = True
        models.step.reset_iter_state()
        models.step.options["compile"] = False
        for model in (models.teacher, models.student):
            if model is not None:
                uncompile_layers(model)
    models.step.zero_grad(set_to_none=True)


def trial_step(args: argparse.Namespace, models: Any) -> None:
    """Everything compiled, once, at the shapes of the run: both models, loss, backward pass, optimizer."""
    shape = (args.batch_size, args.seq_length)
    tokens = torch.zeros(shape, dtype=torch.long, device=models.device)
    positions = None
    if args.document_reset:  # two documents, so that attention gets its mask
        positions = torch.arange(shape[1], device=models.device) % max(1, shape[1] // 2)
        positions = positions.expand(shape).contiguous()
    matches = args.layer_weight > 0  # the teacher's hidden states are then those of every layer
    theirs: Any = None
    their_head = None
    if args.kl_weight > 0:
        where = None if positions is None else positions.to(models.teacher_device)
        theirs = teacher_hidden(models.teacher, tokens.to(models.teacher_device), where, matches).to(models.device)
        their_head = models.teacher.get_output_embeddings().weight.to(models.device)
    half = torch.float16 if models.dtype == torch.float16 else None
    with torch.autocast(models.device.type, half, enabled=half is not None):
        states = models.student.backbone(tokens, position_ids=positions, output_hidden_states=matches)
    options = dict(temperature=args.temperature, kl_weight=args.kl_weight, ce_weight=args.ce_weight)
    head = models.student.lm_head.weight.detach()
    valid = torch.ones(shape, dtype=torch.bool, device=models.device)
    last = theirs[-1] if matches else theirs
    terms = chunked_kd_loss(states.last_hidden_state, head, last, their_head, tokens, valid, compile=True, **options)
    loss = terms.loss
    if matches:
        loss = loss + layer_distances(states.hidden_states, theirs, valid, True)
    loss.backward()
    _try_optimizer(args, models.student)


def _try_optimizer(args: argparse.Namespace, student: Any) -> None:
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
