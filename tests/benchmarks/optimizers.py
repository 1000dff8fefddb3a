"""A table of optimizers: do they train experts alike whether or not rows are together, and what is said of them?

``pip install pytorch-optimizer``, then ``python -m tests.benchmarks.optimizers``. The truth knows nothing of the trial:
a parameter as a whole against its two halves, 200 steps of random gradients and 1500 towards a minimum.
"""

import random
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_eplb.relocation.optimizer_check import check_optimizers

SHAPE = (4, 6, 5)
EQUAL = 1e-10


def kinds() -> dict[str, type[Optimizer]]:
    """Those of pytorch-optimizer and of torch."""
    from pytorch_optimizer.optimizer import OPTIMIZERS  # type: ignore[import-not-found]

    everything = [*OPTIMIZERS.values(), *(getattr(torch.optim, name) for name in dir(torch.optim))]
    chosen = {kind for kind in everything if isinstance(kind, type) and issubclass(kind, Optimizer)} - {Optimizer}
    return {f"{kind.__module__.split('.')[0]}.{kind.__name__}": kind for kind in sorted(chosen, key=repr)}


def random_gradient(step: int, weights: Tensor, start: Tensor, numbers: torch.Generator) -> Tensor:
    sizes = 10 ** (4 * torch.rand(SHAPE[0], 1, 1, dtype=torch.float64, generator=numbers) - 3)
    gradient = sizes * torch.randn(SHAPE, dtype=torch.float64, generator=numbers)
    if step % 7 == 3:
        gradient[step % SHAPE[0]] = 0
    return gradient


def towards_a_minimum(step: int, weights: Tensor, start: Tensor, numbers: torch.Generator) -> Tensor:
    return weights + 3 * start.flip(0) + torch.randn(SHAPE, dtype=torch.float64, generator=numbers)


def trained(make: Callable, rows: slice, steps: int, gradient: Callable) -> Tensor:
    numbers = torch.Generator().manual_seed(7)
    start = torch.randn(SHAPE, dtype=torch.float64, generator=numbers)
    parameter = nn.Parameter(start[rows].clone())
    optimizer = make([parameter])
    for step in range(steps):
        whole = torch.zeros_like(start)
        whole[rows] = parameter.detach()
        parameter.grad = gradient(step, whole, start, numbers)[rows].clone()
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)
        optimizer.step()
    return parameter.detach() - start[rows]


def difference(make: Callable) -> float:
    """Between a whole parameter and its halves, as a part of how far it came."""
    worst = 0.0
    for steps, gradient in ((200, random_gradient), (1500, towards_a_minimum)):
        whole = trained(make, slice(0, 4), steps, gradient)
        halves = torch.cat([trained(make, slice(0, 2), steps, gradient), trained(make, slice(2, 4), steps, gradient)])
        worst = max(worst, float((whole - halves).abs().max() / whole.abs().max().clamp_min(1e-30)))
    return worst


def verdict(make: Callable) -> str:
    experts, other = nn.Parameter(torch.randn(4, 8, 7)), nn.Parameter(torch.randn(9))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            check_optimizers([make([other, experts])], {"experts": experts})
        except ValueError as error:
            return f"refused: {str(error)[:80]}"
        return next((f"warned: {w.message}"[:80] for w in told if "tried out" in str(w.message)), "welcome")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, kind in kinds().items():
        try:
            made = verdict(kind)
            truth = difference(kind)
        except Exception as error:
            print(f"{name:40} {type(error).__name__}: {str(error)[:70]}")
            continue
        is_right = (truth < EQUAL) == (made == "welcome")
        print(f"{' ' if is_right else '!'} {name:38} {truth:8.0e}  {made}")


if __name__ == "__main__":
    main()
