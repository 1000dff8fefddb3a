"""Read back what an offline W&B run has written, so that tests can ask what a user would see.

The ``.wandb`` file of a run is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) behind a
header of seven bytes: blocks of 32 KiB, in them chunks with a header of checksum (4 bytes), length (2) and type (1); a
record is one full chunk, or a first, any middle and a last one. Each record is a protobuf message, ``Record``. wandb
has no reader of it in Python any more (0.31), only the message types.
"""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
BLOCK = 32 * 1024
CHUNK_HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def run_dirs(save_dir: Path) -> list[Path]:
    """The offline runs that ``WandbLogger(save_dir=..., offline=True)`` wrote there, oldest first."""
    return sorted(save_dir.glob("wandb/offline-run-*"))


def read_history(run_dir: Path, patience_seconds: float = 20.0) -> list[dict[str, Any]]:
    """The rows of a run's history in the order they were logged.

    The run must be finished (``wandb.finish()``). W&B's writer may still be at work when that returns, so this waits
    for the record of the run's exit, which is the last one.

    Args:
        run_dir: A directory ``wandb/offline-run-*``.
        patience_seconds: How long it waits.

    Returns:
        For each row what was logged, by name: ``{"loss": 0.5, "trainer/global_step": 3, "_step": 0, ...}``. ``_step``
        is W&B's own counter of rows. A list of pictures, as ``log_image`` writes it, is a dictionary with ``_type``,
        ``count``, ``filenames``, ``width`` and ``height``; :func:`image_paths` finds the files.

    Raises:
        TimeoutError: The run has no exit.
    """
    deadline = time.monotonic() + patience_seconds
    records = list(_records(run_dir))
    while not any(record.WhichOneof("record_type") == "exit" for record in records):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run_dir} has no exit after {patience_seconds} seconds; was wandb.finish() called?")
        time.sleep(0.05)
        records = list(_records(run_dir))
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {"_step": record.history.step.num}
            for item in record.history.item:
                *outer, name = item.nested_key or [item.key]
                place = row
                for key in outer:
                    place = place.setdefault(key, {})
                place[name] = json.loads(item.value_json)
            rows.append(row)
    return rows


def image_paths(run_dir: Path, picture: dict[str, Any]) -> list[Path]:
    """The files of what ``read_history`` shows for a picture or a list of pictures."""
    if picture["_type"] == "images/separated":
        return [run_dir / "files" / name for name in picture["filenames"]]
    return [run_dir / "files" / picture["path"]]


def _records(run_dir: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run_dir.glob("run-*.wandb")
    data = path.read_bytes()
    if data and data[: len(HEADER)] != HEADER:
        raise ValueError(f"{path} starts with {data[: len(HEADER)]!r}; a W&B run starts with {HEADER!r}")
    position, whole = len(HEADER), b""
    while position + CHUNK_HEADER.size <= len(data):
        room = BLOCK - position % BLOCK
        if room < CHUNK_HEADER.size:  # too small for a chunk: zeros up to the next block
            position += room
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(data, position)
        position += CHUNK_HEADER.size
        chunk = data[position : position + length]
        if len(chunk) != length:
            return  # still being written
        if kind not in (FULL, FIRST, MIDDLE, LAST):
            raise ValueError(f"{path} is damaged before byte {position}: chunks are of types 1 to 4, not {kind}")
        whole = chunk if kind in (FULL, FIRST) else whole + chunk
        position += length
        if kind in (FULL, LAST):
            yield Record.FromString(whole)
