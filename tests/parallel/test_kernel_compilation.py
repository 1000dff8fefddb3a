"""Kernels of direct dispatch compile for a GPU. The interpreter accepts more than the compiler does."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[2]


class Driver:
    """Stands for the driver of a Hopper GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(dtype: torch.dtype, index_dtype: torch.dtype, ranks: int, top_k: int, width: int) -> None:
    from lightning_eplb.parallel import direct_exchange
    from lightning_eplb.parallel.symmetric_buffers import Header, Region

    tokens, slots_per_rank = 5, 8
    region = Region(torch.zeros(ranks, dtype=torch.int64), 1, 128, 256, 512, 1024)
    trip = region, Header(5, 7, tokens, 3)
    hidden, weights = torch.zeros(tokens, width, dtype=dtype), torch.zeros(tokens, top_k, dtype=dtype)
    index, table = torch.zeros(tokens, top_k, dtype=index_dtype), torch.zeros(9, dtype=torch.int32)
    report, errors = torch.zeros(1024, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    slots = direct_exchange.send(hidden, index, weights, table, slots_per_rank, *trip, report)
    direct_exchange.send(hidden, slots, weights, None, slots_per_rank, *trip, report)
    direct_exchange.send(hidden, slots, None, None, slots_per_rank, *trip)
    counts = direct_exchange.count_pairs(slots_per_rank, top_k, *trip, report, errors)
    own, (sum_dtype, _) = torch.zeros(slots_per_rank, dtype=torch.int32), direct_exchange.sum_dtype(hidden)
    placed = direct_exchange.place_pairs(own, slots_per_rank, top_k, sum_dtype, region, counts)
    rows = direct_exchange.expand(hidden, 0, 9, placed, top_k, region)
    direct_exchange.expand(hidden, 0, 9, placed, top_k, region, divisor=ranks)
    for output in (rows, None):
        _, grads = direct_exchange.expand_weighted(hidden, output, 0, 9, placed, top_k, region)
    for others in (rows[:0], rows):
        arguments = tokens, placed, top_k, *trip
        direct_exchange.send_sums((rows, others), None, True, *arguments)
        direct_exchange.send_sums((rows, others), (grads, grads), False, *arguments, factor=ranks)
    for weights_dtype in (None, dtype):
        direct_exchange.receive_sums(slots, slots_per_rank, hidden, weights_dtype, *trip, errors)


def main() -> None:
    from triton.runtime import driver

    from lightning_eplb.parallel import direct_exchange

    def compile_kernel(kernel: Any, grid: Any, tensors: Any, numbers: Any, constants: Any) -> None:
        kernel.warmup(*tensors, *numbers, *constants, grid=grid)

    driver.set_active(Driver())  # type: ignore[arg-type]
    direct_exchange.launch = compile_kernel
    compile_all(torch.bfloat16, torch.int64, ranks=2, top_k=8, width=2048)
    compile_all(torch.float64, torch.int32, ranks=4, top_k=3, width=7168)


def test_kernels_compile(tmp_path: Path) -> None:
    assert importlib.util.find_spec("triton") is not None
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    main()
