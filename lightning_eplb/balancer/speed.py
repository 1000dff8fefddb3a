"""How fast experts compute and how fast rows travel here: what a move costs, and what it is worth."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eplb.parallel.dtensor import local_shard
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.policies import Costs

REPEATS = 3
PROBE_BYTES = 4 << 20
PROBE_TOKENS = 512


@dataclass(frozen=True)
class Speed:
    """What was measured, rounded to a power of two so that runs on like machines decide alike.

    Attributes:
        seconds_per_token: To compute one token on one expert, forward and backward.
        bytes_per_second_within_node: From one rank to another of its node while all ranks send.
        bytes_per_second_between_nodes: The same to another node.
    """

    seconds_per_token: float
    bytes_per_second_within_node: float
    bytes_per_second_between_nodes: float

    def bytes_per_second(self, node_of_rank: Sequence[int]) -> float:
        """Where the slowest of the ranks' exchanges is that between nodes, if they are on several."""
        return self.bytes_per_second_between_nodes if len(set(node_of_rank)) > 1 else self.bytes_per_second_within_node

    def costs(self, row_bytes: int, weight_bytes: int, node_of_rank: Sequence[int]) -> Costs:
        """What a policy is told, in seconds.

        Args:
            row_bytes: Of one primary, with all that moves with it.
            weight_bytes: Of its weights alone.
            node_of_rank: The node of each EP rank.
        """
        return Costs(
            token=self.seconds_per_token,
            row_within_node=row_bytes / self.bytes_per_second_within_node,
            row_between_nodes=row_bytes / self.bytes_per_second_between_nodes,
            copy=2 * weight_bytes / self.bytes_per_second(node_of_rank),
        )


def measure_speed(experts: nn.Module, groups: ExpertGroups) -> Speed:
    """Time a product with an expert's weights, and exchanges of 4 MiB. All ranks of the default group must call it.

    Args:
        experts: A converted module: dimension 0 of its parameters is this rank's primaries.
        groups: Of the module.

    Returns:
        The same on all ranks: the slowest rank's.
    """
    per_expert = sum(math.prod(parameter.shape[1:]) for parameter in experts.parameters(recurse=False))
    parameters = [local_shard(parameter).detach() for parameter in experts.parameters(recurse=False)]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 3]
    widest = max(matrices, key=lambda parameter: parameter[0].numel())
    weight = widest[0].reshape(widest.shape[1], -1)
    tokens = torch.zeros(PROBE_TOKENS, weight.shape[0], dtype=weight.dtype, device=weight.device)
    # A token takes two operations for each parameter forward and four backward; the product takes two for each.
    product = _seconds(lambda: tokens @ weight, weight.device) / (2 * PROBE_TOKENS * weight.numel())
    found = [6 * per_expert * product]
    for partner in _partners(groups):
        seconds = _exchange_seconds(partner, weight.device, groups)
        found.append(seconds / PROBE_BYTES)
    slowest = torch.tensor(found, dtype=torch.float64)
    if groups.cpu_group is not None:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=groups.cpu_group)
    token, within, between = (2.0 ** round(math.log2(max(value, 1e-15))) for value in slowest.tolist())
    return Speed(token, 1 / within, 1 / between)


def _partners(groups: ExpertGroups) -> tuple[int, int]:
    """The rank to send to within the node, and on another: shifts by a fixed number, so that each rank gets one.

    The shift that crosses nodes for most ranks serves for the one between nodes, the one that does for fewest for the
    other: nodes may be of any size.
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
    """The fastest of a few times, after one to warm up."""
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
