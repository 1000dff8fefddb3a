"""Find expert modules by their structure and spread their experts over ranks, in place."""

import functools
import inspect
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.optim.swa_utils import AveragedModel

from lightning_eplb import _compat
from lightning_eplb._validation import check_divides, check_multiple, check_whole_numbers
from lightning_eplb.parallel.ahead import CopiesAhead
from lightning_eplb.parallel.dispatch import TokenDispatcher
from lightning_eplb.parallel.experts import ExpertLayer, ParallelExperts
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.hooks import NOT_UNDER_FSDP, check_unhooked
from lightning_eplb.parallel.per_expert import find_per_expert, part_of
from lightning_eplb.parallel.replicas import ReplicaAverage
from lightning_eplb.parallel.shards import EP, check_mesh, spread_rows
from lightning_eplb.parallel.state_dict import install_state_dict_hooks
from lightning_eplb.parallel.trial import check_protocol
from lightning_eplb.placement import ExpertPlacement

PROTOCOL = (
    "a module with an int attribute num_experts, whose forward takes (hidden, top_k_index, top_k_weights), and whose"
    " own parameters (at least one of three dimensions) all have num_experts rows"
)


def parallelize_experts(
    model: nn.Module,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    num_redundant_experts: int = 0,
    dispatcher: type[TokenDispatcher] = TokenDispatcher,
) -> nn.Module:
    """Spread the experts of every MoE layer over the ranks of a group, in place. Every rank must call it.

    Afterwards rank ``r`` holds ``L/R`` experts of each layer as its parameters, and the forward pass sends tokens to
    the ranks of their experts and back: the outputs and the gradients are those of the unmodified model. Modules,
    parameters and state-dict keys keep their names; ``state_dict()`` gathers all experts in the model's own order, and
    ``load_state_dict()`` cuts them, so both speak of the unmodified model and every rank must call them. Like DDP,
    it starts from rank 0's weights. Gradients of experts are averaged over the losses of the ranks, so these
    parameters must be kept out of ``DistributedDataParallel`` (``EPLBCallback`` does; in a loop of your own call
    :func:`~lightning_eplb.leave_experts_out_of_ddp` before you wrap the model).

    ``named_parameters()`` has this rank's experts only, in the order of the placement: a checkpoint, an average or a
    norm that is built from it lacks the experts of other ranks, and nothing warns of that. Use ``state_dict()``, or
    :func:`~lightning_eplb.logical_parameters`, which returns all of them; to clip,
    :func:`~lightning_eplb.clip_grad_norm_`.

    Gradient hooks on expert parameters, ``register_hook`` and ``register_post_accumulate_grad_hook``, registered before
    or after, run on what one process would have: the gradient of all experts in logical order, ``[L, ...]``, averaged
    over EP groups; this rank keeps its own rows. All ranks must register the same, and gather the gradient for each. A
    hook can't use weights (a ``ValueError`` in the backward pass), and there can be none on a mesh, for FSDP2.

    Where a layer gets no token on any rank, experts have no gradient, or one of zeros, as in the unmodified module.
    With several EP groups it is always zeros. DDP communication hooks must average: torch's own, or none.

    Any module is converted that follows the protocol of Hugging Face's MoE models (transformers 5):

    1. it has an int attribute ``num_experts``, which its forward reads when it needs the number of experts;
    2. its own parameters, biases too, have the expert as dimension 0; those of its submodules, such as a norm behind
       the experts, are shared by all experts and stay on every rank;
    3. ``forward(hidden [T, D], top_k_index [T, K], top_k_weights [T, K])`` returns ``[T, D]``, each token's sum over
       its K experts of weight times expert output: linear in the weights, every token by itself;
    4. ids that are no expert's, ``num_experts`` or -1 as routers emit them, mean no expert.

    On several ranks a small clone of each kind of layer is tried with random weights and tokens before anything is
    changed, and a module whose forward computes something else is refused. Forward may take further arguments, by
    position or name. A tensor whose first dimension is the number of tokens has a row for each token and is dispatched
    with it; gradients flow back. All else is passed on, and must be the same on all ranks: numbers, strings, ``None``,
    modules, functions, other tensors. The gradient of such a tensor is that of the tokens that a rank computes; the
    mean over ranks, as of the model's parameters, is right. Where shapes don't tell, a class attribute
    ``token_arguments`` names the arguments that have a row for each token.

    It may hold more with an element for each expert, on dimension 0 or in order: buffers, tensors, lists, dictionaries,
    ``nn.ModuleList`` and its like. These stay whole on every rank, and ``forward`` gets the elements of the experts
    that it computes. It may add to such a buffer what each token brings (a counter): every rank then has the sum over
    all. A trial with random values tells, at conversion, which of them ``forward`` uses so; what it uses otherwise by
    expert, or changes otherwise, is refused. An element of an ``nn.ModuleList`` whose expert got no token has a zero
    gradient where one process has none.

    From then on a parameter's rows are this rank's experts, in any order. Code of your own that indexes rows by expert
    (an initialization, a mask, a log) must run before, or on what ``state_dict()`` returns.

    Example::

        class Experts(nn.Module):
            def __init__(self, num_experts, width, hidden):
                super().__init__()
                self.num_experts = num_experts
                self.up = nn.Parameter(torch.randn(num_experts, width, hidden) / width**0.5)
                self.down = nn.Parameter(torch.randn(num_experts, hidden, width) / hidden**0.5)

            def forward(self, hidden_states, top_k_index, top_k_weights):
                output = torch.zeros_like(hidden_states)
                for expert in top_k_index.unique():
                    token, k = torch.where(top_k_index == expert)
                    expert_output = F.relu(hidden_states[token] @ self.up[expert]) @ self.down[expert]
                    output = output.index_add(0, token, expert_output * top_k_weights[token, k, None])
                return output

    Args:
        model: The model, on any device, before its optimizer is made. Modules that were converted before stay as they
            are.
        group: The ranks that share the experts of a layer; ``None`` for all. Groups of different ranks must be equally
            large and cover all ranks (``torch.distributed.new_subgroups``). For FSDP2 a mesh with a dimension ``ep``,
            as ``ExpertParallelStrategy`` makes it: parameters become DTensors over it, ready for ``fully_shard``, which
            must then average their gradients over the other ranks (see
            :func:`~lightning_eplb.parallel.fully_shard.fully_shard_moe`).
        num_redundant_experts: Redundant slots of a layer over all ranks of the group; a multiple of its size.
        dispatcher: What exchanges the tokens, one for each layer: a subclass of
            :class:`~lightning_eplb.parallel.dispatch.TokenDispatcher` for a library or a network of your own.

    Returns:
        ``model``.

    Raises:
        ValueError: No MoE layer was found, the numbers of experts don't divide by the group's size, layers differ, or
            a module's experts can't be told apart: its forward was replaced, or computes something else than the
            protocol says, its parameters are pruned, parametrized or quantized, or see above; or ``group`` is a mesh
            and an expert parameter has a gradient hook. All ranks raise it, before any communication.
    """
    if any(expert_layers(model)):
        return model
    mesh = None
    if isinstance(group, DeviceMesh):
        check_mesh(group, model, dist.get_world_size())
        mesh, group = group[EP], group[EP].get_group()
    found = dict(find_experts(model))
    size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    check_experts(model, found, size, num_redundant_experts)
    if mesh is not None and size > 1:
        for name, module in found.items():
            check_unhooked(module, name, NOT_UNDER_FSDP)
    per_expert = {name: find_per_expert(name, module) for name, module in found.items() if size > 1}
    of_one_choice = check_protocol(found) if size > 1 else set()
    groups = ExpertGroups.create(group)
    num_experts = next(iter(found.values())).num_experts
    assert isinstance(num_experts, int)
    placement = ExpertPlacement.initial(len(found), num_experts, size, num_redundant_experts)
    average = ReplicaAverage(groups) if groups.replicas is not None and mesh is None else None
    ahead = CopiesAhead()
    for index, (name, module) in enumerate(found.items()):
        layer = ExpertLayer(index, name, module, groups, average, dispatcher, ahead)
        layer.takes_one_choice = name in of_one_choice
        layer.per_expert = per_expert.get(name, layer.per_expert)
        _convert(module, layer, placement)
        if mesh is not None and size > 1:
            spread_rows(module, mesh)
    return model


def expert_layers(model: nn.Module) -> Iterator[tuple[ExpertLayer, nn.Module]]:
    """The converted expert modules in ``model``, in the order of layers, each with what it knows."""
    for module in model.modules():
        if isinstance(module, ParallelExperts):
            yield module.expert_layer, module


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that follow the protocol, with their names; found by structure, whatever they are called.

    Those of a frozen model within ``model``, such as a teacher, are left out where they have another number of experts
    than those of the model that is trained: they stay whole.
    """
    found = {name: module for name, module in model.named_modules() if _why_not_experts(module) is None}
    trained = {name for name in found if _is_in_trained_model(model, name, found)}
    numbers = {found[name].num_experts for name in trained}
    for name, module in found.items():
        if name in trained or not numbers or module.num_experts in numbers:
            yield name, module


def _is_in_trained_model(model: nn.Module, name: str, found: dict[str, nn.Module]) -> bool:
    """Whether any parameter is trained in the outermost module around ``name`` whose layers have one number of experts.

    In that module, as adapters may be trained and the experts themselves not.
    """
    path = name.split(".") if name else []
    for depth in range(len(path) + 1):
        outer = ".".join(path[:depth])
        inner = [module for other, module in found.items() if not outer or f"{other}.".startswith(f"{outer}.")]
        if len({module.num_experts for module in inner}) == 1:
            return any(parameter.requires_grad for parameter in model.get_submodule(outer).parameters())
    return True


def check_experts(model: nn.Module, found: dict[str, nn.Module], size: int, num_redundant_experts: int) -> None:
    """Raise ``ValueError`` unless the expert modules ``found`` in ``model`` can be spread over ``size`` ranks."""
    if not found:
        raise ValueError(f"no MoE layer found in {type(model).__name__}: looked for {PROTOCOL}.{_near_misses(model)}")
    numbers = {name: module.num_experts for name, module in found.items()}
    if len(set(numbers.values())) > 1:
        raise ValueError(f"the MoE layers of a model must have one number of experts; found {numbers}")
    num_experts = next(iter(numbers.values()))
    assert isinstance(num_experts, int)
    check_divides(size, num_experts, f"ep_size={size}", f"the {num_experts} experts of {next(iter(found))}")
    check_whole_numbers(num_redundant_experts=num_redundant_experts)
    check_multiple(num_redundant_experts, size, f"num_redundant_experts={num_redundant_experts}", f"ep_size={size}")
    others = num_experts - num_experts // size
    if size > 1 and num_redundant_experts > others * size:
        raise ValueError(
            f"num_redundant_experts={num_redundant_experts} is more than {size} ranks can use: each has"
            f" {num_experts // size} of the {num_experts} experts, and could hold a copy of every other with"
            f" {others * size}"
        )
    owners: dict[int, str] = {}
    for name, module in found.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{parameter_name}"
            if id(parameter) in owners:
                raise ValueError(
                    f"{full_name} is the same parameter as {owners[id(parameter)]};"
                    " layers that share experts can't be spread over ranks"
                )
            owners[id(parameter)] = full_name
    if size > 1:
        _check_owners(model, found)
        for name, module in found.items():
            _check_module(name, module)


def _check_owners(model: nn.Module, found: dict[str, nn.Module]) -> None:
    """Refuse what reads the experts' parameters by its own count of them: it would not see that rows are elsewhere."""
    experts = {id(module): name for name, module in found.items()}
    for name, module in model.named_modules():
        if type(getattr(module, "num_experts", None)) is int and is_parametrized(module):
            raise ValueError(_computed(name, next(iter(module.parametrizations)), "a parametrization"))  # type: ignore
        inner = next((experts[id(child)] for child in module.children() if id(child) in experts), None)
        if inner is not None and hasattr(module, "base_layer"):
            raise ValueError(
                f"{inner} is wrapped in a {type(module).__name__}, an adapter for the weights of all experts, and these"
                " are to be spread over ranks; leave experts out of PEFT's target_parameters, and name the modules to"
                " adapt in the place of target_modules='all-linear', which takes experts, too"
            )
        if isinstance(module, AveragedModel) and any(id(child) in experts for child in module.modules()):
            raise ValueError(
                f"{name or 'the model'} is an AveragedModel: it averages the rows of experts by the place where they"
                " are, and they move; average what state_dict() returns instead"
            )


def _check_module(name: str, module: nn.Module) -> None:
    """Refuse a module whose parameters, or whose forward, are not what its class says."""
    if "forward" in vars(module):
        raise ValueError(
            f"{name}.forward was replaced on the module itself, and experts that are spread over ranks call that of"
            f" {type(module).__name__}; put the new forward into a subclass, or undo it with del {name}.forward"
        )
    for hook in _compat.forward_pre_hooks(module):
        if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm):
            raise ValueError(_computed(name, _compat.pruned_tensor(hook), type(hook).__name__))
    for parameter_name, parameter in module.named_parameters(recurse=False):
        is_quantized = _compat.is_tensor_wrapper(parameter) or hasattr(parameter, "quant_state")
        if is_quantized and not isinstance(parameter, DTensor):
            raise ValueError(
                f"{name}.{parameter_name} is a {type(parameter).__name__}, whose rows can't be moved between ranks as"
                " they are; leave experts out of quantization, or hold them in plain tensors, of integers and scales"
            )
    number = module.num_experts
    part = part_of(module, type(module), {}, (), [0])
    if (found := part.num_experts) != 1:
        raise ValueError(
            f"{name}.num_experts is {found} also where the module is to compute 1 of its {number} experts; make it an"
            " attribute that is set in __init__, not a property"
        )


def _computed(name: str, parameter: str, by: str) -> str:
    return (
        f"{name}.{parameter} is computed in each forward, by {by}, from what all experts have, and experts are to be"
        " spread over ranks; make it a plain parameter before (torch.nn.utils.prune.remove,"
        " torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm)"
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


def _convert(module: nn.Module, layer: ExpertLayer, placement: ExpertPlacement) -> None:
    layer.set_placement(placement)
    module.expert_layer = layer  # type: ignore[assignment]
    module.__class__ = _class_over_ranks(layer.original_class)
    if layer.groups.size == 1:
        return
    for parameter in module.parameters(recurse=False):
        _keep_rows(parameter, layer.local_experts, layer.groups)
    for name in layer.per_expert.taken:
        if isinstance(value := getattr(module, name), Tensor) and not value.is_meta:
            _share(value, layer.groups)
    install_state_dict_hooks(module)


@functools.cache
def _class_over_ranks(original: type[nn.Module]) -> type[nn.Module]:
    """One for all layers: ``torch.compile`` compiles anew for each class that it meets."""
    return type(f"Parallel{original.__name__}", (ParallelExperts, original), {"__doc__": None})


def _keep_rows(parameter: nn.Parameter, rows: Tensor, groups: ExpertGroups) -> None:
    with torch.no_grad():
        if not parameter.is_meta:
            _share(parameter.data, groups)
        parameter.data = parameter.data[rows.to(parameter.device)]


def _share(tensor: Tensor, groups: ExpertGroups) -> None:
    """Give all ranks the tensor of rank 0."""
    assert groups.control is not None
    words = tensor.contiguous().view(torch.uint8)  # gloo does not know all dtypes
    dist.broadcast(words, src=0, group=groups.control)
    tensor.copy_(words.view(tensor.dtype))
