"""Launch of Triton kernels with less work on the host: the compiled kernel is kept and launched again.

Triton's own launch specialises every argument anew, which takes 20 to 50 µs. Here kernels are kept by the dtypes and
alignments of tensors and by constants, without a look at numbers. So kernels must not specialise on numbers, and
numbers must fit in 32 bits.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class KernelLauncher:
    """Launcher of one kernel.

    Args:
        kernel: Kernel with ``do_not_specialize`` for all of its numbers. Tensors come first, constants last.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: Sequence[Tensor],
        numbers: Sequence[int],
        constants: tuple[Any, ...],
        num_warps: int = 4,
    ) -> None:
        """Launch the kernel on the current stream.

        Args:
            grid: Programs, one to three dimensions.
            tensors: Tensors on the current device.
            numbers: Integers.
            constants: Values of parameters that are ``tl.constexpr``.
            num_warps: Warps of a program.
        """
        layouts = [(tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors]
        key = (constants, num_warps, tensors[0].device, *layouts)
        compiled = self._compiled.get(key)
        if compiled is None:
            # An interpreted kernel returns None, and is launched this way each time.
            self._compiled[key] = self._kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)
            return
        try:
            compiled[grid + (1,) * (3 - len(grid))](*tensors, *numbers, *constants)
        except TypeError:  # a release of Triton with another signature
            self._compiled[key] = None
            self._kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)
