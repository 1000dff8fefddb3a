"""Tiny models, and the Lightning module that trains them."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_eplb import fully_shard_moe

VOCABULARY, SEQUENCE = 64, 8


def hugging_face_model(name: str, num_experts: int = 8, top_k: int = 2, layers: int = 2) -> nn.Module:
    """A float64 language model from a config class, with ``eager`` experts; the same weights in every process."""
    from transformers import (
        AutoModelForCausalLM,
        DeepseekV3Config,
        GptOssConfig,
        MixtralConfig,
        Qwen3MoeConfig,
    )

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "num_experts_per_tok": top_k,
    }
    if name == "mixtral":
        config = MixtralConfig(**sizes, num_local_experts=num_experts)
    elif name == "qwen3_moe":
        config = Qwen3MoeConfig(**sizes, num_experts=num_experts, moe_intermediate_size=12)
    elif name == "deepseek_v3":  # a first block without experts, shared experts, and a bias that is a buffer
        config = DeepseekV3Config(
            **sizes | {"num_hidden_layers": layers + 1, "head_dim": 4},
            n_routed_experts=num_experts,
            moe_intermediate_size=12,
            n_group=2,
            topk_group=2,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            first_k_dense_replace=1,
        )
    else:
        config = GptOssConfig(**sizes, num_local_experts=num_experts)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    for parameter_name, parameter in model.named_parameters():
        if "bias" in parameter_name or "router" in parameter_name or ".gate.weight" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name != "sgd":
        implementation = {} if name == "adamw" else {name: True}  # foreach, fused
        return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, **implementation)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def language_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """In float64: the model's own loss casts logits to float32."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


class LanguageModel(pl.LightningModule):
    """Trains a language model and remembers every loss."""

    def __init__(self, model: nn.Module, optimizer: str) -> None:
        super().__init__()
        self.model = model
        self.optimizer_name = optimizer
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss = language_loss(self.model, batch[0])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        self.log("val_loss", language_loss(self.model, batch[0]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.optimizer_name, self.model)


class ShardedLanguageModel(LanguageModel):
    """Parallelized in ``configure_model``, for ``ExpertParallelStrategy``."""

    def __init__(self, model: nn.Module, optimizer: str, num_redundant_experts: int = 0) -> None:
        super().__init__(model, optimizer)
        self.num_redundant_experts = num_redundant_experts

    def configure_model(self) -> None:
        if not isinstance(self.model, FSDPModule):
            assert self.device_mesh is not None
            fully_shard_moe(self.model, self.device_mesh, num_redundant_experts=self.num_redundant_experts)


def token_batches(count: int, seed: int = 1) -> Tensor:
    """``count`` sequences of random tokens, ``[count, SEQUENCE]``, skewed as text is."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(count, SEQUENCE, generator=generator, dtype=torch.float64)
    return (VOCABULARY * ranks**3).long()


class ResumableLoader(DataLoader):
    """Goes on where a checkpoint left off: Lightning asks for that through these two methods."""

    batches_given = 0

    def __iter__(self) -> Iterator[Any]:
        start, self.batches_given = self.batches_given, 0
        for i, batch in enumerate(super().__iter__()):
            self.batches_given = i + 1
            if i >= start:
                yield batch
        self.batches_given = 0

    def state_dict(self) -> dict[str, int]:
        return {"batches_given": self.batches_given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches_given = state["batches_given"]


def loader(tokens: Tensor, batch_size: int) -> DataLoader:
    """In order: rank ``r`` of ``R`` gets sequences ``r, r + R, ...``, so that all ranks' batches of a step are a run.

    Lightning's own sampler shuffles training data, whatever the loader says.
    """
    dataset = TensorDataset(tokens)
    sampler = DistributedSampler(dataset, shuffle=False) if dist.is_initialized() else None
    return ResumableLoader(dataset, batch_size=batch_size, sampler=sampler)
