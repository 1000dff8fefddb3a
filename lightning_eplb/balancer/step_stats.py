"""Step statistics: result types of optimizer steps and rearrangements, and their collection over all EP groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_eplb.functional import balancedness
from lightning_eplb.parallel.expert_layer import ExpertLayer
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies.token_split import level_tokens
from lightning_eplb.relocation.plan import LayerMoves, plan_relocation


@dataclass(frozen=True)
class RearrangementResult:
    """Result of a rearrangement. ``before == after`` if no change was worth its cost.

    Attributes:
        before: Placement at the decision.
        after: Placement that was reached.
        load: Load of the window that the decision was based on, ``[Y, L]`` int64.
        num_bytes: Bytes of weights and optimizer state that crossed ranks, over all ranks.
        seconds: Time that training waited on this rank. Transfers that overlapped training are not counted.
        plan_seconds: Part of ``seconds`` until all ranks knew the plan. With ``use_async`` it is time of the host
            only, while the device computes a backward pass.
        exchange_seconds: Part of ``seconds`` in which plans were compared, rows sent or waited for, and maps switched.
        predicted_balancedness: Balancedness of the steps that follow, according to the forecast; ``None`` without one.
    """

    before: ExpertPlacement
    after: ExpertPlacement
    load: np.ndarray
    num_bytes: int = 0
    seconds: float = 0.0
    plan_seconds: float = 0.0
    exchange_seconds: float = 0.0
    predicted_balancedness: float | None = None

    @property
    def num_layers(self) -> int:
        """Layers in which a primary changed its slot."""
        return len(self._moves)

    @property
    def num_rows(self) -> int:
        """Primaries that changed ranks, in one EP group."""
        return sum(moves.num_experts_between_ranks for moves in self._moves)

    @property
    def num_copies(self) -> int:
        """Redundant slots whose expert changed or was removed."""
        n = self.before.primaries_per_rank
        return int((self.before.by_rank[:, :, n:] != self.after.by_rank[:, :, n:]).sum())

    @property
    def balancedness_before(self) -> float:
        """Balancedness of the window's load under the placement before."""
        return balancedness(level_tokens(self.load, self.before.by_rank))

    @property
    def balancedness_after(self) -> float:
        """Balancedness of the window's load under the placement after."""
        return balancedness(level_tokens(self.load, self.after.by_rank))

    @cached_property
    def _moves(self) -> list[LayerMoves]:
        return plan_relocation(self.before, self.after)


@dataclass(frozen=True)
class StepStats:
    """Load of one optimizer step and its distribution over the ranks. Tokens are summed over layers.

    If one rank holds all experts, each expert counts as a rank of its own.

    Attributes:
        load: Tokens of each logical expert over all ranks, ``[Y, L]`` int64.
        avg_tokens_by_layer: Mean over ranks, ``[Y]`` float64.
        max_tokens_by_layer: Tokens of the most loaded rank of each forward, ``[Y]`` int64.
        num_copies: Redundant slots that held an expert, summed over forward passes.
        copy_bytes: Bytes of their weights and gradients over all ranks, without those of recomputation.
        plan_seconds: Time in which this rank's host chose redundant experts and split tokens among replicas.
        rearrangement: Result of the rearrangement that ended with this step, if there was one.
        direct_layers: Layers whose latest batch on this rank was dispatched directly, in parts of all layers.
    """

    load: Tensor
    avg_tokens_by_layer: Tensor
    max_tokens_by_layer: Tensor
    num_copies: int = 0
    copy_bytes: int = 0
    plan_seconds: float = 0.0
    rearrangement: RearrangementResult | None = None
    direct_layers: float = 0.0

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
        """``avg_tokens / max_tokens``."""
        return self.avg_tokens / self.max_tokens

    def balancedness_by_group(self, most: int = 4) -> dict[tuple[int, int], float]:
        """Return the balancedness of groups of successive layers, by first and last layer of each.

        Args:
            most: Maximum number of groups.
        """
        size = -(-len(self.load) // most)
        bounds = [(first, min(first + size, len(self.load)) - 1) for first in range(0, len(self.load), size)]
        sums = {
            (a, b): (self.avg_tokens_by_layer[a : b + 1].sum(), self.max_tokens_by_layer[a : b + 1].sum())
            for a, b in bounds
        }
        return {group: float(avg / most_tokens) if most_tokens else 1.0 for group, (avg, most_tokens) in sums.items()}


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
        if result.before != result.after:
            self.num_rearrangements += 1
            self.rearranged_rows += result.num_rows
            self.rearranged_bytes += result.num_bytes
            self.last_rearrangement = result


def collect_step_stats(layers: Sequence[ExpertLayer], groups: ExpertGroups) -> StepStats:
    """Collect and reset the statistics of all layers. All ranks of the default group must call it."""
    taken = [layer.take_load() for layer in layers]
    counts = torch.tensor([[part.max_tokens, part.num_copies, part.copy_bytes] for part in taken])
    loads = torch.stack([part.load for part in taken]).cpu()  # one wait for the device, if the loads are on one
    summed = torch.cat([loads, counts], dim=1)
    if groups.num_ep_groups > 1:
        dist.all_reduce(summed, group=groups.cpu_group)
        summed //= groups.size  # each rank of an EP group contributed that group's counts
    load_YL, (max_Y, redundant_Y, bytes_Y) = summed[:, :-3].contiguous(), summed[:, -3:].T
    if groups.size == 1:
        max_Y = load_YL.max(dim=1).values
    avg_Y = load_YL.sum(dim=1) / (groups.size if groups.size > 1 else load_YL.shape[1])
    seconds = sum(part.plan_seconds for part in taken)
    direct = sum(layer.dispatcher.is_direct for layer in layers) / len(layers)
    redundant = int(redundant_Y.sum()), int(bytes_Y.sum())
    return StepStats(load_YL, avg_Y.double(), max_Y.clone(), *redundant, seconds, direct_layers=direct)
