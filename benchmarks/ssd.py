"""The state-space operator alone: times, memory and errors, compiled and eager, for several chunk sizes.

python -m benchmarks.ssd [--length 4096] [--heads 32] [--groups 32] [--state 64] [--width 128] [--chunks 64 128 256]
                         [--profile] [--json FILE]

Times are medians after warm-up, by CUDA events on a GPU and by the clock elsewhere. On a GPU each is taken twice:
with the host far ahead of the device, as in the midst of a training step (forward_ms, both_ms), and from an idle
device, where a chain of short kernels also waits for the host to launch them (.._from_idle_ms). Errors are relative,
against the same operator in float64 (tests/models/test_state_space.py holds it against the recurrence), the worst of
the output and of the five gradients.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.profiling import kernel_table
from benchmarks.timing import milliseconds, show
from models import state_space


def relative_error(given: Tensor, wanted: Tensor) -> float:
    return ((given.double() - wanted).norm() / wanted.norm()).item()


def make_inputs(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Random x, A_log, B, C, D that need gradients, and the gradient of y."""
    b, t, H, G, N, P = args.batch, args.length, args.heads, args.groups, args.state, args.width
    shapes = ((b, t, H, P), (b, t, H), (b, t, G, N), (b, t, G, N), (H,))
    inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    return inputs, torch.randn(shapes[0], device=device).to(dtype)


def ours(x: Tensor, A_log: Tensor, *others: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The operator with the decays of the published mixer."""
    log_decay = -F.softplus(A_log.to(state_space.decay_dtype(A_log.dtype)))
    return state_space.ssd_chunked(x, log_decay, *others, chunk_size=chunk_size)


def results(operator: Callable[..., Any], inputs: list[Tensor], upstream: Tensor, chunk: int) -> list[Tensor]:
    """y and the gradients of x, A_log, B, C, D."""
    y = operator(*inputs, chunk_size=chunk)[0]
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def saved_gib(operator: Callable[..., Any], inputs: list[Tensor], chunk: int) -> float:
    """Memory held between forward and backward pass beyond inputs, in GiB (CUDA's allocator)."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = operator(*inputs, chunk_size=chunk)[0]
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    del y
    return held / 2**30


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One row a way and chunk size, printed as it comes."""
    dtype = getattr(torch, args.dtype)
    cuda = device.type == "cuda"
    inputs, upstream = make_inputs(args, device, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = results(ours, exact, upstream.double(), 128)
    del exact
    rows = []
    for name, operator in {"eager": ours, "compiled": torch.compile(ours, dynamic=False)}.items():
        for chunk in args.chunks:
            given = results(operator, inputs, upstream, chunk)
            error = max(relative_error(a, b) for a, b in zip(given, wanted, strict=True))
            del given

            def forward(operator: Any = operator, chunk: int = chunk) -> None:
                with torch.no_grad():
                    operator(*inputs, chunk_size=chunk)

            def both(operator: Any = operator, chunk: int = chunk) -> None:
                results(operator, inputs, upstream, chunk)

            row: dict[str, Any] = {"way": name, "chunk": chunk, "error": error}
            row["forward_ms"] = milliseconds(forward, cuda, args.repeats, ahead=True)
            row["both_ms"] = milliseconds(both, cuda, args.repeats, ahead=True)
            if cuda:
                row["forward_from_idle_ms"] = milliseconds(forward, cuda, args.repeats)
                row["both_from_idle_ms"] = milliseconds(both, cuda, args.repeats)
                row["saved_gib"] = saved_gib(operator, inputs, chunk)
            show(row)
            rows.append(row)
            if args.profile and name == "compiled":
                print(kernel_table(both, cuda), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"batch": 1, "length": 4096, "heads": 32, "groups": 32, "state": 64, "width": 128}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="kernels of forward and backward, compiled")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU", torch.__version__, args.dtype)
    rows = measure(args, device)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
