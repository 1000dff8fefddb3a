"""How the integer loops of planning are compiled."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over numpy arrays with numba, and keep the result on disk for the next process.

    Without fast math and without threads: additions stay in their order and nothing is fused, so that the result is
    the same, bit for bit, on every machine. It compiles when it is first called; whoever must not wait then calls it
    before (see :meth:`lightning_eplb.policies.Policy.warm_up`).

    Note:
        What is kept is renewed when the function's own file changes, but not when that of a function which it calls
        does. Who edits one deletes the ``*.nbi`` and ``*.nbc`` files in ``__pycache__``.
    """
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # neither the package's directory nor the user's cache can be written
        return numba.njit(function)
