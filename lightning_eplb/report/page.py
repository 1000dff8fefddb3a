"""HTML page of a report: its sections, their order and their texts."""

import json
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from lightning_eplb.functional import load_entropy
from lightning_eplb.report import drawing
from lightning_eplb.report.content import ReportContent, last_steps
from lightning_eplb.report.scales import Scale, hottest_scale, ratio_scale, share_scale
from lightning_eplb.simulation.replay import describe, speed_up

STYLE_OF_LINE = {"static": 0, "deepseek": 1, "balanced": 2}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy of the page: nothing is fetched."""
TERMS = {
    "Balancedness": "Mean over ranks of the tokens that they serve, divided by the fullest rank's, tokens summed over"
    " layers as Σ mean / Σ fullest. 1 is perfect; 1 / ranks is all work on one rank.",
    "Static": "The experts stay where training starts with them: what you have without balancing.",
    "Moved": "Primaries, with weights and optimizer state, that change ranks between two steps. Redundant copies hold"
    " weights only and cost no move.",
    "Speed-up": "Of the experts' part of a step, which waits for the fullest rank. Attention and the rest stay as they"
    " are; time for moves is not subtracted.",
    "Times even": "Tokens of an expert, divided by the mean of its layer's experts.",
    "Replayed": "The load is as it was recorded; which ranks serve it is simulated. Each decision sees only the steps"
    " before it.",
}


def render(content: ReportContent) -> str:
    """Return the page with its styles, script, pictures and numbers. It fetches nothing.

    Args:
        content: Result of :func:`lightning_eplb.report.prepare`.

    Returns:
        HTML.
    """
    drawn = (ratio_scale(), share_scale(content.share), hottest_scale(content.share.max(axis=1)))
    scales = {scale.name: scale for scale in drawn}
    views = _views(content, scales)
    body = [
        _header(content),
        "<main>",
        _balance(content),
        _layers(content, views, scales),
        _experts(content, scales["share"]),
        _moves(content),
        _what_if(content),
        _by_layer(content),
        "</main>",
        "<footer><h2>Terms</h2><dl class='terms'>",
        *(f"<dt>{escape(term)}</dt><dd>{escape(meaning)}</dd>" for term, meaning in TERMS.items()),
        "</dl></footer>",
    ]
    own = files("lightning_eplb.report")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>Expert load: {escape(content.source)}</title>\n"
        f"<style>\n{(own / 'page.css').read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f'\n<script type="application/json" id="data">{_data(content, views, scales)}</script>\n'
        f"<script>\n{(own / 'page.js').read_text(encoding='utf-8')}</script>\n</body>\n</html>\n"
    )


def _header(content: ReportContent) -> str:
    layers, experts = content.total.shape
    settings, static, best = content.settings, content.static, content.best
    before, after = _judged(static, best.first_decided), _judged(best, best.first_decided)
    waits = [100 * (1 - level.mean()) if len(level) else 0.0 for level in (before, after)]
    if static is best or not len(after):
        verdict = f"An average rank waits for the fullest one in {waits[0]:.0f} % of the experts' time."
    else:
        verdict = (
            f"Where experts stay put, an average rank waits for the fullest one in {waits[0]:.0f} % of the experts'"
            f" time; with the {best.name} policy in {waits[1]:.0f} %."
        )
        if waits[0] < 5:
            verdict += " There is little to gain."
    dead, hottest = int((content.total == 0).sum()), np.unravel_index(content.total.argmax(), content.total.shape)
    share = content.total[hottest] / max(content.total[hottest[0]].mean(), 1e-9)
    figures = {
        "Balancedness": (
            _from_to(before.mean() if len(before) else None, after.mean() if len(after) else None),
            "mean",
        ),
        "In the worst 5 % of steps": (
            _from_to(*(np.percentile(level, 5) if len(level) else None for level in (before, after))),
            "5th percentile",
        ),
        "Experts' part of a step": (f"{speed_up(best, static):.2f} ×", "as fast"),
        "Experts moved": (f"{best.rows_moved:,}", f"in {len(best.decisions):,} decisions"),
        "Hottest expert": (f"{share:.1f} × even", f"layer {hottest[0]}, expert {hottest[1]}"),
        "Experts without a token": (f"{dead:,}", f"of {layers * experts:,}, over all steps"),
    }
    numbers = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(small)}</small></dd></div>"
        for name, (value, small) in figures.items()
    )
    return (
        f"<header><h1>Expert load and balance</h1><p>{escape(content.source)}: {content.num_steps:,} steps,"
        f" {layers} layers of {experts} experts. Replayed on {settings['num_ranks']} ranks"
        f" ({settings.get('num_nodes', 1)} node{'s' if settings.get('num_nodes', 1) != 1 else ''}) with"
        f" {settings.get('num_redundant_experts', 0)} redundant experts, a decision every"
        f" {settings.get('step_interval', '?')} steps.</p>"
        f'<p class="verdict">{escape(verdict)}</p><dl class="figures">{numbers}</dl>'
        "<noscript><p>Without scripts the cursor and the choice of a layer are missing; all else is here.</p>"
        "</noscript></header>"
    )


def _balance(content: ReportContent) -> str:
    series = [(name, STYLE_OF_LINE.get(name, 3), values_B) for name, values_B in content.balancedness.items()]
    boxes = "".join(
        f'<label><input type="checkbox" id="series-{name}" data-toggles="{name}" checked>'
        f"{_line_key(style, name)}</label>"
        for name, style, _ in series
    )
    keys = "".join(_line_key(style, name) for name, style, _ in series)
    rows = [((4 - quarter) / 4, f"{quarter / 4:g}") for quarter in range(5)]
    return (
        "<section><h2>Balancedness over time</h2><p>Mean over ranks ÷ fullest rank, of single steps; 1 is perfect."
        f' Each point is the mean of {_bin_width(content)}.</p><div class="controls" role="group"'
        f' aria-label="Policies shown">{boxes}</div><p class="keys">{keys}</p>'
        + drawing.frame(
            "balance",
            "Balancedness over time, a line for each policy",
            drawing.lines(series, content.edges),
            rows=rows,
            steps=content.num_steps,
            height="14rem",
        )
        + "</section>"
    )


def _line_key(style: int, name: str) -> str:
    line = f'<svg viewBox="0 0 36 8" aria-hidden="true"><path class="line line-{style}" d="M0 4H36"/></svg>'
    return f'<span class="key">{line}{escape(name)}</span>'


def _views(content: ReportContent, scales: dict[str, Scale]) -> list[dict[str, str]]:
    """Return the views of the map of layers: first after balancing, then before."""
    order = [content.best.name, *(name for name in content.balancedness_by_layer if name != content.best.name)]
    views = [
        {
            "name": f"Balancedness of the ranks, {name}",
            "what": f"balancedness ({name})",
            "text": f"Balancedness of the ranks by layer over time, {name} policy",
            "scale": "ratio",
            "source": drawing.picture(content.balancedness_by_layer[name], scales["ratio"]),
        }
        for name in order
    ]
    fullest_YB = content.share.max(axis=1)  # NaN where the layer has no token
    return [
        {
            "name": "Load of the hottest expert",
            "what": "hottest expert",
            "text": "Load of each layer's hottest expert over time",
            "scale": "hottest",
            "source": drawing.picture(fullest_YB, scales["hottest"]),
        },
        *reversed(views),
    ]


def _layers(content: ReportContent, views: list[dict[str, str]], scales: dict[str, Scale]) -> str:
    layers = len(content.total)
    options = "".join(f'<option value="{index}">{escape(view["name"])}</option>' for index, view in enumerate(views))
    legends = "".join(
        f'<div data-scale="{name}"{"" if name == views[0]["scale"] else " hidden"}>{legend}</div>'
        for name, legend in (
            ("hottest", drawing.legend(scales["hottest"], "Tokens ÷ even", "no tokens")),
            ("ratio", drawing.legend(scales["ratio"], "Balancedness", "no tokens")),
        )
    )
    return (
        "<section><h2>Load over time, by layer</h2><p>A row for each MoE layer. Where the hottest expert is bright, its"
        " rank is waited for, unless the ranks share it.</p>"
        f'<div class="controls"><label for="view">Show</label><select id="view">{options}</select>'
        "<span>A click, or Enter, shows a layer's experts below.</span></div>"
        + drawing.frame(
            "layers",
            "Map of layers over time",
            drawing.heat(views[0]["source"], views[0]["text"]),
            rows=drawing.row_ticks(layers),
            steps=content.num_steps,
            height=_height(layers),
        )
        + f'<div id="layers-legends">{legends}</div></section>'
    )


def _experts(content: ReportContent, scale: Scale) -> str:
    layers, experts = content.total.shape
    options = "".join(f'<option value="{layer}">{layer}</option>' for layer in range(layers))
    return (
        '<section><h2>Experts of layer <span id="layer-name">0</span> over time</h2>'
        "<p>A row for each expert: its tokens over the mean of its layer.</p>"
        '<div class="controls"><button type="button" id="previous" aria-label="Previous layer">Previous</button>'
        f'<label for="layer">Layer</label><select id="layer">{options}</select>'
        '<button type="button" id="next" aria-label="Next layer">Next</button></div>'
        + drawing.frame(
            "experts",
            "Map of one layer's experts over time",
            drawing.heat(drawing.picture(content.share[0], scale), "Load of the experts of layer 0 over time"),
            rows=drawing.row_ticks(experts),
            steps=content.num_steps,
            height=_height(experts),
        )
        + drawing.legend(scale, "Tokens ÷ even", "no tokens in the layer")
        + "</section>"
    )


def _moves(content: ReportContent) -> str:
    best = content.best
    start = f'<section id="moves"><h2>Moves, {escape(best.name)} policy</h2>'
    if not best.rows_moved:
        return f"{start}<p>No expert changed its rank in {len(best.decisions)} decisions.</p></section>"
    highest = max(decision.rows_moved for decision in best.decisions)
    stacks = [(each.first_step, (each.rows_within_nodes, each.rows_between_nodes)) for each in best.decisions]
    has_nodes = bool(best.rows_between_nodes)
    keys = '<span class="key"><svg viewBox="0 0 36 8"><path class="bar-0" d="M0 4H36"/></svg>within a node</span>'
    if has_nodes:
        keys += '<span class="key"><svg viewBox="0 0 36 8"><path class="bar-1" d="M0 4H36"/></svg>between nodes</span>'
    rows = [
        [
            f"{decision.first_step:,}",
            f"{decision.num_layers:,}",
            f"{decision.rows_within_nodes:,}",
            f"{decision.rows_between_nodes:,}",
            *_around(content, index),
        ]
        for index, decision in enumerate(best.decisions)
    ]
    return (
        f"{start}<p>Primaries that changed ranks, with their optimizer state, in all layers together. {keys}</p>"
        + drawing.frame(
            "moves-chart",
            "Experts moved by each decision over time",
            drawing.bars(stacks, content.num_steps, highest),
            rows=[(0.0, f"{highest:,}"), (0.5, f"{highest / 2:g}"), (1.0, "0")],
            steps=content.num_steps,
            height="8rem",
        )
        + f"<details><summary>All {len(rows):,} decisions</summary>"
        + drawing.table(
            "decisions",
            "All decisions",
            ["step", "layers", "within a node", "between nodes", "balancedness before", "after"],
            rows,
            "Balancedness is that of the steps between this decision and the one before it, or the one after it.",
        )
        + "</details></section>"
    )


def _around(content: ReportContent, index: int) -> list[str]:
    """Return the balancedness before and after a decision, up to the neighbouring decisions."""
    best = content.best
    bounds = [0, *(decision.first_step for decision in best.decisions), content.num_steps]
    parts = (best.balancedness[bounds[i] : bounds[i + 1]] for i in (index, index + 1))
    return [f"{np.nanmean(part):.3f}" if (~np.isnan(part)).any() else "–" for part in parts]


def _what_if(content: ReportContent) -> str:
    head, *body = describe(content.replays, content.static)
    policies = drawing.table("policies", "Policies compared", head, body, "At the size above, by policy.")
    if not content.other_sizes:
        return f'<section id="what-if"><h2>What if</h2>{policies}</section>'
    ranks = sorted({size.num_ranks for size in content.other_sizes})
    redundant = sorted({size.redundant_per_rank for size in content.other_sizes})
    cells = {
        (size.num_ranks, size.redundant_per_rank): f"{size.balancedness:.3f} ({size.speed_up:.2f} ×)"
        for size in content.other_sizes
    }
    steps = min(content.num_steps, len(last_steps(content.static.balancedness, int(content.settings["step_interval"]))))
    grid = drawing.table(
        "sizes",
        "Other sizes compared",
        ["ranks", *(f"{count} a rank" if count else "no redundant" for count in redundant)],
        [[str(count), *(cells.get((count, each), "–") for each in redundant)] for count in ranks],
        "Redundant experts of each layer: balancedness, and speed-up of the experts' part over static placement on as"
        f" many ranks; balanced policy, the last {steps:,} steps.",
    )
    return (
        '<section id="what-if"><h2>What if</h2><p>The same load with other policies, on more or fewer ranks, with more'
        f" or fewer redundant experts. <code>lightning-eplb simulate</code> tries any other numbers.</p>"
        f"{policies}{grid}</section>"
    )


def _by_layer(content: ReportContent) -> str:
    rows = []
    for layer, total_L in enumerate(content.total):
        mean, hottest = total_L.mean(), int(total_L.argmax())
        rows.append(
            [
                str(layer),
                *(
                    _mean_cell(content.balancedness_by_layer[each.name][layer])
                    for each in (content.static, content.best)
                ),
                f"{hottest}" if mean else "–",
                f"{total_L[hottest] / mean:.2f}" if mean else "–",
                str(int((total_L == 0).sum())),
                f"{load_entropy(total_L[None]):.3f}",
            ]
        )
    return (
        '<section id="by-layer"><h2>Layer by layer</h2><details data-print><summary>'
        f"All {len(rows)} layers</summary>"
        + drawing.table(
            "all-layers",
            "All layers",
            ["layer", "static", content.best.name, "hottest expert", "times even", "without a token", "entropy"],
            rows,
            "Balancedness is the mean over time. Entropy is that of the experts' shares over all steps, 1 is even.",
        )
        + "</details></section>"
    )


def _data(content: ReportContent, views: list[dict[str, str]], scales: dict[str, Scale]) -> str:
    """Return the data of the script, as JSON."""
    best = content.best
    layers, experts = content.total.shape
    data: dict[str, Any] = {
        "edges": content.edges.tolist(),
        "layers": layers,
        "experts": experts,
        "total": content.total.tolist(),  # for EPLBCallback(initial_load=...)
        "series": [
            {"name": name, "values": [None if np.isnan(value) else round(float(value), 4) for value in values_B]}
            for name, values_B in content.balancedness.items()
        ],
        "scales": {name: {"colours": scale.colours, "words": scale.words} for name, scale in scales.items()},
        "views": views,
        "pictures": [drawing.picture(share_LB, scales["share"]) for share_LB in content.share],
        "decisions": [
            {
                "step": decision.first_step,
                "text": f"Before step {decision.first_step:,}: {decision.rows_within_nodes:,} experts moved within a"
                f" node, {decision.rows_between_nodes:,} between nodes, in {decision.num_layers:,} layers",
            }
            for decision in best.decisions
        ],
    }
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _judged(replay: Any, first: int) -> np.ndarray:
    values_W = replay.balancedness[first:]
    return values_W[~np.isnan(values_W)]


def _from_to(before: float | None, after: float | None) -> str:
    return " → ".join("–" if value is None else f"{value:.3f}" for value in (before, after))


def _mean_cell(values_B: np.ndarray) -> str:
    known = values_B[~np.isnan(values_B)]
    return f"{known.mean():.3f}" if len(known) else "–"


def _bin_width(content: ReportContent) -> str:
    width = int(np.diff(content.edges).max())
    return "one step" if width == 1 else f"{width:,} steps"


def _height(rows: int) -> str:
    """Return a height at which rows are visible and the whole map fits a screen."""
    return f"{min(max(0.7 * rows, 8), 32):.1f}rem"
