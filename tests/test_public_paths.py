"""Paths that the README, the changelog, examples, messages and docstrings name can be imported."""

import re
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCUMENTED = [
    "lightning_eplb.BalancedPolicy",
    "lightning_eplb.DeepSeekPolicy",
    "lightning_eplb.EPLBCallback",
    "lightning_eplb.ExpertLoad",
    "lightning_eplb.ExpertLoadBalancer",
    "lightning_eplb.ExpertLoadBalancer.step",
    "lightning_eplb.ExpertParallelStrategy",
    "lightning_eplb.ExpertPlacement",
    "lightning_eplb.Policy",
    "lightning_eplb.StaticPolicy",
    "lightning_eplb.Topology",
    "lightning_eplb.balancedness",
    "lightning_eplb.clip_grad_norm_",
    "lightning_eplb.fully_shard_moe",
    "lightning_eplb.leave_experts_out_of_ddp",
    "lightning_eplb.load_weights",
    "lightning_eplb.logical_parameters",
    "lightning_eplb.materialize",
    "lightning_eplb.parallelize_experts",
    "lightning_eplb.balancer.ExpertLoadBalancer",
    "lightning_eplb.callback.EPLBCallback",
    "lightning_eplb.checkpoint.install_optimizer_hooks",
    "lightning_eplb.checkpoint.logical_parameters",
    "lightning_eplb.cli.main",
    "lightning_eplb.forecast.Forecast.error",
    "lightning_eplb.forecast.sub_windows",
    "lightning_eplb.functional.rank_tokens",
    "lightning_eplb.functional.slot_tokens",
    "lightning_eplb.logging.draw_before_after",
    "lightning_eplb.logging.heatmap.draw_expert_load",
    "lightning_eplb.metrics.ExpertLoad",
    "lightning_eplb.parallel.clipping.clip_by_norm_of_all_",
    "lightning_eplb.parallel.dispatch.TokenDispatcher",
    "lightning_eplb.parallel.expert_layer.ExpertLayer",
    "lightning_eplb.parallel.fully_shard.fully_shard_moe",
    "lightning_eplb.parallel.gradient_hooks.wrap_hooks",
    "lightning_eplb.parallel.scaling.share_overflow",
    "lightning_eplb.parallel.barrier.monitored_barrier",
    "lightning_eplb.placement.ExpertPlacement",
    "lightning_eplb.policies.Policy.warm_up",
    "lightning_eplb.policies.deepseek.rebalance_experts",
    "lightning_eplb.policies.scenarios",
    "lightning_eplb.policies.token_split.rank_weights",
    "lightning_eplb.relocation.async_transfer.AsyncTransfer",
    "lightning_eplb.report.prepare",
    "lightning_eplb.scalars.SCALARS",
    "lightning_eplb.schedule.Schedule",
    "lightning_eplb.simulate.Setting",
    "lightning_eplb.simulate.replay",
    "lightning_eplb.steps.Rearrangement",
    "lightning_eplb.steps.StepLoad",
    "lightning_eplb.strategies.ExpertParallelStrategy",
]


@pytest.mark.parametrize("path", DOCUMENTED)
def test_documented_path_of_moved_module_resolves(path: str) -> None:
    assert resolve_name(path) is not None


def test_paths_in_text_resolve() -> None:
    files = [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md"]
    for folder in ("examples", "lightning_eplb"):
        files += [path for path in (REPOSITORY / folder).rglob("*") if path.suffix in (".py", ".yaml", ".md")]
    for path in files:
        for name in re.findall(r"\blightning_eplb(?:\.[A-Za-z_]\w*)+", path.read_text()):
            assert _leads_somewhere(name), f"{name} in {path.relative_to(REPOSITORY)}"


def _leads_somewhere(name: str) -> bool:
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        try:  # a module that needs what is not installed here, as kernels do
            return find_spec(name) is not None
        except ModuleNotFoundError:
            return False
    return True
