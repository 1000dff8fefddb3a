"""Plans one layer for tokens that are divided evenly among the copies of an expert.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``N`` primaries on a rank, ``S`` slots on a rank.
"""

import numpy as np

from lightning_eplb.compiled import compiled, inlined
from lightning_eplb.policies.level import PATIENCE, best_swap, keep_slots
from lightning_eplb.policies.split import even_quotas, fullest, fullest_rank
from lightning_eplb.policies.toll import EVEN, busiest, drop_copies, weigh_copies

MOST_CHANGES = 1
"""Changes of copies that the search makes at most, for each redundant slot."""
LARGER = 130
"""Per cent of the largest copy beyond which no copy may grow when another of its expert is taken away."""
EMPTIEST = 8
"""Ranks that the fullest one always tries to trade with."""
FURTHER = 8
"""Further ranks that it tries in turn."""


@inlined
def sift_down(heap, size, key):
    """Restore a binary heap, the largest ``key[item]`` on top, after the top's key became smaller."""
    place, item = 0, heap[0]
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


@inlined
def move_in_heap(heap, place_of, size, key, item):
    """Restore a binary heap whose places are known, the largest ``key[item]`` on top, after the item's key changed."""
    place = place_of[item]
    while place > 0:
        other = heap[(place - 1) // 2]
        if key[other] > key[item] or (key[other] == key[item] and other < item):
            break
        heap[place], place_of[other] = other, place
        place = (place - 1) // 2
    while 2 * place + 1 < size:
        child = 2 * place + 1
        other = heap[child]
        if child + 1 < size:
            right = heap[child + 1]
            if key[right] > key[other] or (key[right] == key[other] and right < other):
                child, other = child + 1, right
        if key[other] < key[item] or (key[other] == key[item] and other > item):
            break
        heap[place], place_of[other] = other, place
        place = child
    heap[place], place_of[item] = item, place


@inlined
def top_of_heap(heap, key, most, found, places):
    """Fill ``found`` with the items of the ``most`` largest keys, largest first, lower index first; how many there are.

    Args:
        places: Room for ``most + 1`` places of the heap.
    """
    places[0] = 0
    waiting, count = 1, 0
    while waiting > 0 and count < most:
        best = 0
        for index in range(1, waiting):
            item, top = heap[places[index]], heap[places[best]]
            if key[item] > key[top] or (key[item] == key[top] and item < top):
                best = index
        place = places[best]
        found[count] = heap[place]
        count += 1
        waiting -= 1
        places[best] = places[waiting]
        for child in range(2 * place + 1, min(2 * place + 3, heap.size)):
            places[waiting] = child
            waiting += 1
    return count


@compiled
def count_tokens(load_L, slots_RS, copies_L, tokens_R):
    """Fill in the copies of each expert and what each rank serves."""
    copies_L[:] = 0
    for rank in range(slots_RS.shape[0]):
        for expert in slots_RS[rank]:
            if expert >= 0:
                copies_L[expert] += 1
    for rank in range(slots_RS.shape[0]):
        tokens_R[rank] = 0
        for expert in slots_RS[rank]:
            if expert >= 0:
                tokens_R[rank] += load_L[expert] // copies_L[expert]


@inlined
def holds(slots_RS, rank, expert):
    for other in slots_RS[rank]:  # noqa: SIM110 (numba compiles no generator)
        if other == expert:
            return True
    return False


@compiled
def replicate(load_L, slots_RS, num_primaries, weight_R, least):
    """Fill the redundant slots from scratch: one copy after the other to the expert with the largest share.

    Then the largest share first, each copy goes to the emptiest rank that has a slot and not this expert.
    """
    num_ranks, num_slots = slots_RS.shape
    num_redundant = num_slots - num_primaries
    slots_RS[:, num_primaries:] = -1
    copies_L = np.ones(load_L.size, dtype=np.int64)
    share_L = load_L.copy()
    order = np.argsort(-load_L, kind="mergesort")
    size = order.size
    heap = order.copy()
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
    for expert in range(load_L.size):
        share_L[expert] = load_L[expert] // copies_L[expert]
    order = np.argsort(-share_L, kind="mergesort")
    free_R = np.full(num_ranks, num_redundant)
    room_R = np.zeros(num_ranks)  # the emptiest rank has the largest, below zero
    for rank in range(num_ranks):
        for slot in range(num_primaries):
            room_R[rank] -= share_L[slots_RS[rank, slot]] * weight_R[rank]
    emptiest = np.argsort(-room_R, kind="mergesort")  # sorted, so a heap
    size = num_ranks if num_redundant else 0
    passed = np.empty(num_ranks, dtype=np.int64)
    for expert in order:
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


@compiled
def improve_copies(load_L, slots_RS, num_primaries, weight_R, least, recount, copies_L, tokens_R):
    """Local search over the redundant slots until no single change helps. In place.

    A change relieves the fullest rank: it exchanges one of its copies with the other rank's, hands one over to an
    empty slot there, or gives one of its experts a further copy there, in an empty slot or in the place of another
    copy.

    Args:
        copies_L: The copies of each expert; kept up to date.
        tokens_R: What each rank serves; kept up to date.

    Returns:
        The weighted tokens of the fullest rank.
    """
    num_ranks, num_slots = slots_RS.shape
    # The slots of each expert, as a list through all slots.
    head_L = np.full(load_L.size, -1)
    next_P = np.full(num_ranks * num_slots, -1)
    for place in range(num_ranks * num_slots):
        expert = slots_RS[place // num_slots, place % num_slots]
        if expert >= 0:
            next_P[place], head_L[expert] = head_L[expert], place
    largest = np.int64(0)
    with_fewer_L, share_L, with_more_L = np.empty_like(load_L), np.empty_like(load_L), np.empty_like(load_L)
    for expert in range(load_L.size):
        divide(load_L, copies_L, expert, with_fewer_L, share_L, with_more_L)
        largest = max(largest, share_L[expert])
    # The ranks, the fullest on top, and the emptiest on top.
    full_heap, empty_heap = np.arange(num_ranks), np.arange(num_ranks)
    full_place_R, empty_place_R = np.arange(num_ranks), np.arange(num_ranks)
    line_R, room_R = np.empty(num_ranks), np.empty(num_ranks)
    for rank in range(num_ranks):
        line_R[rank] = tokens_R[rank] * weight_R[rank]
        room_R[rank] = -line_R[rank]
        move_in_heap(full_heap, full_place_R, rank + 1, line_R, rank)
        move_in_heap(empty_heap, empty_place_R, rank + 1, room_R, rank)
    emptiest = np.empty(EMPTIEST + FURTHER, dtype=np.int64)
    places = np.empty(EMPTIEST + 1, dtype=np.int64)
    turn = failures = 0
    for _ in range(MOST_CHANGES * num_ranks * (num_slots - num_primaries)):
        full = full_heap[0]
        found = top_of_heap(empty_heap, room_R, EMPTIEST, emptiest, places)
        before = line_R[full]
        lowest = before
        from_slot = to_rank = to_slot = np.int64(-1)
        exchange = False
        for _ in range(min(FURTHER, num_ranks - found)):
            emptiest[found] = turn
            found += 1
            turn = (turn + 1) % num_ranks
        for index in range(found):
            other = emptiest[index]
            if other == full:
                continue
            for slot in range(num_primaries, num_slots):
                here = slots_RS[other, slot]
                here_share = share_L[here] if here >= 0 else np.int64(0)
                for mine in range(num_slots):
                    expert = slots_RS[full, mine]
                    if expert < 0 or expert == here or holds(slots_RS, other, expert):
                        continue
                    mine_share = share_L[expert]
                    if mine >= num_primaries and (here < 0 or not holds(slots_RS, full, here)):
                        peak = max(
                            (tokens_R[full] - mine_share + here_share) * weight_R[full],
                            (tokens_R[other] + mine_share - here_share) * weight_R[other],
                        )
                        if peak < lowest:
                            lowest, from_slot, to_rank, to_slot = peak, np.int64(mine), other, np.int64(slot)
                            exchange = True
                    new_share = with_more_L[expert]
                    if not recount or new_share < least:
                        continue
                    peak = max(
                        (tokens_R[full] - mine_share + new_share) * weight_R[full],
                        (tokens_R[other] + new_share - here_share) * weight_R[other],
                    )
                    if peak >= lowest:
                        continue
                    if here >= 0:  # the ranks that keep a copy of what is replaced get more of it
                        more = with_fewer_L[here] - here_share
                        if 100 * (here_share + more) > LARGER * largest:
                            continue
                        place = head_L[here]
                        while place >= 0 and peak < lowest:
                            rank = place // num_slots
                            if rank != other:
                                less = mine_share - new_share if rank == full else np.int64(0)
                                peak = max(peak, (tokens_R[rank] + more - less) * weight_R[rank])
                            place = next_P[place]
                    if peak < lowest:
                        lowest, from_slot, to_rank, to_slot = peak, np.int64(mine), other, np.int64(slot)
                        exchange = False
        if to_rank < 0:
            failures += 1
            if failures * FURTHER >= num_ranks:
                return before
            continue
        failures = 0
        expert, here = slots_RS[full, from_slot], slots_RS[to_rank, to_slot]
        place = to_rank * num_slots + to_slot
        if here >= 0:
            unlink(head_L, next_P, here, place)
            tokens_R[to_rank] -= share_L[here]
            shift_tokens(here, with_fewer_L[here] - share_L[here], head_L, next_P, num_slots, tokens_R)
            copies_L[here] -= 1
            divide(load_L, copies_L, here, with_fewer_L, share_L, with_more_L)
        if exchange:
            unlink(head_L, next_P, expert, full * num_slots + from_slot)
            tokens_R[full] -= share_L[expert]
            shift_tokens(expert, with_fewer_L[expert] - share_L[expert], head_L, next_P, num_slots, tokens_R)
            copies_L[expert] -= 1
            divide(load_L, copies_L, expert, with_fewer_L, share_L, with_more_L)
            slots_RS[full, from_slot] = here
            if here >= 0:
                back = full * num_slots + from_slot
                shift_tokens(here, with_more_L[here] - share_L[here], head_L, next_P, num_slots, tokens_R)
                copies_L[here] += 1
                divide(load_L, copies_L, here, with_fewer_L, share_L, with_more_L)
                next_P[back], head_L[here] = head_L[here], back
                tokens_R[full] += share_L[here]
        shift_tokens(expert, with_more_L[expert] - share_L[expert], head_L, next_P, num_slots, tokens_R)
        copies_L[expert] += 1
        divide(load_L, copies_L, expert, with_fewer_L, share_L, with_more_L)
        next_P[place], head_L[expert] = head_L[expert], place
        slots_RS[to_rank, to_slot] = expert
        tokens_R[to_rank] += share_L[expert]
        # Each rank that serves other tokens now: those of both experts, and the one that lost its copy of either.
        for part in range(4):
            changed = expert if part == 0 else here
            place = full * num_slots if part == 2 else to_rank * num_slots
            if part < 2:
                place = head_L[changed] if changed >= 0 else np.int64(-1)
            while place >= 0:
                rank = place // num_slots
                line_R[rank] = tokens_R[rank] * weight_R[rank]
                room_R[rank] = -line_R[rank]
                move_in_heap(full_heap, full_place_R, num_ranks, line_R, rank)
                move_in_heap(empty_heap, empty_place_R, num_ranks, room_R, rank)
                place = next_P[place] if part < 2 else np.int64(-1)
    return fullest(tokens_R, weight_R)


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
def divide(load_L, copies_L, expert, with_fewer_L, share_L, with_more_L):
    """Fill in what a copy serves: with one copy fewer, as it is, and with one more."""
    load, copies = load_L[expert], copies_L[expert]
    if copies > 1:
        share_L[expert] = load // copies
        with_fewer_L[expert] = load // (copies - 1)
        with_more_L[expert] = load // (copies + 1)
    else:
        share_L[expert] = with_fewer_L[expert] = load
        with_more_L[expert] = load >> 1


@inlined
def shift_tokens(expert, more, head_L, next_P, num_slots, tokens_R):
    """Tell the ranks in an expert's list that each of its copies serves so many more."""
    place = head_L[expert]
    while place >= 0:
        tokens_R[place // num_slots] += more
        place = next_P[place]


@compiled
def plan_even(load_L, likely_L, slots_RS, num_primaries, weight_R, node_R, prices, copy, gain, enough, most_swaps):
    """Plan a layer with redundant slots. ``slots_RS`` is changed in place, or left alone where nothing pays.

    The copies are chosen anew, and then pairs of primaries swapped that relieve the fullest rank, the copies improved
    after each. That is tried with copies of the most popular experts, then with none, and last with other counts of
    copies for the best of both.

    Args and returns: as :func:`lightning_eplb.policies.level.plan_level`.
    """
    num_ranks = slots_RS.shape[0]
    copies_L = np.empty(load_L.size, dtype=np.int64)
    tokens_R = np.empty(num_ranks, dtype=np.int64)
    share_L = np.empty_like(load_L)
    count_tokens(load_L, slots_RS, copies_L, tokens_R)
    before = fullest(tokens_R, weight_R)
    if before <= enough and copy == 0:
        return 0.0, 0
    trial_RS = slots_RS.copy()
    best_RS = slots_RS
    best_peak, best_price, best_swaps = before, 0.0, 0
    least, present = np.int64(copy), np.int64(0)
    quota_RS = np.empty_like(slots_RS)
    if copy > 0:
        present = busiest(slots_RS, num_primaries)
        even_quotas(load_L, slots_RS, quota_RS, tokens_R)
        before = weigh_copies(
            load_L, likely_L, slots_RS, num_primaries, weight_R, copy, present, EVEN, quota_RS, tokens_R
        )
        best_peak = drop_copies(
            load_L, likely_L, trial_RS, num_primaries, weight_R, copy, present, EVEN, before, enough, quota_RS, tokens_R
        )
        if best_peak < before:
            best_RS = trial_RS.copy()
    lowest = best_peak - gain
    for attempt in range(3):
        if attempt > 0 and best_peak <= enough:
            break
        if attempt == 1 and load_L.max() * weight_R.min() >= lowest:
            continue  # without copies, the largest expert alone makes a fuller rank
        price, swaps = 0.0, 0
        if attempt == 2:
            trial_RS[:] = best_RS
            price, swaps = best_price, best_swaps
        else:
            trial_RS[:] = slots_RS
        if attempt == 1:
            trial_RS[:, num_primaries:] = -1
        if attempt == 0:
            replicate(load_L, trial_RS, num_primaries, weight_R, least)
        count_tokens(load_L, trial_RS, copies_L, tokens_R)
        own_RN = trial_RS[:, :num_primaries]
        reached, stalled = np.inf, 0
        while True:
            peak = fullest(tokens_R, weight_R)
            if attempt != 1:
                peak = improve_copies(
                    load_L, trial_RS, num_primaries, weight_R, least, attempt == 2, copies_L, tokens_R
                )
            if copy > 0:
                even_quotas(load_L, trial_RS, quota_RS, tokens_R)
                peak = drop_copies(
                    load_L, likely_L, trial_RS, num_primaries, weight_R, copy, present, EVEN, lowest - price, enough,
                    quota_RS, tokens_R,
                )  # fmt: skip
                count_tokens(load_L, trial_RS, copies_L, tokens_R)
            if peak + price < lowest:
                lowest, best_peak, best_price, best_swaps = peak + price, peak, price, swaps
                best_RS = trial_RS.copy()
            if peak + price < reached:
                reached, stalled = peak + price, 0
            stalled += 1
            if peak <= enough or swaps >= most_swaps or stalled > max(PATIENCE // num_ranks, 1):
                break
            rank = fullest_rank(tokens_R, weight_R)
            for expert in range(load_L.size):
                share_L[expert] = load_L[expert] // copies_L[expert]
            partner, mine, theirs = best_swap(rank, tokens_R, weight_R, share_L, own_RN, node_R, prices[0], prices[1])
            if partner < 0:
                break
            given, taken = own_RN[rank, mine], own_RN[partner, theirs]
            drop_copy(trial_RS, partner, given, num_primaries)
            drop_copy(trial_RS, rank, taken, num_primaries)
            own_RN[rank, mine], own_RN[partner, theirs] = taken, given
            price += prices[0] if node_R[rank] == node_R[partner] else prices[1]
            swaps += 1
            count_tokens(load_L, trial_RS, copies_L, tokens_R)
    if best_peak == before:
        return 0.0, 0
    keep_slots(slots_RS, best_RS, num_primaries)
    slots_RS[:] = best_RS
    return before - best_peak - best_price, best_swaps


@inlined
def drop_copy(slots_RS, rank, expert, num_primaries):
    """Empty the redundant slot of ``rank`` that holds ``expert``, if there is one: its primary comes there."""
    for slot in range(num_primaries, slots_RS.shape[1]):
        if slots_RS[rank, slot] == expert:
            slots_RS[rank, slot] = -1
