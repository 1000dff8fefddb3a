"""Prefetch of the next layer's redundant weights, where the placement tells before the tokens which ones are needed."""

import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from lightning_eplb.parallel.redundant_experts import RedundantRoutes
from lightning_eplb.parallel.row_exchange import RowExchange


class PrefetchedWeights(NamedTuple):
    """Weights of a layer's redundant experts that were sent before the layer is called.

    Attributes:
        routes: Routes that they take.
        versions: Versions of the parameters that were sent. A change in place increments them.
        rows: Exchange in flight.
    """

    routes: RedundantRoutes
    versions: list[int]
    rows: RowExchange


Prefetch: TypeAlias = "Callable[[], PrefetchedWeights | None]"
"""Method of a layer that sends its redundant weights, or returns ``None`` if they can't be prefetched."""


class WeightPrefetcher:
    """Prefetcher that the layers of a model share. All EP ranks use it alike.

    It learns the order of layers from the previous forward pass. Prefetched weights are used if the very next layer
    that is called is theirs, with the same routes and unchanged parameters. Else they are dropped and sent again.
    Nothing is prefetched from the last layer to the first, since weights mostly change between two forward passes.
    """

    def __init__(self) -> None:
        self._next_layer: dict[int, tuple[int, weakref.WeakMethod[Prefetch]]] = {}
        self._last: int | None = None
        self._in_flight: tuple[int, PrefetchedWeights] | None = None

    def __deepcopy__(self, memo: dict) -> "WeightPrefetcher":
        return type(self)()  # what is in flight belongs to the original

    def take(self, layer: int, routes: RedundantRoutes, versions: list[int], prefetch: Prefetch) -> RowExchange | None:
        """Return the prefetched weights of a layer that is called now, or ``None`` if there are none that fit.

        Args:
            layer: Index of the layer.
            routes: Routes of this forward pass.
            versions: Versions of the layer's parameters now.
            prefetch: Method to call in the next forward pass, once the layer before this one was called. It is
                referenced weakly.
        """
        if self._last is not None and self._last < layer:
            self._next_layer[self._last] = layer, weakref.WeakMethod(prefetch)
        self._last = layer
        if self._in_flight is not None:
            prefetched_layer, prefetched = self._in_flight
            if prefetched_layer == layer and prefetched.routes is routes and prefetched.versions == versions:
                self._in_flight = None
                return prefetched.rows
        self.cancel()
        return None

    def prefetch_after(self, layer: int) -> None:
        """Send the weights of the layer that is called after ``layer``."""
        if layer in self._next_layer:
            next_layer, method = self._next_layer[layer]
            prefetch = method()
            if prefetch is not None and (prefetched := prefetch()) is not None:
                self._in_flight = next_layer, prefetched

    def cancel(self) -> None:
        """Drop the weights in flight, since parameters or the placement are about to change."""
        if self._in_flight is not None:
            _, prefetched = self._in_flight
            prefetched.rows.discard()
            self._in_flight = None

    def reset(self) -> None:
        """Forget the order of layers, too, since ranks that join do not know it."""
        self.cancel()
        self._next_layer.clear()
        self._last = None
