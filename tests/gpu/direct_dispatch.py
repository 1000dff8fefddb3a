"""Direct dispatch on GPUs: outputs, gradients and trained weights are those of one process, and failures are told.

One process a rank, as ``torchrun`` starts them, or any launcher that sets the same variables::

    torchrun --nproc-per-node 2 tests/gpu/direct_dispatch.py

Compares converted layers with the unmodified ones in float64: with redundant experts, with activation checkpointing,
with numbers of tokens that differ by rank, with none on one rank. Then trains with accumulated gradients and with all
experts shuffled after every second step. Last, ranks call different layers, and one rank stays away. Ends with status 1
if anything differs by more than 1e-10.
"""

import argparse
import faulthandler
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_eplb import ExpertLoadBalancer, parallelize_experts
from lightning_eplb.parallel import symmetric_buffers
from lightning_eplb.parallel.direct_dispatch import DirectDispatcher
from lightning_eplb.parallel.parallelize import expert_layers
from tests.fidelity import ShufflePolicy

EXPERTS, WIDTH, HIDDEN, TOP_K = 16, 64, 96, 4


class Experts(nn.Module):
    """Experts with a gate, the same weights in every process."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * HIDDEN, **options) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH, **options) / HIDDEN**0.5)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, k = torch.where(top_k_index == expert)
            gate, up = (hidden_states[token] @ self.gate_up[expert]).chunk(2, dim=-1)
            rows = (nn.functional.silu(gate) * up) @ self.down[expert]
            output = output.index_add(0, token, rows * top_k_weights[token, k, None])
        return output


def batch(device: torch.device, rank: int, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)
    scores = torch.rand(tokens, EXPERTS, generator=generator, dtype=torch.float64)
    scores[:, 0] += 0.5  # a hot expert
    weights, index = scores.topk(TOP_K, dim=-1)
    index[::7, -1] = EXPERTS  # nobody's
    weights = weights.masked_fill(index == EXPERTS, 0.0)
    return hidden.to(device), index.to(device), weights.to(device)


def largest(ours: Any, theirs: Any) -> float:
    assert ours.shape == theirs.shape
    return float((ours.detach() - theirs.detach()).abs().max()) if ours.numel() else 0.0


def layer_difference(
    device: torch.device,
    tokens_of_rank: Callable[[int], int],
    redundant: int = 0,
    redundancy: Any = "window",
    run: Callable[..., Any] = lambda module, *args: module(*args),
) -> float:
    """The largest difference of outputs and gradients over three steps, between which all experts move."""
    rank, size = dist.get_rank(), dist.get_world_size()
    original, converted = Experts().to(device), Experts().to(device)
    holder = nn.ModuleDict({"experts": converted})
    parallelize_experts(holder, num_redundant_experts=redundant)
    (layer, _), *_ = expert_layers(holder)
    least = {"min_tokens_per_copy": 1} if redundancy == "batch" else {}
    balancer = ExpertLoadBalancer(holder, policy=ShufflePolicy(), step_interval=1, redundancy=redundancy, **least)
    differences = []
    for step in range(3):
        hidden, index, weights = batch(device, rank, max(tokens_of_rank(rank) + step, 0), step)
        outputs, inputs = [], []
        for module in (original, converted):
            for parameter in module.parameters():
                parameter.grad = torch.zeros_like(parameter)
            x, w = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
            output = run(module, x, index, w)
            output.square().sum().backward()
            outputs.append(output)
            inputs.append((x.grad, w.grad))
        assert isinstance(layer.dispatcher, DirectDispatcher)
        assert layer.dispatcher.is_direct
        differences.append(largest(*outputs))
        theirs, ours = inputs
        kept = index < EXPERTS
        differences += [largest(ours[0], theirs[0]), largest(ours[1][kept], theirs[1][kept])]
        assert not ours[1][~kept].any()
        for name, parameter in converted.named_parameters():
            expected = original.get_parameter(name).grad
            assert expected is not None
            dist.all_reduce(expected)
            differences.append(largest(parameter.grad, expected[layer.local_experts.to(device)] / size))
        balancer.step()
    return max(differences)


def checkpointed(reentrant: bool) -> Callable[..., Any]:
    return lambda module, *args: checkpoint(module, *args, use_reentrant=reentrant)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Experts(0), Experts(1)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        hidden = hidden + self.first(hidden, index, weights)
        return hidden + self.second(hidden, index, weights)


def training_difference(device: torch.device, redundant: int, recomputes: bool) -> float:
    """Of losses and trained weights, with gradients of two batches summed and experts moved every two steps."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, reference = Stack().to(device), Stack().to(device)
    parallelize_experts(model, num_redundant_experts=redundant)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, reference)]
    balancer = ExpertLoadBalancer(model, optimizers[:1], policy=ShufflePolicy(), step_interval=2)
    differences = []
    for step in range(6):
        losses = torch.zeros(2, dtype=torch.float64, device=device)
        for half in range(2):
            seed = 2 * step + half
            for source in range(size):
                loss = reference(*batch(device, source, 40 + 11 * source, seed)).square().mean() / 2
                (loss / size).backward()
                losses[0] += loss.detach() / size
            mine = batch(device, rank, 40 + 11 * rank, seed)
            output = checkpoint(model, *mine, use_reentrant=False) if recomputes else model(*mine)
            loss = output.square().mean() / 2
            loss.backward()
            losses[1] += loss.detach() / size
        dist.all_reduce(losses[1])
        differences.append(float((losses[0] - losses[1]).abs()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        balancer.step()
    assert balancer.num_rearrangements == 3
    ours = model.state_dict()
    return max(
        differences + [largest(ours[name].to(device), tensor) for name, tensor in reference.state_dict().items()]
    )


def other_layers(device: torch.device) -> str:
    model = Stack().to(device)
    parallelize_experts(model)
    mine = batch(device, dist.get_rank(), 20, 0)
    model(*mine)
    try:
        (model.second if dist.get_rank() else model.first)(*mine)
    except RuntimeError as error:
        return str(error)
    return "no error"


def absent_rank(device: torch.device) -> str:
    """The last rank ends without a word. The others raise."""
    model = Stack().to(device)
    parallelize_experts(model)
    for layer, _ in expert_layers(model):
        layer.groups.shared.clear()  # buffers in which ranks have disagreed raise from then on
    mine = batch(device, dist.get_rank(), 20, 0)
    model(*mine)
    torch.cuda.synchronize()
    dist.barrier()
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    with patch.object(symmetric_buffers, "TIMEOUT", timedelta(seconds=5)):
        try:
            model(*mine)
        except RuntimeError as error:
            return str(error)
    return "no error"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=int, default=100, help="after which stacks are printed")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(arguments.seconds, exit=True)
    torch.set_num_threads(1)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    size = dist.get_world_size()
    cases: dict[str, Callable[[], float]] = {
        "plain": lambda: layer_difference(device, lambda rank: 50),
        "ragged": lambda: layer_difference(device, lambda rank: 30 + 170 * rank),
        "no token on one rank": lambda: layer_difference(device, lambda rank: -3 if rank else 40),
        "redundant, window": lambda: layer_difference(device, lambda rank: 30 + rank, 2 * size),
        "redundant, batch": lambda: layer_difference(device, lambda rank: 30 + rank, 2 * size, "batch"),
        "checkpoint": lambda: layer_difference(device, lambda rank: 30 + rank, run=checkpointed(False)),
        "reentrant checkpoint": lambda: layer_difference(device, lambda rank: 30, size, run=checkpointed(True)),
        "training": lambda: training_difference(device, 0, False),
        "training, redundant, recomputed": lambda: training_difference(device, size, True),
    }
    worst = 0.0
    for name, case in cases.items():
        found = torch.tensor(case(), dtype=torch.float64, device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        worst = max(worst, float(found))
        if dist.get_rank() == 0:
            print(f"{name}: {float(found):.2e}", flush=True)
    message = other_layers(device)
    is_told = "EP ranks call different layers" in message
    if dist.get_rank() == 0:
        print(f"different layers: {message}", flush=True)
    message = absent_rank(device)
    is_told &= "did not take part in its exchange of tokens" in message
    if dist.get_rank() == 0:
        print(f"absent rank: {message}", flush=True)
    sys.stdout.flush()
    os._exit(int(worst > 1e-10 or not is_told))  # the device still waits for the absent rank


if __name__ == "__main__":
    sys.exit(main())
