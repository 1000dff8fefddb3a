"""Rows of stacks are packed and put back: by views, by index and, where there is a GPU, by address."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_eplb.parallel import packing
from lightning_eplb.parallel.packing import AddressTablePacker, buffer_columns, make_packer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("most_views", [0, 10**6])
@given(data=st.data())
def test_packer_after_pack_unpacks_to_same_place(most_views: int, data: st.DataObject) -> None:
    num_tensors, rows_of_each = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    widths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    number = num_tensors * rows_of_each
    rows = torch.tensor(data.draw(st.lists(st.integers(0, number - 1), max_size=6, unique=True)), dtype=torch.int64)
    whole = [torch.arange(number * width, dtype=torch.int64, device=DEVICE).view(number, width) for width in widths]
    stacks = [[*values.clone().split(rows_of_each)] for values in whole]
    cuts = [data.draw(st.integers(0, width)) for width in widths]
    chunks = [[(i, 0, cut) for i, cut in enumerate(cuts) if cut]]
    chunks.append([(i, cut, width) for i, (cut, width) in enumerate(zip(cuts, widths, strict=True)) if cut < width])
    chunks = [chunk for chunk in chunks if chunk]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MAX_VIEWS", most_views)
        packer = make_packer(stacks, rows, chunks, 8)
        for k, chunk in enumerate(chunks):
            buffer = packer.pack(k, uses_all_sms=False)
            expected = [whole[i][rows.to(DEVICE), start:stop] for i, start, stop in chunk]
            assert torch.equal(buffer, torch.cat(expected, dim=1))
            packer.unpack(-buffer, k, uses_all_sms=True)
        packer.finish()
    for values, stack in zip(whole, stacks, strict=True):
        values[rows.to(DEVICE)] *= -1
        assert torch.equal(torch.cat(stack), values)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9)), max_size=5))
def test_buffer_columns_of_chunk_lie_side_by_side(parts: list[tuple[int, int, int]]) -> None:
    chunk = [(i, start, start + width) for i, start, width in parts]
    column = 0
    for (i, start, stop), columns in buffer_columns(chunk):
        assert (columns.start, columns.stop - columns.start) == (column, stop - start)
        assert (i, start, stop) in chunk
        column = columns.stop


@pytest.mark.skipif(DEVICE == "cpu", reason="addresses are of a GPU's memory")
def test_make_packer_on_gpu_uses_address_table() -> None:
    stacks = [[torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)]]
    assert isinstance(make_packer(stacks, torch.tensor([1]), [[(0, 0, 2)]], 8), AddressTablePacker)
