"""Gradient clipping by one global norm, in which every logical expert counts once."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lightning_eplb.parallel.groups import ExpertGroups


def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, expert_parameters: Iterable[Tensor], groups: ExpertGroups
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for a model whose experts are spread over ranks, by the 2-norm.

    Args:
        parameters: What to clip; those of experts are this rank's.
        max_norm: The greatest norm that stays as it is.
        expert_parameters: All parameters of converted modules on this rank, also those that are not clipped.
        groups: As the converted modules' ``expert_layer.groups``. All ranks of the EP group call it, each with the same
            parameters.

    Returns:
        The norm before clipping, of the whole model: the same on every rank.
    """
    parameters = list(parameters)
    expert_ids = {id(parameter) for parameter in expert_parameters}
    experts = [parameter for parameter in parameters if id(parameter) in expert_ids]
    dense = [parameter for parameter in parameters if id(parameter) not in expert_ids]
    norm = get_total_norm([parameter.grad for parameter in dense if parameter.grad is not None])
    if experts and groups.exchange is not None:
        local = get_total_norm([parameter.grad for parameter in experts if parameter.grad is not None])
        squares = local.to(experts[0].device) ** 2
        dist.all_reduce(squares, group=groups.exchange)
        norm = torch.sqrt(norm.to(squares.device) ** 2 + squares)
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
