"""Tensors of a checkpoint on disk, each of which can be read in part."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_eplb.checkpoint.consolidate import (
    check_complete,
    has_shards,
    is_distributed_checkpoint,
    is_inside,
    weights_key,
)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
"""Files of Hugging Face's ``save_pretrained``: a single file, or the index of several."""

Box = tuple[slice, ...]
"""Part of a tensor: a slice with start and stop, and without a step, for each dimension."""


def whole_box(shape: torch.Size) -> Box:
    """Return the box of a whole tensor."""
    return tuple(slice(0, size) for size in shape)


class Source(Protocol):
    """Tensor on disk."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def is_floating_point(self) -> bool:
        """``True`` for real numbers: neither integers nor complex or packed numbers."""
        ...

    def read(self, box: Box) -> Tensor:
        """Read a part to the CPU, and nothing else if the format allows it."""
        ...


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[Mapping[str, Source]]:
    """Open a checkpoint, and yield its tensors by name.

    Args:
        path: Folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and the files that it names;
            one such file; or a file or distributed checkpoint that Lightning's ``Trainer`` has saved.

    Raises:
        ValueError: ``path`` is none of these or damaged, or a file of the index is missing or outside of the folder.
    """
    path = Path(path)
    with ExitStack() as files:
        if is_distributed_checkpoint(path):
            yield _distributed(path)
        elif is_from_lightning(path):
            yield _lightning(path)
        elif path.is_file():
            yield _safetensors([path], files)
        elif (path / INDEX_FILE).is_file() or (path / SINGLE_FILE).is_file():
            yield _safetensors(_named_files(path), files)
        elif has_shards(path):
            check_complete(path)
        else:
            raise ValueError(
                f"path={str(path)!r} is not a checkpoint. Use a folder with {SINGLE_FILE} or {INDEX_FILE}, or a file or"
                " folder of Trainer.save_checkpoint. Nothing is downloaded."
            )


def is_from_lightning(path: str | Path) -> bool:
    """Return ``True`` for a file that is not safetensors, and for a distributed checkpoint."""
    return (Path(path).is_file() and Path(path).suffix != ".safetensors") or is_distributed_checkpoint(path)


class _SafetensorsSource:
    def __init__(self, file: Any, key: str) -> None:
        self._slice = file.get_slice(key)
        self.shape = torch.Size(self._slice.get_shape())
        dtype = str(self._slice.get_dtype())
        self.is_floating_point = dtype in ("F64", "F32", "F16", "BF16") or dtype.startswith("F8_")

    def read(self, box: Box) -> Tensor:
        return self._slice[box] if box else self._slice[...]


def _safetensors(paths: list[Path], files: ExitStack) -> dict[str, Source]:
    from safetensors import safe_open

    sources: dict[str, Source] = {}
    for path in paths:
        try:
            file = files.enter_context(safe_open(path, framework="pt", device="cpu"))
            sources |= {key: _SafetensorsSource(file, key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # of bytes that may be anything, so is this
            raise ValueError(
                f"path={str(path)!r} can't be read as safetensors, and may be cut off: {error}. Copy it again."
            ) from error
    return sources


def _named_files(folder: Path) -> list[Path]:
    """Return the single file, or else the files of the index. transformers looks for them in this order."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    names = _names_in_index(folder / INDEX_FILE)
    outside = [name for name in names if not is_inside(name)]
    if outside:
        raise ValueError(
            f"path={str(folder)!r} was not read, as its {INDEX_FILE} names {listed(outside)} outside of this folder."
            " Use a checkpoint of known origin."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"path={str(folder)!r} lacks {listed(missing)}, which its {INDEX_FILE} names")
    return [folder / name for name in names]


def _names_in_index(file: Path) -> list[str]:
    index = read_json(file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"path={str(file)!r} has no 'weight_map' from names of tensors to names of files")
    return sorted(set(weight_map.values()))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file with an object. Raises ``ValueError`` for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path={str(file)!r} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"path={str(file)!r} must hold a JSON object; it holds a {type(content).__name__}")
    return content


class _MappedSource:
    """Tensor in a memory-mapped file."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.shape = tensor.shape
        self.is_floating_point = tensor.is_floating_point()

    def read(self, box: Box) -> Tensor:
        return self._tensor[box]


def _lightning(file: Path) -> dict[str, Source]:
    try:
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of bytes that may be anything, so is this
        raise ValueError(
            f"path={str(file)!r} can't be read as a file of Trainer.save_checkpoint ({type(error).__name__}): it is"
            " damaged, or holds more than tensors and plain Python. No code of it was run."
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"path={str(file)!r} has no 'state_dict'. Use a file of Trainer.save_checkpoint.")
    state_dict = checkpoint["state_dict"]
    if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
        raise ValueError(
            f"path={str(file)!r} has a 'state_dict' that is not a dictionary from names to tensors. Use a file"
            " of Trainer.save_checkpoint."
        )
    tensors = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    odd = [key for key, tensor in tensors.items() if not _is_plain(tensor)]
    if odd:
        raise ValueError(
            f"path={str(file)!r} has {listed(odd)} sparse, quantized or on the meta device. Save plain tensors."
        )
    return {key: _MappedSource(tensor) for key, tensor in tensors.items()}


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested and not tensor.is_meta


class _DistributedSource:
    """Tensor of a distributed checkpoint. Reads the shards that overlap with the box."""

    def __init__(self, reader: Any, key: str, entry: Any) -> None:
        self._reader, self._key, self._entry = reader, key, entry
        self.shape = torch.Size(entry.size)
        self.is_floating_point = entry.properties.dtype.is_floating_point

    def read(self, box: Box) -> Tensor:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner import LoadPlan
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        sizes = torch.Size(part.stop - part.start for part in box)
        target = torch.empty(sizes, dtype=self._entry.properties.dtype, device="cpu")
        chunk = ChunkStorageMetadata(offsets=torch.Size(part.start for part in box), sizes=sizes)
        plan = LoadPlan(create_read_items_for_chunk_list(self._key, self._entry, [chunk]))
        self._reader.read_data(self._reader.prepare_local_plan(plan), _PartsOf(target)).wait()
        return target


class _PartsOf:
    """Planner for PyTorch's reader that returns places in one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: Any) -> Tensor:
        parts = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in parts)]

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        """Do nothing: the tensor is a part of the target."""


def _distributed(folder: Path) -> dict[str, Source]:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    from lightning_eplb.checkpoint.dcp_reader import DistributedReader

    reader = DistributedReader(folder)
    index = reader.read_metadata()
    reader.set_up_storage_reader(index, is_coordinator=True)
    weights = weights_key(index)
    return {
        parts[1]: _DistributedSource(reader, key, index.state_dict_metadata[key])
        for key, parts in (index.planner_data or {}).items()
        if parts[0] == weights and len(parts) > 1 and isinstance(index.state_dict_metadata[key], TensorStorageMetadata)
    }


def listed(names: Sequence[str], most: int = 5) -> str:
    """Join the first names, and say how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
