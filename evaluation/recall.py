"""How well a student answers from its context, beside its teacher (questions: `recall_tasks.py`).

A row is right when every token of its answer is the model's top choice given the tokens before it, in one
tokenisation of prompt and answer, as in the text that models learn from. Where a model also generates, from the
prompt alone, what it writes must begin with the answer: that goes through its cache and its own tokens
(arXiv 2603.26556: likelihood can hide what generation shows).
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from evaluation.recall_tasks import PAIR_TASKS, TASKS, RecallRow, recall_rows, rows_of_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

BATCH_TOKENS = 1 << 16  # of a forward pass
GENERATED_MORE = 4  # tokens beyond the answer's: written one by one, an answer may take other tokens

Cells = dict[str, list[RecallRow]]  # by "task/pairs" or "task@tokens"


@dataclass
class Answers:
    """Which rows of a cell a model answers rightly: forced, and of the first ones by generating."""

    right: list[bool]
    generated: list[bool] = field(default_factory=list)


def recall_cells(
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[int] = (),
    lengths: Sequence[int] = (),
    count: int = 500,
    tasks: Collection[str] = tuple(TASKS),
) -> Cells:
    """`count` questions for each of PAIR_TASKS and number of pairs, and for each task and length in tokens."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text).input_ids)

    cells = {f"{task}/{number}": recall_rows(task, number, count) for task in PAIR_TASKS for number in pairs}
    for task in tasks:
        for tokens in lengths:
            cells[f"{task}@{tokens}"] = rows_of_length(task, tokens, count, count_tokens)
    return cells


@torch.no_grad()
def forced_answers(
    model: PreTrainedModel, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[RecallRow], device: torch.device
) -> list[bool]:
    """Whether each row's whole answer is the model's top choice, token by token.

    Needs a fast tokenizer, whose offsets tell the answer's tokens from the prompt's. Rows are padded on the right,
    which no causal model sees from an answer.
    """
    encoded = tokenizer([row.prompt + row.answer for row in rows], return_offsets_mapping=True)
    ids: list[list[int]] = encoded.input_ids
    kept = [sum(end > len(row.prompt) for _, end in offsets) for row, offsets in zip(rows, encoded["offset_mapping"])]
    right = [False] * len(rows)
    for batch in _batches([len(each) for each in ids]):
        longest = max(len(ids[index]) for index in batch)
        tokens = torch.tensor([ids[index] + [0] * (longest - len(ids[index])) for index in batch])
        back = max(longest - len(ids[index]) + kept[index] for index in batch)  # from the end to the first answer
        inputs = tokens[:, :-1].to(device)
        top = model(input_ids=inputs, logits_to_keep=back, use_cache=False).logits.argmax(-1).cpu()
        for place, index in enumerate(batch):
            first, last = len(ids[index]) - kept[index], len(ids[index])
            shift = longest - back
            right[index] = bool(top[place, first - shift : last - shift].equal(tokens[place, first:last]))
    return right


def generated_answers(
    model: PreTrainedModel, tokenizer: "PreTrainedTokenizerBase", rows: Sequence[RecallRow], device: torch.device
) -> list[bool]:
    """Whether what the model writes after each prompt, greedily, begins with the answer, and another word follows."""
    answers = [len(tokenizer(row.answer, add_special_tokens=False).input_ids) for row in rows]
    wanted = max(answers, default=0) + GENERATED_MORE
    texts = greedy_texts(model, tokenizer, [row.prompt for row in rows], wanted, device)
    return [begins_with(text, row.answer) for text, row in zip(texts, rows)]


def begins_with(text: str, answer: str) -> bool:
    """True where a text says an answer and then anything but more of a word or number."""
    text, answer = text.lstrip(), answer.strip()
    return text.startswith(answer) and not text[len(answer) :][:1].isalnum()


@torch.no_grad()
def greedy_texts(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    new_tokens: int,
    device: torch.device,
) -> list[str]:
    """What a model writes after each prompt; shorter prompts of a batch are padded on the left, with a mask."""
    ids: list[list[int]] = tokenizer(list(prompts)).input_ids
    found = [""] * len(ids)
    for batch in _batches([len(each) for each in ids]):
        longest = max(len(ids[index]) for index in batch)
        pads = [longest - len(ids[index]) for index in batch]
        tokens = torch.tensor([[0] * pad + ids[index] for pad, index in zip(pads, batch)], device=device)
        mask = (torch.arange(longest) >= torch.tensor(pads)[:, None]).long().to(device)
        written: Any = model.generate(  # type: ignore[operator]
            input_ids=tokens, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )
        for place, index in enumerate(batch):
            found[index] = str(tokenizer.decode(written[place, longest:], skip_special_tokens=True))
    return found


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows of like lengths, BATCH_TOKENS padded tokens a batch."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[index] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def recall_answers(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerBase",
    cells: Cells,
    device: torch.device,
    generated: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Answers]:
    """A model's answers to every cell; of the first `generated` rows of each by generating, too.

    Nothing once `stop()` says so.
    """
    found: dict[str, Answers] = {}
    for name, rows in cells.items():
        if stop():
            return {}
        written = generated_answers(model, tokenizer, rows[:generated], device) if generated else []
        found[name] = Answers(forced_answers(model, tokenizer, rows, device), written)
    return found


def as_tensor(right: Sequence[bool]) -> Tensor:
    """float64 [rows]: 1 for right."""
    return torch.tensor(right, dtype=torch.float64)
