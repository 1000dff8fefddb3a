"""Start of training: read a known load, and place the experts by it, by the checkpoint or by a fixed placement."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_eplb.balancer import ExpertLoadBalancer
from lightning_eplb.balancer.step_stats import RearrangementResult
from lightning_eplb.balancer.warm_start import Load
from lightning_eplb.checkpoint.without_weights import is_checkpoint, read_without_weights
from lightning_eplb.parallel.consensus import check_same_on_all_ranks, decide_on_rank_zero
from lightning_eplb.policies import StaticPolicy
from lightning_eplb.simulation.trace_formats import read_load

DATA_OF_REPORT = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)
"""Numbers in the page that ``python -m lightning_eplb report`` writes."""


def place_experts(
    balancer: ExpertLoadBalancer, is_resumed: bool, initial_load: str | os.PathLike | Load | None
) -> RearrangementResult | None:
    """Place experts before the first step of a ``fit``. Every rank must call it.

    A placement of ``StaticPolicy`` comes first, then that of the checkpoint, then ``initial_load``.

    Args:
        balancer: Balancer, with the checkpoint's state if there is one.
        is_resumed: A checkpoint's state was loaded into the balancer.
        initial_load: Load, or the file or folder that holds it, which rank 0 alone reads.

    Returns:
        Result of a rearrangement, if there was one.

    Raises:
        ValueError: The load can't be read, or does not fit the model. All ranks raise it, and nothing was moved.
    """
    if is_resumed and initial_load is not None:
        rank_zero_info("initial_load was not used: the checkpoint has a load and a placement of its own")
    has_placement = isinstance(balancer.policy, StaticPolicy) and balancer.policy.physical_to_logical is not None
    if has_placement and (is_resumed or balancer.num_steps == 0):
        return balancer.rearrange()
    if is_resumed:
        return balancer.resume_placement()
    if initial_load is None or balancer.num_steps:
        return None
    if balancer.groups.size == 1:
        rank_zero_warn("initial_load has no effect with ep_size=1, as nothing can move.")
        return None
    if isinstance(balancer.policy, StaticPolicy):
        rank_zero_warn("initial_load has no effect with StaticPolicy, which moves nothing. Use BalancedPolicy().")
        return None
    return balancer.rearrange(load=_read_on_rank_zero(initial_load, balancer))


def _read_on_rank_zero(source: str | os.PathLike | Load, balancer: ExpertLoadBalancer) -> Load:
    """Return the load on every rank. A path is read on rank 0, which may be the only one that has the file."""
    path = source if isinstance(source, (str, os.PathLike)) else None
    described = {"initial_load": f"a {type(source).__name__}" if path is None else str(path)}
    check_same_on_all_ranks(described, "EPLBCallback(initial_load=...) moves experts", balancer.groups)
    if path is None:
        return source  # type: ignore[return-value]
    window_size = next(iter(balancer.models.values())).load.window_size

    def read() -> Load:
        try:
            load = read_initial_load(path)
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error.strerror or error}") from error
        if isinstance(load, dict):
            return {name: load_WYL[-window_size:] for name, load_WYL in load.items()}
        return load[-window_size:]  # a trace may be long, and the others are not looked at

    return decide_on_rank_zero(read, f"initial_load={str(path)!r}", balancer.groups)


def read_initial_load(path: str | os.PathLike) -> np.ndarray | dict[str, np.ndarray]:
    """Read a load to start training from, for ``ExpertLoadBalancer.rearrange(load=...)``.

    Args:
        path: Checkpoint with the state of an ``EPLBCallback`` or a balancer, whose window is read; HTML page of
            ``report``, whose total is read as one step; or a trace or table in any format of
            :func:`~lightning_eplb.simulation.trace_formats.read_load`.

    Returns:
        Tokens of each expert, int64 ``[W, Y, L]``. Of a checkpoint of several models a dictionary by their names,
        without frozen ones that every rank kept whole.

    Raises:
        ValueError: The file has none of these formats, or is damaged.
        OSError: The file can't be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist. Name a trace, a checkpoint, or a report.")
    if path.suffix.lower() in (".html", ".htm"):
        return _read_report(path)
    return _read_window(path) if is_checkpoint(path) else read_load(path)


def _read_report(path: Path) -> np.ndarray:
    found = DATA_OF_REPORT.search(path.read_text(encoding="utf-8", errors="replace"))
    try:
        load_YL = np.array(json.loads(found[1])["total"]) if found else None
    except (ValueError, KeyError, TypeError):
        load_YL = None
    if load_YL is None or load_YL.ndim != 2 or load_YL.dtype.kind not in "iu":
        raise ValueError(f"{path} is no report that holds its load; write it again with this version's `report`")
    return load_YL[None].astype(np.int64)


def _read_window(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    checkpoint = read_without_weights(path)
    callbacks = checkpoint.get("callbacks")
    for state in [checkpoint.get("balancer"), *(callbacks.values() if isinstance(callbacks, dict) else ())]:
        if not isinstance(state, Mapping) or not {"num_rearrangements", "num_ranks"} <= state.keys():
            continue
        if "window" in state:  # of the only model that was distributed; those that stayed whole are beside it
            models = {"": state}
        else:
            models = {name: its for name, its in state.get("models", {"": {}}).items() if not _is_whole(its)}
        arrays = {name: _window(its, path) for name, its in models.items()}
        if not any(len(window) for window in arrays.values()):
            raise ValueError(f"{path} has a window without steps. Use a checkpoint of a run that has trained.")
        return arrays.get("", arrays)
    raise ValueError(f"{path} has no state of an EPLBCallback: it was saved without one, or with weights only")


def _is_whole(state: Any) -> bool:
    """Return ``True`` for the state of a frozen model that every rank kept whole: it had no placement."""
    return isinstance(state, Mapping) and "window" in state and "physical_to_logical" not in state


def _window(state: Any, path: Path) -> np.ndarray:
    window = state.get("window") if isinstance(state, Mapping) else None
    if not isinstance(window, Tensor) or window.ndim != 3 or window.is_floating_point() or window.is_meta:
        raise ValueError(f"{path} has a damaged window: it must be a tensor [steps, layers, experts] of counts")
    return window.numpy()
