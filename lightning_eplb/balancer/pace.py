"""What computing, moves and steps take on these ranks: measured in the first step, asked for with each decision."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_eplb.balancer.speed import Speed, measure_speed
from lightning_eplb.parallel.experts import ExpertLayer
from lightning_eplb.policies import Costs
from lightning_eplb.relocation.async_transfer import MAX_BYTES_IN_FLIGHT
from lightning_eplb.relocation.mover import ExpertMover


class Pace:
    """Turns what was measured into what decisions are told. All ranks use it alike.

    Args:
        modules: The converted modules, in the order of layers, each with what it knows.
        mover: Knows what moves with a primary.
    """

    def __init__(self, modules: Sequence[tuple[ExpertLayer, nn.Module]], mover: ExpertMover) -> None:
        self._modules, self._mover, self._groups = modules, mover, mover.groups
        self.speed: Speed | None = None
        """``None`` until it is measured."""
        self._left_at: float | None = None
        self._seconds_between_steps: float | None = None

    def measure(self) -> None:
        """All ranks of the default group must call it, once a forward and a backward pass have been."""
        _, first_module = self._modules[0]
        self.speed = measure_speed(first_module, self._groups)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """What is done in here is no part of a step."""
        if self._left_at is not None:
            self._seconds_between_steps = time.perf_counter() - self._left_at
        try:
            yield
        finally:
            self._left_at = time.perf_counter()

    def costs(self, with_gradients: bool) -> Costs | None:
        """What moves and copies cost; ``None`` before anything is measured.

        Args:
            with_gradients: Gradients move, too.
        """
        if self.speed is None:
            return None
        row_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in self._mover.tensors(0, with_gradients))
        _, first_module = self._modules[0]
        weights = [math.prod(p.shape[1:]) * p.element_size() for p in first_module.parameters(recurse=False)]
        return self.speed.costs(row_bytes, sum(weights), self._groups.node_of_rank)

    def tokens_worth_a_copy(self) -> int:
        """As many as take as long to compute as a copy's weights and its gradient to travel; 1 before it is known."""
        costs = self.costs(with_gradients=False)
        return 1 if costs is None else max(1, math.ceil(costs.copy / costs.token))

    def bytes_behind_a_step(self) -> int:
        """As many as travel in half the time between two steps, if the staging buffers hold them."""
        if self.speed is None or self._seconds_between_steps is None:
            return MAX_BYTES_IN_FLIGHT
        per_second = self.speed.bytes_per_second(self._groups.node_of_rank)
        return max(1, min(int(self._seconds_between_steps / 2 * per_second), MAX_BYTES_IN_FLIGHT))
