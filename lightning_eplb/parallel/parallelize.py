"""Distribute the experts of a model over ranks, in place."""

import functools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_eplb.parallel.discovery import check_experts, find_experts
from lightning_eplb.parallel.dispatch import TokenDispatcher
from lightning_eplb.parallel.dtensor import EP, check_mesh, distribute_rows
from lightning_eplb.parallel.experts import ExpertLayer, LayerContext
from lightning_eplb.parallel.forward import ParallelExperts
from lightning_eplb.parallel.gradient_hooks import NOT_UNDER_FSDP, check_unhooked
from lightning_eplb.parallel.gradient_sync import ExpertGradientSync
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.per_expert_state import PerExpertState
from lightning_eplb.parallel.per_expert_trial import find_per_expert_state
from lightning_eplb.parallel.protocol_trial import check_protocol
from lightning_eplb.parallel.state_dict import install_state_dict_hooks
from lightning_eplb.placement import ExpertPlacement


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
    per_expert = {name: find_per_expert_state(name, module) for name, module in found.items() if size > 1}
    first_choice_only = check_protocol(found) if size > 1 else set()
    groups = ExpertGroups.create(group)
    num_experts = next(iter(found.values())).num_experts
    assert isinstance(num_experts, int)
    placement = ExpertPlacement.initial(len(found), num_experts, size, num_redundant_experts)
    gradient_sync = ExpertGradientSync(groups) if groups.edp_group is not None and mesh is None else None
    context = LayerContext(groups, dispatcher, gradient_sync)
    for index, (name, module) in enumerate(found.items()):
        state = per_expert.get(name, PerExpertState())
        _convert(module, ExpertLayer(index, name, module, context, state, name in first_choice_only), placement)
        if mesh is not None and size > 1:
            distribute_rows(module, mesh)
    return model


def expert_layers(model: nn.Module) -> Iterator[tuple[ExpertLayer, nn.Module]]:
    """Yield the state and the module of every converted expert module in ``model``, in the order of layers."""
    for module in model.modules():
        if isinstance(module, ParallelExperts):
            yield module.expert_layer, module


def _convert(module: nn.Module, layer: ExpertLayer, placement: ExpertPlacement) -> None:
    layer.set_placement(placement)
    module.expert_layer = layer  # type: ignore[assignment]
    module.__class__ = _parallel_class(layer.original_class)
    if layer.groups.size == 1:
        return
    for parameter in module.parameters(recurse=False):
        _keep_rows(parameter, layer.local_experts, layer.groups)
    for name in layer.per_expert.attributes:
        if isinstance(value := getattr(module, name), Tensor) and not value.is_meta:
            _broadcast(value, layer.groups)
    install_state_dict_hooks(module)


@functools.cache
def _parallel_class(original: type[nn.Module]) -> type[nn.Module]:
    """Return one class for all layers, since ``torch.compile`` compiles once for each class."""
    return type(f"Parallel{original.__name__}", (ParallelExperts, original), {"__doc__": None})


def _keep_rows(parameter: nn.Parameter, rows: Tensor, groups: ExpertGroups) -> None:
    with torch.no_grad():
        if not parameter.is_meta:
            _broadcast(parameter.data, groups)
        parameter.data = parameter.data[rows.to(parameter.device)]


def _broadcast(tensor: Tensor, groups: ExpertGroups) -> None:
    """Broadcast the tensor of rank 0 to all ranks, in place."""
    assert groups.cpu_group is not None
    words = tensor.contiguous().view(torch.uint8)  # gloo does not know all dtypes
    dist.broadcast(words, src=0, group=groups.cpu_group)
    tensor.copy_(words.view(tensor.dtype))
