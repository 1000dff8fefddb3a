"""Base class of the policies, and what they are given.

Shape suffixes: ``Y`` MoE layers, ``L`` logical experts, ``R`` ranks, ``S`` slots on a rank.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies.forecast import Forecast


@dataclass(frozen=True)
class Topology:
    """Node and capacity of each rank of the expert-parallel group.

    Example::

        Topology.even(num_ranks=4, num_nodes=2)  # Topology(node_of_rank=(0, 0, 1, 1))
        Topology((0, 0, 1), capacity=(1, 1, 0.5))  # nodes of unequal size, and a GPU of half the speed

    Args:
        node_of_rank: For each rank, the index of its node: ``0`` to ``num_nodes - 1``, each at least once.
        capacity: For each rank, how much work it should get, in any unit: its speed. 0 for a rank that should get no
            token that can be served elsewhere. ``None``: all the same.

    Raises:
        ValueError: There is no rank, or a node between the lowest and the highest index has none; or a capacity is
            missing, negative, or zero on all ranks.
    """

    node_of_rank: tuple[int, ...]
    capacity: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "node_of_rank", tuple(int(node) for node in self.node_of_rank))
        if not self.node_of_rank:
            raise ValueError("node_of_rank=() names no rank; it needs one node index for each rank")
        nodes = sorted(set(self.node_of_rank))
        if nodes != list(range(len(nodes))):
            raise ValueError(
                f"node_of_rank={self.node_of_rank} names the nodes {nodes}; with {len(nodes)} nodes they must be"
                f" numbered 0 to {len(nodes) - 1}"
            )
        if self.capacity is not None:
            object.__setattr__(self, "capacity", tuple(float(speed) for speed in self.capacity))
            if len(self.capacity) != len(self.node_of_rank):
                raise ValueError(
                    f"capacity={self.capacity} is for {len(self.capacity)} ranks; there are {len(self.node_of_rank)}"
                )
            if not all(0 <= speed < float("inf") for speed in self.capacity) or not any(self.capacity):
                raise ValueError(
                    f"capacity={self.capacity} must be finite, zero or more, and above zero on at least one rank"
                )

    @classmethod
    def even(cls, num_ranks: int, num_nodes: int = 1) -> "Topology":
        """Nodes of equal size, filled one after the other.

        Raises:
            ValueError: ``num_ranks`` is not a positive multiple of ``num_nodes``.
        """
        if num_nodes < 1 or num_ranks < 1 or num_ranks % num_nodes:
            raise ValueError(f"num_ranks={num_ranks} must be a positive multiple of num_nodes={num_nodes}")
        return cls(tuple(rank // (num_ranks // num_nodes) for rank in range(num_ranks)))

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        return max(self.node_of_rank) + 1


@dataclass(frozen=True)
class Costs:
    """Time that a token and a move take, in seconds or any other unit of time that all of them share.

    Attributes:
        token: To compute one token on one expert, forward and backward.
        row_within_node: To move one primary, with its optimizer state, to another rank of the node.
        row_between_nodes: The same to another node.
        copy: To bring one redundant copy's weights out and its gradient home, in one step, while all ranks do so.
    """

    token: float
    row_within_node: float = 0.0
    row_between_nodes: float = 0.0
    copy: float = 0.0

    def __post_init__(self) -> None:
        if not sys.float_info.min <= self.token < math.inf:
            raise ValueError(f"token={self.token} must be finite and above zero: all other costs are compared with it")
        for name in ("row_within_node", "row_between_nodes", "copy"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be zero or more; inf for never")


@dataclass(frozen=True, eq=False)
class Outlook:
    """Load, forecast and costs that are known when it is time to decide.

    Attributes:
        window: Tokens of each expert over the window, int64 ``[Y, L]``.
        num_steps: The steps that these are of.
        forecast: What a window of that many steps will look like from now on.
        interval: Steps until the next decision.
        costs: As far as they were measured.
        sub_windows: Tokens of each expert in parts of the window, oldest first, int64 ``[B, Y, L]``, as
            :func:`lightning_eplb.policies.forecast.sub_windows` cuts it; ``None``: not known.
    """

    window: np.ndarray
    num_steps: int
    forecast: Forecast
    interval: int
    costs: Costs | None = None
    sub_windows: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("num_steps", "interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1 step")


class Policy(ABC):
    """Decides which rank should hold which expert. Derive from it to write your own.

    A policy is plain code: arrays in, a placement out; no process group, no clock, no trainer. One rank alone calls
    :meth:`rearrange` (through :meth:`look_ahead`), between two optimizer steps, and what it returns is broadcast to the
    others. It may therefore keep state, but that state lives on that rank and no checkpoint holds it.

    Example::

        class HottestFirst(Policy):
            def rearrange(self, load_YL, placement, topology):
                order_YL = np.argsort(-load_YL, axis=1, kind="stable")  # stable: ties go to the lower index
                slots_YRS = np.full_like(placement.by_rank, -1)  # -1: the other slots stay empty
                place_L = np.arange(placement.num_logical_experts)  # deal them out to the ranks, one after the other
                slots_YRS[:, place_L % placement.num_ranks, place_L // placement.num_ranks] = order_YL
                slots_YP = slots_YRS.reshape(placement.physical_to_logical.shape)
                return ExpertPlacement(slots_YP, placement.num_logical_experts, placement.num_ranks)

    Note:
        Primaries move with their optimizer state, so moving one costs far more than a redundant copy, and a primary
        that returns to its rank in another row moves as well. Sort integers, and with ``kind="stable"``.
    """

    @abstractmethod
    def rearrange(self, load_YL: np.ndarray, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        """Choose the placement of the next interval.

        Args:
            load_YL: int64 ``[Y, L]``: the tokens that went to each logical expert within the window, over all
                ranks. All zeros in a layer that has seen none: leave that one as it is.
            placement: Where the experts are now.
            topology: Which ranks share a node.

        Returns:
            A placement with the same numbers of layers, experts, slots and ranks; ``placement`` itself to move
            nothing. :class:`ExpertPlacement` checks the rest when it is built: each expert is the primary of one
            slot, and no rank holds two copies of one.
        """

    def look_ahead(self, outlook: Outlook, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        """Choose the placement of the next interval, knowing more than the window's sum.

        A policy that has no use for more need not override it.

        Args:
            outlook: The window, a forecast of the next one, and what moves cost.
            placement: Where the experts are now.
            topology: Which ranks share a node, and what they can do.

        Returns:
            As :meth:`rearrange`.
        """
        return self.rearrange(outlook.window, placement, topology)

    def rearrange_models(
        self, outlooks: Mapping[str, Outlook], placements: Mapping[str, ExpertPlacement], topology: Topology
    ) -> Mapping[str, ExpertPlacement]:
        """Choose the placements of all models of a balancer, such as a generator and a discriminator.

        This is what the balancer calls. It calls :meth:`look_ahead` for one model after the other. Override it where
        models share something, such as a limit of moves.

        Args:
            outlooks: The window, a forecast and costs of each model, by the model's name.
            placements: Where the experts of each model are now.
            topology: Which ranks share a node, and what they can do.

        Returns:
            A placement for each model, as of :meth:`rearrange`.
        """
        return {name: self.look_ahead(outlook, placements[name], topology) for name, outlook in outlooks.items()}

    def warm_up(self, placement: ExpertPlacement) -> None:  # noqa: B027
        """Do now what would otherwise delay the first decision, such as compiling. Called at set-up, on every rank."""


def check_groups(num_groups: int, placement: ExpertPlacement) -> None:
    """Raise ``ValueError`` unless the experts can be routed in so many groups."""
    experts = placement.num_logical_experts
    if experts % num_groups:
        divisors = [number for number in range(1, experts + 1) if experts % number == 0]
        raise ValueError(
            f"num_groups={num_groups} must divide the {experts} logical experts; one of {divisors} would do"
        )


def checked_load(load_YL: Any, placement: ExpertPlacement, topology: Topology) -> np.ndarray:
    """Check that load, placement and topology speak of the same experts and ranks. Returns the load as int64.

    Raises:
        ValueError: The load is not ``[Y, L]`` whole numbers from zero up, or the topology has other ranks.
    """
    load_YL = np.asarray(load_YL)
    shape = (placement.num_layers, placement.num_logical_experts)
    if load_YL.shape != shape:
        raise ValueError(
            f"load_YL has shape {list(load_YL.shape)}; this placement has {shape[0]} layers of {shape[1]} logical"
            f" experts, so it must be {list(shape)}"
        )
    if load_YL.dtype.kind not in "iu":
        raise ValueError(f"load_YL has dtype {load_YL.dtype}; tokens are counted in whole numbers, int64 would do")
    if load_YL.dtype.kind == "u" and load_YL.max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"load_YL holds {load_YL.max()} tokens for an expert, more than int64 counts")
    load_YL = load_YL.astype(np.int64, copy=False)
    if load_YL.min(initial=0) < 0:
        raise ValueError(f"load_YL holds {load_YL.min()} tokens for an expert; zero is the least")
    if topology.num_ranks != placement.num_ranks:
        raise ValueError(
            f"topology has {topology.num_ranks} ranks and placement has {placement.num_ranks}; they must be the same"
        )
    return load_YL
