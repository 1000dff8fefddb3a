"""Rows travel between ranks: any shapes and dtypes, in place, within a bounded buffer."""

import itertools
from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_eplb.parallel import packing
from lightning_eplb.parallel import row_exchange as rows_module
from lightning_eplb.parallel.row_exchange import (
    Route,
    RowExchange,
    _chunk_widths,
    _cut_columns,
    exchange_rows,
    gather_rows,
)
from tests.workers import Workers


def permutation_moves(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every row of every rank goes to the place of another: nothing may be overwritten before it was read."""
    size = dist.get_world_size()
    target = torch.randperm(size * n, generator=torch.Generator().manual_seed(seed))
    source = torch.arange(size * n)
    return source // n, source % n, target // n, target % n


def route_of(moves: Iterable[Tensor], rank: int, size: int) -> Route:
    return Route.of_moves(*(each.numpy() for each in moves), rank, size)


@pytest.mark.parametrize("max_bytes", [1, 100, 10**6])
@pytest.mark.parametrize("max_views", [0, 10**6])
def test_row_exchange_of_permutation_is_in_place(max_bytes: int, max_views: int, workers: Workers) -> None:
    workers.run(3, permute_in_place, max_bytes, max_views)


def permute_in_place(max_bytes: int, max_views: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MAX_VIEWS", max_views)
        check_permutation(max_bytes)


def check_permutation(max_bytes: int) -> None:
    n, rank, size = 4, dist.get_rank(), dist.get_world_size()
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.int64]
    shapes = [(5, 3), (7,), (), (2, 1, 3), (0,)]
    everything = [
        (torch.randint(0, 100, (size * n, *shape), generator=torch.Generator().manual_seed(i)) * 1.0).to(dtype)
        for i, (dtype, shape) in enumerate(zip(dtypes, shapes, strict=True))
    ]
    mine = [tensor[rank * n : rank * n + n].clone() for tensor in everything]
    moves = permutation_moves(n, seed=3)
    exchange_rows(mine, mine, route_of(moves, rank, size), dist.group.WORLD, max_bytes)
    source_rank, source_row, target_rank, target_row = moves
    for tensor, before in zip(mine, everything, strict=True):
        expected = torch.empty_like(before)
        expected[target_rank * n + target_row] = before[source_rank * n + source_row]
        assert torch.equal(tensor, expected[rank * n : rank * n + n])


@pytest.mark.parametrize("max_bytes", [1, 100, 10**6])
def test_row_exchange_of_stacks_is_in_place(max_bytes: int, workers: Workers) -> None:
    workers.run(3, permute_stacks, max_bytes)


def permute_stacks(max_bytes: int) -> None:
    """Rows go from layer to layer, too; one of the tensors is not contiguous."""
    n, rank, size = 4, dist.get_rank(), dist.get_world_size()
    whole = [torch.arange(size * n * 6.0).view(size * n, 6).to(dtype) for dtype in (torch.float64, torch.bfloat16)]
    mine = [tensor[rank * n : rank * n + n].clone() for tensor in whole]
    stacks = [[tensor[:1].clone(), tensor[1:].t().contiguous().t()] for tensor in mine]
    moves = permutation_moves(n, seed=5)
    RowExchange(stacks, route_of(moves, rank, size), dist.group.WORLD, max_bytes).send().prepare_write(stacks).write()
    source_rank, source_row, target_rank, target_row = moves
    for stack, before in zip(stacks, whole, strict=True):
        expected = torch.empty_like(before)
        expected[target_rank * n + target_row] = before[source_rank * n + source_row]
        assert torch.equal(torch.cat(stack), expected[rank * n : rank * n + n])


def test_row_exchange_with_max_bytes_never_exceeds_them(workers: Workers) -> None:
    for most in workers.run(2, largest_buffer):
        assert most <= 1000


def largest_buffer() -> int:
    sizes = []
    original = dist.all_to_all_single

    def watched(received: Tensor, sent: Tensor, *args: object, **kwargs: object) -> object:
        sizes.extend([received.nbytes, sent.nbytes])
        return original(received, sent, *args, **kwargs)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module.dist, "all_to_all_single", watched)
        tensors = [torch.zeros(4, 100, dtype=torch.float64), torch.zeros(4, 50)]
        route = route_of(permutation_moves(4, seed=1), dist.get_rank(), 2)
        exchange_rows(tensors, tensors, route, dist.group.WORLD, 1000)
    assert len(sizes) > 4
    return max(sizes)


def test_row_exchange_of_noncontiguous_tensors_is_in_place(workers: Workers) -> None:
    workers.run(2, move_transposed)


def move_transposed() -> None:
    rank = dist.get_rank()
    tensor = torch.arange(12.0).view(3, 4).t() + 100 * rank
    assert not tensor.is_contiguous()
    before = tensor.clone()
    one = torch.tensor([1])
    moves = (torch.tensor([0, 1]), torch.cat([one, one]), torch.tensor([1, 0]), torch.cat([one, one]))
    exchange_rows([tensor], [tensor], route_of(moves, rank, 2), dist.group.WORLD)
    before[1] += 100 - 200 * rank
    assert torch.equal(tensor, before)


def test_gather_rows_from_all_ranks_is_in_logical_order(workers: Workers) -> None:
    workers.run(2, gather)


def gather() -> None:
    order = torch.tensor([2, 0, 3, 1])
    logical = torch.arange(12.0).view(4, 3)
    mine = logical[order.view(2, 2)[dist.get_rank()]]
    assert torch.equal(gather_rows(mine, order, len(logical), dist.group.WORLD), logical)


@given(st.lists(st.integers(0, 40), max_size=6), st.integers(1, 50), st.integers(1, 50))
def test_cut_columns_of_any_widths_covers_each_once(widths: list[int], columns: int, alone: int) -> None:
    chunks = _cut_columns(widths, itertools.repeat(columns), alone)
    covered = [(i, c) for chunk in chunks for i, start, stop in chunk for c in range(start, stop)]
    assert covered == [(i, c) for i, width in enumerate(widths) for c in range(width)]
    assert all(sum(stop - start for _, start, stop in chunk) <= columns for chunk in chunks)
    for chunk in chunks:
        assert len(chunk) == 1 or all(widths[i] < alone for i, _, _ in chunk)
    if all(width < alone for width in widths):
        assert all(sum(stop - start for _, start, stop in chunk) == columns for chunk in chunks[:-1])


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 20), st.integers(1, 8))
def test_chunk_widths_of_any_total_hold_all_with_narrow_ends(total: int, most: int, least: int, aligned: int) -> None:
    most -= most % aligned if most > aligned else 0
    columns = _chunk_widths(total, most, least, aligned)
    assert sum(columns[:-2]) < total <= sum(columns)
    assert all(0 < width <= most for width in columns)
    assert most % aligned or all(width % aligned == 0 for width in columns)
    if total >= 4 * (least + aligned) and most >= 2 * (least + aligned):
        assert columns[0] == columns[-1] >= least
        assert 2 * columns[0] <= most


@pytest.mark.parametrize("max_bytes", [1, 100, 10**6])
@pytest.mark.parametrize("alone", [1, 10**6])
def test_row_exchange_with_take_returns_rows_in_order_of_arrival(max_bytes: int, alone: int, workers: Workers) -> None:
    workers.run(3, take_rows, max_bytes, alone)


def take_rows(max_bytes: int, alone: int) -> None:
    rank = dist.get_rank()
    dtypes = [torch.float64, torch.bfloat16, torch.uint8, torch.float32]
    sources = [torch.arange(8).view(2, 4).to(dtype) + 10 * rank for dtype in dtypes]
    sources.append(torch.empty(2, 0))
    # Both rows of rank 0 go to rank 1, one of rank 2 too; rank 2 gets one of rank 1; rank 0 gets nothing.
    moves = torch.tensor([[2, 0, 1, 0], [1, 0, 0, 1], [1, 1, 2, 1], [0, 1, 0, 2]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "MIN_OWN_CHUNK_BYTES", alone)
        stacks = [[source] for source in sources]
        exchange = RowExchange(stacks, route_of(moves, rank, 3), dist.group.WORLD, max_bytes).send()
    *taken, empty = exchange.take()
    expected = {0: [], 1: [(0, 0), (0, 1), (2, 1)], 2: [(1, 0)]}[rank]
    for tensor, dtype in zip(taken, dtypes, strict=True):
        assert tensor.dtype == dtype
        assert tensor.tolist() == [[10 * source + 4 * row + column for column in range(4)] for source, row in expected]
    assert empty.shape == (len(expected), 0)
