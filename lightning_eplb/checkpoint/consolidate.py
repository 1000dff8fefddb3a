"""Consolidate a distributed checkpoint, a folder with a file from each rank, into the form of a DDP run's file."""

import os
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from typing_extensions import override

from lightning_eplb.checkpoint.incomplete import incomplete_path, publish

INDEX, REST = ".metadata", "meta.pt"
"""Files of Lightning's distributed checkpoint beside its shards: PyTorch's index, and everything but tensors."""
WEIGHTS, WEIGHTS_FSDP1 = "state_dict", "model"
"""Lightning's keys of the model's state: of ``ModelParallelStrategy``, and of ``FSDPStrategy``."""
WRITE = "lightning_eplb_write"
"""Key in :data:`REST` for the write that it belongs to: ``save_id`` in the index and in names of shards."""


def is_distributed_checkpoint(path: Any) -> bool:
    """Return ``True`` for a folder to which each rank of a Lightning run wrote its shards."""
    return (Path(path) / INDEX).is_file() and bool(rest_files(Path(path)))


def rest_files(folder: Path) -> list[Path]:
    """Return the files with everything but tensors: one, or several if a write was interrupted."""
    return [file for file in (folder / REST, *sorted(folder.glob(f"*.{REST}"))) if file.is_file()]


def has_shards(path: Any) -> bool:
    """Return ``True`` for a folder with at least a part of a distributed checkpoint."""
    folder = Path(path)
    return any((folder / name).is_file() for name in (INDEX, REST)) or any(folder.glob("*.distcp"))


def check_complete(folder: Path) -> None:
    """Raise ``ValueError`` for a folder that is not a complete distributed checkpoint. Performs no communication."""
    if not is_distributed_checkpoint(folder):
        missing = REST if (folder / INDEX).is_file() else INDEX
        raise ValueError(
            f"{folder} is not a complete checkpoint: it has no {missing}. It was written or removed in part."
            " Resume from another one."
        )


def is_inside(name: str) -> bool:
    """Return ``True`` if a file name, relative to a folder, stays inside it on every system."""
    path = PureWindowsPath(name)  # knows both kinds of slashes
    return not path.anchor and ".." not in path.parts


def write_of(index: Any) -> str | None:
    """Return the id of the write that made an index and its shards; ``None`` for a write with fixed file names."""
    save_id = getattr(index.storage_meta, "save_id", None)
    names = {info.relative_path for info in index.storage_data.values()}
    return save_id if save_id and all(name.startswith(save_id) for name in names) else None


def read_rest(folder: Path, index: Any, weights_only: bool | None = None) -> dict[str, Any]:
    """Return everything but tensors from the write that made the index.

    Args:
        folder: Distributed checkpoint.
        index: Index of this folder.
        weights_only: As in ``torch.load``.

    Raises:
        ValueError: No file belongs to that write.
    """
    write = write_of(index)
    for file in rest_files(folder):
        rest = torch.load(file, map_location="cpu", weights_only=weights_only)
        if not isinstance(rest, dict):
            raise ValueError(f"{file} is not a part of a Lightning checkpoint: it holds a {type(rest).__name__}.")
        if rest.pop(WRITE, None) == write:
            return rest
    raise ValueError(
        f"{folder} is a mixture of two checkpoints: {REST} is not of the write that made its {INDEX}. Resume from"
        " another one."
    )


def weights_key(index: Any) -> str:
    """Return the key of the model's state in a distributed checkpoint with this index, PyTorch's ``Metadata``."""
    parts = {path[0] for path in (index.planner_data or {}).values()}
    return WEIGHTS_FSDP1 if WEIGHTS_FSDP1 in parts else WEIGHTS


def read_distributed_checkpoint(folder: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Read a whole checkpoint to the CPU, in the form of ``Trainer.save_checkpoint`` under DDP. No communication.

    Args:
        folder: Checkpoint of a run with ``ExpertParallelStrategy(save_distributed_checkpoint=True)`` or with
            ``FSDPStrategy(state_dict_type="sharded")``.
        weights_only: As in ``torch.load``, for everything but tensors.

    Returns:
        Checkpoint with ``state_dict`` and, unless only weights were saved, ``optimizer_states``, in which parameters
        are numbered as in ``torch.optim``.

    Raises:
        ValueError: The folder is incomplete, damaged, a mixture of two writes, or holds more than data.
    """
    # Imported late: these modules are slow to import, and few processes need them.
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from lightning_eplb.checkpoint.dcp_reader import DistributedReader, load_data

    check_complete(Path(folder))
    reader = DistributedReader(folder)
    index = reader.read_metadata()
    checkpoint = read_rest(Path(folder), index, weights_only)
    flat: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in index.state_dict_metadata.items()
    }
    load_data(flat, reader, weights_only, no_dist=True)
    nested: dict[str, Any] = {}
    for key, path in (index.planner_data or {}).items():
        _put(nested, path, flat[key])
    if weights_key(index) not in nested:
        raise ValueError(f"{folder} holds no weights of a model: {weights_key(index)!r} is not in its {INDEX}.")
    checkpoint["state_dict"] = nested[weights_key(index)]
    names = sorted((key for key in nested if key.startswith("optimizer_")), key=lambda key: int(key.split("_")[1]))
    if names:
        checkpoint["optimizer_states"] = [_counted(nested[name]) for name in names]
    return checkpoint


def _put(nested: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    *parents, last = path
    for part in parents:
        nested = nested.setdefault(part, {})
    nested[last] = value


def _counted(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with numbers for names, counted through all groups."""
    groups = state["param_groups"]
    if isinstance(groups, dict):  # a list of dictionaries, taken apart
        groups = [groups[i] for i in range(len(groups))]
    number: dict[str, int] = {}
    for group in groups:
        for name in group["params"]:
            number[name] = len(number)
    return {
        "state": {number[name]: values for name, values in state.get("state", {}).items()},
        "param_groups": [{**group, "params": [number[name] for name in group["params"]]} for group in groups],
    }


class DistributedCheckpointIO(CheckpointIO):
    """Plugin for strategies that save files: reads distributed checkpoints, too, and replaces a file in one step.

    Wraps the strategy's own plugin. Lightning's writes to the system's temporary folder first. If that is on another
    disk, it copies the file to its name, and a process that dies meanwhile leaves a part of it in place of both.
    """

    def __init__(self, plugin: CheckpointIO) -> None:
        self.plugin = plugin

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file = Path(path)
        if type(self.plugin) is not TorchCheckpointIO or "://" in str(path):
            self.plugin.save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        if file.is_dir() and not has_shards(file):
            raise IsADirectoryError(f"filepath={str(path)!r} is a folder, and no checkpoint. Use another name.")
        written = incomplete_path(file)
        self.plugin.save_checkpoint(checkpoint, written, storage_options=storage_options)
        with written.open("rb") as stream:
            os.fsync(stream.fileno())
        publish(file)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if has_shards(path):
            return read_distributed_checkpoint(path, weights_only)
        arguments: dict[str, Any] = {"weights_only": weights_only}
        if map_location is not None:
            arguments["map_location"] = map_location
        return self.plugin.load_checkpoint(path, **arguments)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        self.plugin.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        self.plugin.teardown()
