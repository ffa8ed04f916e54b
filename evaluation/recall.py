"""Generated in-context recall tasks, where recurrent students fail first (Jelassi et al., arXiv 2402.01032).

A context holds many pairs; the prompt then repeats one key and the model must say its value. Every row is scored
by teacher forcing: a row counts as right when each token of the value is the model's top choice.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST = (
    "James Mary Robert Linda John Susan David Karen Paul Nancy Mark Lisa George Betty Brian Helen Kevin Sandra"
).split()
LAST = (
    "Smith Jones Brown Davis Miller Wilson Moore Taylor Clark Lewis Walker Hall Young King Wright Hill Scott"
).split()
WORDS = "apple river stone cloud train candle garden window silver forest bridge market summer winter".split()


@dataclass
class RecallRow:
    """One question: the context with its pairs, the cue, and the value that must follow."""

    prompt: str
    answer: str


def phone_book(rng: random.Random, pairs: int) -> RecallRow:
    """`First Last: 555-0123` lines, then one name again."""
    names = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], pairs)
    numbers = [f"{rng.randrange(200, 999)}-{rng.randrange(1000, 9999)}" for _ in names]
    chosen = rng.randrange(pairs)
    book = "\n".join(f"{name}: {number}" for name, number in zip(names, numbers))
    return RecallRow(f"Phone book:\n{book}\n\nThe number again:\n{names[chosen]}:", f" {numbers[chosen]}")


def key_value(rng: random.Random, pairs: int) -> RecallRow:
    """`word-12 = 345` pairs, then one key again."""
    keys = rng.sample([f"{word}-{number}" for word in WORDS for number in range(10, 60)], pairs)
    values = [str(rng.randrange(100, 999)) for _ in keys]
    chosen = rng.randrange(pairs)
    table = "\n".join(f"{key} = {value}" for key, value in zip(keys, values))
    return RecallRow(f"{table}\n{keys[chosen]} =", f" {values[chosen]}")


TASKS = {"phone_book": phone_book, "key_value": key_value}


def recall_rows(task: str, pairs: int, count: int, seed: int = 0) -> list[RecallRow]:
    """`count` rows of a task with `pairs` pairs each; the same rows for the same seed. At most 306 pairs."""
    rng = random.Random(f"{task}/{pairs}/{seed}")
    return [TASKS[task](rng, pairs) for _ in range(count)]


@torch.no_grad()
def recall_accuracy(
    model: PreTrainedModel, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[RecallRow], device: torch.device
) -> float:
    """Share of rows whose whole value is the model's top choice, token by token.

    The same as greedy decoding giving the value: a wrong token would end both. Needs a fast tokenizer, whose offsets
    tell the value's tokens from the prompt's in one tokenisation of both, as in the text that models learn from.
    """
    right = 0
    for row in rows:
        encoded = tokenizer(row.prompt + row.answer, return_offsets_mapping=True)
        answer = sum(end > len(row.prompt) for _, end in encoded.offset_mapping)
        tokens = torch.tensor([encoded.input_ids], device=device)
        logits = model(input_ids=tokens[:, :-1], logits_to_keep=answer, use_cache=False).logits
        right += int(torch.equal(logits[0, -answer:].argmax(-1), tokens[0, -answer:]))
    return right / len(rows)


def recall_figures(
    models: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    lengths: Sequence[int],
    count: int,
    device: torch.device,
) -> dict[str, Any]:
    """Accuracy (0 to 1) of each model for each task and number of pairs in `lengths`, on `count` rows."""
    figures: dict[str, Any] = {}
    for task in TASKS:
        for pairs in lengths:
            rows = recall_rows(task, pairs, count)
            for name, model in models.items():
                accuracy = recall_accuracy(model, tokenizer, rows, device)
                figures.setdefault(f"{task}/{pairs}", {})[name] = accuracy
    return figures
