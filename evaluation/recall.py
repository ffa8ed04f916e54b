"""Generated in-context recall tasks, where recurrent students fail first (Jelassi et al., arXiv 2402.01032).

A context holds many pairs; the prompt then repeats one key and the model must say its value. Every row is scored
by teacher forcing: a row counts as right when each token of the value is the model's top choice.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from evaluation.recall_tasks import PAIR_TASKS, RecallRow, recall_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    for task in PAIR_TASKS:
        for pairs in lengths:
            rows = recall_rows(task, pairs, count)
            for name, model in models.items():
                accuracy = recall_accuracy(model, tokenizer, rows, device)
                figures.setdefault(f"{task}/{pairs}", {})[name] = accuracy
    return figures
