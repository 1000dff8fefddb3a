"""Statistics of a step by layer."""

import torch

from lightning_eplb.balancer.step_stats import StepStats


def test_balancedness_by_group_of_seven_layers_is_that_of_each_group() -> None:
    avg, most = torch.tensor([4.0, 4, 4, 4, 4, 0, 0]).double(), torch.tensor([4, 8, 4, 5, 16, 0, 0])
    served = StepStats(torch.zeros(7, 2, dtype=torch.int64), avg, most)
    assert served.balancedness_by_group() == {(0, 1): 8 / 12, (2, 3): 8 / 9, (4, 5): 4 / 16, (6, 6): 1.0}
    assert served.balancedness_by_group(1) == {(0, 6): 20 / 37}
    assert (served.avg_tokens, served.max_tokens, served.balancedness) == (20, 37, 20 / 37)
