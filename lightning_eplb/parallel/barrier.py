"""Barrier of all ranks that names the missing ranks within seconds."""

import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist

from lightning_eplb.parallel.groups import CPU_GROUP_TIMEOUT, ExpertGroups

WARN_AFTER = timedelta(seconds=10)
"""Time after which a waiting rank warns of the missing ranks. It keeps waiting until ``CPU_GROUP_TIMEOUT``, since a
rank may be busy with a file or an evaluation of its own."""

MAX_POLL_SECONDS = 0.25
"""Longest interval between two polls of the store. At first the interval is a tenth of the time that has passed."""

_NUM_BARRIERS: WeakKeyDictionary[dist.ProcessGroup, Counter[str]] = WeakKeyDictionary()
"""Number of barriers that this rank has passed, by CPU group and reason."""


def monitored_barrier(groups: ExpertGroups, reason: str) -> None:
    """Block until all ranks have called this with the same ``reason``. Call it before the first collective of an API.

    The barrier polls the store of the CPU group and runs no collective. So a rank that called it alone and got the
    error can continue with the others.

    Args:
        groups: Process groups of the experts. All ranks of the default group must call it. Returns at once without
            process groups.
        reason: The API and its need, such as ``"rearrange() moves experts between ranks"``. Both messages start with
            it.

    Warns:
        RuntimeWarning: Ranks are missing after ``WARN_AFTER``. Only the lowest waiting rank warns.

    Raises:
        RuntimeError: A rank did not arrive within ``CPU_GROUP_TIMEOUT``.
    """
    group = groups.cpu_group
    if group is None:
        return
    store, num_barriers = group.get_group_store(), _NUM_BARRIERS.setdefault(group, Counter())
    number = num_barriers[reason] + 1
    barrier = f"{number} {reason}"

    def has_arrived(rank: int) -> bool:
        return store.check([f"eplb/{rank}"]) and store.get(f"eplb/{rank}").decode() == barrier

    store.set(f"eplb/{group.rank()}", barrier)
    num_arrived, start, has_warned = store.add(f"eplb/{reason}", 1), time.monotonic(), False
    try:
        while num_arrived < number * groups.world_size:
            waited = time.monotonic() - start
            if waited > CPU_GROUP_TIMEOUT.total_seconds():
                raise RuntimeError(_message(reason, has_arrived, groups.world_size, CPU_GROUP_TIMEOUT))
            if waited > WARN_AFTER.total_seconds() and not has_warned:
                has_warned = True
                if not any(has_arrived(rank) for rank in range(group.rank())):
                    message = _message(reason, has_arrived, groups.world_size, WARN_AFTER)
                    timeout = CPU_GROUP_TIMEOUT.total_seconds()
                    warnings.warn(f"{message}; it raises after {timeout:g} s", RuntimeWarning, stacklevel=2)
            time.sleep(min(MAX_POLL_SECONDS, waited / 10))
            num_arrived = store.add(f"eplb/{reason}", 0)
    except BaseException:
        store.add(f"eplb/{reason}", -1)  # this rank arrives again together with the others
        store.set(f"eplb/{group.rank()}", "")
        raise
    num_barriers[reason] = number


def _message(reason: str, has_arrived: Callable[[int], bool], world_size: int, within: timedelta) -> str:
    missing = format_ranks([rank for rank in range(world_size) if not has_arrived(rank)])
    return f"{reason}, so every rank must call it: {missing} did not come within {within.total_seconds():g} s"


def format_ranks(ranks: list[int], most: int = 16) -> str:
    """Return ``rank 1``, ``ranks 1, 3`` or ``ranks 1, 3, ... (500 in all)``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    listed = ", ".join(str(rank) for rank in ranks[:most])
    return f"ranks {listed}" if len(ranks) <= most else f"ranks {listed}, ... ({len(ranks)} in all)"
