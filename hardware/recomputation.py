"""Activation checkpointing: which results of a layer are kept for the backward pass and which are computed again."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model_utils import decoder_layers

MODES = ("none", "selective", "full")  # of recomputation, cheapest in time first

# What "selective" keeps of a layer: the results of its projections and of attention, which are dear to compute again.
# All else (norms, convolution, the state-space operator's small products, gates) is made again in the backward pass.
KEPT = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)


def set_activation_checkpointing(model: nn.Module, modes: str | Sequence[str]) -> None:
    """Choose what each layer's backward pass recomputes: one mode for all layers, or one a layer.

    none: nothing (a compiled layer still recomputes elementwise work where that saves memory traffic); selective:
    all but projections and attention (`KEPT`); full: the whole layer from its input. Gradients are the same.
    A layer's class is swapped for a subclass, so that names stay and a compiled layer has it in its graph.
    """
    layers = decoder_layers(model)
    chosen = [modes] * len(layers) if isinstance(modes, str) else list(modes)
    for layer, mode in zip(layers, chosen, strict=True):
        if mode not in MODES:
            raise ValueError(f"checkpointing mode {mode!r} is not one of {', '.join(MODES)}")
        plain: Any = getattr(type(layer), "recomputes_of", type(layer))
        layer.__class__ = plain if mode == "none" else _recomputing(plain, mode)


@functools.cache
def _recomputing(layer_class: Any, mode: str) -> Any:
    """A subclass whose forward pass is recomputed in the backward pass as `mode` says."""
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        # It warns of in-place operations under torch.compile, of which the layers have none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def run(*inner: Any, **named: Any) -> Any:
            return layer_class.forward(self, *inner, **named)

        return checkpoint(run, *args, **options, **kwargs) if torch.is_grad_enabled() else run(*args, **kwargs)

    members = {"forward": forward, "recomputes_of": layer_class, "recomputes": mode}
    members["__module__"] = layer_class.__module__
    return type(layer_class.__name__, (layer_class,), members)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
