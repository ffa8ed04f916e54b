"""What a layer keeps from its forward to its backward pass, in bytes, counted on the meta device.

Eagerly: the storages that autograd saves. Compiled: what torch's own partitioner hands from the forward half of the
layer's graph to the backward half, which is less, because elementwise work is made again where that is cheaper.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hardware.recomputation import KEPT
from models import LlambaForCausalLM

log = logging.getLogger(__name__)


def saved_bytes(
    student: LlambaForCausalLM, index: int, batch: int, length: int, compiled: bool, dtype: torch.dtype
) -> float:
    """Bytes that layer `index` of a meta student keeps from its forward to its backward pass."""
    backbone = student.backbone
    hidden = torch.empty(batch, length, student.config.d_model, dtype=dtype, device="meta", requires_grad=True)
    named: dict[str, Any] = {}
    if index in student.config.attention_layers:
        positions = torch.empty(1, length, dtype=torch.long, device="meta")
        assert backbone.rotary_emb is not None
        named["position_embeddings"] = tuple(part.to(dtype) for part in backbone.rotary_emb(hidden, positions))
    layer = backbone.layers[index]
    layer = layer.half() if dtype == torch.float16 else layer
    with flash_attention():
        if compiled:
            try:
                return _saved_compiled(layer, hidden, named)
            except Exception as error:  # whatever the tracer raises: the eager count is an upper bound
                reason = " ".join(str(error).split())[:200]
                log.warning("a layer cannot be traced, its activations are estimated as eager ones: %s", reason)
        return _saved_eagerly(layer, hidden, named)


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """On the meta device scaled_dot_product_attention would take its plain form; on a GPU it is a fused kernel."""
    plain = F.scaled_dot_product_attention

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]

    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _saved_eagerly(layer: nn.Module, hidden: Tensor, named: dict[str, Any]) -> float:
    """By autograd's own hooks: the storages that it packs, parameters and shared inputs left out."""
    shared = {_storage(t) for t in (*layer.parameters(), *named.get("position_embeddings", ()))}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[_storage(tensor)] = tensor
        return tensor

    selective = getattr(layer, "recomputes", "none") == "selective"
    kept = KeptResults(held) if selective else contextlib.nullcontext()
    with kept, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(hidden, **named)
    held.setdefault(_storage(hidden), hidden)
    sizes = [t.untyped_storage().nbytes() for key, t in held.items() if key not in shared]
    del out
    return float(sum(sizes))


class KeptResults(TorchDispatchMode):
    """Collects what selective checkpointing keeps, which autograd's hooks do not see."""

    def __init__(self, held: dict[int, Tensor]):
        super().__init__()
        self.held = held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in KEPT:
            for tensor in result if isinstance(result, tuple) else (result,):
                if isinstance(tensor, Tensor):
                    self.held[_storage(tensor)] = tensor
        return result


def _saved_compiled(layer: nn.Module, hidden: Tensor, named: dict[str, Any]) -> float:
    """By tracing the layer and splitting its graph as the compiler does: what the forward half hands on."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    forwards: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Callable[..., Any]:
        forwards.append(graph)
        raise NotImplementedError("traced, and not to be run")

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=lambda graph, inputs: graph.forward,
        partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    try:
        torch.compile(layer, backend=backend, dynamic=False, fullgraph=True)(hidden, **named)
    except Exception:  # the tracer wraps what `keep` raises
        if not forwards:
            raise
    graph = forwards[0].graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    inputs = {_storage(node.meta["val"]) for node in graph.nodes if node.op == "placeholder"}
    held = {
        _storage(value): value.untyped_storage().nbytes()
        for node in output.args[0][1:]
        if node is not None and isinstance(value := node.meta.get("val"), Tensor)
    }
    # The layer's own input lives until its backward pass, be it named as saved or not.
    return (
        float(sum(size for key, size in held.items() if key not in inputs)) + hidden.numel() * hidden.element_size()
    )
