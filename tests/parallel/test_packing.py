"""Rows of stacks are packed and put back: by views, by index and, where there is a GPU, by address."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_eplb.parallel import packing
from lightning_eplb.parallel.packing import AddressedPieces, in_buffer, pieces_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("most_views", [0, 10**6])
@given(data=st.data())
def test_what_was_gathered_is_scattered_to_its_place(most_views: int, data: st.DataObject) -> None:
    num_tensors, rows_of_each = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    widths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    number = num_tensors * rows_of_each
    rows = torch.tensor(data.draw(st.lists(st.integers(0, number - 1), max_size=6, unique=True)), dtype=torch.int64)
    whole = [torch.arange(number * width, dtype=torch.int64, device=DEVICE).view(number, width) for width in widths]
    stacks = [[*values.clone().split(rows_of_each)] for values in whole]
    cuts = [data.draw(st.integers(0, width)) for width in widths]
    windows = [[(i, 0, cut) for i, cut in enumerate(cuts) if cut]]
    windows.append([(i, cut, width) for i, (cut, width) in enumerate(zip(cuts, widths, strict=True)) if cut < width])
    windows = [window for window in windows if window]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MOST_VIEWS", most_views)
        cut_up = pieces_of(stacks, rows, windows, 8)
        for k, window in enumerate(windows):
            buffer = cut_up.gather(k, is_alone=False)
            expected = [whole[i][rows.to(DEVICE), start:stop] for i, start, stop in window]
            assert torch.equal(buffer, torch.cat(expected, dim=1))
            cut_up.scatter(-buffer, k, is_alone=True)
        cut_up.finish()
    for values, stack in zip(whole, stacks, strict=True):
        values[rows.to(DEVICE)] *= -1
        assert torch.equal(torch.cat(stack), values)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)), max_size=5))
def test_parts_lie_side_by_side_in_a_buffer(parts: list[tuple[int, int, int]]) -> None:
    window = [(i, start, start + width) for i, start, width in parts]
    column = 0
    for (i, start, stop), columns in in_buffer(window):
        assert (columns.start, columns.stop - columns.start) == (column, stop - start)
        assert (i, start, stop) in window
        column = columns.stop


@pytest.mark.skipif(DEVICE == "cpu", reason="addresses are of a GPU's memory")
def test_a_gpu_goes_by_address() -> None:
    stacks = [[torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)]]
    assert isinstance(pieces_of(stacks, torch.tensor([1]), [[(0, 0, 2)]], 8), AddressedPieces)
