"""Load a distributed checkpoint into the shards of FSDP1 or FSDP2, whichever of the two has written it."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.optim import Optimizer

from lightning_eplb.consolidate import REST, weights_key


def load_distributed_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizers: Iterable[Optimizer] = (),
    strict: bool = True,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Fill this rank's shards, of which each rank reads its own. Every rank must call it.

    Args:
        folder: Of a run with ``ExpertParallelStrategy(save_distributed_checkpoint=True)``, or with
            ``FSDPStrategy(state_dict_type="sharded")``; the same on all ranks.
        model: Sharded, its optimizers made.
        optimizers: Those to load; gradients are zeroed. One that was not saved is left as it is, and a parameter that
            had no state has none.
        strict: Whether each parameter must be there; those that are not stay as they are.
        weights_only: As in ``torch.load``, for what is no tensor.

    Returns:
        What the checkpoint has beside the state of model and optimizers.
    """
    # Here, as every process that imports the package would load much that few need.
    from torch.distributed.checkpoint import state_dict as sharded
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    model.zero_grad()  # torch makes room for an optimizer's state only where no gradient was left behind
    index = FileSystemReader(folder).read_metadata()
    saved: set[tuple] = {path[:3] for path in (index.planner_data or {}).values()}
    with _in_shards(model):
        key = weights_key(index)
        weights: dict[str, Any] = sharded.get_model_state_dict(model)
        if not strict:
            weights = {name: value for name, value in weights.items() if (key, name) in saved}
        load({key: weights}, checkpoint_id=folder)
        sharded.set_model_state_dict(model, weights, options=sharded.StateDictOptions(strict=strict))
        for i, optimizer in enumerate(optimizers):
            key = f"optimizer_{i}"
            if not any(path[0] == key for path in saved):
                continue
            values: dict[str, Any] = dict(sharded.get_optimizer_state_dict(model, optimizer))
            values["state"] = {name: v for name, v in values["state"].items() if (key, "state", name) in saved}
            load({key: values}, checkpoint_id=folder)
            options = sharded.StateDictOptions(strict=False)
            sharded.set_optimizer_state_dict(model, optimizer, values, options=options)
    return torch.load(Path(folder) / REST, map_location="cpu", weights_only=weights_only)


def _in_shards(model: nn.Module) -> AbstractContextManager:
    """While state dicts are to hold shards: FSDP1 must be told, and experts ask it."""
    if not FullyShardedDataParallel.fsdp_modules(model):
        return nullcontext()
    return FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
