"""One optimizer step alone: time, bytes of state a parameter and extra memory, ways side by side in one process.

python -m benchmarks.optimizer [--preset 8b] [--ways adamw8bit torch_bf16 ...] [--json FILE]
python -m benchmarks.optimizer --device cpu --preset tiny   # does it run?

adamw8bit and adamw are timed as the trainer calls them, norm and clipping included; `norm alone` says how
much of that is the norm. torch_bf16 (which loses small updates) and torch_fp32 are torch's fused AdamW without any.
"""

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import extra_peak, milliseconds, show
from optim.build import build_optimizer, parameter_groups
from optim.masters import BETAS
from optim.step import clip_and_step, gradient_norm

# What an 8B student trains with its MLPs frozen: embedding, head, mixers and norms; 3.1e9 parameters.
PRESETS: dict[str, list[tuple[int, ...]]] = {
    "8b": [(128256, 4096)] * 2 + [(16416, 4096), (4096, 4096), (12288, 1, 4), (4096,), (4096,)] * 24,
    "135m": [(49152, 576)] + [(3483, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536), (576,), (576,)] * 30,
    "tiny": [(512, 256)] + [(300, 256), (256, 192), (96, 1, 4), (256,)] * 3,
}
WAYS = ("norm alone", "adamw8bit", "adamw", "torch_bf16", "torch_fp32")


def build_parameters(preset: str, device: str, dtype: torch.dtype) -> nn.ParameterList:
    """Random parameters with gradients of the same type, as large as a clipped step's would be."""
    parameters = nn.ParameterList()
    for shape in PRESETS[preset]:
        parameters.append(nn.Parameter((torch.randn(shape, device=device) * 0.02).to(dtype)))
        parameters[-1].grad = (torch.randn(shape, device=device) * 1e-4).to(dtype)
    return parameters


def build_step(way: str, module: nn.ParameterList, kernel: bool) -> tuple[Callable[[], Any], Any]:
    """(one step, its optimizer) of a way."""
    parameters = list(module)
    if way == "norm alone":
        return lambda: gradient_norm([p.grad for p in parameters if p.grad is not None]), None
    optimizer: torch.optim.Optimizer
    if way.startswith("torch"):
        optimizer = torch.optim.AdamW(parameter_groups(module, 0.1), lr=1e-5, betas=BETAS, fused=True)
        return optimizer.step, optimizer
    optimizer = build_optimizer(way, module, lr=1e-5, weight_decay=0.1, kernel=kernel)
    return lambda: clip_and_step(optimizer, parameters, 1.0), optimizer


def state_bytes(optimizer: Any) -> int:
    if optimizer is None:
        return 0
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return sum(t.numel() * t.element_size() for t in tensors)


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.float32 if way == "torch_fp32" else torch.bfloat16
    module = build_parameters(args.preset, args.device, dtype)
    total = sum(p.numel() for p in module)
    cuda = args.device != "cpu"
    step, optimizer = build_step(way, module, kernel=cuda)
    step()  # compiles, and makes the state
    row: dict[str, Any] = {
        "way": way,
        "parameters": total,
        "ms": milliseconds(step, cuda, args.repeats),
    }
    return row | {"bytes": state_bytes(optimizer) / total, "extra_gib": extra_peak(step, cuda)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--preset", default="8b", choices=PRESETS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, default=None, help="write the rows to this file as well")
    args = parser.parse_args()
    torch.manual_seed(0)
    where = "cpu" if args.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}, preset {args.preset}")
    rows = []
    for way in args.ways:
        try:
            rows.append(measure(way, args))
        except torch.OutOfMemoryError:
            rows.append({"way": way, "error": "out of memory"})
        show(rows[-1])
        gc.collect()
        if args.device != "cpu":
            torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
