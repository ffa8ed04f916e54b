"""How fast a model generates, as `generate` runs it: the first token's delay, tokens a second, and memory."""

import re
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

SETTLED = 8  # tokens after which a rate is taken


class Clock(BaseStreamer):
    """When the prompt and every token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def best_options(model: Any) -> dict[str, Any]:
    """How transformers generates fastest: with a static cache, compiled, on CUDA; a student knows by itself."""
    own = model.config.model_type == "llamba" or model.device.type != "cuda"
    return {} if own else {"cache_implementation": "static"}


def generate_timed(model: Any, prompt: torch.Tensor, tokens: int, options: dict[str, Any]) -> list[float]:
    """When `generate` began and when each of `tokens` greedy tokens came, for random prompts [b, t]."""
    clock = Clock()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,  # a teacher's configuration may say otherwise
        pad_token_id=0,
        eos_token_id=[model.config.vocab_size],  # one that does not come
        streamer=clock,
        **options,
    )
    return clock.times


def generation_figures(
    model: Any, batch: int, context: int, tokens: int, make_options: Any = best_options
) -> dict[str, float]:
    """Figures of `batch` rows of `context` random tokens, after one call that warms up and compiles.

    first_call_seconds: of that call, to its second token; first_token_seconds; tokens_per_second: of all rows, from
    the median time between tokens; peak_bytes: what the device's allocator, or else the process, held at most.
    make_options: from the model to further arguments of `generate`, made anew for each call.
    """
    tokens = max(tokens, 2)
    prompt = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
    cuda = model.device.type == "cuda"
    start = time.perf_counter()
    warm = generate_timed(model, prompt, tokens if cuda else 3, make_options(model))
    peak_bytes(cuda, reset=True)
    times = generate_timed(model, prompt, tokens, make_options(model))
    steps = [after - before for before, after in pairwise(times[1:])]
    return {
        "batch": batch,
        "context": context,
        "first_call_seconds": warm[2] - start,
        "first_token_seconds": times[1] - times[0],
        "tokens_per_second": batch / statistics.median(steps[SETTLED:] or steps),
        "peak_bytes": peak_bytes(cuda),
    }


def speed_figures(
    models: dict[str, Any], batches: list[int], contexts: list[int], tokens: int
) -> list[dict[str, Any]]:
    """`generation_figures` of every model at every size, one after the other; weights of all count in each peak."""
    sizes = [(batch, context) for batch in batches for context in contexts]
    return [
        {"model": name, **generation_figures(model, batch, context, tokens)}
        for name, model in models.items()
        for batch, context in sizes
    ]


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
