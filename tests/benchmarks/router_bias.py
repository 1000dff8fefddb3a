"""Measure loss and balancedness with an auxiliary loss, a router bias and EPLB, each alone and together.

One process trains the same small DeepSeek-V3 on the source code of Python's standard library, three times: nothing, an
auxiliary loss, the bias of ``RouterBiasCallback``. EPLB does not change losses, so each recorded load is replayed on
four ranks with the placement that training starts from, and with ``BalancedPolicy`` and one redundant expert a rank.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from examples.pretrain import StandardLibrary
from lightning_eplb import BalancedPolicy, EPLBCallback, RouterBiasCallback, StaticPolicy
from lightning_eplb.simulation.replay import Setting, replay
from lightning_eplb.simulation.trace import read_trace
from tests.benchmarks.report import finish, parse_arguments, print_table

EXPERTS, TOP_K, RANKS, SEQUENCE, BATCH = 16, 2, 4, 64, 16
AUXILIARY = 0.01
"""Factor of the auxiliary loss, that of the Switch Transformer (arXiv 2101.03961)."""
RATE = 0.003
"""Update rate of the bias. DeepSeek-V3's 0.001 is for many thousand steps."""
VARIANTS = ("nothing", "auxiliary loss", "bias")
POINTS = 10
"""Points of a curve, each the mean of as many steps."""


class SmallDeepSeek(pl.LightningModule):
    """Language model on bytes whose router has a correction bias, optionally with an auxiliary loss."""

    def __init__(self, auxiliary: float) -> None:
        super().__init__()
        config = DeepseekV3Config(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            moe_intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
            routed_scaling_factor=1.0,
        )
        self.model = DeepseekV3ForCausalLM(config)
        self.auxiliary = auxiliary
        self.losses: list[float] = []
        self.violations: list[Tensor] = []  # of the micro-batch: the auxiliary loss of each layer
        for layer in self.model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self._count)

    def _count(self, gate: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _, chosen = outputs
        scores = logits.sigmoid()
        share_L = torch.bincount(chosen.flatten(), minlength=EXPERTS) / chosen.numel()
        self.violations.append(EXPERTS * (share_L * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum())

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        self.violations.clear()
        loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
        self.losses.append(loss.item())
        return loss + self.auxiliary * torch.stack(self.violations).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, betas=(0.9, 0.95))


def train(variant: str, steps: int, data: StandardLibrary) -> tuple[list[float], float, np.ndarray]:
    """Return each step's loss, the loss on validation data, and the recorded load."""
    pl.seed_everything(0, verbose=False)
    module = SmallDeepSeek(AUXILIARY if variant == "auxiliary loss" else 0.0)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.npy"
        callbacks: list[pl.Callback] = [EPLBCallback(ep_size=1, trace=trace)]
        if variant == "bias":
            callbacks.append(RouterBiasCallback(RATE))
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            gradient_clip_val=1.0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
        )
        generator = torch.Generator().manual_seed(0)
        trainer.fit(module, DataLoader(data.train, BATCH, shuffle=True, drop_last=True, generator=generator))
        module.eval()
        with torch.no_grad():
            batches = list(data.val_dataloader())
            losses = [module.model(input_ids=batch, labels=batch, use_cache=False).loss.item() for batch in batches]
        return module.losses, float(np.mean(losses)), read_trace(trace)


def curve(values: Any) -> list[float]:
    """Means of equally many steps each."""
    return [float(np.mean(part)) for part in np.array_split(np.asarray(values), POINTS)]


def main() -> int:
    """Train all variants, print a table and curves, and write them."""
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(1)
    steps = 60 if arguments.quick else 400
    data = StandardLibrary(sequence_length=SEQUENCE, batch_size=BATCH, validation_sequences=512)
    data.setup("fit")
    figures: dict[str, Any] = {"steps": steps, "ranks": RANKS, "variants": {}}
    rows = []
    for variant in VARIANTS:
        losses, validation, load_WYL = train(variant, steps, data)
        fullest = load_WYL.max(axis=2) / load_WYL.mean(axis=2)
        for placed, policy, redundant in (("", StaticPolicy(), 0), (" and EPLB", BalancedPolicy(), RANKS)):
            setting = Setting(RANKS, redundant, window_size=20, step_interval=40)
            done = replay(load_WYL, policy, setting)
            balancedness = load_WYL.sum(axis=(1, 2)) / RANKS / done.max_tokens
            last = steps // 4
            name = (variant + placed).replace("nothing and ", "")
            figures["variants"][name] = {
                "loss": curve(losses),
                "validation_loss": validation,
                "balancedness": curve(balancedness),
                "max_violation": curve(fullest.mean(axis=1) - 1),
            }
            rows.append(
                [
                    name,
                    f"{np.mean(losses[-last:]):.3f}",
                    f"{validation:.3f}",
                    f"{np.mean(balancedness[: 2 * last]):.3f}",
                    f"{np.mean(balancedness[-last:]):.3f}",
                    f"{np.mean(fullest[-last:]) - 1:.2f}",
                ]
            )
    print(f"{steps} steps, {EXPERTS} experts, top-{TOP_K}, {RANKS} ranks; figures of the last quarter of steps\n")
    header = ["variant", "loss", "validation", "balancedness, first half", "last quarter", "max violation"]
    print_table(header, rows)
    return finish([], figures, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
