"""A saved optimizer's state put onto the parameters of this run: by name, whatever was frozen, thawed or widened."""

from typing import Any

import torch
from torch import Tensor, nn

from hardware.parallel import copy_rows, own_optimizer_state, rows_of
from optim.masters import join_master, local
from utils import UserError


def named_state(state: dict[str, Any], optimizer: torch.optim.Optimizer, student: nn.Module) -> dict[str, Any]:
    """An optimizer's state dict with the parameters' names in the student, in the order of its indices."""
    return {**state, "names": parameter_names(optimizer, student)}


def parameter_names(optimizer: torch.optim.Optimizer, student: nn.Module) -> list[str]:
    """Names, in the student, of an optimizer's parameters in their order."""
    names = {p: name for name, p in student.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def join_saved_masters(student: nn.Module, saved: dict[str, Any]) -> None:
    """Give each float32 parameter, trained now or not, the exact value of the master that a bf16 one had.

    Until now it holds the bf16 weight. `saved` is whole; of sharded parameters each rank writes its rows.
    """
    parameters = dict(student.named_parameters())
    for index, name in enumerate(saved.get("names", ())):
        parameter, values = parameters[name], saved["state"].get(index, {})
        if parameter.dtype != torch.float32 or not values.keys() & {"master", "low"}:
            continue
        own_memory(parameter)
        if "master" in values:
            copy_rows(parameter, values["master"])
        else:
            weight = local(parameter)
            low = rows_of(parameter, values["low"]).to(weight.device)
            weight.copy_(join_master(weight.to(torch.bfloat16), low))


def own_memory(parameter: Tensor) -> None:
    """Before it is written to: a frozen parameter may be the teacher's own memory."""
    if not parameter.requires_grad and type(parameter) is nn.Parameter:
        parameter.data = parameter.data.clone()


@torch.no_grad()
def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    student: nn.Module,
    *,
    same_kind: bool,
    same_dtype: bool,
    sharded: bool,
) -> None:
    """Give each parameter the state that it had; the groups' settings (rates, weight decay) stay this run's.

    State of parameters that are frozen now is dropped, those that were frozen start with none; an optimizer of
    another kind takes nothing. `saved` is whole; `sharded`: each rank takes its rows. Parameters that are wider than
    they were have taken their masters' values already (`join_saved_masters`).
    """
    if not same_kind:
        return
    names = parameter_names(optimizer, student)
    matched = _by_name(saved, names, may_differ=not same_dtype)
    if sharded:
        matched = own_optimizer_state(optimizer, {"state": matched})["state"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in matched.items():
        matched[index] = values if same_dtype else fitted(local(parameters[index].detach()), values)
    now = optimizer.state_dict()
    kept = {name: saved[name] for name in now.keys() & saved.keys() - {"state", "param_groups"}}
    matched = {index: values for index, values in matched.items() if values}
    optimizer.load_state_dict({**now, **kept, "state": matched})


def _by_name(saved: dict[str, Any], names: list[str], *, may_differ: bool) -> dict[int, dict[str, Any]]:
    """The saved state of parameters by their place in `names`; without names in the order that they were saved in."""
    before = saved.get("names")
    if before is None:
        if may_differ or sum(len(group["params"]) for group in saved["param_groups"]) != len(names):
            raise UserError(
                "--resume_force: this checkpoint was made before names of parameters were kept, so that --dtype and "
                "what is frozen must stay as they are"
            )
        before = names
    places = {name: index for index, name in enumerate(before)}
    state = saved["state"]
    return {i: dict(state[places[n]]) for i, n in enumerate(names) if n in places and places[n] in state}


def fitted(weight: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """State for a parameter whose dtype has changed.

    A bf16 weight that was float32 starts from its rounded value.
    """
    values = dict(values)
    if weight.dtype == torch.float32:
        values.pop("master", None)
        values.pop("low", None)
    elif "exp_avg" in values:
        values.setdefault("master", weight.float())
    else:
        values.setdefault("low", torch.zeros_like(weight, dtype=torch.int16))
    if "momentum" in values:
        values["momentum"] = values["momentum"].to(weight.dtype)
    return values
