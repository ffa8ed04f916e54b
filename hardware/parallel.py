"""A student on several ranks: replicated (DDP) or sharded (FSDP2), and its checkpoints put together again."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hardware.ranks import Ranks


def head_names(step: Any) -> list[str]:
    """Names, in a `StudentLoss`, of the parameter that is the student's head (two if it is tied)."""
    head = step.student.lm_head.weight
    return [name for name, p in step.named_parameters(remove_duplicate=False) if p is head]


def replicate(step: nn.Module) -> nn.Module:
    """A `StudentLoss` under DDP. The head's float32 gradient is not DDP's: see `average_gradients`."""
    ddp = nn.parallel.DistributedDataParallel
    constant = [name for name, _ in step.named_buffers()]  # the same everywhere: not to be sent in every step
    ddp._set_params_and_buffers_to_ignore_for_model(step, head_names(step) + constant)
    return ddp(step, gradient_as_bucket_view=True)


def shard(step: Any, device: torch.device) -> nn.Module:
    """A `StudentLoss` under FSDP2, in place: each layer a group, embedding, norm and head groups of their own.

    Gradients are reduced in float32. The head is used in the loss, outside its own forward, so the step unshards it
    there; alone in its group, its gradient can be float32 beside those of a bf16 embedding.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32)}
    backbone = step.student.backbone
    for layer in backbone.layers:
        fully_shard(layer, **options)
    fully_shard(backbone.final_layernorm, **options)
    if step.student.lm_head.weight is not backbone.embedding.weight:
        fully_shard(step.student.lm_head, **options)
    step.accumulate_head_in_place = False
    return fully_shard(step, **options)


def reshard(module: nn.Module) -> None:
    """Shard what a forward pass without a backward pass left gathered: `parameters()` are shards again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def shard_layers(walk: nn.Module, device: torch.device) -> None:
    """Shard a frozen model's layers (`walk.layers`) in place; `walk`, whose forward calls them, is FSDP2's root."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers: Any = walk.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(walk, mesh=mesh)


def widen_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make sharded gradients float32, where the next micro steps' are added to them.

    FSDP2 reduces in float32, but hands a gradient on in its parameter's dtype: sums in bf16 would lose small addends.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.dtype in (torch.bfloat16, torch.float16):
            parameter.grad = None
            parameter.grad_dtype = None  # any: the next window's first gradient comes in the parameter's again
            parameter.grad = gradient.float()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over ranks: for parameters that no wrapper looks after."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    torch._foreach_div_(gradients, float(dist.get_world_size()))
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()


# checkpoints: the same files whatever the number of ranks


def is_sharded(module: nn.Module) -> bool:
    """True once FSDP2 has sharded a module's parameters."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole_weights(named: dict[str, Tensor], known: dict[str, Tensor], *, first: bool) -> dict[str, Tensor]:
    """name -> whole tensor on the host, on the first rank; others take part and get empty ones.

    Those in `known`, an earlier result's, are not made again.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in named.items():
        if name in known:
            found[name] = known[name]
            continue
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name] = full.cpu() if first else torch.empty(0)
    return found


def whole_optimizer_state(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any]:
    """The state dict that one rank would have: the shards' states put together (on the first rank, on the host).

    Parameters are sharded by rows, and so is their state, also that of 8-bit blocks, which never cross rows.
    """
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = [state["state"].get(index, {}) for index in range(len(parameters))]
    forms = ranks.gather([_forms(parameter, values) for parameter, values in zip(parameters, own)])
    whole: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        form: dict[str, Any] = next((ranked[index] for ranked in forms if ranked[index]), {})
        entry = {name: _join_rows(parameter, own[index].get(name), *shape) for name, shape in form.items()}
        if ranks.is_first and entry:
            whole[index] = {name: tensor.cpu() for name, tensor in entry.items()}
    return {**state, "state": whole}


def _forms(parameter: DTensor, state: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """For each tensor of a state its dtype, rows for each row of the parameter (0: a number), and shape of a row."""
    rows = max(1, parameter.to_local().shape[0])
    return {name: (t.dtype, t.shape[0] // rows if t.ndim else 0, tuple(t.shape[1:])) for name, t in state.items()}


def _join_rows(
    parameter: DTensor, tensor: Tensor | None, dtype: torch.dtype, per_row: int, shape: tuple[int, ...]
) -> Tensor:
    """A state tensor of all rows, from each rank's own (None where a rank has no rows), sent as bytes."""
    device = parameter.to_local().device
    if per_row == 0:  # the same on every rank that has rows
        value = torch.zeros((), dtype=dtype, device=device) if tensor is None else tensor.to(device).clone()
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value
    width = per_row * math.prod(shape) * dtype.itemsize
    rows = torch.empty(0, width, dtype=torch.uint8, device=device)
    if tensor is not None:
        rows = tensor.contiguous().view(-1).view(torch.uint8).view(-1, width)
    size = torch.Size((parameter.shape[0], width))
    spread = DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, run_check=False, shape=size, stride=(width, 1)
    )
    return spread.full_tensor().view(-1).view(dtype).view(-1, *shape)


def own_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """This rank's rows of a whole state dict, for its shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    mine: dict[int, dict[str, Any]] = {}
    for index, values in state["state"].items():
        first, rows = own_rows(parameters[index])
        per = {name: value.shape[0] // parameters[index].shape[0] for name, value in values.items() if value.ndim}
        if rows:
            mine[index] = {
                name: value[first * per[name] : (first + rows) * per[name]] if name in per else value
                for name, value in values.items()
            }
    return {**state, "state": mine}


def own_rows(parameter: DTensor) -> tuple[int, int]:
    """(first row, number of rows) of a parameter's shard; FSDP2 cuts rows as torch.chunk does."""
    rows = parameter.to_local().shape[0]
    each = -(-parameter.shape[0] // parameter.device_mesh.size())
    return min(parameter.device_mesh.get_local_rank() * each, parameter.shape[0]), rows


def rows_of(parameter: Tensor, whole: Tensor) -> Tensor:
    """Of a tensor of a parameter's shape what this rank's shard of the parameter holds: all, or some rows."""
    if not isinstance(parameter, DTensor):
        return whole
    first, rows = own_rows(parameter)
    return whole[first : first + rows]


def copy_rows(parameter: Tensor, whole: Tensor) -> None:
    """Write a whole tensor into a parameter, or this rank's rows of it into its shard."""
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    own.copy_(rows_of(parameter, whole))
