"""The policy that never plans."""

from collections.abc import Mapping

import numpy as np

from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies.base import Outlook, Policy, Topology, checked_load


class StaticPolicy(Policy):
    """Keeps the experts where they are, or moves them once to a placement that you give.

    Without an argument it only watches: load and balancedness are still recorded and logged. ``EPLBCallback`` moves
    experts to a given placement before the first step; in a loop of your own call ``balancer.rearrange()`` there.

    Example::

        EPLBCallback(policy=StaticPolicy([[0, 3, 1, 2]]))  # one layer, 2 ranks: 0 and 3 on rank 0, 1 and 2 on rank 1
        EPLBCallback(policy=StaticPolicy({"draft": [[0, 3, 1, 2]]}))  # of several models, those not named stay

    Args:
        physical_to_logical: For every MoE layer the logical expert of each slot, ``-1`` for an empty redundant slot;
            rank ``r`` has the ``r``-th part of the slots, its primaries first. For several models a dictionary by name
            in ``ExpertLoadBalancer.models``; those that are not in it keep theirs. ``None`` keeps what there is.

    Raises:
        ValueError: The layers don't have the same number of slots, or a slot holds no whole number. When it is
            used: the numbers of layers and slots are not the model's, it is no valid placement, or it is not clear
            for which model it is.
    """

    def __init__(self, physical_to_logical: list[list[int]] | dict[str, list[list[int]]] | None = None) -> None:
        self._of_models: dict[str, StaticPolicy] = {}
        if isinstance(physical_to_logical, dict):
            self._of_models = {name: StaticPolicy(slots) for name, slots in physical_to_logical.items()}
        elif physical_to_logical is not None:
            widths = sorted({len(layer) for layer in physical_to_logical})
            if len(widths) != 1:
                raise ValueError(
                    f"physical_to_logical has layers of {widths} slots; it needs one list of slots for each MoE layer,"
                    " all of the same length"
                )
            for expert in (expert for layer in physical_to_logical for expert in layer):
                if isinstance(expert, bool) or not isinstance(expert, int | np.integer):
                    raise ValueError(
                        f"physical_to_logical holds {expert!r}; it takes logical experts as whole numbers, and -1"
                    )
        self.physical_to_logical = physical_to_logical

    def rearrange(self, load_YL: np.ndarray, placement: ExpertPlacement, topology: Topology) -> ExpertPlacement:
        """Return the placement as it is, or the one given to ``__init__``; the load has no say."""
        checked_load(load_YL, placement, topology)
        if self.physical_to_logical is None:
            return placement
        if isinstance(self.physical_to_logical, dict):
            raise ValueError(
                f"physical_to_logical is for the models {list(self.physical_to_logical)}; give one's slots"
            )
        layers, slots = len(self.physical_to_logical), len(self.physical_to_logical[0])
        if (layers, slots) != placement.physical_to_logical.shape:
            raise ValueError(
                f"physical_to_logical has {layers} layers of {slots} slots; this model has {placement.num_layers} MoE"
                f" layers of {placement.num_physical_experts} slots ({placement.num_logical_experts} experts and"
                f" {placement.num_redundant_experts} redundant ones over {placement.num_ranks} ranks)"
            )
        return ExpertPlacement(self.physical_to_logical, placement.num_logical_experts, placement.num_ranks)

    def rearrange_models(
        self, outlooks: Mapping[str, Outlook], placements: Mapping[str, ExpertPlacement], topology: Topology
    ) -> Mapping[str, ExpertPlacement]:
        """Return the placements as they are, or those given to ``__init__``; see :meth:`Policy.rearrange_models`."""
        if isinstance(self.physical_to_logical, dict):
            if unknown := [name for name in self._of_models if name not in placements]:
                raise ValueError(f"physical_to_logical names {unknown[0]!r}; the models are {list(placements)}")
            return {
                name: self._of_models[name].rearrange(outlook.window, placements[name], topology)
                if name in self._of_models
                else placements[name]
                for name, outlook in outlooks.items()
            }
        if self.physical_to_logical is not None and len(placements) > 1:
            raise ValueError(
                f"physical_to_logical is for one model, and there are {list(placements)}. Give a dictionary by model,"
                f" such as {{'{next(iter(placements))}': [[...]]}}."
            )
        return super().rearrange_models(outlooks, placements, topology)
