"""Policies that decide which rank holds which expert. Pure planning: no process group, no Lightning."""

from lightning_eplb.policies.balanced import BalancedPolicy
from lightning_eplb.policies.base import Costs, Outlook, Policy, Topology
from lightning_eplb.policies.deepseek import DeepSeekPolicy
from lightning_eplb.policies.static import StaticPolicy

__all__ = ["BalancedPolicy", "Costs", "DeepSeekPolicy", "Outlook", "Policy", "StaticPolicy", "Topology"]
