"""From a name to an optimizer: which parameters decay, and which matrices Muon orthogonalises."""

from typing import Any

import torch
from torch import nn

from optim.adamw8bit import AdamW8bit
from optim.masters import MasterAdamW


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with decay; norms, biases, D and z_bias (1-d) without."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trainable if p.ndim > 1]
    plain = [p for p in trainable if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str, module: nn.Module, *, lr: float, weight_decay: float, kernel: bool = False
) -> torch.optim.Optimizer:
    """`adamw` (float32 masters and moments), `adamw8bit` (exact masters, 8-bit moments) or `muon`."""
    if name == "muon":
        from optim.muon import Muon

        return Muon(muon_groups(module, weight_decay), lr=lr, kernel=kernel)
    groups = parameter_groups(module, weight_decay)
    if name == "adamw":
        return MasterAdamW(groups, lr=lr)
    return AdamW8bit(groups, lr=lr, kernel=kernel)


def muon_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """`parameter_groups`, with the layers' matrices in groups of their own.

    Such a group has `rows`: those of each matrix that a parameter of it holds, one above the other.
    """
    rows = {p: sizes for p, sizes in _matrices(module).items() if p.requires_grad}
    groups: list[dict[str, Any]] = []
    for kind in dict.fromkeys(rows.values()):
        members = [p for p in rows if rows[p] == kind]
        groups.append({"params": members, "weight_decay": weight_decay, "rows": list(kind)})
    for group in parameter_groups(module, weight_decay):
        rest = [p for p in group["params"] if p not in rows]
        groups += [{**group, "params": rest}] if rest else []
    return groups


def _matrices(module: nn.Module) -> dict[Any, tuple[int, ...]]:
    """The weight of each linear layer but the head, with the rows of the matrices that it holds."""
    found: dict[Any, tuple[int, ...]] = {}
    for name, linear in module.named_modules():
        parent, _, own = name.rpartition(".")
        if isinstance(linear, nn.Linear) and own != "lm_head":
            apart = getattr(module.get_submodule(parent), f"{own}_rows", None)
            found[linear.weight] = tuple(apart or linear.weight.shape[:1])
    return found
