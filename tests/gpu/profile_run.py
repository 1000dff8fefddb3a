"""Run out of an artificial memory limit on GPUs: in the first step with a profile run, at a rearrangement without.

One process a rank, as ``torchrun`` starts them, or any launcher that sets the same variables::

    torchrun --nproc-per-node 2 tests/gpu/profile_run.py
    torchrun --nproc-per-node 2 tests/gpu/profile_run.py --without-profile

Trains the model of ``relocation.py`` three times: without moves, with all experts moved after ``--every`` steps, and
that again with a limit on the memory that PyTorch allocates, halfway between the peaks of the two. Ends with status 0
if memory runs out in the first step, with a message of the profile run, or, with ``--without-profile``, in the step of
the first rearrangement. The peaks must differ, so experts are large and batches small: ``--width``, ``--hidden`` and
``--experts`` make the exchange of a relocation larger.
"""

import argparse
import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_eplb import EPLBCallback, StaticPolicy
from tests.fidelity import ShufflePolicy
from tests.gpu.relocation import SEQUENCE, VOCABULARY, Training, build_model

LEAST_GAP = 64 * 2**20
"""Bytes by which the peaks must differ, so that fragments of the allocator don't decide."""


def train(arguments: argparse.Namespace, moves: bool, profile: bool, limit: float | None = None) -> tuple[int, int]:
    """Return the steps that ended, and the peak of the memory that this rank allocated, in bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    world, per_node = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    module = Training(build_model(arguments), False, 0)
    policy = ShufflePolicy() if moves else StaticPolicy()
    callback = EPLBCallback(policy=policy, step_interval=4 * arguments.every, profile=profile)

    class Limit(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if limit is not None:
                torch.cuda.set_per_process_memory_fraction(limit)

    trainer = pl.Trainer(
        accelerator="gpu",
        devices=per_node,
        num_nodes=world // per_node,
        strategy=DDPStrategy(),
        precision=arguments.precision,
        plugins=[TorchElasticEnvironment()],
        max_steps=arguments.every + 1,
        callbacks=[callback, Limit()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tokens = (VOCABULARY * torch.rand((arguments.every + 1) * world, SEQUENCE, generator=torch.Generator()) ** 3).long()
    data = TensorDataset(tokens)
    sampler = DistributedSampler(data, world, int(os.environ["RANK"]), shuffle=False)
    try:
        trainer.fit(module, DataLoader(data, batch_size=1, sampler=sampler))
    except torch.OutOfMemoryError as error:
        print(f"rank {os.environ['RANK']}: step {trainer.global_step}: {str(error)[:400]}", flush=True)
        is_expected = str(error).startswith("profile run:") == profile
        # The other ranks run out of memory as well, but their collectives can't be waited for.
        os._exit(0 if is_expected and trainer.global_step == (1 if profile else arguments.every) else 1)
    return trainer.global_step, torch.cuda.max_memory_allocated()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--without-profile", action="store_true", help="run out of memory at the rearrangement")
    parser.add_argument("--every", type=int, default=3, help="steps before the first rearrangement")
    parser.add_argument("--precision", default="32-true", help="32-true or bf16-mixed")
    parser.add_argument("--kernel", choices=["eager", "grouped_mm"], default="eager", help="of the experts")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    _, still = train(arguments, moves=False, profile=False)
    _, moving = train(arguments, moves=True, profile=False)
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    print(f"rank {os.environ['RANK']}: peak {still / 2**20:.0f} MiB, {moving / 2**20:.0f} MiB with moves", flush=True)
    if moving - still < LEAST_GAP:
        print("the peaks differ too little; use larger experts, or fewer layers")
        return 2
    steps, _ = train(arguments, True, not arguments.without_profile, (still + moving) / 2 / total)
    print(f"rank {os.environ['RANK']}: memory did not run out in {steps} steps")
    return 1


if __name__ == "__main__":
    sys.exit(main())
