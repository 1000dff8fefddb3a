"""Read folders of ``torch.distributed.checkpoint`` (DCP) as data, without running code from them.

PyTorch's own reader unpickles the index ``.metadata``, and its planner everything but tensors. Import this module where
a folder is read, not at the top of a module: it is slow to import.
"""

import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.futures import Future
from typing_extensions import override

from lightning_eplb import _compat
from lightning_eplb.checkpoint.consolidate import INDEX, is_inside

_PATHS = {
    "PosixPath": PurePosixPath,
    "PurePosixPath": PurePosixPath,
    "WindowsPath": PureWindowsPath,
    "PureWindowsPath": PureWindowsPath,
}
"""Classes of paths in an index, each with one that every system has."""


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler for the few classes of an index. Raises for any other name."""

    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = (module_name, global_name)
        if name in _compat.PICKLED_CLASSES:
            return _maker(partial(object.__new__, super().find_class(*name)))
        if name in _compat.PICKLED_CALLS:
            return _maker(super().find_class(*name))
        if module_name in ("pathlib", "pathlib._local") and global_name in _PATHS:
            return _maker(_PATHS[global_name])
        if module_name == "torch" and isinstance(dtype := getattr(torch, global_name, None), torch.dtype):
            return dtype
        raise _UnknownNameError(f"{module_name}.{global_name}")


class _UnknownNameError(Exception):
    """Name in a pickle that no index needs."""


def _maker(make: Callable[..., Any]) -> type:
    """Return a new class that calls ``make``. A pickle can call it, and attributes that it sets affect nothing else."""
    return type("Maker", (), {"__new__": lambda _, *arguments: make(*arguments)})


def read_index(folder: str | Path) -> Metadata:
    """Read and check the index of a folder: its files are inside the folder and at least as long as it says.

    Raises:
        ValueError: The index is damaged, names anything that an index does not need, or does not fit the files.
    """
    file = Path(folder) / INDEX
    try:
        with file.open("rb") as stream:
            index = _MetadataUnpickler(stream).load()
        ends = _ends_of_files(index)
    except _UnknownNameError as error:
        raise ValueError(
            f"{file} names {error}, which no index of a distributed checkpoint needs. It may run code, and was"
            " not read. Use a checkpoint of known origin."
        ) from None
    except OSError:
        raise
    except Exception as error:  # of bytes that may be anything, so is this
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}). Resume from another checkpoint."
        ) from error
    for name, end in ends.items():
        if not is_inside(name):
            raise ValueError(
                f"{file} names the file {name!r}, which is outside of its folder, and was not read. Use a"
                " checkpoint of known origin."
            )
        shard = Path(folder) / name
        size = shard.stat().st_size if shard.is_file() else 0
        if size < end:
            raise ValueError(
                f"{shard} has {size} of the {end} bytes that {INDEX} names: the checkpoint was copied or removed in"
                " part, or is damaged. Resume from another one."
            )
    return index


def _ends_of_files(index: Any) -> dict[str, int]:
    """Return the least size of each file in bytes. Raises an exception of any type for an invalid index."""
    if not isinstance(index, Metadata):
        raise TypeError(f"it holds a {type(index).__name__}")
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            chunks: list[ChunkStorageMetadata] = entry.chunks
            offsets = [torch.Size(chunk.offsets) for chunk in chunks]
            shapes = [torch.Size(chunk.sizes) for chunk in chunks]
            if sum(map(math.prod, shapes)) != math.prod(torch.Size(entry.size)):
                raise ValueError(f"the chunks of {key} are not the whole tensor")
            if not isinstance(entry.properties.dtype, torch.dtype):
                raise TypeError(f"{key} has no data type")
        elif isinstance(entry, BytesStorageMetadata):
            offsets = [None]
        else:
            raise TypeError(f"{key} is a {type(entry).__name__}")
        missing = [offset for offset in offsets if MetadataIndex(key, offset) not in index.storage_data]
        if missing:
            raise KeyError(key)
    for key, path in (index.planner_data or {}).items():
        if not (isinstance(path, tuple) and path and key in index.state_dict_metadata):
            raise KeyError(key)
    ends: dict[str, int] = {}
    for info in index.storage_data.values():
        if not isinstance(info.relative_path, str) or min(info.offset, info.length) < 0:
            raise ValueError(f"no part of a file: {info}")
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    return ends


def leftovers(folder: Path, index: Metadata) -> list[Path]:
    """Return shards of other writes than that of ``index``: earlier or unfinished ones."""
    names = {info.relative_path for info in index.storage_data.values()}
    return [shard for shard in folder.glob("*.distcp") if shard.name not in names]


class DistributedReader(FileSystemReader):
    """PyTorch's reader with the index from :func:`read_index`, read once, and with errors that explain damage."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._index: Metadata | None = None

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = read_index(Path(self.path))
        if self._index.storage_meta is None:
            self._index.storage_meta = StorageMeta()
        self._index.storage_meta.load_id = self.load_id
        return self._index

    @override
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        try:
            return super().read_data(plan, planner)
        except _RunsCodeError:
            raise
        except Exception as error:  # of bytes that may be anything, so is this
            raise ValueError(
                f"a shard in {self.path} is damaged ({type(error).__name__}). Resume from another checkpoint."
            ) from error


def load_data(
    state: dict[str, Any], reader: DistributedReader, weights_only: bool | None = None, no_dist: bool = False
) -> None:
    """Fill ``state`` as ``torch.distributed.checkpoint.load`` does. Collective, unless ``no_dist``.

    Args:
        state: Tensors and values to fill, by name.
        reader: Reader of the folder.
        weights_only: As in ``torch.load``, for everything but tensors.
        no_dist: Read on this rank alone. Defaults to ``False``.

    Raises:
        ValueError: On all ranks, if the checkpoint does not fit or holds more than data.
        CheckpointException: On all ranks, if one of them could not read it.
    """
    try:
        load(state, storage_reader=reader, planner=_DataPlanner(weights_only), no_dist=no_dist)
    except CheckpointException as exception:
        for error, _ in exception.failures.values():
            if isinstance(error, ValueError):
                raise ValueError(str(error)) from exception
        raise


class _RunsCodeError(ValueError):
    """Value in a shard that is neither a tensor nor plain Python."""


class _DataPlanner(DefaultLoadPlanner):
    """PyTorch's planner, which runs no code from a shard unless ``weights_only`` is ``False``."""

    def __init__(self, weights_only: bool | None) -> None:
        super().__init__()
        self._weights_only = weights_only

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            content = torch.load(value, weights_only=self._weights_only)
        except Exception as error:
            raise _RunsCodeError(
                f"{read_item.dest_index.fqn} in the checkpoint is damaged, or can't be read without running code from"
                " it. If you know its origin, allow its classes with torch.serialization.add_safe_globals()."
            ) from error
        data = io.BytesIO()  # PyTorch's own planner loads it again, without weights_only
        torch.save(content, data)
        data.seek(0)
        super().load_bytes(read_item, data)
