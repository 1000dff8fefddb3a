import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_eplb.placement import EMPTY, ExpertPlacement


@st.composite
def placements(draw):
    ranks, layers = draw(st.integers(1, 5)), draw(st.integers(0, 3))
    per_rank, redundant = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    phantoms = draw(st.integers(0, ranks - 1)) if per_rank > 1 else 0
    experts = ranks * per_rank - phantoms
    slots = np.full((layers, ranks, per_rank + redundant), EMPTY)
    for layer in range(layers):
        own = np.reshape(draw(st.permutations([*range(experts), *[EMPTY] * phantoms])), (ranks, per_rank))
        order = np.argsort(own == EMPTY, axis=1, kind="stable")  # phantom experts come last on a rank
        slots[layer, :, :per_rank] = np.take_along_axis(own, order, axis=1)
        for rank in range(ranks):
            others = [expert for expert in range(experts) if expert not in slots[layer, rank]]
            for slot in range(per_rank, per_rank + redundant):
                if others and draw(st.booleans()):
                    slots[layer, rank, slot] = others.pop(draw(st.integers(0, len(others) - 1)))
    return ExpertPlacement(slots.reshape(layers, ranks * (per_rank + redundant)), experts, ranks)


@settings(max_examples=50)
@given(placements())
def test_maps_of_any_placement_are_inverse(placement):
    n, S = placement.primaries_per_rank, placement.slots_per_rank
    for layer in range(placement.num_layers):
        p2l_P = placement.physical_to_logical[layer]
        for expert in range(placement.num_logical_experts):
            slots = placement.logical_to_physical[layer, expert]
            count = placement.replica_count[layer, expert]
            assert (slots[count:] == EMPTY).all()
            assert sorted(slots[:count].tolist()) == np.flatnonzero(p2l_P == expert).tolist()
            assert slots[0] % S < n  # the primary comes first
            assert slots[1:count].tolist() == sorted(slots[1:count].tolist())
            assert placement.primary_rank[layer, expert] == slots[0] // S
        phantoms = [EMPTY] * placement.num_phantom_experts
        assert sorted(placement.primaries[layer].tolist()) == phantoms + list(range(placement.num_logical_experts))
        assert sorted(placement.row_order[layer].tolist()) == list(range(placement.num_ranks * n))
        is_expert = placement.primaries[layer] != EMPTY
        assert (placement.row_order[layer] == placement.primaries[layer])[is_expert].all()
    assert placement.by_rank.shape == (placement.num_layers, placement.num_ranks, S)
    assert (placement.replica_count.sum(axis=1) == (placement.physical_to_logical != EMPTY).sum(axis=1)).all()
    for array in (placement.physical_to_logical, placement.logical_to_physical, placement.replica_count):
        assert array.dtype == np.int64
        assert not array.flags.writeable


@settings(max_examples=50)
@given(placements(), placements())
def test_digests_of_equal_placements_are_equal(one, other):
    is_same = (one.num_ranks, one.num_logical_experts, one.physical_to_logical.tolist()) == (
        other.num_ranks,
        other.num_logical_experts,
        other.physical_to_logical.tolist(),
    )
    is_same = is_same and one.physical_to_logical.shape == other.physical_to_logical.shape
    assert (one == other) is (one.digest() == other.digest()) is is_same
    copy = ExpertPlacement(one.physical_to_logical.copy(), one.num_logical_experts, one.num_ranks)
    assert copy == one
    assert hash(copy) == hash(one)
    assert len(one.digest()) == 32


def test_digest_of_known_placement_is_fixed():
    assert (
        ExpertPlacement.initial(1, 4, 2, 2).digest().hex()
        == "7714054b2f433f83c8e5785e02ba09336812f9454bcd8da5005b950625f74c67"
    )


def test_placements_of_other_num_ranks_differ():
    assert ExpertPlacement([[0, 1, 2, 3]], 4, 2) != ExpertPlacement([[0, 1, 2, 3]], 4, 4)
    assert ExpertPlacement([[0, 1, 2, 3]], 4, 2) != "a placement"


@settings(max_examples=50)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 4))
def test_initial_of_any_sizes_is_in_order(layers, ranks, per_rank, redundant):
    experts = ranks * per_rank
    placement = ExpertPlacement.initial(layers, experts, ranks, ranks * redundant)
    assert placement.physical_to_logical.shape == (layers, experts + ranks * redundant)
    assert (placement.num_redundant_experts, placement.redundant_per_rank) == (ranks * redundant, redundant)
    for layer, rank in np.ndindex(layers, ranks):
        held = placement.by_rank[layer, rank]
        assert held[:per_rank].tolist() == list(range(rank * per_rank, rank * per_rank + per_rank))
        assert (held != EMPTY).sum() == min(per_rank + redundant, experts)
        if redundant and per_rank < experts:
            first = rank * redundant % experts
            assert held[per_rank] == (first if first not in held[:per_rank] else (rank + 1) * per_rank % experts)


def test_initial_of_small_sizes_matches_hand_calculation():
    assert ExpertPlacement.initial(1, 4, 2, 2).physical_to_logical.tolist() == [[0, 1, 2, 2, 3, 1]]
    assert ExpertPlacement.initial(1, 2, 1, 2).physical_to_logical.tolist() == [[0, 1, -1, -1]]


@settings(max_examples=50)
@given(placements())
def test_without_copies_of_placement_keeps_primaries(placement):
    bare = placement.without_copies()
    assert np.array_equal(bare.primary_slot, placement.primary_slot)
    assert (bare.replica_count == 1).all()
    assert bare.physical_to_logical.shape == placement.physical_to_logical.shape
    assert bare.without_copies() == bare


def test_placement_when_array_is_written_stays():
    given_slots = np.array([[0, 1, 2, 3]])
    placement = ExpertPlacement(given_slots, 4, 2)
    given_slots[0, 0] = 3
    assert placement.physical_to_logical[0, 0] == 0


def test_repr_of_placement_has_its_numbers():
    assert repr(ExpertPlacement.initial(3, 4, 2, 2)) == "ExpertPlacement(layers=3, logical=4, redundant=2, ranks=2)"


@pytest.mark.parametrize(
    ("slots", "experts", "ranks", "message"),
    [
        ([[0, 1]], 2, 3, "num_logical_experts=2 must be at least num_ranks=3, and both at least 1"),
        ([[0]], 0, 1, "num_logical_experts=0 must be at least num_ranks=1, and both at least 1"),
        ([[0]], 1, 0, "num_logical_experts=1 must be at least num_ranks=0, and both at least 1"),
        (
            [[0, 1, 2]],
            3,
            2,
            "at least num_logical_experts=3 slots and 1 for phantom experts, a multiple of",
        ),
        ([[-1, 0, 1, 2]], 3, 2, r"layer 0: primary slots of rank 0 are \[-1, 0\]; put empty ones \(-1\) behind"),
        (
            [[0, -1, 1, -1]],
            3,
            2,
            "layer 0: a primary slot of rank 1 is empty; 1 may be in a layer, as 3 experts are",
        ),
        ([[0, 1, 2, 0]], 3, 2, "layer 0: expert 0 is there 2 times among the primaries. Leave 1 of the last primary"),
        ([[0, 0, 1, -1]], 3, 2, "layer 0: expert 2 is missing among the primaries and expert 0 is there 2 times"),
        ([[0, 1, 2, 3]], 3, 2, "holds expert 3; experts are 0 to 2"),
        ([0, 1], 2, 2, r"shape \[2\]; it must be \[layers, slots\]"),
        ([[0, 1]], 4, 2, r"shape \[1, 2\].* at least num_logical_experts=4 slots"),
        ([[0, 1, 2, 3, -1]], 4, 2, r"shape \[1, 5\].* multiple of num_ranks=2"),
        ([[0, 1, 2, 4]], 4, 2, "holds expert 4; experts are 0 to 3"),
        ([[0, -2, 2, 3]], 4, 2, "holds expert -2; experts are 0 to 3"),
        ([[0, 1, 2, 3], [0, 1, 2, -1]], 4, 2, "layer 1: a primary slot of rank 1 is empty"),
        ([[0, 1, 2, 2]], 4, 2, "layer 0: expert 3 is missing among the primaries and expert 2 is there 2 times"),
        ([[0, 1, -1, 2, 3, -1], [0, 1, -1, 2, 3, 3]], 4, 2, "layer 1: rank 1 holds expert 3 twice"),
        ([[0.5, 1.5]], 2, 2, "physical_to_logical has dtype float64; it must hold whole numbers"),
        ([[0.0, 1.0]], 2, 2, "has dtype float64"),
        ([[0.0, float("nan")]], 2, 2, "has dtype float64"),
        ([[False, True]], 2, 2, "has dtype bool"),
        ([["0", "1"]], 2, 2, "has dtype <U1"),
        ([[0, 2**70]], 2, 2, "has dtype object"),
        ([[0, None]], 2, 2, "has dtype object"),
        (np.array([[0, 1, 2**64 - 1, 2, 3, 0]], dtype=np.uint64), 4, 2, f"holds expert {2**64 - 1}, which int64"),
        ([[0, 1], [0]], 2, 2, r"physical_to_logical must be \[layers, slots\]: "),
        ([[0, 1]], 2.0, 2, r"num_logical_experts=2\.0 must be a whole number"),
        ([[0, 1]], 2, True, "num_ranks=True must be a whole number"),
    ],
)
def test_placement_of_invalid_slots_raises(slots, experts, ranks, message):
    with pytest.raises(ValueError, match=message):
        ExpertPlacement(slots, experts, ranks)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, ">i8"])
def test_placement_of_any_integer_dtype_is_int64(dtype):
    placement = ExpertPlacement(np.array([[1, 0]], dtype=dtype), np.int32(2), np.int32(2))
    assert placement.physical_to_logical.tolist() == [[1, 0]]
    assert placement.physical_to_logical.dtype == np.int64
    assert type(placement.primaries_per_rank) is int


@pytest.mark.parametrize(
    ("experts", "ranks", "redundant", "message"),
    [
        (4, 2.0, 2, r"num_ranks=2\.0 must be a whole number"),
        (4, 2, 2.5, r"num_redundant_experts=2\.5 must be a whole number"),
        (2, 3, 0, "num_logical_experts=2 must be at least num_ranks=3"),
        (4, 2, 3, "num_redundant_experts=3 must be a multiple of num_ranks=2. Use 2 or 4."),
        (4, 2, -2, "num_redundant_experts=-2 must not be negative"),
    ],
)
def test_initial_with_unfit_numbers_raises(experts, ranks, redundant, message):
    with pytest.raises(ValueError, match=message):
        ExpertPlacement.initial(1, experts, ranks, redundant)


def test_placement_when_copied_is_read_only():
    placement = ExpertPlacement.initial(2, 8, 4, 4)
    for copied in (pickle.loads(pickle.dumps(placement)), copy.deepcopy(placement)):
        assert copied == placement
        assert not copied.physical_to_logical.flags.writeable
        assert not copied.replica_count.flags.writeable


@pytest.mark.parametrize("numbers", [(1, 4, 0, 0), (1, 0, 1, 0), (-1, 4, 2, 0), (1, 4, 2, -2)])
def test_initial_with_numbers_below_minimum_raises(numbers):
    with pytest.raises(ValueError, match="num_"):
        ExpertPlacement.initial(*numbers)


def test_with_slots_of_changed_slots_equals_new_placement():
    before = ExpertPlacement.initial(2, 6, 3, 3)
    assert before.with_slots(before.by_rank.copy()) is before
    for place in ((0, 0), (1, 2)):
        slots_YRS = before.by_rank.copy()
        slots_YRS[(*place, -1)] = -1
        after = before.with_slots(slots_YRS)
        checked = ExpertPlacement(slots_YRS.reshape(2, -1), 6, 3)
        assert after == checked
        assert after != before
        assert (after.replica_count == checked.replica_count).all()
        assert (after.logical_to_physical == checked.logical_to_physical).all()
        for array in (after.physical_to_logical, after.replica_count):
            assert not array.flags.writeable
