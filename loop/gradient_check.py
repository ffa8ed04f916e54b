"""A stage trains what it should: in its first update that counts every trainable tensor has a gradient.

A hook that a stage left behind, a tensor outside the graph or a wrapper that forgets one leave a log that looks
healthy. The weights' own bits tell nothing: a first rate of 1e-8 rightly moves no float32 norm weight.
"""

import logging
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from loop.forms import Stage
from loop.meter import HostCopy
from optim.masters import local

log = logging.getLogger(__name__)

WRAPPERS = frozenset({"module", "student", "backbone", "layers"})  # parts of a name that say nothing of its kind


class UntrainedTensors(RuntimeError):
    """A stage gives no gradient to tensors that it should train."""


def without_gradient(stage: str, *, seq_length: int, mixers: bool, hard_labels: bool) -> dict[str, str]:
    """Kinds of tensors, by the beginning of `kind_of`, whose gradients start exactly 0 by their mathematics -> why.

    mixers: the student has any; hard_labels: they have a weight in the loss.
    """
    if stage == "matrix":
        return dict.fromkeys(("D", "z_bias", "out_proj"), "the mixing matrix is made without them")
    if not mixers and not hard_labels:
        return {"": "a student of replaced layers alone begins as its teacher"}
    if seq_length == 1:
        attention = dict.fromkeys(("self_attn.q_", "self_attn.k_"), "a single position attends to itself alone")
        return attention | dict.fromkeys(("A_log", "mixer.A_log"), "a single position forgets nothing")
    return {}


def kind_of(name: str) -> str:
    """A parameter's name without its layer's number and what wraps it, such as `mixer.in_proj.weight`."""
    return ".".join(part for part in name.split(".") if not part.isdigit() and part not in WRAPPERS)


class GradientCheck:
    """Looks at the gradients of a stage's updates until one counts: not skipped, valid tokens, a rate above 0.

    On a GPU its figures are read a step later, so that the CPU never waits for them; from then on it does nothing.
    """

    def __init__(self, stage: Stage):
        self.stage, self.done = stage, False
        trained = [(kind_of(name), p) for name, p in stage.trainable.named_parameters() if p.requires_grad]
        self.kinds, self.parameters = [kind for kind, _ in trained], [p for _, p in trained]
        self.pending: HostCopy | None = None

    def push(self, tokens: Tensor, bad: Tensor, rate: float) -> None:
        """After an update, while its gradients are there. tokens: this rank's valid ones; bad: 1.0 if skipped.

        All ranks take part. Raises `UntrainedTensors`.
        """
        self.flush()
        if self.done or rate <= 0:
            return
        sizes = torch.stack([*self._sizes(bad.device), tokens.float().view(())])
        self.pending = HostCopy(torch.cat([self.stage.ranks.sum((sizes > 0).float()), bad.view(1)]))
        if self.pending.event is None:
            self.flush()

    def flush(self) -> None:
        """Judge what was pushed last, waiting for it if need be. Raises `UntrainedTensors`."""
        if self.pending is None:
            return
        *found, tokens, bad = self.pending.numbers()
        self.pending = None
        if bad or not tokens:
            return
        self.done, self.parameters = True, []
        missing = [kind for kind, seen in zip(self.kinds, found) if not seen]
        reasons = {kind: reason_of(kind, self.stage.without_gradient) for kind in missing}
        exempt = sorted(kind for kind, reason in reasons.items() if reason)
        if exempt:
            why = ", ".join(dict.fromkeys(str(reasons[kind]) for kind in exempt))
            log.info("%s: no gradient in %s: %s", self.stage.name, ", ".join(exempt), why)
        untrained = [kind for kind in reasons if not reasons[kind]]
        wrong = [f"{kind} ({missing.count(kind)} of {self.kinds.count(kind)})" for kind in untrained]
        if wrong:
            raise UntrainedTensors(
                f"{self.stage.name}: the first update had no gradient for {', '.join(wrong)}; the stage would not "
                "train them: this is a fault of the program, unless they should have been frozen"
            )

    def _sizes(self, device: torch.device) -> list[Tensor]:
        """The largest entry of each gradient that the optimizer has seen on this rank, 0 where there was none.

        Where gradients are gone (`UpdateInBackward`), their norms.
        """
        optimizer = self.stage.optimizer
        sizes: dict[Tensor, Tensor] = dict(getattr(optimizer, "norms", {}))
        held = {p for group in optimizer.param_groups for p in group["params"]}
        gradients = {p: local(p.grad) for p in self.parameters if p.grad is not None and p in held}
        here = {p: gradient for p, gradient in gradients.items() if gradient.numel()}
        if here:
            sizes |= zip(here, torch._foreach_norm(list(here.values()), math.inf))
        zero = torch.zeros((), device=device)
        return [sizes.get(p, zero).to(device, torch.float32) for p in self.parameters]


def reason_of(kind: str, exempt: Mapping[str, str]) -> str | None:
    """Why a kind of tensor rightly has no gradient, or None."""
    return next((reason for beginning, reason in exempt.items() if kind.startswith(beginning)), None)
