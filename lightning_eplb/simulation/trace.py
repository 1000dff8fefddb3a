"""Traces: files with the load of every optimizer step, to replay on clusters of any size.

The format is NumPy's own: an ``.npy`` array ``[Y, L]`` of unsigned integers for each step, all in one file.
``numpy.save`` appends such arrays to an open file and ``numpy.load(..., allow_pickle=False)`` reads them one by one.
:class:`TraceWriter` adds a comment with a checksum of the counts to each array's header, which NumPy skips.
"""

import contextlib
import itertools
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

MAGIC = np.lib.format.magic(1, 0)
"""First bytes of each step, those of version 1.0 of NumPy's format."""
HEADER = re.compile(
    rb"\{'descr': '(<[iu][248]|\|[iu]1)', 'fortran_order': (False|True), 'shape': \(([1-9]\d*), ([1-9]\d*)\), \}"
    rb"(?: # crc32 ([0-9a-f]{8}))? *\n"
)
"""Header of a step, exactly as NumPy writes it, so that every flipped bit is detected."""
HEADER_ALIGNMENT = 64
"""Multiple of bytes to which NumPy pads everything before the counts."""


class TraceWriter:
    """Writer that appends steps to a trace. Written steps stay readable if the program is killed.

    Args:
        path: File to write. Its folder is created if missing.
        keep: Number of steps to keep of an existing trace, as for a resumed run. Defaults to 0, which replaces the
            trace. A damaged trace is never cut: it is renamed, with a warning, and its whole steps are copied.

    Raises:
        ValueError: The file can't be written, or holds something other than a trace.
    """

    def __init__(self, path: str | os.PathLike, *, keep: int = 0) -> None:
        self.path = Path(path)
        self._shape: tuple[int, ...] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab+", buffering=0)
            try:
                self._continue(keep)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise ValueError(f"trace={str(path)!r} can't be written: {error.strerror}") from error

    def _continue(self, keep: int) -> None:
        """Keep ``keep`` steps, in the file or in a new one."""
        self._file.seek(0)
        content = self._file.read(os.fstat(self._file.fileno()).st_size)  # a device has size 0, and no end
        assert content is not None
        if not _begins_a_trace(content):
            raise ValueError(f"trace={str(self.path)!r} is a file that holds something else; name another")
        ends, damage = [0], None
        try:
            for step_YL, end in _steps(content) if keep else ():
                self._shape = step_YL.shape
                ends.append(end)
        except _DamageError as error:
            damage = error
        whole = len(ends) - 1
        kept = ends[min(keep, whole)]
        if damage is not None:
            aside = self._set_aside()
            self._file.close()
            self._file = self.path.open("ab+", buffering=0)
            self._write(content[:kept])
            rank_zero_warn(
                f"trace={str(self.path)!r} was {damage}; it is now {str(aside)!r}, and a new trace begins with"
                f" {min(keep, whole)} whole steps of it"
            )
        elif kept < len(content):
            self._file.truncate(kept)
        if whole < keep:
            rank_zero_warn(
                f"trace={str(self.path)!r} goes on behind {whole} steps, and the run resumes behind {keep}: the steps"
                " between are missing in it"
            )

    def _set_aside(self) -> Path:
        """Rename the file to an unused name."""
        file = self.path.resolve()
        names = (file.with_name(f"{file.stem}.damaged-{i}{file.suffix}") for i in itertools.count(1))
        return file.rename(next(name for name in names if not os.path.lexists(name)))

    def append(self, load_YL: Any) -> None:
        """Write one optimizer step. If writing fails, warn once and stop the trace.

        Args:
            load_YL: Tokens of each logical expert, ``[Y, L]``: an integer tensor on the CPU or an array.

        Raises:
            ValueError: ``load_YL`` does not have this shape, or holds other values than integers from 0.
        """
        if self._file.closed:
            return
        load_YL = np.asarray(load_YL)
        if load_YL.ndim != 2 or not load_YL.size or load_YL.dtype.kind not in "iu" or load_YL.min() < 0:
            raise ValueError(
                f"load_YL has shape {list(load_YL.shape)} and dtype {load_YL.dtype}; it must be [layers, experts],"
                " whole numbers from zero up"
            )
        if self._shape not in (None, load_YL.shape):
            rank_zero_warn(
                f"trace={str(self.path)!r} ends here: its steps have shape {list(self._shape or ())}, and this one has"
                f" {list(load_YL.shape)}; name another file"
            )
            return self.close()
        self._shape = load_YL.shape
        end = 0
        try:
            end = self._file.seek(0, os.SEEK_END)
            self._write(_encode(load_YL))
        except OSError as error:
            rank_zero_warn(f"trace={str(self.path)!r} ends here, it can't be written: {error.strerror}")
            with contextlib.suppress(OSError):
                self._file.truncate(end)  # a part of a step would be damage
            self.close()

    def _write(self, content: bytes) -> None:
        """Write without a buffer, so that a killed run leaves whole steps."""
        rest = memoryview(content)
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def read_trace(path: str | os.PathLike, *, allow_damaged: bool = False) -> np.ndarray:
    """Read all steps of a trace, int64 ``[steps, Y, L]``.

    Args:
        path: File to read.
        allow_damaged: Read a damaged trace, such as one that was cut off, up to the last whole step before the damage,
            with a warning. Defaults to an error.

    Raises:
        ValueError: The file is not a trace, or is damaged. The message has the step, its offset in the file and the
            number of whole steps before it.
        OSError: The file can't be read.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} is not a file, as a trace is")
    content = Path(path).read_bytes()
    if not content:
        raise ValueError(f"{path} is empty: it has no step of a trace")
    steps: list[np.ndarray] = []
    try:
        for step_YL, _ in _steps(content):
            steps.append(step_YL)
    except _DamageError as damage:
        if not steps:
            raise ValueError(
                f"{path} is not a trace, as EPLBCallback(trace=...) writes one, or it is damaged at step 0, byte 0:"
                f" {damage.reason}; no step can be read"
            ) from None
        if not allow_damaged:
            raise ValueError(
                f"{path} is {damage}; read_trace(..., allow_damaged=True), or --allow-damaged in the command line,"
                " reads these"
            ) from None
        warnings.warn(f"{path} is {damage}, and no others are read", stacklevel=2)
    load_WYL = np.empty((len(steps), *steps[0].shape), dtype=np.int64)
    for step, step_YL in enumerate(steps):
        load_WYL[step] = step_YL
    if load_WYL.sum(dtype=np.float64) >= 2.0**63:
        raise ValueError(f"{path} has more tokens in all than int64 counts; such a load can't be replayed")
    return load_WYL


class _DamageError(Exception):
    """Damage in a trace: its place, and the whole steps before it."""

    def __init__(self, step: int, offset: int, reason: str) -> None:
        whole = "1 step before it is" if step == 1 else f"{step} steps before it are"
        super().__init__(f"damaged at step {step}, byte {offset}: {reason}; the {whole} whole")
        self.reason = reason


def _steps(content: bytes) -> Iterator[tuple[np.ndarray, int]]:
    """Yield each step of a trace with the offset of its end.

    Raises:
        _DamageError: A step is not whole, or has another shape than the first.
    """
    start, step, first = 0, 0, None
    while start < len(content):
        try:
            step_YL, end = _decode(content, start)
            if first is not None and step_YL.shape != first:
                raise ValueError(f"it has shape {list(step_YL.shape)}, and the steps before have {list(first)}")
        except ValueError as error:
            raise _DamageError(step, start, str(error)) from None
        first = step_YL.shape
        yield step_YL, end
        start, step = end, step + 1


def _decode(content: bytes, start: int) -> tuple[np.ndarray, int]:
    """Read the step that begins at ``start``. Return its counts, ``[Y, L]``, and the offset of its end.

    Raises:
        ValueError: No whole step begins there.
    """
    head = content[start : start + len(MAGIC) + 2]
    if not (MAGIC + head[len(MAGIC) :]).startswith(head):
        raise ValueError(f"it begins with {head[: len(MAGIC)]!r}, and an array with {MAGIC!r}")
    cut_off = f"the file ends {len(content) - start} bytes behind the beginning of the step"
    if len(head) < len(MAGIC) + 2:
        raise ValueError(cut_off)
    (length,) = struct.unpack_from("<H", head, len(MAGIC))
    first = start + len(head) + length
    header = content[start + len(head) : first]
    match = HEADER.fullmatch(header)
    if match is None:
        if first > len(content) and b"\n" not in header:
            raise ValueError(cut_off)
        raise ValueError(
            f"its header is {bytes(header[:80])!r}, and not that of an array [layers, experts] of whole numbers"
        )
    dtype, is_fortran, checksum = np.dtype(match[1].decode()), match[2] == b"True", match[5]
    shape = int(match[3]), int(match[4])
    end = first + shape[0] * shape[1] * dtype.itemsize
    if end > len(content):
        raise ValueError(f"{cut_off}, which has {end - start} bytes")
    counts = content[first:end]
    if checksum is not None and zlib.crc32(counts) != int(checksum, 16):
        raise ValueError("its counts differ from their checksum")
    step_YL = np.frombuffer(counts, dtype).reshape(shape, order="F" if is_fortran else "C")
    if step_YL.min() < 0:
        raise ValueError(f"it has {step_YL.min()} tokens for an expert; zero is the least")
    if step_YL.max() > np.iinfo(np.int64).max:
        raise ValueError(f"it has {step_YL.max()} tokens for an expert, more than int64 counts")
    return step_YL, end


def _encode(load_YL: np.ndarray) -> bytes:
    """Return the bytes of a step."""
    counts_YL = np.ascontiguousarray(load_YL, dtype="<u4" if load_YL.max() < 2**32 else "<u8")
    counts = counts_YL.tobytes()
    layers, experts = counts_YL.shape
    header = (
        f"{{'descr': '{counts_YL.dtype.str}', 'fortran_order': False, 'shape': ({layers}, {experts}), }}"
        f" # crc32 {zlib.crc32(counts):08x}"
    )
    header += " " * (-(len(MAGIC) + 2 + len(header) + 1) % HEADER_ALIGNMENT) + "\n"
    return MAGIC + struct.pack("<H", len(header)) + header.encode() + counts


def _begins_a_trace(content: bytes) -> bool:
    """Return ``True`` for a file that is empty, or begins with a step or with a part of one that was cut off."""
    start = len(MAGIC) + 2
    if len(content) < start or not content.startswith(MAGIC):
        return (MAGIC + content[len(MAGIC) :]).startswith(content)
    end = start + struct.unpack_from("<H", content, len(MAGIC))[0]
    return len(content) < end or HEADER.fullmatch(content[start:end]) is not None
