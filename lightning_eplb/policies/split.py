"""Who serves how many: the tokens of an expert, divided among its copies.

Shape suffixes: ``L`` logical experts, ``P`` physical experts (slots), ``R`` ranks.
"""

import numpy as np


def split_evenly(
    counts_RL: np.ndarray,
    physical_to_logical_P: np.ndarray,
    copy_of_slot_P: np.ndarray,
    replica_count_L: np.ndarray,
) -> np.ndarray:
    """Divide what each rank sends to each expert evenly among the expert's copies.

    What does not divide goes to one copy more each, and source rank ``r`` starts with copy ``r`` (modulo the
    copies), so that the remainders of many ranks do not all meet at the primary. Whole numbers only: every rank that
    is given the same counts finds the same split.

    Args:
        counts_RL: Tokens that source rank ``r`` routes to logical expert ``l``, int64 ``[R, L]``.
        physical_to_logical_P: The logical expert of each slot, ``-1`` where it is empty, int64 ``[P]``.
        copy_of_slot_P: Which copy of its expert a slot is: 0 the primary, then ``1`` to ``replica_count - 1``, int64
            ``[P]``; anything for an empty slot.
        replica_count_L: Copies of each expert, the primary included, int64 ``[L]``; never below 1.

    Returns:
        Tokens that source rank ``r`` sends to slot ``p``, int64 ``[R, P]``: 0 for an empty slot. In each row, the
        slots of an expert sum to that row's count of the expert.
    """
    copies_P = replica_count_L[physical_to_logical_P]  # an empty slot reads the last expert; it is cleared below
    each_RP, over_RP = np.divmod(counts_RL[:, physical_to_logical_P], copies_P)
    turn_RP = (copy_of_slot_P - np.arange(counts_RL.shape[0])[:, None]) % copies_P
    each_RP += turn_RP < over_RP
    each_RP *= physical_to_logical_P >= 0
    return each_RP
