"""Where the teacher's hidden states come from: this rank's device, another device a batch ahead, or one for a host.

Only hidden states cross between devices and ranks, never logits: the teacher's head stands where the loss is.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.forms import DeviceBatch
from hardware.ranks import Ranks
from model_utils import teacher_hidden

LATER: Any = {"non_blocking": True}


class TeacherBackbone(nn.Module):
    """The teacher up to its final norm, as one module (so that it can be sharded as one)."""

    def __init__(self, teacher: Any, every_layer: bool = False):
        super().__init__()
        self.layers, self.every_layer = teacher.model.layers, every_layer
        self.teacher = [teacher]  # in a list: what is not a layer is no part of this module

    def forward(self, inputs: Tensor, positions: Tensor | None) -> Tensor:
        """Hidden states [b, t, d] for inputs int64 [b, t]; positions [b, t] restart at each document.

        [L, b, t, d] where those of every layer are asked for, but not under no_grad: evaluations need the last.
        """
        return teacher_hidden(self.teacher[0], inputs, positions, self.every_layer and torch.is_grad_enabled())


class OwnTeacher:
    """A teacher of this rank's own. On a device of its own it works one batch ahead, on streams of its own.

    Its forward pass then overlaps the student's forward and backward pass. Tokens go to it straight from the host,
    and its results are copied on a stream beside the student's, so that neither waits for the student's queue.
    With `every_layer` it gives hidden states [L, b, t, d] (`model_utils.teacher_hidden`) instead of [b, t, d].
    """

    def __init__(self, teacher: Any, device: torch.device, *, ahead: bool | None = None, every_layer: bool = False):
        self.backbone = TeacherBackbone(teacher, every_layer)
        self.device, self.teacher_device = device, teacher.device
        self.ahead = device != self.teacher_device if ahead is None else ahead
        self.streams = self.ahead and device.type == self.teacher_device.type == "cuda"
        if self.streams:
            self.compute = torch.cuda.Stream(self.teacher_device)
            self.copies = torch.cuda.Stream(device)
            self.compute.wait_stream(torch.cuda.current_stream(self.teacher_device))  # the weights are written there

    def prepare(self, batch: DeviceBatch) -> None:
        """Start on a batch."""
        if not self.streams:
            batch.teacher_hidden = self._forward(batch).to(self.device, non_blocking=True)
            return
        done, batch.ready = torch.cuda.Event(), torch.cuda.Event()
        with torch.cuda.device(self.teacher_device), torch.cuda.stream(self.compute):
            hidden = self._forward(batch)
            done.record(self.compute)
        with torch.cuda.device(self.device), torch.cuda.stream(self.copies):
            self.copies.wait_event(done)
            batch.teacher_hidden = hidden.to(self.device, non_blocking=True, copy=True)
            hidden.record_stream(torch.cuda.current_stream(self.teacher_device))  # the one that the copy is on
            batch.ready.record(self.copies)

    def finish(self, batch: DeviceBatch) -> Tensor:
        """The batch's hidden states, on the student's device, for work on the current stream."""
        if batch.teacher_hidden is None:
            self.prepare(batch)
        hidden = batch.teacher_hidden
        assert hidden is not None
        if batch.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(batch.ready)
            hidden.record_stream(stream)
        return hidden

    def _forward(self, batch: DeviceBatch) -> Tensor:
        if not self.ahead and self.device == self.teacher_device:
            return self.backbone(batch.inputs, batch.position_ids)
        source = batch.source
        positions = None if source.position_ids is None else source.position_ids.to(self.teacher_device, **LATER)
        return self.backbone(source.tokens.to(self.teacher_device, **LATER)[:, :-1], positions)


class HostTeacher:
    """One teacher for all ranks of a host, on a device of its own, in the process of the host's first rank.

    Tokens are gathered there, hidden states scattered; both by torch.distributed. One batch ahead.
    """

    ahead = True

    def __init__(self, teacher: Any, device: torch.device, teacher_device: torch.device, ranks: Ranks):
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

    def prepare(self, batch: DeviceBatch) -> None:
        """Bring all local ranks' batches to the teacher and start on them."""
        tokens, positions = batch.source.tokens[:, :-1], batch.source.position_ids
        sent = torch.stack([tokens] if positions is None else [tokens, positions])
        everyone = [torch.empty_like(sent) for _ in range(self.size)] if self.serves else None
        dist.gather(sent, everyone, dst=self.first, group=self.on_host)
        place = self.teacher_device if self.serves else self.device
        batch.teacher_hidden = torch.empty(*tokens.shape, self.width, dtype=self.dtype, device=place)
        parts = None
        if everyone is not None and self.backbone is not None:
            together = torch.cat(everyone, dim=1).to(self.teacher_device, **LATER)
            hidden = self.backbone(together[0], None if positions is None else together[1])
            parts = [part.contiguous() for part in hidden.chunk(self.size)]
        batch.ready = dist.scatter(batch.teacher_hidden, parts, src=self.first, group=self.group, async_op=True)
        batch.kept = parts

    def finish(self, batch: DeviceBatch) -> Tensor:
        """The batch's hidden states [b, t, d] on the student's device."""
        if batch.teacher_hidden is None:
            self.prepare(batch)
        if batch.ready is not None:
            batch.ready.wait()
            batch.ready = batch.kept = None
            assert batch.teacher_hidden is not None
            batch.teacher_hidden = batch.teacher_hidden.to(self.device, non_blocking=True)
        assert batch.teacher_hidden is not None
        return batch.teacher_hidden
