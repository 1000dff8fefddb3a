"""Replace a distributed checkpoint by another so that one of the two is complete at any time."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from typing_extensions import override

from lightning_eplb.checkpoint.consolidate import REST, WRITE, rest_files
from lightning_eplb.checkpoint.dcp_reader import leftovers, read_index
from lightning_eplb.checkpoint.incomplete import incomplete_path, publish


def save_distributed_checkpoint(
    folder: Path, checkpoint: dict[str, Any], weights_key: str, is_first_on_node: bool, is_new: bool = False
) -> None:
    """Write this rank's shards as Lightning's strategies do, but under names that no other write uses. Collective.

    The index, which names the shards, is replaced last, in one step. If a rank dies, the checkpoint before can still
    be read, by this package and by PyTorch's own reader. If one rank fails, all raise.

    Args:
        folder: Folder to write to, the same on all ranks. It may hold a checkpoint.
        checkpoint: Checkpoint of the ``Trainer``. States of model and optimizers are removed from it.
        weights_key: Key of the strategy for the model's state.
        is_first_on_node: Remove the files of the checkpoint before on this rank.
        is_new: Write elsewhere and give the folder its name when it is complete, the same on all ranks. Defaults to
            ``False``: there is a folder, whose index is replaced last.

    Raises:
        CheckpointException: A rank could not write, as on a full disk. The checkpoint before can still be loaded.
    """
    state = {weights_key: checkpoint.pop("state_dict")}
    state |= {f"optimizer_{i}": values for i, values in enumerate(checkpoint.pop("optimizer_states", []))}
    save(state, storage_writer=_ReplacingWriter(folder, checkpoint, is_new))
    if is_first_on_node:
        if is_new and incomplete_path(folder).is_dir():  # rank 0 has done it where nodes share the file system
            with suppress(FileNotFoundError):
                publish(folder)
        with suppress(OSError, ValueError):  # a folder of this node alone has shards only
            _remove(leftovers(folder, read_index(folder)))
        _remove([file for file in rest_files(folder) if file.name != REST])


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        with suppress(OSError):  # a file that is left over does no harm
            file.unlink()


class _ReplacingFileSystem(FileSystem):
    """File system that replaces the index in one step. PyTorch's writer removes it and then renames the new one."""

    @override
    def exists(self, path: str | os.PathLike) -> bool:
        return False

    @override
    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Replace the index, and move the file with everything but tensors of the write before out of the way.

        Lightning without this package knows one name of that file and does not load a folder that lacks it. It finds
        the checkpoint before, none, or the new one. This package finds the file by any name.
        """
        rest = Path(new_path).with_name(REST)
        if rest.is_file():
            os.replace(rest, rest.with_name(f"previous.{REST}"))
        os.replace(path, new_path)


class _ReplacingWriter(FileSystemWriter):
    """PyTorch's writer with a prefix to all names. Rank 0, the coordinator, also writes everything but tensors.

    Args:
        folder: Folder to write to.
        rest: Everything of the checkpoint but tensors.
        is_new: Give the folder its name when all is written.
    """

    def __init__(self, folder: Path, rest: dict[str, Any], is_new: bool) -> None:
        super().__init__(incomplete_path(folder) if is_new else folder)
        self.fs = _ReplacingFileSystem()
        self._folder, self._rest, self._is_new = folder, rest, is_new

    @override
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Remove files of unfinished writes, and prefix all names. Runs on rank 0 before any rank writes."""
        with suppress(OSError, ValueError):  # there is no checkpoint, or none that can be read
            _remove(leftovers(Path(self.path), read_index(Path(self.path))))  # their space may be needed
        plans = super().prepare_global_plan(plans)
        prefixes = [replace(plan.storage_data, prefix=self.save_id + plan.storage_data.prefix) for plan in plans]
        return [replace(plan, storage_data=prefix) for plan, prefix in zip(plans, prefixes, strict=True)]

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write everything but tensors, and then the index. Runs on rank 0 after all ranks have written."""
        rest = Path(self.path) / f"{self.save_id}.{REST}"
        with _synced(rest) as file:
            torch.save({**self._rest, WRITE: self.save_id}, file)
        super().finish(metadata, results)
        os.replace(rest, rest.with_name(REST))
        if self._is_new:
            publish(self._folder)


@contextmanager
def _synced(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that is synced to disk when it is closed."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
