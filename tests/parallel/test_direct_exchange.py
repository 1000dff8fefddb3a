"""Kernels of direct dispatch against tensor operations. Ranks are buffers in one process, which take turns."""

import itertools

import pytest
import torch
from torch import Tensor

import tests.parallel.shared_memory  # noqa: F401, isort: skip  (has kernels interpreted where there is no GPU)

from lightning_eplb.parallel import direct_exchange
from lightning_eplb.parallel.direct_exchange import Placed
from lightning_eplb.parallel.symmetric_buffers import ERROR_WORDS, HEADER_WORDS, Header, Layout, Region

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Ranks:
    """Regions of some ranks in one process, and their tokens.

    Args:
        tokens: Tokens of each rank.
        top_k: Choices of a token.
        slots: Slots of a rank. Ids are slots, and some are those of nobody.
        width: Width of a row.
        dtype: Dtype of rows.
    """

    def __init__(self, tokens: list[int], top_k: int, slots: int, width: int, dtype: torch.dtype) -> None:
        self.top_k, self.slots, self.size, self.dtype = top_k, slots, len(tokens), dtype
        generator = torch.Generator().manual_seed(sum(tokens))
        capacity = max(tokens) + 3
        offsets = Layout(capacity, top_k, 8 * width).offsets(self.size)
        self.memory = torch.zeros(self.size, offsets[-1], dtype=torch.uint8, device=DEVICE)
        addresses = torch.tensor([memory.data_ptr() for memory in self.memory], device=DEVICE)
        self.regions = [Region(addresses, rank, capacity, *offsets[:3]) for rank in range(self.size)]
        number = self.size * slots
        self.hidden, self.index, self.weights = [], [], []
        for count in tokens:
            hidden = torch.randn(count, width, generator=generator, dtype=torch.float64)
            scores = torch.rand(count, number + 1, generator=generator)  # the last is nobody's
            self.hidden.append(hidden.to(dtype).to(DEVICE))
            self.index.append(scores.topk(top_k, dim=1).indices.to(DEVICE))
            self.weights.append(torch.rand(count, top_k, generator=generator, dtype=torch.float64).to(DEVICE))
        self.table = torch.arange(number + 1, dtype=torch.int32, device=DEVICE)

    def header(self, rank: int, sequence: int = 1) -> Header:
        return Header(8, sequence, len(self.hidden[rank]), rank + 5)

    def dispatch(self) -> tuple[list[Tensor], list[Placed], list[Tensor]]:
        """Slots, placed pairs and report of each rank."""
        num_counts = self.size * self.size * self.slots
        reports = [
            torch.full((self.size * HEADER_WORDS + num_counts + ERROR_WORDS,), 7, device=DEVICE)
            for _ in range(self.size)
        ]
        slots, placed = [], []
        for rank, report in enumerate(reports):
            counts = report[self.size * HEADER_WORDS : -ERROR_WORDS]
            arguments = self.hidden[rank], self.index[rank], self.weights[rank], self.table, self.slots
            slots.append(direct_exchange.send(*arguments, self.regions[rank], self.header(rank), counts))
        own = torch.arange(self.slots, dtype=torch.int32, device=DEVICE)
        weights_dtype, _ = direct_exchange.sum_dtype(self.hidden[0])
        for region, report in zip(self.regions, reports, strict=True):
            self.errors = torch.zeros(ERROR_WORDS, dtype=torch.int64, device=DEVICE)
            counts = direct_exchange.count_pairs(
                self.slots, self.top_k, region, self.header(region.rank), report, self.errors
            )
            placed.append(direct_exchange.place_pairs(own, self.slots, self.top_k, weights_dtype, region, counts))
        return slots, placed, reports

    def rows_of(self, rank: int) -> list[tuple[int, int, int]]:
        """Rank, token and choice of each row that a rank computes, in order."""
        found = []
        for slot in range(rank * self.slots, (rank + 1) * self.slots):
            for source, index in enumerate(self.index):
                found += [(source, *pair) for pair in torch.nonzero(index == slot).tolist()]
        return found


CASES = [
    ([5, 3], 2, 3, 20, torch.float64),
    ([14, 0, 31], 4, 5, 24, torch.float32),
    ([9, 8], 3, 2, 2050, torch.bfloat16),
]


@pytest.fixture(params=CASES, ids=str)
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setattr(direct_exchange, "PROGRAMS", 6)
    monkeypatch.setattr(direct_exchange, "TILE", 16 * 32)  # several chunks of pairs, and several turns for each
    return Ranks(*request.param)


def test_place_pairs_of_all_ranks_orders_rows_by_slot_then_rank_then_token(ranks: Ranks) -> None:
    _, placed, reports = ranks.dispatch()
    for rank in range(ranks.size):
        expected, found, region = ranks.rows_of(rank), placed[rank], ranks.regions[rank]
        pairs = [(source * found.stride + token) * ranks.top_k + k for source, token, k in expected]
        assert found.pairs[: len(pairs)].tolist() == pairs
        assert [found.place[pair].item() for pair in pairs] == list(range(len(pairs)))
        weights = [float(ranks.weights[source][token, k]) for source, token, k in expected]
        assert found.weights[: len(pairs)].tolist() == pytest.approx(weights, rel=1e-6)
        ends = itertools.accumulate(
            sum(int((index == slot).sum()) for index in ranks.index)
            for slot in range(rank * ranks.slots, (rank + 1) * ranks.slots)
        )
        assert found.ends.tolist() == [*ends, *(len(hidden) for hidden in ranks.hidden)]
        headers, counts, error = reports[rank].split((ranks.size * HEADER_WORDS, ranks.size**2 * ranks.slots, 8))
        assert headers.view(ranks.size, -1)[:, :4].tolist() == [list(ranks.header(r)) for r in range(ranks.size)]
        assert counts.view(ranks.size, -1).tolist() == [
            torch.bincount(index.flatten(), minlength=region.num_ranks * ranks.slots + 1)[:-1].tolist()
            for index in ranks.index
        ]
        assert not error.any()


def test_expand_of_received_tokens_copies_them_to_their_rows(ranks: Ranks) -> None:
    _, placed, _ = ranks.dispatch()
    for rank, found in enumerate(placed):
        expected = ranks.rows_of(rank)
        tokens = [ranks.hidden[source][token] for source, token, _ in expected]
        arguments = found, ranks.top_k, ranks.regions[rank]
        rows = direct_exchange.expand(ranks.hidden[rank], 0, len(expected), *arguments)
        assert torch.equal(rows, torch.stack(tokens))
        halves = direct_exchange.expand(ranks.hidden[rank], 1, len(expected) - 1, *arguments, divisor=2)
        assert torch.equal(halves, torch.stack(tokens)[1:] / 2)
        weights = found.weights[: len(expected)]
        weighted, products = direct_exchange.expand_weighted(ranks.hidden[rank], rows, 0, len(expected), *arguments)
        wide = rows.to(weights.dtype)
        torch.testing.assert_close(weighted, (wide * weights[:, None]).to(rows.dtype))
        torch.testing.assert_close(products, wide.square().sum(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_others", [0, 4])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_receive_sums_of_weighted_rows_returns_sums_and_gradients_of_weights(
    ranks: Ranks, num_others: int, is_weighted: bool
) -> None:
    slots, placed, _ = ranks.dispatch()
    max_tokens = max(len(hidden) for hidden in ranks.hidden)
    width = ranks.hidden[0].shape[1]
    expected = [torch.zeros(len(hidden), width, dtype=torch.float64, device=DEVICE) for hidden in ranks.hidden]
    gradients = [torch.zeros(weights.shape, dtype=torch.float64, device=DEVICE) for weights in ranks.weights]
    for rank, found in enumerate(placed):
        pairs = ranks.rows_of(rank)
        rows = torch.randn(len(pairs), width, device=DEVICE).to(ranks.dtype)
        grads = torch.rand(len(pairs), device=DEVICE).to(found.weights.dtype)
        cut = len(pairs) - num_others
        direct_exchange.send_sums(
            (rows[:cut], rows[cut:].clone()),
            (grads[:cut], grads[cut:].clone()),
            is_weighted,
            max_tokens,
            found,
            ranks.top_k,
            ranks.regions[rank],
            ranks.header(rank, 2),
            factor=2,
        )
        for m, (source, token, k) in enumerate(pairs):
            weight = ranks.weights[source][token, k] if is_weighted else 1.0
            expected[source][token] += 2 * rows[m].double() * weight
            gradients[source][token, k] = 2 * grads[m]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[ranks.dtype]
    for rank in range(ranks.size):
        summed, gradient = direct_exchange.receive_sums(
            slots[rank],
            ranks.slots,
            ranks.hidden[rank],
            torch.float64,
            ranks.regions[rank],
            ranks.header(rank, 2),
            ranks.errors,
        )
        assert gradient is not None
        torch.testing.assert_close(summed.double(), expected[rank], rtol=tolerance, atol=4 * tolerance)
        torch.testing.assert_close(gradient, gradients[rank], rtol=1e-6, atol=0)
        assert not ranks.errors.any()


def test_receive_sums_with_two_mismatched_headers_keeps_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks([2, 2], 1, 1, 4, torch.float32)
    slots, _, _ = ranks.dispatch()
    for sequence in (2, 3):
        header = ranks.header(0, sequence)
        direct_exchange.receive_sums(slots[0], 1, ranks.hidden[0], None, ranks.regions[0], header, ranks.errors)
    assert ranks.errors.tolist() == [1, 8, 2, 0, 8, 1, 0, 0]
