"""Generating with the student and the teacher at several lengths of context: speed, and what is remembered.

python -m benchmarks.generate --preset 8b                                             random weights, on a GPU
python -m benchmarks.generate --model .cache/SmolLM2-135M-Instruct --device cpu       a teacher, and its student

One model after the other, batch 1, random tokens: a prefill of the context as `generate()` makes it (logits of the
last token alone), then decoding greedily, each timed on its own (the device is waited for) as the median of
`--repeats` after one warm-up; decoding goes on from the prefill's cache, and its time a token is the median of
`--decode` tokens. The cache is what is kept between tokens, in bytes, before decoding; the peak is what the process
or the device's allocator held at most, weights included. With
`--model` the student has `from_teacher`'s sizes.
"""

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from benchmarks.presets import preset
from distill.initialization import student_config
from hardware.devices import default_dtype
from model_utils import load_config
from models import LlambaForCausalLM


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=["8b", "1b", "smollm2", "tiny"])
    parser.add_argument("--model", default="", help="a teacher's folder in place of --preset")
    parser.add_argument("--layers", type=int, nargs="*", help="student's attention layers (default: the preset's)")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 8192, 32768])
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=3, help="timed prefills")
    parser.add_argument("--models", nargs="*", default=["teacher", "student"], choices=["teacher", "student"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--json", default="", help="file to append the figures to")
    return parser.parse_args()


def build(name: str, args: argparse.Namespace) -> Any:
    """The teacher or the hybrid student in eval mode; weights at random but for `--model`'s teacher."""
    dtype = getattr(torch, args.dtype)
    sizes = preset("smollm2" if args.model else args.preset)
    if name == "teacher" and args.model:
        teacher: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa")
        return teacher.to(args.device).eval()
    config = load_config(args.model) if args.model else sizes.teacher
    torch.manual_seed(0)
    with torch.device(args.device), default_dtype(dtype):
        if name == "teacher":
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        wanted = student_config(config) if args.model else sizes.student
        return LlambaForCausalLM(hybrid(wanted, config, sizes.layers if args.layers is None else args.layers)).eval()


def hybrid(student: Any, teacher: Any, layers: Any) -> Any:
    """A student's configuration with the teacher's attention at `layers`."""
    student.attention_layers = sorted(layers)
    student.attention_cfg = student.describe_attention(teacher) if layers else None
    student._attn_implementation = "sdpa"
    return student


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds on to, whole storages counted."""
    storages = {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def peak_bytes(cuda: bool, *, reset: bool = False) -> int:
    """The most that the device's allocator, or else the process (Linux), has held since the last reset."""
    if cuda:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def seconds(run: Callable[[], Any], cuda: bool) -> tuple[float, Any]:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def measure(model: Any, context: int, args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s of prefill and decoding, bytes of the cache, and the peak, at one length of context."""
    cuda = args.device.startswith("cuda")
    tokens = torch.randint(0, model.config.vocab_size, (1, context), device=args.device)
    peak_bytes(cuda, reset=True)

    def prefill() -> Any:
        return model(tokens, use_cache=True, logits_to_keep=1)

    warm_up = 1 if cuda or context <= 1024 else 0  # on a CPU the first long prefill is no slower than the next
    for _ in range(warm_up):
        output = prefill()
    times = []
    for _ in range(args.repeats):
        output = None  # one cache at a time
        spent, output = seconds(prefill, cuda)
        times.append(spent)
    cache, kept = output.past_key_values, cache_bytes(output.past_key_values)
    steps = []
    following = output.logits[:, -1:].argmax(-1)

    def step() -> Any:
        return model(following, past_key_values=cache, use_cache=True)

    for _ in range(args.decode + 2):
        spent, output = seconds(step, cuda)
        following = output.logits[:, -1:].argmax(-1)
        steps.append(spent)
    return {
        "prefill_tokens_per_second": context / statistics.median(times),
        "decode_tokens_per_second": 1 / statistics.median(steps[2:]),
        "cache_bytes": kept,
        "peak_bytes": peak_bytes(cuda),
    }


def main() -> None:
    args = parse()
    cuda = args.device.startswith("cuda")
    place = torch.cuda.get_device_name(args.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{place}, torch {torch.__version__}, transformers {transformers.__version__}, {args.dtype}, batch 1")
    print("| model | context | prefill tokens/s | decode tokens/s | cache MiB | peak GiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        model = build(name, args)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        for context in args.contexts:
            row = measure(model, context, args)
            print(
                f"| {name} | {context:,} | {row['prefill_tokens_per_second']:,.0f} | "
                f"{row['decode_tokens_per_second']:.1f} | {row['cache_bytes'] / 2**20:.1f} | "
                f"{row['peak_bytes'] / 2**30:.2f} |",
                flush=True,
            )
            if args.json:
                figures = {"model": name, "context": context, "weights_bytes": weights, **row}
                with open(args.json, "a", encoding="utf-8") as file:
                    file.write(json.dumps({**vars(args), "place": place, **figures}) + "\n")
        del model
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
