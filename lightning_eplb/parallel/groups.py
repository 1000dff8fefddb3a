"""Process groups of expert parallelism, separate from those of DDP."""

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from lightning_eplb._validation import divisors

CPU_GROUP_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, eq=False)
class ExpertGroups:
    """Process groups of one EP rank. Every group is ``None`` without ``torch.distributed``.

    Attributes:
        rank: EP rank of this process, ``0 ... size-1``.
        size: Number of ranks that share the experts of a layer, ``R``.
        ep_group: EP group, which carries tokens and weights. ``None`` if ``size`` is 1.
        edp_group: Expert data-parallel group: the ranks with this EP rank in every EP group, which hold the same
            experts. ``None`` if there is one EP group only.
        num_ep_groups: Number of EP groups.
        cpu_group: Gloo group of all ranks for plans, digests and counts on the CPU.
        node_of_rank: Node of each EP rank, numbered in the order of ranks.
        shared: Objects by key that all layers of these groups share, such as buffers. They are dropped with the groups.
    """

    rank: int = 0
    size: int = 1
    ep_group: dist.ProcessGroup | None = None
    edp_group: dist.ProcessGroup | None = None
    num_ep_groups: int = 1
    cpu_group: dist.ProcessGroup | None = None
    node_of_rank: tuple[int, ...] = (0,)
    shared: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __deepcopy__(self, memo: dict) -> "ExpertGroups":
        return self

    @property
    def world_size(self) -> int:
        return self.size * self.num_ep_groups

    @classmethod
    def create(cls, group: dist.ProcessGroup | None = None) -> "ExpertGroups":
        """Create the groups, or reuse those of the same ranks. Every rank of the default group must call it.

        Groups are reused because each one has threads and buffers of its own.

        Args:
            group: Ranks that share experts. Defaults to all ranks. The EP groups of all ranks must be equally large.

        Raises:
            ValueError: The EP groups of the ranks don't partition them into equal parts. All ranks raise it.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        registry = _GroupRegistry.of_default_group()
        mine = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        ep_groups = _ep_groups(mine, registry.cpu_group)
        key = tuple(tuple(ranks) for ranks in ep_groups)
        if key not in registry.expert_groups:
            registry.expert_groups[key] = cls._new(mine, ep_groups, registry.cpu_group)
        return registry.expert_groups[key]

    @classmethod
    def of_all_ranks(cls) -> "ExpertGroups":
        """Return groups without experts, for checks among all ranks. Every rank of the default group must call it."""
        cpu_group = _GroupRegistry.of_default_group().cpu_group
        return cls(dist.get_rank(), dist.get_world_size(), cpu_group=cpu_group)

    def relocation_groups(self) -> "RelocationGroups":
        """Return the groups that carry asynchronous transfers. Every rank of the default group must call it.

        The first call creates a group.
        """
        registry = _GroupRegistry.of_default_group()
        key = next((key for key, groups in registry.expert_groups.items() if groups is self), None)
        if key is None:
            raise RuntimeError(
                "the model was parallelized under a process group that was destroyed; build and parallelize it again"
            )
        if key not in registry.relocation_groups:
            registry.relocation_groups[key] = RelocationGroups(key)
        return registry.relocation_groups[key]

    @classmethod
    def _new(cls, mine: list[int], ep_groups: list[list[int]], cpu_group: dist.ProcessGroup) -> "ExpertGroups":
        nodes = _node_of_rank(mine, cpu_group)
        size, rank = len(mine), mine.index(dist.get_rank())
        if size == 1:
            return cls(num_ep_groups=len(ep_groups), cpu_group=cpu_group)
        ep_group = _new_groups(ep_groups)
        edp_group = _new_groups([list(ranks) for ranks in zip(*ep_groups, strict=True)]) if len(ep_groups) > 1 else None
        return cls(rank, size, ep_group, edp_group, len(ep_groups), cpu_group, nodes)


class RelocationGroups:
    """Pool of process groups for asynchronous transfers, one for each relocation in flight.

    A failure can leave rows on a group that some ranks sent and others did not. So a relocation releases its group only
    after it has received all of its rows. A group that was not released is never used again.
    """

    def __init__(self, ep_groups: Sequence[Sequence[int]]) -> None:
        self._ep_groups = ep_groups
        self._groups: list[dist.ProcessGroup] = []
        self._free: set[int] = set()
        self.add()

    def __getitem__(self, number: int) -> dist.ProcessGroup:
        return self._groups[number - 1]

    @property
    def first_free(self) -> int:
        """Number, 1 or more, of a group that this rank knows to be free. 0 if there is none."""
        return min(self._free, default=0)

    def add(self) -> int:
        """Create another group and return its number. Every rank of the default group must call it.

        Groups that are free now are dropped, since ranks may disagree about them.
        """
        group = _new_groups(self._ep_groups)
        assert group is not None
        self._groups.append(group)
        self._free = {len(self._groups)}
        return len(self._groups)

    def acquire(self, number: int) -> None:
        """Mark a group as in use."""
        self._free.remove(number)

    def release(self, number: int) -> None:
        """Mark a group as free. All that was sent on it must have been received."""
        self._free.add(number)


class _GroupRegistry:
    """Groups that were created under one default group.

    Attributes:
        cpu_group: Gloo group of all ranks.
        expert_groups: Groups of this rank by the ranks of all EP groups.
        relocation_groups: Groups for asynchronous transfers, by the same key.
    """

    def __init__(self) -> None:
        cpu_group = dist.new_group(backend="gloo", timeout=CPU_GROUP_TIMEOUT)
        assert isinstance(cpu_group, dist.ProcessGroup)
        self.cpu_group = cpu_group
        self.expert_groups: dict[tuple[tuple[int, ...], ...], ExpertGroups] = {}
        self.relocation_groups: dict[tuple[tuple[int, ...], ...], RelocationGroups] = {}

    @classmethod
    def of_default_group(cls) -> "_GroupRegistry":
        default = dist.group.WORLD
        assert default is not None
        if default not in _REGISTRIES:
            _REGISTRIES[default] = cls()
        return _REGISTRIES[default]


_REGISTRIES: WeakKeyDictionary[dist.ProcessGroup, _GroupRegistry] = WeakKeyDictionary()
"""Registries by default group. They are dropped with it, or their threads would outlive the interpreter's."""


def check_nodes(ep_size: int, ranks_a_node: int) -> None:
    """Raise ``ValueError`` unless every EP group of successive ranks lies within a node or covers whole nodes."""
    if ep_size % ranks_a_node and ranks_a_node % ep_size:
        raise ValueError(
            f"ep_size={ep_size} would make EP groups of unequal parts of nodes, as a node has {ranks_a_node} ranks."
            f" Use one of {divisors(ranks_a_node)}, or a multiple of {ranks_a_node}."
        )


def _ep_groups(mine: Sequence[int], cpu_group: dist.ProcessGroup) -> list[list[int]]:
    world = dist.get_world_size()
    members = torch.zeros(world, dtype=torch.int64)
    members[list(mine)] = 1
    gathered = [torch.empty_like(members) for _ in range(world)]
    dist.all_gather(gathered, members, group=cpu_group)
    groups = sorted({tuple(torch.nonzero(row).flatten().tolist()) for row in gathered})
    sizes = {len(ranks) for ranks in groups}
    if sum(len(ranks) for ranks in groups) != world or len(sizes) != 1:
        raise ValueError(
            f"group: the ranks' expert-parallel groups {[list(g) for g in groups]} must split all {world} ranks"
            " into equal parts without overlap. Use torch.distributed.new_subgroups(group_size)."
        )
    return [list(ranks) for ranks in groups]


def _node_of_rank(mine: Sequence[int], cpu_group: dist.ProcessGroup) -> tuple[int, ...]:
    host = hashlib.sha256(socket.gethostname().encode()).digest()
    ours = torch.frombuffer(bytearray(host), dtype=torch.int64)
    hosts = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(hosts, ours, group=cpu_group)
    names = [tuple(hosts[rank].tolist()) for rank in mine]
    order = list(dict.fromkeys(names))
    return tuple(order.index(name) for name in names)


def _new_groups(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """Create a group for each of ``groups``, on all ranks in the same order. Return the one that holds this rank."""
    own = None
    for ranks in groups:
        group = dist.new_group(list(ranks))
        if isinstance(group, dist.ProcessGroup):  # other groups' ranks get a placeholder
            own = group
    return own
