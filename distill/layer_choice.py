"""`--layers auto:K`: the K layers whose replacement lowers KL most, chosen greedily before training.

KL is measured on the run's own training text, or on other text, never on that which figures are reported on; and on
generated text that asks for memory, where KL on the answers counts as much as on everything else: attention is kept
to look things up, which ordinary text asks little for.

Greedy from the end that can be trusted. A student with all its mixers, fresh from the teacher, is so far off (several
nats) that no single layer tells much. So the start is the teacher itself, KL 0: every layer is replaced. Each round
gives back the mixer that costs least KL, until none is left. The K that held out longest are chosen:
with them replaced KL is lowest, and the choice for K - 1 is always among that for K. The mixers are those that
training would start from, calibrated or published.

The hidden states before each layer are kept, and a candidate is run from its own layer on: the whole ranking of L
layers takes about L^2 / 4 forward passes.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data import TextLoader
from distill.losses import chunked_kd_loss
from models import LlambaForCausalLM
from models.modeling_llamba import AttentionInputs
from text.recall_rows import RecallSequences
from utils import UserError, progress_bar, write_whole

log = logging.getLogger(__name__)

FILE = "layer_choice.json"


@dataclass
class LayerChoice:
    """A ranking of all layers and what it rests on."""

    layers: list[int]  # the chosen ones, ascending
    ranking: list[int]  # all layers, the one to keep longest first
    kl: list[float]  # kl[n]: nats a token with the first n of the ranking replaced
    alone: list[float]  # alone[i]: KL when layer i is the only mixer
    tokens: int
    seconds: float
    made_for: dict[str, Any]


class Hybrid:
    """A pair on a few sequences, each layer either the teacher's (replaced) or the student's own.

    tokens int64 [b, t + 1]; valid bool [b, t]; positions [b, t] restart at each document, or None; answers bool
    [b, t]: targets whose KL counts as much as that of all others, or None.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: LlambaForCausalLM,
        tokens: Tensor,
        valid: Tensor,
        positions: Tensor | None,
        answers: Tensor | None = None,
    ):
        model: Any = teacher.model
        self.teacher, self.student = teacher, student
        embedding: Any = student.backbone.embedding.weight
        self.device, self.dtype = embedding.device, embedding.dtype
        self.teacher_device = model.embed_tokens.weight.device
        self.teacher_dtype = model.embed_tokens.weight.dtype
        self.labels = tokens[:, 1:].to(self.device)
        parts = [valid] if answers is None else [valid & ~answers, valid & answers]
        places = [part.flatten().nonzero().squeeze(1).to(self.device) for part in parts]
        self.parts = [each for each in places if len(each)]  # of the flattened tokens, by how they count
        self.resets = None if positions is None else (positions == 0).to(self.device)
        positions = None if positions is None else positions.to(self.teacher_device)
        embedded = model.embed_tokens(tokens[:, :-1].to(self.teacher_device))
        everywhere = range(len(model.layers))
        self.shared = AttentionInputs(model.config, model.rotary_emb, embedded, positions, layers=everywhere)
        self.head = teacher.get_output_embeddings().weight.to(self.device)
        self.replaced = set(everywhere)
        self.before = [embedded]  # before[i]: what layer i is given, [b, t, d]
        self._run_on()
        self.target = model.norm(self.before[-1].to(self.teacher_device, self.teacher_dtype)).to(self.device)

    def _layer(self, index: int, hidden: Tensor, replaced: bool) -> Tensor:
        """Hidden states [b, t, d] through one layer of either kind, on that model's device and in its dtype."""
        if replaced:
            layer = self.teacher.model.layers[index]
            hidden = hidden.to(self.teacher_device, self.teacher_dtype)
            return layer(hidden, past_key_values=None, use_cache=False, **self.shared.for_layer(index))
        return self.student.backbone.layers[index](hidden.to(self.device, self.dtype), self.resets)

    def _run_on(self) -> None:
        """Fill `before` from where it ends."""
        for index in range(len(self.before) - 1, len(self.teacher.model.layers)):
            self.before.append(self._layer(index, self.before[-1], index in self.replaced))

    def kl(self, last: Tensor | None = None) -> float:
        """KL(teacher || student), nats a token, from the hidden states after the last layer [b, t, d].

        With answers the mean of theirs and of the others'.
        """
        hidden = (self.before[-1] if last is None else last).to(self.device, self.dtype)
        ours = self.student.backbone.final_layernorm(hidden).to(self.target.dtype)
        head = self.student.lm_head.weight.to(self.target.dtype)
        found = []
        for part in self.parts:
            own, target, labels = (each.flatten(0, 1)[part][None] for each in (ours, self.target, self.labels))
            terms = chunked_kd_loss(own, head, target, self.head, labels, torch.ones_like(labels, dtype=torch.bool))
            found.append(terms.kl_sum / terms.tokens)
        return torch.stack(found).mean().item()

    def kl_with_mixer(self, index: int) -> float:
        """KL if layer `index` had its mixer and every other were as it is."""
        hidden = self._layer(index, self.before[index], False)
        for later in range(index + 1, len(self.teacher.model.layers)):
            hidden = self._layer(later, hidden, later in self.replaced)
        return self.kl(hidden)

    def give_mixer(self, index: int) -> None:
        """Layer `index` has its mixer from now on."""
        self.replaced.remove(index)
        del self.before[index + 1 :]
        self._run_on()


@torch.no_grad()
def rank_layers(hybrid: Hybrid) -> tuple[list[int], list[float], list[float]]:
    """(ranking, kl, alone) of `LayerChoice`; of equal candidates the deeper one gets its mixer first."""
    given, costs, alone = [], [hybrid.kl()], []  # type: list[int], list[float], list[float]
    began, layers = time.perf_counter(), len(hybrid.replaced)
    with progress_bar("layer choice", layers * (layers + 1) // 2) as bar:
        while hybrid.replaced:
            costs_of = {}
            for index in sorted(hybrid.replaced, reverse=True):
                costs_of[index] = hybrid.kl_with_mixer(index)
                bar.update()
            if not given:
                alone = [costs_of[index] for index in sorted(costs_of)]
                log.info("choosing layers, about %.0f s ...", (time.perf_counter() - began) * (layers + 1) / 2)
            best = min(costs_of, key=lambda index: costs_of[index])
            hybrid.give_mixer(best)
            given.append(best)
            costs.append(costs_of[best])
    return given[::-1], costs[::-1], alone


def choose_layers(
    count: int,
    teacher: PreTrainedModel,
    student: LlambaForCausalLM,
    open_text: Callable[[], Any],
    look_up: Callable[[int], RecallSequences],
    *,
    recall_share: float = 0.0,
    tokens: int,
    made_for: dict[str, Any],
    folder: Path,
) -> list[int]:
    """The `count` layers of `--layers auto:K`, ascending: those of `layer_choice.json` if it was made for the same.

    The student has all its mixers, with the teacher's weights transferred. Of `tokens` a `recall_share` is generated
    text, of which `look_up` gives sequences; `open_text` gives a loader of the rest. The ranking is logged and saved
    in `folder`, with what it was made for.
    """
    path = folder / FILE
    saved = read_choice(path)
    if saved is not None and saved.made_for == made_for:
        log.info("layers %s, chosen before, from %s", " ".join(map(str, saved.layers)), path)
        return saved.layers
    began = time.perf_counter()
    log.info("choosing %d layers of %d ...", count, len(teacher.model.layers))
    text = choice_text(open_text(), look_up, tokens, recall_share)
    student.eval()
    with torch.no_grad():
        ranking, kl, alone = rank_layers(Hybrid(teacher, student, *text))
    seconds = round(time.perf_counter() - began, 1)
    choice = LayerChoice(sorted(ranking[:count]), ranking, kl, alone, text[1].numel(), seconds, made_for)
    log.info("layers ranked, the first %d chosen: %s", count, " ".join(map(str, ranking)))
    shown = sorted({0, count, *(n for n in (1, 2, 4, 8, 16, 32) if n < len(ranking))})
    log.info("KL by number of replaced layers: %s", ", ".join(f"{n}: {kl[n]:.4g}" for n in shown))
    log.info("layer choice took %.1f s on %d tokens", seconds, choice.tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(asdict(choice), indent=1) + "\n").encode())
    return choice.layers


def read_choice(path: Path) -> LayerChoice | None:
    """A saved choice, or None where there is none that can be read."""
    try:
        return LayerChoice(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def choice_text(
    loader: TextLoader, look_up: Callable[[int], RecallSequences], tokens: int, recall_share: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """tokens [b, t + 1], valid [b, t], positions and answers [b, t] or None: ordinary sequences, then generated ones.

    Each kind that has a share has a sequence at least. Closes the loader.
    """
    rows, valid, positions = first_rows(loader, max(1, round(tokens * (1 - recall_share))))
    if not recall_share:
        return rows, valid, positions, None
    length = valid.shape[1]
    asked = look_up(max(1, -(-round(tokens * recall_share) // length)))
    asked_valid = torch.ones_like(asked.answers)
    if positions is not None:  # documents are kept apart: none is asked for its first token
        asked_valid[:, :-1] &= asked.positions[:, 1:] != 0
    if recall_share == 1:
        return asked.tokens, asked_valid, None if positions is None else asked.positions, asked.answers
    return (
        torch.cat([rows, asked.tokens]),
        torch.cat([valid, asked_valid]),
        None if positions is None else torch.cat([positions, asked.positions]),
        torch.cat([torch.zeros_like(valid), asked.answers]),
    )


def first_rows(loader: TextLoader, tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """As many sequences as hold `tokens` tokens, at least one: tokens [b, t + 1], valid [b, t], positions or None.

    Closes the loader.
    """
    rows: list[Any] = []
    for batch in loader:
        rows.append(batch)
        if sum(row.valid.numel() for row in rows) >= tokens:
            break
    loader.close()
    if not rows:
        raise UserError("--layers auto: the text holds no whole sequence: use more text or a smaller --seq_length")
    count = max(1, -(-tokens // rows[0].valid.shape[1]))
    join = lambda name: torch.cat([getattr(row, name) for row in rows])[:count]  # noqa: E731
    return join("tokens"), join("valid"), None if rows[0].position_ids is None else join("position_ids")
