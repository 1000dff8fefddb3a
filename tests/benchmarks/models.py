"""Model of the benchmarks of steps and layers: a Qwen3-MoE whose tokens go where a popularity says, on CPU or GPU."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Of a model and of a rank's batch.

    Attributes:
        width: Model width.
        expert_width: Of an expert's hidden layer.
        sequences: Of ``sequence`` tokens each, on a rank.
    """

    layers: int
    experts: int
    top_k: int
    width: int
    expert_width: int
    sequences: int
    sequence: int

    @property
    def tokens(self) -> int:
        """Of a rank."""
        return self.sequences * self.sequence


GPU = Size(layers=4, experts=64, top_k=8, width=1536, expert_width=768, sequences=4, sequence=1024)
CPU = Size(layers=2, experts=16, top_k=2, width=192, expert_width=384, sequences=8, sequence=128)
VOCABULARY = 512


class SteeredRouter(nn.Module):
    """Weighs experts as the router that it wraps, and chooses those that a popularity says, at random.

    Every lane of a benchmark that sets the same seed before a step routes the same tokens to the same experts.
    """

    def __init__(self, router: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("popularity_L", torch.ones(num_experts), persistent=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TL, weights_TK, index_TK = self.router(hidden)
        noise_TL = torch.empty(logits_TL.shape, dtype=torch.float32, device=hidden.device).exponential_()
        index_TK = (self.popularity_L / noise_TL).topk(index_TK.shape[1], dim=-1).indices  # drawn without replacement
        weights_TK = logits_TL.float().softmax(dim=-1).gather(1, index_TK)
        return logits_TL, (weights_TK / weights_TK.sum(dim=-1, keepdim=True)).to(hidden.dtype), index_TK


def steered_model(size: Size, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A language model with a :class:`SteeredRouter` in each layer; the same weights in every process."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        moe_intermediate_size=size.expert_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        num_key_value_heads=size.width // 64,
        head_dim=64,
        max_position_embeddings=size.sequence,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
    )
    torch.manual_seed(0)
    with device:
        model = Qwen3MoeForCausalLM._from_config(
            config, dtype=dtype, experts_implementation="grouped_mm", attn_implementation="sdpa"
        )
    for block in [module for module in model.modules() if hasattr(module, "gate") and hasattr(module, "experts")]:
        block.gate = SteeredRouter(block.gate, size.experts).to(device)
    return model.train()


def routers(model: nn.Module) -> list[SteeredRouter]:
    """Of each layer, in order."""
    return [module for module in model.modules() if isinstance(module, SteeredRouter)]


def join_from_environment() -> torch.device:
    """Join the group of ranks that the environment tells of (``RANK`` ...): NCCL where there is a GPU.

    A rank's host gets one thread, as ``torchrun`` and Lightning have it: more would be in each other's way.
    """
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device
