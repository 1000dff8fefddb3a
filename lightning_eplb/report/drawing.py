"""Drawings of a report, as HTML that is visible without a script.

Drawings are stretched to the width of the page. Letters and widths of lines, which must not be, are outside of them.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from lightning_eplb.report.scales import Scale, nice_ticks

HEIGHT = 100
"""Height of the charts, in units of their drawings."""


def picture(values_RB: np.ndarray, scale: Scale) -> str:
    """Return a PNG with one pixel for each value, as a data URL."""
    from PIL import Image

    image = Image.fromarray(scale.levels(values_RB))
    image.putpalette(bytes.fromhex("".join(colour[1:] for colour in scale.colours)))
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def frame(name: str, label: str, body: str, *, rows: Iterable[tuple[float, str]], steps: int, height: str) -> str:
    """Return a drawing between its axes, above a line that describes the place under the cursor.

    Args:
        name: Id in the page.
        label: Description for screen readers.
        body: Drawing, which is stretched.
        rows: Ticks of the vertical axis: distance from the top, 0 to 1, and label.
        steps: End of the horizontal axis, which begins with step 0.
        height: Height of the drawing, in CSS.
    """
    ticks = nice_ticks(steps + 1, 6)
    y_ticks = "".join(f'<span style="top:{100 * place:.2f}%">{escape(text)}</span>' for place, text in rows)
    x_ticks = "".join(
        f'<span style="left:{100 * step / steps:.2f}%">{step:,}</span>'
        if step < 0.95 * steps
        else f'<span class="last">{step:,}</span>'  # centred, it would stick out
        for step in ticks
    )
    return (
        f'<div class="frame" id="{name}"><div class="y" aria-hidden="true">{y_ticks}</div>'
        f'<div class="plot" style="height:{height}" tabindex="0" role="group" aria-label="{escape(label)}"'
        f' aria-describedby="{name}-told">{body}<div class="cursor" hidden></div></div>'
        f'<div class="x" aria-hidden="true">{x_ticks}</div>'
        f'<div class="x-name" aria-hidden="true">optimizer step</div></div>'
        f'<output class="told" id="{name}-told" for="{name}">Point at it, or go there with Tab and move with the arrow'
        " keys.</output>"
    )


def heat(source: str, text: str) -> str:
    return f'<img class="heat" src="{source}" alt="{escape(text)}">'


def row_ticks(count: int, most: int = 9) -> list[tuple[float, str]]:
    """Return ticks in the middle of rows."""
    return [((row + 0.5) / count, str(row)) for row in nice_ticks(count, most)]


def legend(scale: Scale, what: str, nothing: str) -> str:
    """Return the colours of a scale, with labels for its ends and for grey."""
    stops = ", ".join(scale.colours[:-1:4] + scale.colours[-2:-1])
    last = len(scale.values) - 1
    ticks = "".join(f'<span style="left:{100 * level / last:.2f}%">{text}</span>' for level, text in scale.ticks)
    return (
        f'<div class="legend"><span>{escape(what)}</span><div class="scale"><div class="bar" style="background:'
        f'linear-gradient(to right, {stops})"></div><div class="x" aria-hidden="true">{ticks}</div></div>'
        f'<span class="key"><i class="nothing"></i>{escape(nothing)}</span></div>'
    )


def lines(series: Sequence[tuple[str, int, np.ndarray]], edges: np.ndarray) -> str:
    """Draw values from 0 to 1 over the steps, each series as a stepped line with gaps where values are missing.

    Args:
        series: Name, number of the style, and values, ``[B]``, of each line.
        edges: First step of each bin, and the number of steps.
    """
    steps = int(edges[-1])
    paths = []
    for name, style, values_B in series:
        commands, is_down = [], False
        for value, start, end in zip(values_B, edges[:-1], edges[1:], strict=True):
            if np.isnan(value):
                is_down = False
                continue
            y = HEIGHT * (1 - value)
            commands.append(f"{'L' if is_down else 'M'}{start} {y:.1f}H{end}")
            is_down = True
        paths.append(f'<path class="line line-{style}" data-series="{escape(name)}" d="{"".join(commands)}"/>')
    grid = "".join(f'<path class="grid" d="M0 {y}H{steps}"/>' for y in (0, 25, 50, 75, 100))
    return _stretched(steps, grid, *paths)


def bars(stacks: Sequence[tuple[int, Sequence[int]]], steps: int, highest: int) -> str:
    """Draw stacked bars on single steps."""
    drawn = []
    for step, parts in stacks:
        below = 0.0
        for index, part in enumerate(parts):
            if part:
                height = HEIGHT * part / highest
                drawn.append(
                    f'<path class="bar-{index}" d="M{step} {HEIGHT - below:.2f}V{HEIGHT - below - height:.2f}"/>'
                )
                below += height
    grid = "".join(f'<path class="grid" d="M0 {y}H{steps}"/>' for y in (0, 50, 100))
    return _stretched(steps, grid, *drawn)


def _stretched(width: int, *paths: str) -> str:
    start = f'<svg viewBox="0 0 {width} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
    return "".join([start, *paths, "</svg>"])


def table(name: str, label: str, head: Sequence[str], body: Sequence[Sequence[str]], caption: str) -> str:
    """Return a table whose first column names the row. Narrow screens scroll it by itself."""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in others)}</tr>'
        for first, *others in body
    )
    return (
        f'<p class="caption" id="{name}-caption">{escape(caption)}</p><div class="wide" id="{name}" tabindex="0"'
        f' role="region" aria-label="{escape(label)}"><table aria-describedby="{name}-caption">'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
