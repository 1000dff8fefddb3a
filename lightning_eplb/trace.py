"""Traces: the load of every optimizer step in a file, to be replayed on clusters of any size.

The format is NumPy's own: one ``.npy`` array ``[Y, L]`` of unsigned integers a step, one after the other in one file.
``numpy.save`` appends such arrays to an open file and ``numpy.load(..., allow_pickle=False)`` reads them one by one.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np


class TraceWriter:
    """Appends steps to a trace. What was written stays readable if the program is killed.

    Args:
        path: The file; its folder is made if it is missing.
        append: Go on with the file if it is there, instead of replacing it.
    """

    def __init__(self, path: str | os.PathLike, *, append: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab" if append else "wb")

    def append(self, load_YL: Any) -> None:
        """Write one optimizer step.

        Args:
            load_YL: Tokens of each logical expert, ``[Y, L]``: an integer tensor on the CPU or an array.
        """
        load_YL = np.asarray(load_YL)
        fits = load_YL.max(initial=0) < 2**32
        np.lib.format.write_array(self._file, load_YL.astype("<u4" if fits else "<u8"), allow_pickle=False)
        self._file.flush()

    def close(self) -> None:
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
