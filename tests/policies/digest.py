"""Prints one digest of many plans and forecasts, for processes with other settings to compare."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

import lightning_eplb
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, Costs, Outlook, Topology
from lightning_eplb.policies.forecast import forecast, sub_windows

SETTINGS = {
    "default": {},
    "threads": {"OMP_NUM_THREADS": "3", "NUMBA_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "3"},
    "plain processor": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
}


def start(name: str, **environment: str) -> "subprocess.Popen[str]":
    """A process with the settings of this name, that prints the digest."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.policies.digest"],
        cwd=Path(__file__).parents[2],  # the package beside these tests, wherever another is installed
        env={**os.environ, **SETTINGS[name], **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_on_plain_processor(cache_folder: str) -> "subprocess.Popen[str]":
    """The same without the instructions that not every processor has. It compiles all loops anew, for a minute."""
    try:
        from numpy._core import _multiarray_umath as numpy_core  # the features that numpy chooses loops by
    except ImportError:  # numpy 1
        from numpy.core import _multiarray_umath as numpy_core

    disabled = [name for name in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__.get(name)]
    return start("plain processor", NUMBA_CACHE_DIR=cache_folder, NPY_DISABLE_CPU_FEATURES=" ".join(disabled))


def printed_by(process: "subprocess.Popen[str]") -> str:
    output, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors
    digest, package = output.splitlines()
    assert package == lightning_eplb.__file__
    return digest


def main() -> None:
    digest = hashlib.sha256()
    integers = np.random.default_rng(0).integers
    shapes = (64, 8, 8, 2), (64, 8, 16, 1), (48, 4, 0, 1), (128, 16, 16, 2), (64, 64, 64, 2)
    for experts, ranks, redundant, nodes in shapes:
        products = integers(1, 100, (40, 3, experts)) * integers(1, 100, (3, experts)) * integers(1, 100, (3, experts))
        ahead = forecast(products)
        for part in (ahead.load, ahead.first, ahead.spread):
            digest.update(part.astype("<i8").tobytes())
        before = ExpertPlacement.initial(3, experts, ranks, redundant)
        for topology in (Topology.even(ranks, nodes), Topology((0,) * ranks, (0.3,) + (0.7,) * (ranks - 1))):
            digest.update(BalancedPolicy().rearrange(products.sum(axis=0), before, topology).digest())
            costs, windows = Costs(0.1, 30.0, 70.0, 0.3), sub_windows(products)
            outlook = Outlook(products.sum(axis=0), 40, ahead, 100, costs, windows)
            digest.update(BalancedPolicy(7).look_ahead(outlook, before, topology).digest())
    print(digest.hexdigest(), lightning_eplb.__file__, sep="\n")


if __name__ == "__main__":
    main()
