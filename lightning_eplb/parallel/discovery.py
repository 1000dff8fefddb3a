"""Discovery of expert modules by their structure, and checks that they can be distributed."""

import inspect
from collections.abc import Iterator

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from lightning_eplb import _compat
from lightning_eplb._validation import (
    check_divides,
    check_multiple,
    check_num_redundant,
    check_whole_numbers,
    max_redundant,
)
from lightning_eplb.parallel.per_expert_state import make_part

PROTOCOL = (
    "a module with an int attribute num_experts, whose forward takes (hidden, top_k_index, top_k_weights), and whose"
    " own parameters (at least one of three dimensions) all have num_experts rows"
)


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Find the modules that follow the protocol by their structure. Yield their names and modules."""
    for name, module in model.named_modules():
        if _why_not_experts(module) is None:
            yield name, module


def find_whole_experts(
    model: nn.Module, found: dict[str, nn.Module], size: int, num_redundant_experts: int
) -> dict[str, str]:
    """Find the expert modules that every rank keeps whole, though others are distributed over ``size`` ranks.

    These are modules of a frozen model within ``model``, such as a teacher, whose experts ranks can't share. Nothing is
    gained by an error: no gradient and no optimizer state of theirs would be distributed.

    Args:
        model: Model before its conversion.
        found: Its expert modules by name.
        size: Ranks that share the experts of a layer.
        num_redundant_experts: Redundant experts of each layer over these ranks.

    Returns:
        Reason for each module by its name. Empty if no model is trained.
    """
    trained = {name for name in found if _is_in_trained_model(model, name, found)}
    if size == 1 or not trained:
        return {}
    reasons = {
        name: _why_whole(name, module, size, num_redundant_experts)
        for name, module in found.items()
        if name not in trained
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _why_whole(name: str, module: nn.Module, size: int, num_redundant_experts: int) -> str:
    """Return why ranks can't share the experts of a module, or nothing."""
    num_experts = module.num_experts
    assert isinstance(num_experts, int)
    if num_experts % size:
        return f"num_experts={num_experts} can't be divided over {size} ranks"
    if num_redundant_experts > max_redundant(num_experts, size):
        return f"{size} ranks can't use num_redundant_experts={num_redundant_experts} with num_experts={num_experts}"
    try:
        _check_module(name, module)
    except ValueError as error:
        return str(error)
    return ""


def _is_in_trained_model(model: nn.Module, name: str, found: dict[str, nn.Module]) -> bool:
    """Return ``True`` if a parameter is trained in the outermost module around ``name`` with one number of experts.

    The whole module counts, since adapters may be trained while the experts are frozen.
    """
    path = name.split(".") if name else []
    for depth in range(len(path) + 1):
        outer = ".".join(path[:depth])
        inner = [module for other, module in found.items() if not outer or f"{other}.".startswith(f"{outer}.")]
        if len({module.num_experts for module in inner}) == 1:
            return any(parameter.requires_grad for parameter in model.get_submodule(outer).parameters())
    return True


def check_experts(model: nn.Module, found: dict[str, nn.Module], size: int, num_redundant_experts: int) -> None:
    """Raise ``ValueError`` unless the expert modules ``found`` in ``model`` can be distributed over ``size`` ranks."""
    if not found:
        raise ValueError(f"no MoE layer found in {type(model).__name__}: looked for {PROTOCOL}.{_near_misses(model)}")
    check_whole_numbers(num_redundant_experts=num_redundant_experts)
    check_multiple(num_redundant_experts, size, f"num_redundant_experts={num_redundant_experts}", f"ep_size={size}")
    whole = find_whole_experts(model, found, size, num_redundant_experts)
    found = {name: module for name, module in found.items() if name not in whole}
    first_of: dict[int, str] = {}
    for name, module in found.items():
        assert isinstance(module.num_experts, int)
        first_of.setdefault(module.num_experts, name)
    for num_experts, name in first_of.items():
        of_layer = f" of {name}" if len(first_of) > 1 else ""
        check_divides(size, num_experts, f"ep_size={size}", f"the {num_experts} experts of {name}")
        if size > 1:
            named = f"num_redundant_experts={num_redundant_experts}"
            check_num_redundant(num_redundant_experts, num_experts, size, named, f"ep_size={size}{of_layer}")
    owners: dict[int, str] = {}
    for name, module in found.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{parameter_name}"
            if id(parameter) in owners:
                raise ValueError(
                    f"{full_name} is the same parameter as {owners[id(parameter)]};"
                    " layers that share experts are not supported"
                )
            owners[id(parameter)] = full_name
    if size > 1:
        _check_owners(model, found)
        for name, module in found.items():
            _check_module(name, module)


def _check_owners(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Reject wrappers that use the parameters of all experts, since they would miss rows on other ranks."""
    experts = {id(module): name for name, module in found.items()}
    for name, module in model.named_modules():
        if type(getattr(module, "num_experts", None)) is int and is_parametrized(module):
            raise ValueError(_computed(name, next(iter(module.parametrizations)), "a parametrization"))  # type: ignore
        inner = next((experts[id(child)] for child in module.children() if id(child) in experts), None)
        if inner is not None and hasattr(module, "base_layer"):
            raise ValueError(
                f"{inner} is wrapped in a {type(module).__name__}, an adapter for the weights of all experts, which is"
                " not supported with expert parallelism. Leave experts out of PEFT's target_parameters, and name the"
                " modules to adapt instead of target_modules='all-linear', which includes experts."
            )
        if isinstance(module, AveragedModel) and any(id(child) in experts for child in module.modules()):
            raise ValueError(
                f"{name or 'the model'} is an AveragedModel: it averages the rows of experts by their position,"
                " which changes. Average what state_dict() returns instead."
            )


def _check_module(name: str, module: nn.Module) -> None:
    """Reject a module whose parameters, or whose forward, differ from those of its class."""
    if "forward" in vars(module):
        raise ValueError(
            f"{name}.forward was replaced on the module itself, and expert parallelism calls that of"
            f" {type(module).__name__}. Put the new forward into a subclass, or undo it with del {name}.forward."
        )
    for hook in _compat.forward_pre_hooks(module):
        if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm):
            raise ValueError(_computed(name, _compat.pruned_tensor(hook), type(hook).__name__))
    for parameter_name, parameter in module.named_parameters(recurse=False):
        is_quantized = _compat.is_tensor_wrapper(parameter) or hasattr(parameter, "quant_state")
        if is_quantized and not isinstance(parameter, DTensor):
            raise ValueError(
                f"{name}.{parameter_name} is a {type(parameter).__name__}, whose rows can't be moved between ranks."
                " Leave experts out of quantization, or hold them in plain tensors of integers and scales."
            )
    number = module.num_experts
    part = make_part(module, type(module), {}, (), [0])
    if (found := part.num_experts) != 1:
        raise ValueError(
            f"{name}.num_experts is {found} also where the module is to compute 1 of its {number} experts. Make it an"
            " attribute that is set in __init__, not a property."
        )


def _computed(name: str, parameter: str, by: str) -> str:
    return (
        f"{name}.{parameter} is computed in each forward, by {by}, from the weights of all experts, which is not"
        " supported with expert parallelism. Make it a plain parameter first (torch.nn.utils.prune.remove,"
        " torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm)."
    )


def _why_not_experts(module: nn.Module) -> str | None:
    num_experts = getattr(module, "num_experts", None)
    if type(num_experts) is not int or num_experts < 1:
        return "no int attribute num_experts"
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return "no parameters of its own"
    for name, parameter in own.items():
        if parameter.ndim == 0 or parameter.shape[0] != num_experts:
            return f"{name} has shape {list(parameter.shape)}, not {num_experts} rows"
    if max(parameter.ndim for parameter in own.values()) < 3:
        return "no parameter of three dimensions"
    arguments = list(inspect.signature(type(module).forward).parameters.values())[1:]
    positional = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 3 or any(a.default is a.empty for a in positional[3:]):
        return f"forward takes ({', '.join(a.name for a in arguments)})"
    return None


def _near_misses(model: nn.Module) -> str:
    lines = [
        f"\n  {name or 'the model itself'} ({type(module).__name__}): {_why_not_experts(module)}"
        for name, module in model.named_modules()
        if type(getattr(module, "num_experts", None)) is int or "expert" in type(module).__name__.lower()
    ]
    more = [f"\n  and {len(lines) - 8} more"] if len(lines) > 8 else []
    return " Not converted:" + "".join(lines[:8] + more) if lines else ""
