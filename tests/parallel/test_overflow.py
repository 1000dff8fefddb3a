"""With ``16-mixed`` one rank's overflow makes every rank skip the step, and lower its scale."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from lightning_eplb import EPLBCallback, ExpertParallelStrategy
from lightning_eplb.parallel.dtensor import local_shard
from tests.fidelity import SEQUENCES, ShufflePolicy, trainer_for
from tests.fsdp1 import CPUFSDPPrecision, fsdp1
from tests.models import LanguageModel, ShardedLanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

STEPS, OVERFLOW = 4, 2


def overflowing(base: type[LanguageModel]) -> type[LanguageModel]:
    class Overflowing(base):  # type: ignore[misc, valid-type]
        """The last rank's experts overflow in one step."""

        def on_after_backward(self) -> None:
            self.kept = [local_shard(parameter).clone() for parameter in self.parameters()]
            if self.global_step == OVERFLOW and dist.get_rank() == dist.get_world_size() - 1:
                gradient = next(p.grad for n, p in self.named_parameters() if "experts" in n)
                assert gradient is not None
                local_shard(gradient)[0] = torch.inf

        def on_train_batch_end(self, *args: Any) -> None:
            now = [local_shard(parameter) for parameter in self.parameters()]
            changed = any(not torch.equal(a, b) for a, b in zip(self.kept, now, strict=True))
            self.stepped = [*getattr(self, "stepped", []), changed]

    return Overflowing


def train(kind: str, optimizer: str) -> tuple[list[bool], list[float]]:
    torch.manual_seed(0)
    model = hugging_face_model("mixtral").float()
    base = ShardedLanguageModel if kind == "sharded" else LanguageModel
    module = overflowing(base)(model, optimizer)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=16.0)
    strategy, precision = (
        ExpertParallelStrategy() if kind == "sharded" else None,
        MixedPrecision("16-mixed", "cpu", scaler),
    )
    if kind == "fsdp1":
        strategy, precision = fsdp1(), CPUFSDPPrecision("16-mixed")
        precision.scaler = scaler = ShardedGradScaler("cpu", init_scale=16.0)
    trainer = trainer_for(
        2,
        strategy,
        max_steps=STEPS,
        # Experts move after the third step only, so that a change in weights is the optimizer's.
        callbacks=[EPLBCallback(policy=ShufflePolicy(), step_interval=4 * STEPS)],
        plugins=[precision],
        gradient_clip_val=1.0,
    )
    trainer.fit(module, loader(token_batches(2 * STEPS * SEQUENCES), SEQUENCES))
    return module.stepped, [scaler.get_scale()]  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["ddp", "sharded", "fsdp1"])
def test_overflow_on_one_rank_skips_the_step_on_all(kind: str, workers: Workers) -> None:
    for stepped, scale in workers.run(2, train, kind, "adamw", seconds=200):
        assert stepped == [step != OVERFLOW for step in range(STEPS)]
        assert scale == [8.0]


def refused() -> str:
    with pytest.raises(ValueError, match=r"\w") as raised:
        train("ddp", "fused")
    return str(raised.value)


def test_overflow_check_of_fused_optimizer_raises(workers: Workers) -> None:
    for message in workers.run(2, refused):
        assert message.startswith("AdamW(fused=True) checks for overflows of its own rank only")
