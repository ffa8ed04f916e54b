"""What a step takes on this device: a few steps of the run's own sizes on random weights, before any is loaded."""

import gc
import logging
import os
import time

import torch
from transformers import AutoModelForCausalLM

from arguments import Arguments
from hardware.devices import default_dtype
from hardware.memory import MemoryEstimate
from hardware.meta_models import replaced_layers
from hardware.operations import distillation_operations
from hardware.ranks import Ranks
from model_utils import apply_replacements, as_teacher, share_frozen_weights
from models import LlambaForCausalLM
from optim.build import build_optimizer
from optim.step import clip_and_step
from optim.update_in_backward import UpdateInBackward
from run.acceleration import compiles, kd_step, trial_batch
from run.build import assemble, freeze_as_asked
from run.inputs import Inputs
from run.pair import Models

log = logging.getLogger(__name__)

STEPS = 4  # the first of which is not counted
CPU_TOKENS = 128  # of the one sequence that a CPU measures; a GPU takes the run's own batch


def measured_rate(args: Arguments, inputs: Inputs, estimate: MemoryEstimate, device: torch.device) -> float | None:
    """Floating-point operations a second of a distillation step on this device; None where it has no room for one."""
    if free_bytes(device) < estimate.needed * (2 if device.type == "cpu" else 1):
        return None
    if device.type == "cpu":
        args = type(args)(**{**vars(args), "batch_size": 1, "seq_length": min(args.seq_length, CPU_TOKENS)})
    log.info("measuring %d steps on random weights ...", STEPS)
    models = random_pair(args, inputs, device)
    operations = distillation_operations(models.teacher, models.student, args.seq_length)
    seconds = _timed(args, models)
    del models
    gc.collect()
    return operations * args.batch_size * args.seq_length / seconds


def free_bytes(device: torch.device) -> float:
    """Bytes of memory that are free, of a CPU the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def random_pair(args: Arguments, inputs: Inputs, device: torch.device) -> Models:
    """Both models with random weights, as a run has them before its first step."""
    dtype = getattr(torch, args.dtype)
    inputs.teacher._attn_implementation = args.attn_implementation
    with torch.device(device), default_dtype(dtype):
        teacher = as_teacher(AutoModelForCausalLM.from_config(inputs.teacher, dtype=dtype))
    with torch.device(device), default_dtype(torch.float32 if dtype == torch.float16 else dtype):
        student = LlambaForCausalLM(inputs.student)
    if not student.config.attention_layers:
        apply_replacements(student, teacher, replaced_layers(args.layers, teacher.config.num_hidden_layers))
    freeze_as_asked(args, student)
    share_frozen_weights(student, teacher)
    return assemble(args, inputs, teacher, student, (device, device), Ranks())


def _timed(args: Arguments, models: Models) -> float:
    """The median seconds of a micro step and an update."""
    parameters = [p for p in models.student.parameters() if p.requires_grad]
    optimizer = build_optimizer(
        args.optimizer, models.student, lr=args.max_lr, weight_decay=args.weight_decay, kernel=compiles(args)
    )
    if args.update_in_backward:
        optimizer = UpdateInBackward(optimizer, args.grad_clip)  # type: ignore[assignment]
    micro_step = kd_step(args, models)
    batch, taken = trial_batch(args, models.device), []
    scale = torch.ones((), device=models.device) / (args.batch_size * args.seq_length)
    for _ in range(STEPS):
        began = time.perf_counter()
        micro_step(batch, scale)
        clip_and_step(optimizer, parameters, args.grad_clip)
        optimizer.zero_grad(set_to_none=True)
        if models.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[len(taken[1:]) // 2]
