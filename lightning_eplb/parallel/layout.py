"""Where a rank's token-expert pairs lie: as they are sent, and as they are served. Compiled: the device waits for it.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``S`` slots of a rank.
"""

import numpy as np

from lightning_eplb._compiled import compiled


@compiled
def lay_out(counts_L, slots_RS, sent_RS, received_RS, serving_order, num_primaries, starts):
    """Lay out the pairs, part by part: what is sent, by rank and slot; then what is served, by slot and source rank.

    The pairs that a rank sends to a slot are a run: they lie one behind the other among its pairs sorted by expert, and
    also where they arrive, rank by rank and within a rank slot by slot.

    Args:
        counts_L: This rank's pairs of each logical expert.
        slots_RS: The expert of each slot, -1 where it is empty.
        sent_RS: Pairs that this rank sends to each slot.
        received_RS: Pairs that this rank's slots receive from each rank.
        serving_order: This rank's filled slots in the order in which they are served, primaries first.
        num_primaries: How many of these are primaries.
        starts: The first slot of each part. As all arrays, int64.

    Returns:
        ``shifts``, ``lengths`` and ``ends`` in one array, and ``counts``. Shifts repeated as often as lengths say, plus
        ``0, 1, 2 ...``, are indices: of what is sent, into the pairs sorted by expert; then of what is served, part by
        part, into the pairs of the part as they arrive. ``ends`` adds up what the slots serve, in their order, anew in
        each part and from the first redundant one. ``counts[0]`` are each part's pairs for each rank, ``counts[1]``
        those from each rank.
    """
    num_ranks, num_slots = slots_RS.shape
    num_parts, num_served = starts.size, serving_order.size
    num_runs = num_ranks * (num_slots + num_served)
    table = np.empty(2 * num_runs + num_served, dtype=np.int64)
    shifts, lengths, ends = table[:num_runs], table[num_runs : 2 * num_runs], table[2 * num_runs :]
    counts = np.zeros((2, num_parts, num_ranks), dtype=np.int64)
    next_L = np.empty_like(counts_L)
    total = 0
    for expert in range(counts_L.size):
        next_L[expert] = total
        total += counts_L[expert]
    first_RS = np.zeros_like(slots_RS)
    for rank in range(num_ranks):
        for slot in range(num_slots):
            if slots_RS[rank, slot] >= 0:
                first_RS[rank, slot] = next_L[slots_RS[rank, slot]]
                next_L[slots_RS[rank, slot]] += sent_RS[rank, slot]
    run, place = 0, 0
    for part in range(num_parts):
        stop = starts[part + 1] if part + 1 < num_parts else num_slots
        for rank in range(num_ranks):
            for slot in range(starts[part], stop):
                shifts[run], lengths[run] = first_RS[rank, slot] - place, sent_RS[rank, slot]
                place += lengths[run]
                counts[0, part, rank] += lengths[run]
                run += 1
    for part in range(num_parts):
        stop = starts[part + 1] if part + 1 < num_parts else num_slots
        arrived = 0
        for rank in range(num_ranks):
            for slot in range(starts[part], stop):
                first_RS[rank, slot] = arrived
                arrived += received_RS[rank, slot]
                counts[1, part, rank] += received_RS[rank, slot]
        total = 0
        for turn in range(starts[part], min(stop, num_served)):
            slot = serving_order[turn]
            if turn == num_primaries:
                total = 0
            for rank in range(num_ranks):
                shifts[run], lengths[run] = first_RS[rank, slot] - place, received_RS[rank, slot]
                place += lengths[run]
                total += lengths[run]
                run += 1
            ends[turn] = total
    return table, counts
