"""Whether an exported model computes what the student computes: log-probabilities on a real text, both in float32."""

import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import LlambaForCausalLM
from serving import llama_cpp
from serving.llama_cpp import EngineDiffers

EXACT = 1e-5  # nats a token, where no weight was rounded; wrong rows or positions cost whole nats
ROUNDED = 0.1  # the same for weights in fewer digits, whose cost is measured, not judged
LENGTH = 300  # tokens of the text
PREFIXES = (1, 3, 16, 64, 200, LENGTH)  # prompts for llama.cpp, which tells of the tokens that it generates alone
NEW, TOP = 6, 1000


@dataclass
class Proof:
    """KL(student || exported) in nats a token, its mean over `positions`, as `engine` computed it."""

    engine: str
    kl: float
    positions: int
    rounded: bool

    def __post_init__(self) -> None:
        limit = ROUNDED if self.rounded else EXACT
        if not self.kl < limit:
            raise EngineDiffers(
                f"what was written differs from the student: KL {self.kl:.1e} nats a token as {self.engine} computes "
                f"it, at most {limit:g} would be right"
            )


def real_text() -> str:
    """English text that every Python carries: the language reference's help topics."""
    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics)[:20])


@torch.no_grad()
def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """float64 [t, vocab] of the next token after each of `tokens` int64 [t]."""
    return model(tokens[None]).logits[0].double().log_softmax(-1)


def kl_to(student: Tensor, other: Tensor) -> Tensor:
    """[t] KL(student || other) of log-probabilities [t, vocab]."""
    return (student.exp() * (student - other)).sum(-1)


def prove_granite(student: LlambaForCausalLM, folder: Path, tokenizer: Any, rounded: bool) -> Proof:
    """Load a folder with transformers' own GraniteMoeHybrid and compare at every token of a text."""
    from transformers import AutoModelForCausalLM

    tokens = torch.tensor(tokenizer(real_text()).input_ids[:LENGTH])
    wanted = log_probabilities(student.float().eval(), tokens)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    native, account = loaded
    odd = {kind: keys for kind, keys in account.items() if keys}
    if odd:
        raise EngineDiffers(f"transformers' {type(native).__name__} does not take every tensor: {odd}")
    found = log_probabilities(native.eval(), tokens)
    kl = kl_to(wanted, found).mean().item()
    return Proof(f"transformers' {type(native).__name__}", kl, len(tokens), rounded)


def prove_gguf(student: LlambaForCausalLM, file: Path, tokenizer: Any, rounded: bool) -> Proof:
    """Let llama.cpp tokenise the text and continue prefixes of it, and compare at every token that it generates.

    Over the `TOP` likeliest tokens. Raises `EngineDiffers` where it tokenises differently.
    """
    text = real_text()
    ids = tokenizer(text).input_ids
    prompts = [ids[:length] for length in PREFIXES]
    answer = llama_cpp.ask(file, prompts=prompts, new=NEW, top=TOP, texts=[text])
    if answer["tokens"][0] != ids:
        raise EngineDiffers("llama.cpp tokenises a text differently from the student's tokenizer")
    student.float().eval()
    divergences = [
        kl for prompt, found in zip(prompts, answer["completions"]) for kl in compare(student, prompt, found)
    ]
    return Proof("llama.cpp", sum(divergences) / len(divergences), len(divergences), rounded)


def compare(student: LlambaForCausalLM, prompt: list[int], found: list[dict[str, Any]]) -> list[float]:
    """KL at each token that llama.cpp generated after a prompt."""
    tokens = torch.tensor(prompt + [token["id"] for token in found[:-1]])
    wanted = log_probabilities(student, tokens)[len(prompt) - 1 :]
    return [kl_among(row, token["top"]) for row, token in zip(wanted, found) if token["top"]]


def kl_among(wanted: Tensor, found: dict[str, float]) -> float:
    """KL of log-probabilities [vocab] to {token: log-probability}, both made to sum to 1 over the tokens found.

    llama.cpp's own sum over the vocabulary, float32 and one by one, is off by 1e-4.
    """
    ids = torch.tensor([int(token) for token in found])
    other = torch.tensor(list(found.values()), dtype=torch.float64)
    return kl_to(wanted[ids].log_softmax(-1), other.log_softmax(-1)).item()
