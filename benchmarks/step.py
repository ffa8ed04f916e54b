"""The distillation step on one device: tokens a second, peak memory, share of the matrix-product ceiling, parts.

Both models are built from configurations with random weights; the step is `trainer.run_stage`, with the flags of
`train.py`. Each shape (length x batch) is a configuration of its own; one that fails is reported and passed over.

python -m benchmarks.step --preset 8b --freeze_mlp --plain --seq_length 4096 8192 --json step.jsonl
torchrun --standalone --nproc_per_node=2 -m benchmarks.step --preset 8b --freeze_mlp --parallel fsdp
python -m benchmarks.step --preset 8b --stage hidden
Flags that are not listed by --help go to train.py's parser, such as --gradient_checkpointing or --optimizer; with
--document_reset each shape is run without it and with it, on documents of 100 to 900 tokens. Under torchrun tokens
and seconds are those of all ranks; with --teacher_device the teacher's part is what is waited for. A small pair's
step runs as one CUDA graph, which is one part, "backward" (--no_cuda_graphs shows its parts).
"""

import argparse
import functools
import gc
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaForCausalLM

from arguments import Arguments, parse_arguments
from benchmarks.presets import Preset, preset
from benchmarks.profiling import host_waits, kernel_table
from benchmarks.timing import PARTS, Clock, matrix_ceiling
from data import Batch
from distill.losses import dense_kd_loss
from hardware.devices import default_dtype
from hardware.operations import distillation_operations
from hardware.ranks import Ranks, launched
from hardware.recomputation import set_activation_checkpointing
from loop.forms import Progress, Stage
from model_utils import apply_replacements, as_teacher, freeze, share_frozen_weights, transfer_teacher_weights
from models import LlambaForCausalLM
from optim.schedule import Phases
from run import build, inputs, stages
from run.acceleration import accelerate, compiles, try_step
from run.inputs import choose_parallel
from run.text import RunText
from trainer import Services, run_stage

GIB = 2**30
RESET = "ours, --document_reset"


class SyntheticLoader:
    """Random tokens with a loader's face."""

    def __init__(self, args: Arguments, vocabulary: int, micro_steps: int, clock: Clock):
        self.clock, self.micro_steps, self.waited_seconds = clock, micro_steps, 0.0
        generator = torch.Generator().manual_seed(args.seed)
        shape = (args.batch_size, args.seq_length + 1)
        rows = [torch.randint(0, vocabulary, shape, generator=generator) for _ in range(min(4, micro_steps))]
        valid = torch.ones(args.batch_size, args.seq_length, dtype=torch.bool)
        positions = None
        if args.document_reset:  # documents of 100 to 900 tokens
            lengths = torch.randint(100, 901, (args.seq_length // 100 + 1,), generator=generator).tolist()
            positions = torch.cat([torch.arange(length) for length in lengths])[: args.seq_length]
            positions = positions.expand_as(valid).contiguous()
        self.batches = [Batch(tokens, valid, positions, ["synthetic"]) for tokens in rows]
        if clock.cuda:
            self.batches = [batch.pin_memory() for batch in self.batches]

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self.micro_steps):
            last = self.clock.marks[-1][0] if self.clock.marks else "data"
            self.clock.mark("optimizer" if last == "backward" else "data")
            yield self.batches[index % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        return {}


def build_pair(args: Arguments, sizes: Preset, *, share: bool) -> build.Models:
    """Both models on the device with random weights, and the surgery that a run does on them."""
    torch.manual_seed(args.seed)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    sizes.teacher._attn_implementation = args.attn_implementation
    with torch.device(device), default_dtype(dtype):
        teacher = as_teacher(LlamaForCausalLM(sizes.teacher))
        student = LlambaForCausalLM(sizes.student)
    transfer_teacher_weights(student, teacher, replaced=args.layers)
    apply_replacements(student, teacher, args.layers)
    freeze(
        student,
        mlp=args.freeze_mlp,
        replaced_layers=args.freeze_replaced_layers,
        embeddings=args.freeze_embeddings,
    )
    if share:
        share_frozen_weights(student, teacher)
    student.train()
    return build.Models(teacher, student, RunText(args, None), device, device, dtype)


def place(args: Arguments, models: build.Models, ranks: Ranks) -> None:
    """Put the teacher where the flags want it, and connect the pair."""
    if ranks.alone and args.teacher_device:
        models.teacher_device = torch.device(args.teacher_device)
        models.teacher.to(models.teacher_device)  # type: ignore[arg-type]
    build.connect(args, models, ranks)


def ours(
    args: Arguments,
    models: build.Models,
    loader: Any,
    steps: int,
    clock: Clock,
    ranks: Ranks,
    name: str,
    parallel: str,
) -> Stage:
    """The project's own stage, with marks between its parts; those of an alignment are one, "backward"."""
    models.text = SimpleNamespace(calibration_tokens=lambda _: loader.batches[0].tokens[:1, :-1])  # type: ignore[assignment]
    stage = stages.build_stage(args, name, models, loader, phases_of(args, steps), ranks, parallel)
    mark, synchronise, average = clock.mark, stage.synchronise, stage.average_gradients

    def begin_micro_step(last: bool) -> None:
        mark("backward" if clock.marks[-1][0] == "loss" else "data")
        synchronise(last)

    def end_window() -> None:
        average()
        mark("backward")

    stage.synchronise, stage.average_gradients = begin_micro_step, end_window
    models.student.backbone.register_forward_pre_hook(lambda *_: mark("teacher"))
    models.student.backbone.register_forward_hook(lambda *_: mark("student"))
    stage.trainable.register_forward_hook(lambda *_: mark("loss"))
    return stage


def plain(args: Arguments, models: build.Models, loader: Any, steps: int, clock: Clock, ranks: Ranks) -> Stage:
    """What one would write first: all logits in float32, everything of the student its own, bf16 Adam, no compile."""
    models.student.zero_grad(set_to_none=True)
    set_activation_checkpointing(models.student, "full")
    trainable = [p for p in models.student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=args.max_lr, betas=(0.9, 0.95), weight_decay=0.1, fused=models.device.type == "cuda"
    )

    def micro_step(batch: Batch, grad_scale: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            theirs = models.teacher(batch.inputs, use_cache=False).logits.float().flatten(0, 1)
        clock.mark("teacher")
        hidden = models.student.backbone(batch.inputs).last_hidden_state
        clock.mark("student")
        logits = models.student.lm_head(hidden).float().flatten(0, 1)
        labels, valid = batch.labels.flatten(), batch.valid.flatten()
        terms = dense_kd_loss(logits, theirs, labels, valid, grad_scale=grad_scale)
        clock.mark("loss")
        terms.loss.backward()
        return {"loss": terms.loss_sum, "kl": terms.kl_sum, "top1_agreement": terms.agree_sum}

    stage = Stage(
        name="stage1",
        loader=loader,
        micro_step=micro_step,
        trainable=models.student,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        total_steps=steps,
        accumulation=args.grad_accumulation_steps,
        device=models.device,
    )
    stage.synchronise = lambda last: clock.mark("backward" if clock.marks[-1][0] == "loss" else "data")
    stage.average_gradients = lambda: clock.mark("backward")
    return stage


def since_process_start() -> float:
    """Seconds since this process began, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def phases_of(args: Arguments, steps: int) -> Phases:
    """The phases of `steps` optimizer steps as the flags say."""
    return Phases.of(steps, args.warmup_ratio, args.decay_ratio)


def drive(stage: Stage, steps: int) -> list[dict[str, Any]]:
    """Run `steps` optimizer steps through `run_stage`; returns the figures that it logged."""
    figures: list[dict[str, Any]] = []
    progress = Progress()
    progress.begin(stage.name, steps)
    stage.total_steps = steps
    run_stage(stage, progress, Services(log_metrics=lambda _, values: figures.append(values), save=lambda *_: None))
    return figures


def connect(args: Arguments, models: build.Models, modes: Any, ranks: Ranks) -> None:
    """What a run does to a pair before its first step: speed, the teacher's place, a trial."""
    accelerate(args, models, modes)
    place(args, models, ranks)
    try_step(args, models)


def measure(bench: argparse.Namespace, args: Arguments, way: str, ceiling: float, ranks: Ranks) -> dict[str, Any]:
    """One configuration: build, first step, warm-up, timed steps."""
    began = time.perf_counter()
    sizes, device = preset(bench.preset), torch.device(args.device)
    cuda, clock = device.type == "cuda", Clock(device)
    parallel, estimate = "none", None
    if cuda:
        torch.cuda.set_device(device)
    if way == "ours":
        free = torch.cuda.mem_get_info()[0] if cuda else None
        parallel = choose_parallel(args, ranks)
        parallel, estimate = inputs.settle_parallel(sizes.teacher, sizes.student, args, parallel, free, ranks)
        print("estimate:", estimate.describe(), f"({time.perf_counter() - began:.1f} s)", flush=True)
    models = build_pair(args, sizes, share=way == "ours" and not args.teacher_device)
    flops = distillation_operations(models.teacher, models.student, args.seq_length)
    reset_peak(cuda)
    if estimate is not None:
        connect(args, models, estimate.modes, ranks)
    micro_steps = args.grad_accumulation_steps * (bench.warmup + bench.steps)
    loader = SyntheticLoader(args, sizes.teacher.vocab_size, micro_steps, clock)
    make = functools.partial(ours, name=bench.stage, parallel=parallel) if way == "ours" else plain
    stage = make(args, models, loader, bench.warmup + bench.steps, clock, ranks)
    drive(stage, 1)
    row = {"first_step_s": time.perf_counter() - began, "since_start_s": since_process_start()}
    drive(stage, bench.warmup)
    clock.marks.clear()
    reset_peak(cuda)
    figures = drive(stage, bench.steps)
    clock.mark("optimizer")
    times = clock.steps()[: bench.steps - 1]  # the last one ends with the stage
    row |= figures_of(args, times, figures, ranks) | {"compiled": way == "ours" and compiles(args)}
    if stage.name == "stage1":  # an alignment's operations are not counted
        row |= {"flops_per_token": flops, "share": flops * row["tokens_per_second"] / ceiling / ranks.world_size}
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    if estimate is not None:
        row |= {"estimate_gib": estimate.allocated / GIB, "estimate": estimate.describe()}
    if bench.profile and way == "ours":
        print(kernel_table(lambda: drive(stage, 1), cuda), flush=True)
        print(host_waits(lambda: drive(stage, 3), cuda), flush=True)
    return row


def reset_peak(cuda: bool) -> None:
    """Count the peak of memory from here on."""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def figures_of(
    args: Arguments, times: list[dict[str, float]], figures: list[dict[str, Any]], ranks: Ranks
) -> dict[str, Any]:
    """Medians over the timed steps, and what the loop logged in them."""
    step_ms = statistics.median(sum(parts.values()) for parts in times)
    tokens = args.seq_length * args.batch_size * args.grad_accumulation_steps * ranks.world_size
    return {
        "ranks": ranks.world_size,
        "tokens_per_second": 1000 * tokens / step_ms,
        "step_ms": step_ms,
        "parts_ms": {name: statistics.median(parts[name] for parts in times) for name in PARTS},
        "losses": [line["train/loss"] for line in figures],
        "bad_steps": figures[-1]["train/bad_steps"],
    }


def attempt(bench: argparse.Namespace, args: Arguments, way: str, ceiling: float, ranks: Ranks) -> dict[str, Any]:
    """`measure`, with any failure in the row instead of the traceback, and the memory given back."""
    row: dict[str, Any] = {"way": way, "length": args.seq_length, "batch": args.batch_size}
    try:
        row |= measure(bench, args, way, ceiling, ranks)
    except Exception as error:
        logging.exception("%s, length %d, batch %d", way, args.seq_length, args.batch_size)
        message = " ".join(str(error).split())[:200]
        row["error"] = f"{type(error).__name__}: {message}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table of all rows, failures included."""
    titles = "way | length x batch | tokens/s | ms/step | share | peak GiB | estimate GiB | first step s".split(" | ")
    lines = [" | ".join(["", *titles, *PARTS, ""]).strip(), "|" + " --- |" * (len(titles) + len(PARTS))]
    for row in rows:
        shape = f"{row['length']}x{row['batch']}"
        if "error" in row:
            lines.append(f"| {row['way']} | {shape} | {row['error']} |")
            continue
        cells = [
            row["way"],
            shape,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['step_ms']:.1f}",
            f"{row['share']:.1%}" if "share" in row else "",
        ]
        cells += [f"{row[name]:.1f}" if name in row else "" for name in ("peak_gib", "estimate_gib", "first_step_s")]
        cells += [f"{row['parts_ms'][name]:.1f}" for name in PARTS]
        lines.append("| " + " | ".join(cells) + " |")
    before: dict[str, Any] = {}
    for row in rows:
        if row["way"] == "ours":
            before = row
        elif before and "error" not in row and "error" not in before:
            ratio = before["tokens_per_second"] / row["tokens_per_second"]
            words = "times the plain way" if row["way"] == "plain" else "times as long with --document_reset"
            lines.append(f"{row['length']}x{row['batch']}: {ratio:.2f} {words}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["8b", "1b", "smollm2", "tiny"], default="8b")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seq_length", type=int, nargs="+", default=[4096])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1])
    parser.add_argument("--layers", nargs="+", default=None, help="layers to replace; the preset's if not given")
    parser.add_argument("--plain", action="store_true", help="also the plain way, in the same run")
    parser.add_argument("--stage", choices=["matrix", "hidden", "stage1"], default="stage1")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--profile", action="store_true", help="kernel table of a step, and where the host waits")
    parser.add_argument("--json", type=Path, default=None, help="file to add a JSON line a configuration to")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    bench, rest = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with launched(bench.device) as ranks:
        if not ranks.is_first:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process
            bench.json = None
        bench.device = ranks.device(bench.device)
        return run(bench, rest, ranks)


def run(bench: argparse.Namespace, rest: list[str], ranks: Ranks) -> int:
    """All configurations that the flags name, one after the other."""
    layers = bench.layers or list(map(str, preset(bench.preset).layers))
    base = parse_arguments([*rest, "--device", bench.device, "--layers", *layers])
    device, dtype = torch.device(base.device), getattr(torch, base.dtype)
    ceiling = matrix_ceiling(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {base.dtype}, ceiling {ceiling / 1e12:.2f} TFLOP/s", flush=True)
    ways = ["ours", *(["plain"] if bench.plain else []), *([RESET] if base.document_reset else [])]
    rows: list[dict[str, Any]] = []
    for length in bench.seq_length:
        for batch in bench.batch_size:
            for way in ways:
                args = argparse.Namespace(**vars(base))
                args.seq_length, args.batch_size = length, batch
                args.document_reset = way == RESET
                rows.append({**attempt(bench, args, "ours" if way == RESET else way, ceiling, ranks), "way": way})
                row = {"preset": bench.preset, "device": name, "ceiling": ceiling, "flags": rest, **rows[-1]}
                print(json.dumps(rows[-1]), flush=True)
                if bench.json:
                    with bench.json.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table(rows))
    return int(all("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
