"""Layers on another process group: those of ranks that stay, and the model of a rank that joins."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from lightning_eplb.parallel.discovery import check_experts, find_experts
from lightning_eplb.parallel.dispatch import TokenDispatcher
from lightning_eplb.parallel.expert_data_parallel import ExpertGradientSync
from lightning_eplb.parallel.expert_layer import ExpertLayer, LayerContext
from lightning_eplb.parallel.fused_choice import choose
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.materialize import allocate, initialize, memory_device
from lightning_eplb.parallel.parallelize import ConvertedExperts, expert_layers, make_parallel
from lightning_eplb.parallel.per_expert_trial import find_per_expert_state
from lightning_eplb.parallel.protocol_check import check_protocol
from lightning_eplb.placement import ExpertPlacement


@dataclass(frozen=True)
class ConversionSettings:
    """Arguments of ``parallelize_experts`` that a rank which joins takes from the others.

    Attributes:
        ep_size: Ranks that share the experts of a layer.
        redundant_per_rank: Redundant slots of each rank.
        dispatcher: Class of the layers' token dispatchers.
        fused_experts: Argument ``fused_experts``.
    """

    ep_size: int
    redundant_per_rank: int
    dispatcher: type[TokenDispatcher]
    fused_experts: bool | None

    @classmethod
    def of(cls, layer: ExpertLayer, ep_size: int) -> "ConversionSettings":
        """Return the settings of a converted layer for a group of another size."""
        redundant = layer.slot_map.slots.shape[1] - layer.num_primaries
        return cls(ep_size, redundant, layer.dispatcher_class, layer.fused_choice.setting)


def create_groups(ep_size: int) -> ExpertGroups:
    """Create process groups with EP groups of ``ep_size`` successive ranks. Every rank of the world calls it."""
    group = None
    if ep_size < dist.get_world_size():
        group, _ = dist.new_subgroups(ep_size)
        assert isinstance(group, dist.ProcessGroup)
    return ExpertGroups.create(group)


def attach(modules: Sequence[ConvertedExperts], groups: ExpertGroups, placements: Sequence[ExpertPlacement]) -> None:
    """Let layers use other process groups. Performs no communication.

    Args:
        modules: Converted modules, with the rows of their placements.
        groups: Process groups.
        placements: Placement of each layer.
    """
    gradient_sync = ExpertGradientSync(groups) if groups.edp_group is not None else None
    for (layer, _), placement in zip(modules, placements, strict=True):
        layer.attach(groups, gradient_sync, placement)


def convert_without_rows(
    model: nn.Module, groups: ExpertGroups, settings: ConversionSettings, device: torch.device | str | None
) -> list[ConvertedExperts]:
    """Convert the model of a rank that joins, with no rows of experts. Performs no communication.

    What is on the meta device gets memory and initial values.

    Args:
        model: Unmodified model.
        groups: Process groups that the rank joins.
        settings: Settings of the other ranks.
        device: Device of what is on the meta device. ``None``: PyTorch's default device.

    Raises:
        ValueError: As ``parallelize_experts``, or the model is converted already.
    """
    if any(expert_layers(model)):
        raise ValueError(
            f"the model ({type(model).__name__}) is converted already. Give join() one that parallelize_experts() has"
            " not converted."
        )
    found = dict(find_experts(model))
    num_redundant = settings.redundant_per_rank * settings.ep_size
    check_experts(model, found, settings.ep_size, num_redundant)
    memory = memory_device(model, device)
    per_expert = {name: find_per_expert_state(name, module) for name, module in found.items()}
    first_choice_only = check_protocol(found)
    context = LayerContext(groups, settings.dispatcher)
    choices = choose(found.values(), settings.fused_experts, settings.ep_size)
    for index, (name, module) in enumerate(found.items()):
        layer = ExpertLayer(index, name, module, context, per_expert[name], name in first_choice_only)
        layer.set_fused_choice(choices[index])
        sizes = (1, layer.num_logical_experts, settings.ep_size, num_redundant)
        make_parallel(module, layer, ExpertPlacement.initial(*sizes))
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data[:0].clone()
    initialize(model, allocate(model, memory), memory)
    return list(expert_layers(model))
