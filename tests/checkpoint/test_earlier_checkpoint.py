"""A run goes on from a checkpoint that the package wrote before its modules moved.

``tests/data/before_layout.ckpt`` was written at commit bc62211, with torch 2.13 and Lightning 2.6.6, by this module::

    git archive bc62211 lightning_eplb | tar x -C /tmp/old
    PYTHONPATH=/tmp/old:. python tests/checkpoint/test_earlier_checkpoint.py tests/data/before_layout.ckpt
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_eplb import EPLBCallback
from tests.fidelity import ShufflePolicy, trainer_for
from tests.models import LanguageModel, loader, token_batches
from tests.workers import Workers

CHECKPOINT = Path(__file__).parents[1] / "data/before_layout.ckpt"
RANKS, SEQUENCES, STEPS, SAVED = 2, 2, 6, 3
TOLERANCE = 1e-10


def small_model() -> nn.Module:
    """A Mixtral of 1,500 parameters in float64, for a file of some tens of kilobytes."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=4,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).train()


def train(steps: int, resume: str | None = None, save: str | None = None) -> tuple[list[float], dict[str, Tensor], int]:
    """On every worker: losses, logical weights and the number of rearrangements."""
    module = LanguageModel(small_model(), "adamw")
    callback = EPLBCallback(2, policy=ShufflePolicy(), window_size=4, step_interval=1)
    trainer: pl.Trainer = trainer_for(RANKS, max_steps=steps, callbacks=[callback])
    trainer.fit(module, loader(token_batches(STEPS * SEQUENCES * RANKS), SEQUENCES), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    assert callback.balancer is not None
    weights = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    return module.losses, weights, callback.balancer.num_rearrangements


def test_earlier_checkpoint_when_resumed_trains_as_uninterrupted(workers: Workers) -> None:
    expected = workers.run(RANKS, train, STEPS)
    resumed = workers.run(RANKS, train, STEPS, str(CHECKPOINT))
    for (losses, weights, _), (all_losses, all_weights, _) in zip(resumed, expected, strict=True):
        assert losses == pytest.approx(all_losses[SAVED:], abs=TOLERANCE)
        assert list(weights) == list(all_weights)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, all_weights[name], rtol=0, atol=TOLERANCE)


def test_earlier_checkpoint_when_resumed_restores_callback_state(workers: Workers) -> None:
    before = torch.load(CHECKPOINT, weights_only=True)["callbacks"]["EPLBCallback"]
    assert before["num_rearrangements"] == SAVED
    for _, _, rearrangements in workers.run(RANKS, train, STEPS, str(CHECKPOINT)):
        assert rearrangements > SAVED


if __name__ == "__main__":
    started = Workers()
    started.run(RANKS, train, SAVED, None, sys.argv[1])
    started.stop()
