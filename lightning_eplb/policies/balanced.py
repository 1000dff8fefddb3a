"""The default policy: level primaries first, then copies of what is still too hot.

Shape suffixes: ``Y`` MoE layers, ``L`` logical experts, ``R`` ranks, ``S`` slots on a rank.
"""

import heapq
from typing import NamedTuple

import numpy as np

from lightning_eplb.placement import EMPTY, ExpertPlacement
from lightning_eplb.policies.base import Policy, Topology, checked_load, order_slots

_PARTS_OF_A_TOKEN = 720_720  # 1 to 16 divide it: an even share is a whole number of parts up to 16 copies
_INT64_ROOM = 62  # bits that the sum of a layer may take


class Copy(NamedTuple):
    """A redundant copy of ``expert`` on ``rank`` that takes ``tokens`` from the primary."""

    expert: int
    rank: int
    tokens: int


class BalancedPolicy(Policy):
    """Levels the ranks with as few moves as a fresh plan allows.

    For every layer it makes two plans. One keeps the primaries where they are and chooses the redundant copies anew;
    the other places the primaries anew too, by longest processing time with equal counts on each rank, on the ranks
    where most of them are already. Copies are the ones that :func:`spill` finds and that pay while tokens are split
    evenly among copies, and then more of the fullest ranks' experts as long as that lowers those ranks. The plan
    whose fullest rank has the fewest tokens is taken. A tie goes to the one that moves less: a layer that cannot be
    improved stays as it is, and so does one without tokens. A slot whose copy would lower nothing stays empty.

    All decisions are made in integers and ties go to the lower index, so the plan is the same on every machine.

    Example::

        EPLBCallback(num_redundant_experts=8, policy=BalancedPolicy())

    Note:
        It takes all ranks as equal: it does not look at the nodes, and asks of the window's load alone.
    """

    def rearrange(self, load_YL: np.ndarray, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        """Plan every layer on its own; see :meth:`Policy.rearrange` for the arguments."""
        load_YL = checked_load(load_YL, placement, topology)
        slots_YRS = placement.by_rank.copy()
        for layer in np.flatnonzero(load_YL.any(axis=1)):
            slots_YRS[layer] = _plan_layer(load_YL[layer], placement.by_rank[layer], placement.primary_rank[layer])
        if np.array_equal(slots_YRS, placement.by_rank):
            return placement
        slots_YP = slots_YRS.reshape(placement.physical_to_logical.shape)
        return ExpertPlacement(slots_YP, placement.num_logical_experts, placement.num_ranks)


def pack_primaries(load_L: np.ndarray, num_ranks: int) -> np.ndarray:
    """Divide the experts among the ranks by longest processing time, the same number to each.

    The heaviest expert first, each goes to the emptiest rank that has room for one more. Ties go to the lower index.

    Args:
        load_L: Tokens of each logical expert, int64 ``[L]``; their sum fits int64.
        num_ranks: Ranks, ``R``; divides ``L``.

    Returns:
        The rank of each expert, int64 ``[L]``.
    """
    rank_L = np.empty(load_L.size, dtype=np.int64)
    room = [load_L.size // num_ranks] * num_ranks
    ranks = [(0, rank) for rank in range(num_ranks)]  # (tokens, rank): a heap, so the emptiest comes first
    for expert in np.argsort(-load_L, kind="stable").tolist():
        tokens, rank = heapq.heappop(ranks)
        rank_L[expert] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(ranks, (tokens + int(load_L[expert]), rank))
    return rank_L


def keep_ranks(rank_L: np.ndarray, current_rank_L: np.ndarray, num_ranks: int) -> np.ndarray:
    """Rename the ranks of a plan so that many experts stay where they are; who is with whom does not change.

    The group of experts and the rank that have most in common are matched first. Ties go to the lower index.

    Args:
        rank_L: The rank that the plan gives each expert, int64 ``[L]``.
        current_rank_L: The rank that each expert is on, int64 ``[L]``.
        num_ranks: Ranks, ``R``.

    Returns:
        The rank of each expert, int64 ``[L]``.
    """
    common = np.bincount(rank_L * num_ranks + current_rank_L, minlength=num_ranks * num_ranks)
    pairs = np.flatnonzero(common)
    pairs = pairs[np.argsort(-common[pairs], kind="stable")]
    name_of: dict[int, int] = {}
    unused = dict.fromkeys(range(num_ranks))
    for group, rank in zip(*(part.tolist() for part in np.divmod(pairs, num_ranks)), strict=True):
        if group not in name_of and rank in unused:
            name_of[group] = rank
            del unused[rank]
    rest = iter(unused)
    return np.array([name_of[g] if g in name_of else next(rest) for g in range(num_ranks)], dtype=np.int64)[rank_L]


def spill(load_L: np.ndarray, primary_rank_L: np.ndarray, num_ranks: int, num_redundant: int) -> list[Copy]:
    """Level the ranks by giving the fullest rank's heaviest expert a copy on the emptiest rank.

    The copy takes over as much as the full rank has too much, the empty one has room for, and the primary still has.
    That is repeated until no rank is above the mean (rounded up), or none that is below it has a free slot.

    Args:
        load_L: Tokens of each logical expert, int64 ``[L]``; their sum fits int64.
        primary_rank_L: The rank that holds each expert's primary, int64 ``[L]``.
        num_ranks: Ranks, ``R``.
        num_redundant: Redundant slots of each rank.

    Returns:
        The copies in the order they were chosen, with the tokens each one takes over. Ties go to the lower index, so
        every rank that is given the same load finds the same copies.
    """
    left_L = load_L.copy()  # what the primaries still serve
    tokens_R = _sum_by_rank(load_L, primary_rank_L, num_ranks)
    free_R = np.full(num_ranks, num_redundant)
    level = -(-int(load_L.sum()) // num_ranks)
    copies: list[Copy] = []
    while tokens_R.max() > level:
        has_room = np.flatnonzero((free_R > 0) & (tokens_R < level))
        if not has_room.size:
            break
        fullest, emptiest = int(tokens_R.argmax()), int(has_room[tokens_R[has_room].argmin()])
        # No rank is filled above the level, so all that the fullest one serves is its primaries'. And one of the
        # three below becomes zero, so no copy is chosen twice.
        expert = int(np.where(primary_rank_L == fullest, left_L, -1).argmax())
        moved = int(min(tokens_R[fullest] - level, level - tokens_R[emptiest], left_L[expert]))
        tokens_R[fullest] -= moved
        tokens_R[emptiest] += moved
        left_L[expert] -= moved
        free_R[emptiest] -= 1
        copies.append(Copy(expert, emptiest, moved))
    return copies


def _plan_layer(load_L: np.ndarray, current_RS: np.ndarray, current_rank_L: np.ndarray) -> np.ndarray:
    """The slots of one layer, ``[R, S]``: as they are, with new copies, or all new; the first with the lowest peak."""
    num_ranks, num_slots = current_RS.shape
    num_redundant = num_slots - load_L.size // num_ranks
    load_L = _in_parts(load_L)
    held_LR = np.zeros((load_L.size, num_ranks), dtype=bool)
    ranks, rows = np.nonzero(current_RS != EMPTY)
    held_LR[current_RS[ranks, rows], ranks] = True
    best, lowest = None, int(_even_tokens(load_L, held_LR).max())
    for primary_rank_L in (current_rank_L, keep_ranks(pack_primaries(load_L, num_ranks), current_rank_L, num_ranks)):
        held_LR = _choose_copies(load_L, primary_rank_L, num_ranks, num_redundant)
        peak = int(_even_tokens(load_L, held_LR).max())
        if peak < lowest:
            best, lowest = (primary_rank_L, held_LR), peak
    if best is None:
        return current_RS
    primary_rank_L, held_LR = best
    held_LR[np.arange(load_L.size), primary_rank_L] = False  # from here on the redundant copies alone
    primaries = [np.flatnonzero(primary_rank_L == rank).tolist() for rank in range(num_ranks)]
    redundant = [np.flatnonzero(held_LR[:, rank]).tolist() for rank in range(num_ranks)]
    return order_slots(primaries, redundant, current_RS)


def _choose_copies(load_L: np.ndarray, primary_rank_L: np.ndarray, num_ranks: int, num_redundant: int) -> np.ndarray:
    """Who holds what, bool ``[L, R]``: the primaries, the copies of ``spill`` that pay, and more where it helps."""
    held_LR = np.zeros((load_L.size, num_ranks), dtype=bool)
    held_LR[np.arange(load_L.size), primary_rank_L] = True
    free_R = np.full(num_ranks, num_redundant)
    tokens_R = _even_tokens(load_L, held_LR)
    for copy in spill(load_L, primary_rank_L, num_ranks, num_redundant):
        # Spill moves as many tokens as fit; an even split moves what it moves, and that may be too much.
        with_copy_R = _with_copies(load_L, held_LR, tokens_R, np.array([copy.expert]), np.array([copy.rank]))[0]
        if with_copy_R.max() <= tokens_R.max():
            held_LR[copy.expert, copy.rank] = True
            free_R[copy.rank] -= 1
            tokens_R = with_copy_R
    while free_R.any():
        experts = np.flatnonzero(held_LR[:, tokens_R.argmax()])
        without_XR = _with_copies(load_L, held_LR, tokens_R, experts, None)
        possible_XR = (free_R > 0) & ~held_LR[experts]
        experts, without_XR, possible_XR = (a[possible_XR.any(axis=1)] for a in (experts, without_XR, possible_XR))
        if not experts.size:
            break
        ranks = np.where(possible_XR, without_XR, np.iinfo(np.int64).max).argmin(axis=1)
        with_copy_XR = _with_copies(load_L, held_LR, tokens_R, experts, ranks)
        fullest_first = (-np.sort(-with_copy_XR, axis=1)).tolist()
        choice = min(range(len(fullest_first)), key=fullest_first.__getitem__)
        if fullest_first[choice] >= (-np.sort(-tokens_R)).tolist():
            break
        held_LR[experts[choice], ranks[choice]] = True
        free_R[ranks[choice]] -= 1
        tokens_R = with_copy_XR[choice]
    return held_LR


def _with_copies(
    load_L: np.ndarray, held_LR: np.ndarray, tokens_R: np.ndarray, experts: np.ndarray, ranks: np.ndarray | None
) -> np.ndarray:
    """Each rank's tokens if expert ``x`` had one copy more, on ``ranks[x]`` (None: served nowhere), ``[X, R]``."""
    copies_X = held_LR[experts].sum(axis=1)
    share_X = load_L[experts] // (copies_X + 1)
    tokens_XR = tokens_R - held_LR[experts] * (load_L[experts] // copies_X - share_X)[:, None]
    if ranks is not None:
        tokens_XR[np.arange(experts.size), ranks] += share_X
    return tokens_XR


def _even_tokens(load_L: np.ndarray, held_LR: np.ndarray) -> np.ndarray:
    """What each rank serves when the copies of an expert share it evenly, int64 ``[R]``."""
    return (held_LR * (load_L // held_LR.sum(axis=1))[:, None]).sum(axis=0)


def _sum_by_rank(load_L: np.ndarray, rank_L: np.ndarray, num_ranks: int) -> np.ndarray:
    tokens_R = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(tokens_R, rank_L, load_L)
    return tokens_R


def _in_parts(load_L: np.ndarray) -> np.ndarray:
    """The load in equal parts of a token, so that even shares are whole numbers and no sum leaves int64."""
    total = sum(load_L.tolist())  # Python integers: these cannot overflow
    if total >> _INT64_ROOM:
        return load_L >> (total.bit_length() - _INT64_ROOM)
    return load_L * min(_PARTS_OF_A_TOKEN, (1 << _INT64_ROOM) // total)
