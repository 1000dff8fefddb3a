"""Training is the same training: all pairs of settings here, their full product in ``tests/soak``."""

import pytest

from tests.fidelity import TOLERANCE, Case, distributed, largest_difference, reference
from tests.pairs import all_pairs
from tests.workers import Workers

SETTINGS = {
    "model": ["mixtral", "qwen3_moe", "gpt_oss"],
    "ranks": [2, 4],
    "redundant": [0, 1, 2],
    "accumulation": [1, 2],
    "clip": ["off", "norm", "value"],
    "optimizer": ["adamw", "sgd"],
    "redundancy": ["window", "batch"],
    "checkpointing": ["off", "reentrant", "non-reentrant"],
    "parts": [1, 2],
}
CASES = sorted((Case(**settings) for settings in all_pairs(SETTINGS)), key=lambda case: case.ranks)
WIDE = [Case(ranks=2, redundant=1, top_k=top_k) for top_k in (1, 8)]
GROUPS = [
    Case(ranks=4, ep_size=2, redundant=1, clip=clip, accumulation=2, redundancy=redundancy)
    for clip, redundancy in (("norm", "window"), ("norm", "batch"), ("value", "window"))
]

SHARDED = [
    Case(ranks=4, ep_size=4, replicas=1, redundant=1, clip="norm", accumulation=2),
    Case(ranks=4, ep_size=2, replicas=1, redundant=1, clip="norm", accumulation=2, redundancy="batch", parts=2),
    Case(
        ranks=4, ep_size=2, replicas=1, model="gpt_oss", clip="value", accumulation=2, redundant=1, optimizer="foreach"
    ),
    Case(ranks=4, ep_size=1, replicas=1, clip="norm", accumulation=2, optimizer="fused"),
    Case(ranks=4, ep_size=2, replicas=2, redundant=1, clip="norm", accumulation=2, parts=2),
    Case(ranks=4, ep_size=2, replicas=2, clip="value", accumulation=2, optimizer="sgd", redundancy="batch"),
]
ASYNC = [
    Case(ranks=2, redundant=1, accumulation=2, clip="norm", use_async=True, parts=2),
    Case(model="gpt_oss", ranks=4, optimizer="sgd", clip="value", redundant=1, redundancy="batch", use_async=True),
    Case(ranks=4, ep_size=2, redundant=1, use_async=True),
    Case(ranks=4, ep_size=2, redundant=1, clip="norm", accumulation=2, checkpointing="reentrant", use_async=True),
    Case(ranks=4, ep_size=2, replicas=1, redundant=1, clip="norm", accumulation=2, use_async=True),
]
FSDP1 = [
    Case(ranks=2, redundant=1, fsdp1="FULL_SHARD", clip="norm", accumulation=2),
    Case(model="gpt_oss", ranks=4, redundant=1, fsdp1="SHARD_GRAD_OP", clip="value", optimizer="sgd", use_async=True),
    Case(ranks=4, ep_size=2, redundant=1, fsdp1="FULL_SHARD", clip="norm", accumulation=2, redundancy="batch", parts=2),
    Case(ranks=4, ep_size=2, redundant=1, fsdp1="NO_SHARD", clip="norm", checkpointing="non-reentrant"),
    Case(ranks=4, ep_size=2, fsdp1="FULL_SHARD", clip="norm", checkpointing="reentrant", use_async=True),
    Case(ranks=2, ep_size=1, fsdp1="FULL_SHARD", clip="norm", accumulation=2),
]
UNEVEN = [
    Case(experts=7, ranks=2, clip="norm", accumulation=2),
    Case(experts=7, ranks=4, redundant=1, clip="norm", redundancy="batch", parts=2, model="qwen3_moe"),
    Case(experts=7, ranks=4, ep_size=2, redundant=1, clip="norm", accumulation=2, use_async=True),
    Case(experts=7, ranks=2, redundant=1, fsdp1="FULL_SHARD", clip="norm", accumulation=2),
]
MORE_UNEVEN = [
    Case(experts=7, ranks=4, redundant=1, clip="value", model="gpt_oss", optimizer="sgd", use_async=True),
    Case(experts=9, ranks=4, redundant=1, clip="norm", top_k=1, checkpointing="non-reentrant", parts=2),
    Case(experts=7, ranks=2, replicas=1, redundant=1, clip="norm", accumulation=2),
    Case(experts=7, ranks=4, ep_size=2, replicas=1, redundant=1, clip="norm", redundancy="batch"),
]


@pytest.mark.parametrize(
    "case",
    [
        *(CASES + WIDE + GROUPS + SHARDED + ASYNC + FSDP1 + UNEVEN),
        *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_UNEVEN),
    ],
    ids=str,
)
def test_training_with_moving_experts_equals_one_process(case: Case, workers: Workers) -> None:
    assert largest_difference(reference(case), workers.run(case.ranks, distributed, case, seconds=240)) < TOLERANCE


def test_cases_cover_every_pair_of_settings() -> None:
    for first, second in [("model", "redundant"), ("ranks", "clip"), ("accumulation", "optimizer")]:
        met = {(getattr(case, first), getattr(case, second)) for case in CASES}
        assert met == {(a, b) for a in SETTINGS[first] for b in SETTINGS[second]}


def test_comparison_with_wrong_reference_differs(workers: Workers) -> None:
    """The comparison can fail: one step's clipping is enough to see."""
    case = Case(ranks=2, clip="norm")
    assert largest_difference(reference(Case(ranks=2, clip="off")), workers.run(2, distributed, case)) > 1e-3
