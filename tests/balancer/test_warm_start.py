"""Experts are arranged by a known load before the first step, and training is the same training."""

import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_eplb import (
    BalancedPolicy,
    EPLBCallback,
    ExpertLoadBalancer,
    ExpertParallelStrategy,
    ExpertPlacement,
    Policy,
    StaticPolicy,
    Topology,
    balancedness,
    parallelize_experts,
)
from lightning_eplb.policies.token_split import level_tokens
from tests.fidelity import (
    SEQUENCES,
    STEPS,
    TOLERANCE,
    Case,
    Outcome,
    largest_difference,
    named_state,
    reference,
    tokens_of,
    trainer_for,
    whole,
)
from tests.models import LanguageModel, ShardedLanguageModel, hugging_face_model, loader
from tests.workers import Workers

LAYERS, EXPERTS = 2, 8
HOT = np.array([[900, 800, 700, 600, 9, 8, 7, 6], [1, 2, 3, 4, 500, 600, 700, 800]])
"""Popular experts side by side, which the initial placement has on one rank."""
SKEWED = np.stack([HOT[:, ::-1], HOT, HOT, HOT])
"""Of its four steps a window of three has no trace of the first."""


class Watch(pl.Callback):
    """Placement and steps in the window at the first batch."""

    def __init__(self, eplb: EPLBCallback) -> None:
        self.eplb = eplb
        self.placement: ExpertPlacement | None = None
        self.num_steps = -1

    def on_train_batch_start(self, *_: Any) -> None:
        assert self.eplb.balancer is not None
        if self.placement is None:
            self.placement, self.num_steps = self.eplb.balancer.placement, self.eplb.balancer.load.num_steps


class RememberLoad(Policy):
    """Sorts experts by load over the ranks in turn, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[list[list[int]]] = []

    def rearrange(self, load_YL: np.ndarray, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        self.given.append(load_YL.tolist())
        slots_YRS = np.full_like(placement.by_rank, -1)
        ranks, n = placement.num_ranks, placement.primaries_per_rank
        order_YL = np.argsort(-load_YL, axis=1, kind="stable")
        slots_YRS[:, :, :n] = order_YL.reshape(len(order_YL), n, ranks).transpose(0, 2, 1)
        for layer, rank in np.ndindex(slots_YRS.shape[:2]):  # the hottest ones that are not here
            others = [expert for expert in order_YL[layer] if expert not in slots_YRS[layer, rank, :n]]
            slots_YRS[layer, rank, n:] = others[: placement.redundant_per_rank]
        return placement.with_slots(slots_YRS)


def train(kind: str, source: Any) -> tuple[Outcome, ExpertPlacement, int, int]:
    """On every worker: train; then placement and window before the first step, and steps in the window at the end."""
    model, strategy = hugging_face_model("mixtral"), None
    module = LanguageModel(model, "adamw")
    if kind == "sharded":
        module = ShardedLanguageModel(model, "adamw", 2)
        strategy = ExpertParallelStrategy(ep_size=2)
    ranks = dist.get_world_size()
    eplb = EPLBCallback(2, 2, BalancedPolicy(), window_size=50, step_interval=8, initial_load=source)
    watch = Watch(eplb)
    trainer = trainer_for(ranks, strategy, max_steps=STEPS, callbacks=[eplb, watch])
    with patch("lightning_eplb.simulation.initial_load.read_initial_load", **_only_on_rank_zero()):
        trainer.fit(module, loader(tokens_of(Case(ranks=ranks)), SEQUENCES))
    assert eplb.balancer is not None
    assert watch.placement is not None
    weights = {k: whole(v) for k, v in model.state_dict().items()}
    outcome = Outcome(module.losses, weights, named_state(model, trainer.optimizers[0]))
    return outcome, watch.placement, watch.num_steps, eplb.balancer.load.num_steps


def _only_on_rank_zero() -> dict[str, Any]:
    from lightning_eplb.simulation.initial_load import read_initial_load

    return {"wraps": read_initial_load} if dist.get_rank() == 0 else {"side_effect": AssertionError("read on rank 1")}


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_initial_load_moves_experts_before_first_step_and_trains_as_one_process(
    kind: str, workers: Workers, tmp_path: Path
) -> None:
    ranks = 2 if kind == "ddp" else 4
    np.save(tmp_path / "load.npy", SKEWED)
    results = workers.run(ranks, train, kind, str(tmp_path / "load.npy"), seconds=240)
    assert largest_difference(reference(Case(ranks=ranks)), [outcome for outcome, *_ in results]) < TOLERANCE
    assert balancedness(level_tokens(HOT, ExpertPlacement.initial(2, 8, 2, 2).by_rank)) < 0.9
    for _, placement, steps_at_start, steps_at_end in results:
        assert (placement.primary_rank != ExpertPlacement.initial(2, 8, 2, 2).primary_rank).any(axis=1).all()
        assert balancedness(level_tokens(HOT, placement.by_rank)) > 0.99
        assert (steps_at_start, steps_at_end) == (0, STEPS)


def save_without_eplb(path: str) -> None:
    """In one process: half of the training, as anybody saves it."""
    trainer = trainer_for(1, max_steps=STEPS // 2, enable_checkpointing=True)
    trainer.fit(LanguageModel(hugging_face_model("mixtral"), "adamw"), loader(tokens_of(Case()), 2 * SEQUENCES))
    trainer.save_checkpoint(path)


def go_on(path: str) -> tuple[Outcome, int]:
    module = LanguageModel(hugging_face_model("mixtral"), "adamw")
    eplb = EPLBCallback(2, policy=RememberLoad(), step_interval=100, initial_load=torch.from_numpy(SKEWED))
    trainer = trainer_for(2, max_steps=STEPS, callbacks=[eplb])
    trainer.fit(module, loader(tokens_of(Case()), SEQUENCES), ckpt_path=path)
    assert eplb.balancer is not None
    state = dict(sorted(named_state(module.model, trainer.optimizers[0]).items()))
    return Outcome(module.losses, dict(module.model.state_dict()), state), eplb.balancer.rearranged_rows


def test_initial_load_after_checkpoint_without_state_moves_optimizer_state(workers: Workers, tmp_path: Path) -> None:
    path = str(tmp_path / "half.ckpt")
    workers.run(1, save_without_eplb, path)
    expected = reference(Case())
    expected = Outcome(expected.losses[STEPS // 2 :], expected.weights, dict(sorted(expected.state.items())))
    results = workers.run(2, go_on, path)
    assert all(moved for _, moved in results)
    assert largest_difference(expected, [outcome for outcome, _ in results]) < TOLERANCE


def given_to_policy(load: Any) -> list[list[list[int]]]:
    """On every worker: what the policy is given at the start, and in the first decision."""
    model = parallelize_experts(hugging_face_model("mixtral"), num_redundant_experts=2)
    policy = RememberLoad()
    balancer = ExpertLoadBalancer(model, policy=policy, step_interval=8, window_size=3)
    if load is not None:
        result = balancer.rearrange(load=load)
        assert result is not None
        assert result.num_rows > 0
        assert balancer.load.num_steps == balancer.num_steps == 0
    for tokens in tokens_of(Case())[:16].split(8):
        model(input_ids=tokens[dist.get_rank() :: 2], use_cache=False)
        balancer.step()
    assert balancer.forecast_error is None
    return policy.given


def test_window_after_warm_start_has_only_steps_of_the_run(workers: Workers) -> None:
    warm, cold = (workers.run(2, given_to_policy, load)[0] for load in (SKEWED, None))
    assert warm[0] == (3 * HOT).tolist()
    assert len(cold) == 1
    assert warm[1:] == cold


BAD = {
    "a row too few": HOT[:1],
    "no step": SKEWED[:0],
    "bool": HOT > 5,
    "complex": HOT * 1j,
    "words": HOT.astype(str),
    "ragged": [[1, 2], [3]],
    "negative": -HOT,
    "not a number": np.where(HOT == 9, np.nan, HOT),
    "infinite": np.where(HOT == 9, np.inf, HOT),
    "shares": HOT / HOT.sum(),
    "no token": HOT * 0,
    "too many": HOT.astype(np.float64) * 1e18,
    "other model": {"draft": HOT},
}
EXPECTED = {
    "a row too few": "load has shape [1, 8]; it must be [layers, experts] = [2, 8], or [steps, 2, 8] with at least",
    "no step": "load has shape [0, 2, 8]; it must be",
    "bool": "load has dtype bool; it must hold counts of tokens, such as int64",
    "complex": "load has dtype complex128; it must hold counts",
    "words": "load has dtype <U21; it must hold counts",
    "ragged": "load is a list that is no array",
    "negative": "load has -900 tokens for expert 0 of layer 0; tokens are counted in whole numbers from 0",
    "not a number": "load has nan tokens for expert 4 of layer 0",
    "infinite": "load has inf tokens for expert 4 of layer 0",
    "shares": "Multiply shares by a large number and round them.",
    "no token": "load has no token in its latest steps",
    "too many": "load has more tokens in all than int64 counts",
    "other model": "load has ['draft'], which are no models of the balancer. Use some of ['model'].",
}


def refuse() -> dict[str, str]:
    """On every worker: the errors for bad loads, and for loads that differ between ranks."""
    model = parallelize_experts(hugging_face_model("mixtral"))
    balancer = ExpertLoadBalancer(model, policy=RememberLoad())
    before = balancer.placement
    told = {}
    own = HOT + dist.get_rank()
    one_has_none = HOT if dist.get_rank() == 0 else None
    for name, load in {**BAD, "ranks differ": own, "one has none": one_has_none}.items():
        with pytest.raises(ValueError, match="load") as raised:
            balancer.rearrange(load=load)
        told[name] = str(raised.value)
    with pytest.raises(ValueError, match="Give one of them"):
        balancer.rearrange(before, load=HOT)
    assert balancer.placement == before
    for load in (HOT.astype(np.float32), HOT.astype(np.uint16), torch.tensor(HOT, dtype=torch.bfloat16), HOT.tolist()):
        assert balancer.rearrange(load=load) is not None
    return told


def test_initial_load_of_wrong_shape_or_dtype_is_refused_on_all_ranks(workers: Workers) -> None:
    first, second = workers.run(2, refuse)
    assert first == second
    for name, message in EXPECTED.items():
        assert message in first[name], name
    assert "is not the same on rank 1" in first["ranks differ"]
    assert "is not the same on rank 1" in first["one has none"]


def refuse_file(path: str) -> str:
    """On every worker: the error of a fit."""
    eplb = EPLBCallback(initial_load=path)
    with pytest.raises(ValueError, match="initial_load") as raised:
        trainer_for(2, max_steps=1, callbacks=[eplb]).fit(
            LanguageModel(hugging_face_model("mixtral"), "adamw"), loader(tokens_of(Case()), SEQUENCES)
        )
    return str(raised.value)


def test_initial_load_that_is_missing_is_refused_on_all_ranks(workers: Workers, tmp_path: Path) -> None:
    for message in workers.run(2, refuse_file, str(tmp_path / "no.npy")):
        assert "no.npy does not exist. Name a trace, a checkpoint, or a report." in message


def test_initial_load_of_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError, match="initial_load=7 must be a path, or counts of tokens"):
        EPLBCallback(initial_load=7)  # type: ignore[arg-type]


def place_fixed() -> tuple[list[list[int]], int]:
    """On every worker: the placement at the first batch, and primaries that moved."""
    eplb = EPLBCallback(policy=StaticPolicy([[7, 6, 5, 4, 3, 2, 1, 0]] * 2))
    watch = Watch(eplb)
    trainer_for(2, max_steps=1, callbacks=[eplb, watch]).fit(
        LanguageModel(hugging_face_model("mixtral"), "adamw"), loader(tokens_of(Case()), SEQUENCES)
    )
    assert watch.placement is not None
    assert eplb.balancer is not None
    return watch.placement.physical_to_logical.tolist(), eplb.balancer.rearranged_rows


def test_static_placement_takes_effect_before_first_step(workers: Workers) -> None:
    assert workers.run(2, place_fixed) == [([[7, 6, 5, 4, 3, 2, 1, 0]] * 2, 16)] * 2


def test_initial_load_where_nothing_can_move_warns(workers: Workers) -> None:
    with_ep_size_1, static = workers.run(2, warnings_of_useless_load)[0]
    assert with_ep_size_1 == "initial_load has no effect with ep_size=1, as nothing can move."
    assert static.startswith("initial_load has no effect with StaticPolicy")


def warnings_of_useless_load() -> list[str]:
    found = []
    for arguments in ({"ep_size": 1}, {"policy": StaticPolicy()}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            eplb = EPLBCallback(initial_load=HOT, **arguments)  # type: ignore[arg-type]
            trainer_for(2, max_steps=1, callbacks=[eplb]).fit(
                LanguageModel(hugging_face_model("mixtral"), "adamw"), loader(tokens_of(Case()), SEQUENCES)
            )
        found += [str(each.message) for each in caught if "initial_load" in str(each.message)]
    return found
