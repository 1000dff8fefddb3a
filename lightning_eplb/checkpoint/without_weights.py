"""Read a checkpoint without its weights, such as the state of its callbacks."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from lightning_eplb.checkpoint.consolidate import check_complete, has_shards, read_rest


def is_checkpoint(path: Path) -> bool:
    """Return ``True`` for a folder with shards, and for a file of ``torch.save``, whatever it is called."""
    if path.is_dir():
        return has_shards(path)
    if not zipfile.is_zipfile(path):
        return path.suffix == ".ckpt"
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/data.pkl") for name in archive.namelist())


def read_without_weights(path: Path) -> dict[str, Any]:
    """Read a checkpoint without its weights, which stay on disk. Runs no code from the file."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a checkpoint, such as runs/pretrain/checkpoints/last.ckpt")
    try:
        if path.is_dir():
            checkpoint = _read_folder(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of bytes that may be anything, so is this
        raise ValueError(f"{path} is not a checkpoint that can be read without running code from it") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} is not a checkpoint of Lightning: it holds a {type(checkpoint).__name__}")
    return checkpoint


def _read_folder(path: Path) -> dict[str, Any]:
    from lightning_eplb.checkpoint.dcp_reader import leftovers, read_index  # slow to import

    if not has_shards(path):
        raise ValueError(f"{path} is no checkpoint of Lightning: it has neither an index .metadata nor shards")
    check_complete(path)
    index = read_index(path)
    checkpoint = read_rest(path, index, weights_only=True)
    if unfinished := leftovers(path, index):
        warnings.warn(
            f"a later write to {path} did not finish ({len(unfinished)} of its files are there): shown is the one"
            " before it, from which a run resumes",
            stacklevel=1,
        )
    return checkpoint
