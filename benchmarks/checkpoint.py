"""How long a checkpoint blocks training, how long it takes in all, and what a start costs that verifies it.

    python -m benchmarks.checkpoint --preset smollm2                     # CPU
    python -m benchmarks.checkpoint --preset 8b --device cuda --folder /fast/disk --saves 3

Random weights in the shape of SmolLM2-135M or Llama-3.1-8B, with the state of a real optimizer after a step. The
first save allocates the host's copies, later ones reuse them; `--freeze_mlp` shows what linked shards save. While
a checkpoint is written, small matrix products are timed in the main thread: what training notices of the writer.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from benchmarks.presets import preset
from checkpoints.files import damage, gib
from checkpoints.folder_checks import check_folder
from checkpoints.host_copies import available_memory
from checkpoints.run_state import read_trainer_state, rng_state
from checkpoints.store import CheckpointStore
from hardware.devices import default_dtype
from optim.build import build_optimizer


def build(args: argparse.Namespace) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    """A model of random weights, and its optimizer with the state that a first step makes."""
    dtype = getattr(torch, args.dtype)
    with torch.device(args.device), default_dtype(dtype):
        model = LlamaForCausalLM(preset(args.preset).teacher)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (args.freeze_mlp and ".mlp." in name))
    optimizer = build_optimizer(args.optimizer, model, lr=1e-5, weight_decay=0.1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def slowest_product(device: str, until) -> tuple[float, float]:
    """(median, longest) milliseconds of small matrix products that are run until a condition holds."""
    matrix, times = torch.randn(256, 256, device=device), []
    while not until() or not times:
        since = time.perf_counter()
        matrix @ matrix
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - since))
    return sorted(times)[len(times) // 2], max(times)


def measure(args: argparse.Namespace, folder: Path) -> None:
    model, optimizer = build(args)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    store = CheckpointStore(folder, keep=2)
    second_from_now = time.monotonic() + 1
    median, longest = slowest_product(args.device, lambda: time.monotonic() > second_from_now)
    print(f"no save: product of 256x256 takes {median:.2f} ms, at most {longest:.1f} ms")
    if args.prepare:
        store.prepare(
            model=model, trainer_state={"optimizer": optimizer.state_dict(), "rng": rng_state()}, frozen=frozen
        )
        since = time.perf_counter()
        median, longest = slowest_product(args.device, lambda: not (store._thread and store._thread.is_alive()))
        print(f"prepared in {time.perf_counter() - since:.2f} s; meanwhile a product takes at most {longest:.1f} ms")
    for step in range(1, args.saves + 1):
        state = {"optimizer": optimizer.state_dict(), "rng": rng_state()}
        free = available_memory()
        assert store.save(
            f"checkpoint-{step}",
            model=model,
            tokenizer=None,
            trainer_state=state,
            metadata={"progress": {"optimizer_step": step}},
            frozen=frozen,
            dtype=getattr(torch, args.dtype),
        )
        copies = free - available_memory()
        median, longest = slowest_product(args.device, lambda: not (store._thread and store._thread.is_alive()))
        assert store.wait()
        written = sum(p.stat().st_size for p in (folder / f"checkpoint-{step}").iterdir() if p.stat().st_nlink == 1)
        print(
            f"save {step}: blocking {store.blocked_seconds:.2f} s, in all {store.total_seconds:.2f} s, "
            f"{gib(written)} written, {gib(max(copies, 0))} of host memory taken; "
            f"meanwhile a product takes {median:.2f} ms, at most {longest:.1f} ms"
        )
    newest = folder / f"checkpoint-{args.saves}"
    for what, action in (
        ("check of headers", lambda: check_folder(newest)),
        ("sizes", lambda: damage(newest, hashes=False)),
        ("sizes and hashes", lambda: damage(newest)),
        ("trainer state read", lambda: read_trainer_state(newest)),
    ):
        since = time.perf_counter()
        found = action()
        assert not isinstance(found, str), found
        print(f"{what}: {time.perf_counter() - since:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["8b", "1b", "smollm2", "tiny"], default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--optimizer", default="adamw8bit", choices=["adamw8bit", "adamw"])
    parser.add_argument("--freeze_mlp", action="store_true")
    parser.add_argument("--prepare", action="store_true", help="allocate the copies before the first save")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write (removed afterwards)")
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if args.device != "cpu" else f"CPU, {os.cpu_count()} cores"
    print(f"{args.preset}, {args.dtype}, {args.optimizer}, {'MLPs frozen, ' if args.freeze_mlp else ''}{where}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, Path(folder) / "run")


if __name__ == "__main__":
    main()
