"""Primaries that move behind training: the rows of a few layers between two optimizer steps, then those of others."""

from collections import deque
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.relocation.plan import LayerMoves
from lightning_eplb.relocation.transfer import LayersUnderway, relocate

BACKGROUND_BYTES = 256 * 2**20
"""A rank's send buffers, and its receive buffers, hold no more than this and a layer's rows."""


class BackgroundRelocation:
    """Moves of primaries that are under way while training goes on. All ranks of the EP group use it alike.

    Weights and optimizer state stay as they are from one optimizer step to the next. So their rows can be read right
    after a step, travel on a process group of their own behind the next forward and backward passes, and be put in
    place before the next step. Gradients come to be meanwhile. Their rows move right before the step, once nothing
    changes them any more: a loss scaler, a hook and ``grad.data`` change them unseen. Estimated, not measured: a
    step's rows have 85 MiB of gradients a rank at most under AdamW, 0.4 ms at 200 GB/s. To compare them with rows that
    were sent before would have the host wait for the backward pass, which takes longer.

    Args:
        plan: The moves, layer by layer.
        groups: Of the layers.
        group: The same ranks as ``groups.ep_group``; nothing else travels on it.
        most_bytes: Between two optimizer steps no layer more is sent once the fullest rank sends or receives so many.
            The same on all ranks.
    """

    def __init__(
        self, plan: Sequence[LayerMoves], groups: ExpertGroups, group: dist.ProcessGroup, most_bytes: int
    ) -> None:
        self.num_bytes = 0
        """What crossed ranks so far, over all ranks of the EP group."""
        self._waiting = deque(plan)
        self._underway: list[LayersUnderway] = []
        self._groups, self._group = groups, group
        self._most_bytes = most_bytes

    @property
    def is_underway(self) -> bool:
        """Whether rows were sent that are not in place yet."""
        return bool(self._underway)

    @property
    def layers_underway(self) -> list[int]:
        """Those whose rows were sent and are not in place yet."""
        return [moves.layer for layers in self._underway for moves in layers.moves]

    @property
    def is_done(self) -> bool:
        return not self._underway and not self._waiting

    def prepare(self, tensors_of: Callable[[int], list[Tensor]]) -> None:
        """Take the next layers, for :meth:`send`. Right after an optimizer step, and none before :meth:`finish`.

        Args:
            tensors_of: A layer's weights and optimizer state, see :func:`~.transfer.tensors_to_move`.
        """
        assert not self._underway
        room = self._most_bytes
        while self._waiting and (not self._underway or room > 0):
            layers = LayersUnderway(self._waiting, tensors_of, self._groups, self._group, room, is_behind=True)
            room -= layers.bytes_of_fullest
            self._underway.append(layers)

    def send(self) -> None:
        """Send off what was prepared."""
        for layers in self._underway:
            layers.send()
            self.num_bytes += layers.num_bytes

    def aim(self) -> None:
        """Prepare what the host can of :meth:`finish`; it waits for nothing, and nothing is put in place."""
        for layers in self._underway:
            layers.aim()

    def finish(self, gradients: dict[int, list[Tensor]]) -> list[int]:
        """Wait for the rows that were sent, and put them in place with their gradients. Before the optimizer steps.

        Args:
            gradients: Those of each layer that is under way, as many and alike on all ranks.

        Returns:
            The layers whose primaries are now where the plan wants them.
        """
        for layers in self._underway:
            layers.put_in_place()
        arrived = [moves for layers in self._underway for moves in layers.moves]
        self._underway = []
        with_gradients = [moves for moves in arrived if gradients[moves.layer]]
        self.num_bytes += relocate(with_gradients, gradients.__getitem__, self._groups)
        return [moves.layer for moves in arrived]

    def abandon(self) -> None:
        """Forget all that is under way, and wait for nobody.

        Ranks may have sent unequally much: what travels on ``group`` afterwards may never arrive.
        """
        self._underway = []
