"""Compare losses on GPUs with and without experts that move, and measure the memory of redundant experts.

One process a rank, as ``torchrun`` starts them, or any launcher that sets the same variables::

    torchrun --nproc-per-node 4 tests/gpu/relocation.py --strategy sharded --precision bf16-mixed

Trains a model of Mixtral's kind from the same weights on the same tokens: twice with no expert moving, for what two
identical runs differ by; with all experts shuffled after every second step (``--every``); and with a redundant expert
on each rank as well, for what it takes: the bytes that a rank has allocated after a step, and at its peak. The
gradient of an expert with a replica is a sum of two, which rounds otherwise, as a grouped kernel may when an expert
has another place among others; with ``eager`` kernels an expert that only moves computes the same. Ends with status 1
if moving experts changed the losses by more than the spread of the two identical runs (and ``--tolerance``).
"""

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_eplb import EPLBCallback, ExpertParallelStrategy, StaticPolicy, fully_shard_moe
from lightning_eplb.parallel.all_to_all import AllToAllDispatcher
from tests.fidelity import ShufflePolicy

VOCABULARY, SEQUENCE = 1024, 256


def build_model(arguments: argparse.Namespace) -> nn.Module:
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=arguments.width,
        intermediate_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=SEQUENCE,
        num_local_experts=arguments.experts,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation=arguments.kernel
    )
    return model.train()


class Training(pl.LightningModule):
    def __init__(self, model: nn.Module, is_sharded: bool, redundant: int) -> None:
        super().__init__()
        self.model, self.is_sharded, self.redundant = model, is_sharded, redundant
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.is_sharded and not isinstance(self.model, FSDPModule):
            assert self.device_mesh is not None
            self.model.to(self.trainer.strategy.root_device)
            fully_shard_moe(self.model, self.device_mesh, num_redundant_experts=self.redundant)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        logits = self.model(input_ids=batch[0], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[0][:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(arguments: argparse.Namespace, moves: bool, redundant: int) -> dict[str, Any]:
    """One run; this rank's losses, the bytes that it has allocated after it, and its peak."""
    world, is_sharded = int(os.environ["WORLD_SIZE"]), arguments.strategy == "sharded"
    on_gpu = arguments.accelerator == "gpu"
    gc.collect()  # what the run before this one held in cycles
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = build_model(arguments)
    module = Training(model, is_sharded, redundant)
    strategy: Any = DDPStrategy()
    if is_sharded:
        strategy = ExpertParallelStrategy(arguments.ep_size)
    elif arguments.strategy == "fsdp1":
        strategy = FSDPStrategy(auto_wrap_policy={type(model.get_submodule("model.layers.0"))})
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    callback = EPLBCallback(
        redundant,
        arguments.ep_size,
        policy=ShufflePolicy() if moves else StaticPolicy(),
        step_interval=arguments.every if moves else 10**6,
        use_async=arguments.use_async,
    )
    trainer = pl.Trainer(
        accelerator=arguments.accelerator,
        devices=per_node,
        num_nodes=world // per_node,
        strategy=strategy,
        precision=arguments.precision,
        plugins=[TorchElasticEnvironment()],
        max_steps=arguments.steps,
        gradient_clip_val=1.0,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tokens = (VOCABULARY * torch.rand(arguments.steps * world * 2, SEQUENCE, generator=torch.Generator()) ** 3).long()
    data = TensorDataset(tokens)
    sampler = DistributedSampler(data, world, int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=2, sampler=sampler))
    assert callback.balancer is not None
    assert (callback.balancer.num_rearrangements > 0) == moves
    experts = sum(p.numel() * p.element_size() for n, p in module.named_parameters() if ".experts." in n)
    return {
        "losses": torch.tensor(module.losses, dtype=torch.float64),
        "allocated": torch.cuda.memory_allocated() - before if on_gpu else 0,
        "peak": torch.cuda.max_memory_allocated() - before if on_gpu else 0,
        "slot": experts / arguments.experts
        if is_sharded
        else experts * callback.balancer.groups.size / arguments.experts,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--strategy", choices=["ddp", "sharded", "fsdp1"], default="ddp")
    parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed or 16-mixed")
    parser.add_argument("--accelerator", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--kernel", choices=["eager", "grouped_mm"], default="eager", help="of the experts")
    parser.add_argument("--ep-size", type=int, default=None)
    parser.add_argument("--every", type=int, default=2, help="steps between relocations")
    parser.add_argument("--use-async", action="store_true", help="experts move behind the steps")
    parser.add_argument("--halves", action="store_true", help="where experts move, tokens travel in two parts, too")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tolerance", type=float, default=0.0, help="added to the spread of two identical runs")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    torch.set_num_threads(1)
    redundant = arguments.ep_size or int(os.environ["WORLD_SIZE"])
    first, second = (train(arguments, moves=False, redundant=0) for _ in range(2))
    if arguments.halves:
        AllToAllDispatcher.bytes_in_parts = 0
    moved, copied = train(arguments, True, 0), train(arguments, True, redundant)
    spread = float((first["losses"] - second["losses"]).abs().max())
    change, replicas_change = (float((first["losses"] - run["losses"]).abs().max()) for run in (moved, copied))
    rank, mib = os.environ["RANK"], 2**20
    print(
        f"rank {rank}: {arguments.strategy}, {arguments.precision}: identical runs differ by {spread:.3g},"
        f" moving experts by {change:.3g}, moving and replicating them by {replicas_change:.3g}",
        flush=True,
    )
    if arguments.accelerator == "gpu":
        print(
            f"rank {rank}: redundant experts take {(copied['allocated'] - moved['allocated']) / mib:.1f} MiB"
            f" between steps and {(copied['peak'] - moved['peak']) / mib:.1f} MiB at the peak; weights and"
            f" gradients of one slot in each layer are {2 * first['slot'] / mib:.1f} MiB, replicas with AdamW state"
            f" would be {4 * first['slot'] / mib:.1f} MiB",
            flush=True,
        )
    return int(change > spread + arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
