"""The forward of a converted expert module: its experts live on several ranks."""

import functools
import inspect
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_eplb import _compat
from lightning_eplb.parallel import dispatch, grouped, hooks
from lightning_eplb.parallel.ahead import CopiesAhead, SentAhead
from lightning_eplb.parallel.communication_hooks import check_registered_hooks
from lightning_eplb.parallel.further import FURTHER_GIVEN, Further, FurtherArguments, Given, Sizes
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.per_expert import Additions, PerExpert, part_of
from lightning_eplb.parallel.redundancy import CopiesUnderway, CopyRoutes
from lightning_eplb.parallel.replicas import ReplicaAverage
from lightning_eplb.parallel.trial import FIRST_CHOICE, PROTOCOL_OF_FORWARD
from lightning_eplb.parallel.uneven import UnevenCalls
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
        self.parameter_names = [name for name, _ in module.named_parameters(recurse=False)]
        self.num_primaries = self.num_logical_experts // groups.size
        self.per_expert = PerExpert()
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
        self.uneven: UnevenCalls | None = None
        """In evaluation, where ranks may call the layer unequally often; ``None``: all call it equally often."""
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

    def check_parameters(self, module: nn.Module) -> None:
        """Raise ``RuntimeError`` where parameters of ``module`` were replaced since it was converted, as by pruning."""
        names = [name for name, parameter in _compat.registered(module).parameters.items() if parameter is not None]
        if names != self.parameter_names:
            raise RuntimeError(
                f"{self.name} had the parameters {self.parameter_names} when its experts were spread over ranks, and"
                f" has {names} now; pruning and parametrizations of experts are not supported, so take them away"
            )

    def check_left_out(self, module: nn.Module) -> None:
        """Raise ``RuntimeError`` where DDP has the rows of ``module``: it would average those of different experts.

        ``ValueError`` where it does not average what it has over all ranks.
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
                f"DistributedDataParallel averages {self.name}, whose rows are other experts on each rank, and gave all"
                " ranks those of rank 0; add EPLBCallback to the trainer, or call"
                " lightning_eplb.leave_experts_out_of_ddp(model) before you wrap the model"
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
    return _compat.backward_id() != -1


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
        self.expert_layer.check_parameters(self)
        self.expert_layer.check_left_out(self)
        layer, groups = self.expert_layer, self.expert_layer.groups
        further = layer.further.of_call(args, kwargs)
        parameters = list(self.parameters(recurse=False))
        if layer.average is not None:
            layer.average.watch(layer.index, parameters)
        word = hooks.wrap_hooks(self, layer) | FURTHER_GIVEN * further.is_given
        order_N, counts_L = dispatch.sort_pairs(index_TK, layer.num_logical_experts)
        if layer.uneven is not None:
            counts_RL, words_R = layer.uneven.wait_for(self, hidden_TD, weights_TK, counts_L, word)
        else:  # the one place where the host waits for the device
            counts_RL, words_R = dispatch.gather_counts(counts_L, groups, word)
        has_hooks = hooks.check_hooks(words_R & ~FURTHER_GIVEN, self, layer)
        if (words_R & FURTHER_GIVEN).any():
            layer.further.agree(further, len(hidden_TD), self._sizes(hidden_TD, index_TK), groups)
        # Other EP groups average these gradients, too, and may have tokens.
        if torch.is_grad_enabled() and groups.num_replicas == 1 and not counts_RL.any():
            output_TD = self._without_tokens(hidden_TD, index_TK, weights_TK, further)
            if output_TD is not None:
                layer.ahead.discard()
                return output_TD
        return self._exchange_tokens(hidden_TD, weights_TK, order_N, counts_RL, has_hooks, further)

    def take_part(self, hidden_TD: Tensor, weights_TK: Tensor, counts_RL: np.ndarray) -> None:
        """Serve the tokens of other ranks, which call this layer while this rank does not. In evaluation only.

        Args:
            hidden_TD: ``[0, D]``.
            weights_TK: ``[0, K]``.
            counts_RL: Tokens of each rank and logical expert.
        """
        order_N = torch.empty(0, dtype=torch.int64, device=hidden_TD.device)
        self._exchange_tokens(hidden_TD, weights_TK, order_N, counts_RL, has_hooks=False, further=Further([], {}))

    def _exchange_tokens(
        self,
        hidden_TD: Tensor,
        weights_TK: Tensor,
        order_N: Tensor,
        counts_RL: np.ndarray,
        has_hooks: bool,
        further: Further,
    ) -> Tensor:
        layer, groups = self.expert_layer, self.expert_layer.groups
        parameters = list(self.parameters(recurse=False))
        start = time.perf_counter()
        slot_map, routes = layer.slots_for(counts_RL)
        pairs_in_parts = layer.dispatcher.bytes_in_parts / (hidden_TD.shape[-1] * hidden_TD.element_size())
        plan = dispatch.plan_dispatch(
            order_N, counts_RL, slot_map, groups.rank, routes.serving_order, layer.num_primaries, pairs_in_parts
        )
        seconds = time.perf_counter() - start
        check = functools.partial(hooks.check_wrapped, parameters, layer)
        copies = CopiesUnderway(self._local_parameters(has_hooks=has_hooks), routes, groups, check)
        if sends_ahead := not _is_recomputing() and not _compat.keeps_outputs():
            copies.underway = layer.ahead.take(layer.index, routes, self._versions(), self._send_ahead)
        else:
            layer.ahead.discard()
        load_L = torch.from_numpy(counts_RL.sum(axis=0))
        layer.record(LayerLoad(load_L, int(plan.tokens.max()), routes.num_copies, copies.num_bytes, seconds))

        primaries, ticket = copies.attach([part.primaries for part in plan.parts])
        trip = layer.dispatcher.dispatch(hidden_TD, plan, weights_TK.shape[1])
        further.dispatch(layer.dispatcher, plan, weights_TK.shape[1])
        if routes.num_copies and copies.underway is None:
            copies.send()
        if sends_ahead:
            layer.ahead.send_next(layer.index)
        call = _Call(weights_TK.dtype, Additions(self, layer.per_expert.counters), further)
        for i, part in enumerate(plan.parts):
            own_MD, others_MD = layer.dispatcher.receive(trip, i)
            own_MD, own, others_MD, others = further.receive(layer.dispatcher, i, own_MD, others_MD)
            served = slot_map.slots[groups.rank, part.served].tolist()
            primary, redundant = served[: len(part.primary_ends)], served[len(part.primary_ends) :]
            own_MD = self._serve(_Served(primaries[i], primary, own_MD, part.primary_ends, own), call)
            if routes.num_copies and part is plan.parts[-1]:  # their weights travelled meanwhile
                weights = copies.receive(ticket)
                others_MD = self._serve(_Served(weights, redundant, others_MD, part.copy_ends, others), call)
            layer.dispatcher.send_home(trip, i, own_MD, others_MD)
        self._count(call.additions)
        return layer.dispatcher.combine(trip, weights_TK)

    def _count(self, additions: Additions) -> None:
        """Add to the counters of all ranks what the forward added on each of them.

        Where EP groups may call the layer unequally often, each adds its own: see :class:`CountedApart`.
        """
        groups, is_uneven = self.expert_layer.groups, self.expert_layer.uneven is not None
        for sums in additions.sums.values():
            dist.all_reduce(sums, group=groups.exchange)
            if groups.replicas is not None and not is_uneven:
                dist.all_reduce(sums, group=groups.replicas)
        additions.write()

    def _without_tokens(
        self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, further: Further
    ) -> Tensor | None:
        """The output where no expert of any rank got a token, if the unmodified module then trains none of its own.

        An optimizer skips parameters without a gradient; a gradient of zeros has it decay them. Modules that compute
        one expert after the other leave gradients out, those that compute all of them together give zeros.

        Returns:
            ``None`` where the unmodified module gives zeros.
        """
        local = self._original_with(self._local_parameters(), self.expert_layer.local_experts.tolist())

        forward = self.expert_layer.original_class.forward

        def trains_without_tokens(hidden: Tensor, weights: Tensor, given: Given) -> bool:
            try:
                return forward(local, hidden, index_TK[:0], weights, *given.args, **given.kwargs).requires_grad
            except (RuntimeError, ValueError, IndexError):  # it can't be called without tokens
                return True

        alone = hidden_TD[:0].detach(), weights_TK[:0].detach()
        if trains_without_tokens(*alone, further.no_tokens(detached=True)):
            return None
        output_TD = self._sample(hidden_TD, weights_TK.dtype, further).new_zeros(hidden_TD.shape)
        ddp = self.expert_layer.ddp
        if ddp is not None and (not ddp.find_unused_parameters or ddp.static_graph):  # it waits for all gradients
            shared = [*self._shared_parameters(), *further.parameters()]
            return _Tied.apply(output_TD, hidden_TD, weights_TK, *further.trained(), *shared)
        if trains_without_tokens(*alone, further.no_tokens()):
            output_TD = _Tied.apply(output_TD, *further.trained())
        if trains_without_tokens(hidden_TD[:0], weights_TK[:0], further.no_tokens(detached=True)):
            return _Tied.apply(output_TD, hidden_TD, weights_TK)
        return output_TD

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
        return [_compat.version_of(p) for p in self.parameters(recurse=False) if not p.is_inference()]

    def _serve(self, served: "_Served", call: "_Call") -> Tensor:
        """Run the original forward on tokens in the order of their experts.

        Every tensor that was exchanged is tied into the output.
        """
        layer, hidden_MD = self.expert_layer, served.hidden
        if len(hidden_MD):
            local = self._original_with(served.weights, served.experts)
            if grouped.takes_sorted_rows(local):
                grouped.let_take_sorted_rows(local, served.ends)
            rows = torch.arange(len(hidden_MD), dtype=torch.int32, device=hidden_MD.device)
            slots_M = torch.searchsorted(served.ends, rows, right=True)
            ones = torch.ones(len(hidden_MD), 1, dtype=call.weights_dtype, device=hidden_MD.device)
            output_MD = self._original_forward(local, hidden_MD, slots_M.unsqueeze(-1), ones, served.given)
            call.additions.add(local, served.experts)
            return _Tied.apply(output_MD, *self._shared_parameters()) if layer.per_expert.has_modules else output_MD
        sample = self._sample(hidden_MD, call.weights_dtype, call.further)[:0]
        shared = [*self._shared_parameters(), *call.further.parameters()]
        return _Tied.apply(sample, *shared, hidden_MD, *served.weights)

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

    @torch.no_grad()
    def _sample(self, hidden_TD: Tensor, weights_dtype: torch.dtype, further: Further) -> Tensor:
        """The output of one row that goes nowhere, ``[1, D]``: it tells width and dtype."""
        one = torch.ones(1, 1, dtype=weights_dtype, device=hidden_TD.device)
        first = self._original_with(self._local_parameters(1), self.expert_layer.local_experts[:1].tolist())
        row = hidden_TD.new_zeros(1, hidden_TD.shape[-1])
        return self._original_forward(first, row, one.to(torch.int64) - 1, one, further.sample())

    def _shared_parameters(self) -> list[Tensor]:
        """Those that every rank has, of submodules."""
        return [parameter for child in self.children() for parameter in child.parameters()]

    def _local_parameters(self, rows: int | None = None, has_hooks: bool = False) -> list[Tensor]:
        """The weights that this rank's primaries compute with, ``[n, ...]`` each, or the first ``rows`` of them.

        ``fully_shard`` has them whole within a forward. Where their gradients have hooks, which all ranks run together,
        they are views: autograd runs the backward passes of these, and what follows of each, last one first on every
        rank. Parameters that get their gradients from one function are ready at once, and their order is any.
        """
        dtype = self.expert_layer.compute_dtype
        parameters = [p.to_local() if isinstance(p, DTensor) else p for p in self.parameters(recurse=False)]
        if has_hooks:
            parameters = [parameter.view_as(parameter) for parameter in parameters]
        if rows is not None:
            parameters = [parameter[:rows] for parameter in parameters]
        return [p if dtype is None or not p.is_floating_point() else p.to(dtype) for p in parameters]

    def _original_with(self, weights: Sequence[Tensor], experts: Sequence[int]) -> nn.Module:
        """The module as it was before it was converted, for these ``experts``, whose ``weights`` they are."""
        layer = self.expert_layer
        parameters = dict(zip((name for name, _ in self.named_parameters(recurse=False)), weights, strict=True))
        return part_of(self, layer.original_class, parameters, layer.per_expert.taken, experts)


class _Call(NamedTuple):
    """What all rows of a call have in common: the routing weights' dtype, what counters get, and further arguments."""

    weights_dtype: torch.dtype
    additions: Additions
    further: Further


class _Served(NamedTuple):
    """Rows that a rank serves, in the order of their experts, ``[M, D]``.

    Attributes:
        weights: Of the experts, ``[experts, ...]`` each.
        experts: Their logical ids.
        hidden: The rows.
        ends: Where each expert's rows end.
        given: Further arguments for these rows.
    """

    weights: list[Tensor]
    experts: Sequence[int]
    hidden: Tensor
    ends: Tensor
    given: Given


class _Tied(torch.autograd.Function):
    """An output that is tied to tensors that it does not depend on, whose backward collectives every rank must enter.

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
        return grads[0], *(torch.zeros_like(tensor) if is_needed else None for tensor, is_needed in needed)
