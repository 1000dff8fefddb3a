"""Step statistics: result types of optimizer steps and rearrangements, and their collection over all EP groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb.functional import balancedness
from lightning_eplb.parallel.expert_layer import LayerLoad
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies.token_split import level_tokens
from lightning_eplb.relocation.placed_layers import PlacedLayers
from lightning_eplb.relocation.plan import LayerMoves, plan_relocation, plan_relocations


@dataclass(frozen=True)
class PlacementChange:
    """Change of a model's placement. ``before == after`` if no change was worth its cost.

    Attributes:
        before: Placement at the decision.
        after: Placement that was reached.
        load: Load of the window that the decision was based on, ``[Y, L]`` int64.
        name: Name of the model in ``ExpertLoadBalancer.models``.
        predicted_balancedness: Balancedness of the steps that follow, according to the forecast; ``None`` without one.
    """

    before: ExpertPlacement
    after: ExpertPlacement
    load: np.ndarray
    name: str = field(default="model", kw_only=True)
    predicted_balancedness: float | None = field(default=None, kw_only=True)

    @property
    def has_changed(self) -> bool:
        """``True`` if the placement changed."""
        return self.before != self.after

    @property
    def num_layers(self) -> int:
        """Layers in which a primary changed its slot."""
        return len(self._moves)

    @property
    def num_rows(self) -> int:
        """Primaries that changed ranks, in one EP group."""
        return sum(moves.num_rows_between_ranks for moves in self._moves)

    @property
    def num_copies(self) -> int:
        """Redundant slots whose expert changed or was removed."""
        n = self.before.primaries_per_rank
        return int((self.before.by_rank[:, :, n:] != self.after.by_rank[:, :, n:]).sum())

    @property
    def balancedness_before(self) -> float:
        """Balancedness of the window's load under the placement before."""
        return balancedness(self._tokens_before)

    @property
    def balancedness_after(self) -> float:
        """Balancedness of the window's load under the placement after."""
        return balancedness(self._tokens_after)

    @cached_property
    def _moves(self) -> list[LayerMoves]:
        return plan_relocation(self.before, self.after)

    @property
    def _tokens_before(self) -> np.ndarray:
        return level_tokens(self.load, self.before.by_rank)

    @property
    def _tokens_after(self) -> np.ndarray:
        return level_tokens(self.load, self.after.by_rank)


@dataclass(frozen=True)
class RearrangementResult(PlacementChange):
    """Result of a rearrangement. ``before == after`` if no change was worth its cost.

    Of a balancer with several models it is a :class:`RearrangementOfModels`.

    Attributes:
        num_bytes: Bytes of weights and optimizer state that crossed ranks, over all ranks.
        seconds: Time that training waited on this rank. Transfers that overlapped training are not counted.
        plan_seconds: Part of ``seconds`` until all ranks knew the plan. With ``use_async`` it is time of the host
            only, while the device computes a backward pass.
        exchange_seconds: Part of ``seconds`` in which plans were compared, rows sent or waited for, and maps switched.
    """

    num_bytes: int = 0
    seconds: float = 0.0
    plan_seconds: float = 0.0
    exchange_seconds: float = 0.0

    @property
    def models(self) -> Mapping[str, PlacementChange]:
        """Change of each model's placement, by the model's name."""
        return {self.name: self}


@dataclass(frozen=True)
class RearrangementOfModels(RearrangementResult):
    """Result of a rearrangement of several models: sums over them, and the change of each in :attr:`models`.

    Attributes:
        changes: Change of each model's placement.
    """

    before: ExpertPlacement = field(init=False, repr=False, compare=False)
    after: ExpertPlacement = field(init=False, repr=False, compare=False)
    load: np.ndarray = field(init=False, repr=False, compare=False)
    changes: tuple[PlacementChange, ...] = field(kw_only=True)

    def __getattr__(self, name: str) -> Any:
        if name in ("before", "after", "load"):
            raise _separate(name, self.models)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def models(self) -> Mapping[str, PlacementChange]:
        """Change of each model's placement, by the model's name."""
        return {change.name: change for change in self.changes}

    @property
    def has_changed(self) -> bool:
        """``True`` if a placement changed."""
        return any(change.has_changed for change in self.changes)

    @property
    def num_copies(self) -> int:
        """Redundant slots whose expert changed or was removed."""
        return sum(change.num_copies for change in self.changes)

    @cached_property
    def _moves(self) -> list[LayerMoves]:
        return plan_relocations([each.before for each in self.changes], [each.after for each in self.changes])

    @property
    def _tokens_before(self) -> np.ndarray:
        return np.concatenate([level_tokens(each.load, each.before.by_rank) for each in self.changes])

    @property
    def _tokens_after(self) -> np.ndarray:
        return np.concatenate([level_tokens(each.load, each.after.by_rank) for each in self.changes])


@dataclass(frozen=True)
class StepStats:
    """Load of one optimizer step and its distribution over the ranks. Tokens are summed over layers.

    If one rank holds all experts, each expert counts as a rank of its own. Of a balancer with several models it is a
    :class:`StepStatsOfModels`.

    Attributes:
        load: Tokens of each logical expert over all ranks, ``[Y, L]`` int64.
        avg_tokens_by_layer: Mean over ranks, ``[Y]`` float64.
        max_tokens_by_layer: Tokens of the most loaded rank of each forward, ``[Y]`` int64.
        num_copies: Redundant slots that held an expert, summed over forward passes.
        copy_bytes: Bytes of their weights and gradients over all ranks, without those of recomputation.
        plan_seconds: Time in which this rank's host chose redundant experts and split tokens among replicas.
        rearrangement: Result of the rearrangement that ended with this step, if there was one.
        direct_layers: Layers whose latest batch on this rank was dispatched directly, in parts of all layers.
        name: Name of the model in ``ExpertLoadBalancer.models``.
        whole: Statistics of frozen models that every rank keeps whole. Not part of any sum.
    """

    load: Tensor
    avg_tokens_by_layer: Tensor
    max_tokens_by_layer: Tensor
    num_copies: int = 0
    copy_bytes: int = 0
    plan_seconds: float = 0.0
    rearrangement: RearrangementResult | None = None
    direct_layers: float = 0.0
    name: str = field(default="model", kw_only=True)
    whole: tuple["StepStats", ...] = field(default=(), kw_only=True)

    @property
    def placed(self) -> tuple["StepStats", ...]:
        """Statistics of each model whose experts are distributed."""
        return (self,)

    @property
    def models(self) -> Mapping[str, "StepStats"]:
        """Statistics of each model, by the model's name. A model that rested has no tokens in them."""
        return {each.name: each for each in (*self.placed, *self.whole)}

    @property
    def has_tokens(self) -> bool:
        """``True`` if an expert got a token."""
        return bool(self.load.any())

    @property
    def avg_tokens(self) -> float:
        """Mean over ranks."""
        return float(self.avg_tokens_by_layer.sum())

    @property
    def max_tokens(self) -> float:
        """Tokens of the most loaded rank, looked up in each layer and forward."""
        return float(self.max_tokens_by_layer.sum())

    @property
    def balancedness(self) -> float:
        """``avg_tokens / max_tokens``; 1 without tokens."""
        return self.avg_tokens / self.max_tokens if self.max_tokens else 1.0

    def balancedness_by_group(self, most: int = 4) -> dict[tuple[int, int], float]:
        """Return the balancedness of groups of successive layers, by first and last layer of each.

        Args:
            most: Maximum number of groups.
        """
        num_layers = len(self.max_tokens_by_layer)
        size = -(-num_layers // most)
        bounds = [(first, min(first + size, num_layers) - 1) for first in range(0, num_layers, size)]
        sums = {
            (a, b): (self.avg_tokens_by_layer[a : b + 1].sum(), self.max_tokens_by_layer[a : b + 1].sum())
            for a, b in bounds
        }
        return {group: float(avg / most_tokens) if most_tokens else 1.0 for group, (avg, most_tokens) in sums.items()}


@dataclass(frozen=True)
class StepStatsOfModels(StepStats):
    """Load of one optimizer step in several models: sums over them, and the statistics of each in :attr:`models`.

    Layers are those of the first model, then those of the next. ``load`` is that of each model only, since models may
    have different numbers of experts.

    Attributes:
        parts: Statistics of each model.
    """

    load: Tensor = field(init=False, repr=False, compare=False)
    parts: tuple[StepStats, ...] = field(kw_only=True)

    def __getattr__(self, name: str) -> Any:
        if name == "load":
            raise _separate(name, self.models)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @classmethod
    def of(cls, parts: Sequence[StepStats]) -> "StepStatsOfModels":
        """Return the sums over models."""
        num_layers = sum(len(part.load) for part in parts)
        return cls(
            torch.cat([part.avg_tokens_by_layer for part in parts]),
            torch.cat([part.max_tokens_by_layer for part in parts]),
            sum(part.num_copies for part in parts),
            sum(part.copy_bytes for part in parts),
            sum(part.plan_seconds for part in parts),
            direct_layers=sum(part.direct_layers * len(part.load) for part in parts) / num_layers,
            parts=tuple(parts),
        )

    @property
    def placed(self) -> tuple[StepStats, ...]:
        """Statistics of each model whose experts are distributed."""
        return self.parts

    @property
    def has_tokens(self) -> bool:
        """``True`` if an expert of a model got a token."""
        return any(part.has_tokens for part in self.parts)


def _separate(name: str, models: Mapping[str, object]) -> AttributeError:
    """Return the error for an attribute that each model has and all together have not."""
    return AttributeError(f"{name} of the models {list(models)} is separate: use models[{next(iter(models))!r}].{name}")


class RunTotals:
    """Totals of the steps and rearrangements of a run. Base class of ``ExpertLoadBalancer``."""

    num_steps: int = 0
    """Optimizer steps in which experts got tokens."""
    last_step: StepStats | None = None
    """Statistics of the latest optimizer step in which experts got tokens."""
    num_rearrangements: int = 0
    """Rearrangements that changed the placement."""
    rearranged_rows: int = 0
    """Primaries that changed ranks in all rearrangements, in one EP group."""
    rearranged_bytes: int = 0
    """Bytes that crossed ranks in all rearrangements, over all ranks."""
    rearrange_seconds: float = 0.0
    """Time that training waited for all rearrangements on this rank, including those that changed nothing."""
    last_rearrangement: RearrangementResult | None = None
    """The latest rearrangement that changed the placement."""
    predicted_balancedness: float | None = None
    """Balancedness that the latest rearrangement should bring; ``None`` before the first."""

    def _add(self, result: RearrangementResult) -> None:
        """Add the result of a rearrangement."""
        self.predicted_balancedness = result.predicted_balancedness
        self.rearrange_seconds += result.seconds
        if result.has_changed:
            self.num_rearrangements += 1
            self.rearranged_rows += result.num_rows
            self.rearranged_bytes += result.num_bytes
            self.last_rearrangement = result


def collect_step_stats(models: Sequence[PlacedLayers], groups: ExpertGroups) -> StepStats:
    """Collect and reset the statistics of all layers. All ranks of the default group must call it.

    Args:
        models: Layers of the models, in the same order on all ranks.
        groups: Process groups of the layers that are distributed.
    """
    taken = [[each.layer.take_load() for each in model.modules] for model in models]
    counts = [torch.tensor([[part.max_tokens, part.num_copies, part.copy_bytes] for part in parts]) for parts in taken]
    loads = [torch.stack([part.load for part in parts]).cpu() for parts in taken]  # waits for the device once a model
    tables = [torch.cat(both, dim=1) for both in zip(loads, counts, strict=True)]
    if groups.world_size > 1 and any(model.groups.num_ep_groups > 1 for model in models):
        # Each rank of an EP group has that group's counts: one rank's are enough.
        mine = [table * (model.groups.rank == 0) for model, table in zip(models, tables, strict=True)]
        summed = torch.cat([table.flatten() for table in mine])
        dist.all_reduce(summed, group=groups.cpu_group)
        parts = summed.split([table.numel() for table in tables])
        tables = [part.view_as(table) for part, table in zip(parts, tables, strict=True)]
    stats = [_stats_of(*each) for each in zip(models, taken, tables, strict=True)]
    placed = [each for each, model in zip(stats, models, strict=True) if not model.modules[0].layer.is_whole]
    whole = tuple(each for each, model in zip(stats, models, strict=True) if model.modules[0].layer.is_whole)
    if len(placed) == 1:
        return replace(placed[0], whole=whole)
    return replace(StepStatsOfModels.of(placed), whole=whole)


def _stats_of(model: PlacedLayers, taken: Sequence[LayerLoad], table_YC: Tensor) -> StepStats:
    """Return the statistics of a model.

    Args:
        model: Layers of the model.
        taken: Loads of its layers on this rank.
        table_YC: Sums over EP groups: tokens of each expert, then tokens of the fullest rank, filled redundant slots
            and their bytes, ``[Y, L + 3]``.
    """
    load_YL, (max_Y, redundant_Y, bytes_Y) = table_YC[:, :-3].contiguous(), table_YC[:, -3:].T
    if model.groups.size == 1:
        max_Y = load_YL.max(dim=1).values
    avg_Y = load_YL.sum(dim=1) / (model.groups.size if model.groups.size > 1 else load_YL.shape[1])
    return StepStats(
        load_YL,
        avg_Y.double(),
        max_Y.clone(),
        int(redundant_Y.sum()),
        int(bytes_Y.sum()),
        sum(part.plan_seconds for part in taken),
        direct_layers=sum(each.layer.dispatcher.is_direct for each in model.modules) / len(model.modules),
        name=model.name,
    )
