"""The forward of a converted expert module: its experts live on several ranks."""

import inspect
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachingTorchDispatchMode

from lightning_eplb.parallel import dispatch, grouped
from lightning_eplb.parallel.ahead import CopiesAhead, SentAhead
from lightning_eplb.parallel.further import Further, FurtherArguments, Given, Sizes
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.redundancy import CopiesUnderway, CopyRoutes
from lightning_eplb.parallel.replicas import ReplicaAverage
from lightning_eplb.parallel.trial import FIRST_CHOICE, PROTOCOL_OF_FORWARD
from lightning_eplb.placement import ExpertPlacement
from lightning_eplb.policies.batch import choose_copies
from lightning_eplb.policies.split import rank_weights


class LayerLoad(NamedTuple):
    """What a layer did since it was last asked, over the EP group's ranks, summed over forward passes.

    Recomputation in the backward pass is not counted.

    Attributes:
        load: Tokens of each logical expert, ``[L]`` int64; on the CPU, but where one rank holds all experts.
        max_tokens: Those of the fullest rank; 0 where one rank holds all experts.
        num_copies: Redundant slots that were filled.
        copy_bytes: Weights of copies out, and gradients home.
        plan_seconds: Of this rank's host, to choose copies and to divide tokens among them.
    """

    load: Tensor
    max_tokens: int = 0
    num_copies: int = 0
    copy_bytes: int = 0
    plan_seconds: float = 0.0


class ExpertLayer:
    """What a converted expert module knows beyond its weights: its ranks, its slots and its load.

    Args:
        index: The layer's row in the placement and in the load, ``0 ... Y-1``.
        module: The module before its class is swapped and its parameters are cut.
        groups: The ranks that share its experts.
        average: Averages gradients over the EP groups, where there are several and nobody else does.
        dispatcher: Exchanges the tokens.
        ahead: Sends copies of one layer while another computes; the same for all layers of a model.
    """

    def __init__(
        self,
        index: int,
        name: str,
        module: nn.Module,
        groups: ExpertGroups,
        average: ReplicaAverage | None = None,
        dispatcher: type[dispatch.TokenDispatcher] = dispatch.TokenDispatcher,
        ahead: CopiesAhead | None = None,
    ) -> None:
        self.index = index
        self.name = name
        self.groups = groups
        self.average = average
        self.dispatcher = dispatcher(groups)
        self.ahead = ahead if ahead is not None else CopiesAhead()
        self.original_class = type(module)
        self.argument_names = list(inspect.signature(self.original_class.forward).parameters)[1:4]
        self.further = FurtherArguments(name, self.original_class)
        self.num_logical_experts: int = module.num_experts  # type: ignore[assignment]
        self.num_primaries = self.num_logical_experts // groups.size
        self.records_load = False
        self.physical_to_logical: np.ndarray
        self.slot_map: dispatch.SlotMap
        self.copy_routes: CopyRoutes
        self.copies_by_batch = False
        """Whether the redundant slots are filled anew for each batch, whatever the placement says."""
        self.min_tokens_per_copy = 1
        """Tokens that such a copy must take over; the same on all ranks."""
        self.takes_one_choice = False
        """Whether the original forward ignores all choices of a token but the first."""
        self.compute_dtype: torch.dtype | None = None
        """What weights are cast to in a forward, where they are kept in another dtype; ``None``: they are not cast."""
        self.saved_in_shards: Callable[[], bool] = lambda: False
        """Whether state dicts are now to hold DTensors over the EP group, though the parameters are none."""
        self._checked_ddp: weakref.ref[DistributedDataParallel] | None = None
        self._batch_slots: bytes | None = None
        self._batch_routes: CopyRoutes
        self._load_L = torch.zeros(self.num_logical_experts, dtype=torch.int64)
        self._others = LayerLoad(self._load_L)

    def set_placement(self, placement: ExpertPlacement, capacity: Sequence[float] | None = None) -> None:
        """Follow ``placement`` from the next forward on. The primaries' rows must be where it says.

        Args:
            capacity: How much work each rank should get, in any unit; ``None``: all the same.
        """
        self.ahead.discard()
        p2l_P = placement.physical_to_logical[self.index]
        if hasattr(self, "physical_to_logical"):
            np.copyto(self.physical_to_logical, p2l_P)
        else:
            self.physical_to_logical = p2l_P.copy()
        self.slot_map = dispatch.SlotMap(
            self.physical_to_logical.reshape(placement.num_ranks, placement.slots_per_rank),
            np.array(self.groups.node_of_rank),
            rank_weights(np.ones(placement.num_ranks) if capacity is None else np.array(capacity)),
        )
        self.copy_routes = CopyRoutes(self.slot_map.slots, self.num_primaries, self.groups.rank)

    def slots_for(self, counts_RL: np.ndarray) -> tuple[dispatch.SlotMap, CopyRoutes]:
        """What the slots hold in this forward, and how the weights of its copies travel.

        Args:
            counts_RL: Tokens of each rank and logical expert. All ranks are given the same.
        """
        if not self.copies_by_batch:
            return self.slot_map, self.copy_routes
        slots_RS = choose_copies(
            counts_RL.sum(axis=0),
            self.slot_map.slots,
            self.num_primaries,
            self.slot_map.weights,
            self.min_tokens_per_copy,
        )
        if (key := slots_RS.tobytes()) != self._batch_slots:
            self._batch_routes = CopyRoutes(slots_RS, self.num_primaries, self.groups.rank)
            self._batch_slots = key
        return replace(self.slot_map, slots=slots_RS), self._batch_routes

    @property
    def row_order(self) -> Tensor:
        """The logical expert of every primary's row, ranks in order, ``[L]`` int64."""
        p2l_RS = torch.from_numpy(self.physical_to_logical).view(self.groups.size, -1)
        return p2l_RS[:, : self.num_primaries].reshape(-1)

    @property
    def local_experts(self) -> Tensor:
        """The logical experts of this rank's rows, ``[n]`` int64."""
        return self.row_order.view(self.groups.size, -1)[self.groups.rank]

    @property
    def ddp(self) -> DistributedDataParallel | None:
        """That which the layer was last called in, on several ranks; ``None``: it was in none, or that is gone."""
        return self._checked_ddp() if self._checked_ddp is not None else None

    def check_left_out(self, module: nn.Module) -> None:
        """Raise ``RuntimeError`` where DDP has the rows of ``module``: it would average those of different experts."""
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is None or self.ddp is ddp:
            return
        rows = {id(parameter) for parameter in module.parameters(recurse=False)}
        if any(id(parameter) in rows for parameter in ddp._module_parameters):
            raise RuntimeError(
                f"DistributedDataParallel averages {self.name}, whose rows are other experts on each rank, and gave all"
                " ranks those of rank 0; add EPLBCallback to the trainer, or name the experts' parameters in"
                " DistributedDataParallel._set_params_and_buffers_to_ignore_for_model before you wrap the model"
            )
        self._checked_ddp = weakref.ref(ddp)

    def record(self, load: LayerLoad) -> None:
        """Add one forward to the layer's load, unless it is a recomputation in the backward pass."""
        if self.records_load and not _is_recomputing():
            self._load_L = self._load_L.to(load.load.device).add_(load.load)
            others = (ours + theirs for ours, theirs in zip(self._others[1:], load[1:], strict=True))
            self._others = LayerLoad(self._load_L, *others)  # type: ignore[arg-type]

    def take_load(self) -> LayerLoad:
        """What was recorded since the last call."""
        taken = self._others._replace(load=self._load_L.clone())
        self._load_L.zero_()
        self._others = LayerLoad(self._load_L)
        return taken


def _is_recomputing() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_cached() -> bool:
    """Whether selective checkpointing keeps some operations' outputs: recomputation must then run the same ones."""
    return any(isinstance(mode, _CachingTorchDispatchMode) for mode in _get_current_dispatch_mode_stack())


class ParallelExperts(nn.Module):
    """Mixed into the class of a module by ``parallelize_experts``; never instantiated.

    Computes what the original module computed, with the experts of all ranks. Every rank of the EP group must call
    ``forward``, in the same order of layers, also with no token.
    """

    expert_layer: ExpertLayer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """``(hidden [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D]``, under the original's names.

        Further arguments of the original, if it takes any, are passed on to it, or dispatched with the tokens.
        """
        if self.expert_layer.groups.size == 1:
            output = super().forward(*args, **kwargs)
            self._count_alone(*args, **kwargs)  # behind what it launched: no device waits for the host to get here
            return output
        return self._forward_over_ranks(*args, **kwargs)

    @torch.compiler.disable()
    def _count_alone(self, *args: Any, **kwargs: Any) -> None:
        layer = self.expert_layer
        if layer.records_load and not _is_recomputing():
            _, index_TK, _ = self._arguments(*args, **kwargs)
            layer.record(LayerLoad(dispatch.count_tokens(index_TK, layer.num_logical_experts)))

    def _arguments(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        names = self.expert_layer.argument_names
        named = dict(zip(names, args, strict=False)) | kwargs
        return [named.get(name) for name in names]  # type: ignore[misc]

    def _check(self, given: Sequence[Any]) -> None:
        """Raise, before any collective, for what is not as the protocol says. All ranks run one model, so all raise."""
        hidden_TD, index_TK, weights_TK = given
        are_tensors = all(isinstance(x, Tensor) for x in given)
        has_shapes = are_tensors and hidden_TD.ndim == index_TK.ndim == 2 and index_TK.shape == weights_TK.shape
        layer = self.expert_layer
        if has_shapes and len(hidden_TD) == len(index_TK) and not index_TK.is_floating_point():
            if layer.takes_one_choice and index_TK.shape[1] > 1:
                raise ValueError(
                    f"{layer.name} ({layer.original_class.__name__}) was called with {index_TK.shape[1]} choices a"
                    f" token, and {FIRST_CHOICE}; the protocol is: {PROTOCOL_OF_FORWARD}"
                )
            return
        said = ", ".join(
            f"{name}: {f'{list(x.shape)} {x.dtype}' if isinstance(x, Tensor) else type(x).__name__}"
            for name, x in zip(layer.argument_names, given, strict=True)
        )
        raise (ValueError if are_tensors and not index_TK.is_floating_point() else TypeError)(
            f"{layer.name} ({layer.original_class.__name__}) was called with {said}; experts over several ranks take"
            " hidden states [T, D], integer indices [T, K] and weights [T, K]. Flatten batches of sequences to T tokens"
        )

    @torch.compiler.disable()  # or autograd would see several exchanges as one, and each rank others
    def _forward_over_ranks(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden_TD, index_TK, weights_TK = given = self._arguments(*args, **kwargs)
        self._check(given)
        self.expert_layer.check_left_out(self)
        layer, groups = self.expert_layer, self.expert_layer.groups
        further = layer.further.of_call(args, kwargs)
        if layer.average is not None:
            layer.average.watch(layer.index, list(self.parameters(recurse=False)))
        order_N, counts_L = dispatch.sort_pairs(index_TK, layer.num_logical_experts)
        if layer.further.are_taken:  # where the class takes none, nothing is told
            counts_L = torch.cat((counts_L, counts_L.new_full((1,), further.is_given)))
        counts_RL = dispatch.gather_counts(counts_L, groups)  # the one place where the host waits for the device
        if layer.further.are_taken:
            counts_RL, is_given_R = counts_RL[:, :-1], counts_RL[:, -1]
            if is_given_R.any():
                layer.further.agree(further, len(hidden_TD), self._sizes(hidden_TD, index_TK), groups)
        start = time.perf_counter()
        slot_map, routes = layer.slots_for(counts_RL)
        pairs_in_parts = layer.dispatcher.bytes_in_parts / (hidden_TD.shape[-1] * hidden_TD.element_size())
        plan = dispatch.plan_dispatch(
            order_N, counts_RL, slot_map, groups.rank, routes.serving_order, layer.num_primaries, pairs_in_parts
        )
        seconds = time.perf_counter() - start
        copies = CopiesUnderway(self._local_parameters(), routes, groups)
        if sends_ahead := not _is_recomputing() and not _is_cached():
            copies.underway = layer.ahead.take(layer.index, routes, self._versions(), self._send_ahead)
        else:
            layer.ahead.discard()
        load_L = torch.from_numpy(counts_RL.sum(axis=0))
        layer.record(LayerLoad(load_L, int(plan.tokens.max()), routes.num_copies, copies.num_bytes, seconds))

        primaries, ticket = copies.attach([part.primaries for part in plan.parts])
        trip = layer.dispatcher.dispatch(hidden_TD, plan, index_TK.shape[1])
        further.dispatch(layer.dispatcher, plan, index_TK.shape[1])
        if routes.num_copies and copies.underway is None:
            copies.send()
        if sends_ahead:
            layer.ahead.send_next(layer.index)
        for i, part in enumerate(plan.parts):
            own_MD, others_MD = layer.dispatcher.receive(trip, i)
            own_MD, own, others_MD, others = further.receive(layer.dispatcher, i, own_MD, others_MD)
            own_MD = self._serve(primaries[i], own_MD, part.primary_ends, weights_TK.dtype, further, own)
            if routes.num_copies and part is plan.parts[-1]:  # their weights travelled meanwhile
                weights = copies.receive(ticket)
                others_MD = self._serve(weights, others_MD, part.copy_ends, weights_TK.dtype, further, others)
            layer.dispatcher.send_home(trip, i, own_MD, others_MD)
        return layer.dispatcher.combine(trip, weights_TK)

    def _send_ahead(self) -> SentAhead | None:
        """Send the copies of the next forward off, if the placement tells which they are and their weights are here."""
        layer = self.expert_layer
        if layer.copies_by_batch or not layer.copy_routes.num_copies or isinstance(self, FSDPModule):
            return None
        copies = CopiesUnderway(self._local_parameters(), layer.copy_routes, layer.groups)
        copies.send()
        assert copies.underway is not None
        return SentAhead(layer.copy_routes, self._versions(), copies.underway)

    def _versions(self) -> list[int]:
        """Rise with the weights' changes. Those of inference tensors, which never train, are not counted."""
        return [p._version for p in self.parameters(recurse=False) if not p.is_inference()]

    def _serve(
        self,
        weights: list[Tensor],
        hidden_MD: Tensor,
        ends_S: Tensor,
        weights_dtype: torch.dtype,
        further: Further,
        given: Given,
    ) -> Tensor:
        """Run the original forward on tokens in the order of their experts: where each one's end, and its ``weights``.

        Every tensor that was exchanged is tied into the output.
        """
        device = hidden_MD.device
        if len(hidden_MD):
            local = self._original_with(weights)
            if grouped.takes_sorted_rows(local):
                grouped.let_take_sorted_rows(local, ends_S)
            rows = torch.arange(len(hidden_MD), dtype=torch.int32, device=device)
            slots_M = torch.searchsorted(ends_S, rows, right=True)
            ones = torch.ones(len(hidden_MD), 1, dtype=weights_dtype, device=device)
            return self._original_forward(local, hidden_MD, slots_M.unsqueeze(-1), ones, given)
        with torch.no_grad():  # a row that goes nowhere tells width and dtype
            one = torch.ones(1, 1, dtype=weights_dtype, device=device)
            primaries = self._original_with(self._local_parameters(1))
            token = hidden_MD.new_zeros(1, hidden_MD.shape[-1])
            sample = self._original_forward(primaries, token, one.to(torch.int64) - 1, one, further.sample())
        shared = [parameter for child in self.children() for parameter in child.parameters()]
        return _Tied.apply(sample[:0], *shared, *further.parameters(), hidden_MD, *weights)

    def _original_forward(
        self, local: nn.Module, hidden_MD: Tensor, slots_M1: Tensor, ones_M1: Tensor, given: Given
    ) -> Tensor:
        """What it raises names the module, and the protocol that it was called by. All ranks call it, so all raise."""
        layer = self.expert_layer
        where = f"{layer.name} ({layer.original_class.__name__})"
        try:
            output = layer.original_class.forward(local, hidden_MD, slots_M1, ones_M1, *given.args, **given.kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if error.args:  # those without are control flow, as of activation checkpointing
                said = (
                    f"{error.args[0]}\nThis is from {where}, on a rank that holds {local.num_experts} of its experts."
                )
                error.args = (f"{said} It must follow the protocol: {PROTOCOL_OF_FORWARD}", *error.args[1:])
            raise
        if not isinstance(output, Tensor):
            raise TypeError(f"{where} returned a {type(output).__name__}; the protocol is: {PROTOCOL_OF_FORWARD}")
        if output.ndim != 2 or len(output) != len(hidden_MD):
            raise ValueError(
                f"{where} returned shape {list(output.shape)} for hidden states of shape {list(hidden_MD.shape)}; the"
                f" protocol is: {PROTOCOL_OF_FORWARD}"
            )
        return output

    def _sizes(self, hidden_TD: Tensor, index_TK: Tensor) -> Sizes:
        shapes = [parameter.shape for parameter in self.parameters(recurse=False)]
        top_k, num_experts = index_TK.shape[1], self.expert_layer.num_logical_experts
        of_experts = frozenset(size for shape in shapes for size in shape) | {hidden_TD.shape[1], top_k, num_experts}
        return Sizes(top_k, num_experts, of_experts)

    def _local_parameters(self, rows: int | None = None) -> list[Tensor]:
        """The weights that this rank's primaries compute with, ``[n, ...]`` each, or the first ``rows`` of them.

        ``fully_shard`` has them whole within a forward.
        """
        dtype = self.expert_layer.compute_dtype
        parameters = [p.to_local() if isinstance(p, DTensor) else p for p in self.parameters(recurse=False)]
        if rows is not None:
            parameters = [parameter[:rows] for parameter in parameters]
        return [p if dtype is None or not p.is_floating_point() else p.to(dtype) for p in parameters]

    def _original_with(self, weights: Sequence[Tensor]) -> nn.Module:
        """The module as it was before it was converted, for as many experts as ``weights`` have rows."""
        names = [name for name, _ in self.named_parameters(recurse=False)]
        local = object.__new__(self.expert_layer.original_class)
        local.__dict__.update(self.__dict__, num_experts=weights[0].shape[0])
        local.__dict__["_parameters"] = self._parameters | dict(zip(names, weights, strict=True))
        return local


class _Tied(torch.autograd.Function):
    """An output that depends on nothing, tied to tensors whose backward collectives every rank must enter.

    All get zero gradients: DDP waits for one of each parameter that all experts share, from every rank; and what only
    had undefined ones could be run by autograd's thread for the CPU, ahead of what this rank's device is to do before.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, *tensors: Tensor) -> Tensor:
        ctx.tensors = tensors
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.zeros_like(tensor) if is_needed else None for tensor, is_needed in needed)
