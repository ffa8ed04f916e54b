"""Updates by two optimizers with the same gradients."""

import torch


def step_alike(module, ours, twin, theirs):
    """Five updates of a module and its twin, each by its own optimizer, with the same gradients."""
    for _ in range(5):
        for p, q in zip(module.parameters(), twin.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
