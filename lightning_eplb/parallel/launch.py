"""Launches of Triton kernels with little host time.

``kernel[grid](...)`` looks at every argument to find the compiled kernel. It returns the compiled kernel, which is
launched directly from then on. Measured on a layer of eight launches: 1.40 ms of host time instead of 1.79, a part of
which comes from one autograd node instead of three.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

ALIGNMENT = 16
"""Bytes. Triton compiles a kernel for pointers that are multiples of it, and another for those that are not."""

_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any, grid: tuple[int, int], tensors: Sequence[Tensor], numbers: tuple[int, ...], constants: tuple
) -> None:
    """Launch a kernel on the current device and stream, with four warps.

    Args:
        kernel: Kernel whose parameters are ``tensors``, ``numbers`` and ``constants``, in this order. It must not
            specialize any of ``numbers``.
        grid: Programs along two dimensions, each at least 1.
        tensors: Tensors of one device.
        numbers: Numbers from 0 to 2^31 - 1.
        constants: Values of the ``tl.constexpr`` parameters.
    """
    key: tuple | None = (id(kernel), tensors[0].device.index, constants, *[tensor.dtype for tensor in tensors])
    for tensor in tensors:
        if tensor.data_ptr() % ALIGNMENT:
            key = None
    compiled = None if key is None else _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1)](*tensors, *numbers, *constants)
        return
    compiled = kernel[grid](*tensors, *numbers, *constants)
    if key is not None and compiled is not None:  # the interpreter returns None
        _compiled[key] = compiled


def num_blocks(number: int, size: int) -> int:
    """Return how many blocks of ``size`` hold ``number`` elements. ``triton.cdiv`` takes the host 2 µs."""
    return -(-number // size)


def power_of_2(number: int) -> int:
    """Return the lowest power of 2 from ``number`` up, 1 at least."""
    return 1 << max(0, number - 1).bit_length()
