"""Where the teacher's hidden states come from: this rank's device, another device a batch ahead, or one for a host.

Only hidden states cross between devices and ranks, never logits: the teacher's head stands where the loss is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from data import Batch
from hardware.ranks import Ranks
from models.modeling_llamba import AttentionInputs


def teacher_hidden(
    teacher: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    every_layer: bool = False,
) -> Tensor:
    """The teacher's hidden states after its final norm, [b, t, d], for input_ids [b, t]; no gradient.

    every_layer: [L, b, t, d], what each of the L layers but the last gives, and those after the final norm.
    Its layers one after the other, as its own model runs them, but without the question to the device whether
    documents are packed, for which the CPU would wait in every step. position_ids [b, t] restart at each document.
    """
    model: Any = teacher.model
    with torch.no_grad():
        states = None
        for index, hidden in enumerate(states_by_layer(teacher, input_ids, position_ids)):
            if every_layer:
                states = hidden.new_empty(len(model.layers), *hidden.shape) if states is None else states
                states[index] = hidden
        hidden = model.norm(hidden)
        if states is None:
            return hidden
        states[-1] = hidden
        return states


def states_by_layer(
    teacher: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None
) -> Iterator[Tensor]:
    """The teacher's hidden states [b, t, d] after each of its layers, which runs when they are asked for.

    input_ids, position_ids [b, t] on the teacher's device; gradients are the caller's choice.
    """
    model: Any = teacher.model
    hidden = model.embed_tokens(input_ids)
    shared = AttentionInputs(model.config, model.rotary_emb, hidden, position_ids, layers=range(len(model.layers)))
    for index, layer in enumerate(model.layers):
        hidden = layer(hidden, past_key_values=None, use_cache=False, **shared.for_layer(index))
        yield hidden


class TeacherBackbone(nn.Module):
    """The teacher up to its final norm, as one module (so that it can be sharded as one)."""

    def __init__(self, teacher: PreTrainedModel, every_layer: bool = False):
        super().__init__()
        self.layers, self.every_layer = teacher.model.layers, every_layer
        self.teacher = [teacher]  # in a list: what is not a layer is no part of this module

    def forward(self, inputs: Tensor, positions: Tensor | None) -> Tensor:
        """Hidden states [b, t, d] for inputs int64 [b, t]; positions [b, t] restart at each document.

        [L, b, t, d] where those of every layer are asked for, but not under no_grad: evaluations need the last.
        """
        return teacher_hidden(self.teacher[0], inputs, positions, self.every_layer and torch.is_grad_enabled())


@dataclass
class Coming:
    """Hidden states of a batch that may still be on their way to the student's device."""

    states: Tensor  # [b, t, d], or [L, b, t, d] of every layer
    arrival: Any = None  # a CUDA event or a torch.distributed work: what to wait for before they are used
    parts: list[Tensor] | None = None  # memory that they are sent from, which must not be given back before then


class TeacherStates:
    """Hidden states batch by batch; at most one batch, the next of training, is prepared before it is asked for."""

    ahead: bool  # True where preparing the next batch overlaps the student's work
    coming: tuple[Batch, Coming] | None = None

    def prepare(self, batch: Batch) -> None:
        """Start on the batch that is asked for next; an evaluation may ask for others before it without losing it."""
        self.coming = batch, self.start(batch)

    def of(self, batch: Batch) -> Tensor:
        """The batch's hidden states on the student's device, for work on the current stream; let go afterwards."""
        if self.coming is not None and self.coming[0] is batch:
            (_, coming), self.coming = self.coming, None
        else:
            coming = self.start(batch)
        return self.arrived(coming)

    def start(self, batch: Batch) -> Coming:
        """Start on a batch."""
        raise NotImplementedError

    def arrived(self, coming: Coming) -> Tensor:
        """The hidden states, once they are on the student's device."""
        raise NotImplementedError


class OwnTeacher(TeacherStates):
    """A teacher of this rank's own. On a device of its own it works one batch ahead, on streams of its own.

    Its forward pass then overlaps the student's forward and backward pass. Tokens go to it straight from the host,
    and its results are copied on a stream beside the student's, so that neither waits for the student's queue.
    With `every_layer` it gives hidden states [L, b, t, d] (`teacher_hidden`) instead of [b, t, d].
    """

    def __init__(
        self, teacher: PreTrainedModel, device: torch.device, *, ahead: bool | None = None, every_layer: bool = False
    ):
        self.backbone = TeacherBackbone(teacher, every_layer)
        self.device, self.teacher_device = device, teacher.device
        self.ahead = device != self.teacher_device if ahead is None else ahead
        self.streams = self.ahead and device.type == self.teacher_device.type == "cuda"
        if self.streams:
            self.compute = torch.cuda.Stream(self.teacher_device)
            self.copies = torch.cuda.Stream(device)
            self.compute.wait_stream(torch.cuda.current_stream(self.teacher_device))  # the weights are written there

    def start(self, batch: Batch) -> Coming:
        """The forward pass, at once or on the teacher's own streams."""
        if not self.streams:
            return Coming(self._forward(batch).to(self.device, non_blocking=True))
        done, copied = torch.cuda.Event(), torch.cuda.Event()
        with torch.cuda.device(self.teacher_device), torch.cuda.stream(self.compute):
            hidden = self._forward(batch)
            done.record(self.compute)
        with torch.cuda.device(self.device), torch.cuda.stream(self.copies):
            self.copies.wait_event(done)
            states = hidden.to(self.device, non_blocking=True, copy=True)
            hidden.record_stream(torch.cuda.current_stream(self.teacher_device))  # the one that the copy is on
            copied.record(self.copies)
        return Coming(states, copied)

    def arrived(self, coming: Coming) -> Tensor:
        """They may be used on the current stream of the student's device from now on."""
        if coming.arrival is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(coming.arrival)
            coming.states.record_stream(stream)
        return coming.states

    def _forward(self, batch: Batch) -> Tensor:
        if not self.ahead and self.device == self.teacher_device:
            return self.backbone(batch.inputs, batch.position_ids)
        assert batch.on_host is not None
        own = batch.on_host.to(self.teacher_device)
        return self.backbone(own.inputs, own.position_ids)


class HostTeacher(TeacherStates):
    """One teacher for all ranks of a host, on a device of its own, in the process of the host's first rank.

    Tokens are gathered there, hidden states scattered; both by torch.distributed. One batch ahead.
    """

    ahead = True

    def __init__(self, teacher: PreTrainedModel, device: torch.device, teacher_device: torch.device, ranks: Ranks):
        self.serves = ranks.local_rank == 0
        self.device, self.teacher_device = device, teacher_device
        self.backbone = TeacherBackbone(teacher) if self.serves else None
        self.dtype, self.width = teacher.dtype, teacher.config.hidden_size
        self.size = ranks.local_world_size
        self.first = ranks.rank - ranks.local_rank
        for first in range(0, ranks.world_size, self.size):  # every rank has to name every group
            members = list(range(first, first + self.size))
            group, on_host = dist.new_group(members), dist.new_group(members, backend="gloo")
            if first == self.first:
                self.group, self.on_host = group, on_host

    def start(self, batch: Batch) -> Coming:
        """Bring all local ranks' batches to the teacher and start on them."""
        assert batch.on_host is not None
        tokens, positions = batch.on_host.inputs, batch.on_host.position_ids
        sent = torch.stack([tokens] if positions is None else [tokens, positions])
        everyone = [torch.empty_like(sent) for _ in range(self.size)] if self.serves else None
        dist.gather(sent, everyone, dst=self.first, group=self.on_host)
        place = self.teacher_device if self.serves else self.device
        own = torch.empty(*tokens.shape, self.width, dtype=self.dtype, device=place)
        parts = None
        if everyone is not None and self.backbone is not None:
            together = torch.cat(everyone, dim=1).to(self.teacher_device, non_blocking=True)
            hidden = self.backbone(together[0], None if positions is None else together[1])
            parts = [part.contiguous() for part in hidden.chunk(self.size)]
        return Coming(own, dist.scatter(own, parts, src=self.first, group=self.group, async_op=True), parts)

    def arrived(self, coming: Coming) -> Tensor:
        """[b, t, d] on the student's device."""
        coming.arrival.wait()
        return coming.states.to(self.device, non_blocking=True)
