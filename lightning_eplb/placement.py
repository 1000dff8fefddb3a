"""Placement of experts: the maps between logical experts and the slots of the ranks.

Shape suffixes: ``Y`` MoE layers, ``L`` logical experts, ``P`` physical experts (slots), ``C`` maximum number of
replicas of an expert, ``R`` ranks, ``S`` slots on a rank.
"""

import hashlib
from functools import cached_property
from operator import index
from typing import Any

import numpy as np

from lightning_eplb._compiled import compiled
from lightning_eplb._validation import check_multiple, check_not_negative, check_whole_numbers

EMPTY = -1
"""Entry of an empty slot in ``physical_to_logical``: of a redundant slot without an expert, or of a phantom expert."""


class ExpertPlacement:
    """Logical expert of each slot in every MoE layer. Immutable, and checked when it is built.

    Rank ``r`` holds slots ``r*S ... (r+1)*S - 1``. The first ``primaries_per_rank`` of them are the primaries, which
    own the parameter, its gradient and its optimizer state. The others are redundant and hold weights only.

    Every rank has room for ``n = ceil(L / R)`` primaries. If ``R`` does not divide ``L``, ``R * n - L`` of these slots
    hold a phantom expert: rows of zeros that no token reaches. Phantom experts have no id. Their slots are ``-1``, as
    empty redundant slots are, and come after the rank's other primaries.

    Example::

        placement = ExpertPlacement.initial(num_layers=1, num_logical_experts=4, num_ranks=2, num_redundant_experts=2)
        placement.physical_to_logical  # [[0, 1, 2, 2, 3, 1]]: rank 0 holds 0, 1 and a replica of 2
        ExpertPlacement.initial(1, 3, num_ranks=2).physical_to_logical  # [[0, -1, 1, 2]]: rank 0 has a phantom expert

    Args:
        physical_to_logical: Logical expert of each slot, ``[Y, P]``; ``-1`` is an empty slot: a redundant one, or one
            of the ``R * n - L`` phantom experts of a layer.
        num_logical_experts: Experts of the model in each layer, ``L``; at least ``num_ranks``.
        num_ranks: Ranks of the expert-parallel group, ``R``.

    Raises:
        ValueError: A shape or a number does not fit, or in some layer an expert has no primary, has two, or is held
            twice by one rank, or a phantom expert comes before a rank's other primaries.
    """

    physical_to_logical: np.ndarray
    """``[Y, P]`` int64, ``-1`` where a slot is empty."""
    replica_count: np.ndarray
    """Replicas of each expert, ``[Y, L]`` int64, at least 1 as the primary is one."""

    def __init__(self, physical_to_logical: Any, num_logical_experts: int, num_ranks: int) -> None:
        check_whole_numbers(num_logical_experts=num_logical_experts, num_ranks=num_ranks)
        num_logical_experts, num_ranks = index(num_logical_experts), index(num_ranks)
        p2l_YP = _checked_slots(physical_to_logical)
        _check_experts(num_logical_experts, num_ranks)
        least = num_primary_slots(num_logical_experts, num_ranks) * num_ranks
        if p2l_YP.ndim != 2 or p2l_YP.shape[1] < least or p2l_YP.shape[1] % num_ranks:
            slots = f"num_logical_experts={num_logical_experts} slots"
            if least > num_logical_experts:
                slots += f" and {least - num_logical_experts} for phantom experts"
            raise ValueError(
                f"physical_to_logical has shape {list(p2l_YP.shape)}; it must be [layers, slots] with at least {slots},"
                f" a multiple of num_ranks={num_ranks}"
            )
        self.num_logical_experts = num_logical_experts
        self.num_ranks = num_ranks
        self.physical_to_logical = p2l_YP
        self.replica_count = np.empty((self.num_layers, num_logical_experts), dtype=np.int64)
        if not _count_copies(self.by_rank, self.primaries_per_rank, self.replica_count):
            raise self._explain_fault()
        self.physical_to_logical.setflags(write=False)
        self.replica_count.setflags(write=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.physical_to_logical, self.num_logical_experts, self.num_ranks)

    @classmethod
    def initial(
        cls, num_layers: int, num_logical_experts: int, num_ranks: int, num_redundant_experts: int = 0
    ) -> "ExpertPlacement":
        """Return the placement that training starts with.

        Rank ``r`` holds primaries ``r*L//R ... (r+1)*L//R - 1``, so that phantom experts are spread over the ranks.
        Redundant slot ``i``, counted over all ranks, gets expert ``i mod L``, or the next one that its rank does not
        hold. It stays empty if the rank holds all experts.
        """
        check_whole_numbers(num_logical_experts=num_logical_experts, num_ranks=num_ranks)
        check_not_negative(num_layers=num_layers, num_redundant_experts=num_redundant_experts)
        _check_experts(num_logical_experts, num_ranks)
        named = f"num_redundant_experts={num_redundant_experts}"
        check_multiple(num_redundant_experts, num_ranks, named, f"num_ranks={num_ranks}")
        n, e = num_primary_slots(num_logical_experts, num_ranks), num_redundant_experts // num_ranks
        slots_RS = np.full((num_ranks, n + e), EMPTY)
        for rank, slots_S in enumerate(slots_RS):
            first, last = (r * num_logical_experts // num_ranks for r in (rank, rank + 1))
            slots_S[: last - first] = np.arange(first, last)
            wanted_L = (np.arange(num_logical_experts) + rank * e) % num_logical_experts
            others = wanted_L[(wanted_L < first) | (wanted_L >= last)][:e]
            slots_S[n : n + len(others)] = others
        return cls(np.tile(slots_RS.ravel(), (num_layers, 1)), num_logical_experts, num_ranks)

    @property
    def num_layers(self) -> int:
        return self.physical_to_logical.shape[0]

    @property
    def num_physical_experts(self) -> int:
        return self.physical_to_logical.shape[1]

    @property
    def num_redundant_experts(self) -> int:
        """Redundant slots of a layer over all ranks, filled or empty."""
        return self.redundant_per_rank * self.num_ranks

    @property
    def num_phantom_experts(self) -> int:
        """Primary slots of a layer over all ranks that hold a phantom expert; 0 if the ranks divide the experts."""
        return self.primaries_per_rank * self.num_ranks - self.num_logical_experts

    @property
    def slots_per_rank(self) -> int:
        return self.num_physical_experts // self.num_ranks

    @property
    def primaries_per_rank(self) -> int:
        """Primary slots of each rank, ``n = ceil(L / R)``, those of phantom experts too."""
        return num_primary_slots(self.num_logical_experts, self.num_ranks)

    @property
    def redundant_per_rank(self) -> int:
        return self.slots_per_rank - self.primaries_per_rank

    @property
    def by_rank(self) -> np.ndarray:
        """``physical_to_logical`` as ``[Y, R, S]``: on every rank the primaries first, then the redundant slots."""
        return self.physical_to_logical.reshape(self.num_layers, self.num_ranks, self.slots_per_rank)

    @property
    def primaries(self) -> np.ndarray:
        """Logical ids of the primaries in the order of ranks and of rows on a rank, ``[Y, R*n]``.

        Each occurs once. ``-1`` is a phantom expert.
        """
        return self.by_rank[:, :, : self.primaries_per_rank].reshape(
            self.num_layers, self.num_ranks * self.primaries_per_rank
        )

    @property
    def row_order(self) -> np.ndarray:
        """Primaries in the order of ranks and of rows, ``[Y, R*n]``, phantom experts counted on from ``L``.

        Each row is a permutation of ``0 ... R*n - 1``, so that rows can be exchanged as if phantoms were experts.
        """
        rows_YX = self.primaries.copy()
        is_phantom_YX = rows_YX == EMPTY
        rows_YX[is_phantom_YX] = (self.num_logical_experts - 1 + is_phantom_YX.cumsum(axis=1))[is_phantom_YX]
        return rows_YX

    @cached_property
    def logical_to_physical(self) -> np.ndarray:
        """Slots of each expert, ``[Y, L, C]`` int64: the primary, then the others in order, padded with ``-1``."""
        most = int(self.replica_count.max(initial=1))
        l2p_YLC = np.empty((self.num_layers, self.num_logical_experts, most), dtype=np.int64)
        _list_slots(self.by_rank, self.primaries_per_rank, l2p_YLC)
        l2p_YLC.setflags(write=False)
        return l2p_YLC

    @property
    def primary_slot(self) -> np.ndarray:
        """Slot of each expert's primary, ``[Y, L]``: ``logical_to_physical[:, :, 0]``."""
        slot_X = np.arange(self.num_physical_experts).reshape(self.num_ranks, -1)[:, : self.primaries_per_rank].ravel()
        slot_YL = np.empty_like(self.replica_count)
        layer_X, place_X = np.nonzero(self.primaries != EMPTY)
        slot_YL[layer_X, self.primaries[layer_X, place_X]] = slot_X[place_X]
        return slot_YL

    @property
    def primary_rank(self) -> np.ndarray:
        """Rank that holds each expert's primary, ``[Y, L]``."""
        return self.primary_slot // self.slots_per_rank

    def with_slots(self, slots_YRS: np.ndarray) -> "ExpertPlacement":
        """Return a placement of the same ranks and experts with these slots; this placement if they are its own.

        Performs no checks, which would take a tenth of a plan's time: call it with valid slots only. The placement
        keeps ``slots_YRS``, which must not be written to any more.
        """
        count_YL = np.empty_like(self.replica_count)
        if not _recount(slots_YRS, self.by_rank, self.primaries_per_rank, count_YL):
            return self
        after = object.__new__(type(self))
        after.num_logical_experts, after.num_ranks = self.num_logical_experts, self.num_ranks
        after.physical_to_logical = slots_YRS.reshape(self.physical_to_logical.shape)
        after.replica_count = count_YL
        after.physical_to_logical.setflags(write=False)
        after.replica_count.setflags(write=False)
        return after

    def without_copies(self) -> "ExpertPlacement":
        """Return the placement with the same primaries and with all redundant slots empty."""
        slots_YRS = self.by_rank.copy()
        slots_YRS[:, :, self.primaries_per_rank :] = EMPTY
        slots_YP = slots_YRS.reshape(self.physical_to_logical.shape)
        return ExpertPlacement(slots_YP, self.num_logical_experts, self.num_ranks)

    def digest(self) -> bytes:
        """Return 32 bytes that identify the placement on every machine. Ranks compare them before rows move."""
        shape = np.array([self.num_ranks, self.num_logical_experts, *self.physical_to_logical.shape], dtype="<i8")
        return hashlib.sha256(shape.tobytes() + self.physical_to_logical.astype("<i8").tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExpertPlacement) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        return (
            f"ExpertPlacement(layers={self.num_layers}, logical={self.num_logical_experts},"
            f" redundant={self.num_redundant_experts}, ranks={self.num_ranks})"
        )

    def _explain_fault(self) -> ValueError:
        """Return the error for the first layer that is no placement."""
        p2l_YP, experts = self.physical_to_logical, self.num_logical_experts
        if p2l_YP.min() < EMPTY or p2l_YP.max() >= experts:
            return ValueError(
                f"physical_to_logical holds expert {p2l_YP.min() if p2l_YP.min() < EMPTY else p2l_YP.max()};"
                f" experts are 0 to {experts - 1}, and -1 is an empty slot"
            )
        phantoms = self.num_phantom_experts
        wanted = np.append(np.full(phantoms, EMPTY), np.arange(experts))
        is_wrong_Y = (np.sort(self.primaries, axis=1) != wanted).any(axis=1)
        for layer in np.flatnonzero(is_wrong_Y)[:1]:
            primaries = self.primaries[layer]
            if (primaries == EMPTY).sum() > phantoms:
                rank = int(np.flatnonzero(primaries == EMPTY)[phantoms]) // self.primaries_per_rank
                if not phantoms:
                    why = "only redundant slots may be"
                else:
                    why = f"{phantoms} may be in a layer, as {experts} experts are on {self.num_ranks} ranks"
                return ValueError(f"layer {layer}: a primary slot of rank {rank} is empty; {why}")
            times = np.bincount(primaries[primaries != EMPTY], minlength=experts)
            doubled, missing = int(times.argmax()), int(times.argmin())
            if times[missing]:
                return ValueError(
                    f"layer {layer}: expert {doubled} is there {times[doubled]} times among the primaries. Leave"
                    f" {phantoms} of the last primary slots of the ranks empty (-1) in each layer."
                )
            return ValueError(
                f"layer {layer}: expert {missing} is missing among the primaries and expert {doubled} is there"
                f" {times[doubled]} times; the first {self.primaries_per_rank} slots of the ranks must hold every"
                " expert once"
            )
        primaries_YRN = self.by_rank[:, :, : self.primaries_per_rank]
        is_late_YR = ((primaries_YRN[:, :, :-1] == EMPTY) & (primaries_YRN[:, :, 1:] != EMPTY)).any(axis=2)
        for layer, rank in np.argwhere(is_late_YR)[:1]:
            return ValueError(
                f"layer {layer}: primary slots of rank {rank} are {primaries_YRN[layer, rank].tolist()}; put empty ones"
                " (-1) behind the others"
            )
        held_YRS = np.sort(self.by_rank, axis=2)
        is_double_YRS = (held_YRS[:, :, 1:] == held_YRS[:, :, :-1]) & (held_YRS[:, :, 1:] != EMPTY)
        layer, rank, slot = np.argwhere(is_double_YRS)[0]
        return ValueError(
            f"layer {layer}: rank {rank} holds expert {held_YRS[layer, rank, slot]} twice, but a second"
            " replica on one rank has no use. Leave the slot empty (-1)."
        )


def num_primary_slots(num_logical_experts: int, num_ranks: int) -> int:
    """Return the primary slots of each rank, ``n = ceil(L / R)``, those of phantom experts too."""
    return -(-num_logical_experts // num_ranks)


def _check_experts(num_logical_experts: int, num_ranks: int) -> None:
    if not 1 <= num_ranks <= num_logical_experts:
        raise ValueError(
            f"num_logical_experts={num_logical_experts} must be at least num_ranks={num_ranks}, and both at least 1:"
            " each rank needs an expert"
        )


def _checked_slots(physical_to_logical: Any) -> np.ndarray:
    """Copy the slots to int64. Raise ``ValueError`` if they are not whole numbers that int64 holds."""
    try:
        slots = np.array(physical_to_logical, order="C")
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"physical_to_logical must be [layers, slots]: {error}") from None
    if slots.size and slots.dtype.kind not in "iu":
        raise ValueError(f"physical_to_logical has dtype {slots.dtype}; it must hold whole numbers, such as int64")
    if slots.dtype.kind == "u" and slots.max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"physical_to_logical holds expert {slots.max()}, which int64 does not hold")
    return slots.astype(np.int64, copy=False)


@compiled
def _count_copies(slots_YRS, num_primaries, count_YL):
    """Count the replicas of each expert. Return whether the slots are a placement; if not, the counts are undefined."""
    layers, ranks, num_slots = slots_YRS.shape
    experts = count_YL.shape[1]
    num_phantoms = ranks * num_primaries - experts
    seen_at_L = np.full(experts, -1)
    count_YL[:] = 0
    for layer in range(layers):
        phantoms = 0
        for rank in range(ranks):
            here = layer * ranks + rank
            for slot in range(num_slots):
                expert = slots_YRS[layer, rank, slot]
                if expert == EMPTY and slot >= num_primaries:
                    continue
                if expert == EMPTY and (slot + 1 == num_primaries or slots_YRS[layer, rank, slot + 1] == EMPTY):
                    phantoms += 1
                    continue
                if expert < 0 or expert >= experts or seen_at_L[expert] == here:
                    return False
                seen_at_L[expert] = here
                count_YL[layer, expert] += 1
        if phantoms != num_phantoms:
            return False
    is_primary_L = np.empty(experts, dtype=np.bool_)
    for layer in range(layers):
        is_primary_L[:] = False
        for rank in range(ranks):
            for slot in range(num_primaries):
                expert = slots_YRS[layer, rank, slot]
                if expert == EMPTY:
                    continue
                if is_primary_L[expert]:
                    return False
                is_primary_L[expert] = True
    return True


@compiled
def _recount(slots_YRS, before_YRS, num_primaries, count_YL):
    """Count the replicas of each expert, given that the slots are a placement. Return whether the slots are new."""
    slots_P, before_P, count_L = slots_YRS.ravel(), before_YRS.ravel(), count_YL.ravel()
    layers, ranks, num_slots = slots_YRS.shape
    changed = np.int64(0)
    for place in range(slots_P.size):
        changed |= slots_P[place] ^ before_P[place]
    count_L[:] = 1
    for layer in range(layers):
        for rank in range(ranks):
            for slot in range(num_primaries, num_slots):
                expert = slots_P[(layer * ranks + rank) * num_slots + slot]
                if expert != EMPTY:
                    count_L[layer * count_YL.shape[1] + expert] += 1
    return changed != 0


@compiled
def _list_slots(slots_YRS, num_primaries, l2p_YLC):
    """List the slots of each expert, the primary first."""
    layers, ranks, num_slots = slots_YRS.shape
    l2p_YLC[:] = EMPTY
    next_L = np.empty(l2p_YLC.shape[1], dtype=np.int64)
    for layer in range(layers):
        next_L[:] = 1
        for rank in range(ranks):
            for slot in range(num_slots):
                expert = slots_YRS[layer, rank, slot]
                if expert == EMPTY:
                    continue
                if slot < num_primaries:
                    l2p_YLC[layer, expert, 0] = rank * num_slots + slot
                else:
                    l2p_YLC[layer, expert, next_L[expert]] = rank * num_slots + slot
                    next_L[expert] += 1
