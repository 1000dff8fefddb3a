"""Profile run: the largest exchanges of a run, done once with dummy rows, so that too little memory shows early."""

import time
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_eplb.balancer.models import ModelLayers
from lightning_eplb.parallel.dummy_dispatch import CallCapture, dispatch_dummies
from lightning_eplb.parallel.forward import ParallelExperts
from lightning_eplb.parallel.packing import bytes_of_row
from lightning_eplb.relocation.mover import ExpertMover
from lightning_eplb.relocation.transfer import LayerTransfer

IMBALANCE = 2.0
"""Tokens of the fullest rank in the profile run, in parts of the mean rank's. Estimated, not measured: single steps of
balanced runs stay below it, and more would refuse runs that never need the memory."""


def imbalance_of(num_ranks: int) -> float:
    """Return the imbalance to profile with: twice the mean, but never all tokens on one rank.

    With two ranks twice the mean would be all tokens, which a healthy run never has. It is halfway there then.

    Example:
        >>> imbalance_of(2), imbalance_of(8)
        (1.5, 2.0)
    """
    return min(IMBALANCE, (1 + num_ranks) / 2)


class ProfileRun:
    """Waits for the first training call of each model, and repeats it with dummy tokens between two steps.

    Nothing of the model, its optimizers and its load changes. All ranks call its methods alike.

    Args:
        models: Models of the balancer. The layers of one are alike, so its first stands for all.
        mover: Relocation of the experts.
    """

    def __init__(self, models: Sequence[ModelLayers], mover: ExpertMover) -> None:
        self._mover = mover
        self._waiting = {model.name: (model, CallCapture()) for model in models}
        self._has_relocated = False
        for model, capture in self._waiting.values():
            model.modules[0].layer.capture = capture

    @property
    def is_done(self) -> bool:
        """``True`` once every model was called and profiled."""
        return not self._waiting

    def run(self, with_gradients: bool, overlap_bytes: int) -> None:
        """Profile the models that were called since, right after an optimizer step.

        Args:
            with_gradients: Gradients move with their experts.
            overlap_bytes: Bytes of a rank in a step if transfers overlap with training.

        Raises:
            torch.OutOfMemoryError: This rank has too little memory. The message names what was tried.
        """
        start = time.perf_counter()
        if not self._has_relocated:
            self._relocate(with_gradients, overlap_bytes)
            self._has_relocated = True
        for name, (model, capture) in list(self._waiting.items()):
            if capture.hidden is None:
                continue  # it rested in this step
            rows = self._dispatch(model, capture)
            del self._waiting[name]
            rank_zero_info(
                f"profile run: dispatches of {rows:,} rows to one rank in {model.modules[0].layer.name} and an exchange"
                f" of all primaries fit into memory ({time.perf_counter() - start:.2f} s)"
            )

    def _relocate(self, with_gradients: bool, overlap_bytes: int) -> None:
        in_flight: list[LayerTransfer] = []
        try:
            self._mover.rehearse(with_gradients, overlap_bytes, in_flight.append)
        except torch.OutOfMemoryError as error:
            transfer = in_flight[-1] if in_flight else None
            rows = max(moves.max_rows for moves in transfer.moves) if transfer is not None else 0
            size = transfer.max_rank_bytes / 2**20 if transfer is not None else 0.0
            layers = [self._mover.layer_name(moves.layer) for moves in transfer.moves] if transfer is not None else []
            raise torch.OutOfMemoryError(
                f"profile run: out of memory in a relocation of {rows} primaries a rank with their optimizer state,"
                f" {size:.1f} MiB, in {_few(layers)}. A rearrangement would run out of it later. Use fewer tokens a"
                f" batch, a larger ep_size, or StaticPolicy(), which moves nothing. ({error})"
            ) from error

    def _dispatch(self, model: ModelLayers, capture: CallCapture) -> int:
        """Dispatch dummies to each rank in turn. Return the rows of the fullest rank."""
        layer, module = model.modules[0]
        assert isinstance(module, ParallelExperts)
        assert capture.hidden is not None
        imbalance = imbalance_of(model.groups.size)
        rows = int(imbalance * capture.weights.shape.numel())
        try:
            dispatch_dummies(module, capture, imbalance)
        except torch.OutOfMemoryError as error:
            size = rows * capture.hidden.shape[-1] * capture.hidden.dtype.itemsize / 2**20
            redundant = model.placement.num_redundant_experts
            of_copies = bytes_of_row(_as_rows(module)) * redundant / model.groups.size / 2**20
            raise torch.OutOfMemoryError(
                f"profile run: out of memory in {layer.name}, forward and backward, with {rows:,} rows of"
                f" {size:.1f} MiB on one rank, {imbalance:g} times the mean, and {of_copies:.1f} MiB of redundant"
                " experts' weights and as much of gradients. A step with such a skew would run out of it later. Use"
                f" fewer tokens a batch, fewer than {redundant} redundant experts, or a larger ep_size. ({error})"
            ) from error
        return rows


def _as_rows(module: nn.Module) -> list[torch.Tensor]:
    return list(module.parameters(recurse=False))


def _few(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more layers" if len(names) > 1 else "".join(names) or "the first layer"
