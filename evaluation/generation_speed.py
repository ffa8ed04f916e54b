"""How fast models generate, as `generate` runs them."""

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def speed_figures(
    models: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", tokens: int, device: torch.device
) -> dict[str, float]:
    """Generated tokens a second, greedy, batch 1, after one warm-up."""
    prompt = tokenizer("The history of", return_tensors="pt").to(device)
    options = dict(min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, use_cache=True)
    figures = {}
    for name, model in models.items():
        model.generate(**prompt, **{**options, "min_new_tokens": 2, "max_new_tokens": 2})
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        model.generate(**prompt, **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        figures[name] = tokens / (time.perf_counter() - start)
    return figures
