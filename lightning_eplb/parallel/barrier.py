"""Wait for all ranks, and tell within seconds which of them are missing."""

import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist

from lightning_eplb.parallel.groups import CPU_GROUP_TIMEOUT, ExpertGroups

TOLD_AFTER = timedelta(seconds=10)
"""A rank that waits longer says for whom. It goes on waiting, up to ``CPU_GROUP_TIMEOUT``: a rank may be busy with a file
or an evaluation of its own, and come."""

LONGEST_PAUSE = 0.25
"""Seconds between two looks at who has come; at first they are a tenth of the time that has passed."""

_TURNS: WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = WeakKeyDictionary()
"""How often this rank has waited, by the control group and by what it waited for."""


def wait_for_all_ranks(groups: ExpertGroups, what: str) -> None:
    """Return once every rank has called this with the same ``what``; which is before the first collective of it.

    It uses the store of the control group and no collective. So a rank that was alone here and got the error can go on
    with the others.

    Args:
        groups: Of the experts. All ranks of the default group wait; without process groups there is nobody to wait for.
        what: The call and its need, "rearrange() moves experts between ranks"; both messages begin with it.

    Warns:
        RuntimeWarning: After ``TOLD_AFTER``, on the lowest rank that waits.

    Raises:
        RuntimeError: Some rank did not come within ``CPU_GROUP_TIMEOUT``.
    """
    control = groups.cpu_group
    if control is None:
        return
    store, turns = control.get_group_store(), _TURNS.setdefault(control, Counter())
    turn = turns[what] + 1
    place = f"{turn} {what}"

    def is_here(rank: int) -> bool:
        return store.check([f"eplb/{rank}"]) and store.get(f"eplb/{rank}").decode() == place

    store.set(f"eplb/{control.rank()}", place)
    num_here, begun_at, has_told = store.add(f"eplb/{what}", 1), time.monotonic(), False
    try:
        while num_here < turn * groups.world_size:
            waited = time.monotonic() - begun_at
            if waited > CPU_GROUP_TIMEOUT.total_seconds():
                raise RuntimeError(_sentence(what, is_here, groups.world_size, CPU_GROUP_TIMEOUT))
            if waited > TOLD_AFTER.total_seconds() and not has_told:
                has_told = True
                if not any(is_here(rank) for rank in range(control.rank())):
                    sentence = _sentence(what, is_here, groups.world_size, TOLD_AFTER)
                    until = CPU_GROUP_TIMEOUT.total_seconds()
                    warnings.warn(f"{sentence}; it raises after {until:g} s", RuntimeWarning, stacklevel=2)
            time.sleep(min(LONGEST_PAUSE, waited / 10))
            num_here = store.add(f"eplb/{what}", 0)
    except BaseException:
        store.add(f"eplb/{what}", -1)  # when all come later, this rank comes with them
        store.set(f"eplb/{control.rank()}", "")
        raise
    turns[what] = turn


def _sentence(what: str, is_here: Callable[[int], bool], world_size: int, within: timedelta) -> str:
    missing = ranks_in_words([rank for rank in range(world_size) if not is_here(rank)])
    return f"{what}, so every rank must call it: {missing} did not come within {within.total_seconds():g} s"


def ranks_in_words(ranks: list[int], most: int = 16) -> str:
    """``rank 1``, ``ranks 1, 3`` or ``ranks 1, 3, ... (500 in all)``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    listed = ", ".join(str(rank) for rank in ranks[:most])
    return f"ranks {listed}" if len(ranks) <= most else f"ranks {listed}, ... ({len(ranks)} in all)"
