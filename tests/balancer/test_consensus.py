"""Ranks that would do different things all raise one error that names them; a policy's failure is told to all."""

import re
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_eplb import ExpertLoadBalancer, ExpertPlacement, Policy, StaticPolicy, Topology, parallelize_experts
from lightning_eplb.parallel import barrier
from lightning_eplb.parallel.barrier import format_ranks
from lightning_eplb.parallel.consensus import check_same_on_all_ranks
from lightning_eplb.parallel.groups import ExpertGroups
from tests.models import hugging_face_model, optimizer_of
from tests.workers import Workers


def here() -> ExpertPlacement:
    return ExpertPlacement([[4, 1, 2, 3, 0, 5, 6, 7]] * 2, 8, 2)


def elsewhere() -> ExpertPlacement:
    return ExpertPlacement([[0, 5, 2, 3, 4, 1, 6, 7]] * 2, 8, 2)


def of_another_shape() -> ExpertPlacement:
    return ExpertPlacement([[0, 5, 2, 3, 4, 1, 6, 7]], 8, 2)


def raised_by(call: Callable[[], object], model: nn.Module) -> BaseException:
    """The exception of a call, which moves nothing and leaves the ranks in step."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        call()
    except BaseException as error:
        raised = error
    else:
        raise AssertionError("it raised nothing")
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    count = torch.ones(1)
    dist.all_reduce(count)
    assert count == dist.get_world_size()
    return raised


def balancer_of(**arguments: Any) -> ExpertLoadBalancer:
    model = parallelize_experts(hugging_face_model("mixtral"))
    return ExpertLoadBalancer(model, [optimizer_of("adamw", model)], **arguments)


def told_to_go(makers: list[Callable[[], Any]]) -> str:
    balancer = balancer_of(policy=StaticPolicy())
    placement = makers[dist.get_rank()]()
    error = raised_by(lambda: balancer.rearrange(placement), balancer.model)
    assert type(error) is ValueError
    balancer.rearrange(here())
    assert balancer.placement == here()
    return str(error)


def nothing() -> None:
    return None


def a_list() -> list[list[int]]:
    return [[0, 1, 2, 3, 4, 5, 6, 7]] * 2


@pytest.mark.parametrize(
    ("makers", "words"),
    [
        ([here, elsewhere], r"placement=ExpertPlacement\(layers=2.* on rank 0 is not the same on rank 1 \(ExpertPlace"),
        ([here, nothing], r"placement=ExpertPlacement.* on rank 0 is not the same on rank 1 \(None on rank 1\)"),
        ([nothing, here], r"placement=None on rank 0 is not the same on rank 1 \(ExpertPlacement"),
        ([here, of_another_shape], r"is not the same on rank 1 \(ExpertPlacement\(layers=1"),
        ([here, a_list], r"is not the same on rank 1 \(a list on rank 1\)"),
        ([a_list, a_list], r"placement=a list must be an ExpertPlacement"),
    ],
)
def test_rearrange_with_unequal_placements_raises_on_all_ranks(
    makers: list[Callable[[], Any]], words: str, workers: Workers
) -> None:
    first, second = workers.run(2, told_to_go, makers)
    assert first == second
    assert re.search(words, first), first


class Failing(Policy):
    """Raises what it is given."""

    def __init__(self, make: Callable[[], BaseException]) -> None:
        self.make = make

    def rearrange(self, load_YL: np.ndarray, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        raise self.make()


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise KeyError("no message")


def a_bug() -> BaseException:
    return TypeError("unsupported operand")


def a_lookup() -> BaseException:
    return KeyError("layer")


def an_exit() -> BaseException:
    return SystemExit(3)


def failed_by(make: Callable[[], BaseException]) -> tuple[str, str, str]:
    """Type, message and traceback of what this rank raised."""
    balancer = balancer_of(policy=Failing(make))
    error = raised_by(balancer.rearrange, balancer.model)
    words = "" if isinstance(error, UnreadableError) else str(error)
    return type(error).__name__, words, "".join(traceback.format_tb(error.__traceback__))


FAILURES: dict[str, tuple[Callable[[], BaseException], tuple[str, str], tuple[str, str]]] = {
    "a bug": (
        a_bug,
        ("TypeError", "unsupported operand"),
        ("RuntimeError", "Failing.rearrange() failed on rank 0: TypeError: unsupported operand"),
    ),
    "a lookup": (
        a_lookup,
        ("KeyError", "'layer'"),
        ("RuntimeError", "Failing.rearrange() failed on rank 0: KeyError: 'layer'"),
    ),
    "an exit": (an_exit, ("SystemExit", "3"), ("RuntimeError", "Failing.rearrange() failed on rank 0: SystemExit: 3")),
    "an interrupt": (
        KeyboardInterrupt,
        ("KeyboardInterrupt", ""),
        ("RuntimeError", "Failing.rearrange() failed on rank 0: KeyboardInterrupt: "),
    ),
    "no message": (
        UnreadableError,
        ("UnreadableError", ""),
        ("RuntimeError", "Failing.rearrange() failed on rank 0: UnreadableError"),
    ),
    "a value": (
        ValueError,
        ("ValueError", "Failing.rearrange() failed on rank 0: ValueError: "),
        ("ValueError", "Failing.rearrange() failed on rank 0: ValueError: "),
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_decision_when_policy_raises_raises_on_all_ranks(name: str, workers: Workers) -> None:
    make, on_rank_zero, on_others = FAILURES[name]
    (*first, traceback_of_first), (*second, _) = workers.run(2, failed_by, make)
    assert tuple(first) == on_rank_zero
    assert tuple(second) == on_others
    assert ("raise self.make()" in traceback_of_first) == (name != "a value")  # it is the cause of the ValueError


class Renamed(torch.optim.AdamW):
    """State of the same shapes by other names."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for state in self.state.values():
            state["momentum"] = state.pop("exp_avg")


class Other(torch.optim.AdamW):
    pass


def optimizers_of(classes: list[type[torch.optim.Optimizer]]) -> str:
    model = parallelize_experts(hugging_face_model("mixtral"))
    optimizer = classes[dist.get_rank()](model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    balancer = ExpertLoadBalancer(model, [optimizer])
    error = raised_by(lambda: balancer.rearrange(here()), model)
    assert type(error) is RuntimeError
    return str(error)


@pytest.mark.parametrize("other", [Renamed, Other])
def test_optimizers_unequal_on_ranks_raise_on_all_ranks(other: type[torch.optim.Optimizer], workers: Workers) -> None:
    for message in workers.run(2, optimizers_of, [torch.optim.AdamW, other]):
        assert message.startswith("ranks [1] would move other rows than rank 0")
        assert "names or shapes of their state" in message


def other_arguments(name: str, values: list[Any]) -> str:
    model = parallelize_experts(hugging_face_model("mixtral"), num_redundant_experts=2)
    arguments = {"redundancy": "batch"} if name == "min_tokens_per_copy" else {}
    with pytest.raises(ValueError, match="on rank 0 is not the same") as raised:
        ExpertLoadBalancer(model, **arguments, **{name: values[dist.get_rank()]})
    return str(raised.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [("step_interval", [100, 50]), ("use_async", [False, True]), ("min_tokens_per_copy", [None, 3])],
)
def test_arguments_unequal_on_ranks_raise_on_all_ranks(name: str, values: list[Any], workers: Workers) -> None:
    (message,) = set(workers.run(2, other_arguments, name, values))
    assert message == (
        f"{name}={values[0]} on rank 0 is not the same on rank 1 ({values[1]} on rank 1). Give all ranks the same."
    )


def other_states() -> tuple[str, int]:
    balancer = balancer_of(policy=StaticPolicy())
    state = balancer.state_dict() | {"num_steps": 7 + dist.get_rank()}
    error = raised_by(lambda: balancer.load_state_dict(state), balancer.model)
    assert type(error) is ValueError
    return str(error), balancer.num_steps


def test_load_state_dict_unequal_on_ranks_raises_on_all_ranks(workers: Workers) -> None:
    for message, num_steps in workers.run(2, other_states):
        assert message.startswith("num_steps=7 on rank 0 is not the same on rank 1 (8 on rank 1)")
        assert num_steps == 0


def decided_alone() -> list[str]:
    """Rank 1 leaves out the step in which a decision is due."""
    balancer = balancer_of(policy=StaticPolicy(), step_interval=4)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    balancer.model(input_ids=tokens, use_cache=False)
    with (
        warnings.catch_warnings(record=True) as caught,
        mock.patch.multiple(barrier, WARN_AFTER=timedelta(seconds=0.2), CPU_GROUP_TIMEOUT=timedelta(seconds=1)),
    ):
        warnings.simplefilter("always")
        if dist.get_rank() == 0:
            balancer._first_step_is_done = True
            with pytest.raises(RuntimeError, match="rank 1 did not come within 1 s"):
                balancer.step()
    dist.barrier()
    return [str(each.message) for each in caught if "every rank must" in str(each.message)]


def test_step_without_other_ranks_warns_and_names_them(workers: Workers) -> None:
    (message,), nothing_told = workers.run(2, decided_alone)
    assert message.startswith("step() has a decision to make for all ranks, so every rank must call it: rank 1 did not")
    assert nothing_told == []


def test_check_same_on_all_ranks_without_groups_compares_nothing() -> None:
    check_same_on_all_ranks({"name": 1}, "nothing", ExpertGroups())


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([1], "rank 1"), ([1, 3], "ranks 1, 3"), (list(range(500)), "ranks 0, 1, 2, 3, ... (500 in all)")],
)
def test_format_ranks_of_many_names_the_first(ranks: list[int], words: str) -> None:
    assert format_ranks(ranks, most=4) == words
