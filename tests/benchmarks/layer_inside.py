"""Inside one layer: the host's time without its waits for the device, and the kernels by name."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.lanes import slowest_rank, wait_for_all
from tests.benchmarks.layer_lanes import Batch, Lane, rank
from tests.benchmarks.report import print_table

HOST_TOKENS = 64
HOST_BAR = 1.5e-3
"""Most seconds of Python in forward and backward of ours."""
WARM_UP = 10
PROFILED_TURNS = 4
SHOWN_KERNELS, MOST_LETTERS = 20, 110
KINDS = {"products": ("cutlass", "grouped"), "exchange": ("nccl", "barrier")}
"""By what a kernel's name contains, in lower case; the first that fits."""
WAITS = [
    (Tensor, ("cpu", "item", "tolist", "__int__", "__bool__")),
    (torch.cuda.Event, ("synchronize",)),
    (torch.cuda.Stream, ("synchronize",)),
    (torch.cuda, ("synchronize",)),
]
"""Calls that may wait for the device. All of their time counts as a wait."""
try:
    from lightning_eplb.parallel.symmetric_buffers import SymmetricBuffers

    WAITS.append((SymmetricBuffers, ("wait",)))
except ImportError:
    pass


def host_seconds(lanes: dict[str, Lane], batch: Batch, turns: int) -> dict[str, Any]:
    """Time Python in forward and in backward, which begin with an idle device on all ranks.

    Returns:
        For each lane ``forward``, ``backward`` and ``wait``, seconds of the slowest rank in each turn. Forward and
        backward are without the waits.
    """
    device = batch.hidden.device
    turns_of: dict[str, list[tuple[float, float, float]]] = {name: [] for name in lanes}
    with _Waits() as waits:
        for _ in range(turns + WARM_UP):
            for name, lane in lanes.items():
                hidden, weights = batch.leaves()
                lane.drop_gradients()
                with lane.active():
                    forward, waited, output = waits.time(device, lane.layer, hidden, batch.index, weights)
                    backward, waited_too, _ = waits.time(device, output.backward, batch.grad)
                turns_of[name].append((forward, backward, waited + waited_too))
    found: dict[str, Any] = {}
    for name, taken in turns_of.items():
        columns = zip(("forward", "backward", "wait"), zip(*taken[WARM_UP:], strict=True), strict=True)
        found[name] = {part: slowest_rank(list(seconds), device) for part, seconds in columns}
    return found


class _Waits:
    """Time of the calls that may wait for the device, from any thread. Calls inside of each other count once."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []
        self._seconds = 0.0
        self._depth = 0

    def __enter__(self) -> "_Waits":
        for owner, names in WAITS:
            for name in names:
                original = getattr(owner, name)
                self._originals.append((owner, name, original))
                setattr(owner, name, self._timed(original))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)

    def time(self, device: torch.device, call: Callable[..., Any], *args: Any) -> tuple[float, float, Any]:
        """Return seconds of ``call(*args)`` without its waits, seconds of its waits, and what it returned."""
        wait_for_all(device)
        self._seconds = 0.0
        start = time.perf_counter()
        returned = call(*args)
        taken, waited = time.perf_counter() - start, self._seconds
        return taken - waited, waited, returned

    def _timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self._seconds += time.perf_counter() - start

        return timed


def print_host(name: str, size: object, figures: dict[str, Any], errors: dict[str, float]) -> None:
    """Print milliseconds of each lane, medians, and the 10th to 90th percentile of forward and backward."""
    rows = []
    for lane, parts in figures.items():
        both = 1e3 * np.sum([parts["forward"], parts["backward"]], axis=0)
        low, middle, high = np.percentile(both, [10, 50, 90])
        medians = [f"{1e3 * np.median(parts[part]):.2f}" for part in ("forward", "backward", "wait")]
        error = f"{errors[lane]:.0e}" if lane in errors else ""
        rows.append([lane, *medians, f"{middle:.2f} ({low:.2f}-{high:.2f})", error])
    print(f"host milliseconds, {name}, {size}\n")
    print_table(["lane", "forward", "backward", "wait", "forward and backward (10th-90th)", "error"], rows)


def print_profile(lanes: dict[str, Lane], batch: Batch) -> None:
    """Print rank 0's kernels of each lane, and what they leave above the products. All ranks call it."""
    device = batch.hidden.device
    for name, lane in lanes.items():
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(PROFILED_TURNS):
                lane.take_turn(batch)
        if rank() == 0:
            _print_kernels(name, profiler, lane.seconds[-PROFILED_TURNS:])
        wait_for_all(device)


def _print_kernels(name: str, profiler: profile, seconds: list[float]) -> None:
    kernels = [
        {"kind": _kind(event.name), "name": event.name, "start": event.time_range.start / 1e3}
        | {"ms": event.time_range.elapsed_us() / 1e3}
        for event in profiler.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not kernels:
        print(f"{name}: the profiler saw no kernels\n")
        return
    from tests.benchmarks.timeline import covered  # it loads matplotlib

    kernels.sort(key=lambda kernel: kernel["start"])
    milliseconds, calls, kinds = Counter[str](), Counter[str](), Counter[str]()
    for kernel in kernels:
        milliseconds[kernel["name"]] += kernel["ms"] / PROFILED_TURNS
        calls[kernel["name"]] += 1
        kinds[kernel["kind"]] += kernel["ms"] / PROFILED_TURNS
    busy, turn = covered(kernels) / PROFILED_TURNS, 1e3 * float(np.median(seconds))
    parts = ", ".join(f"{kind} {kinds[kind]:.2f}" for kind in [*KINDS, "others"])
    print(f"{name}: {turn:.2f} ms a turn, the device is busy for {busy:.2f}: {parts}\n")
    rows = [
        [kernel[:MOST_LETTERS], f"{taken:.3f}", f"{calls[kernel] / PROFILED_TURNS:.1f}"]
        for kernel, taken in milliseconds.most_common(SHOWN_KERNELS)
    ]
    print_table(["kernel", "ms a turn", "calls"], rows)


def _kind(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "others")
