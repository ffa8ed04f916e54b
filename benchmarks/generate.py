"""Generating with the student and the teacher by length of context and number of rows: rate, first token, memory.

python -m benchmarks.generate --preset 8b --contexts 1024 32768 --batches 1 8 64      random weights, on a GPU
python -m benchmarks.generate --model .cache/SmolLM2-135M-Instruct --device cpu       a teacher, and its student

One model after the other, each as `generate` runs it fastest: the student as it comes, the teacher with a static
cache and transformers' own compilation (on CUDA). `student-plain` and `teacher-plain` are without either. Random
tokens, greedy, measured in a second call, after one that compiles. Where all rows together have more than
`--read` tokens the prompt is not read: the cache is taken to hold zeros, and no first token is timed. The peak is
what the process or the device's allocator held at most, weights included; `--memory` limits a device to so many GiB.
"""

import argparse
import gc
import json
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StaticCache

from benchmarks.presets import preset
from distill.initialization import student_config
from evaluation.generation_speed import best_options, generation_figures
from hardware.devices import default_dtype
from model_utils import load_config
from models import LlambaForCausalLM
from models.fast_path import FastCache, decoder_of

MODELS = ["teacher", "student", "teacher-plain", "student-plain"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=["8b", "1b", "smollm2", "tiny"])
    parser.add_argument("--model", default="", help="a teacher's folder in place of --preset")
    parser.add_argument("--layers", type=int, nargs="*", help="student's attention layers (default: the preset's)")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 8192, 32768])
    parser.add_argument("--batches", type=int, nargs="*", default=[1])
    parser.add_argument("--decode", type=int, default=64, help="tokens to decode")
    parser.add_argument("--read", type=int, default=131072, help="most tokens of all prompts together that are read")
    parser.add_argument("--models", nargs="*", default=MODELS[:2], choices=MODELS)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--memory", type=float, default=0, help="GiB of the device to use at most; 0: all")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--json", default="", help="file to append the figures to")
    parser.add_argument("--plot", default="", help="picture of rate and memory by context")
    return parser.parse_args()


def build(name: str, args: argparse.Namespace) -> Any:
    """The teacher or the hybrid student in eval mode; weights at random but for `--model`'s teacher.

    Positions are raised where a context is longer than the teacher's.
    """
    dtype = getattr(torch, args.dtype)
    sizes = preset("smollm2" if args.model else args.preset)
    if name == "teacher" and args.model:
        teacher: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa")
        return teacher.to(args.device).eval()
    config = load_config(args.model) if args.model else sizes.teacher
    config.max_position_embeddings = max(config.max_position_embeddings, *(c + args.decode for c in args.contexts))
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


def options_for(name: str, batch: int, context: int, args: argparse.Namespace) -> Any:
    """What makes `generate`'s further arguments: a cache of zeros where a prompt is too long to be read."""
    if name.endswith("plain"):
        return lambda model: {"disable_compile": True}
    if batch * context <= args.read:
        return best_options
    return lambda model: {"past_key_values": cache_of_zeros(model, batch, context - 1, context + args.decode)}


@torch.no_grad()
def cache_of_zeros(model: Any, batch: int, seen: int, capacity: int) -> Any:
    """A cache as after `seen` tokens, of `batch` rows."""
    if isinstance(model, LlambaForCausalLM):
        cache: Any = FastCache(model, capacity)
        cache.reserve(batch, capacity)
        cache.advance(seen, None)
        return cache
    cache, config = StaticCache(config=model.config, max_cache_len=capacity), model.config
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.cumulative_length.fill_(seen)
    return cache


def rows_of(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One model's figures, printed as they come; sizes that do not fit are said."""
    model = build(name.split("-")[0], args)
    rows = []
    for context in args.contexts:
        for batch in args.batches:
            try:
                row = generation_figures(model, batch, context, args.decode, options_for(name, batch, context, args))
            except torch.OutOfMemoryError:
                print(f"| {name} | {context:,} | {batch} | does not fit | | | |", flush=True)
                continue
            finally:
                free(model)
            if batch * context > args.read:
                row["first_token_seconds"] = float("nan")
            print(
                f"| {name} | {context:,} | {batch} | {row['tokens_per_second']:,.1f} | "
                f"{row['first_token_seconds'] * 1e3:,.1f} | {row['first_call_seconds']:.1f} | "
                f"{row['peak_bytes'] / 2**30:.2f} |",
                flush=True,
            )
            rows.append({"model": name, **row})
    return rows


def free(model: Any) -> None:
    """What the last size left: a model holds on to nothing but its weights."""
    if isinstance(model, LlambaForCausalLM):
        decoder_of(model).forget()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Rate and memory by context, a line for each model and number of rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, batch in sorted({(row["model"], row["batch"]) for row in rows}):
        of = [row for row in rows if (row["model"], row["batch"]) == (name, batch)]
        contexts = [row["context"] for row in of]
        axes[0].plot(contexts, [row["tokens_per_second"] for row in of], "o-", label=f"{name}, batch {batch}")
        axes[1].plot(contexts, [row["peak_bytes"] / 2**30 for row in of], "o-")
    axes[0].set(xlabel="context, tokens", ylabel="tokens a second, all rows", xscale="log", yscale="log")
    axes[1].set(xlabel="context, tokens", ylabel="peak memory, GiB", xscale="log")
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse()
    cuda = args.device.startswith("cuda")
    if cuda and args.memory:
        whole = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory * 2**30 / whole, args.device)
    place = torch.cuda.get_device_name(args.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{place}, torch {torch.__version__}, transformers {transformers.__version__}, {args.dtype}")
    print("| model | context | batch | tokens/s | first token ms | first call s | peak GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for name in args.models:
        rows += rows_of(name, args)
        free(None)
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({**vars(args), "place": place, **row}) + "\n" for row in rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
