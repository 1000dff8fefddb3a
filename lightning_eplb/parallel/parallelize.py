"""Distribute the experts of a model over ranks, in place."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_eplb._validation import check_switches
from lightning_eplb.parallel.discovery import check_experts, find_experts, find_whole_experts
from lightning_eplb.parallel.dispatch import TokenDispatcher, check_dispatcher
from lightning_eplb.parallel.dtensor import EP, check_mesh, distribute_rows
from lightning_eplb.parallel.expert_data_parallel import ExpertGradientSync
from lightning_eplb.parallel.expert_layer import ExpertLayer, LayerContext
from lightning_eplb.parallel.forward import ParallelExperts
from lightning_eplb.parallel.fused_choice import choose
from lightning_eplb.parallel.gradient_hooks import NOT_UNDER_FSDP, check_unhooked
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.per_expert_state import PerExpertState
from lightning_eplb.parallel.per_expert_trial import find_per_expert_state
from lightning_eplb.parallel.protocol_check import check_protocol
from lightning_eplb.parallel.state_dict import install_state_dict_hooks
from lightning_eplb.placement import ExpertPlacement


def parallelize_experts(
    model: nn.Module,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    num_redundant_experts: int = 0,
    dispatcher: type[TokenDispatcher] | None = None,
    fused_experts: bool | None = None,
) -> nn.Module:
    """Distribute the experts of every MoE layer over the ranks of a group, in place. Every rank must call it.

    Afterwards each rank holds ``L/R`` experts of each layer as its parameters. The forward pass dispatches tokens to
    the ranks of their experts and combines the outputs. Outputs and gradients are those of the unmodified model.
    If ``R`` does not divide ``L``, parameters of every rank have ``ceil(L/R)`` rows: behind the experts are phantom
    experts, rows of zeros that get no token and are in no state dict.
    Modules, parameters and state-dict keys keep their names. ``state_dict()`` gathers all experts in the model's own
    order, and ``load_state_dict()`` selects this rank's, so that every rank must call them. As under DDP, all ranks
    start from rank 0's weights. Expert gradients are averaged over the losses of the ranks, so these parameters must be
    kept out of ``DistributedDataParallel``. ``EPLBCallback`` does so. In a loop of your own call
    :func:`~lightning_eplb.leave_experts_out_of_ddp` before you wrap the model.

    ``named_parameters()`` has this rank's experts only, in the order of the placement. A checkpoint, an average or a
    norm that is built from it misses the experts of other ranks, without a warning. Use ``state_dict()`` or
    :func:`~lightning_eplb.logical_parameters` for all of them, and :func:`~lightning_eplb.clip_grad_norm_` to clip.

    Gradient hooks on expert parameters (``register_hook``, ``register_post_accumulate_grad_hook``), registered before
    or after, get the gradient that one process would have: of all experts in logical order, ``[L, ...]``, averaged over
    EP groups. This rank keeps its own rows of the result. All ranks must register the same hooks, and gather the
    gradient for each. A hook that uses weights raises a ``ValueError`` in the backward pass. Hooks are not supported on
    a mesh, for FSDP2.

    If no rank has a token for a layer, its experts have no gradient, or one of zeros, as in the unmodified module. With
    several EP groups it is always zeros. DDP communication hooks must average: use torch's own, or none.

    A module is converted if it follows the protocol of Hugging Face's MoE models (transformers 5):

    1. It has an int attribute ``num_experts``, which its forward reads for the number of experts.
    2. Its own parameters, biases too, have the expert as dimension 0. Parameters of its submodules, such as a norm
       after the experts, are shared by all experts and stay on every rank.
    3. ``forward(hidden [T, D], top_k_index [T, K], top_k_weights [T, K])`` returns ``[T, D]``: for each token the sum
       over its K experts of weight times expert output. It is linear in the weights and independent of other tokens.
    4. Ids outside ``0 ... num_experts - 1``, as routers emit them (``num_experts`` or -1), mean no expert.

    On several ranks a small clone of each kind of layer runs on random weights and tokens before anything is changed. A
    module whose forward computes something else is not supported, and raises an error.

    Forward may take extra arguments, by position or name. A tensor whose first dimension is the number of tokens has a
    row for each token. It is dispatched with the tokens and gets a gradient. All else is passed on and must be the
    same on all ranks: numbers, strings, ``None``, modules, functions, other tensors. The gradient of such a tensor is
    that of the tokens that a rank computes: average it over ranks, like those of parameters. If shapes don't tell, set
    a class attribute ``token_arguments`` to the names of the arguments that have a row for each token.

    A module may hold other state with an element for each expert, on dimension 0 or in order: buffers, tensors, lists,
    dictionaries, ``nn.ModuleList`` and the like. It stays whole on every rank, and ``forward`` gets the elements of the
    experts that it computes. Forward may add to such a buffer, such as a counter of tokens. Every rank then has the sum
    over all ranks. At conversion a trial with random values finds the state that ``forward`` uses this way. Other uses
    by expert, and other changes, raise an error. An element of an ``nn.ModuleList`` whose expert got no token has a
    gradient of zeros where one process has none.

    Layers may have different numbers of experts. A frozen model within ``model``, such as a teacher, is distributed
    too. If ranks can't share its experts, every rank keeps it whole, and only its load is counted.

    Rows of a parameter are this rank's experts from then on, in any order. Code that indexes rows by expert, such as an
    initialization, a mask or a log, must run before, or use what ``state_dict()`` returns.

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
        model: Model on any device, before its optimizer is created. A model that is converted already stays as it is.
        group: Ranks that share the experts of a layer. Defaults to all ranks. Groups of different ranks must be equally
            large and cover all ranks (``torch.distributed.new_subgroups``). For FSDP2 a mesh with a dimension ``ep``,
            such as that of ``ExpertParallelStrategy``: parameters become DTensors over it, ready for ``fully_shard``,
            which must average their gradients over the other ranks, see
            :func:`~lightning_eplb.parallel.fully_shard.fully_shard_moe`.
        num_redundant_experts: Redundant slots of a layer over all ranks of the group, a multiple of its size. Defaults
            to 0.
        dispatcher: Class of the layers' token dispatchers, a subclass of
            :class:`~lightning_eplb.parallel.dispatch.TokenDispatcher`. Defaults to the fastest that runs on the tokens'
            device: see :mod:`~lightning_eplb.parallel.direct_dispatch`.
        fused_experts: Compute experts by fused kernels, where a module has a form that they know. ``None``: over
            several ranks, on a GPU, in bfloat16 or float16, in place of transformers' ``grouped_mm``. ``True``: also
            on one rank, in any dtype, and in place of ``eager`` and ``batched_mm``. ``False``: never.
            Defaults to ``None``.

    Returns:
        ``model``.

    Raises:
        TypeError: ``dispatcher`` is no subclass of ``TokenDispatcher``, or lacks some of its methods.
        ValueError: An argument is not valid, no MoE layer was found, there are more ranks than experts, or
            a module is not supported: its forward was replaced or breaks the protocol, its parameters are
            pruned, parametrized or quantized, or ``group`` is a mesh and an expert parameter has a gradient hook. All
            ranks raise it, before any communication.
    """
    if fused_experts is not None:
        check_switches(fused_experts=fused_experts)
    if any(expert_layers(model)):
        return model
    if dispatcher is not None:
        check_dispatcher(dispatcher)
    mesh = None
    if isinstance(group, DeviceMesh):
        check_mesh(group, model, dist.get_world_size())
        mesh, group = group[EP], group[EP].get_group()
    all_found = dict(find_experts(model))
    size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    check_experts(model, all_found, size, num_redundant_experts)
    whole = find_whole_experts(model, all_found, size, num_redundant_experts)
    found = {name: module for name, module in all_found.items() if name not in whole}
    if mesh is not None and size > 1:
        for name, module in found.items():
            check_unhooked(module, name, NOT_UNDER_FSDP)
    per_expert = {name: find_per_expert_state(name, module) for name, module in found.items() if size > 1}
    first_choice_only = check_protocol(found) if size > 1 else set()
    groups = ExpertGroups.create(group)
    gradient_sync = ExpertGradientSync(groups) if groups.edp_group is not None and mesh is None else None
    context = LayerContext(groups, dispatcher, gradient_sync)
    choices = choose(found.values(), fused_experts, size)
    for index, (name, module) in enumerate(found.items()):
        state = per_expert.get(name, PerExpertState())
        layer = ExpertLayer(index, name, module, context, state, name in first_choice_only)
        layer.set_fused_choice(choices[index])
        _convert(module, layer, ExpertPlacement.initial(1, layer.num_logical_experts, size, num_redundant_experts))
        if mesh is not None and size > 1:
            distribute_rows(module, mesh)
    for name in whole:
        _watch(all_found[name], name, groups)
    if whole:
        name, reason = next(iter(whole.items()))
        others = f", and {len(whole) - 1} more of frozen models" if len(whole) > 1 else ""
        rank_zero_info(f"{name} is frozen and stays whole on every rank{others}: {reason}")
    return model


def set_fused_experts(model: nn.Module, setting: bool | None) -> None:
    """Change the argument ``fused_experts`` of a model that is converted already. The same on all ranks."""
    layers = list(expert_layers(model))
    for layer, module in layers:
        if layer.fused_choice.setting is not setting:
            layer.set_fused_choice(*choose([module], setting, layer.groups.size))


class ConvertedExperts(NamedTuple):
    """Converted expert module and its state."""

    layer: ExpertLayer
    module: nn.Module

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Expert parameters of this rank by name, ``[n, ...]`` each."""
        named = self.module.named_parameters(recurse=False)
        return {f"{self.layer.name}.{name}": parameter for name, parameter in named}


def expert_layers(model: nn.Module) -> Iterator[ConvertedExperts]:
    """Yield every expert module in ``model`` that was distributed, in the order of layers."""
    return (experts for experts in converted_experts(model) if not experts.layer.is_whole)


def converted_experts(model: nn.Module) -> Iterator[ConvertedExperts]:
    """Yield every converted expert module in ``model``, also those that stayed whole while others were distributed."""
    for module in model.modules():
        if isinstance(module, ParallelExperts):
            yield ConvertedExperts(module.expert_layer, module)


def layers_by_parameter(model: nn.Module) -> dict[int, ExpertLayer]:
    """Return the expert layer of each expert parameter in ``model``, by the parameter's ``id``."""
    return {
        id(parameter): layer for layer, module in expert_layers(model) for parameter in module.parameters(recurse=False)
    }


def _watch(module: nn.Module, name: str, groups: ExpertGroups) -> None:
    """Count the load of a module that stays whole."""
    alone = ExpertGroups(num_ep_groups=groups.world_size, cpu_group=groups.cpu_group)
    layer = ExpertLayer(0, name, module, LayerContext(alone), PerExpertState(), False)
    layer.is_whole = True
    _convert(module, layer, ExpertPlacement.initial(1, layer.num_logical_experts, 1))


def make_parallel(module: nn.Module, layer: ExpertLayer, placement: ExpertPlacement) -> None:
    """Make ``module`` compute with the experts of all ranks. Its parameters must get their rows yet."""
    layer.set_placement(placement)
    module.expert_layer = layer  # type: ignore[assignment]
    module.__class__ = _parallel_class(layer.original_class)
    if layer.groups.size > 1:
        install_state_dict_hooks(module)


def _convert(module: nn.Module, layer: ExpertLayer, placement: ExpertPlacement) -> None:
    make_parallel(module, layer, placement)
    if layer.groups.size == 1:
        return
    for parameter in module.parameters(recurse=False):
        _keep_rows(parameter, layer)
    broadcast_per_expert_state(module, layer)


def broadcast_per_expert_state(module: nn.Module, layer: ExpertLayer) -> None:
    """Broadcast rank 0's tensors with an element for each expert, other than parameters. Collective."""
    for name in layer.per_expert.attributes:
        if isinstance(value := getattr(module, name), Tensor) and not value.is_meta:
            _broadcast(value, layer.groups)


@functools.cache
def _parallel_class(original: type[nn.Module]) -> type[nn.Module]:
    """Return one class for all layers, since ``torch.compile`` compiles once for each class."""
    return type(f"Parallel{original.__name__}", (ParallelExperts, original), {"__doc__": None})


def _keep_rows(parameter: nn.Parameter, layer: ExpertLayer) -> None:
    with torch.no_grad():
        if not parameter.is_meta:
            _broadcast(parameter.data, layer.groups)
        parameter.data = layer.select_rows(parameter.data)


def _broadcast(tensor: Tensor, groups: ExpertGroups) -> None:
    """Broadcast the tensor of rank 0 to all ranks, in place."""
    assert groups.cpu_group is not None
    words = tensor.contiguous().view(torch.uint8)  # gloo does not know all dtypes
    dist.broadcast(words, src=0, group=groups.cpu_group)
    tensor.copy_(words.view(tensor.dtype))
