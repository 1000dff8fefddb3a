"""Collects what the layers served in an optimizer step, over all EP groups."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from lightning_eplb.balancer.steps import StepLoad
from lightning_eplb.parallel.experts import ExpertLayer
from lightning_eplb.parallel.groups import ExpertGroups


def take_load(layers: Sequence[ExpertLayer], groups: ExpertGroups) -> StepLoad:
    """What all layers served since it was last taken. All ranks of the default group must call it."""
    taken = [layer.take_load() for layer in layers]
    counts = torch.tensor([[part.max_tokens, part.num_copies, part.copy_bytes] for part in taken])
    loads = torch.stack([part.load for part in taken]).cpu()  # where it waits for the device, it waits once
    summed = torch.cat([loads, counts], dim=1)
    if groups.num_ep_groups > 1:
        dist.all_reduce(summed, group=groups.cpu_group)
        summed //= groups.size  # each rank of an EP group gave that group's counts
    load_YL, (max_Y, copies_Y, bytes_Y) = summed[:, :-3].contiguous(), summed[:, -3:].T
    if groups.size == 1:
        max_Y = load_YL.max(dim=1).values
    avg_Y = load_YL.sum(dim=1) / (groups.size if groups.size > 1 else load_YL.shape[1])
    seconds = sum(part.plan_seconds for part in taken)
    return StepLoad(load_YL, avg_Y.double(), max_Y.clone(), int(copies_Y.sum()), int(bytes_Y.sum()), seconds)
