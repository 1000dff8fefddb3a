"""The published planner of DeepSeek-V3, and a policy that trains with it.

Source: https://github.com/deepseek-ai/EPLB, the algorithm of ``eplb.py`` (2025), written anew for numpy.

Shape suffixes: ``Y`` MoE layers, ``L`` logical experts, ``P`` physical experts (slots), ``C`` most copies of an
expert, ``G`` expert groups, ``N`` nodes, ``R`` ranks, ``S`` slots on a rank, ``I`` items, ``B`` bins, ``X`` any
number of independent rows.
"""

import math
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lightning_eplb._validation import check_whole_numbers
from lightning_eplb.placement import EMPTY, ExpertPlacement
from lightning_eplb.policies.base import Outlook, Policy, Topology, check_groups, checked_load
from lightning_eplb.policies.phantoms import drop_phantoms, pad_load, with_phantoms
from lightning_eplb.policies.token_split import level_tokens, rank_weights


def rebalance_experts(
    weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan replicas and their GPUs from scratch, as DeepSeek's EPLB does; with the outputs of that program.

    When the expert groups divide over the nodes, groups are packed to nodes, experts are replicated within each node
    and replicas are packed to its GPUs. Otherwise all of it happens at once over all GPUs.

    Loads are compared as the source compares them, in float32. Only single additions and divisions are used, which
    IEEE 754 rounds alike on every machine, and stable sorts: ties go to the lower index, where the source leaves
    them to the machine's sort.

    Args:
        weight: Load of each logical expert, ``[Y, L]``: a torch tensor, an array or nested lists; whole numbers or
            floats from zero up.
        num_replicas: Physical experts of a layer, ``P``: a multiple of ``num_gpus`` and at least ``L``.
        num_groups: Groups that the experts are routed in; a divisor of ``L``.
        num_nodes: Nodes; a divisor of ``num_gpus``.
        num_gpus: GPUs over all nodes.

    Returns:
        Three int64 tensors on the CPU: the logical expert of each physical one ``[Y, P]``, the physical experts of
        each logical one ``[Y, L, C]`` padded with ``-1``, and the replicas of each logical expert ``[Y, L]``. A GPU
        may be given two replicas of one expert.

    Raises:
        ValueError: A number does not fit, with what would.
    """
    weight_YL = _checked_weight(weight)
    num_layers, num_experts = weight_YL.shape
    for name, value in (("num_groups", num_groups), ("num_nodes", num_nodes), ("num_gpus", num_gpus)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    if num_replicas < num_experts or num_replicas % num_gpus:
        fitting = -(-num_experts // num_gpus) * num_gpus
        raise ValueError(
            f"num_replicas={num_replicas} must be a multiple of num_gpus={num_gpus} and no less than the {num_experts}"
            f" logical experts of weight; {fitting} or {fitting + num_gpus} would do"
        )
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    if num_experts % num_groups:
        raise ValueError(
            f"num_groups={num_groups} must divide the {num_experts} logical experts of weight;"
            f" {_divisors(num_experts, num_nodes)} would do"
        )
    if num_gpus % num_nodes:
        raise ValueError(
            f"num_gpus={num_gpus} must be a multiple of num_nodes={num_nodes};"
            f" {-(-num_gpus // num_nodes) * num_nodes} would do"
        )
    group_size = num_experts // num_groups
    experts_per_node, slots_per_node = num_experts // num_nodes, num_replicas // num_nodes

    # The experts in the order of nodes, and within a node in the order in which its groups were packed.
    grouped_YGL = weight_YL.reshape(num_layers, num_groups, group_size)
    tokens_YG = np.cumsum(grouped_YGL, axis=-1, dtype=np.float64)[..., -1].astype(np.float32)
    group_order_YG = _pack(tokens_YG, num_nodes)
    order_YL = (group_order_YG[..., None] * group_size + np.arange(group_size)).reshape(num_layers, num_experts)

    # From here on every node of every layer is a row of its own, with its experts counted from 0.
    weight_XL = np.take_along_axis(weight_YL, order_YL, axis=1).reshape(-1, experts_per_node)
    expert_XP, copy_XP, copies_XL = _replicate(weight_XL, slots_per_node)
    share_XP = np.take_along_axis(weight_XL / copies_XL.astype(np.float32), expert_XP, axis=1)
    order_XP = _pack(share_XP, num_gpus // num_nodes)

    def over_nodes(local_XP: np.ndarray) -> np.ndarray:
        return np.take_along_axis(local_XP, order_XP, axis=1).reshape(num_layers, num_replicas)

    node_P = np.repeat(np.arange(num_nodes), slots_per_node)
    phy2log_YP = np.take_along_axis(order_YL, over_nodes(expert_XP) + node_P * experts_per_node, axis=1)
    logcnt_YL = np.empty((num_layers, num_experts), dtype=np.int64)
    np.put_along_axis(logcnt_YL, order_YL, copies_XL.reshape(num_layers, num_experts), axis=1)
    log2phy_YLC = np.full((num_layers, num_experts, int(logcnt_YL.max(initial=1))), EMPTY, dtype=np.int64)
    log2phy_YLC[np.arange(num_layers)[:, None], phy2log_YP, over_nodes(copy_XP)] = np.arange(num_replicas)
    return torch.from_numpy(phy2log_YP), torch.from_numpy(log2phy_YLC), torch.from_numpy(logcnt_YL)


class DeepSeekPolicy(Policy):
    """Plans with DeepSeek's published algorithm: a baseline, and for models whose routing is limited to nodes.

    It plans from scratch and moves nearly everything each time. What it plans knows no primaries, and may put an
    expert on a rank twice. So the second copy is dropped and its slot stays empty, and the primaries are chosen among
    the ranks that hold an expert, on its present one where that works out. A rank that then lacks primaries takes
    those that no rank had room for, each in exchange for the replica whose load is closest. A layer without tokens
    stays as it is. The algorithm fills every slot; where it is known what a copy's travel takes, as it is in training,
    a layer goes without copies that relieve the fullest rank of less.

    Example::

        EPLBCallback(num_redundant_experts=32, policy=DeepSeekPolicy(num_groups=8))

    Args:
        num_groups: Groups that the model's router chooses from first. Where they divide over nodes of equal size,
            each group is kept on one node; otherwise the policy warns once and plans over all ranks at once.

    Raises:
        ValueError: ``num_groups`` is below 1 or, when it is used, does not divide the experts.
    """

    def __init__(self, num_groups: int = 1) -> None:
        check_whole_numbers(num_groups=num_groups)
        if num_groups < 1:
            raise ValueError(f"num_groups={num_groups} must be 1 or more; 1 for a model without expert groups")
        self.num_groups = num_groups
        self._has_warned = False

    def warm_up(self, placement: ExpertPlacement) -> None:
        """Compile what weighs copies. Whether groups and experts go together is said now, not at the first decision."""
        check_groups(self.num_groups, placement)
        small = ExpertPlacement.initial(1, 2, 2, 2)
        _without_idle_copies(small, np.ones((1, 2), dtype=np.int64), Topology.even(2), 1.0)

    def rearrange(self, load_YL: np.ndarray, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        """Plan all layers that have tokens; see :meth:`Policy.rearrange` for the arguments."""
        load_YL = checked_load(load_YL, placement, topology)
        check_groups(self.num_groups, placement)
        layers = np.flatnonzero(load_YL.any(axis=1))
        if not layers.size:
            return placement
        groups, nodes = self._groups_and_nodes(topology, placement)
        before = with_phantoms(placement)
        load_YL = pad_load(load_YL, placement.num_phantom_experts)
        planned_YP = rebalance_experts(
            load_YL[layers], placement.num_physical_experts, groups, nodes, placement.num_ranks
        )[0].numpy()
        # The plan counts ranks node by node.
        rank_order_R = np.argsort(np.array(topology.node_of_rank), kind="stable")
        planned_YRS = np.empty((layers.size, placement.num_ranks, placement.slots_per_rank), dtype=np.int64)
        planned_YRS[:, rank_order_R] = planned_YP.reshape(planned_YRS.shape)
        slots_YRS = before.by_rank.copy()
        for layer, planned_RS in zip(layers, planned_YRS, strict=True):
            slots_YRS[layer] = _with_primaries(
                load_YL[layer], planned_RS, before.by_rank[layer], before.primary_rank[layer]
            )
        slots_YRS = drop_phantoms(slots_YRS, placement.num_logical_experts, placement.primaries_per_rank)
        slots_YP = slots_YRS.reshape(placement.physical_to_logical.shape)
        return ExpertPlacement(slots_YP, placement.num_logical_experts, placement.num_ranks)

    def look_ahead(self, outlook: Outlook, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        """Plan by the window, and leave out copies that cost more than they bring; see :meth:`Policy.look_ahead`."""
        planned = self.rearrange(outlook.window, placement, topology)
        if outlook.costs is None:
            return planned
        copy = outlook.costs.copy / outlook.costs.token * outlook.num_steps
        return _without_idle_copies(planned, outlook.window, topology, copy)

    def _groups_and_nodes(self, topology: Topology, placement: ExpertPlacement) -> tuple[int, int]:
        nodes = topology.num_nodes
        sizes = np.bincount(topology.node_of_rank).tolist()
        phantoms = placement.num_phantom_experts
        if len(set(sizes)) == 1 and self.num_groups % nodes == 0 and (nodes == 1 or not phantoms):
            return self.num_groups, nodes
        if not self._has_warned:
            self._has_warned = True
            reason = (
                f"the nodes have {sizes} ranks, not all the same number"
                if len(set(sizes)) > 1
                else f"{placement.num_logical_experts} experts are not the same number on each rank"
                if phantoms
                else f"num_groups={self.num_groups} is no multiple of the {nodes} nodes"
            )
            warnings.warn(f"DeepSeekPolicy plans over all ranks at once and not node by node: {reason}", stacklevel=3)
        return 1, 1


def _without_idle_copies(
    planned: ExpertPlacement, load_YL: np.ndarray, topology: Topology, copy: float
) -> ExpertPlacement:
    """Empty the redundant slots of the layers that take no longer without: all of a layer's, or none.

    Args:
        planned: With copies.
        load_YL: Of the window. Layers without any stay as they are.
        topology: What the ranks can do.
        copy: Tokens that take as long as a copy's travel, over the window.
    """
    first_copy = planned.primaries_per_rank
    bare_YRS = planned.by_rank.copy()
    bare_YRS[:, :, first_copy:] = EMPTY
    capacity_R = np.ones(planned.num_ranks) if topology.capacity is None else np.array(topology.capacity)
    bare_Y, copied_Y = (
        (level_tokens(load_YL, slots_YRS, capacity_R) * rank_weights(capacity_R)).max(axis=1)
        for slots_YRS in (bare_YRS, planned.by_rank)
    )
    layer_C, rank_C, slot_C = np.nonzero(planned.by_rank[:, :, first_copy:] != EMPTY)
    expert_C = planned.by_rank[layer_C, rank_C, first_copy + slot_C]
    received_YR, sent_YR = np.zeros((2, planned.num_layers, planned.num_ranks))
    np.add.at(received_YR, (layer_C, rank_C), 1)
    np.add.at(sent_YR, (layer_C, planned.primary_rank[layer_C, expert_C]), 1)
    busiest_Y = np.maximum(received_YR, sent_YR).max(axis=1)  # ranks send and receive at once
    is_bare_Y = load_YL.any(axis=1) & ((bare_Y - copied_Y) / np.maximum(busiest_Y, 1) <= copy)
    return planned.with_slots(np.where(is_bare_Y[:, None, None], bare_YRS, planned.by_rank))


def _checked_weight(weight: Any) -> np.ndarray:
    if isinstance(weight, torch.Tensor):
        weight = weight.detach().to("cpu")
        weight = (weight.to(torch.float64) if weight.is_floating_point() else weight.to(torch.int64)).numpy()
    weight = np.asarray(weight)
    if weight.ndim != 2 or not weight.shape[1]:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [layers, logical experts]")
    weight_YL = weight.astype(np.float32)
    wrong = ~(np.isfinite(weight_YL) & (weight_YL >= 0))
    if wrong.any():
        raise ValueError(f"weight holds {weight[wrong][0]}; a load is finite and zero or more")
    return weight_YL


def _divisors(number: int, multiple_of: int = 1) -> str:
    return ", ".join(str(d) for d in range(multiple_of, number + 1, multiple_of) if number % d == 0) or "no number"


def _pack(weight_XI: np.ndarray, num_bins: int) -> np.ndarray:
    """Pack items to bins, the same number to each: heaviest first, always to the lightest bin that is not full.

    Returns:
        The items of row ``x`` bin by bin, and in a bin in the order in which they came, int64 ``[X, I]``.
    """
    rows, items = weight_XI.shape
    bin_size = items // num_bins
    if bin_size == 1:  # as the source has it: no item moves
        return np.broadcast_to(np.arange(items), weight_XI.shape)
    heaviest_first_XI = np.argsort(-weight_XI, axis=1, kind="stable")
    weight_XB = np.zeros((rows, num_bins), dtype=np.float32)  # inf once the bin is full
    count_XB = np.zeros((rows, num_bins), dtype=np.int64)
    order_XI = np.empty((rows, items), dtype=np.int64)
    row_X = np.arange(rows)
    for item_X in heaviest_first_XI.T:
        bin_X = weight_XB.argmin(axis=1)
        order_XI[row_X, bin_X * bin_size + count_XB[row_X, bin_X]] = item_X
        count_XB[row_X, bin_X] += 1
        is_full_X = count_XB[row_X, bin_X] == bin_size
        weight_XB[row_X, bin_X] = np.where(is_full_X, np.inf, weight_XB[row_X, bin_X] + weight_XI[row_X, item_X])
    return order_XI


def _replicate(weight_XL: np.ndarray, num_slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give one slot after the other to the expert with the most load for each replica that it has so far.

    Returns:
        The expert of each slot ``[X, P]``, which of its replicas that slot is ``[X, P]``, and the replicas of each
        expert ``[X, L]``; int64.
    """
    rows, experts = weight_XL.shape
    expert_XP = np.tile(np.arange(num_slots), (rows, 1))
    copy_XP = np.zeros((rows, num_slots), dtype=np.int64)
    copies_XL = np.ones((rows, experts), dtype=np.int64)
    share_XL = weight_XL.copy()
    row_X = np.arange(rows)
    for slot in range(experts, num_slots):
        hottest_X = share_XL.argmax(axis=1)
        expert_XP[:, slot] = hottest_X
        copy_XP[:, slot] = copies_XL[row_X, hottest_X]
        copies_XL[row_X, hottest_X] += 1
        share_XL[row_X, hottest_X] = weight_XL[row_X, hottest_X] / copies_XL[row_X, hottest_X].astype(np.float32)
    return expert_XP, copy_XP, copies_XL


def _with_primaries(
    load_L: np.ndarray, planned_RS: np.ndarray, current_RS: np.ndarray, current_rank_L: np.ndarray
) -> np.ndarray:
    """Make a plan for one layer that knows no primaries into slots with primaries first, ``[R, S]``."""
    num_ranks, num_slots = planned_RS.shape
    per_rank = load_L.size // num_ranks
    held = [set(row) for row in planned_RS.tolist()]
    primary_rank = _match_primaries(held, current_rank_L.tolist(), per_rank)
    primaries = [{expert for expert, at in enumerate(primary_rank) if at == rank} for rank in range(num_ranks)]
    redundant = [of_rank - own for of_rank, own in zip(held, primaries, strict=True)]
    copies = [0] * load_L.size
    for of_rank in held:
        for expert in of_rank:
            copies[expert] += 1
    common = math.lcm(*copies)
    share = [int(load) * (common // count) for load, count in zip(load_L, copies, strict=True)]
    leftover = sorted((x for x, at in enumerate(primary_rank) if at is None), key=lambda x: (-share[x], x))
    for expert in leftover:
        lacking = [rank for rank in range(num_ranks) if len(primaries[rank]) < per_rank]
        full = [rank for rank in range(num_ranks) if expert in held[rank]]
        exchanges = (
            (abs(share[expert] - share[back]), taker, giver, back)
            for taker in lacking
            for back in redundant[taker]
            for giver in full
            if back not in held[giver]
        )
        if (best := min(exchanges, default=None)) is not None:
            _, taker, giver, back = best
            held[giver] ^= {expert, back}
            redundant[giver] ^= {expert, back}
            held[taker].remove(back)
            redundant[taker].remove(back)
        else:
            taker = min(lacking, key=lambda rank: (sum(share[x] for x in held[rank]), rank))
        primaries[taker].add(expert)
        held[taker].add(expert)
    for rank in range(num_ranks):
        heaviest_first = sorted(redundant[rank], key=lambda x: (-share[x], x))
        redundant[rank] = set(heaviest_first[: num_slots - per_rank])
    return order_slots([sorted(own) for own in primaries], [sorted(rest) for rest in redundant], current_RS)


def _match_primaries(held: list[set[int]], current_rank: list[int], per_rank: int) -> list[int | None]:
    """Choose a rank for each expert's primary among those that hold it; as many as can be, ``per_rank`` at most.

    Experts whose present rank holds them start there. Each other one looks for the shortest chain of experts that
    step aside (breadth first, lower ranks and experts first), which ends at a rank with room: augmenting paths, so
    the matching is a maximum one.

    Returns:
        For each expert its rank, or None where no rank has room for it.
    """
    ranks_of: list[list[int]] = [[] for _ in current_rank]
    for rank, experts in enumerate(held):
        for expert in experts:
            ranks_of[expert].append(rank)  # ranks ascend
    chosen: list[int | None] = [
        rank if expert in held[rank] else None  # no rank can be overfull: it has per_rank primaries now
        for expert, rank in enumerate(current_rank)
    ]
    members = [{expert for expert, rank in enumerate(chosen) if rank == at} for at in range(len(held))]
    for start in range(len(chosen)):
        if chosen[start] is not None:
            continue
        came_by: dict[int, int] = {}  # rank -> the expert that would move to it
        queue = deque([start])
        end: int | None = None
        while queue and end is None:
            expert = queue.popleft()
            for rank in ranks_of[expert]:
                if rank in came_by:
                    continue
                came_by[rank] = expert
                if len(members[rank]) < per_rank:
                    end = rank
                    break
                queue.extend(sorted(members[rank]))
        while end is not None:
            expert = came_by[end]
            left = chosen[expert]
            if left is not None:
                members[left].remove(expert)
            members[end].add(expert)
            chosen[expert] = end
            end = left
    return chosen


def order_slots(
    primaries: Sequence[Sequence[int]], redundant: Sequence[Sequence[int]], current_RS: np.ndarray
) -> np.ndarray:
    """Lay a layer's experts out in slots so that whatever stays on its rank stays in its row.

    An expert that a rank has in the same part already (primaries, redundant) keeps its row. The others take the rows
    that are left, lower index first.

    Args:
        primaries: For each rank its primaries, logical ids.
        redundant: For each rank the experts that it holds a redundant copy of, as many as it has slots or fewer.
        current_RS: What the slots hold now, ``[R, S]``, ``-1`` where one is empty.

    Returns:
        The slots, int64 ``[R, S]``, ``-1`` where one stays empty.
    """
    slots_RS = np.full_like(current_RS, EMPTY)
    for rank, now in enumerate(current_RS.tolist()):
        n = len(primaries[rank])
        for first, held, before in ((0, primaries[rank], now[:n]), (n, redundant[rank], now[n:])):
            row_of = {expert: first + row for row, expert in enumerate(before) if expert in held}
            rows = (first + row for row in range(len(before)) if first + row not in row_of.values())
            for expert in sorted(held):
                slots_RS[rank, row_of[expert] if expert in row_of else next(rows)] = expert
    return slots_RS
