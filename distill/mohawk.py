"""The first two stages of MOHAWK (arXiv 2408.10189): align each mixer with the attention that it replaces.

Both walk through the teacher layer by layer. Every mixer sees the teacher's own layer input, so layers are
independent: one layer's loss is back-propagated before the next layer runs, and only one layer's activations are
alive at a time. Losses are sums over tokens, divided by sizes that are measured once, on the stage's first
sequences, so that 1 x 8 and 2 x 4 (batch x accumulation) have the same gradients.

* "matrix": rows of the mixer's sequence-mixing matrix (from C, B and the decays; no D, no convolution of x) against
  rows of the attention matrix, squared distance over the mean squared norm of a head's rows, mean over heads; the
  matrices of an attention head's copies (`--expand`) add up to its own.
* "hidden": the mixer's output against the attention's output, squared distance over the latter's mean square.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data import Batch
from distill.initialization import attention_half, attention_matrix, mlp_half, visit_layers
from hardware.compilation import compiles_here
from loop.forms import Sums
from models import LlambaForCausalLM
from models.modeling_llamba import LlambaMixer
from models.state_space import decay_dtype, ssd_matrix


def trained_mixers(student: LlambaForCausalLM) -> nn.ModuleList:
    """The mixers, all that these stages train; replaced layers have none."""
    return nn.ModuleList(mixers_of(student).values())


def mixers_of(student: LlambaForCausalLM) -> dict[int, LlambaMixer]:
    """The mixer of each layer that is not replaced, by the layer's index."""
    layers: Any = student.backbone.layers
    return {index: layer.mixer for index, layer in enumerate(layers) if hasattr(layer, "mixer")}


class AlignmentMicroStep:
    """A micro step of the "matrix" or "hidden" stage for `trainer.run_stage`."""

    def __init__(
        self,
        kind: str,
        teacher: PreTrainedModel,
        student: LlambaForCausalLM,
        tokens: Tensor,
        *,
        autocast: torch.dtype | None = None,
        compile: bool = False,
    ):
        """`tokens` int64 [b, t]: a few sequences of the stage's own text, to measure the attention's sizes on."""
        self.target = {"matrix": attention_scores, "hidden": attention_output}[kind]
        size = {"matrix": matrix_size, "hidden": hidden_size}[kind]
        self.loss: Callable[..., tuple[Tensor, Tensor]] = {"matrix": matrix_loss, "hidden": hidden_loss}[kind]
        self.teacher, self.student, self.autocast = teacher.model, student, autocast
        self.mixers = mixers_of(student)
        self.untried, self.halves = compile, (attention_half, mlp_half)
        parts: dict[int, list[Tensor]] = {index: [] for index in self.mixers}
        for rows in tokens.split(1):
            for index, _, target in self._walk(rows, None):
                parts[index].append(size(target))
        self.sizes = {i: torch.stack(found).mean(0).to(self.mixers[i].D.device) for i, found in parts.items()}

    def _walk(self, inputs: Tensor, positions: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(layer, its attention's input u, what its mixer is to match) of every layer that has a mixer, in turn."""
        device = self.teacher.embed_tokens.weight.device
        positions = None if positions is None else positions.to(device)
        for visit in visit_layers(self.teacher, inputs.to(device), positions, self.halves):
            if visit.index in self.mixers:
                with torch.no_grad():
                    target = self.target(visit.attention, visit.u, visit.attended, visit.options)
                yield visit.index, visit.u, target

    def __call__(self, batch: Batch, grad_scale: Tensor) -> Sums:
        """Forward and backward of every mixer on one batch; figures as sums over valid tokens."""
        sums: Sums = {}
        device = batch.inputs.device
        if self.untried:
            self._try_compiled_halves(batch)
        for index, u, target in self._walk(batch.inputs, batch.position_ids):
            self._align(index, u.to(device), target.to(device), batch, grad_scale, sums)
        return sums

    def _align(self, index: int, u: Tensor, target: Tensor, batch: Batch, grad_scale: Tensor, sums: Sums) -> None:
        mixer = self.mixers[index]
        resets = None if batch.position_ids is None else batch.position_ids == 0
        inputs = (mixer, u, target, resets, self.sizes[index])
        with torch.autocast(u.device.type, self.autocast, enabled=self.autocast is not None):
            if self.untried:
                self._try_compiled(inputs)
            rows, decay = self.loss(*inputs)
        total = (rows * batch.valid).sum()
        (total * (grad_scale / len(self.mixers))).backward()
        share = total.detach() / len(self.mixers)
        sums["loss"] = sums["loss"] + share if "loss" in sums else share
        sums[f"layers/squared_error_{index}"] = total.detach()
        sums[f"layers/mean_decay_{index}"] = (decay * batch.valid).sum().detach()

    def _try_compiled_halves(self, batch: Batch) -> None:
        """Compile the halves of the teacher's layers, one graph for all; what does not compile here stays eager."""
        seen = batch.inputs, batch.position_ids
        eager, self.halves = (
            self.halves,
            (torch.compile(attention_half, dynamic=False), torch.compile(mlp_half, dynamic=False)),
        )
        if not compiles_here("a teacher layer's halves", lambda: list(islice(self._walk(*seen), 2))):
            self.halves = eager

    def _try_compiled(self, inputs: tuple[Any, ...]) -> None:
        """Compile the loss, one graph for all equal mixers; what does not compile here stays eager.

        The trial takes its gradients by `autograd.grad`, so that nothing is left in `.grad` and no hook is run.
        """
        self.untried = False
        compiled = torch.compile(self.loss, dynamic=False)

        def trial() -> None:
            used = [p for p in inputs[0].parameters() if p.requires_grad]
            torch.autograd.grad(compiled(*inputs)[0].sum(), used, allow_unused=True)

        if compiles_here("the alignment of a mixer", trial):
            self.loss = compiled


def attention_scores(attention: nn.Module, u: Tensor, attended: Tensor, options: dict[str, Any]) -> Tensor:
    """What the "matrix" stage matches: the attention matrix [b, H, t, t]."""
    return attention_matrix(attention, u, options)


def attention_output(attention: nn.Module, u: Tensor, attended: Tensor, options: dict[str, Any]) -> Tensor:
    """What the "hidden" stage matches: the attention's output [b, t, d], as it is."""
    return attended


def hidden_size(target: Tensor) -> Tensor:
    """Mean squared norm of the attention's output [b, t, d], a scalar."""
    return target.to(decay_dtype(target.dtype)).square().sum(-1).mean()


def hidden_loss(
    mixer: LlambaMixer, u: Tensor, target: Tensor, resets: Tensor | None, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Per-token relative squared error of the mixer's output [b, t], and mean decay [b, t]; u, target [b, t, d]."""
    wide = decay_dtype(u.dtype)
    return (mixer(u, resets).to(wide) - target.to(wide)).square().sum(-1) / size, mean_decay(mixer, u)


def matrix_size(target: Tensor) -> Tensor:
    """Mean squared norm of each head's rows, [H, 1], of attention matrices [b, H, t, t]."""
    return target.square().sum(-1).mean((0, 2))[:, None]


def matrix_loss(
    mixer: LlambaMixer, u: Tensor, target: Tensor, resets: Tensor | None, size: Tensor
) -> tuple[Tensor, Tensor]:
    """Per-row relative squared distance of mixing and attention matrices, mean over heads [b, t], and mean decay.

    u [b, t, d], target [b, H, t, t], size [H, 1].
    """
    _, B, C, log_decay, _, _ = mixer.project(u, resets)
    given = ssd_matrix(log_decay, B, C, resets).unflatten(1, (-1, target.shape[1])).sum(1)  # over a head's copies
    distance = (given - target).square().sum(-1)  # [b, H, t]
    return (distance / size).mean(1), mean_decay(mixer, u)


@torch.no_grad()
def mean_decay(mixer: LlambaMixer, u: Tensor) -> Tensor:
    """The mean over heads of a_t [b, t]."""
    return mixer.decays(u).mean(-1)
