"""Auxiliary-loss-free load balancing: a bias that steers which experts a router chooses."""

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from typing_extensions import override

from lightning_eplb.balancer import ExpertLoadBalancer
from lightning_eplb.callback import EPLBCallback
from lightning_eplb.parallel.parallelize import expert_layers

BIAS_NAMES = ("e_score_correction_bias", "expert_bias")
"""Attributes that hold the bias in transformers' models: DeepSeek-V3, GLM-4-MoE and most others; AFMoE and LFM2-MoE."""


class RouterBiases:
    """Biases of a model's routers, one for each converted expert module with a trained parameter beside or in it.

    A bias is added to the scores by which the router chooses experts, and not to the weights of those chosen. After
    each optimizer step it rises by ``update_rate`` for experts with less than the mean load of their layer, and falls
    by as much for those with more. Source: Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for
    Mixture-of-Experts, arXiv 2408.15664, algorithm 1.

    :class:`RouterBiasCallback` uses it under Lightning. In another loop::

        biases = RouterBiases(model)  # after parallelize_experts and, if there is one, fully_shard
        ...
        if balancer.step() is not None:
            biases.update(balancer, update_rate=1e-3)

    Args:
        model: Model whose experts were converted.
        bias_name: Attribute that holds the bias, a buffer or a parameter that is not trained, with a value for each
            expert. ``None``: one of :data:`BIAS_NAMES`. It is looked for in the modules that contain the experts, from
            the inside out.

    Raises:
        ValueError: No trained layer has such a bias, a layer has several, or one can't be updated: the optimizer trains
            it, or FSDP2 shards it in 16 bits.
    """

    def __init__(self, model: nn.Module, bias_name: str | None = None) -> None:
        self._names = BIAS_NAMES if bias_name is None else (bias_name,)
        self._owners: dict[nn.Module, tuple[nn.Module, str]] = {}  # by expert module
        modules = dict(model.named_modules())
        paths = {id(module): path for path, module in modules.items()}
        for layer, experts in expert_layers(model):
            path = paths[id(experts)]
            while path:
                path = path.rpartition(".")[0]
                if sum(1 for _ in expert_layers(modules[path])) > 1:
                    break  # a bias could be another layer's
                if found := self._find(modules[path], experts, layer.num_logical_experts):
                    self._add_owner(experts, path, modules[path], found)
                    break
        if not self._owners:
            raise ValueError(
                f"bias_name={bias_name!r}: no trained MoE layer has a buffer {' or '.join(self._names)} beside its"
                " experts with a value for each of them, or such a parameter that is not trained. Under FSDPStrategy it"
                " must be a buffer. Name the attribute in your model, or balance its routers by an auxiliary loss."
            )

    def update(self, balancer: ExpertLoadBalancer, update_rate: float) -> None:
        """Move every bias towards an even load, by the latest step's. Every rank calls it; it does not communicate.

        Args:
            balancer: Balancer of the model, after a :meth:`~ExpertLoadBalancer.step` that returned statistics.
            update_rate: Change of a bias, in units of the router's scores.
        """
        for experts, load_L in loads_of_last_step(balancer):
            if experts in self._owners:
                owner, name = self._owners[experts]
                directions_L = torch.sign(load_L.sum() - load_L * len(load_L))  # exact in integers
                _add(getattr(owner, name), directions_L, update_rate)

    def largest(self) -> float:
        """Return the largest absolute bias. Collective where FSDP2 shards biases, which are parameters then."""
        biases = (getattr(owner, name).detach() for owner, name in self._owners.values())
        return max(float((bias.full_tensor() if isinstance(bias, DTensor) else bias).abs().max()) for bias in biases)

    def _find(self, block: nn.Module, experts: nn.Module, num_experts: int) -> dict[str, tuple[nn.Module, str]]:
        """Return the biases in a block outside of its experts, by path: the module that holds each, and its name."""
        inner, found = {id(module) for module in experts.modules()}, {}
        for path, module in block.named_modules():
            tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            for name in self._names if id(module) not in inner else ():
                if name in tensors and tensors[name].numel() == num_experts:
                    found[f"{path}.{name}".lstrip(".")] = (module, name)
        return found

    def _add_owner(
        self, experts: nn.Module, path: str, block: nn.Module, found: dict[str, tuple[nn.Module, str]]
    ) -> None:
        """Remember a layer's bias, unless the layer is frozen. Raise ``ValueError`` if it can't be updated."""
        names = [f"{path}.{name}".lstrip(".") for name in found]
        if len(names) > 1:
            raise ValueError(f"{path} has several router biases: {', '.join(names)}. Name one by bias_name=...")
        owned = next(iter(found.values()))
        bias = getattr(*owned)
        if bias.requires_grad:
            raise ValueError(
                f"{names[0]} is trained by the optimizer, which would work against its updates. Make it a buffer, or"
                " call requires_grad_(False) on it before the optimizer is made."
            )
        if isinstance(bias, DTensor) and _is_narrow(bias):
            raise ValueError(
                f"{names[0]} is a parameter in {bias.dtype}, sharded by FSDP2. Small steps are lost in 16 bits: make it"
                " a buffer, or train with precision='bf16-mixed'."
            )
        if any(parameter.requires_grad for parameter in block.parameters()):
            self._owners[experts] = owned


class RouterBiasCallback(Callback):
    """Balances routers without an auxiliary loss, by the bias of DeepSeek-V3, see :class:`RouterBiases`.

    It takes the load that ``EPLBCallback`` has counted, so that it adds no communication. Biases are the same on all
    ranks, are part of checkpoints as the model's own buffers, and stay as they are in validation. Models without such a
    bias keep their auxiliary loss. The guide ``examples/guides/router_bias.md`` says when to use which.

    Logs ``eplb/router_bias``, the largest absolute bias, and ``eplb/max_violation``, by how much the fullest expert of
    a layer exceeds the mean, as a part of the mean and averaged over layers: 0 is even, the paper's MaxVio.

    Example::

        trainer = Trainer(strategy="ddp", callbacks=[EPLBCallback(), RouterBiasCallback(update_rate=1e-3)])

    Args:
        update_rate: Change of a bias in an optimizer step, in units of the router's scores: of their range, 0 to 1, for
            sigmoid and softmax. Defaults to 0.001, that of DeepSeek-V3.
        bias_name: Attribute of your own model that holds the bias, see :class:`RouterBiases`. ``None``: those of
            transformers' models.

    Raises:
        ValueError: Before the first step, on all ranks: an argument is not valid, ``EPLBCallback`` is missing or listed
            after it, or the model has no such bias.

    Note:
        Biases of 16-bit models are kept in float32, as steps of 0.001 are too small for 16 bits.
    """

    def __init__(self, update_rate: float = 1e-3, bias_name: str | None = None) -> None:
        if isinstance(update_rate, bool) or not isinstance(update_rate, int | float):
            raise TypeError(f"update_rate={update_rate!r} must be a number, such as 0.001.")
        if not (math.isfinite(update_rate) and update_rate > 0):
            raise ValueError(f"update_rate={update_rate} must be greater than 0, such as 0.001.")
        if bias_name is not None and not isinstance(bias_name, str):
            raise TypeError(f"bias_name={bias_name!r} must be the name of an attribute, or None.")
        self.update_rate = update_rate
        self.bias_name = bias_name
        self._biases: RouterBiases | None = None
        self._eplb: EPLBCallback | None = None
        self._num_steps = 0

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)]
        self._eplb = next((callback for callback in before if isinstance(callback, EPLBCallback)), None)
        if self._eplb is None:
            raise ValueError(
                "RouterBiasCallback needs an EPLBCallback before it in Trainer(callbacks=[...]), to count the tokens."
                " EPLBCallback(ep_size=1) counts and moves nothing."
            )

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._biases = RouterBiases(pl_module, self.bias_name)
        assert self._eplb is not None
        assert self._eplb.balancer is not None
        self._num_steps = self._eplb.balancer.num_steps

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        assert self._eplb is not None
        balancer, biases = self._eplb.balancer, self._biases
        assert balancer is not None
        assert biases is not None
        if balancer.num_steps == self._num_steps:
            return  # gradients are accumulated, or no expert got a token
        self._num_steps = balancer.num_steps
        biases.update(balancer, self.update_rate)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not pl_module.automatic_optimization or (every > 0 and trainer.global_step % every == 0):
            loads = [load_L for _, load_L in loads_of_last_step(balancer) if load_L.any()]
            violations = [float(load_L.max() * len(load_L) / load_L.sum()) - 1 for load_L in loads]
            pl_module.log_dict(
                {"eplb/router_bias": biases.largest(), "eplb/max_violation": sum(violations) / len(violations)}
            )


def loads_of_last_step(balancer: ExpertLoadBalancer) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield each converted expert module with the tokens of its experts in the latest step over all ranks, ``[L]``."""
    if balancer.last_step is not None:
        for name, part in balancer.last_step.models.items():
            for (_, experts), load_L in zip(balancer.models[name].modules, part.load, strict=True):
                yield experts, load_L


def _add(bias: Tensor, directions_L: Tensor, update_rate: float) -> None:
    """Add ``update_rate`` times the direction of each expert to a bias of any shape, in float32 at least."""
    with torch.no_grad():
        if not isinstance(bias, DTensor) and _is_narrow(bias):
            bias.data = bias.data.float()
        steps = (directions_L.to(torch.float64) * update_rate).to(bias.device, bias.dtype).view(bias.shape)
        if isinstance(bias, DTensor):
            mesh, everywhere = bias.device_mesh, [Replicate()] * bias.device_mesh.ndim
            steps = DTensor.from_local(steps, mesh, everywhere, run_check=False)
            steps = steps.redistribute(placements=bias.placements)
        bias.add_(steps)


def _is_narrow(bias: Tensor) -> bool:
    """Return ``True`` for a dtype in which steps of a bias would be lost in rounding."""
    return torch.finfo(bias.dtype).bits < 32
