"""Phantom experts in plans: numbered on from ``L`` and without load while a policy plans, empty slots otherwise.

Shape suffixes: ``Y`` MoE layers, ``R`` ranks, ``S`` slots of a rank.
"""

from dataclasses import replace

import numpy as np

from lightning_eplb.placement import EMPTY, ExpertPlacement
from lightning_eplb.policies.base import Outlook


def number_phantoms(placement: ExpertPlacement) -> np.ndarray:
    """Return a copy of the slots, ``[Y, R, S]``, with phantom experts numbered ``L ... R*n - 1``."""
    slots_YRS, n = placement.by_rank.copy(), placement.primaries_per_rank
    slots_YRS[:, :, :n] = placement.row_order.reshape(len(slots_YRS), placement.num_ranks, n)
    return slots_YRS


def with_phantoms(placement: ExpertPlacement) -> ExpertPlacement:
    """Return the placement of ``R*n`` experts, phantom experts among them."""
    slots_YP = number_phantoms(placement).reshape(placement.physical_to_logical.shape)
    experts = placement.num_logical_experts + placement.num_phantom_experts
    return ExpertPlacement(slots_YP, experts, placement.num_ranks)


def drop_phantoms(slots_YRS: np.ndarray, num_experts: int, num_primaries: int) -> np.ndarray:
    """Return a copy of the slots without ids from ``num_experts`` up, as :class:`ExpertPlacement` takes them.

    A rank's last primaries move up to rows of phantom experts, so that these come last. The others keep their rows.

    Args:
        slots_YRS: Slots of a plan, int64; replicas of phantom experts may be among them.
        num_experts: Logical experts, ``L``.
        num_primaries: Primary slots of each rank, ``n``.
    """
    slots_YRS = np.where(slots_YRS < num_experts, slots_YRS, EMPTY)
    primaries_YRN = slots_YRS[:, :, :num_primaries]
    is_filled_YRN = primaries_YRN != EMPTY
    is_first_YRN = np.arange(num_primaries) < is_filled_YRN.sum(axis=2, keepdims=True)
    gaps, last = is_first_YRN & ~is_filled_YRN, is_filled_YRN & ~is_first_YRN  # as many on each rank
    primaries_YRN[gaps] = primaries_YRN[last]
    primaries_YRN[last] = EMPTY
    return slots_YRS


def with_phantom_loads(outlook: Outlook, num_phantoms: int) -> Outlook:
    """Return the outlook with columns of zeros for phantom experts."""
    if not num_phantoms:
        return outlook
    forecast = outlook.forecast
    load, first, spread = (pad_load(part, num_phantoms) for part in (forecast.load, forecast.first, forecast.spread))
    return replace(
        outlook,
        window=pad_load(outlook.window, num_phantoms),
        forecast=replace(forecast, load=load, first=first, spread=spread),
        sub_windows=None if outlook.sub_windows is None else pad_load(outlook.sub_windows, num_phantoms),
    )


def pad_load(load: np.ndarray, num_phantoms: int) -> np.ndarray:
    """Return the load, ``[..., L]``, with columns of zeros for phantom experts."""
    return np.pad(load, [(0, 0)] * (load.ndim - 1) + [(0, num_phantoms)])
