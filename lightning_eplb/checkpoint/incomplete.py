"""Keep a checkpoint out of sight until it is complete.

Lightning takes the newest ``last*.ckpt`` for ``ckpt_path="last"`` and the highest ``hpc_ckpt_*.ckpt`` on SLURM. It
looks at names only, so that neither may ever name a part of a checkpoint.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

FOLDER = ".incomplete"
"""Folder beside a checkpoint in which it is written. Lightning looks into no folder."""


def incomplete_path(path: Path) -> Path:
    """Return the path at which to write a checkpoint, file or folder, on the file system of its final ``path``."""
    return path.parent / FOLDER / path.name


def publish(path: Path) -> None:
    """Give a complete checkpoint its name, and replace what has that name.

    A file replaces a file in one step. If one of the two is a folder, the process may die between the steps. Then there
    is none of that name, and both lie in :data:`FOLDER`.

    Args:
        path: Final path. Its checkpoint was written at :func:`incomplete_path`.
    """
    written, previous = incomplete_path(path), incomplete_path(path).with_name(f"previous.{path.name}")
    if path.is_dir() or (written.is_dir() and path.exists()):
        _remove(previous)
        os.replace(path, previous)
    os.replace(written, path)
    _remove(previous)
    with suppress(OSError):  # other checkpoints are being written
        written.parent.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
