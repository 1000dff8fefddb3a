"""Compilation of the integer loops of planning."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

PACKAGE = Path(__file__).parent


def _folder() -> Path:
    """Return the folder of compiled loops: another one as soon as any file of the package with such loops changes.

    Numba looks at the file of the loop itself, but not at the files of those that it calls.
    """
    sources = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_bytes()
        if b"\n@compiled\n" in source or path.name == Path(__file__).name:
            sources.update(source)
    root = Path(numba.config.CACHE_DIR) if numba.config.CACHE_DIR else PACKAGE / "__pycache__"  # type: ignore[attr-defined]
    return root / f"compiled-{sources.hexdigest()[:16]}"


FOLDER = _folder()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over numpy arrays with numba, and keep the result on disk for the next process.

    Without fast math and without threads: additions stay in their order and nothing is fused, so that the result is
    the same, bit for bit, on every machine. A division by zero does not raise, so that loops have no way out in their
    middle. It compiles when it is first called, which takes some seconds; whoever must not wait then calls it before
    (see :meth:`lightning_eplb.policies.Policy.warm_up`). The result is kept beside the package or, where that can't be
    written, where numba keeps those of the user; ``NUMBA_CACHE_DIR`` names another place. Where none can be written,
    every process compiles anew.
    """
    others = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    try:
        numba.config.CACHE_DIR = str(FOLDER)  # type: ignore[attr-defined]
        return numba.njit(cache=True, error_model="numpy")(function)
    except RuntimeError:  # no place can be written
        return numba.njit(function, error_model="numpy")
    finally:
        numba.config.CACHE_DIR = others  # type: ignore[attr-defined]


def is_on_disk(loop: Callable[..., Any]) -> bool:
    """Return ``True`` if a process has compiled this loop, so that others load it."""
    return any(FOLDER.rglob(f"*.{loop.__name__}-*.nbi"))
