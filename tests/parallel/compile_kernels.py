"""Compile the kernels of fused experts for a GPU that need not be there. Prints their names. Run by a test."""

import sys

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_eplb.parallel import fused_experts, fused_form, fused_kernels, pair_kernels

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def main(capability: int) -> None:
    def launch(kernel, grid, tensors, numbers, constants) -> None:
        types = [*(POINTERS[tensor.dtype] for tensor in tensors), *("i32" for _ in numbers)]
        names = kernel.arg_names
        signature = dict(zip(names, [*types, *("constexpr" for _ in constants)], strict=True))
        source = ASTSource(kernel, signature, dict(zip(names[len(types) :], constants, strict=True)))
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"]
        print(kernel.__name__)

    fused_kernels.launch = pair_kernels.launch = launch
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


if __name__ == "__main__":
    main(int(sys.argv[1]))
