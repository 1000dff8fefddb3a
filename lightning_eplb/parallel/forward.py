"""Forward pass of a converted expert module: dispatch, local and redundant experts, combine.

Shape suffixes: ``T`` tokens, ``K`` top-k, ``N`` token-expert pairs of a rank, ``M`` rows that a rank computes, ``L``
logical experts, ``R`` ranks, ``D`` model width.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_eplb import _compat
from lightning_eplb.parallel import gradient_hooks, grouped_mm
from lightning_eplb.parallel.dispatch import TokenBatch, TokenCounts, empty_index
from lightning_eplb.parallel.dispatch_plan import Routing, count_tokens, route
from lightning_eplb.parallel.dtensor import local_shard
from lightning_eplb.parallel.expert_layer import ExpertLayer, LayerLoad, is_recomputing
from lightning_eplb.parallel.extra_arguments import HAS_EXTRA_ARGUMENTS, CallArguments, CallSizes, ExtraArguments
from lightning_eplb.parallel.fused_choice import KEEPS_FORWARD
from lightning_eplb.parallel.fused_experts import FusedForm, compute_tokens, fused_experts
from lightning_eplb.parallel.per_expert_state import CounterUpdates, make_part
from lightning_eplb.parallel.prefetch import PrefetchedWeights
from lightning_eplb.parallel.protocol_check import FIRST_CHOICE, PROTOCOL_OF_FORWARD
from lightning_eplb.parallel.redundant_experts import RedundantExperts
from lightning_eplb.parallel.ties import TieOutput


class ParallelExperts(nn.Module):
    """Mixin that ``parallelize_experts`` adds to the class of an expert module. Never instantiated.

    It computes what the original module computes, with the experts of all ranks. Every rank of the EP group must call
    ``forward``, in the same order of layers, also without tokens.
    """

    expert_layer: ExpertLayer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute ``(hidden [T, D], top_k_index [T, K], top_k_weights [T, K]) -> [T, D]``, under the original's names.

        Extra arguments of the original are passed on to it, or dispatched with the tokens.
        """
        if self.expert_layer.groups.size == 1:
            if self.expert_layer.fused_choice.form is not None:
                return self._forward_fused(*args, **kwargs)
            output = super().forward(*args, **kwargs)
            self._record_local(*args, **kwargs)  # after the launches, so that no device waits for the host
            return output
        return self._forward_over_ranks(*args, **kwargs)

    @torch.compiler.disable()
    def _forward_fused(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute all experts on this rank by fused kernels, or by the original forward where they can't."""
        layer, choice = self.expert_layer, self.expert_layer.fused_choice
        hidden_TD, index_TK, weights_TK = arguments = self._arguments(*args, **kwargs)
        is_plain = len(args) + len(kwargs) == 3 and self._follow_protocol(arguments)
        weights = self._whole([getattr(self, name) for name in choice.names])
        form = choice.form_for(self, weights, not is_plain)
        layer.report_path()
        if form is None or not index_TK.numel():
            output = super().forward(*args, **kwargs)
            self._record_local(*args, **kwargs)
            return output
        output_TD, counts_L = compute_tokens(form, weights, hidden_TD, index_TK, weights_TK)
        layer.record(LayerLoad(counts_L))
        return output_TD

    @torch.compiler.disable()
    def _record_local(self, *args: Any, **kwargs: Any) -> None:
        layer = self.expert_layer
        if layer.records_load and not is_recomputing():
            _, index_TK, _ = self._arguments(*args, **kwargs)
            layer.record(LayerLoad(count_tokens(index_TK, layer.num_logical_experts)))

    def _arguments(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        names = self.expert_layer.argument_names
        named = dict(zip(names, args, strict=False)) | kwargs
        return [named.get(name) for name in names]  # type: ignore[misc]

    @staticmethod
    def _follow_protocol(arguments: Sequence[Any]) -> bool:
        if not all(isinstance(x, Tensor) for x in arguments):
            return False
        hidden_TD, index_TK, weights_TK = arguments
        has_shapes = hidden_TD.ndim == index_TK.ndim == 2 and index_TK.shape == weights_TK.shape
        return has_shapes and len(hidden_TD) == len(index_TK) and not index_TK.is_floating_point()

    def _check(self, arguments: Sequence[Any]) -> None:
        """Raise, before any collective, if arguments break the protocol. All ranks run one model, so all raise."""
        _, index_TK, _ = arguments
        are_tensors = all(isinstance(x, Tensor) for x in arguments)
        layer = self.expert_layer
        if self._follow_protocol(arguments):
            if layer.reads_first_choice_only and index_TK.shape[1] > 1:
                raise ValueError(
                    f"{layer.name} ({layer.original_class.__name__}) was called with {index_TK.shape[1]} choices a"
                    f" token, and {FIRST_CHOICE}; the protocol is: {PROTOCOL_OF_FORWARD}"
                )
            return
        described = ", ".join(
            f"{name}: {f'{list(x.shape)} {x.dtype}' if isinstance(x, Tensor) else type(x).__name__}"
            for name, x in zip(layer.argument_names, arguments, strict=True)
        )
        raise (ValueError if are_tensors and not index_TK.is_floating_point() else TypeError)(
            f"{layer.name} ({layer.original_class.__name__}) was called with {described}; experts over several ranks"
            " take hidden states [T, D], integer indices [T, K] and weights [T, K]. Flatten batches of sequences to T"
            " tokens"
        )

    @torch.compiler.disable()  # or autograd would see several exchanges as one, and each rank others
    def _forward_over_ranks(self, *args: Any, **kwargs: Any) -> Tensor:
        layer, groups = self.expert_layer, self.expert_layer.groups
        hidden_TD, index_TK, weights_TK = arguments = self._arguments(*args, **kwargs)
        self._check(arguments)
        layer.check_parameters(self)
        layer.check_ddp(self)
        if layer.capture is not None:
            layer.capture(layer, self._local_parameters(), args, kwargs)
        extra = layer.extra_arguments.bind(args, kwargs)
        if layer.gradient_sync is not None:
            layer.gradient_sync.watch(layer.index, list(self.parameters(recurse=False)))
        payload = gradient_hooks.wrap_hooks(self, layer) | HAS_EXTRA_ARGUMENTS * extra.is_given
        form = layer.fused_choice.form_for(self, self._local_parameters(), has_other_arguments=bool(extra.values))
        if form is None and layer.slot_map.slots.shape[1] > layer.num_primaries:
            payload |= KEEPS_FORWARD
        batch = layer.batch(hidden_TD, index_TK, weights_TK, form is not None)
        if layer.join is not None:
            counts_L = batch.sorted_pairs[1]
            joined = layer.join.gather_counts(self, hidden_TD, weights_TK, counts_L, payload)
            counts = TokenCounts(*joined, layer.dispatcher.for_uneven_calls)
        else:  # the one device synchronization
            counts = layer.dispatcher.count(batch, payload)
            layer.report_path()  # that of training: uneven evaluation has another
        payloads_R = counts.payloads
        if (payloads_R & KEEPS_FORWARD).any():  # all ranks divide gradients alike, or redundant experts' are wrong
            batch.experts_weigh = False
        has_hooks = gradient_hooks.check_hooks(payloads_R % HAS_EXTRA_ARGUMENTS, self, layer)
        if (payloads_R & HAS_EXTRA_ARGUMENTS).any():
            layer.extra_arguments.resolve(extra, len(hidden_TD), self._sizes(hidden_TD, index_TK), groups)
        # Other EP groups average these gradients, too, and may have tokens.
        if torch.is_grad_enabled() and groups.num_ep_groups == 1 and not counts.counts.any():
            output_TD = self._forward_without_tokens(hidden_TD, index_TK, weights_TK, extra)
            if output_TD is not None:
                layer.cancel_prefetch()
                return output_TD
        return self._compute(batch, counts, _CallState(weights_TK.dtype, self._counters(), extra, form, has_hooks))

    def compute_for_others(self, hidden_TD: Tensor, weights_TK: Tensor, counts_RL: np.ndarray) -> None:
        """Compute tokens of other ranks, which call this layer while this rank does not. In evaluation only.

        Args:
            hidden_TD: Empty hidden states, ``[0, D]``.
            weights_TK: Empty routing weights, ``[0, K]``.
            counts_RL: Tokens of each rank and logical expert.
        """
        form = self.expert_layer.fused_choice.form_for(self, self._local_parameters(), has_other_arguments=False)
        batch = self.expert_layer.batch(hidden_TD, empty_index(weights_TK), weights_TK, form is not None)
        counts = TokenCounts(
            counts_RL, np.zeros(len(counts_RL), dtype=np.int64), self.expert_layer.dispatcher.for_uneven_calls
        )
        self._compute(batch, counts, _CallState(weights_TK.dtype, self._counters(), ExtraArguments([], {}), form))

    def _counters(self) -> CounterUpdates:
        return CounterUpdates(self, self.expert_layer.per_expert.counters)

    def _compute(self, batch: TokenBatch, counts: TokenCounts, call: "_CallState") -> Tensor:
        layer, groups = self.expert_layer, self.expert_layer.groups
        start = time.perf_counter()
        slot_map, routes = layer.slots_for(counts.counts)
        routing = route(counts.counts, slot_map, groups.rank, routes.serving_order, layer.num_primaries)
        plan_seconds = time.perf_counter() - start
        check = functools.partial(gradient_hooks.check_wrapped, list(self.parameters(recurse=False)), layer)
        divisor = 1 if counts.dispatcher.divides_gradients(batch) else groups.size
        redundant = RedundantExperts(self._local_parameters(has_hooks=call.has_hooks), routes, groups, check, divisor)
        if prefetches := not is_recomputing() and not _compat.keeps_outputs():
            redundant.in_flight = layer.prefetcher.take(layer.index, routes, self._versions(), self._prefetch)
        else:
            layer.cancel_prefetch()
        self._record(routing, redundant, plan_seconds)

        dispatcher, parts = counts.dispatcher, counts.dispatcher.parts(batch, routing)
        own_parts = [slice(min(part.start, layer.num_filled), min(part.stop, layer.num_filled)) for part in parts]
        primaries, anchor = redundant.attach_anchor(own_parts)  # the forward gets no rows of phantom experts
        handle = dispatcher.dispatch(batch, routing, counts.in_flight)
        call.extra.dispatch(dispatcher, handle)
        if routes.num_redundant and redundant.in_flight is None:
            redundant.send_weights()
        if prefetches:
            layer.prefetcher.prefetch_after(layer.index)
        experts = slot_map.slots[groups.rank, routes.serving_order].tolist()
        for i, part in enumerate(parts):
            own, others = dispatcher.receive(handle, i)
            own_MD, own_extra, others_MD, others_extra = call.extra.receive(dispatcher, i, own.hidden, others.hidden)
            own_ids = experts[own_parts[i]]
            rows = _ExpertRows(primaries[i], own_ids, own_MD, own.ends[: len(own_ids)], own_extra, own.weights)
            own_MD = self._compute_rows(rows, call)
            if routes.num_redundant and part.stop == layer.num_primaries:  # their weights travelled meanwhile
                weights, served = redundant.receive_weights(anchor), experts[layer.num_primaries :]
                rows = _ExpertRows(weights, served, others_MD, others.ends, others_extra, others.weights)
                others_MD = self._compute_rows(rows, call)
            dispatcher.send_back(handle, i, own_MD, others_MD)
        self._update_counters(call.counters)
        return dispatcher.combine(handle)

    def _record(self, routing: Routing, redundant: RedundantExperts, plan_seconds: float) -> None:
        load_L, max_tokens = torch.from_numpy(routing.counts.sum(axis=0)), int(routing.tokens.max())
        num_redundant = redundant.routes.num_redundant
        self.expert_layer.record(LayerLoad(load_L, max_tokens, num_redundant, redundant.num_bytes, plan_seconds))

    def _update_counters(self, counters: CounterUpdates) -> None:
        """Add to the counters of all ranks what the forward pass added on each of them.

        Where EP groups may call the layer unequally often, each adds its own, see ``CounterSync``.
        """
        groups = self.expert_layer.groups
        for sums in counters.sums.values():
            dist.all_reduce(sums, group=groups.ep_group)
            if groups.edp_group is not None and self.expert_layer.join is None:
                dist.all_reduce(sums, group=groups.edp_group)
        counters.write()

    def _forward_without_tokens(
        self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, extra: ExtraArguments
    ) -> Tensor | None:
        """Return the output where no rank has a token, if the unmodified module leaves gradients out then.

        Optimizers skip parameters without a gradient, while a gradient of zeros makes them decay. Modules that compute
        one expert after the other leave gradients out. Those that compute all of them together give zeros.

        Returns:
            ``None`` if the unmodified module gives zeros.
        """
        local = self._first_experts(max(self.expert_layer.num_filled, 1))
        forward = self.expert_layer.original_class.forward

        def trains_without_tokens(hidden: Tensor, weights: Tensor, given: CallArguments) -> bool:
            try:
                return forward(local, hidden, index_TK[:0], weights, *given.args, **given.kwargs).requires_grad
            except (RuntimeError, ValueError, IndexError):  # it can't be called without tokens
                return True

        detached = hidden_TD[:0].detach(), weights_TK[:0].detach()
        if trains_without_tokens(*detached, extra.without_tokens(detached=True)):
            return None
        output_TD = self._sample_output(hidden_TD, weights_TK.dtype, extra).new_zeros(hidden_TD.shape)
        ddp = self.expert_layer.ddp
        if ddp is not None and (not ddp.find_unused_parameters or ddp.static_graph):  # it waits for all gradients
            shared = [*self._shared_parameters(), *extra.parameters()]
            return TieOutput.apply(output_TD, hidden_TD, weights_TK, *extra.trained(), *shared)
        if trains_without_tokens(*detached, extra.without_tokens()):
            output_TD = TieOutput.apply(output_TD, *extra.trained())
        if trains_without_tokens(hidden_TD[:0], weights_TK[:0], extra.without_tokens(detached=True)):
            return TieOutput.apply(output_TD, hidden_TD, weights_TK)
        return output_TD

    def _prefetch(self) -> PrefetchedWeights | None:
        """Send the redundant weights of the next forward pass, if the placement names them and parameters are whole."""
        layer = self.expert_layer
        if layer.chooses_by_batch or not layer.redundant_routes.num_redundant or isinstance(self, FSDPModule):
            return None
        redundant = RedundantExperts(self._local_parameters(), layer.redundant_routes, layer.groups)
        redundant.send_weights()
        assert redundant.in_flight is not None
        return PrefetchedWeights(layer.redundant_routes, self._versions(), redundant.in_flight)

    def _versions(self) -> list[int]:
        """Return the parameters' version counters. Inference tensors have none, and never train."""
        shards = [local_shard(parameter) for parameter in self.parameters(recurse=False)]
        return [_compat.version_of(shard) for shard in shards if not shard.is_inference()]

    def _compute_rows(self, rows: "_ExpertRows", call: "_CallState") -> Tensor:
        """Run the original forward on rows in the order of their experts, tied to every tensor that was exchanged."""
        layer, hidden_MD = self.expert_layer, rows.hidden
        if call.form is not None and len(hidden_MD):
            return fused_experts(call.form, rows.weights, hidden_MD, rows.ends, rows.row_weights)
        if len(hidden_MD):
            local = self._original_with(rows.weights, rows.experts)
            if grouped_mm.takes_sorted_rows(local):
                grouped_mm.let_take_sorted_rows(local, rows.ends)
            index_M = torch.arange(len(hidden_MD), dtype=torch.int32, device=hidden_MD.device)
            slots_M = torch.searchsorted(rows.ends, index_M, right=True)
            ones = torch.ones(len(hidden_MD), 1, dtype=call.weights_dtype, device=hidden_MD.device)
            output_MD = self._original_forward(local, hidden_MD, slots_M.unsqueeze(-1), ones, rows.extra)
            call.counters.add(local, rows.experts)
            return TieOutput.apply(output_MD, *self._shared_parameters()) if layer.per_expert.has_modules else output_MD
        if call.form is not None:  # in the dtype of the rows
            return TieOutput.apply(hidden_MD.new_empty(hidden_MD.shape), hidden_MD, *rows.weights)
        no_output = self._sample_output(hidden_MD, call.weights_dtype, call.extra)[:0]
        shared = [*self._shared_parameters(), *call.extra.parameters()]
        return TieOutput.apply(no_output, *shared, hidden_MD, *rows.weights)

    def _original_forward(
        self, local: nn.Module, hidden_MD: Tensor, slots_M1: Tensor, ones_M1: Tensor, extra: CallArguments
    ) -> Tensor:
        """Run the original forward. Its errors name the module and the protocol. All ranks call it, so all raise."""
        layer = self.expert_layer
        where = f"{layer.name} ({layer.original_class.__name__})"
        try:
            output = layer.original_class.forward(local, hidden_MD, slots_M1, ones_M1, *extra.args, **extra.kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if error.args:  # those without are control flow, as of activation checkpointing
                message = (
                    f"{error.args[0]}\nThis is from {where}, on a rank that holds {local.num_experts} of its experts."
                )
                error.args = (f"{message} It must follow the protocol: {PROTOCOL_OF_FORWARD}", *error.args[1:])
            raise
        if not isinstance(output, Tensor):
            raise TypeError(f"{where} returned a {type(output).__name__}; the protocol is: {PROTOCOL_OF_FORWARD}")
        if output.ndim != 2 or len(output) != len(hidden_MD):
            raise ValueError(
                f"{where} returned shape {list(output.shape)} for hidden states of shape {list(hidden_MD.shape)}; the"
                f" protocol is: {PROTOCOL_OF_FORWARD}"
            )
        return output

    def _sizes(self, hidden_TD: Tensor, index_TK: Tensor) -> CallSizes:
        shapes = [parameter.shape for parameter in self.parameters(recurse=False)]
        top_k, num_experts = index_TK.shape[1], self.expert_layer.num_logical_experts
        of_experts = frozenset(size for shape in shapes for size in shape) | {hidden_TD.shape[1], top_k, num_experts}
        return CallSizes(top_k, num_experts, of_experts)

    @torch.no_grad()
    def _sample_output(self, hidden_TD: Tensor, weights_dtype: torch.dtype, extra: ExtraArguments) -> Tensor:
        """Compute the output of one row of zeros, ``[1, D]``, for its width and dtype."""
        one = torch.ones(1, 1, dtype=weights_dtype, device=hidden_TD.device)
        row = hidden_TD.new_zeros(1, hidden_TD.shape[-1])
        return self._original_forward(self._first_experts(1), row, one.to(torch.int64) - 1, one, extra.sample())

    def _shared_parameters(self) -> list[Tensor]:
        """Return the parameters of submodules, which every rank has."""
        return [parameter for child in self.children() for parameter in child.parameters()]

    def _local_parameters(self, rows: int | None = None, has_hooks: bool = False) -> list[Tensor]:
        """Return the weights of this rank's primaries, ``[n, ...]`` each, or the first ``rows`` of them.

        Under ``fully_shard`` they are whole within a forward pass. Weights whose gradients have hooks are returned as
        views: autograd runs the backward passes of views one after the other, the last one first on every rank.
        Parameters that get their gradients from one function are ready at once, and their order is arbitrary.
        """
        parameters = [p.to_local() if isinstance(p, DTensor) else p for p in self.parameters(recurse=False)]
        if has_hooks:
            parameters = [parameter.view_as(parameter) for parameter in parameters]
        if rows is not None:
            parameters = [parameter[:rows] for parameter in parameters]
        return self._whole(parameters)

    def _whole(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return this rank's parts of DTensors, and all in the dtype to compute in."""
        dtype = self.expert_layer.compute_dtype
        local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
        return [p if dtype is None or not p.is_floating_point() else p.to(dtype) for p in local]

    def _first_experts(self, number: int) -> nn.Module:
        """Return a module of the original class that computes the first experts of this rank."""
        experts = self.expert_layer.local_experts[:number].tolist() or [0]  # a rank may have phantom experts only
        return self._original_with(self._local_parameters(number), experts)

    def _original_with(self, weights: Sequence[Tensor], experts: Sequence[int]) -> nn.Module:
        """Return a module of the original class that computes ``experts`` with ``weights``."""
        layer = self.expert_layer
        parameters = dict(zip((name for name, _ in self.named_parameters(recurse=False)), weights, strict=True))
        return make_part(self, layer.original_class, parameters, layer.per_expert.attributes, experts)


class _CallState(NamedTuple):
    """State that all rows of a call share."""

    weights_dtype: torch.dtype
    counters: CounterUpdates
    extra: ExtraArguments
    form: FusedForm | None
    has_hooks: bool = False


class _ExpertRows(NamedTuple):
    """Rows that a rank computes, in the order of their experts.

    Attributes:
        weights: Weights of the experts, ``[experts, ...]`` each.
        experts: Logical ids of the experts.
        hidden: Hidden states, ``[M, D]``.
        ends: End of each expert's rows.
        extra: Extra arguments for these rows.
        row_weights: Routing weight of each row, ``[M]``, if the experts are to weigh their outputs.
    """

    weights: list[Tensor]
    experts: Sequence[int]
    hidden: Tensor
    ends: Tensor
    extra: CallArguments
    row_weights: Tensor | None = None
