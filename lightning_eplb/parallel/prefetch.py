"""Redundant experts' weights are sent one layer ahead, where it is known before the tokens are which ones they are."""

import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from lightning_eplb.parallel.redundant_experts import CopyRoutes
from lightning_eplb.parallel.row_exchange import RowsUnderway


class SentAhead(NamedTuple):
    """A layer's copies that are under way before the layer is called.

    Attributes:
        routes: Which way they go.
        versions: Of the weights that they are copies of, one that rises with each change in place.
        rows: What was sent.
    """

    routes: CopyRoutes
    versions: list[int]
    rows: RowsUnderway


SendAhead: TypeAlias = "Callable[[], SentAhead | None]"
"""A method that sends a layer's copies off, if it is known which they are."""


class CopiesAhead:
    """What a model's layers share to send the copies of the next while one computes. All EP ranks use it alike.

    The order of layers is learnt from the forward before. Copies that were sent ahead are used if the very next layer
    that is called is theirs, they are still to go the same way and the weights are still the same; otherwise they are
    dropped, and sent as if they had not been. Nothing is sent ahead from the last layer to the first: between two
    forwards weights mostly change.
    """

    def __init__(self) -> None:
        self._following: dict[int, tuple[int, weakref.WeakMethod[SendAhead]]] = {}
        self._last: int | None = None
        self._sent: tuple[int, SentAhead] | None = None

    def __deepcopy__(self, memo: dict) -> "CopiesAhead":
        return type(self)()  # what is under way is the original's

    def take(self, layer: int, routes: CopyRoutes, versions: list[int], send_ahead: SendAhead) -> RowsUnderway | None:
        """The rows that were sent ahead for a layer that is called now; ``None`` if none were, or others.

        Args:
            layer: Its index.
            routes: Of this forward.
            versions: Of the layer's weights, now.
            send_ahead: To be called in the next forward, when the layer before this one was called. It is held as long
                as its layer is.
        """
        if self._last is not None and self._last < layer:
            self._following[self._last] = layer, weakref.WeakMethod(send_ahead)
        self._last = layer
        if self._sent is not None:
            of_layer, sent = self._sent
            if of_layer == layer and sent.routes is routes and sent.versions == versions:
                self._sent = None
                return sent.rows
        self.discard()
        return None

    def send_next(self, layer: int) -> None:
        """Send the copies off of what is called behind ``layer``."""
        if layer in self._following:
            following, of_layer = self._following[layer]
            send_ahead = of_layer()
            if send_ahead is not None and (sent := send_ahead()) is not None:
                self._sent = following, sent

    def discard(self) -> None:
        """Drop what was sent ahead: weights or places are about to change."""
        if self._sent is not None:
            _, sent = self._sent
            sent.rows.discard()
            self._sent = None
