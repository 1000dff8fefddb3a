"""An optimizer's state dict is the unmodified model's: every row of an expert in logical order."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_eplb.parallel.convert import expert_layers
from lightning_eplb.parallel.experts import ExpertLayer
from lightning_eplb.parallel.state_dict import to_local, to_logical, wait_for_all_ranks
from lightning_eplb.relocation.optimizer import has_rows


def install_optimizer_hooks(optimizer: Optimizer, model: nn.Module) -> None:
    """Make ``optimizer.state_dict()`` gather all experts' rows, and ``load_state_dict()`` keep this rank's.

    From then on all ranks must call both together, as they must with the state dict of the model.

    Args:
        optimizer: Holds parameters of ``model``.
        model: Converted by ``parallelize_experts``.
    """
    layer_of = {id(p): layer for layer, module in expert_layers(model) for p in module.parameters(recurse=False)}
    if getattr(optimizer, "_gathers_experts", False) or not any(layer.groups.size > 1 for layer in layer_of.values()):
        return

    def gather(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        wait_for_all_ranks(next(iter(layer_of.values())).groups, "state_dict() of an optimizer of parallel experts")
        state = dict(state_dict["state"])
        for index, layer in _expert_states(optimizer, layer_of, state_dict):
            gathered = dict(state[index])
            for key, value in sorted(gathered.items()):  # ranks that resumed may have the keys in another order
                rows = layer.num_logical_experts if isinstance(value, DTensor) else layer.num_primaries
                gathered[key] = to_logical(value, layer) if has_rows(value, rows) else value
            state[index] = gathered
        return {**state_dict, "state": state}

    def cut(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = dict(state_dict["state"])
        for index, layer in _expert_states(optimizer, layer_of, state_dict):
            state[index] = {
                key: to_local(value, layer, f"{key} of {layer.name}")
                if isinstance(value, Tensor) and value.ndim > 0
                else value
                for key, value in sorted(state[index].items())
            }
        return {**state_dict, "state": state}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(cut)
    optimizer._gathers_experts = True  # type: ignore[attr-defined]


def _expert_states(
    optimizer: Optimizer, layer_of: dict[int, ExpertLayer], state_dict: dict[str, Any]
) -> Iterable[tuple[Any, ExpertLayer]]:
    """The keys of expert parameters in a state dict: numbers or names, in the order of the parameters of all groups."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    keys = (key for group in state_dict["param_groups"] for key in group["params"])
    for key, parameter in zip(keys, parameters, strict=False):  # a dictionary that does not fit is refused by torch
        if key in state_dict["state"] and id(parameter) in layer_of:
            yield key, layer_of[id(parameter)]
