"""Several models in a balancer: which layers belong together, and what it does with them in a plain loop."""

import io
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eplb import ExpertLoadBalancer, ExpertPlacement, StaticPolicy, parallelize_experts
from lightning_eplb.balancer.models import find_models
from lightning_eplb.balancer.step_stats import PlacementChange, RearrangementOfModels, StepStats, StepStatsOfModels
from tests.fidelity import ShufflePolicy
from tests.models import hugging_face_model
from tests.workers import Workers

WIDTH = 4


class Experts(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.randn(num_experts, WIDTH, WIDTH, dtype=torch.float64) / 2)

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        for expert in index.unique():
            token, k = torch.where(index == expert)
            output = output.index_add(0, token, hidden[token] @ self.weight[expert] * weights[token, k, None])
        return output


class Block(nn.Module):
    def __init__(self, num_experts: int = 4) -> None:
        super().__init__()
        self.experts = Experts(num_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        index = torch.arange(len(hidden))[:, None] % self.experts.num_experts
        return hidden + self.experts(hidden, index, torch.ones_like(index, dtype=hidden.dtype))


def blocks(*numbers: int) -> nn.Sequential:
    return nn.Sequential(*(Block(number) for number in numbers))


def holder(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def torchtitan_like() -> nn.Module:
    return holder(model=holder(layers=nn.ModuleDict({"0": Block(), "1": Block()})))


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


MODELS: dict[str, tuple[Any, dict[str, list[str]]]] = {
    "direct blocks": (
        lambda: holder(block0=Block(), block1=Block(), norm=nn.Linear(2, 2)),
        {"model": ["block0.experts", "block1.experts"]},
    ),
    "a list": (lambda: holder(blocks=blocks(4, 4)), {"model": ["blocks.0.experts", "blocks.1.experts"]}),
    "a list and a block": (
        lambda: holder(blocks=blocks(4), head=Block()),
        {"model": ["blocks.0.experts", "head.experts"]},
    ),
    "a dictionary of layers": (torchtitan_like, {"model": ["model.layers.0.experts", "model.layers.1.experts"]}),
    "generator and discriminator": (
        lambda: holder(generator=holder(blocks=blocks(4)), discriminator=holder(blocks=blocks(4))),
        {"generator": ["generator.blocks.0.experts"], "discriminator": ["discriminator.blocks.0.experts"]},
    ),
    "in a dictionary, wrapped": (
        lambda: holder(module=holder(nets=nn.ModuleDict({"a": holder(x=blocks(4)), "b": holder(x=blocks(4))}))),
        {"a": ["module.nets.a.x.0.experts"], "b": ["module.nets.b.x.0.experts"]},
    ),
    "main and a draft of one block": (
        lambda: holder(main=holder(blocks=blocks(4, 4)), draft=holder(block=Block())),
        {"main": ["main.blocks.0.experts", "main.blocks.1.experts"], "draft": ["draft.block.experts"]},
    ),
    "stages of blocks": (
        lambda: holder(stages=nn.ModuleList([blocks(4), blocks(4)])),
        {"model": ["stages.0.0.experts", "stages.1.0.experts"]},
    ),
    "a hybrid": (
        lambda: holder(blocks=blocks(4, 8, 4)),
        {"model-4-experts": ["blocks.0.experts", "blocks.2.experts"], "model-8-experts": ["blocks.1.experts"]},
    ),
    "a hybrid and a teacher": (
        lambda: holder(student=holder(blocks=blocks(4, 8)), teacher=frozen(holder(blocks=blocks(6)))),
        {
            "student-4-experts": ["student.blocks.0.experts"],
            "student-8-experts": ["student.blocks.1.experts"],
            "teacher": ["teacher.blocks.0.experts"],
        },
    ),
    "three levels": (
        lambda: holder(
            gan=holder(g=holder(x=blocks(4)), d=holder(x=blocks(4))),
            encoder=holder(x=blocks(4)),
        ),
        {"gan.g": ["gan.g.x.0.experts"], "gan.d": ["gan.d.x.0.experts"], "encoder": ["encoder.x.0.experts"]},
    ),
    "of transformers": (
        lambda: holder(model=hugging_face_model("mixtral")),
        {"model": [f"model.model.layers.{i}.mlp.experts" for i in (0, 1)]},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_find_models_groups_layers_by_model_and_number_of_experts(name: str) -> None:
    make, expected = MODELS[name]
    model = parallelize_experts(make())
    assert {each.name: each.layer_names for each in find_models(model, 4)} == expected


def test_find_models_of_layers_with_other_redundancy_raises() -> None:
    first, second = Block(), Block()
    parallelize_experts(first)
    parallelize_experts(second, num_redundant_experts=1)
    with pytest.raises(ValueError, match=r"layers of model have different numbers of redundant experts"):
        ExpertLoadBalancer(holder(first=first, second=second))


def pair() -> nn.Module:
    torch.manual_seed(0)
    return holder(main=holder(blocks=blocks(4, 4)), draft=holder(blocks=blocks(8)))


def balancer_of(model: nn.Module, **arguments: Any) -> ExpertLoadBalancer:
    parallelize_experts(model, num_redundant_experts=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return ExpertLoadBalancer(model, [optimizer], **{"policy": StaticPolicy(), "window_size": 4, **arguments})


def run_steps(balancer: ExpertLoadBalancer, turns: list[str]) -> list[StepStats | None]:
    """Each step calls some of the models, by their initials, with 10 tokens on each rank."""
    stats, (optimizer,) = [], balancer.optimizers
    hidden = torch.ones(10, WIDTH, dtype=torch.float64)
    for turn in turns:
        for initial in turn:
            model = balancer.model.main if initial == "m" else balancer.model.draft  # type: ignore[union-attr]
            model.blocks(hidden).sum().backward()  # type: ignore[operator, union-attr]
        balancer.before_optimizer_step()
        optimizer.step()
        optimizer.zero_grad()
        stats.append(balancer.step())
    return stats


def windows_of_models_that_rest() -> dict[str, Any]:
    balancer = balancer_of(pair(), step_interval=100)
    stats = run_steps(balancer, ["md", "d", "d", "d", "d", "", "m"])
    assert [each is None for each in stats] == [False] * 5 + [True, False]
    last = balancer.last_step
    assert last is not None
    assert not last.models["draft"].has_tokens
    assert last.models["draft"].balancedness == 1.0
    main, draft = balancer.models["main"], balancer.models["draft"]
    with pytest.raises(
        AttributeError, match=re.escape("load of the models ['main', 'draft'] is separate: use models[")
    ):
        _ = last.load
    for attribute in ("placement", "load", "forecast_error"):
        with pytest.raises(AttributeError, match=f"{attribute} of the models .* use balancer.models"):
            getattr(balancer, attribute)
    return {
        "steps": (balancer.num_steps, main.num_steps, draft.num_steps),
        "windows": (main.load.num_steps, draft.load.num_steps),
        "load": main.load.steps().tolist(),
        "tokens": (last.avg_tokens, last.max_tokens),
    }


def test_window_of_model_that_rests_keeps_its_own_steps(workers: Workers) -> None:
    """Ten tokens to four experts in turn: 3, 3, 2, 2 on each rank."""
    for told in workers.run(2, windows_of_models_that_rest):
        assert told["steps"] == (6, 2, 5)
        assert told["windows"] == (2, 4)
        assert told["load"] == [[[6, 6, 4, 4], [6, 6, 4, 4]]] * 2
        assert told["tokens"][0] == 20.0


def to_given_placements() -> None:
    model = pair()
    balancer = balancer_of(model)
    run_steps(balancer, ["md"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    goal = ExpertPlacement([[4, 1, 2, 3, 0, 0, 5, 6, 7, 1]], 8, 2)
    with pytest.raises(ValueError, match=r"is for one model, and the balancer has \['main', 'draft'\]. Name its model"):
        balancer.rearrange(goal)
    with pytest.raises(ValueError, match=r"names 'drft'; the models are \['main', 'draft'\]"):
        balancer.rearrange({"drft": goal})
    with pytest.raises(ValueError, match="a placement must keep its shape"):
        balancer.rearrange({"main": goal})
    with pytest.raises(ValueError, match=r"must be an ExpertPlacement or, by model, \{'main'"):
        balancer.rearrange({"main": None})  # type: ignore[dict-item]
    main = balancer.models["main"].placement
    done = balancer.rearrange({"draft": goal})
    assert done is not None
    assert balancer.models["draft"].placement == goal
    assert balancer.models["main"].placement == main
    assert (done.has_changed, done.num_layers, done.num_rows) == (True, 1, 2)
    assert {name: change.has_changed for name, change in done.models.items()} == {"main": False, "draft": True}
    row = WIDTH * WIDTH * 8
    assert done.num_bytes == 2 * row * 3  # weights and two moments
    balancer.reset()
    assert balancer.models["draft"].placement == ExpertPlacement.initial(1, 8, 2, 2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_rearrange_with_placements_by_model_moves_those_only(workers: Workers) -> None:
    workers.run(2, to_given_placements)


def unequal_mappings() -> str:
    balancer = balancer_of(pair())
    goal = balancer.models["main"].placement
    with pytest.raises(ValueError, match="is not the same on rank 1") as raised:
        balancer.rearrange({"main": goal} if dist.get_rank() == 0 else {"draft": goal})
    return str(raised.value)


def test_rearrange_with_unequal_mappings_raises_on_all_ranks(workers: Workers) -> None:
    (message,) = set(workers.run(2, unequal_mappings))
    assert message.startswith("placement={'main': ExpertPlacement(layers=2")


def main_and_draft_that_do_not_match() -> list[str]:
    balancer = balancer_of(pair())
    balancer.check_same_configuration("main")
    messages = []
    for names in ((), ("draft", "main"), ("main", "head")):
        with pytest.raises(ValueError, match=r"\w") as raised:
            balancer.check_same_configuration(*names)
        messages.append(str(raised.value))
    same = balancer_of(holder(main=holder(blocks=blocks(4, 4)), draft=holder(blocks=blocks(4))))
    same.check_same_configuration("main", "draft")
    return messages


def test_check_same_configuration_of_unequal_models_names_what_differs(workers: Workers) -> None:
    for messages in workers.run(2, main_and_draft_that_do_not_match):
        assert messages == [
            "draft can't share a placement with main: num_logical_experts is 8 in draft and 4 in main",
            "main can't share a placement with draft: num_logical_experts is 4 in main and 8 in draft",
            "'head' is no model of the balancer. Use names of ['main', 'draft'].",
        ]


def through_a_checkpoint() -> None:
    balancer = balancer_of(pair(), policy=ShufflePolicy(), step_interval=2)
    run_steps(balancer, ["md", "d", "m", "m"])
    file = io.BytesIO()
    torch.save(balancer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert "window" not in state
    resumed = balancer_of(pair(), step_interval=2)
    resumed.load_state_dict(state)
    for name, model in balancer.models.items():
        assert torch.equal(resumed.models[name].load.steps(), model.load.steps())
        assert resumed.models[name].num_steps == model.num_steps
        assert state["models"][name]["physical_to_logical"].tolist() == model.placement.physical_to_logical.tolist()
    assert resumed.rearrange() is not None
    alone = balancer_of(holder(blocks=blocks(4, 4)))
    with pytest.raises(ValueError, match=r"has no window of model, but of main, draft. Resume with the models that"):
        alone.load_state_dict(state)
    state["models"]["draft"]["window"] = torch.zeros(1, 1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"window of draft has \[1, 4\] layers and experts, the model has \[1, 8\]"):
        resumed.load_state_dict(state)


def test_state_dict_of_several_models_restores_each_window(workers: Workers) -> None:
    workers.run(2, through_a_checkpoint)


def window_without_a_name() -> list[str]:
    """Saved when there was one model: a draft was added, or the layers were of one model then."""
    saved = balancer_of(holder(blocks=blocks(4, 4)))
    run = saved.model.blocks  # type: ignore[union-attr]
    for tokens in (10, 3):
        run(torch.ones(tokens, WIDTH, dtype=torch.float64))  # type: ignore[operator]
        saved.step()
    state, warned = saved.state_dict(), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        added = balancer_of(pair())
        added.load_state_dict(state)
        warned = [str(each.message) for each in caught if "window" in str(each.message)]
    assert torch.equal(added.models["main"].load.steps(), saved.load.steps())
    assert (added.models["main"].num_steps, added.models["draft"].num_steps) == (2, 0)
    divided = balancer_of(holder(encoder=holder(x=blocks(4)), decoder=holder(x=blocks(4))))
    divided.load_state_dict(state)
    assert torch.equal(divided.models["decoder"].load.steps(), saved.load.steps()[:, 1:])
    fewer = balancer_of(holder(encoder=holder(x=blocks(4)), decoder=holder(x=blocks(8))))
    with pytest.raises(ValueError, match=r"window of encoder has \[2, 4\] layers and experts, the model has \[1, 4\]"):
        fewer.load_state_dict(state)
    return warned


def test_window_without_a_name_is_loaded_into_several_models(workers: Workers) -> None:
    first, _ = workers.run(2, window_without_a_name)  # under a launcher, others than rank 0 are silent
    assert first == ["the saved state has no window of draft, which begins with an empty one"]


def with_a_teacher() -> None:
    model = holder(student=holder(blocks=blocks(4)), teacher=frozen(holder(blocks=blocks(1, 1))))
    balancer = balancer_of(model)
    assert len(model.teacher.blocks[0].experts.weight) == 1  # type: ignore[index, union-attr]
    hidden = torch.ones(3 * (1 + dist.get_rank()), WIDTH, dtype=torch.float64)
    for part in (model.student, model.teacher):
        part.blocks(hidden)  # type: ignore[operator, union-attr]
    stats = balancer.step()
    assert stats is not None
    assert stats.load.tolist() == [[3, 3, 2, 1]]  # the only one that is distributed
    assert stats.max_tokens == 5  # a redundant expert on each rank levels nine tokens
    assert stats.models["teacher"].load.tolist() == [[9]] * 2  # of both ranks
    assert balancer.placement.num_logical_experts == 4
    assert balancer.models["teacher"].load.num_steps == 1
    assert balancer.models["teacher"].is_whole
    state = balancer.state_dict()
    assert state["window"].shape == (1, 1, 4)
    without = {key: value for key, value in state.items() if key != "models"}  # as it was saved before
    for each in (state, without):
        balancer.load_state_dict(each)
    balancer.rearrange()
    balancer.reset()
    with pytest.raises(ValueError, match=r"frozen model that stays whole \(teacher"):
        balancer.resize({0: 0, 1: 1}, world_size=2)


def test_frozen_model_whose_experts_ranks_cannot_share_is_watched(workers: Workers) -> None:
    workers.run(2, with_a_teacher)


def convert(model: nn.Module, num_redundant_experts: int) -> str:
    with pytest.raises(ValueError, match=r"\w") as raised:
        parallelize_experts(model, num_redundant_experts=num_redundant_experts)
    return str(raised.value)


def refused_by_name() -> str:
    return convert(holder(main=holder(blocks=blocks(8)), draft=holder(blocks=blocks(2))), 4)


def test_redundant_experts_that_one_model_cannot_take_are_refused_by_name(workers: Workers) -> None:
    (message,) = set(workers.run(2, refused_by_name))
    assert message.startswith(
        "num_redundant_experts=4 is more than ep_size=2 of draft.blocks.0.experts can use. Use at most 2, with which"
    )


def test_step_stats_of_models_are_sums() -> None:
    def stats(name: str, load: list[list[int]], avg: list[float], most: list[int]) -> StepStats:
        return StepStats(torch.tensor(load), torch.tensor(avg), torch.tensor(most), 1, 10, direct_layers=1.0, name=name)

    parts = stats("a", [[4, 2]] * 3, [3.0] * 3, [4] * 3), stats("b", [[1, 0, 0]], [0.5], [1])
    total = StepStatsOfModels.of(parts)
    assert (total.avg_tokens, total.max_tokens, total.num_copies, total.copy_bytes) == (9.5, 13, 2, 20)
    assert total.balancedness == 9.5 / 13
    assert total.models == {"a": parts[0], "b": parts[1]}
    assert parts[0].models == {"a": parts[0]}
    with pytest.raises(AttributeError, match=r"use models\['a'\].load"):
        _ = total.load
    with pytest.raises(AttributeError, match="has no attribute 'loads'"):
        _ = total.loads  # type: ignore[attr-defined]


def test_rearrangement_of_models_has_sums_and_each_change() -> None:
    four, eight = ExpertPlacement.initial(2, 4, 2), ExpertPlacement.initial(1, 8, 2)
    swapped = ExpertPlacement([[2, 1, 0, 3], [0, 1, 2, 3]], 4, 2)
    load_a, load_b = np.array([[4, 4, 0, 0], [1, 1, 1, 1]]), np.ones((1, 8), dtype=np.int64)
    changes = PlacementChange(four, swapped, load_a, name="a"), PlacementChange(eight, eight, load_b, name="b")
    done = RearrangementOfModels(changes=changes, num_bytes=5)
    assert (done.has_changed, done.num_layers, done.num_rows, done.num_copies, done.num_bytes) == (True, 1, 2, 0, 5)
    assert (done.balancedness_before, done.balancedness_after) == (10 / 14, 1.0)
    with pytest.raises(AttributeError, match=r"before of the models \['a', 'b'\] is separate"):
        _ = done.before
    assert not RearrangementOfModels(changes=changes[1:]).has_changed


def rows_in_flight_with_a_graph_pending() -> str:
    """A backward pass behind the commit of rows would use weights of other experts."""
    model = pair()
    balancer = balancer_of(model, policy=ShufflePolicy(), step_interval=4, use_async=True)
    run_steps(balancer, ["md", "md"])
    hidden = torch.ones(10, WIDTH, dtype=torch.float64, requires_grad=True)
    losses = [part.blocks(hidden).sum() for part in (model.main, model.draft)]  # type: ignore[operator, union-attr]
    losses[0].backward()
    balancer.before_optimizer_step()
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace") as raised:
        losses[1].backward()
    return type(raised.value).__name__


def test_backward_after_rows_were_committed_raises(workers: Workers) -> None:
    assert workers.run(2, rows_in_flight_with_a_graph_pending) == ["RuntimeError"] * 2
