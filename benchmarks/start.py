"""How mixers should start: each choice's relative error against the attention, at the start and after some alignment.

    python -m benchmarks.start --dataset_name text.jsonl.gz                                  # one GPU, 2 minutes
    python -m benchmarks.start --dataset_name text.jsonl.gz --device cpu --dtype float32 --steps 0   # no training

Every row starts from the same teacher, sees the same sequences in the same order and runs the "hidden" stage of
train.py with its WSD schedule. Errors are means over layers of |mixer - attention| / |attention| on sequences that
are neither trained on nor calibrated on (as far as the text goes). Rows differ from the first in what they name.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import arguments
from arguments import Arguments
from distill.initialization import SILU_IS_ONE, calibrate_mixers, student_from_teacher, visit_layers
from hardware.devices import seed_everything
from hardware.ranks import Ranks
from loop.forms import Progress
from model_utils import get_teacher_model, get_tokenizer
from optim.schedule import Phases
from run import build, stages
from run.text import RunText
from trainer import Services, run_stage

# What the rows of a long memory share; the first is what train.py does. gate: (z_bias, deviation of its weights)
LONG: dict[str, Any] = {"half_lives": (64.0, 64.0), "per_head": False}
STARTS: dict[str, dict[str, Any]] = {
    "as train.py: half lives fitted to the heads, a factor a head, even split, gate open": {},
    "half lives 1 to 16 over the heads, a factor a head": {"half_lives": (1.0, 16.0)},
    "half life 1 (zero weights), a factor a head": {"half_lives": (1.0, 1.0)},
    "half life 64, a factor a layer": LONG,
    "half life 1, a factor a layer": {"per_head": False, "half_lives": (1.0, 1.0)},
    "half life 8, a factor a layer": {"per_head": False, "half_lives": (8.0, 8.0)},
    "half life 512, a factor a layer": {"per_head": False, "half_lives": (512.0, 512.0)},
    "half lives 2 to 512 over the heads, a factor a layer": {"per_head": False, "half_lives": (2.0, 512.0)},
    "half lives 2 to 32 over the heads, a factor a layer": {"per_head": False, "half_lives": (2.0, 32.0)},
    "half life 64, factor in C alone": {**LONG, "split": (0.0, 0.0, 1.0)},
    "half life 64, factor in x alone": {**LONG, "split": (1.0, 0.0, 0.0)},
    "half life 64, factor in B and C": {**LONG, "split": (0.0, 0.5, 0.5)},
    "half life 64, a factor a head": {"half_lives": (64.0, 64.0)},
    "half life 8, a factor a head": {"half_lives": (8.0, 8.0)},
    "half lives 1 to 8, a factor a head": {"half_lives": (1.0, 8.0)},
    "half lives 2 to 32, a factor a head": {"half_lives": (2.0, 32.0)},
    "half life 64, gate open, random weights": {**LONG, "gate": (SILU_IS_ONE, 0.02)},
    "half life 64, gate without bias, random weights": {**LONG, "gate": (0.0, 0.02)},
    "not calibrated": {"calibrate": False},
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher_model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    add("--dataset_name", required=True, help="folder or file with text")
    add("--dataset_text_field", default="text")
    add("--steps", type=int, default=30, help="optimizer steps of the hidden stage; 0: the starts alone")
    add("--lr", type=float, nargs="+", default=[5e-4])
    add("--batch_size", type=int, default=8)
    add("--seq_length", type=int, default=1024)
    add("--starts", type=int, nargs="*", default=None, help="rows to run, from 0; all if not given")
    add("--device", default="cuda:0")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--compile", action="store_true", help="worth its time only with many steps")
    add("--json", type=Path, default=None, help="append a line for each row")
    return parser.parse_args(argv)


def training_flags(args: Arguments, rate: float) -> argparse.Namespace:
    """train.py's flags for the hidden stage of one row."""
    tokens = max(args.steps, 1) * args.batch_size * args.seq_length
    line = [
        "--student_model",
        "from_teacher",
        "--layers",
        "-1",
        "--dataset_subset",
        "",
        "--hidden_tokens",
        str(tokens),
    ]
    for name in (
        "teacher_model",
        "dataset_name",
        "dataset_text_field",
        "batch_size",
        "seq_length",
        "device",
        "dtype",
    ):
        line += [f"--{name}", str(getattr(args, name))]
    line += [] if args.compile else ["--no_compile"]
    return arguments.parse_arguments([*line, "--hidden_lr", str(rate)])


def set_gate(student: Any, bias: float, spread: float) -> None:
    """z_bias and random weights of the gate's rows of in_proj, the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    for layer in student.backbone.layers:
        mixer = layer.mixer
        rows = mixer.in_proj.weight.data[mixer.d_conv : mixer.d_conv + mixer.d_inner]
        rows.copy_(spread * torch.randn(rows.shape, generator=generator))
        nn.init.constant_(mixer.z_bias, bias)


@torch.no_grad()
def mean_error(student: Any, teacher: Any, tokens: torch.Tensor) -> float:
    """Mean over layers of |mixer's output - attention's| / |attention's| on tokens [b, t]."""
    errors = []
    for visit in visit_layers(teacher.model, tokens):
        given = student.backbone.layers[visit.index].mixer(visit.u)
        difference = (given.float() - visit.attended.float()).norm()
        errors.append((difference / visit.attended.float().norm()).item())
    return sum(errors) / len(errors)


def measure(
    choice: dict[str, Any], flags: argparse.Namespace, teacher: Any, tokenizer: Any, steps: int
) -> dict[str, Any]:
    """Start a student as `choice` says and align it: its errors before and after."""
    options = dict(choice)
    gate, calibrate = options.pop("gate", None), options.pop("calibrate", True)
    seed_everything(flags.seed)
    device, dtype = torch.device(flags.device), getattr(torch, flags.dtype)
    student = student_from_teacher(teacher, dtype=dtype, device=device).train()
    if gate is not None:
        set_gate(student, *gate)
    if calibrate:
        calibrate_mixers(
            student, teacher, RunText(flags, tokenizer).calibration_tokens("hidden").to(device), **options
        )
    held_out = held_out_tokens(flags, tokenizer).to(device)
    row = {"start": mean_error(student, teacher, held_out), "lr": flags.hidden_lr, "steps": steps}
    began = time.perf_counter()
    if steps:
        row["worst step loss"], row["last loss"] = align(student, flags, teacher, tokenizer, steps)
        row["aligned"] = mean_error(student, teacher, held_out)
    row["seconds"] = time.perf_counter() - began
    return row


def held_out_tokens(flags: argparse.Namespace, tokenizer: Any) -> torch.Tensor:
    """A few sequences in another order than the stage's."""
    other = argparse.Namespace(**{**vars(flags), "seed": flags.seed + 1})
    return RunText(other, tokenizer).calibration_tokens("hidden")


def align(student: Any, flags: argparse.Namespace, teacher: Any, tokenizer: Any, steps: int) -> tuple[float, float]:
    """Run the hidden stage; returns the largest and the last loss of its steps."""
    device = torch.device(flags.device)
    text = RunText(flags, tokenizer)
    models = build.Models(teacher, student, text, device, device, getattr(torch, flags.dtype))
    loader = text.loader("hidden")
    phases = Phases.of(steps, flags.warmup_ratio, flags.decay_ratio)
    stage = stages.build_stage(flags, "hidden", models, loader, phases, Ranks())
    losses: list[float] = []
    progress = Progress()
    progress.begin("hidden", steps)
    services = Services(lambda _, figures: losses.append(figures["train/loss"]), lambda *_: None)
    try:
        run_stage(stage, progress, services)
    finally:
        loader.close()
    return max(losses), losses[-1]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse(argv)
    teacher = get_teacher_model(args.teacher_model, dtype=getattr(torch, args.dtype), device=args.device)
    tokenizer = get_tokenizer(args.teacher_model)
    names = list(STARTS) if args.starts is None else [list(STARTS)[index] for index in args.starts]
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU"
    print(
        f"{args.teacher_model}, {args.dtype}, {where}, torch {torch.__version__}, {args.steps} steps of "
        f"{args.batch_size} x {args.seq_length} tokens"
    )
    print("| start | lr | error at the start | error after | worst step's loss | last step's loss | s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for rate in args.lr:
        for name in names:
            row = measure(STARTS[name], training_flags(args, rate), teacher, tokenizer, args.steps)
            rows.append({"name": name, **row})
            figures = [row["start"], *(row.get(key) for key in ("aligned", "worst step loss", "last loss"))]
            cells = " | ".join("" if value is None else f"{value:.4g}" for value in figures)
            print(f"| {name} | {rate:g} | {cells} | {row['seconds']:.1f} |", flush=True)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return rows


if __name__ == "__main__":
    main()
