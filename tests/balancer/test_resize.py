"""Resize: ranks leave and join in memory, and training equals one process with the unmodified model."""

import os
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_eplb import (
    ExpertLoadBalancer,
    fully_shard_moe,
    leave_experts_out_of_ddp,
    logical_parameters,
    parallelize_experts,
)
from lightning_eplb.parallel.parallelize import expert_layers
from lightning_eplb.parallel.state_dict import to_logical
from tests.elastic_machines import Groups, Machine, TwoLayers, loss_of
from tests.fidelity import TOLERANCE, ShufflePolicy, named_state
from tests.models import optimizer_of, token_batches
from tests.workers import Workers

EXPERTS, OTHERS, STEPS, ACCUMULATION, SEQUENCES, CLIP, WINDOW = 12, 8, 3, 2, 12, 0.5, 8
ALL = [0, 1, 2, 3]


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same weights for seed 0; others on machines that join."""
    model = TwoLayers(EXPERTS, seed, OTHERS)  # two models of a balancer; 3 ranks need a phantom expert for 8
    optimizer = optimizer_of("adamw", model)
    if seed:
        optimizer.param_groups[0]["lr"] = 7.0
    return model, optimizer


def batches(phases: int) -> list[list[list[Tensor]]]:
    """Micro-batches of each step of each phase."""
    tokens = token_batches(phases * STEPS * ACCUMULATION * SEQUENCES)
    micro = tokens.view(phases, STEPS, ACCUMULATION, SEQUENCES, -1)
    return [[list(step) for step in phase] for phase in micro]


def reference(phases: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    model, optimizer = build(0)
    losses = []
    for step in (step for phase in batches(phases) for step in phase):
        for batch in step:
            loss = loss_of(model, batch)
            (loss / len(step)).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {k: v.detach() for k, v in model.named_parameters()}, named_state(model, optimizer)


def train_elastically(
    groups: Sequence[Sequence[int]], ep_sizes: Sequence[int | None], arguments: dict[str, Any]
) -> tuple[list[float], Any]:
    """On every worker: train in each group of machines, and go over to the next in memory."""
    first = Machine(dist.get_rank(), build, ShufflePolicy(), ep_size=ep_sizes[0], window_size=WINDOW, **arguments)
    phases = batches(len(groups))
    first.start(groups[0])
    for number, group in enumerate(groups):
        if number:
            first.go_over(groups[number - 1], group, ep_sizes[number])
            if first.balancer is not None:
                first.balancer.rearrange()  # redundant slots are filled in the first forward of ranks that joined
        if first.machine in group:
            first.train(phases[number], CLIP)
            assert first.balancer is not None
            assert first.balancer.groups.size == (ep_sizes[number] or len(group))
            assert [m.placement.redundant_per_rank for m in first.balancer.models.values()] == [1, 1]
            assert first.balancer.num_rearrangements >= number
    state = first.state()
    first.groups.make(ALL)  # as the other tests expect it
    return first.losses, state


def check_fidelity(
    workers: Workers, groups: Sequence[Sequence[int]], ep_sizes: Sequence[int | None] | None = None, **arguments: Any
) -> None:
    settings = {"step_interval": 1, **arguments}
    outcomes = workers.run(len(ALL), train_elastically, groups, ep_sizes or [None] * len(groups), settings, seconds=120)
    losses, weights, state = reference(len(groups))
    steps = len(groups) * STEPS
    for machine, (their_losses, (their_weights, their_state, balancer)) in enumerate(outcomes):
        taken = [number for number, group in enumerate(groups) if machine in group]
        of_phase = STEPS * ACCUMULATION
        expected = [loss for n in taken for loss in losses[n * of_phase : (n + 1) * of_phase]]
        assert their_losses == pytest.approx(expected, rel=0, abs=TOLERANCE)
        for ours, theirs in ((weights, their_weights), (state, their_state)):
            assert sorted(ours) == sorted(theirs)
            worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
            assert worst < TOLERANCE
        assert balancer["num_steps"] == steps
        for name, its in balancer["models"].items():
            assert its["window"].sum(dim=(1, 2)).tolist() == [
                2 * ACCUMULATION * SEQUENCES * (token_batches(1).shape[1] - 1)  # top-k
            ] * min(steps, WINDOW)
            assert torch.equal(its["window"], outcomes[0][1][2]["models"][name]["window"])


def test_resize_four_two_three_four_ranks_equals_one_process(workers: Workers) -> None:
    check_fidelity(workers, [ALL, [0, 1], [1, 0, 2], ALL])


@pytest.mark.slow
def test_resize_of_ep_groups_equals_one_process(workers: Workers) -> None:
    """Ranks of one EP group leave, an EP group leaves, EP groups merge and split, ranks are permuted."""
    check_fidelity(workers, [ALL, [2, 1], [1, 3, 0, 2], [3, 1, 2, 0]], [2, None, None, 2])
    check_fidelity(workers, [ALL, [3, 2], [3, 0, 2, 1], ALL], [2, None, 2, None])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{"use_async": True}, {"redundancy": "batch", "min_tokens_per_copy": 1}])
def test_resize_with_other_settings_equals_one_process(arguments: dict[str, Any], workers: Workers) -> None:
    check_fidelity(workers, [[1, 0], [1, 3, 0, 2], [2, 0, 3], ALL], **arguments)


@pytest.mark.slow
def test_resize_with_fabric_clips_by_the_norm_of_all_experts(workers: Workers) -> None:
    differences = workers.run(len(ALL), train_with_fabric)
    assert max(differences[:2]) < TOLERANCE


def train_with_fabric() -> float:
    """On every worker: four ranks, then two, each with a Fabric of their own. Return the difference to one process."""
    machine = dist.get_rank()
    groups, (first, second) = Groups(machine), batches(2)
    groups.make(ALL)
    fabric = fabric_of(machine, 4)
    model, optimizer = build(0)
    parallelize_experts(model, num_redundant_experts=4)
    leave_experts_out_of_ddp(model)
    wrapped = fabric.setup(model, optimizer)
    balancer = ExpertLoadBalancer(wrapped[0], wrapped[1:], policy=ShufflePolicy(), step_interval=1)
    train_in_fabric(fabric, *wrapped, balancer, first)
    difference = 0.0
    new_rank = balancer.resize({0: 0, 1: 1, 2: -1, 3: -1})
    del wrapped, fabric
    groups.make([0, 1])
    if new_rank >= 0:
        balancer.rejoin()
        fabric = fabric_of(new_rank, 2)
        wrapped = fabric.setup(model, optimizer)
        balancer.optimizers = wrapped[1:]
        train_in_fabric(fabric, *wrapped, balancer, second)
        weights = logical_parameters(wrapped[0])
        _, expected, _ = reference(2)
        difference = max(float((weights[name] - expected[name]).abs().max()) for name in expected)
    groups.make(ALL)
    os.environ |= {"RANK": str(machine), "LOCAL_RANK": str(machine), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    return difference


def fabric_of(rank: int, size: int) -> Fabric:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in names.items()}
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    fabric = Fabric(accelerator="cpu", devices=size, strategy=strategy)
    fabric.launch()
    return fabric


def train_in_fabric(
    fabric: Fabric, model: Any, optimizer: Any, balancer: ExpertLoadBalancer, steps: Sequence[Sequence[Tensor]]
) -> None:
    for step in steps:
        for batch in step:
            fabric.backward(loss_of(model, batch[dist.get_rank() :: dist.get_world_size()]) / len(step))
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        balancer.step()
        optimizer.zero_grad()


def test_resize_moves_rows_bit_by_bit(workers: Workers) -> None:
    assert workers.run(len(ALL), moved_rows) == [True] * len(ALL)


def moved_rows() -> bool:
    """On every worker: compare rows, optimizer state and gradients before and after a resize, without a step."""
    machine = Machine(dist.get_rank(), build, ShufflePolicy(), step_interval=1)
    machine.start(ALL)
    assert machine.balancer is not None
    machine.train(batches(1)[0], CLIP)
    for parameter in machine.model.parameters():
        parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype)
    objects = {id(parameter) for parameter in machine.model.parameters()}
    before = all_rows(machine)
    machine.go_over(ALL, [2, 1])
    if machine.machine in (1, 2):
        assert {id(parameter) for parameter in machine.model.parameters()} == objects
        after = all_rows(machine)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    machine.groups.make(ALL)
    return True


def all_rows(machine: Machine) -> dict[str, Tensor]:
    """Return parameters, their optimizer state and their gradients, all experts in logical order."""
    whole = {}
    for layer, module in expert_layers(machine.model):
        for name, parameter in module.named_parameters(recurse=False):
            tensors = {"": parameter.detach(), ".grad": parameter.grad} | machine.optimizer.state[parameter]
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                whole[f"{layer.name}.{name}.{key}"] = to_logical(tensor, layer) if tensor.ndim else tensor.clone()
    return whole


WRONG_MAPPINGS = [
    ({0: 0, 1: 0, 2: -1, 3: -1}, "gives new rank 0 to ranks 0, 1"),
    ({0: 0, 1: 2, 2: -1, 3: -1}, "has the new rank 2, outside of 0 to 1"),
    ({0: 0, 1: 1, 2: -1}, "has no entry for rank 3"),
    ({0: 0, 1: 1, 2: 2, 3: 3, 4: 4}, "has an entry for rank 4"),
    ({0: 0, 1: -1, 2: -1, 3: -1}, "world_size=1 would leave all experts on one rank"),
    ("of rank 2", "is not the same on rank 2"),
]


def test_resize_with_a_wrong_mapping_raises_on_all_ranks_and_changes_nothing(workers: Workers) -> None:
    for messages, changed in workers.run(len(ALL), wrong_mappings):
        for message, (_, expected) in zip(messages, WRONG_MAPPINGS, strict=True):
            assert expected in message
        assert not changed


def wrong_mappings() -> tuple[list[str], list[str]]:
    machine = Machine(dist.get_rank(), build)
    machine.start(ALL)
    machine.train(batches(1)[0], CLIP)
    balancer = machine.balancer
    assert balancer is not None
    before, messages = all_rows(machine), []
    for rank_mapping, _ in WRONG_MAPPINGS:
        if isinstance(rank_mapping, str):
            rank_mapping = {0: 0, 1: 1, 2: -1, 3: -1} if dist.get_rank() != 2 else {0: 0, 1: 2, 2: 1, 3: -1}
        with pytest.raises(ValueError, match="rank") as error:
            balancer.resize(rank_mapping)
        messages.append(str(error.value))
    machine.train(batches(1)[0][:0], CLIP)
    after = all_rows(machine)
    return messages, [name for name in before if not torch.equal(after[name], before[name])]


def test_rejoin_in_a_wrong_group_raises_on_all_ranks_and_can_be_called_again(workers: Workers) -> None:
    for outcome in workers.run(len(ALL), wrong_groups):
        assert outcome == ""


def wrong_groups() -> str:
    """On every worker: two ranks stay, two join, and each mistake is followed by the next."""
    me = dist.get_rank()
    machine = Machine(me, build)
    old, new = [0, 1], [1, 2, 0, 3]
    machine.start(old)
    if me in old:
        machine.train(batches(1)[0], CLIP)
        balancer = machine.balancer
        assert balancer is not None
        before = all_rows(machine)
        with pytest.raises(RuntimeError, match="without resize"):
            balancer.rejoin()
        assert balancer.resize({0: 2, 1: 0}, world_size=4) == new.index(me)
        calls = [lambda: machine.model(torch.tensor([0])), machine.model.state_dict, machine.optimizer.state_dict]
        for call in [*calls, balancer.step, balancer.rearrange, lambda: balancer.resize({0: 0, 1: 1})]:
            with pytest.raises(RuntimeError, match="call rejoin"):
                call()
        del machine.ddp

    def attempt(message: str, model: nn.Module | None = None, optimizers: Any = None) -> None:
        built, optimizer = build(1)
        joining = model or built, [optimizer] if optimizers is None else optimizers
        with pytest.raises(ValueError, match=message):
            machine.balancer.rejoin() if machine.balancer is not None else ExpertLoadBalancer.join(*joining)

    machine.groups.make(ALL)
    attempt("rank 0 of the new process group was rank 0, which rank_mapping made rank 2")
    machine.groups.make([0, 1, 2])
    if me != 3:
        attempt("has 3 ranks, and resize.. was told of 4")
    machine.groups.make(new)
    other = TwoLayers(24)
    attempt(
        "rank 1 has the layer 1.experts .* where rank 0 has", model=other, optimizers=[optimizer_of("adamw", other)]
    )
    sgd = optimizer_of("sgd", TwoLayers(EXPERTS, others=OTHERS))
    attempt("the optimizers .'SGD'., rank 0 has .'AdamW'.", optimizers=[sgd])
    converted, optimizer = build(1)
    if me == 3:
        parallelize_on_one_rank(converted)
    attempt("rank 3 of the new process group can't take part: .* is converted already", converted, [optimizer])
    with torch.device("meta"):
        on_meta = TwoLayers(EXPERTS, others=OTHERS)
    attempt(
        "can't take part: ValueError: the model is on the meta device",
        on_meta,
        [torch.optim.AdamW(on_meta.parameters())],
    )
    if me in old:
        assert machine.balancer is not None
        machine.balancer.rejoin()
    else:  # at last, on the meta device
        machine.model = on_meta
        machine.balancer = ExpertLoadBalancer.join(on_meta, lambda: [optimizer_of("adamw", on_meta)])
        machine.optimizer = machine.balancer.optimizers[0]
        assert not any(parameter.is_meta for parameter in on_meta.parameters())
    assert machine.balancer.num_steps == STEPS
    after = all_rows(machine)
    if me in old:
        assert all(torch.equal(after[name], before[name]) for name in before)
    machine.groups.make(ALL)
    return ""


def parallelize_on_one_rank(model: nn.Module) -> None:
    """Convert a model as without process groups."""
    with patch.object(dist, "is_initialized", return_value=False):
        parallelize_experts(model)


def test_resize_of_a_sharded_model_raises_on_all_ranks(workers: Workers) -> None:
    messages = workers.run(2, sharded_model)
    assert ["FSDP2 (ExpertParallelStrategy" in message and "checkpoint" in message for message in messages] == [
        True
    ] * 2


def sharded_model() -> str:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("efsdp", "ep"))
    model = fully_shard_moe(build(0)[0], mesh)
    with pytest.raises(ValueError, match="resize") as error:
        ExpertLoadBalancer(model).resize({0: 0, 1: 1})
    return str(error.value)


def test_resize_beside_a_model_that_stays_whole_raises_on_all_ranks(workers: Workers) -> None:
    messages = workers.run(2, whole_teacher)
    assert all("frozen model that stays whole (teacher.1.experts)" in message for message in messages)


def whole_teacher() -> str:
    model = nn.ModuleDict({"student": TwoLayers(EXPERTS), "teacher": TwoLayers(1).requires_grad_(False)})
    parallelize_experts(model)
    with pytest.raises(ValueError, match="resize") as error:
        ExpertLoadBalancer(model).resize({0: 0, 1: 1})
    return str(error.value)


def test_chained_resizes_keep_every_element(workers: Workers) -> None:
    assert workers.run(len(ALL), tagged_chain, 12) == [12] * len(ALL)


def tagged_chain(resizes: int) -> int:
    """On every worker: go from group to group; each element of each tensor says which expert it belongs to."""
    random = np.random.default_rng(0)  # the same on all
    machine = Machine(dist.get_rank(), tagged_model)
    group = ALL
    machine.start(ALL)
    tag(machine)
    for number in range(resizes):
        old, group = group, random.permutation(4)[: random.integers(2, 5)].tolist()
        if not set(old) & {group[0]}:  # rank 0 stays
            group = [old[0], *[each for each in group if each != old[0]]]
        machine.go_over(old, group, ep_size=2 if len(group) == 4 and number % 2 else None)
        if machine.balancer is not None:
            check_tags(machine)
            (placement,) = [each.placement for each in machine.balancer.models.values()]
            machine.balancer.rearrange(ShufflePolicy(number).rearrange(np.zeros(0), placement, None))
            check_tags(machine)
    machine.groups.make(ALL)
    return resizes


def tagged_model(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = TwoLayers(EXPERTS, seed)
    for module in list(model)[1:3]:
        module.experts.down.data = module.experts.down.data.to(torch.bfloat16)
        module.experts.up.requires_grad = False
    return model, torch.optim.SGD(model.parameters())


def tag(machine: Machine) -> None:
    for layer, module in expert_layers(machine.model):
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data.copy_(layer.local_experts.view(-1, 1, 1))
            if name == "down":
                parameter.grad = parameter.detach().clone()
                machine.optimizer.state[parameter] = {
                    "moments": [parameter.detach().float(), parameter.detach()[:, :1].double()],
                    "by_expert": {"count": layer.local_experts.clone(), "none": None},
                    "step": torch.tensor(7.0),
                    "seen": 3,
                }


def check_tags(machine: Machine) -> None:
    layers = list(expert_layers(machine.model))
    assert len(layers) == 2
    for layer, module in layers:
        expected = layer.local_experts
        assert module.up.shape[0] == module.down.shape[0] == len(expected) == layer.num_primaries
        state = machine.optimizer.state[module.down]
        assert not machine.optimizer.state.get(module.up)
        assert state["step"] == 7.0
        assert (state["seen"], state["by_expert"]["none"], module.up.grad) == (3, None, None)
        assert [each.dtype for each in state["moments"]] == [torch.float32, torch.float64]
        assert state["by_expert"]["count"].dtype == torch.int64
        assert module.down.grad is not None
        for tensor in (module.up, module.down, module.down.grad, *state["moments"], state["by_expert"]["count"]):
            assert torch.equal(
                tensor.detach().double().flatten(1).amin(1) if tensor.ndim > 1 else tensor.double(), expected.double()
            )
            assert torch.equal(
                tensor.detach().double().flatten(1).amax(1) if tensor.ndim > 1 else tensor.double(), expected.double()
            )
