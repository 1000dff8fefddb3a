"""The balancer: records the load of optimizer steps, plans rearrangements and carries them out."""

from lightning_eplb.balancer.balancer import ExpertLoadBalancer

__all__ = ["ExpertLoadBalancer"]
