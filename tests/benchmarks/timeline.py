"""Show where a step's time goes: a table and a picture of a trace that ``torch.profiler`` exported on a GPU.

``python tests/benchmarks/timeline.py TRACE.json.gz ... -o PICTURE.png``, one row of the picture for each trace and
stream. Exchanges in which a rank waits for others are as long as that wait: under imbalance the emptier ranks' are.
"""

import argparse
import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.report import print_table

KINDS = {
    "exchange": ("SendRecv",),
    "other collectives": ("nccl",),
    "experts' products": ("cutlass", "grouped"),
    "other products": ("nvjet", "gemm", "cublas", "xmma", "flash", "fmha"),
    "optimizer": ("multi_tensor_apply",),
    "rows in other orders": ("gather_kernel", "_put", "_sum", "index", "scatter", "RadixSort", "DeviceRadix"),
}
"""By what a kernel's name contains; the first that fits. All others are element by element."""
REST = "element by element"


def main() -> None:
    """Print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("traces", type=Path, nargs="+", metavar="TRACE")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture")
    arguments = parser.parse_args()
    steps = {path.name.split(".")[0]: last_step(path) for path in arguments.traces}
    print_shares(steps)
    draw(steps, arguments.output)


def last_step(path: Path) -> list[dict[str, Any]]:
    """The kernels from one optimizer step's end to the next one's, the last that the trace has."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    optimizer = [
        e for e in kernels if kind_of(e) == "optimizer" and e["args"]["stream"] == kernels[0]["args"]["stream"]
    ]
    ends = [one for one, other in zip(optimizer, [*optimizer[1:], None], strict=True) if is_last(one, other)]
    start, stop = (end["ts"] + end["dur"] for end in ends[-2:])
    return [
        {"kind": kind_of(e), "stream": e["args"]["stream"], "start": (e["ts"] - start) / 1e3, "ms": e["dur"] / 1e3}
        for e in kernels
        if start <= e["ts"] < stop
    ]


def is_last(one: dict[str, Any], other: dict[str, Any] | None) -> bool:
    return other is None or other["ts"] - one["ts"] > 3e4  # microseconds: a forward lies between


def kind_of(kernel: dict[str, Any]) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in kernel["name"] for part in parts)), REST)


def print_shares(steps: dict[str, list[dict[str, Any]]]) -> None:
    rows = []
    for name, kernels in steps.items():
        shares: dict[str, float] = defaultdict(float)
        for kernel in kernels:
            shares[kernel["kind"]] += kernel["ms"]
        length = max(kernel["start"] + kernel["ms"] for kernel in kernels)
        idle = length - covered(kernels)
        rows.append([name, f"{length:.1f}", *(f"{shares[kind]:.1f}" for kind in [*KINDS, REST]), f"{idle:.1f}"])
    print_table(["ms of a step", "all", *KINDS, REST, "idle"], rows)


def covered(kernels: list[dict[str, Any]]) -> float:
    """Milliseconds in which at least one kernel ran."""
    total, until = 0.0, 0.0
    for kernel in kernels:
        stop = kernel["start"] + kernel["ms"]
        total += max(0.0, stop - max(kernel["start"], until))
        until = max(until, stop)
    return total


def draw(steps: dict[str, list[dict[str, Any]]], output: Path) -> None:
    lines = [(name, stream) for name, kernels in steps.items() for stream in sorted({k["stream"] for k in kernels})]
    figure, axes = plt.subplots(figsize=(14, 1.2 + 0.6 * len(lines)), layout="constrained")
    colours = dict(zip([*KINDS, REST], plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for height, (name, stream) in enumerate(reversed(lines)):
        for kind, colour in colours.items():
            of_kind = [k for k in steps[name] if k["stream"] == stream and k["kind"] == kind]
            spans = [(kernel["start"], kernel["ms"]) for kernel in of_kind]
            axes.broken_barh(spans, (height - 0.4, 0.8), color=colour, label=kind if height == 0 else None)
    axes.set_yticks(range(len(lines)), [f"{name}, stream {stream}" for name, stream in reversed(lines)])
    axes.set_xlabel("milliseconds since the last optimizer step's end")
    axes.legend(ncols=len(colours), loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
