"""Traces: the load of every optimizer step in a file, to be replayed on clusters of any size.

The format is NumPy's own: one ``.npy`` array ``[Y, L]`` of unsigned integers a step, one after the other in one file.
``numpy.save`` appends such arrays to an open file and ``numpy.load(..., allow_pickle=False)`` reads them one by one.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn


class TraceWriter:
    """Appends steps to a trace. What was written stays readable if the program is killed.

    Args:
        path: The file; its folder is made if it is missing.
        keep: Go on behind so many steps of a trace that is there, as a run does that resumes; 0 replaces it.

    Raises:
        ValueError: The file can't be written, or it holds something else than a trace.
    """

    def __init__(self, path: str | os.PathLike, *, keep: int = 0) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab+")
        except OSError as error:
            raise ValueError(f"trace={str(path)!r} can't be written: {error.strerror}") from error
        self._cut(keep)

    def _cut(self, keep: int) -> None:
        """Leave so many steps of what the file holds."""
        self._file.seek(0)
        size = os.fstat(self._file.fileno()).st_size
        if size and not _is_cut_off(self.path, 0):
            self._file.close()
            raise ValueError(f"trace={str(self.path)!r} is a file that holds something else; name another")
        end = 0
        for _ in range(keep):
            try:
                np.lib.format.read_array(self._file, allow_pickle=False)
            except (ValueError, EOFError):  # there are no more, or the last one was cut off
                break
            end = self._file.tell()
        if end < size:
            self._file.truncate(end)

    def append(self, load_YL: Any) -> None:
        """Write one optimizer step; where that can no longer be done, warn once and go without.

        Args:
            load_YL: Tokens of each logical expert, ``[Y, L]``: an integer tensor on the CPU or an array.
        """
        if self._file.closed:
            return
        load_YL = np.asarray(load_YL)
        fits = load_YL.max(initial=0) < 2**32
        try:
            np.lib.format.write_array(self._file, load_YL.astype("<u4" if fits else "<u8"), allow_pickle=False)
            self._file.flush()
        except OSError as error:
            rank_zero_warn(f"trace={str(self.path)!r} ends here, it can't be written: {error.strerror}")
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left in the buffer of a full disk
            self._file.close()


def read_trace(path: str | os.PathLike) -> np.ndarray:
    """All whole steps of a trace, int64 ``[steps, Y, L]``; a last step that was cut off is left out.

    Raises:
        ValueError: The file is no trace, or its steps are not of one shape.
    """
    steps: list[np.ndarray] = []
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while file.tell() < size:
            start = file.tell()
            try:
                steps.append(np.lib.format.read_array(file, allow_pickle=False))
            except (ValueError, EOFError) as error:
                if steps and _is_cut_off(path, start):
                    break
                raise ValueError(f"{path} is not a trace, as EPLBCallback(trace=...) writes one: {error}") from error
    shapes = {step.shape for step in steps}
    if len(shapes) != 1 or any(step.ndim != 2 or step.dtype.kind not in "iu" for step in steps[:1]):
        raise ValueError(
            f"{path} is not a trace: it has {len(steps)} arrays of shapes {sorted(shapes)}; it must have one array"
            " [layers, experts] of integers for each step"
        )
    return np.stack(steps).astype(np.int64)


def _is_cut_off(path: str | os.PathLike, start: int) -> bool:
    """Whether what follows ``start`` begins as an array does: a killed run leaves the beginning of one."""
    with open(path, "rb") as file:
        file.seek(start)
        magic = file.read(len(np.lib.format.MAGIC_PREFIX))
    return np.lib.format.MAGIC_PREFIX.startswith(magic)
