"""What no quotas can level, known before any are tried.

Shape suffixes: ``L`` logical experts, ``R`` ranks, ``S`` slots on a rank.
"""

import numpy as np

from lightning_eplb.compiled import compiled


@compiled
def must_exceed(load_L, slots_RS, num_primaries, weight_R, limit):
    """Whether it is certain that some rank has more than ``limit`` weighted parts, however tokens are divided.

    Copies link ranks. A rank that has one link only can leave to it, or take from it, what that expert has, so that it
    is known what must go through, and the rank can be taken out; and so on, until only ranks on rings are left. On
    what is left of trees, and over all rings, nobody takes what is above the limit.

    It can't be told of all layers for which it is true, but takes a quarter of the time that quotas take.
    """
    num_ranks, num_slots = slots_RS.shape
    owner_L = np.empty(load_L.size, dtype=np.int64)
    excess_R = np.empty(num_ranks, dtype=np.int64)  # of a rank and of those that were taken out behind it
    for rank in range(num_ranks):
        tokens = np.int64(0)
        for slot in range(num_primaries):
            expert = slots_RS[rank, slot]
            owner_L[expert] = rank
            tokens += load_L[expert]
        excess_R[rank] = tokens - np.int64(np.ceil(limit / weight_R[rank]))
    links_R, places_R = np.zeros(num_ranks, dtype=np.int64), np.zeros(num_ranks, dtype=np.int64)
    for rank in range(num_ranks):
        for slot in range(num_primaries, num_slots):
            expert = slots_RS[rank, slot]
            if expert >= 0:
                owner, place = owner_L[expert], rank * num_slots + slot
                links_R[rank] += 1
                links_R[owner] += 1
                places_R[rank] += place  # their sum: of the last link, the place
                places_R[owner] += place
    ends = np.empty(num_ranks + 1, dtype=np.int64)  # ranks that have one link, in the order of when that became so
    last = np.int64(0)
    for rank in range(num_ranks):
        ends[last] = rank
        last += links_R[rank] == 1
    index = 0
    while index < last:
        rank = ends[index]
        index += 1
        if links_R[rank] == 0:  # the other rank of its link was taken out before
            continue
        place = places_R[rank]
        taker = place // num_slots
        expert = slots_RS[taker, place - taker * num_slots]
        excess, load = excess_R[rank], load_L[expert]
        other = owner_L[expert] if taker == rank else taker
        if excess > (0 if taker == rank else load):
            return True
        excess_R[other] += max(excess, -load) if taker == rank else max(excess, 0)
        links_R[rank], excess_R[rank] = 0, 0
        links_R[other] -= 1
        places_R[other] -= place
        ends[last] = other
        last += links_R[other] == 1
    on_rings = np.int64(0)
    for rank in range(num_ranks):
        if links_R[rank] > 0:
            on_rings += excess_R[rank]
        elif excess_R[rank] > 0:
            return True
    return on_rings > 0
