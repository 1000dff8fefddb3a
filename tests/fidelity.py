"""Training with experts that move all the time, against one process with the unmodified model."""

import math
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_eplb import EPLBCallback, ExpertParallelStrategy, ExpertPlacement, Policy, Topology
from lightning_eplb.parallel.all_to_all import AllToAllDispatcher
from tests.fsdp1 import DoublePrecision, fsdp1, full_state
from tests.models import (
    LanguageModel,
    ShardedLanguageModel,
    hugging_face_model,
    language_loss,
    loader,
    optimizer_of,
    token_batches,
)

STEPS, SEQUENCES = 12, 2
TOLERANCE = 1e-10
CLIP = {"off": None, "norm": 0.5, "value": 0.01}


@dataclass(frozen=True)
class Case:
    model: str = "mixtral"
    ranks: int = 2
    redundant: int = 0
    """Redundant experts as a multiple of the ranks."""
    accumulation: int = 1
    clip: str = "off"
    optimizer: str = "adamw"
    top_k: int = 2
    experts: int = 8
    ep_size: int | None = None
    redundancy: Literal["window", "batch"] = "window"
    checkpointing: Literal["off", "reentrant", "non-reentrant"] = "off"
    """Of activations."""
    use_async: bool = False
    replicas: int | None = None
    """Under ``ExpertParallelStrategy`` with so many; None is DDP."""
    fsdp1: str | None = None
    """Under Lightning's ``FSDPStrategy``, by this ``sharding_strategy``."""
    parts: Literal[1, 2] = 1
    """In which tokens travel."""

    def __str__(self) -> str:
        return (
            f"{self.model}-top{self.top_k}-"
            + (f"{self.experts}experts-" if self.experts != 8 else "")
            + f"{self.ranks}ranks-E{self.redundant}R-acc{self.accumulation}"
            f"-clip_{self.clip}-{self.optimizer}"
            + (f"-ep{self.ep_size}" if self.ep_size else "")
            + (f"-fsdp{self.replicas}" if self.replicas else "")
            + (f"-flat_{self.fsdp1}" if self.fsdp1 else "")
            + ("-batch" if self.redundancy == "batch" else "")
            + ("-async" if self.use_async else "")
            + ("-halves" if self.parts == 2 else "")
            + (f"-{self.checkpointing}" if self.checkpointing != "off" else "")
        )


class ShufflePolicy(Policy):
    """Any placement at all: primaries and redundant experts at random, some slots empty."""

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)

    def rearrange(self, load_YL: np.ndarray, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        slots_YRS = np.full_like(placement.by_rank, -1)
        n, experts = placement.primaries_per_rank, placement.num_logical_experts
        for layer in range(placement.num_layers):
            places = np.full(n * placement.num_ranks, -1)  # some ranks may get phantom experts only
            places[self._random.permutation(len(places))[:experts]] = self._random.permutation(experts)
            own_RN = places.reshape(-1, n)
            slots_YRS[layer, :, :n] = np.take_along_axis(own_RN, np.argsort(own_RN < 0, axis=1, kind="stable"), axis=1)
            for rank in range(placement.num_ranks):
                others = np.setdiff1d(np.arange(experts), slots_YRS[layer, rank, :n])
                redundant = self._random.permutation(others)[: placement.redundant_per_rank]
                slots_YRS[layer, rank, n : n + len(redundant)] = np.where(
                    self._random.random(len(redundant)) < 0.9, redundant, -1
                )
        return ExpertPlacement(slots_YRS.reshape(placement.physical_to_logical.shape), experts, placement.num_ranks)


@dataclass
class Outcome:
    losses: list[float]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]


def trainer_for(ranks: int, strategy: Strategy | None = None, **kwargs: Any) -> pl.Trainer:
    """A trainer on the workers' process group; with DDP unless told otherwise."""
    if strategy is None and ranks > 1:
        strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    elif strategy is not None:
        kwargs["plugins"] = [TorchElasticEnvironment(), *kwargs.get("plugins", [])]
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(accelerator="cpu", devices=ranks, strategy=strategy or "auto", **{**quiet, **kwargs})


def whole(tensor: Tensor) -> Tensor:
    """A copy with all ranks' shards in it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def named_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state dict, by the parameter's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{order[index]}.{key}": whole(torch.as_tensor(value))
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if value is not None
    }


def tokens_of(case: Case) -> Tensor:
    return token_batches(STEPS * case.accumulation * SEQUENCES * case.ranks)


def reference(case: Case) -> Outcome:
    """One process, plain PyTorch, the unmodified model, every step the batches of all ranks."""
    model = hugging_face_model(case.model, case.experts, case.top_k)
    optimizer = optimizer_of(case.optimizer, model)
    losses = []
    batches = tokens_of(case).split(SEQUENCES * case.ranks)
    for i, batch in enumerate(batches):
        loss = language_loss(model, batch)
        losses.append(loss.item())
        (loss / case.accumulation).backward()
        if (i + 1) % case.accumulation == 0:
            if case.clip == "norm":
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP["norm"])
            elif case.clip == "value":
                torch.nn.utils.clip_grad_value_(model.parameters(), CLIP["value"])
            optimizer.step()
            optimizer.zero_grad()
    return Outcome(losses, {k: v.clone() for k, v in model.state_dict().items()}, named_state(model, optimizer))


def distributed(case: Case) -> Outcome:
    """On every worker: Lightning, experts spread over the ranks and shuffled after every step."""
    model, redundant = hugging_face_model(case.model, case.experts, case.top_k), case.redundant * case.ranks
    if case.checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    module, strategy, plugins = LanguageModel(model, case.optimizer), None, []
    if case.fsdp1 is not None:
        strategy, plugins = fsdp1(sharding_strategy=case.fsdp1), [DoublePrecision()]
    if case.replicas is not None:
        module = ShardedLanguageModel(model, case.optimizer, redundant)
        strategy = ExpertParallelStrategy(case.ep_size, case.replicas)
    callback = EPLBCallback(
        redundant,
        case.ep_size,
        ShufflePolicy(),
        step_interval=1,
        redundancy=case.redundancy,
        min_tokens_per_copy=1,
        use_async=case.use_async,
    )
    trainer = trainer_for(
        case.ranks,
        strategy,
        plugins=plugins,
        max_steps=STEPS,
        accumulate_grad_batches=case.accumulation,
        gradient_clip_val=CLIP[case.clip],
        gradient_clip_algorithm=case.clip if case.clip != "off" else None,
        callbacks=[callback],
    )
    with patch.object(AllToAllDispatcher, "bytes_in_parts", 0 if case.parts == 2 else math.inf):
        trainer.fit(module, loader(tokens_of(case), SEQUENCES))
    assert callback.balancer is not None
    if case.ep_size != 1:
        assert callback.balancer.num_rearrangements >= (STEPS // 4 if case.use_async else STEPS)
        assert callback.balancer.rearranged_bytes > 0
    if case.redundant:
        assert callback.balancer.last_step is not None
        assert callback.balancer.last_step.num_copies > 0 or callback.balancer.last_step.balancedness == 1.0
    if case.fsdp1 is not None:
        return Outcome(module.losses, *full_state(trainer))
    return Outcome(
        module.losses,
        {k: whole(v) for k, v in module.model.state_dict().items()},
        named_state(module.model, trainer.optimizers[0]),
    )


def largest_difference(expected: Outcome, ranks: list[Outcome]) -> float:
    """Over every loss (the mean over ranks), every weight and every optimizer moment of every rank."""
    losses = np.mean([outcome.losses for outcome in ranks], axis=0)
    differences = [float(np.abs(losses - np.array(expected.losses)).max())]
    for outcome in ranks:
        for ours, theirs in ((outcome.weights, expected.weights), (outcome.state, expected.state)):
            assert list(ours) == list(theirs)
            for name, tensor in theirs.items():
                assert ours[name].shape == tensor.shape, name
                differences.append(float((ours[name].double() - tensor.double()).abs().max()))
    return max(differences)
