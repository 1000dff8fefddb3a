"""Redundant experts hold nothing between steps: no weights, no gradients and no optimizer state."""

import gc
import time
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_eplb import ExpertParallelStrategy
from lightning_eplb.parallel.dtensor import local_shard
from tests.checkpoint.test_checkpoint import batches, callback
from tests.fidelity import trainer_for
from tests.fsdp1 import DoublePrecision, fsdp1
from tests.models import LanguageModel, ShardedLanguageModel, hugging_face_model
from tests.workers import Workers

RANKS, STEPS = 4, 2


class BytesHeld(pl.Callback):
    """Of the tensors that came since then and are there on this rank when a step is over."""

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()  # what earlier tests and imports left is not looked at, which would take seconds
        self.after_steps: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.after_steps.append(min(self._bytes() for _ in range(3)))

    def _bytes(self) -> int:
        time.sleep(0.02)  # gloo's thread lets go of a collective's buffers somewhat later than whoever waits for it
        gc.collect()
        # By type(), as objects are many, and some do slow things when they are asked for their class.
        found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
        memory = [local_shard(each).untyped_storage() for each in found if each.layout == torch.strided]
        real = [piece for piece in memory if piece.device.type != "meta"]  # an earlier torch.compile leaves fakes
        return sum({piece.data_ptr(): piece.nbytes() for piece in real}.values())


def bytes_held(kind: str, redundant: int) -> tuple[int, int]:
    """On every worker: the most after a step, and the weights of one slot in each layer."""
    held, eplb, model, plugins = BytesHeld(), callback(RANKS, redundant), hugging_face_model("mixtral"), []
    module, strategy = LanguageModel(model, "adamw"), None
    if kind == "sharded":
        eplb.num_redundant_experts = 2 * redundant
        module, strategy = ShardedLanguageModel(model, "adamw", 2 * redundant), ExpertParallelStrategy(ep_size=2)
    if kind == "fsdp1":
        strategy, plugins = fsdp1(), [DoublePrecision()]
    trainer_for(RANKS, strategy, plugins=plugins, max_steps=STEPS, callbacks=[eplb, held]).fit(module, batches(RANKS))
    gc.unfreeze()
    assert eplb.balancer is not None
    assert eplb.balancer.num_rearrangements == STEPS
    filled = int((eplb.balancer.placement.by_rank[:, :, eplb.balancer.placement.primaries_per_rank :] >= 0).sum())
    assert bool(filled) == bool(redundant)
    experts = [local_shard(p) for name, p in module.named_parameters() if ".experts." in name]
    return max(held.after_steps), sum(tensor.nbytes // len(tensor) for tensor in experts)


@pytest.mark.parametrize("kind", ["ddp", "sharded", "fsdp1"])
def test_redundant_experts_between_steps_hold_no_memory(kind: str, workers: Workers) -> None:
    without, with_redundant = (workers.run(RANKS, bytes_held, kind, redundant) for redundant in (0, 1))
    for (bytes_without, slot), (bytes_with, _) in zip(without, with_redundant, strict=True):
        assert bytes_with - bytes_without < 0.02 * slot  # which rows they hold, some 8-byte indices
