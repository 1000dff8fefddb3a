"""Copies for tokens that are divided evenly, from scratch: how many of each expert, and on which ranks. Compiled.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``S`` slots on a rank.
"""

import numpy as np

from lightning_eplb.compiled import compiled, inlined
from lightning_eplb.policies.spill import PARTS_BITS
from lightning_eplb.policies.trade import holds

DONORS = 8
"""Experts that are asked to leave a copy to another: so many, those first whose other copies grow least by it."""


@inlined
def sift_down(heap, size, key, place=0):
    """Restore a binary heap, the largest ``key[item]`` on top, after the key at ``place`` became smaller."""
    item = heap[place]
    while 2 * place + 1 < size:
        child = 2 * place + 1
        right = child + 1
        if right < size and (
            key[heap[right]] > key[heap[child]] or (key[heap[right]] == key[heap[child]] and heap[right] < heap[child])
        ):
            child = right
        if key[heap[child]] < key[item] or (key[heap[child]] == key[item] and heap[child] > item):
            break
        heap[place] = heap[child]
        place = child
    heap[place] = item


@inlined
def heapify(heap, key):
    """Make a list of items a binary heap, the largest ``key[item]`` on top."""
    for place in range(heap.size // 2 - 1, -1, -1):
        sift_down(heap, heap.size, key, place)


@inlined
def sift_up(heap, place, key):
    """Restore a binary heap, the largest ``key[item]`` on top, after an item was put at its end."""
    item = heap[place]
    while place > 0:
        parent = (place - 1) // 2
        if key[heap[parent]] > key[item] or (key[heap[parent]] == key[item] and heap[parent] < item):
            break
        heap[place] = heap[parent]
        place = parent
    heap[place] = item


@compiled
def replicate(load_L, slots_RS, num_primaries, weight_R, least):
    """Fill the redundant slots from scratch: one copy after the other to the expert with the largest share.

    At last each copy goes, the largest share first, to the emptiest rank that has a slot and not this expert. With one
    primary and one redundant slot on each of equal ranks, the numbers of copies are improved before.
    """
    num_ranks, num_slots = slots_RS.shape
    num_redundant = num_slots - num_primaries
    slots_RS[:, num_primaries:] = -1
    copies_L, share_L = np.ones(load_L.size, dtype=np.int64), load_L.copy()
    heap = np.arange(load_L.size)
    heapify(heap, share_L)
    size = heap.size
    for _ in range(num_ranks * num_redundant):
        while size and copies_L[heap[0]] >= num_ranks:
            size -= 1
            heap[0] = heap[size]
            sift_down(heap, size, share_L)
        if not size or share_L[heap[0]] // 2 < least:
            break
        expert = heap[0]
        copies_L[expert] += 1
        share_L[expert] = load_L[expert] // copies_L[expert]
        sift_down(heap, size, share_L)
    if num_redundant == 1 and num_primaries == 1 and weight_R.min() == weight_R.max():
        ranks, copied = balance_counts(load_L, slots_RS[:, :num_primaries], least, copies_L, share_L)
        deal_in_order(slots_RS, ranks, copied, copies_L)
    else:
        deal(load_L, slots_RS, num_primaries, weight_R, copies_L, share_L)


@compiled
def deal_in_order(slots_RS, ranks, copied, copies_L):
    """As :func:`deal`, where ranks hold one primary and have one redundant slot.

    Args:
        slots_RS: The redundant slots are empty.
        ranks: The emptiest first.
        copied: The experts that have copies, the smallest share first.
        copies_L: How many, the primary among them.
    """
    next_place, passed = 0, np.int64(-1)  # the owner of the expert whose turn it was
    for index in range(copied.size - 1, -1, -1):
        expert = copied[index]
        for _ in range(copies_L[expert] - 1):
            rank = passed
            if rank >= 0 and slots_RS[rank, 0] != expert:
                passed = np.int64(-1)
            else:
                if next_place < ranks.size and slots_RS[ranks[next_place], 0] == expert:
                    passed = ranks[next_place]
                    next_place += 1
                if next_place == ranks.size:
                    return
                rank = ranks[next_place]
                next_place += 1
            slots_RS[rank, 1] = expert


@compiled
def deal(load_L, slots_RS, num_primaries, weight_R, copies_L, share_L):
    """Give each copy, the largest share first, to the emptiest rank that has a slot and not this expert."""
    num_ranks, num_slots = slots_RS.shape
    num_redundant = num_slots - num_primaries
    key_L = np.empty(load_L.size, dtype=np.int64)  # those that have copies, the largest share first
    num_copied = 0
    for expert in range(load_L.size):
        if copies_L[expert] > 1:
            key_L[num_copied] = ((np.int64(1) << PARTS_BITS) - share_L[expert]) * load_L.size + expert
            num_copied += 1
    key_L[:num_copied].sort()
    free_R = np.full(num_ranks, num_redundant)
    room_R = np.zeros(num_ranks)  # the emptiest rank has the largest, below zero
    for rank in range(num_ranks):
        for slot in range(num_primaries):
            room_R[rank] -= share_L[slots_RS[rank, slot]] * weight_R[rank]
    emptiest = np.arange(num_ranks)
    heapify(emptiest, room_R)
    size = num_ranks if num_redundant else 0
    passed = np.empty(num_ranks, dtype=np.int64)
    for key in key_L[:num_copied]:
        expert = key % load_L.size
        num_passed = 0
        for _ in range(copies_L[expert] - 1):
            while size and holds(slots_RS, emptiest[0], expert):
                passed[num_passed] = emptiest[0]
                num_passed += 1
                size -= 1
                emptiest[0] = emptiest[size]
                sift_down(emptiest, size, room_R)
            if not size:
                break
            rank = emptiest[0]
            slots_RS[rank, num_slots - free_R[rank]] = expert
            free_R[rank] -= 1
            room_R[rank] -= share_L[expert] * weight_R[rank]
            if free_R[rank] == 0:
                size -= 1
                emptiest[0] = emptiest[size]
            sift_down(emptiest, size, room_R)
        for index in range(num_passed):
            emptiest[size] = passed[index]
            size += 1
            sift_up(emptiest, size - 1, room_R)


@inlined
def settle(items, keys, at, size, item, key):
    """Restore the order of a list, the smallest of ``keys`` first, with another key for an item."""
    place = at[item]
    while place > 0 and keys[place - 1] > key:
        items[place], keys[place] = items[place - 1], keys[place - 1]
        at[items[place]] = place
        place -= 1
    while place + 1 < size and keys[place + 1] < key:
        items[place], keys[place] = items[place + 1], keys[place + 1]
        at[items[place]] = place
        place += 1
    items[place], keys[place], at[item] = item, key, place


@compiled
def sorted_by(key):
    """The indices of the keys, parts of a layer, in the order of the keys; lower index first."""
    order = np.empty_like(key)
    for index in range(key.size):
        order[index] = key[index] * key.size + index
    order.sort()
    for index in range(key.size):
        order[index] %= key.size
    return order


@compiled
def balance_counts(load_L, own_RN, least, copies_L, share_L):
    """Let experts leave copies to others as long as that lowers the fullest rank. In place.

    With one redundant slot on each rank it is known where copies go best: the largest to the rank that is emptiest
    without, and so on. So only their numbers are searched, and each change is judged with all copies dealt anew.

    Args:
        own_RN: The primaries of each rank; ranks are of equal capacity.
        least: Parts that a further copy must serve.
        copies_L, share_L: The copies of each expert, and what each serves; kept up to date.

    Returns:
        The ranks, the emptiest without copies first, and the experts that have copies, the smallest share first.
    """
    num_ranks = own_RN.shape[0]
    owner_L, fewer_L = np.empty_like(load_L), np.empty_like(load_L)
    base_R = np.zeros(num_ranks, dtype=np.int64)
    for rank in range(num_ranks):
        for expert in own_RN[rank]:
            owner_L[expert] = rank
            base_R[rank] += share_L[expert]
    ranks = sorted_by(base_R)
    line, at_R = np.empty_like(base_R), np.empty(num_ranks, dtype=np.int64)  # in the order of ranks: their tokens
    for place in range(num_ranks):
        line[place], at_R[ranks[place]] = base_R[ranks[place]], place
    copied, at_L = np.empty_like(load_L), np.empty_like(load_L)  # the experts with copies, the smallest share first
    shares = np.empty_like(load_L)  # in their order
    num_copied = num_items = 0
    for expert in sorted_by(share_L):
        if copies_L[expert] > 1:
            copied[num_copied], shares[num_copied], at_L[expert] = expert, share_L[expert], num_copied
            num_copied += 1
            num_items += copies_L[expert] - 1
            fewer_L[expert] = load_L[expert] // (copies_L[expert] - 1)
    takers, donors = np.empty(3, dtype=np.int64), np.empty(DONORS + 1, dtype=np.int64)
    for _ in range(num_ranks):
        peak, place, item = paired_peak(line, copied, shares, num_copied, copies_L, np.int64(1) << PARTS_BITS)
        takers[:] = -1
        takers[0] = item
        for expert in own_RN[ranks[place]]:
            if takers[1] < 0 or share_L[expert] > share_L[takers[1]]:
                takers[1], takers[2] = expert, takers[1]
            elif takers[2] < 0 or share_L[expert] > share_L[takers[2]]:
                takers[2] = expert
        donors[:] = -1  # the first one remains: a free slot
        num_donors = 1
        for index in range(num_copied):
            expert = copied[index]
            growth = fewer_L[expert] - share_L[expert]
            if num_donors > DONORS and growth >= fewer_L[donors[DONORS]] - share_L[donors[DONORS]]:
                continue
            to = num_donors
            while to > 1 and growth < fewer_L[donors[to - 1]] - share_L[donors[to - 1]]:
                if to <= DONORS:
                    donors[to] = donors[to - 1]
                to -= 1
            if to <= DONORS:
                donors[to] = expert
                num_donors = min(num_donors + 1, DONORS + 1)
        is_lower = False
        for taker in takers:
            if taker < 0 or copies_L[taker] >= num_ranks or load_L[taker] // (copies_L[taker] + 1) < least:
                continue
            num_copied = change_count(
                taker, 1, load_L, owner_L, base_R, ranks, line, at_R, copied, shares, at_L, num_copied, copies_L,
                share_L, fewer_L,
            )  # fmt: skip
            for donor in donors[1 if num_items == num_ranks else 0 : num_donors]:
                if donor == taker:
                    continue
                if donor >= 0:
                    num_copied = change_count(
                        donor, -1, load_L, owner_L, base_R, ranks, line, at_R, copied, shares, at_L, num_copied,
                        copies_L, share_L, fewer_L,
                    )  # fmt: skip
                if paired_peak(line, copied, shares, num_copied, copies_L, peak)[0] < peak:
                    num_items += donor < 0
                    is_lower = True
                    break
                if donor >= 0:
                    num_copied = change_count(
                        donor, 1, load_L, owner_L, base_R, ranks, line, at_R, copied, shares, at_L, num_copied,
                        copies_L, share_L, fewer_L,
                    )  # fmt: skip
            if is_lower:
                break
            num_copied = change_count(
                taker, -1, load_L, owner_L, base_R, ranks, line, at_R, copied, shares, at_L, num_copied, copies_L,
                share_L, fewer_L,
            )  # fmt: skip
        if not is_lower:
            break
    return ranks, copied[:num_copied]


@compiled
def change_count(
    expert, change, load_L, owner_L, base_R, ranks, line, at_R, copied, shares, at_L, num_copied, copies_L, share_L,
    fewer_L,
):  # fmt: skip
    """Give an expert one copy more or fewer, and restore both orders. Returns how many experts have copies."""
    rank = owner_L[expert]
    base_R[rank] -= share_L[expert]
    copies_L[expert] += change
    share_L[expert] = load_L[expert] // copies_L[expert]
    base_R[rank] += share_L[expert]
    settle(ranks, line, at_R, ranks.size, rank, base_R[rank])
    if copies_L[expert] == 1:  # it leaves the list
        for place in range(at_L[expert], num_copied - 1):
            copied[place], shares[place] = copied[place + 1], shares[place + 1]
            at_L[copied[place]] = place
        return num_copied - 1
    fewer_L[expert] = load_L[expert] // (copies_L[expert] - 1)
    if copies_L[expert] == 2 and change > 0:
        copied[num_copied], shares[num_copied], at_L[expert] = expert, share_L[expert], num_copied
        num_copied += 1
    settle(copied, shares, at_L, num_copied, expert, share_L[expert])
    return num_copied


@compiled
def paired_peak(line, copied, shares, num_copied, copies_L, limit):
    """The fullest rank when the largest copy goes to the emptiest rank, and so on.

    Args:
        line: The ranks' tokens without copies, the emptiest first.
        copied, shares: The experts that have copies and what each serves, the smallest share first.

    Returns:
        Its tokens, its place among the ranks, and the expert of its copy, -1 if it has none; of the first rank that has
        ``limit`` tokens, if there is one.
    """
    end = np.int64(0)
    peak, found, item = np.int64(-1), line.size - 1, np.int64(-1)
    for index in range(num_copied - 1, -1, -1):
        expert = copied[index]
        end += copies_L[expert] - 1
        tokens = line[end - 1] + shares[index]  # of its copies, the last one goes to the fullest rank
        if tokens > peak:
            peak, found, item = tokens, end - 1, expert
            if peak >= limit:
                return peak, found, item
    if end < line.size and line[-1] > peak:
        return line[-1], line.size - 1, np.int64(-1)
    return peak, found, item
