"""Lightning's ``FSDPStrategy``: the precision that unmodified FSDP computes in, and what is refused."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._comm_hooks import default_hooks
from torch.distributed.fsdp import MixedPrecision
from torch.distributed.fsdp.wrap import wrap

from lightning_eplb import EPLBCallback, parallelize_experts
from tests.fidelity import SEQUENCES, ShufflePolicy, trainer_for
from tests.fsdp1 import CPUFSDPPrecision, fsdp1
from tests.models import LanguageModel, hugging_face_model, loader, token_batches
from tests.workers import Workers

STEPS = 6
MIXED = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class SeesDtypes(LanguageModel):
    """Notes the dtypes that experts compute in, and those of their gradients."""

    def __init__(self) -> None:
        super().__init__(hugging_face_model("mixtral").float(), "sgd")
        self.dtypes: set[tuple[torch.dtype, ...]] = set()
        for module in self.model.modules():
            if hasattr(module, "act_fn"):
                module.act_fn.register_forward_pre_hook(lambda _, args: self.dtypes.add((args[0].dtype,)))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in self.named_parameters():
            if "experts" in name and parameter.grad is not None:  # unmodified, they may all be on the other rank
                self.dtypes.add((parameter.dtype, parameter.grad.dtype))


def train(precision: str, ours: bool) -> tuple[list[float], set[tuple[torch.dtype, ...]]]:
    callbacks: list[pl.Callback] = [EPLBCallback(2, policy=ShufflePolicy(), step_interval=1)] if ours else []
    module, strategy = SeesDtypes(), fsdp1()
    if precision == "own":  # no autocast hides what dtype weights have
        precision, strategy = "32-true", fsdp1(mixed_precision=MIXED)
    plugins = [CPUFSDPPrecision(precision)]  # type: ignore[arg-type]
    trainer = trainer_for(2, strategy, plugins=plugins, max_steps=STEPS, callbacks=callbacks)
    trainer.fit(module, tokens())
    return module.losses, module.dtypes


def tokens() -> Any:
    return loader(token_batches(2 * STEPS * SEQUENCES), SEQUENCES)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("32-true", 1e-6), ("bf16-true", 1e-3), ("bf16-mixed", 1e-3), ("16-true", 5e-3), ("own", 4e-2)],
)
def test_fsdp1_in_each_precision_trains_as_unmodified(precision: str, tolerance: float, workers: Workers) -> None:
    unmodified = workers.run(2, train, precision, False, seconds=200)
    ours = workers.run(2, train, precision, True, seconds=200)
    for (losses, dtypes), (their_losses, their_dtypes) in zip(ours, unmodified, strict=True):
        assert losses == pytest.approx(their_losses, abs=tolerance)
        assert dtypes == their_dtypes


def fit(module: pl.LightningModule, **strategy: Any) -> str:
    """The message of the ``ValueError``, or nothing."""
    plugins = [CPUFSDPPrecision("32-true")]
    trainer = trainer_for(2, fsdp1(**strategy), plugins=plugins, max_steps=1, callbacks=[EPLBCallback()])
    try:
        trainer.fit(module, tokens())
    except ValueError as error:
        torch.distributed.barrier()
        return str(error)
    return ""


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cpu_offload": ({"cpu_offload": True}, "FSDPStrategy(cpu_offload=True) is not supported by EPLBCallback, as exper"),
    "flat": ({"use_orig_params": False}, "FSDPStrategy(use_orig_params=False) is not supported by EPLBCallback, as an"),
    "modules": ({"ignored_modules": [nn.Identity()]}, "FSDPStrategy ignores parameters or modules, not both"),
    "states": ({"ignored_states": [nn.Identity()]}, "FSDPStrategy ignores parameters or modules, not both"),
}


def refused(name: str) -> str:
    return fit(SeesDtypes(), **REFUSED[name][0])


@pytest.mark.parametrize("name", REFUSED)
def test_fsdp1_with_unsupported_argument_raises(name: str, workers: Workers) -> None:
    for message in workers.run(2, refused, name):
        assert message.startswith(REFUSED[name][1])


class OnMeta(SeesDtypes):
    def configure_model(self) -> None:
        self.model = parallelize_experts(self.model.to("meta"))


def on_meta() -> str:
    return fit(OnMeta())


def test_fsdp1_with_experts_on_meta_raises(workers: Workers) -> None:
    for message in workers.run(2, on_meta):
        assert "mlp.experts.gate_up_proj is on the meta device, and FSDP does not materialize parameters" in message


class WrappedByHand(SeesDtypes):
    def __init__(self, with_experts: bool) -> None:
        super().__init__()
        self.with_experts = with_experts

    def configure_model(self) -> None:
        parallelize_experts(self.model)
        experts = [] if self.with_experts else [p for n, p in self.model.named_parameters() if "experts" in n]
        self.model = wrap(self.model, ignored_states=experts, device_id=torch.device("cpu"), auto_wrap_policy=None)


def wrapped_by_hand(with_experts: bool) -> str:
    return fit(WrappedByHand(with_experts))


def test_fsdp1_wrapped_by_hand_without_experts_trains(workers: Workers) -> None:
    assert workers.run(2, wrapped_by_hand, False) == ["", ""]


def test_fsdp1_wrapped_by_hand_with_experts_raises(workers: Workers) -> None:
    for message in workers.run(2, wrapped_by_hand, True):
        assert "mlp.experts.gate_up_proj was sharded by FullyShardedDataParallel. Let FSDPStrategy wrap" in message


def keeps_what_else_is_ignored() -> tuple[bool, bool, bool]:
    module, kept = SeesDtypes(), {}
    head = module.model.get_parameter("lm_head.weight")
    strategy = fsdp1(ignored_states=[head])
    trainer = trainer_for(2, strategy, plugins=[CPUFSDPPrecision("32-true")], max_steps=1, callbacks=[EPLBCallback()])
    kept["before"] = list(strategy.kwargs["ignored_states"])
    trainer.fit(module, tokens())
    untouched = len(kept["before"]) == len(strategy.kwargs["ignored_states"]) == 1
    return head.shape == (64, 16), untouched, "convert_module" not in vars(trainer.precision_plugin)


def test_fsdp1_with_ignored_modules_keeps_them_ignored(workers: Workers) -> None:
    assert workers.run(2, keeps_what_else_is_ignored) == [(True, True, True)] * 2


class ClipsThroughFSDP(SeesDtypes):
    """As one does where Lightning does not clip."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.strategy.model.clip_grad_norm_(0.1)  # type: ignore[union-attr, operator]


def losses_clipped(ours: bool) -> list[float]:
    callbacks: list[pl.Callback] = [EPLBCallback(2, policy=ShufflePolicy(), step_interval=1)] if ours else []
    module = ClipsThroughFSDP()
    trainer_for(2, fsdp1(), plugins=[CPUFSDPPrecision("32-true")], max_steps=STEPS, callbacks=callbacks).fit(
        module, tokens()
    )
    return module.losses


def test_fsdp1_clip_grad_norm_uses_norm_of_whole_model(workers: Workers) -> None:
    for ours, theirs in zip(workers.run(2, losses_clipped, True), workers.run(2, losses_clipped, False), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def summing_hook(state: Any, grad: torch.Tensor, shard: torch.Tensor) -> None:
    torch.distributed.reduce_scatter_tensor(shard, grad)


class Hooked(SeesDtypes):
    def __init__(self, hook: Any) -> None:
        super().__init__()
        self.hook = hook

    def on_train_start(self) -> None:
        state = default_hooks.DefaultState(process_group=torch.distributed.group.WORLD)
        self.trainer.strategy.model.register_comm_hook(state, self.hook)  # type: ignore[union-attr, operator]


def hooked(hook: Any) -> str:
    return fit(Hooked(hook))


def test_fsdp1_with_hook_that_may_sum_raises(workers: Workers) -> None:
    for message in workers.run(2, hooked, summing_hook):
        assert message.startswith(
            "FullyShardedDataParallel.register_comm_hook(hook=summing_hook) is not supported with"
        )
        assert "Use one of allreduce_hook, reduce_scatter_hook" in message
    assert workers.run(2, hooked, default_hooks.reduce_scatter_hook) == ["", ""]
