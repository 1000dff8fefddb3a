"""Lanes of the benchmark of training steps under Lightning: one model under plain DDP and FSDP2, ours under both."""

import cProfile
import os
import pstats
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from lightning_eplb import EPLBCallback, ExpertParallelStrategy, Policy, fully_shard_moe, parallelize_experts
from tests.benchmarks.held_fit import HeldFit
from tests.benchmarks.lanes import memory, wait_for_all

KINDS = ("DDP", "ours, DDP", "FSDP2", "ours, FSDP2", "ours, FSDP2 without resharding")
SHOWN_FUNCTIONS = 25


@dataclass(frozen=True)
class LayersSize:
    """Of a Qwen3-MoE.

    Attributes:
        sequence: Most tokens of a sequence.
    """

    layers: int
    experts: int
    top_k: int
    width: int
    expert_width: int
    heads: int
    key_value_heads: int
    vocabulary: int
    head_width: int = 128
    sequence: int = 4096

    def flop(self, tokens: int) -> float:
        """Floating-point operations in the products of a training step on ``tokens`` tokens."""
        heads = 2 * (self.heads + self.key_value_heads) * self.width  # queries, keys, values and the output
        attention = self.head_width * (heads + self.heads * min(self.sequence, tokens))  # causal: half of the scores
        experts = self.width * (self.experts + 3 * self.top_k * self.expert_width)
        return 6.0 * tokens * (self.layers * (attention + experts) + self.width * self.vocabulary)

    def model(self, device: torch.device) -> nn.Module:
        """Build the model, with the same weights in every process; in bfloat16 on GPUs."""
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        config = Qwen3MoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            moe_intermediate_size=self.expert_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head_width,
            max_position_embeddings=self.sequence,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            tie_word_embeddings=False,
        )
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:
            model = Qwen3MoeForCausalLM._from_config(
                config, dtype=dtype, experts_implementation="grouped_mm", attn_implementation="sdpa"
            )
        return model.train()


class LanguageModel(pl.LightningModule):
    """Built in ``configure_model`` on this rank's device, as the strategy of its kind needs it."""

    def __init__(self, kind: str, size: LayersSize, device: torch.device) -> None:
        super().__init__()
        self.kind, self.size, self.build_device = kind, size, device
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = self.size.model(self.build_device)
        if self.kind == "ours, DDP":
            parallelize_experts(self)
        elif self.kind.startswith("ours, FSDP2"):
            assert self.device_mesh is not None
            fully_shard_moe(self.model, self.device_mesh, reshard_after_forward=self.kind == "ours, FSDP2")
        elif self.kind == "FSDP2":
            assert self.device_mesh is not None
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0], use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5, fused=True)


class TrainLane(HeldFit):
    """A fit that stands before each block of steps.

    Args:
        kind: One of :data:`KINDS`.
        size: Of the model.
        tokens: Of a rank's batch.
        device: Of this rank.
        steps: Optimizer steps of the fit, which has one more to end it; and those from one stand to the next.
        policy: Class of the callback's policy.
    """

    def __init__(
        self,
        kind: str,
        size: LayersSize,
        tokens: int,
        device: torch.device,
        steps: tuple[int, int],
        policy: type[Policy],
    ) -> None:
        self.kind = kind
        self.seconds: list[float] = []
        """Of a step, the mean of each block, on this rank."""
        self.peak_bytes = 0
        self._size, self._tokens, self._device = size, tokens, device
        self._steps, self._steps_in_block = steps
        self._policy = policy
        self._held_bytes = 0
        self._started: tuple[float, int] | None = None
        self._profilers: list[tuple[Any, Path | None]] = []
        super().__init__()

    def profile_next(self, trace: Path | None) -> None:
        """Profile the next block: the device and the host, written to ``trace``, or the host's Python, printed."""
        profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) if trace else cProfile.Profile()
        self._profilers.append((profiler, trace))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self._steps_in_block:
            return
        self._end_block()
        self.stand()
        if batch_idx < self._steps:
            self._start_block()

    def _start_block(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait_for_all(self._device)
        if self._profilers and isinstance(self._profilers[0][0], cProfile.Profile):
            self._profilers[0][0].enable()
        elif self._profilers:
            self._profilers[0][0].start()
        self._started = time.perf_counter(), memory(self._device)

    def _end_block(self) -> None:
        if self._started is None:  # the fit's own start
            self._held_bytes = memory(self._device) - self._before
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        start, allocated = self._started
        self.seconds.append((time.perf_counter() - start) / self._steps_in_block)
        if self._device.type == "cuda":
            added = torch.cuda.max_memory_allocated() - allocated
            self.peak_bytes = max(self.peak_bytes, self._held_bytes + added)
        self._held_bytes += memory(self._device) - allocated
        if self._profilers:
            self._end_profile(*self._profilers.pop(0))

    def _end_profile(self, profiler: Any, trace: Path | None) -> None:
        if trace is None:
            profiler.disable()
            if dist.get_rank() == 0:
                print(f"{self.kind}, {self._tokens} tokens a rank, Python of {self._steps_in_block} steps\n")
                statistics = pstats.Stats(profiler, stream=sys.stdout).strip_dirs()
                statistics.sort_stats("tottime").print_stats(SHOWN_FUNCTIONS)
                statistics.sort_stats("cumulative").print_stats(2 * SHOWN_FUNCTIONS)
            return
        profiler.stop()
        if dist.get_rank() == 0:
            trace.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            by = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
            print(f"{self.kind}, {self._tokens} tokens a rank, {self._steps_in_block} steps\n")
            print(profiler.key_averages().table(sort_by=by, row_limit=SHOWN_FUNCTIONS, max_name_column_width=70))
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=SHOWN_FUNCTIONS))

    def fit(self) -> None:
        self._before = memory(self._device)
        ranks, local_ranks = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        trainer = pl.Trainer(
            accelerator="gpu" if self._device.type == "cuda" else "cpu",
            devices=local_ranks,
            num_nodes=ranks // local_ranks,
            precision="bf16-true" if self._device.type == "cuda" else "32-true",
            strategy=self._strategy(),
            plugins=[TorchElasticEnvironment()],
            callbacks=[self, EPLBCallback(policy=self._policy())] if self.kind.startswith("ours") else [self],
            max_steps=self._steps + 1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.strategy.teardown = lambda: None  # it would move the model and the optimizer to the CPU first
        sequences = max(1, self._tokens // self._size.sequence)
        shape = ((self._steps + 1) * sequences * ranks, min(self._tokens, self._size.sequence))
        tokens = torch.randint(self._size.vocabulary, shape, generator=torch.Generator().manual_seed(1))
        model = LanguageModel(self.kind, self._size, self._device)
        trainer.fit(model, DataLoader(TensorDataset(tokens), batch_size=sequences))

    def _strategy(self) -> Strategy:
        if self.kind == "FSDP2":
            return ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
        if self.kind.startswith("ours, FSDP2"):
            return ExpertParallelStrategy(ep_size=dist.get_world_size())
        return DDPStrategy()
