"""Checkpoints on GPUs: a run goes on under another strategy as if it had not stopped, and what saving takes.

One process a rank, as ``torchrun`` starts them, or any launcher that sets the same variables::

    torchrun --nproc-per-node 4 tests/gpu/checkpoints.py

Trains a model of Mixtral's kind, with experts that are shuffled after every second step: under DDP, FSDP2 and FSDP1
without a stop, for what the three differ by; then each saves halfway, as files and as folders, and each goes on from
each. Ends with status 1 if a continued loss is further from the run without a stop, under the same strategy, than those
are from each other (and ``--tolerance``).
"""

import argparse
import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor
from torch.utils.data import DistributedSampler, TensorDataset

from lightning_eplb import EPLBCallback, ExpertParallelStrategy
from tests.fidelity import ShufflePolicy
from tests.gpu.relocation import SEQUENCE, VOCABULARY, Training, build_model
from tests.models import ResumableLoader

KINDS = {"ddp": ["file"], "sharded": ["file", "folder"], "fsdp1": ["file", "folder"]}


def strategy_of(kind: str, form: str, arguments: argparse.Namespace, model: Any) -> Any:
    if kind == "sharded":
        return ExpertParallelStrategy(arguments.ep_size, save_distributed_checkpoint=form == "folder")
    if kind == "fsdp1":
        return FSDPStrategy(
            auto_wrap_policy={type(model.get_submodule("model.layers.0"))},
            state_dict_type="sharded" if form == "folder" else "full",
        )
    return DDPStrategy()


def train(
    kind: str, arguments: argparse.Namespace, steps: int, path: str | None = None, saved: tuple[str, str] | None = None
) -> tuple[Tensor, int]:
    """This rank's losses, and the bytes that saving to ``saved`` (a path and its form) had allocated beyond training's.

    Args:
        path: What to go on from.
    """
    world, per_node = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ep_size = arguments.ep_size or world
    model = build_model(arguments)
    module = Training(model, kind == "sharded", ep_size)
    trainer = pl.Trainer(
        accelerator=arguments.accelerator,
        devices=per_node,
        num_nodes=world // per_node,
        strategy=strategy_of(kind, saved[1] if saved else "file", arguments, model),
        precision=arguments.precision,
        plugins=[TorchElasticEnvironment()],
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[EPLBCallback(ep_size, arguments.ep_size, ShufflePolicy(), step_interval=2)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    generator = torch.Generator().manual_seed(1)
    tokens = (VOCABULARY * torch.rand(arguments.steps * world * 2, SEQUENCE, generator=generator) ** 3).long()
    data = TensorDataset(tokens)
    sampler = DistributedSampler(data, world, int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, ResumableLoader(data, batch_size=2, sampler=sampler), ckpt_path=path)
    more = 0
    if saved is not None:
        if arguments.accelerator == "gpu":
            torch.cuda.reset_peak_memory_stats()
            more = -torch.cuda.memory_allocated()
        trainer.save_checkpoint(saved[0])
        if arguments.accelerator == "gpu":
            more += torch.cuda.max_memory_allocated()
    return torch.tensor(module.losses, dtype=torch.float64), more


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--strategies", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--precision", default="32-true", help="32-true or bf16-mixed")
    parser.add_argument("--accelerator", choices=["gpu", "cpu"], default="gpu", help="cpu: without fsdp1")
    parser.add_argument("--kernel", choices=["eager", "grouped_mm"], default="eager", help="of the experts")
    parser.add_argument("--ep-size", type=int, default=None)
    parser.add_argument("--steps", type=int, default=8, help="half of them before the stop")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tolerance", type=float, default=1e-5)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    torch.set_num_threads(1)
    rank, half = int(os.environ["RANK"]), arguments.steps // 2
    whole = {kind: train(kind, arguments, arguments.steps)[0] for kind in arguments.strategies}
    spread = max((float((a - b).abs().max()) for a, b in itertools.combinations(whole.values(), 2)), default=0.0)
    print(f"rank {rank}: without a stop, the strategies' losses differ by {spread:.3g}", flush=True)
    worst = 0.0
    folder = [tempfile.mkdtemp()] if rank == 0 else [""]
    dist.broadcast_object_list(folder)
    for kind in arguments.strategies:
        for form in KINDS[kind]:
            path = str(Path(folder[0]) / f"{kind}-{form}.ckpt")
            _, more = train(kind, arguments, half, saved=(path, form))
            changes = []
            for then in arguments.strategies:
                losses, _ = train(then, arguments, arguments.steps, path)
                changes.append(f"{then} {(losses - whole[then][half:]).abs().max():.3g}")
                worst = max(worst, float((losses - whole[then][half:]).abs().max()))
            print(
                f"rank {rank}: {kind}, {form}: saving took {more / 2**20:.1f} MiB more; then {', '.join(changes)}",
                flush=True,
            )
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])
    return int(not worst <= spread + arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
