import numpy as np
import pytest

from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Costs, DeepSeekPolicy, Policy, StaticPolicy, Topology


def test_topology_of_nodes_counts_ranks_and_nodes():
    topology = Topology((0, 1, 1, 0, 2))
    assert (topology.num_ranks, topology.num_nodes) == (5, 3)
    assert Topology.even(4, 2) == Topology((0, 0, 1, 1))
    assert Topology.even(3).node_of_rank == (0, 0, 0)


def test_topology_of_list_keeps_a_tuple():
    assert Topology([0, 0, 1]).node_of_rank == (0, 0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("node_of_rank", "message"),
    [((), "names no rank"), ((0, 2), r"nodes \[0, 2\].*numbered 0 to 1"), ((-1, 0), r"nodes \[-1, 0\]")],
)
def test_topology_with_nodes_not_numbered_from_zero_raises(node_of_rank, message):
    with pytest.raises(ValueError, match=message):
        Topology(node_of_rank)


@pytest.mark.parametrize(("num_ranks", "num_nodes"), [(5, 2), (0, 1), (4, 0)])
def test_topology_even_with_nodes_that_do_not_divide_ranks_raises(num_ranks, num_nodes):
    with pytest.raises(ValueError, match=f"num_ranks={num_ranks} must be a positive multiple of num_nodes={num_nodes}"):
        Topology.even(num_ranks, num_nodes)


def test_topology_with_capacity_keeps_floats():
    assert Topology((0, 0)).capacity is None
    topology = Topology((0, 0, 1), [2, 1, "0.5"])  # type: ignore[arg-type, list-item]
    assert topology.capacity == (2.0, 1.0, 0.5)
    assert topology == Topology((0, 0, 1), (2.0, 1.0, 0.5))
    assert Topology((0, 0), (0, 1)).capacity == (0.0, 1.0)


@pytest.mark.parametrize(
    ("capacity", "message"),
    [
        ((1.0,), r"capacity=\(1.0,\) is for 1 ranks; there are 2"),
        ((1.0, 1.0, 1.0), "is for 3 ranks; there are 2"),
        ((), "is for 0 ranks; there are 2"),
        ((1.0, -0.5), r"capacity=\(1.0, -0.5\) must be finite, zero or more"),
        ((0.0, 0.0), "above zero on at least one rank"),
        ((1.0, float("inf")), "must be finite"),
        ((1.0, float("nan")), "must be finite"),
    ],
)
def test_topology_with_invalid_capacity_raises(capacity, message):
    with pytest.raises(ValueError, match=message):
        Topology((0, 0), capacity)


def test_costs_without_arguments_are_zero_but_for_tokens():
    costs = Costs(token=2.0)
    assert (costs.row_within_node, costs.row_between_nodes, costs.copy) == (0, 0, 0)


@pytest.mark.parametrize("token", [0.0, -1.0, float("nan")])
def test_costs_with_tokens_that_take_no_time_raise(token):
    with pytest.raises(ValueError, match=f"token={token} must be finite and above zero"):
        Costs(token)


def test_policy_without_rearrange_raises():
    with pytest.raises(TypeError, match="rearrange"):
        Policy()  # type: ignore[abstract]


def test_policy_of_docstring_example_plans():
    class HottestFirst(Policy):
        def rearrange(self, load_YL, placement, topology):
            order_YL = np.argsort(-load_YL, axis=1, kind="stable")
            slots_YRS = np.full_like(placement.by_rank, -1)
            place_L = np.arange(placement.num_logical_experts)
            slots_YRS[:, place_L % placement.num_ranks, place_L // placement.num_ranks] = order_YL
            slots_YP = slots_YRS.reshape(placement.physical_to_logical.shape)
            return ExpertPlacement(slots_YP, placement.num_logical_experts, placement.num_ranks)

    planned = HottestFirst().rearrange(
        np.array([[1, 5, 0, 5]]), ExpertPlacement.initial(1, 4, 2, 2), Topology.even(num_ranks=2)
    )
    assert planned.physical_to_logical.tolist() == [[1, 0, -1, 3, 2, -1]]
    uneven = HottestFirst().rearrange(np.array([[1, 5, 0]]), ExpertPlacement.initial(1, 3, 2), Topology.even(2))
    assert uneven.physical_to_logical.tolist() == [[1, 2, 0, -1]]


@pytest.mark.parametrize("policy", [StaticPolicy(), BalancedPolicy(), DeepSeekPolicy()])
@pytest.mark.parametrize(
    ("load", "num_ranks", "message"),
    [
        (np.zeros((2, 4), dtype=np.int64), 2, r"load_YL has shape \[2, 4\].*must be \[1, 4\]"),
        (np.zeros((1, 4)), 2, "load_YL has dtype float64"),
        (np.array([[0, -3, 1, 1]]), 2, "load_YL holds -3 tokens"),
        (np.zeros((1, 4), dtype=np.int64), 4, "topology has 4 ranks and placement has 2"),
    ],
)
def test_rearrange_with_load_or_topology_that_does_not_fit_raises(policy, load, num_ranks, message):
    with pytest.raises(ValueError, match=message):
        policy.rearrange(load, ExpertPlacement.initial(1, 4, 2, 2), Topology.even(num_ranks))
