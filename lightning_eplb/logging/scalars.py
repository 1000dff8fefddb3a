"""Scalars of an optimizer step: names, units, meanings and values."""

from lightning_eplb.balancer import ExpertLoadBalancer
from lightning_eplb.balancer.steps import StepLoad
from lightning_eplb.functional import hottest_share, load_entropy

SCALARS: dict[str, tuple[str, str]] = {
    "eplb/balancedness": (
        "ratio",
        "mean over ranks of the tokens that they served, divided by the fullest rank's; 1 is perfect",
    ),
    "eplb/window_balancedness": (
        "ratio",
        "the same of the window's load, had the present placement served it at once; without the copies of batches",
    ),
    "eplb/balancedness_layers/A-B": ("ratio", "the same as the first, of layers A to B: up to four groups of layers"),
    "eplb/predicted_balancedness": ("ratio", "what the latest decision expected it to be from then on"),
    "eplb/forecast_error": (
        "ratio",
        "how far the load was from what the latest decision but one expected; 0 is exact",
    ),
    "eplb/avg_tokens": ("tokens", "mean over ranks of the tokens that they served"),
    "eplb/max_tokens": ("tokens", "those of the fullest rank, looked for in each layer and forward pass"),
    "eplb/max_over_mean": ("ratio", "max_tokens / avg_tokens: how many times an average rank's work is waited for"),
    "eplb/hottest_expert": (
        "ratio",
        "tokens of the hottest expert over the mean of its layer's experts, in the layer where that is most",
    ),
    "eplb/dead_experts": ("experts", "how many got no token in the window, over all layers"),
    "eplb/entropy": (
        "ratio",
        "entropy of the experts' shares over that of even shares, mean over layers; 1 is even, 0 is all to one",
    ),
    "eplb/copies": ("slots", "redundant slots that held an expert, over layers and forward passes"),
    "eplb/copy_bytes": ("bytes", "their weights out and their gradients home, over all ranks"),
    "eplb/plan_seconds": (
        "seconds",
        "what rank 0's host took to choose copies and to divide the tokens among them, over layers and forward passes",
    ),
    "eplb/saved_seconds": (
        "seconds",
        "estimate of what the experts' part of the step took less than on the first placement without copies: tokens"
        " that the fullest rank served less, times the measured time of a token",
    ),
    "eplb/rearrangements": ("count", "how many there were that changed the placement"),
    "eplb/rearranged_rows": ("experts", "primaries that changed ranks in the latest, over layers, in one EP group"),
    "eplb/rearranged_bytes": (
        "bytes",
        "weights, optimizer state and, where they move too, gradients that crossed ranks in the latest, over all ranks",
    ),
    "eplb/rearrange_seconds": ("seconds", "what training waited for the latest, on rank 0"),
    "eplb/rearrange_plan_seconds": (
        "seconds",
        "of these, until all ranks knew what was decided; with `use_async` the host's time, behind the backward pass",
    ),
    "eplb/rearrange_exchange_seconds": ("seconds", "of these, while rows moved"),
}
"""Unit and meaning by name. Tokens are summed over layers. Values are those of the optimizer step unless stated."""


def scalars_of(balancer: ExpertLoadBalancer, step: StepLoad) -> dict[str, float]:
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
        "eplb/hottest_expert": hottest_share(step.load),
        "eplb/dead_experts": float((balancer.load.compute()["load"] == 0).sum()),
        "eplb/entropy": load_entropy(step.load),
        "eplb/copies": float(step.num_copies),
        "eplb/copy_bytes": float(step.copy_bytes),
        "eplb/plan_seconds": step.plan_seconds,
        "eplb/rearrangements": float(balancer.num_rearrangements),
    }
    if len(step.load) > 1:
        for (first, last), value in step.balancedness_by_group().items():
            values[f"eplb/balancedness_layers/{first}-{last}"] = value
    if (latest := balancer.last_rearrangement) is not None:
        values["eplb/rearranged_rows"] = float(latest.num_rows)
        values["eplb/rearranged_bytes"] = float(latest.num_bytes)
        values["eplb/rearrange_seconds"] = latest.seconds
        values["eplb/rearrange_plan_seconds"] = latest.plan_seconds
        values["eplb/rearrange_exchange_seconds"] = latest.exchange_seconds
    sometimes = {
        "eplb/predicted_balancedness": balancer.predicted_balancedness,
        "eplb/forecast_error": balancer.forecast_error,
        "eplb/saved_seconds": balancer.seconds_saved(step),
    }
    return values | {name: value for name, value in sometimes.items() if value is not None}
