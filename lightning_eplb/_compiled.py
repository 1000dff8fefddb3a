"""Compilation of the integer loops of planning."""

import functools
import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

PACKAGE = Path(__file__).parent

_IMPORT_SECONDS = time.time()
_LOCK = threading.Lock()


@functools.cache
def folder() -> Path | None:
    """Return the folder of compiled loops: another one as soon as any file of the package with such loops changes.

    Numba looks at the file of the loop itself, but not at the files of those that it calls. ``None`` if a file changed
    after the import: its loops in memory must not be kept as those of the new file.
    """
    sources = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_bytes()
        if b"\n@compiled\n" in source or path.name == Path(__file__).name:
            if path.stat().st_mtime > _IMPORT_SECONDS:
                return None
            sources.update(source)
    root = Path(numba.config.CACHE_DIR) if numba.config.CACHE_DIR else PACKAGE / "__pycache__"  # type: ignore[attr-defined]
    return root / f"compiled-{sources.hexdigest()[:16]}"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over numpy arrays with numba, and keep the result on disk for the next process.

    Without fast math and without threads: additions stay in their order and nothing is fused, so that the result is
    the same, bit for bit, on every machine. A division by zero does not raise, so that loops have no way out in their
    middle. It compiles when it is first called, which takes some seconds; whoever must not wait then calls it before
    (see :meth:`lightning_eplb.policies.Policy.warm_up`). The result is kept beside the package or, where that can't be
    written, where numba keeps those of the user; ``NUMBA_CACHE_DIR`` names another place. Where none can be written,
    every process compiles anew. The place is looked up at the first call, so that an import reads no file for it.
    """
    loop: Any = numba.njit(function, error_model="numpy")
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return loop
    compile_now = loop.compile

    def compile_first(signature: Any) -> Any:
        with _LOCK:
            if loop.__dict__.pop("compile", None) is not None:
                _keep(loop)
        return compile_now(signature)

    loop.compile = compile_first
    return loop


def is_on_disk(loop: Callable[..., Any]) -> bool:
    """Return ``True`` if a process has compiled this loop, so that others load it."""
    return (kept := folder()) is not None and any(kept.rglob(f"*.{loop.__name__}-*.nbi"))


def _keep(loop: Any) -> None:
    """Look for compiled versions of a loop on disk, and keep there those that are compiled from now on."""
    others, place = numba.config.CACHE_DIR, folder()  # type: ignore[attr-defined]
    if place is None:
        return
    try:
        numba.config.CACHE_DIR = str(place)  # type: ignore[attr-defined]
        loop.enable_caching()
    except RuntimeError:  # no place can be written
        pass
    finally:
        numba.config.CACHE_DIR = others  # type: ignore[attr-defined]
