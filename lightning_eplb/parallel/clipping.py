"""Gradient clipping by one global norm, in which every logical expert counts once, and by value."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from lightning_eplb.parallel.dtensor import local_shard
from lightning_eplb.parallel.flat_parameters import shard_groups
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.parallelize import expert_layers


def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    parameters: Iterable[Tensor] | None = None,
) -> Tensor:
    """Clip gradients in place by the norm of the whole model, experts of all ranks included. Every rank must call it.

    The counterpart of ``torch.nn.utils.clip_grad_norm_``, which sees this rank's experts only: each rank would scale
    its gradients by another factor, and parameters that are to be the same on all ranks would drift apart. For loops
    without Lightning's ``Trainer``, where ``Trainer(gradient_clip_val=...)`` does the same.

    Example::

        loss.backward()
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        balancer.step()

    Args:
        model: Converted by ``parallelize_experts``, or any other; plain, or wrapped in ``DistributedDataParallel``, by
            FSDP1, by FSDP2 or by Fabric. Gradients are averaged over the ranks already, and unscaled.
        max_norm: Greatest norm that stays as it is.
        norm_type: 2.0; no other is supported.
        error_if_nonfinite: Raise where the norm is infinite or NaN. Defaults to ``False``.
        parameters: Those to clip, the same on all ranks, such as one optimizer's. Defaults to all of ``model``.

    Returns:
        Norm before clipping, a scalar, the same on every rank.

    Raises:
        ValueError: ``norm_type`` is not 2.
        RuntimeError: The norm is not finite, with ``error_if_nonfinite``. All ranks raise it; nothing was clipped.
    """
    if norm_type != 2:
        raise ValueError(f"norm_type={norm_type} is not supported where experts are on several ranks. Use 2.0.")
    layers = list(expert_layers(model))
    experts = [parameter for _, module in layers for parameter in module.parameters(recurse=False)]
    groups = layers[0][0].groups if layers else ExpertGroups()
    clipped = model.parameters() if parameters is None else parameters
    return clip_by_norm_of_all_(clipped, max_norm, experts, groups, shard_groups(model), error_if_nonfinite)


def clip_by_norm_of_all_(
    parameters: Iterable[Tensor],
    max_norm: float,
    expert_parameters: Iterable[Tensor],
    groups: ExpertGroups,
    shard_groups: Mapping[int, dist.ProcessGroup] | None = None,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clip parameters of a model whose experts are spread over ranks, by one 2-norm, see :func:`clip_grad_norm_`.

    Parameters may be DTensors of several meshes: experts are of another than the rest.

    Args:
        parameters: What to clip; those of experts are this rank's.
        max_norm: The greatest norm that stays as it is.
        expert_parameters: All parameters of converted modules on this rank, also those that are not clipped.
        groups: As the converted modules' ``expert_layer.groups``. All ranks of the EP group call it, each with the same
            parameters; with DTensors all ranks of their meshes, too.
        shard_groups: By the ``id`` of a parameter of which this rank has a part that only FSDP1 knows the place of: the
            ranks that have the others. They call it, too.
        error_if_nonfinite: As in :func:`clip_grad_norm_`.

    Returns:
        The norm before clipping, of the whole model: the same on every rank.
    """
    parameters, shard_groups = list(parameters), shard_groups or {}
    expert_ids = {id(parameter) for parameter in expert_parameters}
    sharded = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    plain = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    parts = [parameter for parameter in plain if id(parameter) in shard_groups]
    whole = [parameter for parameter in plain if id(parameter) not in shard_groups]
    experts = [parameter for parameter in whole if id(parameter) in expert_ids]
    norms = [get_total_norm(_grads(parameter for parameter in whole if id(parameter) not in expert_ids))]
    if experts and groups.ep_group is not None:
        norms.append(_norm_over(groups.ep_group, experts))
    for group in dict.fromkeys(shard_groups[id(parameter)] for parameter in parts):
        norms.append(_norm_over(group, [parameter for parameter in parts if shard_groups[id(parameter)] == group]))
    norms += [_norm_over_mesh(grads) for grads in _by_mesh(_grads(sharded))]
    norm = get_total_norm([norm.to(norms[-1].device) for norm in norms])
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"the norm of all gradients is {float(norm)}, and nothing was clipped. Use error_if_nonfinite=False."
        )
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch.nn.utils has it
    for grad in _grads(parameters):
        local_shard(grad).mul_(scale.to(grad.device))
    return norm


def clip_grad_value_(parameters: Iterable[Tensor], clip_value: float) -> None:
    """``torch.nn.utils.clip_grad_value_`` for DTensors of several meshes. Needs no communication."""
    for grad in _grads(parameters):
        local_shard(grad).clamp_(-clip_value, clip_value)


def _grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norm_over(group: dist.ProcessGroup, parameters: list[Tensor]) -> Tensor:
    """Of what all ranks of a group have of these parameters. In float32 at least: some ranks may have no gradient."""
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    squares = get_total_norm(_grads(parameters)).to(parameters[0].device, dtype) ** 2
    dist.all_reduce(squares, group=group)
    return squares.sqrt()


def _by_mesh(grads: Iterable[Tensor]) -> list[list[DTensor]]:
    meshes: dict[object, list[DTensor]] = {}
    for grad in grads:
        assert isinstance(grad, DTensor)
        meshes.setdefault((grad.device_mesh, grad.placements), []).append(grad)
    return list(meshes.values())


def _norm_over_mesh(grads: list[DTensor]) -> Tensor:
    mesh, placements = grads[0].device_mesh, grads[0].placements
    squares = get_total_norm([local_shard(grad) for grad in grads]) ** 2
    for dim, placement in enumerate(placements):
        if not placement.is_replicate():
            dist.all_reduce(squares, group=mesh.get_group(dim))
    return squares.sqrt()
