"""Expert-parallel load balancing for training Mixture-of-Experts models with PyTorch Lightning."""

from lightning_eplb.balancer import ExpertLoadBalancer
from lightning_eplb.callback import EPLBCallback
from lightning_eplb.checkpoint import logical_parameters
from lightning_eplb.checkpoint.weights import load_weights
from lightning_eplb.functional import balancedness
from lightning_eplb.integrations.ddp import leave_experts_out_of_ddp
from lightning_eplb.integrations.preemption import PreemptionCheckpoint
from lightning_eplb.metrics import ExpertLoad
from lightning_eplb.parallel.clipping import clip_grad_norm_
from lightning_eplb.parallel.fully_shard import fully_shard_moe
from lightning_eplb.parallel.materialize import materialize
from lightning_eplb.parallel.parallelize import parallelize_experts
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import BalancedPolicy, DeepSeekPolicy, Policy, StaticPolicy, Topology
from lightning_eplb.router_bias import RouterBiasCallback, RouterBiases
from lightning_eplb.strategies import ExpertParallelStrategy

__version__ = "0.1.0"

__all__ = [
    "BalancedPolicy",
    "DeepSeekPolicy",
    "EPLBCallback",
    "ExpertLoad",
    "ExpertLoadBalancer",
    "ExpertParallelStrategy",
    "ExpertPlacement",
    "Policy",
    "PreemptionCheckpoint",
    "RouterBiasCallback",
    "RouterBiases",
    "StaticPolicy",
    "Topology",
    "balancedness",
    "clip_grad_norm_",
    "fully_shard_moe",
    "leave_experts_out_of_ddp",
    "load_weights",
    "logical_parameters",
    "materialize",
    "parallelize_experts",
]
