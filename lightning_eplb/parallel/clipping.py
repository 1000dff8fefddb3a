"""Gradient clipping and overflow checks that count every logical expert once."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_eplb import _compat
from lightning_eplb.parallel.dtensor import local_shard
from lightning_eplb.parallel.fsdp1_parameters import shard_groups
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
    """Clip gradients in place by the norm of the whole model, with experts of all ranks. Every rank must call it.

    The counterpart of ``torch.nn.utils.clip_grad_norm_``, which sees this rank's experts only. Each rank would scale
    its gradients by another factor, and ranks would be out of sync. ``Trainer(gradient_clip_val=...)`` does the same.

    Example::

        loss.backward()
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        balancer.step()

    Args:
        model: Model, plain or wrapped in ``DistributedDataParallel``, by FSDP1, by FSDP2 or by Fabric. Gradients must
            be averaged over ranks and unscaled.
        max_norm: Upper bound of the norm.
        norm_type: Must be 2.0, the default.
        error_if_nonfinite: Raise if the norm is infinite or NaN. Defaults to ``False``.
        parameters: Parameters to clip, the same on all ranks, such as one optimizer's. Defaults to all of ``model``.

    Returns:
        Norm before clipping, a scalar, the same on every rank.

    Raises:
        ValueError: ``norm_type`` is not 2.
        RuntimeError: The norm is not finite, with ``error_if_nonfinite``. All ranks raise it; nothing was clipped.
    """
    if norm_type != 2:
        raise ValueError(f"norm_type={norm_type} is not supported where experts are on several ranks. Use 2.0.")
    layers = list(expert_layers(model))
    experts = [parameter for each in layers for parameter in each.parameters.values()]
    groups = layers[0].layer.groups if layers else ExpertGroups()
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
    """Clip gradients by one 2-norm over several groups of ranks, see :func:`clip_grad_norm_`.

    Parameters may be DTensors of several meshes, since experts have another mesh than all else.

    Args:
        parameters: Parameters to clip, those of experts on this rank.
        max_norm: Upper bound of the norm.
        expert_parameters: All parameters of converted modules on this rank, also those that are not clipped.
        groups: Process groups of the experts. All ranks of the EP group call it with the same parameters, and all ranks
            of the meshes of DTensors.
        shard_groups: Process groups that FSDP1 shards parameters over, by ``id`` of the parameter. Their ranks call
            it, too.
        error_if_nonfinite: Raise if the norm is infinite or NaN. Defaults to ``False``.

    Returns:
        Norm of the whole model before clipping, the same on every rank.
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
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as in torch.nn.utils
    for grad in _grads(parameters):
        local_shard(grad).mul_(scale.to(grad.device))
    return norm


def clip_grad_value_(parameters: Iterable[Tensor], clip_value: float) -> None:
    """Clip gradients by value, also DTensors of several meshes. Needs no communication."""
    for grad in _grads(parameters):
        local_shard(grad).clamp_(-clip_value, clip_value)


def _grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norm_over(group: dist.ProcessGroup, parameters: list[Tensor]) -> Tensor:
    """Return the norm over all ranks of a group, in float32 at least, since some ranks may have no gradient."""
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


def share_overflow(scaler: torch.amp.GradScaler, optimizer: Optimizer, groups: ExpertGroups) -> None:
    """Share overflows, so that all ranks skip the same steps. All ranks call it after ``scaler.unscale_()``.

    Only the rank that holds an expert sees an overflow in its gradient. If that rank alone skipped the step, ranks
    would be out of sync.

    Args:
        scaler: Gradient scaler of this rank, enabled.
        optimizer: Optimizer whose gradients were unscaled.
        groups: Process groups of the experts, such as ``balancer.groups``.
    """
    found = _compat.found_overflow(scaler, optimizer)
    overflow = torch.stack([one.detach().cpu().reshape(()) for one in found]).max() if found else torch.zeros(())
    dist.all_reduce(overflow, op=dist.ReduceOp.MAX, group=groups.cpu_group)
    for one in found:
        one.fill_(float(overflow))


def check_scaled_optimizer(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` for an optimizer that checks for overflows within its step, where they can't be shared."""
    if _compat.unscales_in_step(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__}(fused=True) checks for overflows of its own rank only, and with"
            " precision='16-mixed' ranks would skip different steps. Use foreach=True or precision='bf16-mixed'."
        )
