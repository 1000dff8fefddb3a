"""The balancer: from the tokens of optimizer steps to decisions, and to the moves of experts."""

from lightning_eplb.balancer.balancer import ExpertLoadBalancer

__all__ = ["ExpertLoadBalancer"]
