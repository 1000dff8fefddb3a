"""Write a distributed checkpoint in place of another, so that at any time there is one of the two, and no mixture."""

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


def save_distributed_checkpoint(
    folder: Path, checkpoint: dict[str, Any], weights_key: str, is_first_on_node: bool
) -> None:
    """Each rank writes its shards, as Lightning's strategies do, but under names that no other write has.

    The index, which names them, is replaced last, in one step. So a rank that dies leaves what was there before, for
    this package and for PyTorch's own reader. Every rank must call it; if one fails, all raise.

    Args:
        folder: The same on all ranks; it may hold a checkpoint.
        checkpoint: As ``Trainer`` makes it. Its states of model and optimizers are taken out.
        weights_key: The strategy's name for the model's state.
        is_first_on_node: Whether this rank removes the files of the checkpoint that was there before.

    Raises:
        CheckpointException: A rank could not write, as on a full disk; what was there before can still be loaded.
    """
    state = {weights_key: checkpoint.pop("state_dict")}
    state |= {f"optimizer_{i}": values for i, values in enumerate(checkpoint.pop("optimizer_states", []))}
    save(state, storage_writer=_ReplacingWriter(folder, checkpoint))
    if is_first_on_node:
        with suppress(OSError, ValueError):  # a folder of this node alone has shards only
            _remove(leftovers(folder, read_index(folder)))
        _remove([file for file in rest_files(folder) if file.name != REST])


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        with suppress(OSError):  # it is in nobody's way
            file.unlink()


class _ReplacingFileSystem(FileSystem):
    """For the index: PyTorch's writer removes one that exists, and then renames the new one."""

    @override
    def exists(self, path: str | os.PathLike) -> bool:
        return False

    @override
    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """
        Lightning without this package knows one name for what is no tensor, and refuses a folder that lacks it. So it
        finds what was there before, or nothing, or the new checkpoint; this package finds the rest by any name.
        """
        rest = Path(new_path).with_name(REST)
        if rest.is_file():
            os.replace(rest, rest.with_name(f"previous.{REST}"))
        os.replace(path, new_path)


class _ReplacingWriter(FileSystemWriter):
    """PyTorch's writer with a prefix to all names; the coordinator, rank 0, writes what is no tensor, too.

    Args:
        rest: All that is no tensor.
    """

    def __init__(self, folder: Path, rest: dict[str, Any]) -> None:
        super().__init__(folder)
        self.fs = _ReplacingFileSystem()
        self._rest = rest

    @override
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes."""
        with suppress(OSError, ValueError):  # there is no checkpoint, or none that can be read
            _remove(leftovers(Path(self.path), read_index(Path(self.path))))  # their space may be needed
        plans = super().prepare_global_plan(plans)
        prefixes = [replace(plan.storage_data, prefix=self.save_id + plan.storage_data.prefix) for plan in plans]
        return [replace(plan, storage_data=prefix) for plan, prefix in zip(plans, prefixes, strict=True)]

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, after all ranks have written."""
        rest = Path(self.path) / f"{self.save_id}.{REST}"
        with _synced(rest) as file:
            torch.save({**self._rest, WRITE: self.save_id}, file)
        super().finish(metadata, results)
        os.replace(rest, rest.with_name(REST))


@contextmanager
def _synced(path: Path) -> Iterator[IO[bytes]]:
    """A file that is on the disk when it is closed."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
