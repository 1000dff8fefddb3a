"""Train a small MoE model on four ranks, go on with two of them, then with four again, without a checkpoint.

Ranks 2 and 3 hand over their experts and exit; later two new processes join. Runs on a CPU.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb import ExpertLoadBalancer, clip_grad_norm_, leave_experts_out_of_ddp, parallelize_experts

SIZES = (4, 2, 4)
"""Ranks of the process group, one after the other."""
MAPPINGS = ({0: 0, 1: 1, 2: -1, 3: -1}, {0: 0, 1: 1})
"""New rank of each rank, -1 if it leaves. Ranks that are not named join."""
STEPS, TOKENS, WIDTH, EXPERTS = 40, 96, 16, 8


class Experts(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.randn(num_experts, WIDTH, 2 * WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, 2 * WIDTH, WIDTH) / (2 * WIDTH) ** 0.5)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique():
            token, k = torch.where(top_k_index == expert)
            expert_output = torch.relu(hidden_states[token] @ self.up[expert]) @ self.down[expert]
            output = output.index_add(0, token, expert_output * top_k_weights[token, k, None])
        return output


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.head = nn.Linear(WIDTH, EXPERTS), Experts(EXPERTS), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states):
        weights, index = self.router(hidden_states).softmax(dim=-1).topk(2)
        return self.head(hidden_states + self.experts(hidden_states, index, weights))


def make_process_group(generation: int, rank: int, folder: str) -> None:
    # A file for each process group, since the ranks of one must not find those of another. On several nodes use tcp://.
    dist.init_process_group("gloo", f"file://{folder}/{generation}", rank=rank, world_size=SIZES[generation])


def share_dense_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give all ranks rank 0's optimizer state of dense parameters. DDP shares their weights."""
    experts = leave_experts_out_of_ddp(model)
    dense = [parameter for name, parameter in model.named_parameters() if name not in experts]
    states = [optimizer.state.get(parameter, {}) for parameter in dense]
    dist.broadcast_object_list(states, src=0)
    optimizer.state.update({parameter: state for parameter, state in zip(dense, states, strict=True) if state})


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    return tokens[mine], tokens.roll(1, dims=1).square()[mine]


def run(rank: int, generation: int, folder: str) -> None:
    """Run one process from a generation of the process group on, until it leaves or training ends."""
    torch.set_num_threads(1)
    torch.manual_seed(generation)  # those that join have other weights at first
    make_process_group(generation, rank, folder)
    model = Model()
    if generation == 0:
        parallelize_experts(model, num_redundant_experts=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if generation == 0:
        balancer = ExpertLoadBalancer(model, [optimizer], step_interval=20)
    else:
        balancer = ExpertLoadBalancer.join(model, [optimizer])
    while True:
        share_dense_state(model, optimizer)
        ddp = DistributedDataParallel(model)
        while balancer.num_steps < STEPS * (generation + 1):  # the counter is rank 0's, also on ranks that joined
            inputs, targets = batch(balancer.num_steps)
            (loss := nn.functional.mse_loss(ddp(inputs), targets)).backward()
            clip_grad_norm_(ddp, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            balancer.step()
        dist.all_reduce(loss.detach_())
        if rank == 0:
            size = dist.get_world_size()
            print(f"step {balancer.num_steps}, {size} ranks: loss {loss.item() / size:.6f}", flush=True)
        generation += 1
        if generation < len(SIZES):
            rank = balancer.resize(MAPPINGS[generation - 1], world_size=SIZES[generation])
        del ddp  # it would use the old process group
        dist.destroy_process_group()
        if rank < 0 or generation == len(SIZES):
            return
        make_process_group(generation, rank, folder)
        balancer.rejoin()


if __name__ == "__main__":
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        first = [context.Process(target=run, args=(rank, 0, folder)) for rank in range(4)]
        joining = [context.Process(target=run, args=(rank, 2, folder)) for rank in (2, 3)]
        for process in first:
            process.start()
        for left, joins in zip(first[2:], joining, strict=True):
            left.join()  # it has handed over its experts
            joins.start()
        for process in [*first, *joining]:
            process.join()
