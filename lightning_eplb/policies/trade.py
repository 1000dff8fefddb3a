"""Trades with redundant copies that serve equal parts: between ranks and between experts, one at a time, compiled.

Shape suffixes: ``L`` logical experts, ``P`` slots of all ranks, ``R`` ranks, ``S`` slots on a rank.
"""

import numpy as np

from lightning_eplb.compiled import compiled, inlined
from lightning_eplb.policies.spill import FEW_RANKS

LARGER = 130
"""Per cent of the largest copy beyond which no copy may grow when another of its expert is taken away."""
TRIED = 16
"""The emptiest ranks that the fullest one tries to trade with; more only where none of these helps."""


@inlined
def holds(slots_RS, rank, expert):
    for other in slots_RS[rank]:  # noqa: SIM110 (numba compiles no generator)
        if other == expert:
            return True
    return False


@compiled
def take_stock(load_L, slots_RS, weight_R, copies_L, head_L, next_P, share_L, fewer_L, more_L, tokens_R, line_R, order):
    """Fill in what :func:`trade_copies` keeps up to date.

    Args:
        copies_L: The copies of each expert, its primary among them.
        head_L, next_P: Its slots, as a list through all slots, ``rank * S + slot``; -1 ends it.
        share_L: What each of them serves.
        fewer_L, more_L: The same with one copy fewer, and with one more.
        tokens_R, line_R: What each rank serves, and the same in weighted parts.
        order: The ranks, the emptiest first.
    """
    num_ranks, num_slots = slots_RS.shape
    copies_L[:] = 0
    head_L[:] = -1
    for rank in range(num_ranks):
        for slot in range(num_slots):
            expert = slots_RS[rank, slot]
            if expert >= 0:
                place = rank * num_slots + slot
                next_P[place], head_L[expert] = head_L[expert], place
                copies_L[expert] += 1
    for expert in range(load_L.size):
        if copies_L[expert] == 1:
            share_L[expert] = fewer_L[expert] = load_L[expert]
            more_L[expert] = load_L[expert] >> 1
        else:
            divide(load_L, copies_L, expert, share_L, fewer_L, more_L)
    for rank in range(num_ranks):
        tokens_R[rank] = 0
        for expert in slots_RS[rank]:
            if expert >= 0:
                tokens_R[rank] += share_L[expert]
        line_R[rank] = tokens_R[rank] * weight_R[rank]
    if num_ranks > FEW_RANKS:
        order[:] = np.argsort(line_R, kind="mergesort")
        return
    for rank in range(num_ranks):
        place = np.int64(0)
        for other in range(rank):
            place += line_R[other] <= line_R[rank]
        for other in range(rank + 1, num_ranks):
            place += line_R[other] < line_R[rank]
        order[place] = rank


@inlined
def divide(load_L, copies_L, expert, share_L, fewer_L, more_L):
    share_L[expert] = load_L[expert] // copies_L[expert]
    fewer_L[expert] = load_L[expert] // max(copies_L[expert] - 1, 1)
    more_L[expert] = load_L[expert] // (copies_L[expert] + 1)


@inlined
def link(head_L, next_P, expert, place):
    """Put a slot into the list of its expert's slots."""
    next_P[place], head_L[expert] = head_L[expert], place


@inlined
def unlink(head_L, next_P, expert, place):
    """Take a slot out of the list of its expert's slots."""
    if head_L[expert] == place:
        head_L[expert] = next_P[place]
        return
    before = head_L[expert]
    while next_P[before] != place:
        before = next_P[before]
    next_P[before] = next_P[place]


@inlined
def sort_ranks(order, line_R):
    """Restore the order of the ranks after some of them changed: insertion sort."""
    for index in range(1, order.size):
        rank = order[index]
        line = line_R[rank]
        other = index - 1
        while other >= 0 and line_R[order[other]] > line:
            order[other + 1] = order[other]
            other -= 1
        order[other + 1] = rank


@inlined
def sink(order, line_R, index):
    """Restore the order after the rank at ``index`` became emptier."""
    rank = order[index]
    low, high = 0, index
    while low < high:
        middle = (low + high) // 2
        if line_R[order[middle]] > line_R[rank]:
            high = middle
        else:
            low = middle + 1
    for other in range(index, low, -1):
        order[other] = order[other - 1]
    order[low] = rank


@inlined
def rise(order, line_R, index):
    """Restore the order after the rank at ``index`` became fuller."""
    rank = order[index]
    low, high = index, order.size - 1
    while low < high:
        middle = (low + high + 1) // 2
        if line_R[order[middle]] < line_R[rank]:
            low = middle
        else:
            high = middle - 1
    for other in range(index, low):
        order[other] = order[other + 1]
    order[low] = rank


@compiled
def recount(
    load_L, expert, change, num_slots, weight_R, copies_L, head_L, next_P, share_L, fewer_L, more_L, tokens_R, line_R
):
    """Give an expert one copy more or fewer; the ranks in its list get what each of them serves now."""
    before = share_L[expert]
    copies_L[expert] += change
    divide(load_L, copies_L, expert, share_L, fewer_L, more_L)
    place = head_L[expert]
    while place >= 0:
        rank = place // num_slots
        tokens_R[rank] += share_L[expert] - before
        line_R[rank] = tokens_R[rank] * weight_R[rank]
        place = next_P[place]


@compiled
def trade_copies(
    load_L,
    slots_RS,
    num_primaries,
    weight_R,
    least,
    most_changes,
    copies_L,
    head_L,
    next_P,
    share_L,
    fewer_L,
    more_L,
    tokens_R,
    line_R,
    order,
):
    """Local search over the redundant slots until no single change helps. In place.

    A change relieves the fullest rank: it exchanges one of its copies with the other rank's, hands one over to an
    empty slot there, or gives one of its experts a further copy there, in an empty slot or in the place of another
    copy.

    Args:
        least: Parts that a further copy must serve.
        most_changes: No more are made.
        copies_L, ..., order: As in :func:`take_stock`; kept up to date.

    Returns:
        The weighted parts of the fullest rank.
    """
    num_ranks, num_slots = slots_RS.shape
    largest = np.int64(0)
    for expert in range(load_L.size):
        largest = max(largest, share_L[expert])
    for _ in range(most_changes):
        full = order[num_ranks - 1]
        lowest, heavy = line_R[full], weight_R[full]
        from_slot = to_slot = index_of = np.int64(-1)
        is_exchange = False
        for index in range(num_ranks - 1):
            other = order[index]
            if line_R[other] >= lowest or (index >= TRIED and index_of >= 0):
                break
            weight = weight_R[other]
            for slot in range(num_primaries, num_slots):
                here = slots_RS[other, slot]
                here_share = share_L[here] if here >= 0 else np.int64(0)
                full_after, other_after = tokens_R[full] + here_share, tokens_R[other] - here_share
                for mine in range(num_primaries, num_slots):
                    expert = slots_RS[full, mine]
                    if expert < 0 or expert == here:
                        continue
                    share = share_L[expert]
                    peak = max((full_after - share) * heavy, (other_after + share) * weight)
                    if (
                        peak < lowest
                        and not holds(slots_RS, other, expert)
                        and (here < 0 or not holds(slots_RS, full, here))
                    ):
                        lowest, from_slot, to_slot, index_of = peak, np.int64(mine), np.int64(slot), index
                        is_exchange = True
                floor, more = 0.0, np.int64(0)  # of the ranks that keep a copy of what is replaced, and get more of it
                if here >= 0:
                    if 100 * fewer_L[here] > LARGER * largest:
                        continue
                    place = head_L[here]
                    while place >= 0 and floor < lowest:
                        rank = place // num_slots
                        if rank == full:
                            more = fewer_L[here] - here_share
                        elif rank != other:
                            floor = max(floor, (tokens_R[rank] + fewer_L[here] - here_share) * weight_R[rank])
                        place = next_P[place]
                    if floor >= lowest:
                        continue
                for mine in range(num_slots):
                    expert = slots_RS[full, mine]
                    if expert < 0 or expert == here or more_L[expert] < least:
                        continue
                    peak = max(
                        (tokens_R[full] - share_L[expert] + more_L[expert] + more) * heavy,
                        (other_after + more_L[expert]) * weight,
                        floor,
                    )
                    if peak < lowest and not holds(slots_RS, other, expert):
                        lowest, from_slot, to_slot, index_of = peak, np.int64(mine), np.int64(slot), index
                        is_exchange = False
        if index_of < 0:
            break
        other = order[index_of]
        expert, here = slots_RS[full, from_slot], slots_RS[other, to_slot]
        here_place, place = full * num_slots + from_slot, other * num_slots + to_slot
        slots_RS[other, to_slot] = expert
        if here >= 0:
            unlink(head_L, next_P, here, place)
        if is_exchange:
            unlink(head_L, next_P, expert, here_place)
            link(head_L, next_P, expert, place)
            relief = share_L[expert]
            slots_RS[full, from_slot] = here
            if here >= 0:
                link(head_L, next_P, here, here_place)
                relief -= share_L[here]
            tokens_R[full] -= relief
            tokens_R[other] += relief
            line_R[full] = tokens_R[full] * weight_R[full]
            sink(order, line_R, np.int64(num_ranks - 1))
            line_R[other] = tokens_R[other] * weight_R[other]
            at = index_of
            while order[at] != other:
                at += 1
            rise(order, line_R, at)
            continue
        if here >= 0:
            tokens_R[other] -= share_L[here]
            recount(
                load_L, here, np.int64(-1), num_slots, weight_R, copies_L, head_L, next_P, share_L, fewer_L, more_L,
                tokens_R, line_R,
            )  # fmt: skip
        recount(
            load_L, expert, np.int64(1), num_slots, weight_R, copies_L, head_L, next_P, share_L, fewer_L, more_L,
            tokens_R, line_R,
        )  # fmt: skip
        link(head_L, next_P, expert, place)
        tokens_R[other] += share_L[expert]
        line_R[other] = tokens_R[other] * weight_R[other]
        sort_ranks(order, line_R)
    return line_R[order[num_ranks - 1]]
