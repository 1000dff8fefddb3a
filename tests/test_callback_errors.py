"""Settings that can't work raise errors that name argument, value and remedy, on every rank; nothing hangs or moves."""

import copy
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.swa_utils import AveragedModel

from lightning_eplb import (
    EPLBCallback,
    ExpertLoadBalancer,
    ExpertParallelStrategy,
    ExpertPlacement,
    Policy,
    Topology,
    parallelize_experts,
)
from lightning_eplb.parallel.groups import ExpertGroups
from tests.fidelity import SEQUENCES, trainer_for
from tests.models import LanguageModel, hugging_face_model, loader, optimizer_of, token_batches
from tests.workers import Workers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_size": 0}, "window_size=0 must be at least 1"),
        ({"step_interval": 0}, "step_interval=0 must be at least 1"),
        ({"ep_size": 0}, "ep_size=0 must be at least 1. Use None for all"),
        ({"num_redundant_experts": -2}, "num_redundant_experts=-2 must not be negative. Use 0 for none"),
        ({"num_redundant_experts": "8"}, "num_redundant_experts='8' must be a whole number"),
        ({"ep_size": 2.0}, r"ep_size=2\.0 must be a whole number"),
        ({"window_size": True}, "window_size=True must be a whole number"),
        ({"step_interval": float("inf")}, "step_interval=inf must be a whole number"),
        ({"trace": "."}, r"trace='\.' is a folder\. Name a file, such as './trace\.npy'"),
        ({"use_async": "no"}, "use_async='no' must be True or False"),
        ({"policy": "balanced"}, "policy='balanced' must be a lightning_eplb.Policy"),
    ],
)
def test_callback_with_invalid_argument_raises(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EPLBCallback(**arguments)


def test_strategy_with_invalid_type_raises() -> None:
    with pytest.raises(ValueError, match="ep_size='2' must be a whole number"):
        ExpertParallelStrategy(ep_size="2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="save_distributed_checkpoint='no' must be True or False"):
        ExpertParallelStrategy(save_distributed_checkpoint="no")  # type: ignore[arg-type]


def fails_in_setup(arguments: dict[str, Any], more_callbacks: list[pl.Callback] | None = None, **trainer: Any) -> str:
    """The message of ``fit``, which must come before our first collective, the making of groups."""
    callbacks = [EPLBCallback(**arguments), *(more_callbacks or [])]
    module = LanguageModel(trainer.pop("model", None) or hugging_face_model("mixtral"), "adamw")
    too_late = AssertionError("a collective before the check")
    with (
        mock.patch.object(ExpertGroups, "create", side_effect=too_late),
        mock.patch("torch.distributed.new_subgroups", side_effect=too_late),
        pytest.raises(ValueError, match=r"\w") as raised,
    ):
        trainer_for(dist.get_world_size(), max_steps=1, callbacks=callbacks, **trainer).fit(module, tokens())
    return str(raised.value)


def tokens() -> Any:
    return loader(token_batches(8 * SEQUENCES), SEQUENCES)


def with_three_experts() -> str:
    return fails_in_setup({}, model=hugging_face_model("mixtral", num_experts=3))


def test_callback_with_fewer_experts_than_ranks_raises(workers: Workers) -> None:
    (message,) = set(workers.run(4, with_three_experts))
    assert message == (
        "ep_size=4 is more than the 3 experts of model.model.layers.0.mlp.experts, and each rank needs one. Use at most"
        " 3."
    )


def test_callback_with_indivisible_redundant_experts_raises(workers: Workers) -> None:
    (message,) = set(workers.run(2, fails_in_setup, {"num_redundant_experts": 3}))
    assert message == "num_redundant_experts=3 must be a multiple of ep_size=2. Use 2 or 4."


def test_callback_with_too_many_redundant_experts_raises(workers: Workers) -> None:
    (message,) = set(workers.run(2, fails_in_setup, {"num_redundant_experts": 10}))
    assert message == (
        "num_redundant_experts=10 is more than ep_size=2 can use. Use at most 8, with which each rank holds a replica"
        " of every expert that is not its own."
    )


def test_callback_with_indivisible_ranks_raises(workers: Workers) -> None:
    (message,) = set(workers.run(4, fails_in_setup, {"ep_size": 3}))
    assert message == "ep_size=3 must divide the 4 data-parallel ranks. Use 1, 2 or 4."


def no_moe_layer() -> str:
    return fails_in_setup({}, model=nn.ModuleDict({"feed_forward_experts": nn.Linear(4, 4)}))


def test_callback_without_moe_layer_raises(workers: Workers) -> None:
    (message,) = set(workers.run(2, no_moe_layer))
    assert message.startswith("no MoE layer found in LanguageModel: looked for a module with an int attribute num_exp")


class MyAverage(WeightAveraging):
    pass


def averaging(name: str) -> str:
    callbacks = {
        "MyAverage": MyAverage,
        "EMAWeightAveraging": EMAWeightAveraging,
        "StochasticWeightAveraging": lambda: StochasticWeightAveraging(1e-3),
    }
    return fails_in_setup({}, [callbacks[name]()])


@pytest.mark.parametrize("name", ["MyAverage", "EMAWeightAveraging", "StochasticWeightAveraging"])
def test_callback_with_weight_averaging_raises(name: str, workers: Workers) -> None:
    (message,) = set(workers.run(2, averaging, name))
    assert message.startswith(
        f"{name} is not supported with EPLBCallback: it averages the rows of experts by their position"
    )


def local_sgd() -> str:
    state = PostLocalSGDState(process_group=None, subgroup=None, start_localSGD_iter=1)
    strategy = DDPStrategy(ddp_comm_state=state, model_averaging_period=1, process_group_backend="gloo")
    return fails_in_setup({}, strategy=strategy)


def test_callback_with_local_sgd_raises(workers: Workers) -> None:
    (message,) = set(workers.run(2, local_sgd))
    assert message.startswith("DDPStrategy(ddp_comm_state=PostLocalSGDState(...)) is not supported by EPLBCallback")


def summing_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def compressing_wrapper(hook: Any) -> Any:
    return hook


def hooked(hook: Any, wrapper: Any = None) -> str:
    strategy = DDPStrategy(ddp_comm_hook=hook, ddp_comm_wrapper=wrapper, process_group_backend="gloo")
    return fails_in_setup({}, strategy=strategy)


def test_callback_with_hook_that_may_sum_raises(workers: Workers) -> None:
    (message,) = set(workers.run(2, hooked, summing_hook))
    assert message.startswith("DDPStrategy(ddp_comm_hook=summing_hook) is not supported with expert parallelism")
    assert "Use one of torch's hooks that average, allreduce_hook, fp16_compress_hook" in message
    (message,) = set(workers.run(2, hooked, noop_hook))
    assert message.startswith("DDPStrategy(ddp_comm_hook=noop_hook) is not supported with expert parallelism")
    (message,) = set(workers.run(2, hooked, default_hooks.allreduce_hook, compressing_wrapper))
    assert message.startswith("DDPStrategy(ddp_comm_hook=allreduce_hook) in compressing_wrapper is not supported with")
    assert message.endswith("Use fp16_compress_wrapper or bf16_compress_wrapper, or no wrapper")


def trained_with(hook: Any, wrapper: Any, ep_size: int | None) -> int:
    strategy = DDPStrategy(ddp_comm_hook=hook, ddp_comm_wrapper=wrapper, process_group_backend="gloo")
    module = LanguageModel(hugging_face_model("mixtral"), "adamw")
    trainer = trainer_for(2, strategy, max_steps=1, callbacks=[EPLBCallback(ep_size=ep_size)])
    trainer.fit(module, tokens())
    return trainer.global_step


@pytest.mark.parametrize(
    ("hook", "wrapper", "ep_size"),
    [
        (default_hooks.fp16_compress_hook, None, None),
        (default_hooks.allreduce_hook, default_hooks.bf16_compress_wrapper, None),
        (powerSGD_hook, None, None),
        (summing_hook, None, 1),
    ],
)
def test_callback_with_hook_that_averages_trains(
    hook: Any, wrapper: Any, ep_size: int | None, workers: Workers
) -> None:
    assert workers.run(2, trained_with, hook, wrapper, ep_size) == [1, 1]


def averaged_by_hand() -> str:
    model = hugging_face_model("mixtral")
    return fails_in_setup({}, model=nn.ModuleDict({"model": model, "average": AveragedModel(model)}))


def test_callback_with_averaged_model_raises(workers: Workers) -> None:
    (message,) = set(workers.run(2, averaged_by_hand))
    assert message.startswith("model.average is an AveragedModel: it averages the rows of experts by their position")


class ParamWrapper(nn.Module):
    """As PEFT wraps experts that ``target_parameters`` names."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(16, 8 * 2)


def adapted() -> str:
    model: Any = hugging_face_model("mixtral")
    model.model.layers[1].mlp.experts = ParamWrapper(model.model.layers[1].mlp.experts)
    return fails_in_setup({}, model=model)


def test_callback_with_adapters_on_experts_raises(workers: Workers) -> None:
    (message,) = set(workers.run(2, adapted))
    assert message.startswith("model.model.layers.1.mlp.experts.base_layer is wrapped in a ParamWrapper, an adapter")


class WithCopy(LanguageModel):
    """Keeps a copy of its model that it never calls."""

    def __init__(self, model: nn.Module, optimizer: str) -> None:
        super().__init__(model, optimizer)
        self.average = copy.deepcopy(model).requires_grad_(False)


def warnings_of(module: type[LanguageModel]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callbacks = [EPLBCallback(step_interval=4)]
        trainer_for(2, max_steps=1, callbacks=callbacks).fit(module(hugging_face_model("mixtral"), "adamw"), tokens())
    return [str(each.message) for each in caught if "MoE layers" in str(each.message)]


def test_callback_with_uncalled_moe_layers_warns(workers: Workers) -> None:
    (message,), nothing = workers.run(2, warnings_of, WithCopy)  # rank 0 warns
    assert message.startswith("2 of 4 MoE layers got no token in the window, average.model.layers.0.mlp.experts first")
    assert nothing == []
    assert workers.run(2, warnings_of, LanguageModel) == [[], []]


def validated_alone() -> str:
    module = LanguageModel(hugging_face_model("mixtral"), "adamw")
    trainer_for(2, max_steps=1, callbacks=[EPLBCallback()]).fit(module, tokens())
    with pytest.raises(ValueError, match=r"\w") as raised:
        trainer_for(1, callbacks=[EPLBCallback()]).validate(module, tokens(), verbose=False)
    return str(raised.value)


def test_callback_on_fewer_ranks_than_converted_raises(workers: Workers) -> None:
    (message,) = set(workers.run(2, validated_alone))
    assert message.startswith("the experts of LanguageModel are spread over 2 ranks, and this trainer has 1; run it on")


def only_experts_trained() -> str:
    model = hugging_face_model("mixtral")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name)
    return fails_in_setup({}, model=model)


def test_callback_without_dense_parameters_raises(workers: Workers) -> None:
    (message,) = set(workers.run(2, only_experts_trained))
    assert message.startswith("LanguageModel trains no parameter outside of experts, and DDP does not support such")


def test_callback_with_other_strategy_raises() -> None:
    trainer = mock.Mock(world_size=2)
    trainer.strategy = object()
    with pytest.raises(ValueError, match="strategy=object is not supported by EPLBCallback; 'ddp', 'fsdp'"):
        EPLBCallback().setup(trainer, LanguageModel(hugging_face_model("mixtral"), "adamw"), "fit")


class BuiltLater(LanguageModel):
    def __init__(self, redundant: int | None) -> None:
        super().__init__(nn.Linear(2, 2), "adamw")
        self.redundant = redundant

    def configure_model(self) -> None:
        self.model = hugging_face_model("mixtral")
        if self.redundant is not None:
            parallelize_experts(self, num_redundant_experts=self.redundant)


def built_later(redundant: int | None) -> str:
    trainer = trainer_for(2, max_steps=2, callbacks=[EPLBCallback(num_redundant_experts=2)])
    try:
        trainer.fit(BuiltLater(redundant), tokens())
    except ValueError as error:
        return str(error)
    return ""


def test_callback_with_model_of_configure_model_adopts_it(workers: Workers) -> None:
    assert workers.run(2, built_later, 2) == ["", ""]


def test_callback_with_unconverted_configure_model_raises(workers: Workers) -> None:
    for message in workers.run(2, built_later, None):
        assert "call parallelize_experts(self, num_redundant_experts=2) at its end" in message


def test_callback_with_otherwise_converted_configure_model_raises(workers: Workers) -> None:
    for message in workers.run(2, built_later, 4):
        assert "num_redundant_experts=2; parallelize_experts was called for 2 ranks with num_redundant_exp" in message


class Wrong(Policy):
    """Returns what no policy may."""

    def __init__(self, make: Callable[[ExpertPlacement], Any]) -> None:
        self.make = make

    def rearrange(self, load_YL: np.ndarray, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        return self.make(placement)


def changed(slot: int, expert: int) -> Callable[[ExpertPlacement], Any]:
    def make(placement: ExpertPlacement) -> ExpertPlacement:
        slots_YP = placement.physical_to_logical.copy()
        slots_YP[0, slot] = expert
        return ExpertPlacement(slots_YP, placement.num_logical_experts, placement.num_ranks)

    return make


# Slots of 8 experts and 2 redundant ones on 2 ranks: 0 1 2 3 (4) | 4 5 6 7 (1).
WRONG: dict[str, tuple[Callable[[ExpertPlacement], Any], str]] = {
    "missing and twice among the primaries": (changed(0, 7), "expert 0 is missing among the primaries and expert 7"),
    "an empty primary slot": (changed(3, -1), "a primary slot of rank 0 is empty"),
    "twice on one rank": (changed(4, 2), "rank 0 holds expert 2 twice"),
    "no such expert": (changed(4, 8), "holds expert 8; experts are 0 to 7"),
    "no placement": (lambda placement: placement.physical_to_logical, "it returned a ndarray, not an ExpertPlacement"),
    "another shape": (
        lambda placement: ExpertPlacement.initial(2, 8, 2),
        "which can't follow ExpertPlacement(layers=2",
    ),
}


def rearranged_by(name: str) -> str:
    model = parallelize_experts(hugging_face_model("mixtral"), num_redundant_experts=2)
    balancer = ExpertLoadBalancer(model, policy=Wrong(WRONG[name][0]))
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    with pytest.raises(ValueError, match=r"Wrong\.rearrange\(\) failed") as raised:
        balancer.rearrange()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.named_parameters())
    count = torch.ones(1)
    dist.all_reduce(count)  # the ranks still understand each other
    assert count == 2
    return str(raised.value)


@pytest.mark.parametrize("name", WRONG)
def test_callback_with_policy_of_invalid_placement_raises(name: str, workers: Workers) -> None:
    for message in workers.run(2, rearranged_by, name):
        assert WRONG[name][1] in message


class OtherOptimizer(LanguageModel):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer_name == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), max_iter=2)
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.AdamW, lr=1e-3)


def trained_by(optimizer: str) -> tuple[str, int]:
    callback = EPLBCallback(step_interval=1000)
    trainer = trainer_for(2, max_steps=5, callbacks=[callback])
    try:
        trainer.fit(OtherOptimizer(hugging_face_model("mixtral"), optimizer), tokens())
    except ValueError as error:
        return str(error), trainer.global_step
    return "", -1


def test_callback_with_mixing_optimizer_raises_before_first_step(workers: Workers) -> None:
    for message, step in workers.run(2, trained_by, "lbfgs"):
        assert message.startswith("LBFGS updates each row of a parameter by what is in the others")
        assert "model.model.layers.0.mlp.experts.gate_up_proj" in message
        assert "AdamW" in message
        assert step == 0


def test_callback_with_zero_redundancy_optimizer_raises(workers: Workers) -> None:
    for message, step in workers.run(2, trained_by, "zero"):
        assert message.startswith("ZeroRedundancyOptimizer gives every rank other parameters to update")
        assert step == 0


def ranks_disagree() -> tuple[str, bool]:
    model = parallelize_experts(hugging_face_model("mixtral"))
    optimizer = optimizer_of("adamw", model)
    if dist.get_rank() == 1:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    balancer = ExpertLoadBalancer(model, [optimizer])
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    with pytest.raises(RuntimeError) as raised:
        balancer.rearrange(ExpertPlacement([[4, 1, 2, 3, 0, 5, 6, 7]] * 2, 8, 2))
    return str(raised.value), all(torch.equal(before[key], tensor) for key, tensor in model.named_parameters())


def test_rearrange_with_unequal_state_raises_and_moves_nothing(workers: Workers) -> None:
    for message, untouched in workers.run(2, ranks_disagree):
        assert message.startswith("ranks [1] would move other rows than rank 0")
        assert untouched
