"""Lightning's ``FSDPStrategy`` (FSDP1) where there is no GPU: on the CPU over gloo, and in float64.

Lightning itself asks for CUDA in a few places, none of which is about sharding; a GPU runs ``tests/gpu``.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecision,
    StateDictType,
)
from torch.optim import Optimizer


class CPUFSDPStrategy(FSDPStrategy):
    """As Lightning's, but for the device, which it gives by its index only: the CPU has none."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return super()._setup_model(model)
        wrapped = FullyShardedDataParallel(
            model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )
        _setup_activation_checkpointing(wrapped, self._activation_checkpointing_kwargs)
        return wrapped

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with on_the_cpu():
            return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        with on_the_cpu():
            return super().optimizer_state(optimizer)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        with on_the_cpu():
            return super().load_checkpoint(checkpoint_path, weights_only)


def on_the_cpu() -> AbstractContextManager:
    """While Lightning makes full state dicts as below."""
    return mock.patch("lightning.pytorch.strategies.fsdp._get_full_state_dict_context", full_state_dicts)


class CPUFSDPPrecision(FSDPPrecision):
    """As Lightning's, with autocast on the CPU."""

    def forward_context(self) -> AbstractContextManager:
        if "mixed" not in self.precision:
            return super().forward_context()
        return torch.autocast("cpu", dtype=torch.bfloat16 if self.precision == "bf16-mixed" else torch.float16)


class DoublePrecision(CPUFSDPPrecision):
    """Everything in float64."""

    def __init__(self) -> None:
        super().__init__("32-true")
        self._desired_input_dtype = torch.float64

    @property
    def mixed_precision_config(self) -> Any:
        return MixedPrecision()

    def forward_context(self) -> AbstractContextManager:
        return nullcontext()


def fsdp1(**kwargs: Any) -> FSDPStrategy:
    """Each decoder layer sharded by itself, as a user would have it."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer
    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

    blocks = {GptOssDecoderLayer, MixtralDecoderLayer, Qwen3MoeDecoderLayer}
    return CPUFSDPStrategy(**{"auto_wrap_policy": blocks, "process_group_backend": "gloo", **kwargs})


def full_state_dicts(module: nn.Module, world_size: int = 0, rank0_only: bool = True) -> AbstractContextManager:
    """As Lightning's, but nothing is moved to the CPU: what is there already, FSDP would gather into one buffer."""
    configs = (FullStateDictConfig(rank0_only=rank0_only), FullOptimStateDictConfig(rank0_only=rank0_only))
    configs[1].offload_to_cpu = False
    return FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, *configs)


def full_state(trainer: pl.Trainer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and every tensor of the optimizer's state, by the names in the unmodified model; on every rank."""
    wrapped, (optimizer,) = trainer.strategy.model, trainer.optimizers
    assert wrapped is not None
    with full_state_dicts(wrapped, rank0_only=False):
        weights, state = wrapped.state_dict(), FullyShardedDataParallel.optim_state_dict(wrapped, optimizer)["state"]
    keys = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
    return {name.removeprefix("model."): tensor.clone() for name, tensor in weights.items()}, {
        f"{name.removeprefix('model.')}.{key}": state[name][key].clone()
        for name in weights
        if name in state  # no buffer
        for key in keys
        if key in state[name]
    }
