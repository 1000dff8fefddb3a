"""The example of ranks that leave and join runs, and its guide names what it has."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.elastic_loop import EXPERTS, MAPPINGS, SIZES, STEPS, Model
from lightning_eplb import ExpertLoadBalancer
from lightning_eplb.relocation.resize_plan import check_rank_mapping

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "examples/guides/elastic.md").read_text()


def test_elastic_loop_has_mappings_that_fit() -> None:
    for mapping, old_size, size in zip(MAPPINGS, SIZES, SIZES[1:], strict=False):
        assert check_rank_mapping(mapping, old_size, size, None, [EXPERTS]).world_size == size


def test_guide_names_methods_and_compiles() -> None:
    for name in set(re.findall(r"(?:balancer|ExpertLoadBalancer)\.(\w+)\(", GUIDE)):
        assert callable(getattr(ExpertLoadBalancer, name)), name
    for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
        compile(block, "elastic.md", "exec")


@pytest.mark.slow
@pytest.mark.distributed
def test_elastic_loop_trains_as_one_process_does() -> None:
    run = subprocess.run(
        [sys.executable, "examples/elastic_loop.py"], cwd=ROOT, capture_output=True, text=True, timeout=280, check=True
    )
    printed = re.findall(r"step (\d+), (\d+) ranks: loss ([\d.]+)", run.stdout)
    assert [(int(step), int(ranks)) for step, ranks, _ in printed] == [
        (STEPS * (i + 1), ranks) for i, ranks in enumerate(SIZES)
    ]
    assert [float(loss) for _, _, loss in printed] == pytest.approx(losses_of_one_process(), rel=0.01)


def losses_of_one_process() -> list[float]:
    """Return the losses of the last step of each part, of the same model and batches, in float32."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(len(SIZES) * STEPS):
        tokens = torch.randn(96, 16, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.mse_loss(model(tokens), tokens.roll(1, dims=1).square())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % STEPS == 0:
            losses.append(loss.item())
    return losses
