"""Compile all kernels of the layer for a GPU that need not be there. Prints their names. Run by a test."""

from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lightning_eplb.parallel import direct_exchange, fused_experts, fused_form, fused_kernels, pair_kernels
from lightning_eplb.parallel.symmetric_buffers import Header, Region


class Driver:
    """Stands for the driver of a Hopper GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_kernel(kernel: Any, grid: Any, tensors: Any, numbers: Any, constants: Any) -> None:
    compiled = kernel.warmup(*tensors, *numbers, *constants, grid=grid)
    assert compiled.asm["cubin"]
    print(kernel.__name__)


def compile_direct_dispatch(dtype: torch.dtype, index_dtype: torch.dtype, ranks: int, top_k: int, width: int) -> None:
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


def compile_fused_experts() -> None:
    gpt_oss = fused_form.ActivationArguments(fused_form.SIGMOID, 1.702, 7.0, 1.0, fused_form.INTERLEAVED)
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    form = fused_form.FusedForm(names, gpt_oss, is_transposed=True, has_bias=True)
    shapes = [(32, 64, 96), (32, 96), (32, 48, 64), (32, 64)]
    parameters = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
    fused_experts.warm_up(form, parameters, [torch.float32])
    tokens = torch.zeros(4, 64, dtype=torch.bfloat16)
    weights: Tensor = torch.zeros(4, 8, dtype=torch.bfloat16)
    place, _, _ = pair_kernels.place_pairs(torch.zeros(4, 8, dtype=torch.int64), 32)
    rows, row_weights = pair_kernels.expand_tokens(tokens, place, weights)
    pair_kernels.sum_rows(rows, place, row_weights, torch.bfloat16)


def main() -> None:
    driver.set_active(Driver())  # type: ignore[arg-type]
    direct_exchange.launch = fused_kernels.launch = pair_kernels.launch = compile_kernel
    compile_fused_experts()
    compile_direct_dispatch(torch.bfloat16, torch.int64, ranks=2, top_k=8, width=2048)
    compile_direct_dispatch(torch.float64, torch.int32, ranks=4, top_k=3, width=7168)


if __name__ == "__main__":
    main()
