"""Scalars of an optimizer step: names, units, meanings and values."""

from lightning_eplb.balancer import ExpertLoadBalancer
from lightning_eplb.balancer.models import ModelLayers
from lightning_eplb.balancer.step_stats import StepStats
from lightning_eplb.functional import hottest_share, load_entropy

SCALARS: dict[str, tuple[str, str]] = {
    "eplb/balancedness": (
        "ratio",
        "mean tokens of a rank divided by those of the fullest rank; 1 is perfect",
    ),
    "eplb/window_balancedness": (
        "ratio",
        "balancedness of the window's whole load on the present placement, without replicas chosen by batch",
    ),
    "eplb/balancedness_layers/A-B": ("ratio", "balancedness of layers A to B, for up to four groups of layers"),
    "eplb/predicted_balancedness": ("ratio", "balancedness that the latest decision expected from then on"),
    "eplb/forecast_error": (
        "ratio",
        "error of the load forecast of the last decision but one; 0 is exact",
    ),
    "eplb/avg_tokens": ("tokens", "mean tokens of a rank"),
    "eplb/max_tokens": ("tokens", "tokens of the fullest rank, found for each layer and forward pass"),
    "eplb/max_over_mean": ("ratio", "max_tokens / avg_tokens, the time of a step in units of a mean rank's"),
    "eplb/hottest_expert": (
        "ratio",
        "tokens of the hottest expert over the mean of its layer, largest over layers",
    ),
    "eplb/dead_experts": ("experts", "experts without a token in the window, over all layers"),
    "eplb/entropy": (
        "ratio",
        "entropy of the experts' shares over that of even shares, mean over layers; 1 is even, 0 is one expert only",
    ),
    "eplb/copies": ("slots", "redundant slots that held an expert, over layers and forward passes"),
    "eplb/copy_bytes": ("bytes", "weights sent to redundant experts and gradients returned, over all ranks"),
    "eplb/plan_seconds": (
        "seconds",
        "time of rank 0's host to choose replicas and to split tokens among them, over layers and forward passes",
    ),
    "eplb/direct_dispatch": (
        "ratio",
        "layers whose tokens rank 0 wrote straight into other ranks' memory; the others' went by all_to_all_single",
    ),
    "eplb/saved_seconds": (
        "seconds",
        "estimated time saved in the experts' part of the step over the initial placement without redundant experts:"
        " tokens fewer on the fullest rank, times the measured time of a token",
    ),
    "eplb/rearrangements": ("count", "rearrangements that changed the placement"),
    "eplb/rearranged_rows": (
        "experts",
        "primaries that changed ranks in the latest rearrangement, over layers, in one EP group",
    ),
    "eplb/rearranged_bytes": (
        "bytes",
        "weights, optimizer state and, if they move, gradients that changed ranks in the latest one, over all ranks",
    ),
    "eplb/rearrange_seconds": ("seconds", "time that training waited for the latest one, on rank 0"),
    "eplb/rearrange_plan_seconds": (
        "seconds",
        "part of it until all ranks had the decision; with `use_async` the host's time, during the backward pass",
    ),
    "eplb/rearrange_exchange_seconds": ("seconds", "part of it in which rows were transferred"),
}
"""Unit and meaning by name. Tokens are summed over layers. Values are those of the optimizer step unless stated.

Of several models, or layers with different numbers of experts, these are sums over all of them. The scalars of
:data:`BY_MODEL` are then logged for each, as ``eplb/MODEL/balancedness``, with the names of
``ExpertLoadBalancer.models``."""

BY_MODEL = (
    "balancedness",
    "window_balancedness",
    "balancedness_layers/A-B",
    "predicted_balancedness",
    "forecast_error",
    "avg_tokens",
    "max_tokens",
    "max_over_mean",
    "hottest_expert",
    "dead_experts",
    "entropy",
)
"""Scalars that are logged for each model if there are several. One that rests keeps the values of its latest step."""


def scalars_of(balancer: ExpertLoadBalancer, step: StepStats) -> dict[str, float]:
    """Return the known scalars after a step, by the names of :data:`SCALARS`.

    Performs no communication. Seconds are those of the calling rank.

    Args:
        balancer: Balancer after the step.
        step: Result of its :meth:`~lightning_eplb.ExpertLoadBalancer.step`.
    """
    values = {
        "eplb/balancedness": step.balancedness,
        "eplb/window_balancedness": balancer.window_balancedness(),
        "eplb/avg_tokens": step.avg_tokens,
        "eplb/max_tokens": step.max_tokens,
        "eplb/max_over_mean": step.max_tokens / step.avg_tokens,
        "eplb/copies": float(step.num_copies),
        "eplb/copy_bytes": float(step.copy_bytes),
        "eplb/plan_seconds": step.plan_seconds,
        "eplb/direct_dispatch": step.direct_layers,
        "eplb/rearrangements": float(balancer.num_rearrangements),
    }
    if (latest := balancer.last_rearrangement) is not None:
        values["eplb/rearranged_rows"] = float(latest.num_rows)
        values["eplb/rearranged_bytes"] = float(latest.num_bytes)
        values["eplb/rearrange_seconds"] = latest.seconds
        values["eplb/rearrange_plan_seconds"] = latest.plan_seconds
        values["eplb/rearrange_exchange_seconds"] = latest.exchange_seconds
    sometimes = {
        "eplb/predicted_balancedness": balancer.predicted_balancedness,
        "eplb/saved_seconds": balancer.seconds_saved(step),
    }
    values |= {name: value for name, value in sometimes.items() if value is not None}
    for name, part in step.models.items():
        if part.has_tokens:
            model = balancer.models[name]
            values |= _of_model("eplb/" + prefix_of(balancer, model), model, part)
    return values


def prefix_of(balancer: ExpertLoadBalancer, model: ModelLayers) -> str:
    """Return the part of a logged name that tells which model it is of. Empty for the only one that is distributed."""
    return "" if balancer.placed_models == [model] else f"{model.name}/"


def _of_model(prefix: str, model: ModelLayers, step: StepStats) -> dict[str, float]:
    """Return the scalars of :data:`BY_MODEL`."""
    values = {
        "balancedness": step.balancedness,
        "window_balancedness": model.window_balancedness(),
        "avg_tokens": step.avg_tokens,
        "max_tokens": step.max_tokens,
        "max_over_mean": step.max_tokens / step.avg_tokens,
        "hottest_expert": hottest_share(step.load),
        "dead_experts": float((model.load.compute()["load"] == 0).sum()),
        "entropy": load_entropy(step.load),
    }
    if len(step.load) > 1:
        for (first, last), value in step.balancedness_by_group().items():
            values[f"balancedness_layers/{first}-{last}"] = value
    sometimes = {
        "predicted_balancedness": model.predicted_balancedness,
        "forecast_error": model.forecast_error,
    }
    values |= {name: value for name, value in sometimes.items() if value is not None}
    return {prefix + name: value for name, value in values.items()}
