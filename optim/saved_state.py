"""A saved optimizer's state put onto the parameters of this run: by name, whatever was frozen, thawed or widened."""

from typing import Any

import torch
from torch import Tensor, nn

from hardware.parallel import own_optimizer_state
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

    State of parameters that are frozen now is dropped, those that were frozen start with none. Where parameters are
    wider than they were, each becomes its exact float32 master. An optimizer of another kind takes the masters'
    values so, and no more. `saved` is whole; `sharded`: each rank takes its rows.
    """
    names = parameter_names(optimizer, student)
    matched = _by_name(saved, names, may_differ=not same_kind)
    if sharded:
        matched = own_optimizer_state(optimizer, {"state": matched})["state"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in matched.items():
        matched[index] = values if same_dtype else fitted(local(parameters[index].detach()), values)
    if not same_kind:
        return
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
                "--resume_force: this checkpoint was made before names of parameters were kept, so that --optimizer "
                "and what is frozen must stay as they are"
            )
        before = names
    places = {name: index for index, name in enumerate(before)}
    state = saved["state"]
    return {i: dict(state[places[n]]) for i, n in enumerate(names) if n in places and places[n] in state}


def fitted(weight: Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """State for a parameter whose dtype has changed; a float32 `weight` takes the exact value of its master.

    A bf16 weight that was float32 starts from its rounded value.
    """
    values = dict(values)
    if weight.dtype == torch.float32:
        master, low = values.pop("master", None), values.pop("low", None)
        if master is not None:
            weight.copy_(master)
        elif low is not None:
            weight.copy_(join_master(weight.to(torch.bfloat16), low.to(weight.device)))
    elif "exp_avg" in values:
        values.setdefault("master", weight.float())
    else:
        values.setdefault("low", torch.zeros_like(weight, dtype=torch.int16))
    if "momentum" in values:
        values["momentum"] = values["momentum"].to(weight.dtype)
    return values
