"""Save and load distributed checkpoints of FSDP1 and FSDP2. Each loads the other's, into its own shards."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.optim import Optimizer

from lightning_eplb.checkpoint.consolidate import check_complete, read_rest, weights_key


def load_distributed_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizers: Iterable[Optimizer] = (),
    strict: bool = True,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Load model and optimizers. Each rank reads its own shards. Collective.

    Args:
        folder: Checkpoint of a run with ``ExpertParallelStrategy(save_distributed_checkpoint=True)`` or with
            ``FSDPStrategy(state_dict_type="sharded")``, the same on all ranks.
        model: Sharded model, whose optimizers exist. Its gradients are zeroed.
        optimizers: Optimizers to load. One that was not saved stays as it is; a parameter without saved state gets
            none.
        strict: Raise if a parameter is missing in the checkpoint. Otherwise it stays as it is. Defaults to ``True``.
        weights_only: As in ``torch.load``, for everything but tensors.

    Returns:
        Entries of the checkpoint beside the state of model and optimizers.

    Raises:
        ValueError: The folder is incomplete, damaged, a mixture of two writes, or holds more than data. Nothing was
            loaded.
    """
    # Imported late: these modules are slow to import, and few processes need them.
    from torch.distributed.checkpoint import state_dict as sharded

    from lightning_eplb.checkpoint.dcp_reader import DistributedReader, load_data

    check_complete(Path(folder))
    reader = DistributedReader(folder)
    index = reader.read_metadata()
    rest = read_rest(Path(folder), index, weights_only)
    model.zero_grad()  # torch initializes an optimizer's state only if no gradient is left
    saved: set[tuple] = {path[:3] for path in (index.planner_data or {}).values()}
    with _in_shards(model):
        key = weights_key(index)
        weights: dict[str, Any] = sharded.get_model_state_dict(model)
        if not strict:
            weights = {name: value for name, value in weights.items() if (key, name) in saved}
        load_data({key: weights}, reader, weights_only)
        sharded.set_model_state_dict(model, weights, options=sharded.StateDictOptions(strict=strict))
        for i, optimizer in enumerate(optimizers):
            key = f"optimizer_{i}"
            if not any(path[0] == key for path in saved):
                continue
            values: dict[str, Any] = dict(sharded.get_optimizer_state_dict(model, optimizer))
            values["state"] = {name: v for name, v in values["state"].items() if (key, "state", name) in saved}
            load_data({key: values}, reader, weights_only)
            options = sharded.StateDictOptions(strict=False)
            sharded.set_optimizer_state_dict(model, optimizer, values, options=options)
    return rest


def save_folder(strategy: ParallelStrategy, checkpoint: dict[str, Any], filepath: Any, weights_key: str) -> None:
    """Save a distributed checkpoint, in place of ``strategy.save_checkpoint``. Collective.

    Args:
        strategy: Strategy of the trainer.
        checkpoint: Checkpoint of the ``Trainer``.
        filepath: Folder. A checkpoint in it is replaced in one step, and so is a file of that name. If there is none,
            it appears once it is complete. Rank 0's value counts.
        weights_key: Key of the strategy for the model's state.

    Raises:
        CheckpointException: A rank could not write. The checkpoint before can still be loaded.
    """
    from lightning_eplb.checkpoint.dcp_writer import save_distributed_checkpoint

    path, is_new = strategy.broadcast((str(filepath), not Path(filepath).is_dir()))  # other nodes may see old names
    save_distributed_checkpoint(Path(path), checkpoint, weights_key, strategy.local_rank == 0, is_new)


def _in_shards(model: nn.Module) -> AbstractContextManager:
    """Let FSDP1 make sharded state dicts, for the length of the context."""
    if not FullyShardedDataParallel.fsdp_modules(model):
        return nullcontext()
    return FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
