"""What an optimizer step brought, and what a decision between two steps changed."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lightning_eplb.functional import balancedness
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies.split import level_tokens


@dataclass(frozen=True)
class StepLoad:
    """One optimizer step's load, as the ranks served it. Tokens are summed over layers.

    Where one rank holds all experts, each expert counts as if it were alone on a rank.

    Attributes:
        load: Tokens of each logical expert over all ranks, ``[Y, L]`` int64.
        avg_tokens_by_layer: Mean over ranks, ``[Y]`` float64.
        max_tokens_by_layer: The fullest rank of each layer in each forward, ``[Y]`` int64.
        num_copies: Redundant slots that held an expert, in each forward.
        copy_bytes: Their weights out and gradients home, over all ranks; not those that recomputation sends again.
        plan_seconds: What this rank's host took to choose copies and to divide the tokens among them.
        rearrangement: What was decided after it, if that was due.
    """

    load: Tensor
    avg_tokens_by_layer: Tensor
    max_tokens_by_layer: Tensor
    num_copies: int = 0
    copy_bytes: int = 0
    plan_seconds: float = 0.0
    rearrangement: "Rearrangement | None" = None

    @property
    def avg_tokens(self) -> float:
        """Mean over ranks."""
        return float(self.avg_tokens_by_layer.sum())

    @property
    def max_tokens(self) -> float:
        """The fullest rank of each layer in each forward."""
        return float(self.max_tokens_by_layer.sum())

    @property
    def balancedness(self) -> float:
        """``avg_tokens / max_tokens``."""
        return self.avg_tokens / self.max_tokens

    def balancedness_by_group(self, most: int = 4) -> dict[tuple[int, int], float]:
        """Of groups of successive layers, by the first and the last of each; ``most`` groups at most."""
        size = -(-len(self.load) // most)
        bounds = [(first, min(first + size, len(self.load)) - 1) for first in range(0, len(self.load), size)]
        sums = {
            (a, b): (self.avg_tokens_by_layer[a : b + 1].sum(), self.max_tokens_by_layer[a : b + 1].sum())
            for a, b in bounds
        }
        return {group: float(avg / most_tokens) if most_tokens else 1.0 for group, (avg, most_tokens) in sums.items()}


@dataclass(frozen=True)
class Rearrangement:
    """What was decided between two steps, and done. Where ``before == after``, nothing was worth a change.

    Attributes:
        before: The placement that it found.
        after: The placement that it left.
        load: The window that it was decided on, ``[Y, L]`` int64.
        num_layers: Layers in which a primary changed its place.
        num_rows: Primaries that changed ranks, in one EP group.
        num_copies: Redundant slots that hold another expert than before, or none any more.
        num_bytes: Weights and optimizer state that crossed ranks, over all ranks.
        seconds: What training waited for it, on this rank: all of it, or what was not behind the steps that followed.
        plan_seconds: What of these went by until all ranks knew the decision; behind steps it is the host's time,
            while the device has a backward pass to do.
        exchange_seconds: What of these went by while rows were compared, sent or waited for, and maps switched.
        predicted_balancedness: What the steps that follow should have, as the load was forecast; ``None`` where
            nothing was.
    """

    before: ExpertPlacement
    after: ExpertPlacement
    load: np.ndarray
    num_layers: int
    num_rows: int
    num_copies: int
    num_bytes: int = 0
    seconds: float = 0.0
    plan_seconds: float = 0.0
    exchange_seconds: float = 0.0
    predicted_balancedness: float | None = None

    @property
    def balancedness_before(self) -> float:
        """Of the window, had the old placement served it at once."""
        return balancedness(level_tokens(self.load, self.before.by_rank))

    @property
    def balancedness_after(self) -> float:
        """Of the window, had the new placement served it at once."""
        return balancedness(level_tokens(self.load, self.after.by_rank))
