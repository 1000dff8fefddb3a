"""Rows of stacks are packed and put back, by views, by index and, where there is a GPU, by address."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_eplb.parallel import pieces
from lightning_eplb.parallel.permute import has_kernels
from lightning_eplb.parallel.pieces import gather, scatter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("most_views", [0, 10**6])
@given(data=st.data())
def test_what_was_gathered_is_scattered_to_its_place(most_views: int, data: st.DataObject) -> None:
    num_tensors, rows_of_each = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    widths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    number = num_tensors * rows_of_each
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, number - 1), max_size=6, unique=True)), dtype=torch.int64)
    parts, whole, column = [], [], 0
    for width in widths:
        values = torch.arange(column, column + number * width, dtype=torch.int64, device=DEVICE).view(number, width)
        column += number * width
        start = data.draw(st.integers(0, width - 1))
        parts.append(([*values.clone().split(rows_of_each)], start, data.draw(st.integers(start + 1, width))))
        whole.append(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MOST_VIEWS", most_views)
        buffer = gather(parts, chosen)
        expected = [values[chosen.to(DEVICE), a:b] for values, (_, a, b) in zip(whole, parts, strict=True)]
        assert torch.equal(buffer, torch.cat(expected, dim=1))
        scatter(-buffer, parts, chosen)
    for values, (stack, start, stop) in zip(whole, parts, strict=True):
        values[chosen.to(DEVICE), start:stop] *= -1
        assert torch.equal(torch.cat(stack), values)


@pytest.mark.skipif(DEVICE == "cpu", reason="addresses are of a GPU's memory")
def test_a_gpu_goes_by_address() -> None:
    assert has_kernels(torch.zeros(1, device=DEVICE))
