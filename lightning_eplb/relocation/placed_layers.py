"""Converted layers that share a placement."""

from collections.abc import Iterable, Sequence

import numpy as np

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.parallelize import ConvertedExperts
from lightning_eplb.placement import ExpertPlacement


class PlacedLayers:
    """Converted layers of one model that have the same number of experts, and the placement of these.

    Args:
        name: Name of the model.
        modules: Converted expert modules in the order of the placement's rows, at least one.
    """

    def __init__(self, name: str, modules: Sequence[ConvertedExperts]) -> None:
        self.name = name
        self.modules = list(modules)
        first_layer = modules[0].layer
        self.groups: ExpertGroups = first_layer.groups
        self.placement = ExpertPlacement(
            np.stack([each.layer.physical_to_logical for each in modules]),
            first_layer.num_logical_experts,
            self.groups.size,
        )
        """Placement of the experts now."""

    def switch(self, after: ExpertPlacement, rows: Iterable[int], capacity: Sequence[float] | None) -> None:
        """Use ``after`` in some layers from the next forward pass on. The rows of their primaries must be there.

        Args:
            after: Placement of all layers.
            rows: Layers to switch, as rows of the placement.
            capacity: Work that each EP rank gets from then on.
        """
        rows = list(rows)
        slots_YP = self.placement.physical_to_logical.copy()
        slots_YP[rows] = after.physical_to_logical[rows]
        self.placement = ExpertPlacement(slots_YP, after.num_logical_experts, after.num_ranks)
        for row in rows:
            self.modules[row].layer.set_placement(self.placement, row, capacity)
