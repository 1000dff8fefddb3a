"""Pretrain a Mixtral-class model, its experts spread over the ranks and kept level by ``EPLBCallback``.

    python examples/pretrain.py fit --config examples/configs/cpu.yaml

Everything is set in the YAML file; any of it can be overridden on the command line, for instance
``--trainer.max_steps 1000`` (``fit --help`` lists what there is). The text is the source code of Python's standard
library, which every machine has, one token a byte.
"""

import itertools
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_eplb import EPLBCallback, fully_shard_moe, load_weights, materialize
from lightning_eplb.logging.heatmap import draw_expert_load


class MoELanguageModel(pl.LightningModule):
    """Mixtral model on bytes, without an auxiliary loss that would spread the tokens over experts.

    Args:
        width: Width of the residual stream.
        expert_width: Hidden width of an expert.
        layers: Number of layers, each with attention and experts.
        heads: Attention heads.
        experts: Experts of a layer.
        top_k: Experts of a token.
        learning_rate: Peak learning rate of AdamW, after a warm-up.
        warmup_steps: Optimizer steps in which the learning rate rises from a twentieth.
        weights: Checkpoint of this model, from any number of ranks, or folder of a Hugging Face model to start from.
        sharded_redundant_experts: ``num_redundant_experts`` of ``EPLBCallback`` under ``ExpertParallelStrategy``, which
            shards the model with FSDP2. ``None`` under other strategies.
    """

    def __init__(
        self,
        width: int = 128,
        expert_width: int = 256,
        layers: int = 4,
        heads: int = 4,
        experts: int = 16,
        top_k: int = 2,
        learning_rate: float = 3e-3,
        warmup_steps: int = 20,
        weights: str | None = None,
        sharded_redundant_experts: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.config = MixtralConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=expert_width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            num_local_experts=experts,
            num_experts_per_tok=top_k,
            output_router_logits=False,
        )
        self.model = None
        if sharded_redundant_experts is None:
            self.model = MixtralForCausalLM(self.config)
            if weights is not None:
                load_weights(self.model, weights)

    def configure_model(self) -> None:
        if self.model is None:  # it is called again for validation
            redundant, mesh = self.hparams["sharded_redundant_experts"], self.device_mesh
            if mesh is None:
                raise ValueError(
                    f"sharded_redundant_experts={redundant} needs ExpertParallelStrategy; leave it out here"
                )
            with torch.device("meta"):  # each rank gets memory for what it holds of the model only
                model = MixtralForCausalLM(self.config)
            fully_shard_moe(model, mesh, num_redundant_experts=redundant)
            weights = self.hparams["weights"]
            self.model = load_weights(model, weights) if weights is not None else materialize(model)

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        loss = self._loss(tokens)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self._loss(tokens), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"], betas=(0.9, 0.95))
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=self.hparams["warmup_steps"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    def _loss(self, tokens: Tensor) -> Tensor:
        assert self.model is not None
        return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss


class Windows(Dataset):
    """Text as windows of ``length`` bytes that do not overlap."""

    def __init__(self, text: bytes, length: int) -> None:
        count = len(text) // length
        self.tokens = torch.frombuffer(bytearray(text[: count * length]), dtype=torch.uint8).view(count, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index].long()


class StepSampler(Sampler[int]):
    """Shuffled positions without an end, of which an optimizer step takes the same ones on any number of ranks.

    It starts at the step that the trainer has resumed at. Lightning must not replace it: ``use_distributed_sampler:
    false``. Gradients are not accumulated.

    Args:
        length: Number of positions. They are shuffled anew each time that all were taken.
        global_batch_size: Positions of a step, over all ranks.
        trainer: Trainer, which knows step and rank.
    """

    def __init__(self, length: int, global_batch_size: int, trainer: pl.Trainer) -> None:
        self.length = length
        self.global_batch_size = global_batch_size
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        first, passes, order = self.trainer.global_step * self.global_batch_size, -1, []
        for i in itertools.count(first + self.trainer.global_rank, self.trainer.world_size):
            if i // self.length != passes:
                passes = i // self.length
                order = torch.randperm(self.length, generator=torch.Generator().manual_seed(passes)).tolist()
            yield order[i % self.length]


class StandardLibrary(pl.LightningDataModule):
    """Bytes of the source files of Python's standard library. Every twentieth file is for validation.

    Args:
        sequence_length: Tokens of a sequence.
        batch_size: Sequences of a rank's batch.
        validation_sequences: Sequences for validation, evenly spaced over its files.
        global_batch_size: Sequences of a step over all ranks, for a run whose number of ranks may change: data and
            learning rate then fit any number. ``None``: ``batch_size`` on each rank.
    """

    def __init__(
        self,
        sequence_length: int = 128,
        batch_size: int = 8,
        validation_sequences: int = 128,
        global_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.validation_sequences = validation_sequences
        self.global_batch_size = global_batch_size

    def setup(self, stage: str) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py"))
        files = [file for file in files if file.parent.name not in {"site-packages", "test", "idlelib"}]
        if not files:
            raise FileNotFoundError(f"no source files of the standard library in {folder}")
        texts = [file.read_bytes() for file in files]
        self.train = Windows(b"".join(text for i, text in enumerate(texts) if i % 20), self.sequence_length)
        kept = Windows(b"".join(texts[::20]), self.sequence_length)
        count = min(self.validation_sequences, len(kept))
        self.validation = Subset(kept, [i * len(kept) // count for i in range(count)])

    def train_dataloader(self) -> DataLoader:
        if self.global_batch_size is None:
            return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)
        assert self.trainer is not None
        batch_size, left = divmod(self.global_batch_size, self.trainer.world_size)
        if left:
            ranks = self.trainer.world_size
            raise ValueError(f"global_batch_size={self.global_batch_size} must be a multiple of the {ranks} ranks")
        return DataLoader(
            self.train, batch_size, sampler=StepSampler(len(self.train), self.global_batch_size, self.trainer)
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, self.batch_size, drop_last=True)


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar, with loss and balancedness within 80 columns."""

    BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class Summary(Callback):
    """Print the speed of the first and the last steps, and the folder of the results, at the end.

    List it after ``EPLBCallback``, so that the time of a step includes that of the callback. Waiting for data,
    validation and checkpoints do not count.

    Args:
        steps: Number of optimizer steps at each end.
        warmup: Steps at the start that do not count for the speed, as they fill caches.
    """

    def __init__(self, steps: int = 50, warmup: int = 10) -> None:
        self.steps = steps
        self.warmup = warmup
        self._rows: list[tuple[int, float]] = []  # tokens of all ranks and seconds of each step
        self._tokens, self._seconds = 0, 0.0  # of the step's batches so far

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._global_step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        self._tokens += batch.numel() * trainer.world_size
        self._seconds += time.perf_counter() - self._start
        if trainer.global_step == self._global_step:
            return  # gradients are accumulated: the step goes on
        self._global_step = trainer.global_step
        self._rows.append((self._tokens, self._seconds))
        self._tokens, self._seconds = 0, 0.0

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        balancer = _eplb(trainer).balancer
        if balancer is None or not self._rows:
            return  # resumed where there was nothing left to do
        picture = Path(trainer.default_root_dir) / "expert_load.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_expert_load(balancer.load.compute()["load"], "Tokens of each expert in the last window").savefig(picture)

        first, last = self._rows[: self.steps], self._rows[-self.steps :]
        left_out = min(self.warmup, len(first) - 1)
        timed = first[left_out:], self._rows[left_out:][-self.steps :]
        table = Table(
            title=f"{trainer.global_step} steps on {trainer.world_size} ranks",
            caption=f"tokens per second: without the first {left_out} steps, a warm-up",
        )
        table.add_column("")
        table.add_column(f"first {len(first)} steps", justify="right")
        table.add_column(f"last {len(last)} steps", justify="right")
        speeds = (sum(tokens for tokens, _ in part) / sum(seconds for _, seconds in part) for part in timed)
        table.add_row("tokens per second", *(f"{speed:,.0f}" for speed in speeds))
        if "val_loss" in trainer.callback_metrics:
            table.add_row("validation loss", "", f"{float(trainer.callback_metrics['val_loss']):.3f}")
        console = Console()
        console.print(table)
        console.print(
            f"checkpoint  {_relative(getattr(trainer.checkpoint_callback, 'best_model_path', ''))}", soft_wrap=True
        )
        console.print(f"heatmap     {_relative(picture)}", soft_wrap=True)
        console.print(f"logs        {_relative(getattr(trainer.logger, 'log_dir', ''))}", soft_wrap=True)


def _eplb(trainer: pl.Trainer) -> EPLBCallback:
    return next(callback for callback in trainer.callbacks if isinstance(callback, EPLBCallback))  # type: ignore[attr-defined]


def _relative(path: Any) -> str:
    return os.path.relpath(path) if path else "none"


def main() -> None:
    torch.set_num_threads(1)  # each rank is a process of its own: more threads would take each other's cores
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))  # those that torchrun has found
    LightningCLI(
        MoELanguageModel, StandardLibrary, save_config_kwargs={"overwrite": True}, trainer_defaults={"num_nodes": nodes}
    )
    if dist.is_initialized():
        dist.destroy_process_group()  # its threads end before the interpreter does


if __name__ == "__main__":
    main()
