import numpy as np
import pytest

from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import Outlook, StaticPolicy, Topology
from lightning_eplb.policies.forecast import plain_mean

LOAD = np.array([[9, 1, 1, 1], [0, 0, 0, 7]])
PLACEMENT = ExpertPlacement.initial(num_layers=2, num_logical_experts=4, num_ranks=2, num_redundant_experts=2)


def test_static_policy_without_placement_keeps_the_present_one():
    assert StaticPolicy().rearrange(LOAD, PLACEMENT, Topology.even(2)) is PLACEMENT


def test_static_policy_with_placement_moves_to_it_and_stays():
    given = [[3, 0, 1, 2, 1, -1], [0, 1, 2, 2, 3, 0]]
    policy = StaticPolicy(given)
    moved = policy.rearrange(LOAD, PLACEMENT, Topology.even(2))
    assert moved.physical_to_logical.tolist() == given
    assert policy.rearrange(LOAD, moved, Topology.even(2)) == moved


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[0, 1, 2, 3, 2, 1]], "has 1 layers of 6 slots; this model has 2 MoE layers of 6 slots"),
        ([[0, 1, 2, 3]] * 2, r"has 2 layers of 4 slots; .* \(4 experts and 2 redundant ones over 2 ranks\)"),
        ([[0, 1, 1, 2, 3, 2]] * 2, "rank 0 holds expert 1 twice"),
        ([[0, 1, 1, 2, 2, 3]] * 2, "expert 3 is missing among the primaries"),
    ],
)
def test_rearrange_with_placement_of_another_model_raises(given, message):
    policy = StaticPolicy(given)
    with pytest.raises(ValueError, match=message):
        policy.rearrange(LOAD, PLACEMENT, Topology.even(2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[0, 1], [0, 1, 2]], r"layers of \[2, 3\] slots"),
        ([], r"layers of \[\] slots"),
        ([[0, 1.5]], "holds 1.5"),
        ([[0, True]], "holds True"),
    ],
)
def test_static_policy_with_no_table_of_experts_raises(given, message):
    with pytest.raises(ValueError, match=message):
        StaticPolicy(given)


def test_static_policy_of_several_models_moves_those_that_it_names():
    outlook = Outlook(LOAD, 1, plain_mean(LOAD), 1)
    outlooks, placements = {"main": outlook, "draft": outlook}, {"main": PLACEMENT, "draft": PLACEMENT}
    given = [[3, 0, 1, 2, 1, -1], [0, 1, 2, 2, 3, 0]]

    def planned(policy: StaticPolicy) -> dict[str, ExpertPlacement]:
        return dict(policy.rearrange_models(outlooks, placements, Topology.even(2)))

    assert planned(StaticPolicy()) == placements
    moved = planned(StaticPolicy({"draft": given}))
    assert moved["main"] is PLACEMENT
    assert moved["draft"].physical_to_logical.tolist() == given
    with pytest.raises(ValueError, match=r"is for one model, and there are \['main', 'draft'\]. Give a dictionary by"):
        planned(StaticPolicy(given))
    with pytest.raises(ValueError, match=r"names 'drft'; the models are \['main', 'draft'\]"):
        planned(StaticPolicy({"drft": given}))
    with pytest.raises(ValueError, match=r"is for the models \['draft'\]; give one's slots"):
        StaticPolicy({"draft": given}).rearrange(LOAD, PLACEMENT, Topology.even(2))
