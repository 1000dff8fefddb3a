"""Metric of the experts' load over a window of optimizer steps, and of the balancedness of the ranks.

Shape suffixes: ``Y`` MoE layers, ``L`` logical experts, ``R`` ranks, ``W`` steps in the window.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from torchmetrics.utilities.exceptions import TorchMetricsUserError

from lightning_eplb._validation import check_positive
from lightning_eplb.functional import balancedness, rank_tokens
from lightning_eplb.placement import ExpertPlacement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class ExpertLoad(Metric):
    """Load of every logical expert over the latest optimizer steps, and the balancedness that results from it.

    Each call of :meth:`update` is one optimizer step: it takes the step's tokens by *logical* expert, summed over
    micro-batches, and drops the oldest step once the window is full. Nothing is stored by slot, so the window stays
    valid in a rearrangement: set :attr:`placement` to the new one, and it applies to the whole window.

    :meth:`compute` returns the values of the window. Calling the metric (``values = metric(load_YL)``) updates it and
    returns the values of that single step. Both return a dictionary:

    - ``load``: int64 ``[Y, L]``, the tokens of each logical expert, summed over the steps.
    - ``avg_tokens``, ``max_tokens``: tokens of the mean rank and of the most loaded rank, summed over layers and
      averaged over steps; float64 scalars. All replicas of an expert get equal shares of its tokens.
    - ``balancedness``: ``avg_tokens / max_tokens``; 1 is perfect, and 1 when there was no token; a float64 scalar.

    A window's ``max_tokens`` is that of its summed load: hot spots that change from step to step cancel out in it. The
    values of single steps show them.

    Example::

        >>> import torch
        >>> from lightning_eplb.metrics import ExpertLoad
        >>> from lightning_eplb.placement import ExpertPlacement
        >>> placement = ExpertPlacement.initial(num_layers=1, num_logical_experts=4, num_ranks=2)
        >>> metric = ExpertLoad(num_layers=1, num_logical_experts=4, window_size=2, placement=placement)
        >>> step = metric(torch.tensor([[6, 2, 1, 1]]))  # rank 0 gets 8 tokens, rank 1 gets 2
        >>> step["balancedness"]
        tensor(0.6250, dtype=torch.float64)
        >>> metric.update(torch.tensor([[4, 4, 1, 1]]))
        >>> window = metric.compute()
        >>> window["load"]
        tensor([[10,  6,  2,  2]])
        >>> window["max_tokens"]
        tensor(8., dtype=torch.float64)
        >>> metric.placement = ExpertPlacement([[0, 2, 1, 3]], num_logical_experts=4, num_ranks=2)
        >>> metric.compute()["max_tokens"]  # 12 tokens of experts 0 and 2 in two steps
        tensor(6., dtype=torch.float64)

    Args:
        num_layers: MoE layers, ``Y``.
        num_logical_experts: Experts of the model in each layer, ``L``.
        window_size: Optimizer steps in the window.
        placement: Current placement. ``None``: each expert counts as a rank of its own, so that ``balancedness`` is
            that of the experts.
        **kwargs: Arguments of :class:`torchmetrics.Metric`, such as ``process_group`` and ``sync_on_compute``. With
            ``dist_sync_on_step=True`` the values of a single step are summed over the ranks, too.

    Raises:
        ValueError: A number is below 1, or the placement has other layers or experts.

    Note:
        Counts are local until a sync sums them over ranks. So :meth:`compute` is collective when ``torch.distributed``
        is initialized: every rank of the group must call it, after the same number of updates. It gathers the whole
        window. Pass ``sync_on_compute=False`` if each rank is already given the sum over ranks, or should see its own
        tokens only.

        Log the values, not the metric object: Lightning resets a logged metric every epoch, and the window with it.

        Of a window that was saved with a larger ``window_size`` the latest steps are loaded.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    ring: Tensor
    """``[W, Y, L]`` int64. Step ``t`` is in row ``t mod W``; unfilled rows are zero."""
    total_steps: Tensor
    """int64 scalar: optimizer steps since the last reset, or since the oldest in the window that was loaded."""

    def __init__(
        self,
        num_layers: int,
        num_logical_experts: int,
        window_size: int,
        placement: ExpertPlacement | None = None,
        **kwargs: Any,
    ) -> None:
        # A cached value would be stale after `placement` was set or a state was loaded.
        super().__init__(**{"compute_with_cache": False, **kwargs})
        check_positive(num_layers=num_layers, num_logical_experts=num_logical_experts, window_size=window_size)
        self.num_layers = num_layers
        self.num_logical_experts = num_logical_experts
        self.window_size = window_size
        self.placement = placement
        self.add_state(
            "ring",
            torch.zeros(window_size, num_layers, num_logical_experts, dtype=torch.int64),
            dist_reduce_fx="sum",
            persistent=True,
        )
        # The same on every rank, so "max" keeps it as it is.
        self.add_state("total_steps", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="max", persistent=True)

    @property
    def placement(self) -> ExpertPlacement | None:
        """Placement by which the load of ranks is computed. Setting it does not change the window."""
        return self._placement

    @placement.setter
    def placement(self, placement: ExpertPlacement | None) -> None:
        if placement is not None:
            theirs = (placement.num_layers, placement.num_logical_experts)
            if theirs != (self.num_layers, self.num_logical_experts):
                raise ValueError(
                    f"placement has {theirs[0]} layers of {theirs[1]} logical experts; it must have"
                    f" num_layers={self.num_layers} and num_logical_experts={self.num_logical_experts}"
                )
        self._placement = placement

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the window, at most ``window_size``."""
        return min(int(self.total_steps), self.window_size)

    def steps(self) -> Tensor:
        """Return the steps in the window, ``[num_steps, Y, L]`` int64, oldest first. A copy of this rank's counts."""
        last = int(self.total_steps)
        rows = torch.arange(last - self.num_steps, last, device=self.ring.device) % self.window_size
        return self.ring[rows]

    def update(self, load_YL: Tensor | np.ndarray) -> None:
        """Advance the window by one optimizer step.

        Args:
            load_YL: Tokens of each logical expert in that step, integers ``[Y, L]``, on any device.

        Raises:
            ValueError: The shape or the dtype does not fit, or a count is negative. Counts on an accelerator are not
                checked, since that would wait for the device.
        """
        load_YL = self._check(load_YL)
        if self.ring.is_inference() and not torch.is_inference_mode_enabled():
            # `reset` or a sync within inference mode left tensors that nothing outside may write to.
            self.ring = self.ring.clone()
        row = (self.total_steps % self.window_size).reshape(1)
        self.ring.index_copy_(0, row, load_YL.to(self.ring.device).unsqueeze(0))
        self.total_steps = self.total_steps + 1

    def forward(self, load_YL: Tensor | np.ndarray) -> dict[str, Tensor]:
        """Update the window and return the values of this single step.

        The ``forward`` of torchmetrics would update a scratch state and merge it, or update twice. Neither fits a ring.
        """
        if self._is_synced:
            raise TorchMetricsUserError("ExpertLoad is synced with the other ranks; call unsync() before it is updated")
        self.update(load_YL)
        step_YL = self._check(load_YL).to(self.ring.device)
        if self.dist_sync_on_step and self.distributed_available_fn():
            gather = self.dist_sync_fn or gather_all_tensors
            step_YL = torch.stack(gather(step_YL, group=self.process_group)).sum(dim=0)
        self._forward_cache = self._values(step_YL, num_steps=1)
        return self._forward_cache

    def compute(self) -> dict[str, Tensor]:
        """Return the values of the window: ``load``, ``avg_tokens``, ``max_tokens`` and ``balancedness``."""
        return self._values(self.ring.sum(dim=0), num_steps=self.num_steps)

    def plot(
        self, val: dict[str, Any] | Sequence[dict[str, Any]] | None = None, ax: "Axes | None" = None
    ) -> "tuple[Figure, Axes]":
        """Draw the load of the experts as a heatmap, or the balancedness of several steps as a line.

        Args:
            val: Values as returned by :meth:`compute` or by calling the metric, or a list of these. ``None`` to compute
                them, which is collective if :meth:`compute` is.
            ax: Axes of matplotlib to draw on. ``None`` for a new figure.

        Returns:
            The figure and its axes. ``figure.savefig("load.png")`` writes it.

        Example::

            figure, axes = metric.plot()  # which experts are hot in the window
            figure, axes = metric.plot([metric(load_YL) for load_YL in steps])  # how balanced each step was
        """
        from lightning_eplb.logging.heatmap import draw_balancedness, draw_expert_load

        values = self.compute() if val is None else val
        if isinstance(values, dict):
            figure = draw_expert_load(values["load"], axes=ax)
        else:
            figure = draw_balancedness([float(each["balancedness"]) for each in values], axes=ax)
        return figure, ax if ax is not None else figure.axes[0]

    def _values(self, load_YL: Tensor, num_steps: int) -> dict[str, Tensor]:
        counts_YL = load_YL.cpu().numpy()
        tokens_YR = counts_YL.astype(np.float64) if self.placement is None else rank_tokens(counts_YL, self.placement)
        scalars = {
            "avg_tokens": tokens_YR.mean(axis=1).sum() / max(num_steps, 1),
            "max_tokens": tokens_YR.max(axis=1).sum() / max(num_steps, 1),
            "balancedness": balancedness(tokens_YR),
        }
        tensors = {k: torch.tensor(float(v), dtype=torch.float64, device=load_YL.device) for k, v in scalars.items()}
        return {"load": load_YL, **tensors}

    def _check(self, load_YL: Tensor | np.ndarray) -> Tensor:
        load_YL = load_YL if isinstance(load_YL, Tensor) else torch.tensor(np.asarray(load_YL))
        expected = (self.num_layers, self.num_logical_experts)
        if tuple(load_YL.shape) != expected:
            raise ValueError(
                f"load_YL has shape {list(load_YL.shape)}; it must be [num_layers, num_logical_experts] ="
                f" {list(expected)}, the micro-batches of an optimizer step already summed"
            )
        if load_YL.is_floating_point() or load_YL.is_complex() or load_YL.dtype == torch.bool:
            raise ValueError(f"load_YL has dtype {load_YL.dtype}; counts of tokens must be integers, such as int64")
        if load_YL.device.type == "cpu" and (load_YL < 0).any():
            layer, expert = (int(i) for i in (load_YL < 0).nonzero()[0])
            raise ValueError(
                f"load_YL[{layer}, {expert}]={int(load_YL[layer, expert])} is negative; counts of tokens start at 0"
            )
        return load_YL.to(torch.int64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        device = self.ring.device
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # Torchmetrics keeps the tensors of the dictionary themselves, on their device, whatever their shape.
        # The steps are copied into a new ring from row 0 on, so that a window of any size takes them.
        saved, last = self.ring.to(device), int(self.total_steps)
        self.ring = torch.zeros(self.window_size, *self._shape_of_step(saved), dtype=torch.int64, device=device)
        kept = min(last, len(saved), self.window_size)
        self.ring[:kept] = saved[torch.arange(last - kept, last, device=device) % len(saved)]
        self.total_steps = torch.tensor(kept, dtype=torch.int64, device=device)
        self._update_count = kept  # else compute() warns that it was called before update()

    def _shape_of_step(self, saved: Tensor) -> tuple[int, int]:
        expected = (self.num_layers, self.num_logical_experts)
        if saved.ndim != 3 or tuple(saved.shape[1:]) != expected or not len(saved):
            raise ValueError(
                f"the saved window has shape {list(saved.shape)}; it must be [steps, num_layers, num_logical_experts]"
                f" = [steps, {expected[0]}, {expected[1]}], that of the model it is loaded for"
            )
        return expected
