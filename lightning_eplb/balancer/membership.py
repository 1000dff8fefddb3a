"""Agreement of the ranks of a new process group: who stays and who joins, and that all train the same model."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_eplb.parallel.barrier import monitored_barrier
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.joining import ConversionSettings
from lightning_eplb.parallel.parallelize import ConvertedExperts
from lightning_eplb.policies import Costs
from lightning_eplb.relocation.resize_plan import RankMapping
from lightning_eplb.relocation.resize_transfer import StateLayout


@dataclass(frozen=True)
class SharedState:
    """Settings, window and counters of rank 0, which ranks that join take over.

    Attributes:
        conversion: Settings of the converted model.
        arguments: Arguments of ``ExpertLoadBalancer``.
        balancer: State dict of the balancer.
        costs: Costs that the user has set.
        is_due: A rearrangement is due.
    """

    conversion: ConversionSettings
    arguments: dict[str, Any]
    balancer: dict[str, Any]
    costs: Costs | None
    is_due: bool


@dataclass(frozen=True)
class Role:
    """Role of a rank in the new process group. Without a mapping it joins.

    Attributes:
        mapping: Mapping that the rank stays by.
        old_rank: Its rank before.
        shared: State of rank 0, of rank 0 only.
        error: Reason why rank 0 can't send it.
    """

    mapping: RankMapping | None = None
    old_rank: int = -1
    shared: SharedState | None = None
    error: str | None = None

    @classmethod
    def staying(cls, mapping: RankMapping, old_rank: int, shared: SharedState) -> "Role":
        """Return the role of a rank that stays."""
        if mapping.new_ranks[old_rank] != 0:
            return cls(mapping, old_rank)
        try:
            pickle.dumps(shared)
        except Exception as error:
            return cls(mapping, old_rank, error=f"{type(error).__name__}: {error}")
        return cls(mapping, old_rank, shared)


def agree_on_roles(role: Role) -> SharedState:
    """Verify that each rank has the role that ``resize()`` was told, and return rank 0's state. Collective.

    Every rank of the default group calls it.

    Raises:
        ValueError: Ranks have other roles, or their number is another. All ranks raise it.
        RuntimeError: Some ranks did not call it within ten minutes.
    """
    world = ExpertGroups.of_all_ranks()
    monitored_barrier(world, "rejoin() and join() distribute experts over the new process group")
    return check_roles(_gather(role, world))


def check_roles(roles: Sequence[Role]) -> SharedState:
    """Return rank 0's state if the roles of all ranks, in their order, fit each other; else raise ``ValueError``."""
    staying = [rank for rank, role in enumerate(roles) if role.mapping is not None]
    if not staying:
        raise ValueError("all ranks call join(), so that there is nothing to join. Make an ExpertLoadBalancer.")
    mapping = roles[staying[0]].mapping
    assert mapping is not None
    for rank in staying:
        if roles[rank].mapping != mapping:
            raise ValueError(
                f"ranks {staying[0]} and {rank} come from different calls of resize(): {mapping} and"
                f" {roles[rank].mapping}. Make the new process group of the ranks of one."
            )
    if len(roles) != mapping.world_size:
        raise ValueError(
            f"the new process group has {len(roles)} ranks, and resize() was told of {mapping.world_size}"
            f" (world_size). Make one of {mapping.world_size}, and call rejoin() and join() again."
        )
    for rank, role in enumerate(roles):
        before = mapping.old_rank(rank)
        if role.mapping is not None and role.old_rank != before:
            raise ValueError(
                f"rank {rank} of the new process group was rank {role.old_rank}, which rank_mapping made rank"
                f" {mapping.new_ranks[role.old_rank]}. Give each rank the number that resize() returned."
            )
        if role.mapping is None and before is not None:
            raise ValueError(
                f"rank {rank} of the new process group calls join(), and rank_mapping made old rank {before} rank"
                f" {rank}. A rank that joins gets a number that resize() has given to none."
            )
    if (shared := roles[0].shared) is None:
        raise ValueError(f"the policy of rank 0 can't be sent to ranks that join ({roles[0].error}).")
    return shared


@dataclass(frozen=True)
class Report:
    """Model, optimizers and rows of a rank, before rows move.

    Attributes:
        ep_rank: EP rank in the new groups.
        held: Logical experts of its rows, ``[rows]`` for each layer. Empty on a rank that joins.
        layers: Names, classes, shapes and dtypes of its layers.
        optimizers: Classes of its optimizers with those nested in them.
        members: Expert parameters in each parameter group of each optimizer, as numbers.
        hyperparameters: Settings of each parameter group of each optimizer, of rank 0 only.
        layouts: Layout of its optimizer state by parameter. Empty on a rank that joins.
        error: Reason why it can't join.
    """

    ep_rank: int
    held: Sequence[np.ndarray]
    layers: list[str] = field(default_factory=list)
    optimizers: list[str] = field(default_factory=list)
    members: list[list[list[int]]] = field(default_factory=list)
    hyperparameters: list[list[dict[str, Any]]] = field(default_factory=list)
    layouts: list[StateLayout] = field(default_factory=list)
    error: str | None = None

    @classmethod
    def of(
        cls,
        groups: ExpertGroups,
        held: Sequence[np.ndarray] | None,
        modules: Sequence[ConvertedExperts],
        optimizers: Sequence[Optimizer],
    ) -> "Report":
        """Return this rank's report.

        Args:
            groups: Process groups of the new ranks.
            held: Its rows. ``None`` on a rank that joins.
            modules: Its converted modules.
            optimizers: Its optimizers with those nested in them.
        """
        parameters = [parameter for each in modules for parameter in each.parameters.values()]
        number_of = {id(parameter): number for number, parameter in enumerate(parameters)}
        groups_of = [getattr(optimizer, "param_groups", []) for optimizer in optimizers]
        layouts = [StateLayout.of(parameter, optimizers) for parameter in parameters]
        return cls(
            groups.rank,
            [np.empty(0, dtype=np.int64)] * len(modules) if held is None else held,
            [describe_layer(each) for each in modules],
            [type(optimizer).__qualname__ for optimizer in optimizers],
            [[[number_of[id(p)] for p in group["params"] if id(p) in number_of] for group in of] for of in groups_of],
            [[_hyperparameters(group) for group in of] for of in groups_of] if dist.get_rank() == 0 else [],
            [] if held is None else layouts,
        )


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in group.items() if k not in ("params", "param_names")}


def set_hyperparameters(optimizers: Sequence[Optimizer], settings: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Give parameter groups rank 0's learning rates and other settings."""
    for optimizer, of_groups in zip(optimizers, settings, strict=True):
        for group, its in zip(getattr(optimizer, "param_groups", []), of_groups, strict=True):
            for name, value in its.items():
                present = group.get(name)
                group[name] = value.to(present.device) if isinstance(present, Tensor) else value


def describe_layer(experts: ConvertedExperts) -> str:
    """Return all that must be alike on all ranks, whatever the number of rows."""
    layer = experts.layer
    parameters = [
        f"{name} {[layer.num_logical_experts, *parameter.shape[1:]]} {parameter.dtype}"
        f"{'' if parameter.requires_grad else ' frozen'}"
        for name, parameter in experts.module.named_parameters(recurse=False)
    ]
    return f"{layer.name} ({layer.original_class.__name__}: {', '.join(parameters)})"


def exchange_reports(report: Report, groups: ExpertGroups) -> list[Report]:
    """Return the reports of all ranks. Every rank of the default group calls it.

    Raises:
        ValueError: A rank can't join, or models, optimizers or their state differ. All ranks raise it.
    """
    try:
        pickle.dumps(report)
    except Exception as error:  # of a custom optimizer's state
        report = Report(groups.rank, [], error=f"its report can't be sent ({type(error).__name__}: {error})")
    reports = _gather(report, groups)
    check_reports(reports)
    return reports


def check_reports(reports: Sequence[Report]) -> None:
    """Raise ``ValueError`` unless the reports of all ranks fit each other."""
    first = reports[0]
    for rank, report in enumerate(reports):
        if report.error is not None:
            raise ValueError(f"rank {rank} of the new process group can't take part: {report.error}")
        for mine, theirs in zip([*report.layers, "no more"], [*first.layers, "no more"], strict=False):
            if mine != theirs:
                raise ValueError(f"rank {rank} has the layer {mine} where rank 0 has {theirs}. Build the same model.")
        if report.optimizers != first.optimizers:
            raise ValueError(
                f"rank {rank} has the optimizers {report.optimizers}, rank 0 has {first.optimizers}. Give join() the"
                " same ones, in the same order."
            )
        if report.members != first.members:
            raise ValueError(
                f"the optimizers of rank {rank} hold experts in other parameter groups than those of rank 0. Make them"
                " of the same parameters, in the same order."
            )
        signatures = [layout.signature() for layout in report.layouts]
        if report.layouts and signatures != [layout.signature() for layout in first.layouts]:
            raise ValueError(f"rank {rank} has other optimizer state or gradients for experts than rank 0.")


def _gather(value: Any, groups: ExpertGroups) -> list[Any]:
    of_ranks: list[Any] = [None] * dist.get_world_size(groups.cpu_group)
    dist.all_gather_object(of_ranks, value, group=groups.cpu_group)
    return of_ranks
