"""Models under ``torch.compile``: what is compiled lies between the layers' exchanges."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_eplb import ExpertLoadBalancer, parallelize_experts
from tests.fidelity import ShufflePolicy
from tests.parallel.test_forward import EXPERTS, WIDTH, layer
from tests.workers import Workers

LAYERS = torch._dynamo.config.recompile_limit + 1
STEPS, TOKENS = 4, 6


class Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, dtype=torch.float64)
        self.experts = experts

    def forward(self, hidden: Tensor) -> Tensor:
        weights, index = self.router(hidden).softmax(-1).topk(2, dim=-1)
        return hidden + torch.tanh(self.experts(hidden, index, weights))


def train(model: nn.Module, step: Any, balancer: ExpertLoadBalancer | None = None) -> list[Tensor]:
    """Outputs of a few steps, on other tokens in each, as many on all ranks and the same."""
    optimizer, outputs = torch.optim.SGD(model.parameters(), lr=0.1), []
    if balancer is not None:
        balancer.optimizers = [optimizer]
    generator = torch.Generator().manual_seed(1)
    for i in range(STEPS):
        output = step(torch.randn(TOKENS + i, WIDTH, generator=generator, dtype=torch.float64))
        outputs.append(output.detach())
        output.square().sum().backward()
        optimizer.step()
        if balancer is not None:
            balancer.step()
        optimizer.zero_grad()
    return outputs


def difference() -> float:
    """On every worker: between a compiled model whose experts move after each step and the unmodified one."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(layer()) for _ in range(LAYERS)))
    torch.manual_seed(0)
    original = nn.Sequential(*(Block(layer()) for _ in range(LAYERS)))
    parallelize_experts(model, num_redundant_experts=2)
    balancer = ExpertLoadBalancer(model, policy=ShufflePolicy(), step_interval=1)
    for block in model:
        block.compile(backend="aot_eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        outputs = train(model, model, balancer)
    return max(float((a - b).abs().max()) for a, b in zip(outputs, train(original, original), strict=True))


def test_compiled_model_on_two_ranks_trains_as_unmodified(workers: Workers) -> None:
    assert max(workers.run(2, difference)) < 1e-12


class Experts(nn.Module):
    """Without the loop over experts that Hugging Face's ``eager`` ones have, which dynamo leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH, dtype=torch.float64))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return torch.einsum("td,tkdw,tk->tw", hidden, self.weight[top_k_index], top_k_weights)


def test_compiled_model_on_one_rank_compiles_experts() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def noted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    block, original = Block(Experts()), Block(Experts())
    original.load_state_dict(block.state_dict())
    parallelize_experts(block)
    balancer = ExpertLoadBalancer(block)
    hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    assert torch.equal(torch.compile(block, backend=noted)(hidden), original(hidden))
    balancer.step()
    assert balancer.load.compute()["load"].sum() == 2 * TOKENS
    assert any(node.target is torch.functional.einsum for graph in graphs for node in graph.graph.nodes)
