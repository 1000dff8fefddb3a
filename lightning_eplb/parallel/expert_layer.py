"""State of a converted expert module: its process groups, its slots, its settings and its load."""

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb import _compat
from lightning_eplb.parallel.communication_hooks import check_registered_hooks
from lightning_eplb.parallel.direct_dispatch import DirectDispatcher
from lightning_eplb.parallel.dispatch import TokenBatch, TokenDispatcher
from lightning_eplb.parallel.dispatch_plan import SlotMap
from lightning_eplb.parallel.expert_data_parallel import ExpertGradientSync
from lightning_eplb.parallel.extra_arguments import ExtraArgumentResolver
from lightning_eplb.parallel.fused_choice import FusedChoice, report
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.join import ExpertJoin
from lightning_eplb.parallel.packing import to_device
from lightning_eplb.parallel.per_expert_state import PerExpertState
from lightning_eplb.parallel.prefetch import WeightPrefetcher
from lightning_eplb.parallel.redundant_experts import RedundantRoutes
from lightning_eplb.placement import EMPTY, ExpertPlacement, num_primary_slots
from lightning_eplb.policies.batch_redundancy import choose_copies
from lightning_eplb.policies.token_split import rank_weights


class LayerLoad(NamedTuple):
    """Load of a layer since it was last taken, over the ranks of the EP group, summed over forward passes.

    Recomputation in the backward pass is not counted.

    Attributes:
        load: Tokens of each logical expert, ``[L]`` int64, on the CPU unless one rank holds all experts.
        max_tokens: Tokens of the fullest rank. 0 if one rank holds all experts.
        num_copies: Filled redundant slots.
        copy_bytes: Bytes of redundant experts' weights sent and gradients returned.
        plan_seconds: Host time of this rank to choose redundant experts and to plan the dispatch.
    """

    load: Tensor
    max_tokens: int = 0
    num_copies: int = 0
    copy_bytes: int = 0
    plan_seconds: float = 0.0


@dataclass(frozen=True)
class LayerContext:
    """State that all expert layers of a model share.

    Attributes:
        groups: Process groups of the layers.
        dispatcher: Class of the layers' token dispatchers. ``None`` for the fastest that runs.
        gradient_sync: Average of gradients over several EP groups. ``None`` if there is one, or FSDP2 averages them.
        prefetcher: Prefetcher of redundant weights of one layer while another computes.
        reported: Names of the layers whose path was told, one at most.
    """

    groups: ExpertGroups
    dispatcher: type[TokenDispatcher] | None = None
    gradient_sync: ExpertGradientSync | None = None
    prefetcher: WeightPrefetcher = field(default_factory=WeightPrefetcher)
    reported: list[str] = field(default_factory=list)


class ExpertLayer:
    """State of a converted expert module beyond its parameters.

    Args:
        index: Number of the layer among those that were converted together, in the order of modules.
        name: Name of the module in the model.
        module: Module before its class is swapped and its parameters are sharded.
        context: State that all layers share.
        per_expert: Attributes of the module with an element for each expert.
        reads_first_choice_only: The original forward ignores all choices of a token but the first.
    """

    def __init__(
        self,
        index: int,
        name: str,
        module: nn.Module,
        context: LayerContext,
        per_expert: PerExpertState,
        reads_first_choice_only: bool,
    ) -> None:
        self.index = index
        self.name = name
        self._groups: ExpertGroups | None = context.groups
        self.gradient_sync = context.gradient_sync
        self.prefetcher = context.prefetcher
        self.dispatcher_class = context.dispatcher or DirectDispatcher
        self.dispatcher: TokenDispatcher = self.dispatcher_class(context.groups)
        self.per_expert = per_expert
        self.reads_first_choice_only = reads_first_choice_only
        self.original_class = type(module)
        self.fused_choice = FusedChoice(module, False, "it was not asked for")
        """Choice between fused kernels and the module's own forward."""
        self._reported = context.reported
        self.argument_names = list(inspect.signature(self.original_class.forward).parameters)[1:4]
        self.extra_arguments = ExtraArgumentResolver(name, self.original_class)
        self.num_logical_experts: int = module.num_experts  # type: ignore[assignment]
        self.parameter_names = [name for name, _ in module.named_parameters(recurse=False)]
        self.num_primaries = num_primary_slots(self.num_logical_experts, context.groups.size)
        """Rows of each rank, ``n``: its primaries, and phantom experts behind them."""
        self.row_order: Tensor
        """Logical expert of every row, ranks in order, ``[R*n]`` int64. Phantom experts are counted on from ``L``."""
        self.local_experts: Tensor
        """Logical experts of this rank's primaries, in the order of its first rows, int64."""
        self.physical_to_logical: np.ndarray
        self.slot_map: SlotMap
        self.redundant_routes: RedundantRoutes
        self.is_whole = False
        """``True`` if every rank has all experts, while those of other layers are distributed."""
        self.records_load = False
        self.chooses_by_batch = False
        self.min_tokens_per_copy = 1
        self.compute_dtype: torch.dtype | None = None
        self.join: ExpertJoin | None = None
        self.capture: Callable[[ExpertLayer, Sequence[Tensor], Sequence[Any], Mapping[str, Any]], None] | None = None
        """Function that gets this rank's weights and the arguments of each call over several ranks."""
        self._saves_shards: Callable[[], bool] = lambda: False
        self._checked_ddp: weakref.ref[DistributedDataParallel] | None = None
        self._batch_slots: bytes | None = None
        self._slot_of_expert: Tensor | None = None
        self._batch_routes: RedundantRoutes
        self._load_L = torch.zeros(self.num_logical_experts, dtype=torch.int64)
        self._other_load = LayerLoad(self._load_L)

    @property
    def groups(self) -> ExpertGroups:
        """Process groups. Raises ``RuntimeError`` between :meth:`detach` and :meth:`attach`."""
        if self._groups is None:
            raise RuntimeError(
                f"the experts of {self.name} left their process group in ExpertLoadBalancer.resize(). Make the new"
                " process group, and call rejoin() on every rank that stays and ExpertLoadBalancer.join() on those that"
                " join; a rank that left computes no more."
            )
        return self._groups

    def detach(self) -> None:
        """Leave the process groups. The layer can't be called until :meth:`attach`. Performs no communication."""
        self.prefetcher.reset()
        self.extra_arguments = ExtraArgumentResolver(self.name, self.original_class)  # ranks that join know nothing yet
        if self.gradient_sync is not None:
            self.gradient_sync.close()
        self._groups, self.gradient_sync, self._checked_ddp, self._batch_slots = None, None, None, None
        del self.dispatcher  # and its buffers
        self.take_load()

    def attach(
        self, groups: ExpertGroups, gradient_sync: ExpertGradientSync | None, placement: ExpertPlacement
    ) -> None:
        """Use other process groups, on which the primaries' rows are where ``placement`` of this layer says."""
        self._groups, self.gradient_sync = groups, gradient_sync
        self.dispatcher = self.dispatcher_class(groups)
        self.num_primaries = placement.primaries_per_rank
        self.physical_to_logical = np.empty(placement.num_physical_experts, dtype=np.int64)
        self.set_placement(placement)

    def set_placement(self, placement: ExpertPlacement, row: int = 0, capacity: Sequence[float] | None = None) -> None:
        """Use ``placement`` from the next forward pass on. The primaries' rows must be where it says.

        Args:
            placement: Placement of this layer and of others.
            row: Row of this layer in the placement. Defaults to the first.
            capacity: Work that each rank should get, in any unit. Defaults to the same for all.
        """
        self.cancel_prefetch()
        p2l_P = placement.physical_to_logical[row]
        if hasattr(self, "physical_to_logical"):
            np.copyto(self.physical_to_logical, p2l_P)
        else:
            self.physical_to_logical = p2l_P.copy()
        self.slot_map = SlotMap(
            self.physical_to_logical.reshape(placement.num_ranks, placement.slots_per_rank),
            np.array(self.groups.node_of_rank),
            rank_weights(np.ones(placement.num_ranks) if capacity is None else np.array(capacity)),
        )
        self.redundant_routes = RedundantRoutes(self.slot_map.slots, self.num_primaries, self.groups.rank)
        self.row_order = torch.from_numpy(placement.row_order[row])
        own_S = self.slot_map.slots[self.groups.rank, : self.num_primaries]
        self.local_experts = torch.from_numpy(own_S[own_S != EMPTY])
        self._slot_of_expert = None

    def set_redundancy(self, by_batch: bool, min_tokens_per_copy: int) -> None:
        """Set how redundant slots are filled. The same on all ranks.

        Args:
            by_batch: Choose redundant experts for each batch, whatever the placement says.
            min_tokens_per_copy: Tokens that a redundant expert chosen by batch must take over.
        """
        self.chooses_by_batch, self.min_tokens_per_copy = by_batch, min_tokens_per_copy

    def set_load_recording(self, enabled: bool) -> None:
        """Record the load of forward passes from now on, or stop."""
        self.records_load = enabled

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Cast weights to ``dtype`` in forward passes. ``None`` leaves them as they are."""
        self.compute_dtype = dtype

    def set_fused_choice(self, choice: FusedChoice) -> None:
        """Set how the choice between fused kernels and the module's own forward is made. The same on all ranks."""
        self.fused_choice = choice
        self._reported.clear()

    def report_path(self) -> None:
        """Tell once for a model which path its layers take, after the first call of one."""
        if not self._reported:
            self._reported.append(self.name)
            others = f"; tokens travel {self.dispatcher.way}" if self.groups.size > 1 else ""
            report(self.fused_choice, self.name, self.original_class.__name__, others)

    def set_join(self, join: ExpertJoin | None) -> None:
        """Allow ranks to call the layer unequally often, in evaluation. ``None``: all ranks call it equally often."""
        self.join = join

    def save_shards_while(self, condition: Callable[[], bool]) -> None:
        """Save state dicts with DTensors over the EP group while ``condition`` holds, though parameters are none."""
        self._saves_shards = condition

    @property
    def saves_shards(self) -> bool:
        """``True`` if state dicts hold DTensors over the EP group now, though parameters are none."""
        return self._saves_shards()

    def cancel_prefetch(self) -> None:
        """Drop prefetched weights of all layers of the model. Call it when parameters change unnoticed."""
        self.prefetcher.cancel()

    def slots_for(self, counts_RL: np.ndarray) -> tuple[SlotMap, RedundantRoutes]:
        """Return the slots of this forward pass, and the routes of the redundant experts' weights.

        Args:
            counts_RL: Tokens of each rank and logical expert, the same on all ranks.
        """
        if not self.chooses_by_batch:
            return self.slot_map, self.redundant_routes
        slots_RS = choose_copies(
            counts_RL.sum(axis=0),
            self.slot_map.slots,
            self.num_primaries,
            self.slot_map.weights,
            self.min_tokens_per_copy,
        )
        if (key := slots_RS.tobytes()) != self._batch_slots:
            self._batch_routes = RedundantRoutes(slots_RS, self.num_primaries, self.groups.rank)
            self._batch_slots = key
        return replace(self.slot_map, slots=slots_RS), self._batch_routes

    def slot_of_expert(self, device: torch.device) -> Tensor | None:
        """Return the routing table, see :class:`~lightning_eplb.parallel.dispatch.TokenBatch`."""
        if self.chooses_by_batch and self.slot_map.slots.shape[1] > self.num_primaries:
            return None
        if self.redundant_routes.num_redundant and not self.chooses_by_batch:
            return None
        if self._slot_of_expert is None or self._slot_of_expert.device != device:
            slots_RS = self.slot_map.slots
            table = np.full(self.num_logical_experts + 1, slots_RS.size, dtype=np.int32)
            rank_X, slot_X = np.nonzero(slots_RS[:, : self.num_primaries] != EMPTY)
            table[slots_RS[rank_X, slot_X]] = rank_X * slots_RS.shape[1] + slot_X
            self._slot_of_expert = to_device(table, device)
        return self._slot_of_expert

    def batch(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, experts_weigh: bool) -> TokenBatch:
        """Return the batch of one call, as the dispatcher takes it."""
        table = self.slot_of_expert(hidden_TD.device)
        num_experts, slots_RS = self.num_logical_experts, self.slot_map.slots
        return TokenBatch(self.name, hidden_TD, index_TK, weights_TK, num_experts, table, slots_RS, experts_weigh)

    @property
    def num_phantoms(self) -> int:
        """Phantom experts of the layer, over all ranks."""
        return len(self.row_order) - self.num_logical_experts

    @property
    def num_filled(self) -> int:
        """Rows of this rank that hold an expert: the first ones."""
        return len(self.local_experts)

    def select_rows(self, full: Tensor) -> Tensor:
        """Return this rank's rows, ``[n, ...]``, of those of all experts, ``[L, ...]``: zeros for phantom experts."""
        rows = full[to_device(self.local_experts.numpy(), full.device)]
        return pad_rows(rows, self.num_primaries)

    @property
    def ddp(self) -> DistributedDataParallel | None:
        """DDP wrapper that the layer was last called in, on several ranks. ``None`` if there is none."""
        return self._checked_ddp() if self._checked_ddp is not None else None

    def check_parameters(self, module: nn.Module) -> None:
        """Raise ``RuntimeError`` if parameters of ``module`` were replaced after conversion, as by pruning."""
        names = [name for name, parameter in _compat.registered(module).parameters.items() if parameter is not None]
        if names != self.parameter_names:
            raise RuntimeError(
                f"{self.name} had the parameters {self.parameter_names} when its experts were distributed over ranks,"
                f" and has {names} now. Remove pruning and parametrizations of experts, which are not supported."
            )

    def check_ddp(self, module: nn.Module) -> None:
        """Check that DDP leaves the parameters of ``module`` alone, since its rows differ between ranks.

        Raises:
            RuntimeError: DDP averages parameters of ``module``.
            ValueError: DDP does not average its parameters over all ranks.
        """
        ddp = _compat.active_ddp()
        if ddp is None:
            return
        check_registered_hooks(ddp)  # at any time before a backward pass
        if self.ddp is ddp:
            return
        rows = {id(parameter) for parameter in module.parameters(recurse=False)}
        if any(id(parameter) in rows for parameter in _compat.ddp_parameters(ddp)):
            raise RuntimeError(
                f"DistributedDataParallel averages {self.name}, whose rows are other experts on each rank, and has"
                " overwritten them by those of rank 0. Add EPLBCallback to the trainer, or call"
                " lightning_eplb.leave_experts_out_of_ddp(model) before you wrap the model."
            )
        self._checked_ddp = weakref.ref(ddp)

    def record(self, load: LayerLoad) -> None:
        """Add the load of one forward pass, unless it recomputes in the backward pass."""
        if self.records_load and not is_recomputing():
            self._load_L = self._load_L.to(load.load.device).add_(load.load)
            others = (ours + theirs for ours, theirs in zip(self._other_load[1:], load[1:], strict=True))
            self._other_load = LayerLoad(self._load_L, *others)  # type: ignore[arg-type]

    def take_load(self) -> LayerLoad:
        """Return the load since the last call, and reset it."""
        taken = self._other_load._replace(load=self._load_L.clone())
        self._load_L.zero_()
        self._other_load = LayerLoad(self._load_L)
        return taken


def pad_rows(rows: Tensor, number: int) -> Tensor:
    """Return ``rows`` with rows of zeros behind them, ``number`` in all."""
    if len(rows) == number:
        return rows
    return torch.cat((rows, rows.new_zeros(number - len(rows), *rows.shape[1:])))


def is_recomputing() -> bool:
    """Return ``True`` within a backward pass, in which activation checkpointing calls a forward again."""
    return _compat.backward_id() != -1
