"""The three pieces of our own on one GPU: operator, loss, optimizer. Times by CUDA events, medians after warm-up.

python benchmarks/pieces.py [--pieces ssd loss optimizer] [--json FILE]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from losses import chunked_kd_loss, dense_kd_loss
from models.state_space import ssd_chunked
from optimizer import build_optimizer, clip_and_step

GIB = 2**30


def milliseconds(run: Callable[[], Any], repeats: int = 20, warmup: int = 4) -> float:
    """Median time of `run` in ms by CUDA events."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def extra_peak(run: Callable[[], Any]) -> float:
    """Peak memory that `run` adds to what is allocated already, in GiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def relative_error(given: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((given.double() - wanted.double()).norm() / wanted.double().norm()).item()


def bench_ssd(t: int = 4096, H: int = 32, N: int = 64, P: int = 128) -> list[dict[str, Any]]:
    """Forward and forward+backward at 1 x t, against float64 on the same inputs."""
    shapes = ((1, t, H, P), (1, t, H), (1, t, H, N), (1, t, H, N), (H,))
    inputs = [torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes]
    upstream = torch.randn(shapes[0], device="cuda").bfloat16()
    exact = [i.detach().double().requires_grad_() for i in inputs]
    wanted = ssd_chunked(*exact)[0]
    wanted_grads = torch.autograd.grad(wanted, exact, upstream.double())
    rows = []
    for name, function in (("eager", ssd_chunked), ("compiled", torch.compile(ssd_chunked, dynamic=False))):
        for chunk in (64, 128, 256):
            out = function(*inputs, chunk_size=chunk)[0]
            grads = torch.autograd.grad(out, inputs, upstream)
            errors = [relative_error(g, w) for g, w in zip((out, *grads), (wanted, *wanted_grads))]

            def both(function: Any = function, chunk: int = chunk) -> None:
                torch.autograd.grad(function(*inputs, chunk_size=chunk)[0], inputs, upstream)

            def forward(function: Any = function, chunk: int = chunk) -> None:
                with torch.no_grad():
                    function(*inputs, chunk_size=chunk)

            rows.append(
                {"piece": "ssd", "way": name, "chunk": chunk, "forward_ms": milliseconds(forward)}
                | {"both_ms": milliseconds(both), "error": max(errors)}
            )
    return rows


def bench_loss(n: int = 4096, d: int = 4096, V: int = 128256) -> list[dict[str, Any]]:
    """Forward and backward of the loss, dense float32 and chunked, with its extra peak memory."""
    hidden = (torch.randn(n, d, device="cuda") / d**0.5).bfloat16().requires_grad_()
    head = torch.randn(V, d, device="cuda").bfloat16().requires_grad_()
    theirs = (torch.randn(n, d, device="cuda") / d**0.5).bfloat16()
    teacher_head = torch.randn(V, d, device="cuda").bfloat16()
    labels = torch.randint(0, V, (n,), device="cuda")
    valid = torch.ones(n, dtype=torch.bool, device="cuda")
    buffer = torch.zeros(V, d, device="cuda")

    def dense() -> None:
        hidden.grad = head.grad = None
        dense_kd_loss(hidden @ head.T, theirs @ teacher_head.T, labels, valid).loss.backward()

    def chunked(chunk: int, frozen: bool = False) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = head.grad = None
            weight = head.detach() if frozen else head
            grad = None if frozen else buffer
            chunked_kd_loss(
                hidden, weight, theirs, teacher_head, labels, valid, head_grad=grad, chunk_size=chunk, compile=True
            ).loss.backward()

        return run

    def products() -> None:
        for _ in range(3):
            hidden.detach() @ head.detach().T
        del _

    rows: list[dict[str, Any]] = [{"piece": "loss", "way": "three products alone", "ms": milliseconds(products)}]
    runs = {f"chunked {c}": chunked(c) for c in (512, 1024, 2048, 4096)}
    runs |= {"chunked 1024, frozen head": chunked(1024, frozen=True), "dense float32": dense}
    for name, run in runs.items():
        run()
        rows.append({"piece": "loss", "way": name, "ms": milliseconds(run, 10, 2), "extra_gib": extra_peak(run)})
    return rows


def bench_optimizer(parameters: float = 3.1e9) -> list[dict[str, Any]]:
    """One clipped update of bf16 parameters in Llamba's shapes (no MLPs), and bytes of state a parameter."""
    rows = []
    for name in ("adamw8bit", "adamw"):
        torch.cuda.empty_cache()
        shapes = [(128256, 4096)] * 2 + [(16416, 4096), (4096, 4096)] * 24
        module = torch.nn.ParameterList()
        total = 0
        for shape in shapes:
            if total < parameters:
                module.append(torch.nn.Parameter(torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02))
                total += module[-1].numel()
        for p in module:
            p.grad = torch.randn_like(p)
        before = torch.cuda.memory_allocated()
        optimizer = build_optimizer(name, module, lr=1e-5, weight_decay=0.1, compile=True)
        parameters_list = list(module.parameters())

        def step(optimizer: Any = optimizer, everything: Any = parameters_list) -> None:
            clip_and_step(optimizer, everything, 1.0)

        step()
        state = (torch.cuda.memory_allocated() - before) / total
        rows.append(
            {"piece": "optimizer", "way": name, "parameters": total, "ms": milliseconds(step, 10, 3)}
            | {"bytes": state, "extra_gib": extra_peak(step)}
        )
        del optimizer, module, parameters_list, step, p
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", nargs="+", default=["ssd", "loss", "optimizer"])
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    rows: list[dict[str, Any]] = []
    for piece in args.pieces:
        for row in {"ssd": bench_ssd, "loss": bench_loss, "optimizer": bench_optimizer}[piece]():
            shown = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
            print("  ".join(shown), flush=True)
            rows.append(row)
        torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
