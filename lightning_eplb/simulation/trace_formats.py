"""Read loads in files of other programs as ``[steps, layers, experts]``.

Shape suffixes: ``W`` steps, ``Y`` MoE layers, ``L`` logical experts, ``N`` records, ``T`` tokens, ``K`` top-k.
"""

import csv
import json
import os
import re
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_eplb.simulation.trace import MAGIC, read_trace

FORMATS = """\
  a trace that EPLBCallback(trace=...) wrote
  a NumPy array [steps, layers, experts] of tokens, .npy or alone in an .npz
  a table, .csv: step, layer, expert, tokens; or step, layer and a column of
    tokens for each expert. Its first line has these names
  what Megatron-LM wrote with --moe-routing-trace-path: the folder, or one
    rank's router_trace_rank*.jsonl
  what UltraEP's load profiler wrote: the folder, or a *.chunk*.npz
"""
"""Formats that :func:`read_load` reads."""
MOST_EXPERTS = 2**16
"""Upper bound of the experts of a layer. A higher id counts as damage, before memory is allocated for it."""
MOST_COUNTS = 2**29
"""Upper bound of the counts of a load made of records that name steps, layers and experts: 4 GiB."""
ULTRA_EP_ARRAYS = ("metadata", "layers", "microbatches", "pre_logical_loads")
"""Arrays of a chunk that are read.

Source: Dots-Infra/UltraEP 1.0.0, ``ultra_ep/profiling.py`` (``ultra_ep_trace_v1``);
``ultra_ep/load_viewer.py`` reads the same."""
CHUNK = re.compile(r"(?P<trace>.+)\.chunk\d+\.npz")
"""Names of UltraEP's chunks."""
ROUTER_TRACES = "router_trace_rank*.jsonl"
"""Names of Megatron's files, one for each rank.

Source: NVIDIA/Megatron-LM, ``megatron/core/transformer/moe/router_trace.py`` (pull request 5220, 2026)."""

DAMAGE = (
    ValueError, KeyError, EOFError, OSError, NotImplementedError, SyntaxError, MemoryError, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Exceptions of NumPy for files that are damaged, or hold anything but plain arrays."""

Layer = tuple[str, int, int]
"""Megatron's name of a layer: block, multi-token-prediction head (-1 for none), index."""


def read_load(path: str | os.PathLike, *, num_experts: int | None = None, allow_damaged: bool = False) -> np.ndarray:
    """Read a recorded load from a file or folder in any of :data:`FORMATS`.

    Megatron's tracer writes the top-k ids of each token. They are counted by iteration and layer, over micro-batches
    and, for a folder, over the files of all ranks. Megatron numbers layers within a pipeline stage, so give a folder
    with the files of one stage. UltraEP's profiler counts the micro-batches of one EP group: each becomes a step. Given
    a chunk, all chunks of its trace are read, since a micro-batch may span two.

    Args:
        path: File or folder. Its content tells the format, and its name for ``.csv`` and ``.jsonl``.
        num_experts: Experts of each layer, for files that name only experts with tokens: Megatron's files, and tables
            with a column ``expert``. Defaults to the highest id plus one.
        allow_damaged: Read a damaged trace, or a ``.jsonl`` file that was cut off, up to the damage, with a warning.
            Defaults to an error.

    Returns:
        Tokens of each expert, int64 ``[W, Y, L]``. Steps and layers are in the order of their numbers. Steps of
        Megatron's and UltraEP's files that lack a layer or a rank are left out, with a warning.

    Raises:
        ValueError: The file has none of these formats, or is damaged. The message says what would work.
        OSError: The file can't be read.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, num_experts, allow_damaged)
    with path.open("rb") as file:
        head = file.read(256)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _read_megatron([path], path, num_experts, allow_damaged)
    if path.suffix.lower() == ".csv":
        return _read_table(path, num_experts)
    if head.startswith(b"PK"):
        return _read_npz(path)
    if path.suffix.lower() == ".npz":
        raise ValueError(f"{path} is no .npz file: it begins with {head[:2]!r}, and a zip archive with b'PK'")
    if head.startswith(MAGIC[:6]) and re.search(rb"'shape': \(\d+, \d+, \d+\)", head):
        return _as_load(_load_numpy(path), str(path))
    return read_trace(path, allow_damaged=allow_damaged)


def _read_folder(path: Path, num_experts: int | None, allow_damaged: bool) -> np.ndarray:
    traces = sorted(path.glob(ROUTER_TRACES))
    if traces:
        return _read_megatron(traces, path, num_experts, allow_damaged)
    first = {match["trace"]: each for each in sorted(path.glob("*.npz"), reverse=True) if (match := _chunk(each))}
    if len(first) > 1:
        raise ValueError(
            f"{path} holds the traces of {len(first)} EP groups; name a chunk of one, such as {min(first.values())}"
        )
    if not first:
        raise ValueError(
            f"{path} is a folder that holds neither {ROUTER_TRACES}, as Megatron writes them, nor *.chunk*.npz, as"
            " UltraEP does; name a file"
        )
    return _read_npz(*first.values())


def _chunk(path: Path) -> "re.Match[str] | None":
    return CHUNK.fullmatch(path.name)


def _load_numpy(path: Path) -> Any:
    """Load an array or an archive of arrays, but no pickled objects."""
    try:
        return np.load(path, allow_pickle=False)
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged, or no file of NumPy's: {error}") from None


def _read_npz(path: Path) -> np.ndarray:
    arrays = _arrays(path)
    if "pre_logical_loads" in arrays:
        match = _chunk(path)
        siblings = [path] if match is None else sorted(path.parent.glob(f"{_escaped(match['trace'])}.chunk*.npz"))
        return _read_ultra_ep({each: _arrays(each) for each in siblings})
    if len(arrays) != 1:
        raise ValueError(
            f"{path} holds {len(arrays)} arrays ({', '.join(sorted(arrays)) or 'none'}); one array [steps, layers,"
            " experts] is wanted, of any name, or UltraEP's metadata, layers, microbatches and pre_logical_loads"
        )
    ((name, load_WYL),) = arrays.items()
    return _as_load(load_WYL, f"{path}, array {name!r},")


def _escaped(name: str) -> str:
    """Return a pattern that matches one file name."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with _load_numpy(path) as archive:
        try:
            return {name: archive[name] for name in archive.files}
        except DAMAGE as error:
            raise ValueError(f"{path} is damaged, or holds something else than plain arrays: {error}") from None


def _as_load(load_WYL: Any, name: str) -> np.ndarray:
    """Check counts, and convert them to int64. Errors begin with ``name``."""
    if not isinstance(load_WYL, np.ndarray) or load_WYL.ndim != 3 or not load_WYL.size:
        shape = list(getattr(load_WYL, "shape", ()))
        raise ValueError(f"{name} has shape {shape}; [steps, layers, experts] is wanted, at least one of each")
    kind = load_WYL.dtype.kind
    is_whole = kind in "iu" or (kind == "f" and bool((np.isfinite(load_WYL) & (load_WYL == np.floor(load_WYL))).all()))
    if not is_whole:
        raise ValueError(f"{name} holds other things than whole numbers (dtype {load_WYL.dtype}); tokens are counted")
    if load_WYL.min() < 0:
        raise ValueError(f"{name} has {load_WYL.min()} tokens for an expert; zero is the least")
    if load_WYL.sum(dtype=np.float64) >= 2.0**63:
        raise ValueError(f"{name} has more tokens in all than int64 counts; such a load can't be replayed")
    return load_WYL.astype(np.int64)


def _read_ultra_ep(chunks: dict[Path, dict[str, np.ndarray]]) -> np.ndarray:
    layers, microbatches, loads = [], [], []
    for path, arrays in chunks.items():
        missing = [name for name in ULTRA_EP_ARRAYS if name not in arrays]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}, which chunks of UltraEP's profiler have")
        layer_N, microbatch_N, load_NL = (arrays[name] for name in ULTRA_EP_ARRAYS[1:])
        loads.append(_as_load(load_NL[None], f"{path}, pre_logical_loads,")[0])
        shape = load_NL.shape[:1]
        if (
            layer_N.shape != shape
            or microbatch_N.shape != shape
            or {layer_N.dtype.kind, microbatch_N.dtype.kind} - {*"iu"}
        ):
            raise ValueError(
                f"{path} has {shape[0]} records of loads, and layers of shape {list(layer_N.shape)} and microbatches of"
                f" shape {list(microbatch_N.shape)}; there must be a whole number of each for every record"
            )
        if loads[-1].shape[1] != loads[0].shape[1]:
            raise ValueError(f"{path} has {loads[-1].shape[1]} experts, and the chunks before {loads[0].shape[1]}")
        layers.append(layer_N)
        microbatches.append(microbatch_N)
    step_ids, step_N = np.unique(np.concatenate(microbatches), return_inverse=True)
    layer_ids, layer_N = np.unique(np.concatenate(layers), return_inverse=True)
    load_WYL = _zeros((len(step_ids), len(layer_ids), loads[0].shape[1]), next(iter(chunks)))
    np.add.at(load_WYL, (step_N, layer_N), np.concatenate(loads))
    is_there_WY = np.zeros(load_WYL.shape[:2], dtype=bool)
    is_there_WY[step_N, layer_N] = True
    return _whole_steps(load_WYL, np.flatnonzero(is_there_WY.all(axis=1)), str(next(iter(chunks))), "layers")


def _zeros(shape: tuple[int, int, int], source: Path) -> np.ndarray:
    steps, layers, experts = shape
    if steps * layers * experts > MOST_COUNTS:
        raise ValueError(
            f"{source} has {steps} steps of {layers} layers with {experts} experts: {steps * layers * experts:,}"
            f" counts, and {MOST_COUNTS:,} are the most that are read"
        )
    return np.zeros(shape, dtype=np.int64)


def _whole_steps(load_WYL: np.ndarray, whole: np.ndarray, name: str, parts: str) -> np.ndarray:
    """Drop steps that lack parts, with a warning. ``whole`` are the indices of all others."""
    if not len(whole):
        raise ValueError(f"{name} has no step with all {parts} that it names; no step can be replayed")
    if left_out := len(load_WYL) - len(whole):
        warnings.warn(f"{name}: {left_out} of {len(load_WYL)} steps lack {parts} and are left out", stacklevel=2)
    return load_WYL[whole] if left_out else load_WYL


def _read_megatron(files: Sequence[Path], source: Path, num_experts: int | None, allow_damaged: bool) -> np.ndarray:
    counts: dict[tuple[int, Layer], np.ndarray] = {}
    seen: dict[int, set[tuple[int, Layer]]] = {}  # of each step the files and layers
    for index, path in enumerate(files):
        for step, layer, count_L in _routings(path, num_experts, allow_damaged):
            before_L = counts.get((step, layer), np.zeros(0, dtype=np.int64))
            if len(before_L) > len(count_L):
                before_L, count_L = count_L, before_L
            count_L[: len(before_L)] += before_L
            counts[step, layer] = count_L
            seen.setdefault(step, set()).add((index, layer))
    if not counts:
        raise ValueError(f"{source} holds no record of a routed token")
    everywhere = set().union(*seen.values())
    steps = {step: index for index, step in enumerate(sorted(seen))}
    layers = {layer: index for index, layer in enumerate(sorted({layer for _, layer in counts}))}
    experts = num_experts or max(1, *map(len, counts.values()))
    load_WYL = _zeros((len(steps), len(layers), experts), source)
    for (step, layer), count_L in counts.items():
        load_WYL[steps[step], layers[layer], : len(count_L)] = count_L
    whole = np.array([index for step, index in steps.items() if seen[step] == everywhere], dtype=np.int64)
    return _whole_steps(load_WYL, whole, str(source), "layers or ranks")


def _routings(path: Path, num_experts: int | None, allow_damaged: bool) -> Iterator[tuple[int, Layer, np.ndarray]]:
    """Yield step, layer and tokens of each expert, int64, for each line of one of Megatron's files."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield _routing(line, num_experts)
            except json.JSONDecodeError as error:
                sentence = f"{path} is damaged at line {number}: {error}"
                if not allow_damaged:
                    raise ValueError(
                        f"{sentence}; --allow-damaged in the command line reads the lines before"
                    ) from None
                warnings.warn(f"{sentence}; only the lines before are read", stacklevel=2)
                return
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(
                    f"{path}, line {number}: {problem}; Megatron's tracer writes step, layer and top_indices,"
                    " [tokens, top-k] ids of experts"
                ) from None


def _routing(line: str, num_experts: int | None) -> tuple[int, Layer, np.ndarray]:
    record = json.loads(line)
    top_TK = np.array(record["top_indices"])
    if top_TK.size and (top_TK.dtype.kind != "i" or top_TK.ndim != 2):
        raise ValueError(f"top_indices has shape {list(top_TK.shape)} and dtype {top_TK.dtype}")
    chosen = top_TK[top_TK != -1].astype(np.int64)  # -1: no expert
    limit = num_experts or MOST_EXPERTS
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < limit:
        raise ValueError(f"it routes to experts {chosen.min()} to {chosen.max()}, and ids are 0 to {limit - 1}")
    head = record.get("mtp_idx")
    layer = str(record.get("block", "decoder")), -1 if head is None else int(head), int(record["layer"])
    return int(record["step"]), layer, np.bincount(chosen).astype(np.int64)


def _read_table(path: Path, num_experts: int | None) -> np.ndarray:
    head, numbers_NC = _numbers(path)
    if head[2:] == ["expert", "tokens"]:
        step_N, layer_N, expert_N, tokens_N = numbers_NC.T
        experts = num_experts or min(int(expert_N.max()) + 1, MOST_EXPERTS)
        if not 0 <= expert_N.min() <= expert_N.max() < experts:
            raise ValueError(f"{path} names experts {expert_N.min()} to {expert_N.max()}; ids are 0 to {experts - 1}")
    else:
        step_N, layer_N, tokens_N = numbers_NC[:, 0], numbers_NC[:, 1], numbers_NC[:, 2:]
        experts, expert_N = len(head) - 2, None
    (steps, step_N), (layers, layer_N) = (np.unique(each, return_inverse=True) for each in (step_N, layer_N))
    load_WYL = _zeros((len(steps), len(layers), experts), path)
    times_WYL = np.zeros(load_WYL.shape, dtype=np.int32)
    if expert_N is None:  # a line has all experts
        step_N, layer_N, expert_N = step_N[:, None], layer_N[:, None], np.arange(experts)
    np.add.at(times_WYL, (step_N, layer_N, expert_N), 1)
    # An expert without a line has no token; a layer without one is an oversight.
    is_wrong_WYL = (times_WYL > 1) | ~times_WYL.any(axis=2, keepdims=True)
    if is_wrong_WYL.any():
        step, layer, expert = np.argwhere(is_wrong_WYL)[0]
        times = times_WYL[step, layer, expert]
        where = f"step {steps[step]}, layer {layers[layer]}" + (f", expert {expert}" if times > 1 else "")
        raise ValueError(f"{path} has {times or 'no'} lines for {where}; there must be one")
    load_WYL[step_N, layer_N, expert_N] = tokens_N
    return _as_load(load_WYL, str(path))


def _numbers(path: Path) -> tuple[list[str], np.ndarray]:
    """Read the names of a table's columns, lower case, and its numbers, int64 ``[N, columns]``."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = csv.reader(file)
        try:
            head = [name.strip().lower() for name in next(rows, [])]
            if head[:2] != ["step", "layer"] or len(head) < 3:
                raise ValueError(
                    f"{path} begins with the line {','.join(head)[:80]!r}; its columns must be step, layer, expert,"
                    " tokens, or step, layer and one for each expert"
                )
            cells = [_cells(row, len(head), f"{path}, line {rows.line_num}") for row in rows if row]
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
    if not cells:
        raise ValueError(f"{path} has no line behind its first; there must be one for each step and layer")
    return head, np.array(cells, dtype=np.int64)


def _cells(row: list[str], columns: int, where: str) -> list[int]:
    """Convert the cells of a line to integers."""
    if len(row) != columns:
        raise ValueError(f"{where}: it has {len(row)} columns, and the first line names {columns}")
    try:
        numbers = [int(cell) for cell in row]
    except ValueError as error:
        raise ValueError(f"{where}: {error}; steps, layers, experts and tokens are whole numbers") from None
    if max(map(abs, numbers)) > np.iinfo(np.int64).max:
        raise ValueError(f"{where}: it has a number that int64 does not hold")
    return numbers
