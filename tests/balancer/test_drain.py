"""A rank that is drained during a run: tokens leave it, and its primaries without a replica elsewhere stay."""

from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from lightning_eplb import EPLBCallback
from lightning_eplb.policies import Costs
from tests.fidelity import trainer_for
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

STEPS, DRAINED_AT, INTERVAL = 12, 5, 4


class Drain(Callback):
    """Drains rank 0 from a step on, and compares its executed tokens with those of experts that it alone has."""

    def __init__(self, eplb: EPLBCallback) -> None:
        self.eplb = eplb
        self.left: list[tuple[int, int, int]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.eplb.balancer.costs = Costs(1.0)  # moves and replicas are free

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == DRAINED_AT:
            self.eplb.balancer.capacity = (0, 1)
        self.slots_YRS = self.eplb.balancer.placement.by_rank

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.eplb.balancer.last_step
        total, alone = int(step.load.sum()), 0
        for load_L, slots_RS in zip(step.load.tolist(), self.slots_YRS.tolist(), strict=True):
            alone += sum(load_L[expert] for expert in slots_RS[0] if expert >= 0 and expert not in slots_RS[1])
        self.left.append((total - int(step.max_tokens), alone, total))  # rank 1 is the fullest once rank 0 is drained


def drained(redundant: int) -> list[tuple[int, int, int]]:
    eplb = EPLBCallback(redundant, step_interval=INTERVAL)
    watch = Drain(eplb)
    trainer = trainer_for(2, max_steps=STEPS, callbacks=[eplb, watch])
    trainer.fit(LanguageModel(hugging_face_model("mixtral"), "adamw"), loader(token_batches(STEPS * 8), 4))
    return watch.left


@pytest.mark.parametrize(("redundant", "share"), [(0, 0.4), (2, 0.3), (8, 0.0)])
def test_drained_rank_computes_only_its_primaries_without_replica(
    redundant: int, share: float, workers: Workers
) -> None:
    """Of its 4 primaries it can give away as many as rank 1 has redundant slots: none, 1, all."""
    for left in workers.run(2, drained, redundant):
        for tokens, alone, total in left[DRAINED_AT + INTERVAL :]:
            assert tokens == alone
            assert tokens <= share * total
