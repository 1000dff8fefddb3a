"""Draw the tokens of experts and ranks: a row for each MoE layer, a column for each expert or rank.

The colour of a cell is its *share*: its tokens divided by the mean of its layer. White is even (1), red is more, blue
is less. The scale is logarithmic, so twice and half of even are equally strong. The map (``RdBu``) is safe for common
kinds of colour blindness. Layers without a token are grey.

Matplotlib is imported when something is drawn. Figures are made without ``pyplot``, so none must be closed and the
user's backend does not change.

Shape suffixes: ``Y`` MoE layers, ``L`` logical experts, ``R`` ranks, ``C`` columns (experts or ranks).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from lightning_eplb.functional import balancedness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MOST_WRITTEN_COLUMNS = 16
MOST_WRITTEN_ROWS = 24
"""Largest numbers of columns and rows with a number in each cell."""

COLOUR_LIMITS = (1.25, 1.5, 2, 4, 8, 16)
"""Ends of the colour scale, as shares. The first one that covers every cell is used, or the last."""


def draw_expert_load(load_YL: Any, title: str = "Load of the logical experts", axes: "Axes | None" = None) -> "Figure":
    """Draw the tokens of the logical experts, layers by experts.

    Args:
        load_YL: Tokens of each logical expert, ``[Y, L]``: a tensor on any device or a NumPy array, such as
            ``ExpertLoad.compute()["load"]``.
        title: Title of the picture.
        axes: Axes to draw on. Defaults to those of a new figure, as large as the model needs.

    Returns:
        Figure with a canvas; ``figure.savefig("load.png")`` writes it. The largest share is under the title.

    Raises:
        ValueError: ``load_YL`` does not have two dimensions, or one of them is 0.
    """
    tokens_YL = _tokens(load_YL, "load_YL", "[layers, experts]")
    share_YL = _share(tokens_YL)
    fullest = f"fullest expert: {np.nanmax(share_YL):.3g} times even" if tokens_YL.any() else "no tokens"
    if axes is None:
        figure, (axes,) = _empty_figure(tokens_YL.shape, panels=1)
    else:
        figure = cast("Figure", axes.get_figure(root=True))
    limit = _colour_limit(share_YL)
    image = _draw_share(axes, share_YL, "logical expert", limit)
    axes.set_title(f"{title}\n{fullest}", fontsize=11)
    _draw_colour_bar(figure, [axes], image, limit)
    return figure


def draw_rank_load(tokens_YR: Any, title: str = "Load of the ranks") -> "Figure":
    """Draw the tokens of the ranks, layers by ranks.

    Args:
        tokens_YR: Tokens that each rank computes, ``[Y, R]``: a tensor on any device or a NumPy array, such as that of
            :func:`~lightning_eplb.functional.rank_tokens`.
        title: Title of the picture.

    Returns:
        Figure with a canvas; ``figure.savefig("load.png")`` writes it. The balancedness is under the title.

    Raises:
        ValueError: ``tokens_YR`` does not have two dimensions, or one of them is 0.
    """
    tokens_YR = _tokens(tokens_YR, "tokens_YR", "[layers, ranks]")
    share_YR = _share(tokens_YR)
    figure, (axes,) = _empty_figure(tokens_YR.shape, panels=1)
    limit = _colour_limit(share_YR)
    image = _draw_share(axes, share_YR, "rank", limit)
    axes.set_title(f"{title}\nbalancedness {balancedness(tokens_YR):.3f}", fontsize=11)
    _draw_colour_bar(figure, [axes], image, limit)
    return figure


def draw_balancedness(values: Sequence[float], axes: "Axes | None" = None) -> "Figure":
    """Draw balancedness over steps, from 0 to 1.

    Args:
        values: Balancedness of successive steps.
        axes: Axes to draw on. Defaults to those of a new figure.

    Returns:
        Figure with a canvas.
    """
    if axes is None:
        figure, (axes,) = _empty_figure((16, 32), panels=1)
    else:
        figure = cast("Figure", axes.get_figure(root=True))
    axes.plot(values, color="#0072b2", marker="o" if len(values) < 30 else "")
    axes.set(xlabel="step", ylabel="balancedness", ylim=(0, 1.05))
    axes.grid(alpha=0.4)
    return figure


def draw_slot_load(before_YP: Any, after_YP: Any, title: str = "Load of the slots, rank by rank") -> "Figure":
    """Draw the load of the physical experts before and after a rearrangement, side by side on one colour scale.

    Args:
        before_YP: Tokens of each slot under the placement before, ``[Y, P]``, as of
            :func:`~lightning_eplb.functional.slot_tokens`.
        after_YP: Tokens of each slot under the placement after, for the same load.
        title: Title of both pictures.

    Returns:
        Figure with a canvas. Slots are in the order of ranks, primaries of a rank first.

    Raises:
        ValueError: An argument does not have two dimensions, one of them is 0, or the shapes differ.
    """
    return _draw_pair(before_YP, after_YP, title, "YP", "slots", "physical expert", "")


def draw_before_after(before_YR: Any, after_YR: Any, title: str = "Rearrangement") -> "Figure":
    """Draw the load of the ranks before and after a rearrangement, side by side on one colour scale.

    Args:
        before_YR: Tokens of each rank under the placement before, ``[Y, R]``.
        after_YR: Tokens of each rank under the placement after, for the same load.
        title: Title of both pictures. Each has its balancedness above it.

    Returns:
        Figure with a canvas.

    Raises:
        ValueError: An argument does not have two dimensions, one of them is 0, or the shapes differ.
    """
    return _draw_pair(before_YR, after_YR, title, "YR", "ranks", "rank", "balancedness")


def _draw_pair(before: Any, after: Any, title: str, suffix: str, columns: str, column_name: str, told: str) -> "Figure":
    tokens = {
        "before": _tokens(before, f"before_{suffix}", f"[layers, {columns}]"),
        "after": _tokens(after, f"after_{suffix}", f"[layers, {columns}]"),
    }
    before_shape, after_shape = (list(tokens_YC.shape) for tokens_YC in tokens.values())
    if before_shape != after_shape:
        raise ValueError(
            f"before_{suffix} has shape {before_shape} and after_{suffix} {after_shape}. They must be equal."
        )
    shares = {name: _share(tokens_YC) for name, tokens_YC in tokens.items()}
    limit = _colour_limit(np.stack(list(shares.values())))
    figure, panels = _empty_figure(tokens["before"].shape, panels=2)
    images = []
    for axes, (name, share_YC) in zip(panels, shares.items(), strict=True):
        images.append(_draw_share(axes, share_YC, column_name, limit))
        axes.set_title(f"{name}: {told} {balancedness(tokens[name]):.3f}" if told else name, fontsize=11)
    panels[1].set_ylabel("")
    figure.suptitle(title, fontsize=12)
    _draw_colour_bar(figure, panels, images[0], limit)
    return figure


def _tokens(values: Any, name: str, dimensions: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    tokens_YC = np.asarray(values, dtype=np.float64)
    if tokens_YC.ndim != 2 or not tokens_YC.size:
        raise ValueError(f"{name} has shape {list(tokens_YC.shape)}; it must be {dimensions}, at least one of each.")
    return tokens_YC


def _share(tokens_YC: np.ndarray) -> np.ndarray:
    """Divide tokens by the mean of their layer. NaN in layers without a token."""
    mean_Y1 = tokens_YC.mean(axis=1, keepdims=True)
    return np.divide(tokens_YC, mean_Y1, out=np.full_like(tokens_YC, np.nan), where=mean_Y1 > 0)


def _colour_limit(share: np.ndarray) -> float:
    largest = np.nanmax(share, initial=1.0)
    return next((limit for limit in COLOUR_LIMITS if largest <= limit), COLOUR_LIMITS[-1])


def _empty_figure(shape: tuple[int, ...], panels: int) -> "tuple[Figure, list[Axes]]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = shape
    written = _is_written(shape)
    # Cells with numbers have room for them; all others have at least a pixel.
    width = float(np.clip((0.52 if written else 0.2) * columns, 3.6 if panels == 1 else 2.4, 13 / panels))
    height = float(np.clip((0.32 if written else 0.18) * rows, 1.6, 10))
    width, height = max(width, columns / 100), max(height, rows / 50)
    figure = Figure(figsize=(panels * (width + 0.4) + 1.5, height + 1.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, panels, squeeze=False, sharey=True)
    return figure, list(grid[0])


def _is_written(shape: tuple[int, ...]) -> bool:
    return shape[0] <= MOST_WRITTEN_ROWS and shape[1] <= MOST_WRITTEN_COLUMNS


def _draw_share(axes: "Axes", share_YC: np.ndarray, column_name: str, limit: float) -> "AxesImage":
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    rows, columns = share_YC.shape
    colours = colormaps["RdBu_r"].with_extremes(bad="0.75")
    norm = LogNorm(1 / limit, limit)
    # A share of 0 has no logarithm: it gets the lowest colour.
    shown_YC = np.maximum(share_YC, 1 / limit)
    image = axes.imshow(shown_YC, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_xlabel(column_name)
    axes.set_ylabel("MoE layer")
    for axis, count, most in ((axes.xaxis, columns, MOST_WRITTEN_COLUMNS), (axes.yaxis, rows, MOST_WRITTEN_ROWS)):
        if count <= most:
            axis.set_ticks(range(count))
        else:
            axis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 4, 5, 8, 10]))
    if columns <= 64 and rows <= 64:
        # Thin lines between the cells. With more cells they would hide these.
        axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    if _is_written(share_YC.shape):
        for (row, column), share in np.ndenumerate(share_YC):
            if np.isfinite(share):
                dark = abs(np.log(shown_YC[row, column])) > 0.62 * np.log(limit)
                text = f"{share:.2f}" if share < 9.995 else f"{share:.1f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return image


def _draw_colour_bar(figure: "Figure", axes: "list[Axes]", image: "AxesImage", limit: float) -> None:
    from matplotlib.ticker import NullLocator

    steps = [share for share in COLOUR_LIMITS if share <= limit and (share >= 2 or limit <= 2)]
    ticks = [1 / share for share in reversed(steps)] + [1.0] + steps
    thin = 5 * figure.get_figheight()  # a bar of a fifth of an inch
    bar = figure.colorbar(image, ax=axes, extend="both", extendfrac=0.03, label="tokens ÷ layer's mean", aspect=thin)
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.yaxis.set_minor_locator(NullLocator())
