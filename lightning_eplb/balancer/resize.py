"""Resize: ranks leave and join a training in memory, and experts follow with their optimizer state."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_eplb._validation import check_num_redundant
from lightning_eplb.balancer.membership import (
    Report,
    Role,
    SharedState,
    agree_on_roles,
    exchange_reports,
    set_hyperparameters,
)
from lightning_eplb.balancer.optimizers import expert_parameters
from lightning_eplb.balancer.schedule import RearrangementState
from lightning_eplb.checkpoint.logical import unwrapped
from lightning_eplb.integrations.ddp import leave_experts_out_of_ddp
from lightning_eplb.integrations.fabric import optimizer_within
from lightning_eplb.parallel.barrier import monitored_barrier
from lightning_eplb.parallel.consensus import ConsensusCheck, check_same_on_all_ranks
from lightning_eplb.parallel.expert_layer import ExpertLayer
from lightning_eplb.parallel.groups import ExpertGroups
from lightning_eplb.parallel.joining import ConversionSettings, attach, convert_without_rows, create_groups
from lightning_eplb.parallel.parallelize import ConvertedExperts, broadcast_per_expert_state, converted_experts
from lightning_eplb.placement import EMPTY, ExpertPlacement
from lightning_eplb.relocation.optimizer_check import check_optimizers
from lightning_eplb.relocation.optimizer_state import nested_optimizers
from lightning_eplb.relocation.resize_plan import (
    LEAVES,
    RankMapping,
    check_rank_mapping,
    describe,
    plan_hand_over,
    plan_placement,
    plan_rows,
    stack_held,
)
from lightning_eplb.relocation.resize_transfer import StateLayout, check_unambiguous, replace_rows
from lightning_eplb.relocation.transfer import tensors_to_move

if TYPE_CHECKING:
    from lightning_eplb.balancer.balancer import ExpertLoadBalancer


class ResizableBalancer:
    """Resize of the ranks that share experts. Base class of ``ExpertLoadBalancer``.

    A process group of torch has a fixed number of ranks. So a resize has a part on the old one and a part on the new
    one: :meth:`resize` hands over the experts of ranks that leave, and then those that stay call :meth:`rejoin` and
    those that join call :meth:`join`. Experts move with weights, optimizer state and gradients; window and counters
    go on. Dense parameters and their optimizer state belong to the data-parallel framework.

    Example::

        # On all of four ranks, after balancer.step(): two of them leave, or with world_size=6 two join.
        new_rank = balancer.resize({0: 0, 1: 1, 2: -1, 3: -1})
        del ddp  # it would use the old process group
        dist.destroy_process_group()
        if new_rank < 0:
            sys.exit()
        dist.init_process_group("nccl", store=store, rank=new_rank, world_size=2)
        balancer.rejoin()
        ddp = DistributedDataParallel(model)

        # On a rank that joins, in the new process group, while the others call rejoin():
        model = build_model()
        optimizer = torch.optim.AdamW(model.parameters())
        balancer = ExpertLoadBalancer.join(model, [optimizer])
        ddp = DistributedDataParallel(model)  # broadcasts the dense weights of rank 0

    ``examples/guides/elastic.md`` and ``examples/elastic_loop.py`` show the whole, with the dense optimizer state.
    """

    _modules: list[ConvertedExperts]
    _handed_over: "_HandedOver | None" = None

    @property
    def groups(self) -> ExpertGroups:
        """Process groups of the experts."""
        return self._modules[0].layer.groups

    def resize(
        self: Any,  # an ExpertLoadBalancer
        rank_mapping: Mapping[int, int],
        *,
        world_size: int | None = None,
        ep_size: int | None = None,
    ) -> int:
        """Hand the experts of leaving ranks over to those that stay. Every rank of the old process group calls it.

        Call it between two optimizer steps, right after :meth:`step`: tokens that were counted since are dropped. A
        rearrangement in flight is finished first. Afterwards the ranks that leave may exit. Those that stay destroy
        the process group, make the new one and call :meth:`rejoin`; until then the model can't be used. What was built
        on the old process group, such as DDP, must be built again.

        If an error is raised before the first row moved, as by all checks, nothing has changed. If a rank fails later,
        go on from a checkpoint.

        Supported with ``DistributedDataParallel`` or no wrapper, in loops of your own and with Fabric; with FSDP1 and
        FSDP2 (``ExpertParallelStrategy``) or under the ``Trainer`` save a checkpoint and resume from it. The EP size
        must be 2 at least before and after, and no larger than the number of experts.

        Args:
            rank_mapping: New rank of each rank of the default group, ``-1`` for those that leave. The same on all
                ranks. One that stays must become rank 0.
            world_size: Ranks of the new process group. Those that ``rank_mapping`` does not name are taken by ranks
                that join. Defaults to the number of those that stay.
            ep_size: Ranks that share the experts of a layer in the new process group, successive ones. Defaults to
                ``world_size``.

        Returns:
            New rank of this rank; -1 if it leaves.

        Raises:
            TypeError: ``rank_mapping`` is no mapping of whole numbers. All ranks raise it.
            ValueError: Ranks were given different arguments; a rank is missing, or two get the same new rank, or one
                is out of range; the sizes do not fit the number of experts; or the model is sharded. All ranks raise
                it, and nothing was moved.
            RuntimeError: Ranks would move different rows, or some did not call this within ten minutes. All ranks
                raise it, and nothing was moved.
        """
        groups, modules = self.groups, self._modules
        arguments = {"rank_mapping": describe(rank_mapping), "world_size": repr(world_size), "ep_size": repr(ep_size)}
        check_same_on_all_ranks(arguments, "resize() hands over experts", groups)
        num_experts = [layer.num_logical_experts for layer, _ in modules]
        mapping = check_rank_mapping(rank_mapping, groups.world_size, world_size, ep_size, num_experts)
        _check_resizable(self.model, modules)
        _check_redundancy(modules, mapping.ep_size)
        self.finish_rearrangement()
        self.cancel_rearrangement()
        optimizers = nested_optimizers(self.optimizers)
        placements = [each.placement for each in self.placed_models]
        _check_same_rows(modules, optimizers, placements, groups)
        check_unambiguous(_parameters(modules), optimizers)
        shared = self._shared_state(mapping.ep_size)
        ep_rank_R: list[Any] = [None] * groups.world_size
        dist.all_gather_object(ep_rank_R, groups.rank, group=groups.cpu_group)
        before = [_held(layer, np.array(ep_rank_R)) for layer, _ in modules]
        after = [plan_hand_over(held_RS, mapping.stays) for held_RS in before]
        if not mapping.stays.all():
            for (_, module), before_RS, after_RS in zip(modules, before, after, strict=True):
                replace_rows(module, optimizers, plan_rows(before_RS, after_RS))
            monitored_barrier(groups, "resize() ends once all ranks have their rows")
        rank = dist.get_rank()
        held = [held_RS[rank][held_RS[rank] != EMPTY] for held_RS in after]
        self._handed_over = _HandedOver(mapping, rank, held, shared)
        self.model = unwrapped(self.model)  # DDP would keep using the old process group
        groups.shared.clear()
        for layer, _ in modules:
            layer.detach()
        return mapping.new_ranks[rank]

    def rejoin(self: Any) -> None:
        """Take up training on the new process group after :meth:`resize`. Every rank that stays calls it.

        Ranks that join call :meth:`join` at the same time. Each rank must have the number in the default group that
        :meth:`resize` returned. Rows move to the ranks that join; redundant slots are empty until the next
        rearrangement, which :meth:`rearrange` does at once. Window, counters and schedule go on. :attr:`capacity` is
        reset, as its ranks are others; costs are measured anew after the next step.

        Build ``DistributedDataParallel`` again afterwards. Experts are left out of it, if it wraps the model that the
        balancer was given. With Fabric set :attr:`optimizers` to what ``fabric.setup`` returns.

        Raises:
            ValueError: The process group is another than :meth:`resize` was told of, or a rank that joins has another
                model or other optimizers. All ranks raise it, no row was moved, and it can be called again.
            RuntimeError: :meth:`resize` was not called, or this rank left; or some ranks did not call it within ten
                minutes.
        """
        handed = self._handed_over
        if handed is None:
            raise RuntimeError("rejoin() was called without resize(). Call resize() on the old process group first.")
        if handed.new_rank == LEAVES:
            raise RuntimeError(
                f"rank {handed.old_rank} left in resize(), and holds no experts. Call join() to be back."
            )
        shared = agree_on_roles(Role.staying(handed.mapping, handed.old_rank, handed.shared))
        groups = create_groups(shared.conversion.ep_size)
        optimizers, policy = self.optimizers, self.policy
        report = Report.of(groups, handed.held, self._modules, nested_optimizers(optimizers))
        _take_up(self._modules, optimizers, report, groups, shared)
        self._handed_over = None
        self._mover.watch(())  # its hooks would keep it, and the old process groups
        self.__init__(self.model, optimizers, **{**shared.arguments, "policy": policy})
        self._restore(shared)

    @classmethod
    def join(
        cls: Any,
        model: nn.Module,
        optimizers: Iterable[Optimizer] | Callable[[], Iterable[Optimizer]] = (),
        *,
        device: torch.device | str | None = None,
    ) -> "ExpertLoadBalancer":
        """Join a training on its new process group, while the ranks that stay call :meth:`rejoin`.

        The model is converted in place with the settings of rank 0. Policy, window, counters and schedule are those of
        rank 0, and rows of experts arrive with their optimizer state and gradients. Build
        ``DistributedDataParallel`` afterwards: it broadcasts the dense weights and buffers of rank 0. Parameter groups
        get rank 0's learning rates and other settings. The dense optimizer state, learning-rate schedulers and the
        position in the data are yours to bring over.

        Args:
            model: The model that the other ranks gave ``parallelize_experts``, not converted, with any weights, or on
                the meta device.
            optimizers: Optimizers of ``model`` as the other ranks gave them to the balancer, in the same order, before
                their first step. For a model on the meta device a function that returns them, called once its
                parameters have memory.
            device: Device of what is on the meta device. Defaults to PyTorch's default device.

        Returns:
            The balancer.

        Raises:
            ValueError: The rank has a number that ``rank_mapping`` gave to another, or the model or the optimizers are
                others than those of rank 0, or can't be used. All ranks raise it.
            RuntimeError: Some ranks did not call it within ten minutes.
        """
        shared = agree_on_roles(Role())
        groups = create_groups(shared.conversion.ep_size)
        modules: list[ConvertedExperts] = []
        held: list[Optimizer] = []
        failure: Exception | None = None
        try:
            if not callable(optimizers) and any(parameter.is_meta for parameter in model.parameters()):
                raise ValueError(
                    "the model is on the meta device, and its parameters are replaced: pass optimizers as a function,"
                    " such as lambda: [AdamW(model.parameters())]."
                )
            modules = convert_without_rows(model, groups, shared.conversion, device)
            held = [optimizer_within(each) for each in (optimizers() if callable(optimizers) else optimizers)]
            check_optimizers(held, expert_parameters(modules), shared.arguments["use_async"])
            report = Report.of(groups, None, modules, nested_optimizers(held))
        except Exception as error:  # the other ranks must raise, too
            failure = error
            report = Report(groups.rank, [], error=f"{type(error).__name__}: {error}")
        try:
            _take_up(modules, held, report, groups, shared)
        except ValueError as error:
            raise error from failure
        balancer = cls(model, held, **shared.arguments)
        cls._restore(balancer, shared)
        return balancer

    def _shared_state(self: Any, ep_size: int) -> SharedState:
        """Return what ranks that join learn from rank 0."""
        layer = self._modules[0].layer
        return SharedState(
            ConversionSettings.of(layer, ep_size),
            {
                "policy": self.policy,
                "window_size": next(iter(self.models.values())).load.window_size,
                "step_interval": self.step_interval,
                "redundancy": "batch" if layer.chooses_by_batch else "window",
                "min_tokens_per_copy": self.min_tokens_per_copy,
                "use_async": self._overlaps,
            },
            self.state_dict(),
            self.costs,
            self._state is not RearrangementState.IDLE,
        )

    def _restore(self: Any, shared: SharedState) -> None:
        """Go on with window, counters and schedule. Every rank of the new process group calls it."""
        self.load_state_dict(shared.balancer)
        self._saved = None  # rows are where they belong
        self.costs = shared.costs
        if shared.is_due:
            self._state = RearrangementState.DUE
        leave_experts_out_of_ddp(self.model)


@dataclass(frozen=True)
class _HandedOver:
    """State of a rank between the old process group and the new one.

    Attributes:
        mapping: Mapping of the ranks.
        old_rank: Rank in the old default group.
        held: Logical experts of its rows, ``[rows]`` for each layer.
        shared: State for ranks that join, if this rank becomes rank 0.
    """

    mapping: RankMapping
    old_rank: int
    held: list[np.ndarray]
    shared: SharedState

    @property
    def new_rank(self) -> int:
        return self.mapping.new_ranks[self.old_rank]


def _check_resizable(model: nn.Module, modules: Sequence[ConvertedExperts]) -> None:
    """Raise ``ValueError`` on all ranks if the model's experts can't get another number of ranks in memory."""
    remedy = "Save a checkpoint, and resume from it on the new number of ranks."
    for layer, _ in converted_experts(model):
        if layer.is_whole:
            raise ValueError(f"resize() is not supported with a frozen model that stays whole ({layer.name}). {remedy}")
    for layer, _ in modules:
        if layer.groups.size == 1:
            raise ValueError(
                f"resize() is not supported where one rank holds all experts of a layer, as those of {layer.name}."
                f" {remedy}"
            )
        settings, first = (ConversionSettings.of(each, each.groups.size) for each in (layer, modules[0].layer))
        if settings != first:
            raise ValueError(
                f"resize() takes one setting of all layers, and {settings} of {layer.name} is not {first}."
            )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(f"resize() is not supported with FSDP2 (ExpertParallelStrategy, fully_shard_moe). {remedy}")
    if FullyShardedDataParallel.fsdp_modules(model):
        raise ValueError(f"resize() is not supported with FullyShardedDataParallel (FSDP1). {remedy}")


def _check_redundancy(modules: Sequence[ConvertedExperts], ep_size: int) -> None:
    """Raise ``ValueError`` if ranks have more redundant slots than there would be experts of other ranks."""
    for layer, _ in modules:
        redundant = ConversionSettings.of(layer, ep_size).redundant_per_rank * ep_size
        of_new_group = f"{redundant} redundant experts in the new group, as many a rank as now,"
        check_num_redundant(redundant, layer.num_logical_experts, ep_size, of_new_group, f"ep_size={ep_size}")


def _check_same_rows(
    modules: Sequence[ConvertedExperts],
    optimizers: Sequence[Optimizer],
    placements: Sequence[ExpertPlacement],
    groups: ExpertGroups,
) -> None:
    """Verify that all ranks would hand over the same tensors. Collective."""
    tensors = {i: tensors_to_move(each.module, optimizers, with_gradients=True) for i, each in enumerate(modules)}
    names = [type(optimizer).__qualname__ for optimizer in optimizers]
    names += [StateLayout.of(p, optimizers).signature() for p in _parameters(modules).values()]
    ConsensusCheck(placements, placements, tensors, groups, names=names).wait()


def _held(layer: ExpertLayer, ep_rank_R: np.ndarray) -> np.ndarray:
    """Return the logical experts of the rows of all ranks, ``held_RS``. Those of phantom experts count as empty."""
    held_RS = layer.row_order.view(layer.groups.size, -1).numpy()
    return np.where(held_RS < layer.num_logical_experts, held_RS, EMPTY)[ep_rank_R]


def _parameters(modules: Sequence[ConvertedExperts]) -> dict[str, nn.Parameter]:
    return {name: parameter for each in modules for name, parameter in each.parameters.items()}


def _take_up(
    modules: Sequence[ConvertedExperts],
    optimizers: Sequence[Optimizer],
    report: Report,
    groups: ExpertGroups,
    shared: SharedState,
) -> None:
    """Distribute rows over the ranks of the new process group. Every rank of it calls this with its report."""
    reports = exchange_reports(report, groups)
    ep_rank_R = np.array([each.ep_rank for each in reports])
    before = [stack_held(held_of_ranks) for held_of_ranks in zip(*(each.held for each in reports), strict=True)]
    redundant = shared.conversion.redundant_per_rank
    placements = [
        plan_placement(held_RS, ep_rank_R, layer.num_logical_experts, redundant)
        for held_RS, (layer, _) in zip(before, modules, strict=True)
    ]
    nested = nested_optimizers(optimizers)
    if not report.layouts:  # it joins
        for parameter, layout in zip(_parameters(modules).values(), reports[0].layouts, strict=True):
            layout.create(parameter, nested)
        set_hyperparameters(nested, reports[0].hyperparameters)
    for (_, module), before_RS, placement in zip(modules, before, placements, strict=True):
        after_RS = placement.primaries.reshape(placement.num_ranks, -1)[ep_rank_R]
        replace_rows(module, nested, plan_rows(before_RS, after_RS), placement.primaries_per_rank)
    attach(modules, groups, placements)
    for layer, module in modules:
        broadcast_per_expert_state(module, layer)
