"""Generated documents as sequences that know which of their tokens are answers, for the choice of layers."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from text.documents import DocumentEncoder
from text.recall_text import Part, RecallText


class RecallSequences(NamedTuple):
    """Sequences of generated documents."""

    tokens: Tensor  # int64 [b, t + 1]
    answers: Tensor  # bool [b, t]: targets that are known from what stands before them
    positions: Tensor  # int64 [b, t]: place of each input in its document


def recall_sequences(text: RecallText, encoder: DocumentEncoder, seq_length: int, count: int) -> RecallSequences:
    """The first `count` sequences of seq_length + 1 tokens, packed as training packs them."""
    wanted, size = count * (seq_length + 1), seq_length + 1
    tokens, answers, positions = (np.zeros(0, dtype=np.int64) for _ in range(3))
    index = 0
    while len(tokens) < wanted:
        ids, known = encoded_document(text.parts(index), encoder)
        whole = np.concatenate([encoder.start, ids, encoder.separator])
        marks = np.zeros(len(whole), dtype=np.int64)
        marks[len(encoder.start) : len(encoder.start) + len(ids)] = known
        tokens, answers = np.concatenate([tokens, whole]), np.concatenate([answers, marks])
        positions = np.concatenate([positions, np.arange(len(whole))])
        index += 1
    rows = [torch.from_numpy(each[:wanted].reshape(count, size)).long() for each in (tokens, answers, positions)]
    return RecallSequences(rows[0], rows[1][:, 1:].bool(), _from_the_start(rows[2])[:, :-1])


def encoded_document(parts: list[Part], encoder: DocumentEncoder) -> tuple[np.ndarray, np.ndarray]:
    """(ids, whether each belongs to an answer) of a document; a token belongs where it ends."""
    text = "".join(part for part, _ in parts)
    marked = np.repeat([known for _, known in parts], [len(part) for part, _ in parts])
    found = encoder.backend.encode(text, add_special_tokens=False)
    ends = np.array([end for _, end in found.offsets], dtype=np.int64)
    return np.array(found.ids, dtype=np.int64), marked[np.maximum(ends, 1) - 1].astype(np.int64)


def _from_the_start(positions: Tensor) -> Tensor:
    """Positions [b, t] that count from the sequence's start in a document that began before it."""
    first = torch.arange(positions.shape[1])
    begun = (positions == 0).long().cumsum(1) == 0
    return torch.where(begun, first, positions)
