"""Plan of a resize: which rank holds which experts before and after ranks leave or join. Pure: arrays in, plan out.

All plans are of one layer. Shape suffixes: ``R`` ranks of the default group, ``S`` rows of a rank.
``held_RS`` is the logical expert of each row of each rank, ``-1`` beyond a rank's last row. With several EP groups
several ranks hold a row of the same expert.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_eplb._validation import divisors
from lightning_eplb.placement import EMPTY, ExpertPlacement, num_primary_slots

LEAVES = -1
"""Value of a rank mapping for a rank that leaves."""


@dataclass(frozen=True)
class RankMapping:
    """Checked mapping from the ranks of one default group to those of the next.

    Attributes:
        new_ranks: New rank of each old rank, :data:`LEAVES` for those that leave.
        world_size: Ranks of the new default group. Those that ``new_ranks`` does not name join.
        ep_size: Ranks that share the experts of a layer in the new group.
    """

    new_ranks: tuple[int, ...]
    world_size: int
    ep_size: int

    @property
    def stays(self) -> np.ndarray:
        """``True`` for each old rank that stays, ``[R]``."""
        return np.array(self.new_ranks) != LEAVES

    def old_rank(self, new_rank: int) -> int | None:
        """Return the old rank that becomes ``new_rank``; ``None`` if a rank joins there."""
        return self.new_ranks.index(new_rank) if new_rank in self.new_ranks else None


def check_rank_mapping(
    rank_mapping: Any, old_size: int, world_size: int | None, ep_size: int | None, num_experts: Iterable[int]
) -> RankMapping:
    """Check a mapping of ranks as a user gives it. Raises the same on all ranks that are given the same.

    Args:
        rank_mapping: New rank of each old rank, by old rank; ``-1`` for those that leave.
        old_size: Ranks of the present default group.
        world_size: Ranks of the new one. ``None``: as many as stay.
        ep_size: Ranks that share the experts of a layer in the new one. ``None``: all.
        num_experts: Numbers of logical experts of the layers.

    Raises:
        TypeError: ``rank_mapping`` is no mapping, or something in the arguments is no whole number.
        ValueError: A rank is missing or unknown, two get the same new rank, none becomes rank 0, a new rank is out of
            range, or the sizes do not fit each other or the number of experts.
    """
    if not isinstance(rank_mapping, Mapping):
        raise TypeError(
            f"rank_mapping={rank_mapping!r} must be a dictionary from each rank to its new rank, such as"
            " {0: 0, 1: 1, 2: -1, 3: -1}."
        )
    numbers = [*rank_mapping, *rank_mapping.values(), *[n for n in (world_size, ep_size) if n is not None]]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise TypeError(f"ranks and sizes must be whole numbers, not {number!r}.")
    named = f"rank_mapping={describe(rank_mapping)}"
    wanted = f"Give each of the ranks 0 to {old_size - 1} its new rank, or -1 if it leaves."
    if missing := [rank for rank in range(old_size) if rank not in rank_mapping]:
        raise ValueError(f"{named} has no entry for {_ranks(missing)}. {wanted}")
    if unknown := [int(rank) for rank in rank_mapping if not 0 <= rank < old_size]:
        raise ValueError(f"{named} has an entry for {_ranks(sorted(unknown))}, which does not exist. {wanted}")
    new_ranks = tuple(int(rank_mapping[rank]) for rank in range(old_size))
    stay = [rank for rank in new_ranks if rank != LEAVES]
    size = len(stay) if world_size is None else int(world_size)
    if doubled := sorted({rank for rank in stay if stay.count(rank) > 1}):
        both = [old for old, new in enumerate(new_ranks) if new == doubled[0]]
        raise ValueError(f"{named} gives new rank {doubled[0]} to {_ranks(both)}. Give each a rank of its own.")
    if outside := [rank for rank in stay if not 0 <= rank < size]:
        known = f"world_size={size}" if world_size is not None else f"the {size} that stay"
        raise ValueError(
            f"{named} has the new {_ranks(outside)}, outside of 0 to {size - 1} for {known}. Number the ranks that stay"
            " from 0 on without holes; where others join in between, set world_size to the ranks of the new group."
        )
    if 0 not in stay:
        raise ValueError(f"{named} makes no rank rank 0, from which joining ranks learn. Let one that stays be rank 0.")
    return RankMapping(new_ranks, size, _check_ep_size(size, ep_size, sorted(set(num_experts))))


def _check_ep_size(size: int, ep_size: int | None, num_experts: Sequence[int]) -> int:
    if size < 2 or ep_size == 1:
        named = "ep_size=1" if ep_size == 1 else f"world_size={size}"
        raise ValueError(
            f"{named} would leave all experts on one rank, which resize() does not support."
            " Keep 2 ranks or more, or resume from a checkpoint on one."
        )
    chosen = size if ep_size is None else int(ep_size)
    if chosen < 1 or size % chosen:
        raise ValueError(f"ep_size={chosen} must divide world_size={size}. Use one of {divisors(size)[1:]}.")
    if chosen > min(num_experts):
        fitting = [d for d in divisors(size) if 1 < d <= min(num_experts)]
        remedy = f"Use ep_size={fitting[-1]}" if fitting else "Use another world_size"
        named = f"ep_size={chosen}" if ep_size is not None else f"world_size={size}"
        raise ValueError(f"{named} is more than the {min(num_experts)} experts of a layer. {remedy}.")
    return chosen


def describe(rank_mapping: Any) -> str:
    """Return a mapping as text, the same whatever its order; anything else as it is shown."""

    def shown(rank: Any) -> str:
        return repr(int(rank) if isinstance(rank, np.integer) else rank)

    if isinstance(rank_mapping, Mapping):
        entries = sorted(f"{shown(old)}: {shown(new)}" for old, new in rank_mapping.items())
        return "{" + ", ".join(entries) + "}"
    return repr(rank_mapping)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


@dataclass(frozen=True, eq=False)
class RowMoves:
    """Rows of one layer in a resize: the source of each row that a rank holds afterwards; int64 ``[rows]`` each.

    Rows that stay on their rank are included, as a rank's tensors get another number of rows.
    """

    source_rank: np.ndarray
    source_row: np.ndarray
    target_rank: np.ndarray
    target_row: np.ndarray


def stack_held(held_of_ranks: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rows of all ranks, ``held_RS``, from those of each, ``[rows]``."""
    most = max(len(held_S) for held_S in held_of_ranks)
    held_RS = np.full((len(held_of_ranks), most), EMPTY, dtype=np.int64)
    for rank, held_S in enumerate(held_of_ranks):
        held_RS[rank, : len(held_S)] = held_S
    return held_RS


def plan_hand_over(held_RS: np.ndarray, stays_R: np.ndarray) -> np.ndarray:
    """Return the rows after ranks have left: every expert is held by a rank that stays.

    Rows of ranks that stay keep their places. Experts that only leaving ranks hold are appended to the rank that has
    the fewest rows, one by one in the order of experts; lower ranks first.

    Args:
        held_RS: Rows now.
        stays_R: Ranks that stay, bool; one at least.

    Returns:
        Rows afterwards, with more places if they are needed; none on ranks that leave.
    """
    rows_of = [[x for x in held_S if x != EMPTY] if stays_R[r] else [] for r, held_S in enumerate(held_RS.tolist())]
    kept = {expert for rows in rows_of for expert in rows}
    staying = np.flatnonzero(stays_R).tolist()
    for expert in sorted(set(held_RS.ravel().tolist()) - kept - {EMPTY}):
        rows_of[min(staying, key=lambda rank: (len(rows_of[rank]), rank))].append(expert)
    return stack_held([np.array(rows) for rows in rows_of])


def plan_placement(
    held_RS: np.ndarray, ep_rank_R: np.ndarray, num_experts: int, redundant_per_rank: int
) -> ExpertPlacement:
    """Return a placement of all experts on the ranks of the new group that moves few rows.

    A rank keeps its first rows, as many as it may hold. The other experts go to the ranks with room, in the order of
    experts and of ranks. Phantom experts are spread over the ranks. Redundant slots are empty.

    Args:
        held_RS: Rows now, of the ranks of the new group.
        ep_rank_R: EP rank of each rank of the new group.
        num_experts: Logical experts, as many as EP ranks at least.
        redundant_per_rank: Redundant slots of a rank.

    Returns:
        Placement of one layer.

    Raises:
        ValueError: No rank holds some expert.
    """
    size = int(ep_rank_R.max()) + 1
    n = num_primary_slots(num_experts, size)
    room_R = np.diff(np.arange(size + 1) * num_experts // size).tolist()
    if missing := sorted(set(range(num_experts)) - set(held_RS.ravel().tolist())):
        raise ValueError(f"no rank of the new group holds the experts {missing}")
    rows_of: list[list[int]] = [[] for _ in range(size)]
    taken: set[int] = set()
    for rank in np.argsort(ep_rank_R, kind="stable").tolist():
        rows = rows_of[ep_rank_R[rank]]
        room = room_R[ep_rank_R[rank]] - len(rows)
        kept = [x for x in held_RS[rank].tolist() if x != EMPTY and x not in taken][:room]
        rows += kept
        taken.update(kept)
    others = iter(expert for expert in range(num_experts) if expert not in taken)
    slots_RS = np.full((size, n + redundant_per_rank), EMPTY, dtype=np.int64)
    for rank, rows in enumerate(rows_of):
        slots_RS[rank, : room_R[rank]] = rows + [next(others) for _ in range(room_R[rank] - len(rows))]
    return ExpertPlacement(slots_RS.reshape(1, -1), num_experts, size)


def plan_rows(before_RS: np.ndarray, after_RS: np.ndarray) -> RowMoves:
    """Return the source of each row that the ranks hold afterwards.

    A rank that held the expert takes its own row. Another one takes it from one of those that held it, so that these
    take turns.

    Args:
        before_RS: Rows now.
        after_RS: Rows afterwards.
    """
    sources: dict[int, dict[int, int]] = {}
    for rank, row in np.argwhere(before_RS != EMPTY).tolist():
        sources.setdefault(int(before_RS[rank, row]), {})[rank] = row
    moves = []
    for rank, row in np.argwhere(after_RS != EMPTY).tolist():
        holders = sources[int(after_RS[rank, row])]
        source = rank if rank in holders else sorted(holders)[rank % len(holders)]
        moves.append((source, holders[source], rank, row))
    return RowMoves(*np.array(moves, dtype=np.int64).reshape(-1, 4).T)
