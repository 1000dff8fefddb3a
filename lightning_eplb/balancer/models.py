"""Models of a balancer: groups of expert layers that share a placement and a window of load."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lightning_eplb.functional import balancedness
from lightning_eplb.metrics import ExpertLoad
from lightning_eplb.parallel.forward import ParallelExperts
from lightning_eplb.parallel.parallelize import ConvertedExperts, converted_experts
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies import Costs, Outlook
from lightning_eplb.policies.batch_redundancy import choose_copies
from lightning_eplb.policies.forecast import Forecast, forecast, sub_windows
from lightning_eplb.policies.token_split import level_tokens, rank_weights
from lightning_eplb.relocation.placed_layers import PlacedLayers


class ModelLayers(PlacedLayers):
    """Expert layers of one model that have the same number of experts, with one placement and one window of load.

    ``ExpertLoadBalancer.models`` has them by name. :func:`find_models` tells which layers belong together.

    Attributes:
        name: Name of the model.
        modules: Its converted expert modules, in the order of the placement's rows.
        groups: Process groups of the layers.
        placement: Current placement.
        is_whole: ``True`` for a frozen model that every rank keeps whole: its load is counted, and nothing moves. Each
            expert then counts as a rank of its own.

    Args:
        name: Name of the model.
        modules: Converted expert modules, at least one.
        window_size: Optimizer steps of the window.
    """

    def __init__(self, name: str, modules: Sequence[ConvertedExperts], window_size: int) -> None:
        super().__init__(name, modules)
        self.is_whole = modules[0].layer.is_whole
        if modules[0].layer.chooses_by_batch:
            self.placement = self.placement.without_copies()
        shape = self.placement.num_layers, self.placement.num_logical_experts
        placement = self.placement if self.groups.size > 1 else None
        self.load = ExpertLoad(*shape, window_size, placement, sync_on_compute=False)  # ranks are given the sum
        """Load of the latest optimizer steps in which these layers got tokens."""
        self.num_steps = 0
        """Optimizer steps in which these layers got tokens."""
        self.forecast_error: float | None = None
        """Relative error of the forecast of the last complete interval; 0 is exact."""
        self.predicted_balancedness: float | None = None
        """Balancedness that the latest rearrangement should bring; ``None`` before the first."""
        self._forecast: Forecast | None = None
        self._load_since_forecast = torch.zeros(shape, dtype=torch.int64)

    def switch(self, after: ExpertPlacement, rows: Iterable[int], capacity: Sequence[float] | None) -> None:
        """Use ``after`` in some layers from now on, and for the balancedness of the window."""
        super().switch(after, rows, capacity)
        self.load.placement = self.placement

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers in the model that was converted."""
        return [layer.name for layer, _ in self.modules]

    def record(self, load_YL: Tensor) -> None:
        """Add an optimizer step to the window. Do nothing if the model rested: its window is that of its own steps."""
        if load_YL.any():
            self.load.update(load_YL)
            self.num_steps += 1
            self._load_since_forecast += load_YL

    def reset_window(self, steps: Sequence[Tensor], num_steps: int) -> None:
        """Replace the window.

        Args:
            steps: Tokens of each logical expert in each step, ``[Y, L]``, oldest first.
            num_steps: Optimizer steps in which these layers got tokens, also those before the window.
        """
        self.load.reset()
        for load_YL in steps:
            self.load.update(load_YL)
        self.num_steps = num_steps

    def measure_forecast(self) -> None:
        """Compare the latest forecast with the load that came."""
        if self._forecast is not None:
            self.forecast_error = self._forecast.error(self._load_since_forecast.numpy())

    def forget_forecast(self) -> None:
        """Drop the latest forecast: it was not made of the window, so the load that comes is no measure of it."""
        self._forecast = None

    def look_ahead(self, steps_WYL: np.ndarray, interval: int, costs: Costs | None) -> Outlook:
        """Forecast the load. Every rank does it, so that each can measure the error later.

        Args:
            steps_WYL: Steps of the window that the forecast is made of, oldest first.
            interval: Steps until the next decision.
            costs: Costs of moves and redundant experts, if they are known.
        """
        if not len(steps_WYL):
            steps_WYL = np.zeros((1, *steps_WYL.shape[1:]), dtype=np.int64)
        self._forecast = forecast(steps_WYL)
        self._load_since_forecast.zero_()
        return Outlook(steps_WYL.sum(axis=0), len(steps_WYL), self._forecast, interval, costs, sub_windows(steps_WYL))

    def predict(self, outlook: Outlook, after: ExpertPlacement, capacity: Sequence[float] | None) -> np.ndarray:
        """Return the tokens of the ranks in a step that gets the forecast load, ``[Y, R]``.

        Args:
            outlook: Forecast of :meth:`look_ahead`.
            after: Placement to judge.
            capacity: Share of the work that each EP rank gets; ``None``: equal shares.
        """
        load_YL, slots_YRS = outlook.forecast.first // outlook.num_steps, after.by_rank
        weight_R = rank_weights(np.ones(after.num_ranks) if capacity is None else np.array(capacity))
        layers = [layer for layer, _ in self.modules]
        if layers[0].chooses_by_batch:
            slots_YRS = np.stack(
                [
                    choose_copies(load_L, slots_RS, after.primaries_per_rank, weight_R, layer.min_tokens_per_copy)
                    for load_L, slots_RS, layer in zip(load_YL, slots_YRS, layers, strict=True)
                ]
            )
        return level_tokens(load_YL, slots_YRS, 1.0 / weight_R)

    def window_balancedness(self) -> float:
        """Return the balancedness of the window's load under the current placement; 1 before the first step."""
        if not self.load.num_steps:
            return 1.0
        if self.groups.size == 1:
            return float(self.load.compute()["balancedness"])
        return balancedness(self.window_tokens())

    def window_tokens(self) -> np.ndarray:
        """Return the tokens of the ranks if the current placement had served the whole window, ``[Y, R]``."""
        load_YL = self.load.compute()["load"].cpu().numpy()
        return load_YL if self.groups.size == 1 else level_tokens(load_YL, self.placement.by_rank)


class BalancedModels:
    """Models of a balancer, and what it tells of them together. Base class of ``ExpertLoadBalancer``.

    Args:
        models: Layers of each model.
    """

    def __init__(self, models: Sequence[ModelLayers]) -> None:
        self.models: Mapping[str, ModelLayers] = {model.name: model for model in models}
        """Layers, placement and window of each model by name, see :func:`find_models`. It is one, named ``model``,
        unless several were found, or layers with different numbers of experts."""

    @property
    def placement(self) -> ExpertPlacement:
        """Current placement. Of several models each has its own, in :attr:`models`."""
        return self._only_model("placement").placement

    @property
    def load(self) -> ExpertLoad:
        """Load of the latest optimizer steps. Of several models each has its own, in :attr:`models`."""
        return self._only_model("load").load

    @property
    def forecast_error(self) -> float | None:
        """Relative error of the forecast of the last complete interval; 0 is exact.

        Of several models each has its own, in :attr:`models`.
        """
        return self._only_model("forecast_error").forecast_error

    def window_balancedness(self) -> float:
        """Return the balancedness of the windows' load under the current placements; 1 before the first step."""
        models = [model for model in self.placed_models if model.load.num_steps]
        if len(models) < 2:
            return models[0].window_balancedness() if models else 1.0
        # Windows may have different numbers of steps, which must not weigh.
        return balancedness(np.concatenate([model.window_tokens() / model.load.num_steps for model in models]))

    def check_same_configuration(self, *names: str) -> None:
        """Check that models could share a placement, as a main model and its draft may be meant to.

        Performs no communication: the numbers are the same on all ranks, and so is the error.

        Args:
            *names: Names in :attr:`models`. Defaults to all models.

        Raises:
            ValueError: A name is unknown, or the models differ in the number of experts, of redundant experts or of
                ranks that share them. The message names both models and what differs.
        """
        if unknown := [name for name in names if name not in self.models]:
            raise ValueError(f"{unknown[0]!r} is no model of the balancer. Use names of {list(self.models)}.")
        first, *others = [self.models[name] for name in names or self.models]
        for other in others:
            for number in ("num_logical_experts", "num_redundant_experts", "num_ranks"):
                theirs, wanted = getattr(other.placement, number), getattr(first.placement, number)
                if theirs != wanted:
                    raise ValueError(
                        f"{other.name} can't share a placement with {first.name}: {number} is {theirs} in {other.name}"
                        f" and {wanted} in {first.name}"
                    )

    @property
    def placed_models(self) -> list[ModelLayers]:
        """Models whose experts are distributed: all but those that every rank keeps whole."""
        return [model for model in self.models.values() if not model.is_whole]

    def _only_model(self, attribute: str) -> ModelLayers:
        first, *others = self.placed_models
        if others:
            raise AttributeError(
                f"{attribute} of the models {list(self.models)} is separate: use"
                f" balancer.models[{first.name!r}].{attribute}"
            )
        return first


def find_models(model: nn.Module, window_size: int) -> list[ModelLayers]:
    """Find the layers of ``model`` that share a placement and a window.

    Layers belong together if they are of the same model and have the same number of experts. A model is found from the
    root on, by these rules:

    1. A model of transformers is one model, whatever it consists of. So is a module that holds expert layers, or a
       list of blocks with some (``nn.ModuleList``, ``nn.Sequential``, ``nn.ModuleDict`` of single blocks), itself.
    2. A module of which one child holds expert layers is what that child is. So wrappers and a ``LightningModule``
       around a model do not count.
    3. Of a module of which several children hold expert layers, these are models of their own if one of them has a list
       of blocks: a generator and a discriminator, a teacher and a student, a main model and a draft. If none has, they
       are blocks of one model.

    A model is named after the attribute that tells it from the others, such as ``generator``, and ``model`` if there is
    one only. Where layers of one model have different numbers of experts, the number is added: ``model-16-experts``.

    Args:
        model: Model with converted layers.
        window_size: Optimizer steps of the windows.

    Raises:
        ValueError: Layers of a model have different numbers of redundant experts, or models have different EP groups.
    """
    name_of = {id(module): name for name, module in _expert_modules(model)}
    by_key: dict[tuple[str, int, bool], list[ConvertedExperts]] = {}
    for each in converted_experts(model):
        key = name_of[id(each.module)], each.layer.num_logical_experts, each.layer.is_whole
        by_key.setdefault(key, []).append(each)
    models = []
    for key, parts in by_key.items():
        same_name = [other for other in by_key if other[0] == key[0]]
        name = (key[0] or "model") + (f"-{key[1]}-experts" if len(same_name) > 1 else "")
        redundant = [len(layer.physical_to_logical) - layer.num_logical_experts for layer, _ in parts]
        if len(set(redundant)) > 1:
            raise ValueError(
                f"layers of {name} have different numbers of redundant experts, {redundant}. Call parallelize_experts"
                " with the same num_redundant_experts for all."
            )
        models.append(ModelLayers(name, parts, window_size))
    _check_alike([model for model in models if not model.is_whole])
    return models


def _check_alike(models: Sequence[ModelLayers]) -> None:
    first = models[0].modules[0].layer
    for model in models:
        for layer, _ in model.modules:
            if layer.groups is not first.groups:
                raise ValueError(
                    f"{layer.name} of {model.name} is spread over other ranks than {first.name}. Call"
                    " parallelize_experts with the same group, or make a balancer for each."
                )


def _expert_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every converted module with the name of its model, empty for the only one."""
    holders = {id(module) for module in root.modules() if any(converted_experts(module))}

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        children = {child_name: child for child_name, child in module.named_children() if id(child) in holders}
        if len(children) == 1 and not _is_whole(module, children):
            (child,) = children.values()
            yield from walk(child, name)
        elif len(children) > 1 and not _is_whole(module, children) and any(map(_has_list, children.values())):
            for child_name, child in children.items():
                yield from walk(child, f"{name}.{child_name}" if name else child_name)
        else:
            for _, expert_module in converted_experts(module):
                yield name, expert_module

    yield from walk(root, "")


def _is_whole(module: nn.Module, children: Mapping[str, nn.Module]) -> bool:
    """Return ``True`` if a module is one model, whatever its children with expert layers are."""
    modeling = sys.modules.get("transformers.modeling_utils")
    is_of_transformers = modeling is not None and isinstance(module, modeling.PreTrainedModel)
    return is_of_transformers or any(isinstance(c, ParallelExperts) or _is_list(c) for c in children.values())


def _is_list(module: nn.Module) -> bool:
    """Return ``True`` for a list of blocks."""
    if isinstance(module, nn.ModuleDict):
        return not any(map(_has_list, module.children()))
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _has_list(module: nn.Module) -> bool:
    """Return ``True`` if expert layers within a module are in a list of blocks."""
    lists = (each for each in module.modules() if isinstance(each, (nn.ModuleList, nn.ModuleDict, nn.Sequential)))
    return any(any(converted_experts(each)) for each in lists)
