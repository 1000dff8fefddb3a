"""Cost model: seconds that a token, a row and a redundant expert take on these ranks, measured in the first step."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eplb.balancer.step_stats import StepStats
from lightning_eplb.parallel.dtensor import local_shard
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.packing import bytes_of_row
from lightning_eplb.policies import Costs
from lightning_eplb.relocation.async_transfer import MAX_BYTES_IN_FLIGHT
from lightning_eplb.relocation.mover import ExpertMover
from lightning_eplb.relocation.placed_layers import PlacedLayers

REPEATS = 3
"""Timed runs of each measurement; the fastest counts."""
PROBE_BYTES = 4 << 20
"""Bytes that each rank sends in a timed exchange."""
PROBE_TOKENS = 512
"""Rows of the timed matrix product."""


@dataclass(frozen=True)
class HardwareProfile:
    """Measured speed of compute and exchange, rounded to powers of two: like machines then make the same decisions.

    Attributes:
        seconds_per_token: Time to compute one token on one expert, forward and backward.
        bytes_per_second_within_node: Bandwidth from one rank to another of its node while all ranks send.
        bytes_per_second_between_nodes: Bandwidth from one rank to a rank of another node while all ranks send.
    """

    seconds_per_token: float
    bytes_per_second_within_node: float
    bytes_per_second_between_nodes: float

    def bytes_per_second(self, node_of_rank: Sequence[int]) -> float:
        """Return the bandwidth of an exchange among all ranks: that between nodes if there are several nodes."""
        return self.bytes_per_second_between_nodes if len(set(node_of_rank)) > 1 else self.bytes_per_second_within_node

    def costs(self, row_bytes: int, weight_bytes: int, node_of_rank: Sequence[int]) -> Costs:
        """Return the costs in seconds, as a policy takes them.

        Args:
            row_bytes: Bytes of one primary with everything that moves with it.
            weight_bytes: Bytes of its weights alone.
            node_of_rank: Node of each EP rank.
        """
        return Costs(
            token=self.seconds_per_token,
            row_within_node=row_bytes / self.bytes_per_second_within_node,
            row_between_nodes=row_bytes / self.bytes_per_second_between_nodes,
            copy=2 * weight_bytes / self.bytes_per_second(node_of_rank),
        )


class CostModel:
    """Derives costs and limits for plans from the hardware profile. All ranks use it alike.

    Args:
        models: Layers of the models whose experts are distributed. Those of one model are alike: the first stands for
            all.
        mover: Relocation of the experts; tells which tensors move with a primary.
    """

    def __init__(self, models: Sequence[PlacedLayers], mover: ExpertMover) -> None:
        self._models, self._mover, self._groups = models, mover, mover.groups
        self.profiles: list[HardwareProfile] = []
        """Profile of each model. Empty until :meth:`measure` was called."""
        self._step_start: float | None = None
        self._step_seconds: float | None = None

    def measure(self) -> None:
        """Measure the hardware profile. All ranks of the default group must call it, after a forward and backward."""
        self.profiles = [profile_hardware(model.modules[0].module, self._groups) for model in self._models]

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Exclude the time spent in this context from the measured duration of a step."""
        if self._step_start is not None:
            self._step_seconds = time.perf_counter() - self._step_start
        try:
            yield
        finally:
            self._step_start = time.perf_counter()

    def costs(self, with_gradients: bool) -> list[Costs | None]:
        """Return the costs of moves and redundant experts of each model, ``None`` before anything is measured.

        Args:
            with_gradients: Gradients move with their experts.
        """
        if not self.profiles:
            return [None] * len(self._models)
        costs, first = [], 0
        for model, profile in zip(self._models, self.profiles, strict=True):
            row_bytes = bytes_of_row(self._mover.tensors(first, with_gradients))
            weight_bytes = bytes_of_row(model.modules[0].module.parameters(recurse=False))
            costs.append(profile.costs(row_bytes, weight_bytes, self._groups.node_of_rank))
            first += len(model.modules)
        return costs

    def min_tokens_per_copy(self) -> list[int]:
        """Return the tokens of each model whose compute time equals a redundant expert's transfer time.

        1 before it is measured.
        """
        return [
            1 if costs is None else max(1, math.ceil(costs.copy / costs.token))
            for costs in self.costs(with_gradients=False)
        ]

    def overlap_bytes(self) -> int:
        """Return the bytes that transfer in half a step's time, as far as the staging buffers hold them."""
        if not self.profiles or self._step_seconds is None:
            return MAX_BYTES_IN_FLIGHT
        per_second = self.profiles[0].bytes_per_second(self._groups.node_of_rank)
        return max(1, min(int(self._step_seconds / 2 * per_second), MAX_BYTES_IN_FLIGHT))

    def seconds_saved(self, stats: StepStats) -> float | None:
        """Estimate how much less time the experts took in a step than under plain expert parallelism.

        Plain means the initial placement without redundant experts. The estimate is the difference in tokens of the
        most loaded ranks times ``seconds_per_token``. It is too low with gradient accumulation or several EP groups,
        since the plain load is summed over these.

        Args:
            stats: Statistics of a step, with the same models.

        Returns:
            Seconds, negative if plain is faster; ``None`` if one rank holds all experts, or before the first step.
        """
        if not self.profiles:
            return None
        saved = 0.0
        for part, profile in zip(stats.placed, self.profiles, strict=True):
            plain_YR = part.load.view(len(part.load), self._groups.size, -1).sum(dim=2)
            fewer = float(plain_YR.max(dim=1).values.sum()) - part.max_tokens
            saved += fewer / self._groups.num_ep_groups * profile.seconds_per_token
        return saved


def profile_hardware(experts: nn.Module, groups: ExpertGroups) -> HardwareProfile:
    """Time a product with an expert's weights and exchanges of 4 MiB. All ranks of the default group must call it.

    Args:
        experts: Converted module; dimension 0 of its parameters is this rank's primaries.
        groups: Process groups of the module.

    Returns:
        The slowest rank's profile, the same on all ranks.
    """
    per_expert = sum(math.prod(parameter.shape[1:]) for parameter in experts.parameters(recurse=False))
    parameters = [local_shard(parameter).detach() for parameter in experts.parameters(recurse=False)]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 3]
    widest = max(matrices, key=lambda parameter: parameter[0].numel())
    weight = widest[0].reshape(widest.shape[1], -1)
    tokens = torch.zeros(PROBE_TOKENS, weight.shape[0], dtype=weight.dtype, device=weight.device)
    # A token takes two operations for each parameter forward and four backward; the product takes two for each.
    product = _seconds(lambda: tokens @ weight, weight.device) / (2 * PROBE_TOKENS * weight.numel())
    durations = [6 * per_expert * product]
    for partner in _partners(groups):
        seconds = _exchange_seconds(partner, weight.device, groups)
        durations.append(seconds / PROBE_BYTES)
    slowest = torch.tensor(durations, dtype=torch.float64)
    if groups.cpu_group is not None:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=groups.cpu_group)
    token, within, between = (2.0 ** round(math.log2(max(value, 1e-15))) for value in slowest.tolist())
    return HardwareProfile(token, 1 / within, 1 / between)


def _partners(groups: ExpertGroups) -> tuple[int, int]:
    """Return the ranks to send to within the node and between nodes.

    Each is a shift by a fixed number, so that every rank receives from one rank. Within the node it is the shift that
    crosses nodes for the fewest ranks, between nodes the one that does for the most. Nodes may have any size.
    """
    nodes = groups.node_of_rank
    crossing = [
        sum(nodes[rank] != nodes[(rank + shift) % groups.size] for rank in range(groups.size))
        for shift in range(1, groups.size)
    ]
    shifts = (crossing.index(min(crossing)) + 1, crossing.index(max(crossing)) + 1)
    return (groups.rank + shifts[0]) % groups.size, (groups.rank + shifts[1]) % groups.size


def _exchange_seconds(partner: int, device: torch.device, groups: ExpertGroups) -> float:
    assert groups.ep_group is not None
    size, shift = groups.size, (partner - groups.rank) % groups.size
    sent = torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    send = [PROBE_BYTES if rank == partner else 0 for rank in range(size)]
    receive = [PROBE_BYTES if rank == (groups.rank - shift) % size else 0 for rank in range(size)]
    return _seconds(lambda: _exchange(received, sent, receive, send, groups), device)


def _exchange(received: Tensor, sent: Tensor, receive: list[int], send: list[int], groups: ExpertGroups) -> None:
    dist.all_to_all_single(received, sent, receive, send, group=groups.ep_group)


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    """Return the shortest duration of ``REPEATS`` runs, after one warm-up run."""
    fastest = math.inf
    for _ in range(1 + REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        action()
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
