"""The process groups of expert parallelism: its own, never DDP's."""

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

CONTROL_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, eq=False)
class ExpertGroups:
    """Who talks to whom. Without ``torch.distributed`` (or in a group of one) every group is ``None``.

    Attributes:
        rank: This process's EP rank, ``0 ... size-1``.
        size: Ranks that share the experts of a layer, ``R``.
        exchange: The EP group that tokens and weights travel on; ``None`` when ``size`` is 1.
        replicas: The ranks with this EP rank in every EP group, which hold the same rows; ``None`` if there is one
            EP group only.
        num_replicas: Number of EP groups.
        control: All ranks, on gloo and on the CPU: plans, digests and counts. ``None`` without ``torch.distributed``.
        node_of_rank: The node that each EP rank runs on, numbered in the order of ranks.
    """

    rank: int = 0
    size: int = 1
    exchange: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    num_replicas: int = 1
    control: dist.ProcessGroup | None = None
    node_of_rank: tuple[int, ...] = (0,)

    def __deepcopy__(self, memo: dict) -> "ExpertGroups":
        return self

    @property
    def world_size(self) -> int:
        return self.size * self.num_replicas

    @classmethod
    def create(cls, group: dist.ProcessGroup | None = None) -> "ExpertGroups":
        """Make the groups, or find those that were made for the same ranks: each has threads and buffers of its own.

        Every rank of the default group must call this, with its own EP group.

        Args:
            group: The ranks that share experts; ``None`` for all. The EP groups of all ranks must be equally large.

        Raises:
            ValueError: On every rank, when the EP groups of the ranks don't partition them into equal parts.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        made = _Made.under_default_group()
        control = made.control
        mine = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        ep_groups = _ep_groups(mine, control)
        key = tuple(tuple(ranks) for ranks in ep_groups)
        if key not in made.of_ranks:
            made.of_ranks[key] = cls._new(mine, ep_groups, control)
        return made.of_ranks[key]

    def background(self) -> "BackgroundGroups":
        """Groups of the EP group's ranks for what travels behind training. Every rank of the default group calls it.

        The first is made when they are first asked for.
        """
        made = _Made.under_default_group()
        key = next((key for key, groups in made.of_ranks.items() if groups is self), None)
        if key is None:
            raise RuntimeError("the model was converted under a process group that is gone; build and convert it anew")
        if key not in made.background:
            made.background[key] = BackgroundGroups(key)
        return made.background[key]

    @classmethod
    def _new(cls, mine: list[int], ep_groups: list[list[int]], control: dist.ProcessGroup) -> "ExpertGroups":
        nodes = _node_of_rank(mine, control)
        size, rank = len(mine), mine.index(dist.get_rank())
        if size == 1:
            return cls(num_replicas=len(ep_groups), control=control)
        exchange = _own_group(ep_groups)
        replicas = _own_group([list(ranks) for ranks in zip(*ep_groups, strict=True)]) if len(ep_groups) > 1 else None
        return cls(rank, size, exchange, replicas, len(ep_groups), control, nodes)


class BackgroundGroups:
    """Groups of the same ranks. Whoever has something under way has one to itself, known by its number.

    What fails while something is under way leaves some of it on the group that will never arrive, or that a rank has
    sent and another has not. So a group is given back by who has received all of it, and else never used again.
    """

    def __init__(self, ep_groups: Sequence[Sequence[int]]) -> None:
        self._ep_groups = ep_groups
        self._groups: list[dist.ProcessGroup] = []
        self._idle: set[int] = set()
        self.add()

    def __getitem__(self, number: int) -> dist.ProcessGroup:
        return self._groups[number - 1]

    @property
    def first_idle(self) -> int:
        """The number, 1 or more, of a group that nobody uses, as this rank knows; 0 if there is none."""
        return min(self._idle, default=0)

    def add(self) -> int:
        """Make another and return its number. Those that are idle now are used no more: ranks may disagree about them.

        Every rank of the default group calls it.
        """
        group = _own_group(self._ep_groups)
        assert group is not None
        self._groups.append(group)
        self._idle = {len(self._groups)}
        return len(self._groups)

    def take(self, number: int) -> None:
        """Use it from now on."""
        self._idle.remove(number)

    def give_back(self, number: int) -> None:
        """Use it no more; all that was sent on it has been received."""
        self._idle.add(number)


class _Made:
    """The groups that were made while the default group was this one.

    Attributes:
        control: Of all ranks.
        of_ranks: By the ranks of all EP groups.
        background: The same of those that move rows behind training.
    """

    def __init__(self) -> None:
        control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        assert isinstance(control, dist.ProcessGroup)
        self.control = control
        self.of_ranks: dict[tuple[tuple[int, ...], ...], ExpertGroups] = {}
        self.background: dict[tuple[tuple[int, ...], ...], BackgroundGroups] = {}

    @classmethod
    def under_default_group(cls) -> "_Made":
        default = dist.group.WORLD
        assert default is not None
        if default not in _MADE:
            _MADE[default] = cls()
        return _MADE[default]


_MADE: WeakKeyDictionary[dist.ProcessGroup, _Made] = WeakKeyDictionary()
"""By the default group. What was made under one goes with it, or its threads would outlive the interpreter's."""


def check_nodes(ep_size: int, ranks_a_node: int) -> None:
    """Raise ``ValueError`` unless EP groups of successive ranks are all alike: within a node, or of whole nodes."""
    if ep_size % ranks_a_node and ranks_a_node % ep_size:
        sizes = [size for size in range(1, ranks_a_node + 1) if ranks_a_node % size == 0]
        raise ValueError(
            f"ep_size={ep_size} would make EP groups of unequal parts of nodes, as a node has {ranks_a_node} ranks;"
            f" one of {sizes}, or a multiple of {ranks_a_node}, would do"
        )


def _ep_groups(mine: Sequence[int], control: dist.ProcessGroup) -> list[list[int]]:
    world = dist.get_world_size()
    members = torch.zeros(world, dtype=torch.int64)
    members[list(mine)] = 1
    gathered = [torch.empty_like(members) for _ in range(world)]
    dist.all_gather(gathered, members, group=control)
    groups = sorted({tuple(torch.nonzero(row).flatten().tolist()) for row in gathered})
    sizes = {len(ranks) for ranks in groups}
    if sum(len(ranks) for ranks in groups) != world or len(sizes) != 1:
        raise ValueError(
            f"group: the ranks' expert-parallel groups {[list(g) for g in groups]} must split all {world} ranks"
            " into equal parts without overlap; torch.distributed.new_subgroups(group_size) makes such groups"
        )
    return [list(ranks) for ranks in groups]


def _node_of_rank(mine: Sequence[int], control: dist.ProcessGroup) -> tuple[int, ...]:
    host = hashlib.sha256(socket.gethostname().encode()).digest()
    ours = torch.frombuffer(bytearray(host), dtype=torch.int64)
    hosts = [torch.empty_like(ours) for _ in range(dist.get_world_size())]
    dist.all_gather(hosts, ours, group=control)
    names = [tuple(hosts[rank].tolist()) for rank in mine]
    order = list(dict.fromkeys(names))
    return tuple(order.index(name) for name in names)


def _own_group(groups: Sequence[Sequence[int]]) -> dist.ProcessGroup | None:
    """A new group for each of ``groups``, made by all ranks in the same order; the one that holds this rank."""
    own = None
    for ranks in groups:
        made = dist.new_group(list(ranks))
        if isinstance(made, dist.ProcessGroup):  # other groups' ranks get a placeholder
            own = made
    return own
