"""Plan of a resize: mappings are checked, and every expert keeps its row through any chain of resizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.placement import EMPTY, ExpertPlacement
from lightning_eplb.relocation.plan import plan_relocation
from lightning_eplb.relocation.resize_plan import (
    RankMapping,
    check_rank_mapping,
    plan_hand_over,
    plan_placement,
    plan_rows,
    stack_held,
)


def test_check_rank_mapping_of_two_that_leave_returns_it() -> None:
    mapping = check_rank_mapping({0: 0, 1: 1, 2: -1, 3: -1}, 4, None, None, [12])
    assert mapping == RankMapping((0, 1, -1, -1), world_size=2, ep_size=2)
    assert mapping.stays.tolist() == [True, True, False, False]


def test_check_rank_mapping_of_a_permutation_with_ranks_that_join_returns_it() -> None:
    mapping = check_rank_mapping({2: 0, 1: -1, 0: 3}, 3, 4, 2, [12, 8])
    assert mapping == RankMapping((3, -1, 0), world_size=4, ep_size=2)
    assert [mapping.old_rank(rank) for rank in range(4)] == [2, None, None, 0]


@pytest.mark.parametrize(
    ("rank_mapping", "world_size", "ep_size", "message"),
    [
        ({0: 0, 1: 0, 2: -1, 3: -1}, None, None, "gives new rank 0 to ranks 0, 1. Give each a rank of its own"),
        ({0: 0, 1: 2, 2: -1, 3: -1}, None, None, "has the new rank 2, outside of 0 to 1 for the 2 that stay"),
        ({0: 0, 1: 4, 2: -1, 3: -1}, 4, None, "has the new rank 4, outside of 0 to 3 for world_size=4"),
        ({0: 0, 1: -2, 2: -1, 3: -1}, None, None, "has the new rank -2, outside of 0 to 1"),
        ({0: 0, 1: 1, 3: -1}, None, None, "has no entry for rank 2. Give each of the ranks 0 to 3"),
        ({}, None, None, "has no entry for ranks 0, 1, 2, 3"),
        ({0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, 6, None, "has an entry for rank 4, which does not exist"),
        ({0: 1, 1: 2, 2: -1, 3: -1}, 3, None, "makes no rank rank 0"),
        ({0: -1, 1: -1, 2: -1, 3: -1}, 4, None, "makes no rank rank 0"),
        ({0: 0, 1: -1, 2: -1, 3: -1}, None, None, "world_size=1 would leave all experts on one rank"),
        ({0: 0, 1: 1, 2: 2, 3: 3}, None, 1, "ep_size=1 would leave all experts on one rank"),
        ({0: 0, 1: 1, 2: 2, 3: 3}, 6, 4, "ep_size=4 must divide world_size=6. Use one of [2, 3, 6]"),
        ({0: 0, 1: 1, 2: 2, 3: 3}, 16, None, "world_size=16 is more than the 12 experts of a layer. Use ep_size=8"),
        ({0: 0, 1: 1, 2: 2, 3: 3}, 13, None, "world_size=13 is more than the 12 experts of a layer. Use another world"),
    ],
)
def test_check_rank_mapping_that_does_not_fit_raises(
    rank_mapping: dict, world_size: int | None, ep_size: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=r"Give|Number|Let|Keep|Use|resume") as error:
        check_rank_mapping(rank_mapping, 4, world_size, ep_size, [12])
    assert message in str(error.value)


@pytest.mark.parametrize("rank_mapping", [[0, 1, -1, -1], {0: 0, 1: 1.0, 2: -1, 3: -1}, {0: True}, {"0": 0}, None])
def test_check_rank_mapping_of_a_wrong_type_raises(rank_mapping: object) -> None:
    with pytest.raises(TypeError, match="rank"):
        check_rank_mapping(rank_mapping, 4, None, None, [12])


def test_plan_hand_over_of_two_that_leave_levels_the_others() -> None:
    held_RS = np.arange(12).reshape(4, 3)
    after_RS = plan_hand_over(held_RS, np.array([True, True, False, False]))
    assert after_RS.tolist() == [[0, 1, 2, 6, 8, 10], [3, 4, 5, 7, 9, 11], [-1] * 6, [-1] * 6]


def test_plan_hand_over_with_another_ep_group_moves_nothing_that_it_holds() -> None:
    held_RS = np.array([[0, 1], [2, 3], [0, 1], [2, 3]])
    after_RS = plan_hand_over(held_RS, np.array([True, False, False, True]))
    assert after_RS.tolist() == [[0, 1], [-1, -1], [-1, -1], [2, 3]]


def test_plan_placement_of_ranks_that_join_keeps_first_rows() -> None:
    held_RS = stack_held([np.array([5, 0, 1]), np.array([]), np.array([4, 2, 3])])
    placement = plan_placement(held_RS, np.arange(3), 6, redundant_per_rank=1)
    assert placement.by_rank.tolist() == [[[5, 0, -1], [1, 3, -1], [4, 2, -1]]]
    assert placement.num_redundant_experts == 3


def test_plan_placement_without_some_expert_raises() -> None:
    with pytest.raises(ValueError, match=r"holds the experts \[2\]"):
        plan_placement(np.array([[0, 1], [3, -1]]), np.arange(2), 4, 0)


def test_plan_rows_takes_turns_among_ep_groups() -> None:
    moves = plan_rows(np.array([[0, 1], [0, 1], [-1, -1], [-1, -1]]), np.array([[0], [1], [0], [1]]))
    assert list(zip(moves.source_rank.tolist(), moves.source_row.tolist(), strict=True)) == [
        (0, 0),  # its own
        (1, 1),
        (0, 0),
        (1, 1),
    ]
    assert moves.target_rank.tolist() == [0, 1, 2, 3]


class Cluster:
    """Ranks in one process: what each holds is moved by the plans that ranks follow, and each element has a tag."""

    def __init__(self, num_experts: int, size: int, ep_size: int) -> None:
        self.num_experts, self.ep_size = num_experts, ep_size
        self.placement = ExpertPlacement.initial(1, num_experts, ep_size)
        self.rows = [self._tags(self.placement.primaries.reshape(ep_size, -1)[r % ep_size]) for r in range(size)]

    @staticmethod
    def _tags(experts: np.ndarray) -> np.ndarray:
        tags = np.asarray(experts, dtype=np.int64)[:, None] * 1000 + np.arange(3)
        return np.where(np.asarray(experts)[:, None] == EMPTY, 0, tags)  # rows of phantom experts are zeros

    def _move(self, before_RS: np.ndarray, after_RS: np.ndarray, least_rows: int = 0) -> None:
        moves = plan_rows(before_RS, after_RS)
        places = (moves.source_rank, moves.source_row, moves.target_rank, moves.target_row)
        after = [np.zeros((max(int((held_S != EMPTY).sum()), least_rows), 3), dtype=np.int64) for held_S in after_RS]
        for source, source_row, target, target_row in np.stack(places, axis=1).tolist():
            after[target][target_row] = self.rows[source][source_row]
        self.rows = after

    def rearrange(self, random: np.random.Generator) -> None:
        """Move all experts to a random placement, as between two steps."""
        first = ExpertPlacement.initial(1, self.num_experts, self.ep_size).primaries
        slots = np.where(first == EMPTY, EMPTY, random.permutation(self.num_experts)[first])
        after = ExpertPlacement(slots, self.num_experts, self.ep_size)
        for moves in plan_relocation(self.placement, after):
            before = [rows.copy() for rows in self.rows]
            places = (moves.source_rank, moves.source_row, moves.target_rank, moves.target_row)
            for source, source_row, target, target_row in np.stack(places, axis=1).tolist():
                for first in range(0, len(self.rows), self.ep_size):
                    self.rows[first + target][target_row] = before[first + source][source_row]
        self.placement = after

    def resize(self, mapping: RankMapping) -> None:
        """Hand over, renumber and take up, as ``resize()`` and ``rejoin()`` do."""
        old_size = len(self.rows)
        held_RS = self.placement.primaries.reshape(self.ep_size, -1)[np.arange(old_size) % self.ep_size]
        after_RS = plan_hand_over(held_RS, mapping.stays)
        self._move(held_RS, after_RS)
        assert all(len(rows) == 0 for rows, stays in zip(self.rows, mapping.stays, strict=True) if not stays)
        old_ranks = [mapping.old_rank(rank) for rank in range(mapping.world_size)]
        held_RS = stack_held([np.array([]) if o is None else after_RS[o][after_RS[o] != EMPTY] for o in old_ranks])
        self.rows = [np.empty((0, 3), dtype=np.int64) if old is None else self.rows[old] for old in old_ranks]
        self.ep_size = mapping.ep_size
        ep_rank_R = np.arange(mapping.world_size) % self.ep_size
        self.placement = plan_placement(held_RS, ep_rank_R, self.num_experts, redundant_per_rank=2)
        primaries_RS = self.placement.primaries.reshape(self.ep_size, -1)[ep_rank_R]
        self._move(held_RS, primaries_RS, self.placement.primaries_per_rank)
        self.placement = ExpertPlacement(self.placement.primaries, self.num_experts, self.ep_size)

    def check(self) -> None:
        """Check every element on every rank."""
        for rank, rows in enumerate(self.rows):
            experts = self.placement.primaries.reshape(self.ep_size, -1)[rank % self.ep_size]
            np.testing.assert_array_equal(rows, self._tags(experts))


def random_mapping(random: np.random.Generator, old_size: int, num_experts: int) -> RankMapping:
    while True:
        world_size = int(random.integers(2, 13))
        sizes = [d for d in range(2, world_size + 1) if world_size % d == 0 and d <= num_experts]
        staying = int(random.integers(1, min(old_size, world_size) + 1))
        if not sizes:
            continue
        old = random.permutation(old_size)[:staying].tolist()
        new = [0, *(1 + random.permutation(world_size - 1)[: staying - 1]).tolist()]
        rank_mapping = dict.fromkeys(range(old_size), -1) | dict(zip(old, new, strict=True))
        return check_rank_mapping(rank_mapping, old_size, world_size, int(random.choice(sizes)), [num_experts])


def test_thousand_resizes_and_rearrangements_keep_every_element() -> None:
    random = np.random.default_rng(0)
    cluster = Cluster(num_experts=11, size=4, ep_size=4)
    for _ in range(1000):
        cluster.resize(random_mapping(random, len(cluster.rows), 11))
        cluster.check()
        cluster.rearrange(random)
        cluster.check()


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from([12, 13, 60]), st.sampled_from([(2, 2), (6, 3), (6, 6), (12, 2)]))
def test_resize_of_any_mapping_keeps_elements_and_moves_no_row_twice(
    seed: int, num_experts: int, sizes: tuple[int, int]
) -> None:
    random = np.random.default_rng(seed)
    cluster = Cluster(num_experts, *sizes)
    cluster.rearrange(random)
    mapping = random_mapping(random, sizes[0], num_experts)
    held_RS = cluster.placement.primaries.reshape(sizes[1], -1)[np.arange(sizes[0]) % sizes[1]]
    after_RS = plan_hand_over(held_RS, mapping.stays)
    for before_S, after_S in zip(held_RS[mapping.stays], after_RS[mapping.stays], strict=True):
        kept_S = before_S[before_S != EMPTY]
        assert after_S[: len(kept_S)].tolist() == kept_S.tolist()  # rows of ranks that stay keep their places
    kept = held_RS[mapping.stays][held_RS[mapping.stays] != EMPTY]
    assert int((after_RS != EMPTY).sum()) == len(kept) + num_experts - len(set(kept.tolist()))
    cluster.resize(mapping)
    cluster.check()
