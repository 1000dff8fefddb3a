"""The groups of expert parallelism: made once for the same ranks, and by all of them."""

import gc
import threading

import torch
import torch.distributed as dist

from lightning_eplb.parallel import groups
from lightning_eplb.parallel.groups import ExpertGroups
from tests.workers import Workers


def make_many() -> tuple[int, int, bool]:
    """On every worker: the threads before and after fifty models, and whether groups are told apart."""
    all_ranks, halves = ExpertGroups.create(), ExpertGroups.create(dist.new_subgroups(2)[0])
    before = len(threading.enumerate()), native_threads()
    for _ in range(50):
        assert ExpertGroups.create() is all_ranks
    assert len(threading.enumerate()) == before[0]
    return before[1], native_threads(), (all_ranks.size, halves.size, halves.num_ep_groups) == (4, 2, 2)


def native_threads() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Threads:"))


def sum_over(ranks: int) -> float:
    """On every worker."""
    made = ExpertGroups.create()
    assert made.size == ranks
    ones = torch.ones(1)
    dist.all_reduce(ones, group=made.ep_group)
    return float(ones)


def test_groups_of_models_on_same_ranks_are_shared(workers: Workers) -> None:
    for before, after, told_apart in workers.run(4, make_many):
        assert after == before
        assert told_apart


def numbers_in_use() -> tuple[list[int], bool]:
    """On every worker: which group is free as ranks go on, rank 0 without releasing its first."""
    pool = ExpertGroups.create(dist.new_subgroups(2)[0]).relocation_groups()
    first = pool.first_free
    pool.acquire(first)
    seen = [first, pool.first_free, pool.add()]
    if dist.get_rank():
        pool.release(first)
    assert pool.first_free == (first if dist.get_rank() else seen[-1])
    seen.append(pool.add())
    seen.append(pool.first_free)
    ones = torch.ones(1)
    dist.all_reduce(ones, group=pool[seen[-1]])
    return seen, float(ones) == 2


def test_relocation_groups_in_use_are_not_given_again(workers: Workers) -> None:
    assert workers.run(4, numbers_in_use) == [([1, 0, 2, 3, 3], True)] * 4


def kept() -> int:
    """On every worker: of how many default groups groups are kept; something else may hold on to a former one."""
    ExpertGroups.create()
    gc.collect()
    return len(groups._REGISTRIES)


def test_groups_after_default_group_is_destroyed_are_freed(workers: Workers) -> None:
    first = workers.run(2, kept)
    for ranks in (4, 2, 4):
        workers.run(ranks, kept)
    for before, after in zip(first, workers.run(2, kept), strict=True):
        assert after <= before  # one of the former may have gone meanwhile


def test_groups_under_new_default_group_are_new(workers: Workers) -> None:
    for ranks in (4, 2, 4):
        assert workers.run(ranks, sum_over, ranks) == [ranks] * ranks
