"""Memory and initial weights for a model that was parallelized on the meta device."""

from itertools import chain

import torch
from torch import nn


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give every parameter and buffer memory on ``device``, for this rank's shards only, and initialize them.

    Modules do that by ``reset_parameters``, as PyTorch's have it, or ``initialize_weights``, as Hugging Face's models
    have it; the latter also fills buffers that no checkpoint has, such as those of rotary embeddings. Ranks draw their
    own numbers: on replicas weights are equal only once they were loaded.

    Args:
        model: Built under ``torch.device("meta")`` and parallelized. One without a meta tensor stays as it is.
    """
    if not any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        return
    model.to_empty(device=device)
    with torch.no_grad():
        _initialize(model)


def _initialize(module: nn.Module) -> None:
    if callable(initialize := getattr(module, "initialize_weights", None)):
        initialize()  # with all that is inside
        return
    for child in module.children():
        _initialize(child)
    if callable(reset := getattr(module, "reset_parameters", None)):
        reset()
