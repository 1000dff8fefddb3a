"""Transfer of a resize: other numbers of rows, and state for ranks that join, in one process."""

from collections import deque

import pytest
import torch
from torch import nn

from lightning_eplb.relocation.resize_transfer import StateLayout, check_unambiguous, set_data


@pytest.mark.parametrize("rows", [1, 4])
def test_set_data_while_a_graph_is_alive_takes_gradients_of_the_new_shape(rows: int) -> None:
    parameter = nn.Parameter(torch.ones(rows, 3, dtype=torch.float64))
    alive = (parameter * 2).sum()  # as a loss that the loop has kept
    set_data(parameter, torch.full((2, 3), 5.0, dtype=torch.float64))
    (parameter * torch.tensor([[1.0], [2.0]], dtype=torch.float64)).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [[1.0] * 3, [2.0] * 3]
    assert parameter.dtype == torch.float64
    assert alive.item() == rows * 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_set_data_keeps_object_and_dtype(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(2, 3, dtype=dtype))
    data = torch.zeros(5, 3, dtype=dtype)
    set_data(parameter, data)
    assert isinstance(parameter, nn.Parameter)
    assert parameter.requires_grad
    assert parameter.data_ptr() == data.data_ptr()


def stepped() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.ones(4, 3, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.state[parameter]["history"] = deque([torch.ones(4), None, 3], maxlen=5)
    return parameter, optimizer


def test_state_layout_creates_state_without_rows_and_with_shared_values() -> None:
    parameter, optimizer = stepped()
    layout = StateLayout.of(parameter, [optimizer])
    joining = nn.Parameter(torch.empty(0, 3, 2))
    theirs = torch.optim.AdamW([joining])
    layout.create(joining, [theirs])
    state = theirs.state[joining]
    assert list(state) == list(optimizer.state[parameter])
    assert state["step"] == 1.0
    assert state["step"] is not optimizer.state[parameter]["step"]
    assert state["exp_avg"].shape == (0, 3, 2)
    assert state["history"].maxlen == 5
    assert [state["history"][0].shape, *list(state["history"])[1:]] == [(0,), None, 3]
    assert joining.grad is not None
    assert joining.grad.shape == (0, 3, 2)
    assert StateLayout.of(joining, [theirs]).signature() == layout.signature()


def test_state_layout_of_a_wrapper_that_exposes_the_state_creates_it_once() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner, self.state = inner, inner.state

    parameter, optimizer = stepped()
    layout = StateLayout.of(parameter, [Wrapper(optimizer), optimizer])
    joining = nn.Parameter(torch.empty(0, 3, 2))
    theirs = torch.optim.AdamW([joining])
    layout.create(joining, [Wrapper(theirs), theirs])
    assert len(theirs.state) == 1
    assert theirs.state[joining]["exp_avg"].shape == (0, 3, 2)


def test_state_layout_of_other_gradients_or_keys_has_another_signature() -> None:
    parameter, optimizer = stepped()
    signature = StateLayout.of(parameter, [optimizer]).signature()
    parameter.grad = None
    assert StateLayout.of(parameter, [optimizer]).signature() != signature
    parameter.grad = torch.zeros_like(parameter)
    optimizer.state[parameter]["step"] += 1  # a value
    assert StateLayout.of(parameter, [optimizer]).signature() == signature
    del optimizer.state[parameter]["exp_avg"]
    assert StateLayout.of(parameter, [optimizer]).signature() != signature


def test_check_unambiguous_with_one_expert_and_state_of_one_number_raises() -> None:
    parameter = nn.Parameter(torch.ones(1, 3, 2))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"momentum": torch.ones(1, 3, 2), "step": torch.tensor(1.0)}
    check_unambiguous({"experts.up": parameter}, [optimizer])
    optimizer.state[parameter]["count"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"'count' of SGD for experts.up has shape \[1\]"):
        check_unambiguous({"experts.up": parameter}, [optimizer])
