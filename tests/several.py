"""Several models in one LightningModule, against one process with the unmodified ones."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_eplb import EPLBCallback, ExpertParallelStrategy, fully_shard_moe
from tests.fidelity import Outcome, ShufflePolicy, named_state, trainer_for, whole
from tests.models import hugging_face_model, language_loss, loader, token_batches

STEPS, SEQUENCES, CLIP = 8, 2, 0.5


@dataclass(frozen=True)
class Several:
    """Models that are trained. ``alternating``: they take turns, each with an optimizer of its own."""

    kind: Literal["pair", "uneven", "alternating", "hybrid", "teachers"]
    redundant: int = 0
    use_async: bool = False
    redundancy: Literal["window", "batch"] = "window"
    clips: bool = False
    ranks: int = 2
    ep_size: int | None = None
    is_sharded: bool = False
    """Under ``ExpertParallelStrategy``, each model by a call of ``fully_shard_moe``."""

    def __str__(self) -> str:
        flags = "-async" * self.use_async + "-clip" * self.clips + "-fsdp" * self.is_sharded
        ranks = f"{self.ranks}ranks" + (f"-ep{self.ep_size}" if self.ep_size else "")
        return f"{self.kind}-{ranks}-E{self.redundant}{flags}-{self.redundancy}"


def models_of(kind: str) -> dict[str, nn.Module]:
    """The models by attribute: of 8 and 16 experts, of 7 and 5, one with layers of both, or a student and two teachers.

    The teachers are frozen. One has 16 experts, and one a single expert, which ranks can't share.
    """
    if kind == "hybrid":
        model, other = hugging_face_model("mixtral", 8, layers=3), hugging_face_model("mixtral", 16, layers=3)
        model.model.layers[1].mlp = other.model.layers[1].mlp  # type: ignore[index, union-attr]
        return {"model": model}
    if kind == "uneven":
        return {"main": hugging_face_model("mixtral", 7), "draft": hugging_face_model("qwen3_moe", 5, layers=1)}
    if kind == "teachers":
        large = hugging_face_model("qwen3_moe", 16, layers=1).requires_grad_(False)
        small = hugging_face_model("mixtral", 1, top_k=1).requires_grad_(False)
        return {"student": hugging_face_model("mixtral", 8), "large": large, "small": small}
    return {"main": hugging_face_model("mixtral", 8), "draft": hugging_face_model("qwen3_moe", 16, layers=1)}


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


def loss_of(kind: str, models: dict[str, nn.Module], tokens: Tensor, turn: int) -> Tensor:
    if kind == "hybrid":
        return language_loss(models["model"], tokens)
    if kind == "teachers":
        with torch.no_grad():
            wanted = logits_of(models["large"], tokens) + logits_of(models["small"], tokens)
        return (logits_of(models["student"], tokens) - wanted).square().mean()
    if kind == "alternating":  # as a generator and a discriminator: the other one has tokens in some steps only
        if turn % 2:
            return language_loss(models["draft"], tokens)
        return language_loss(models["main"], tokens) + (0.1 * language_loss(models["draft"], tokens) if turn % 4 else 0)
    return language_loss(models["main"], tokens) + language_loss(models["draft"], tokens)


def optimizers_of(kind: str, models: dict[str, nn.Module]) -> list[torch.optim.Optimizer]:
    trained = [[p for p in model.parameters() if p.requires_grad] for model in models.values()]
    groups = trained if kind == "alternating" else [[p for part in trained for p in part]]
    return [torch.optim.AdamW(group, lr=3e-3, weight_decay=0.1) for group in groups]


class SeveralModels(pl.LightningModule):
    """Manual optimization for those that take turns."""

    def __init__(self, case: Several) -> None:
        super().__init__()
        self.case = case
        for name, model in models_of(case.kind).items():
            setattr(self, name, model)
        self.names = list(models_of(case.kind))
        self.losses: list[float] = []
        self.automatic_optimization = case.kind != "alternating"

    def configure_model(self) -> None:
        if self.case.is_sharded and not any(isinstance(model, FSDPModule) for model in self.parts.values()):
            assert self.device_mesh is not None
            for model in self.parts.values():
                fully_shard_moe(model, self.device_mesh, num_redundant_experts=self.case.redundant)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in self.names}

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss = loss_of(self.case.kind, self.parts, batch[0], batch_idx)
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            optimizer = self.optimizers()[batch_idx % 2]
            self.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return optimizers_of(self.case.kind, self.parts)


def tokens_of(case: Several) -> Tensor:
    return token_batches(STEPS * SEQUENCES * case.ranks)


def reference(case: Several) -> Outcome:
    """One process, plain PyTorch, the unmodified models, every step the batches of all ranks."""
    module = SeveralModels(case)
    models = module.parts
    optimizers = optimizers_of(case.kind, models)
    losses = []
    for step, tokens in enumerate(tokens_of(case).split(SEQUENCES * case.ranks)):
        loss = loss_of(case.kind, models, tokens, step)
        losses.append(loss.item())
        module.zero_grad()
        loss.backward()
        if case.clips:
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizers[step % len(optimizers)].step()
    return outcome_of(module, losses, optimizers)


def outcome_of(module: SeveralModels, losses: list[float], optimizers: list[torch.optim.Optimizer]) -> Outcome:
    state = {}
    for number, optimizer in enumerate(optimizers):
        state |= {f"{number}.{name}": tensor for name, tensor in named_state(module, optimizer).items()}
    weights = {name: whole(tensor) for name, tensor in module.state_dict().items()}
    return Outcome(losses, weights, dict(sorted(state.items())))  # a loaded one is by index


def trained(
    case: Several, steps: int = STEPS, ckpt_path: str | None = None, **arguments: Any
) -> tuple[SeveralModels, pl.Trainer, EPLBCallback]:
    """Train on every worker, the experts of all models shuffled after every step unless ``step_interval`` is given."""
    module = SeveralModels(case)
    callback = EPLBCallback(
        case.redundant,
        case.ep_size,
        policy=ShufflePolicy(),
        step_interval=arguments.pop("step_interval", 1),
        trace=arguments.pop("trace", None),
        use_async=case.use_async,
        redundancy=case.redundancy,
        min_tokens_per_copy=1 if case.redundancy == "batch" else None,
    )
    strategy: Strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    if case.is_sharded:
        strategy = ExpertParallelStrategy()
    clip = {"gradient_clip_val": CLIP} if case.clips else {}
    trainer = trainer_for(case.ranks, strategy, max_steps=steps, callbacks=[callback], **clip, **arguments)
    trainer.fit(module, loader(tokens_of(case), SEQUENCES), ckpt_path=ckpt_path)
    return module, trainer, callback


def distributed(case: Several) -> tuple[Outcome, dict[str, Any]]:
    """Train on every worker. Return the outcome and what the balancer tells."""
    module, trainer, callback = trained(case)
    balancer = callback.balancer
    assert balancer is not None
    told = {
        "rearrangements": balancer.num_rearrangements,
        "bytes": balancer.rearranged_bytes,
        "shapes": {name: tuple(model.load.ring.shape[1:]) for name, model in balancer.models.items()},
        "steps": {name: model.num_steps for name, model in balancer.models.items()},
        "tokens": {name: int(model.load.steps().sum()) for name, model in balancer.models.items()},
        "moved": {
            name: not model.is_whole and bool((np.diff(model.placement.primaries) < 0).any())
            for name, model in balancer.models.items()
        },
    }
    return outcome_of(module, module.losses, trainer.optimizers), told


def resumed(case: Several, folder: str) -> Outcome:
    """On every worker: half of the steps, a checkpoint, and the other half from it with new models."""
    path, trace = os.path.join(folder, "half.ckpt"), os.path.join(folder, "trace.npy")
    first, trainer, _ = trained(case, STEPS // 2, trace=trace)
    trainer.save_checkpoint(path)
    second, trainer, _ = trained(case, STEPS, ckpt_path=path, trace=trace)
    return outcome_of(second, first.losses + second.losses, trainer.optimizers)


def logged(case: Several, folder: str) -> None:
    """On every worker: a run in Weights & Biases, which is offline."""
    import wandb

    folder = os.path.join(folder, f"rank{dist.get_rank()}")
    os.mkdir(folder)
    trained(case, step_interval=4, logger=WandbLogger(save_dir=folder, offline=True), log_every_n_steps=1)
    wandb.finish()
