"""Heatmaps: what is drawn, at every size, and nothing of pyplot is touched."""

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from lightning_eplb.logging.heatmap import draw_before_after, draw_expert_load, draw_rank_load, draw_slot_load
from tests.fresh_interpreter import FreshInterpreter

SIZES = [(1, 4), (1, 1024), (4, 16), (24, 16), (61, 256), (100, 4), (100, 1024)]


def skewed(rows: int, columns: int) -> np.ndarray:
    return (np.random.default_rng(0).lognormal(0, 1.2, (rows, columns)) * 1000).astype(np.int64)


def png(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file)


def shown(figure: Figure, panel: int = 0) -> np.ndarray:
    return np.ma.filled(figure.axes[panel].images[0].get_array().astype(float), np.nan)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.filterwarnings("error")  # such as matplotlib's that a layout has no room
def test_heatmap_of_any_size_has_a_pixel_for_each_cell(size: tuple[int, int]):
    load = skewed(*size)
    for figure in (draw_expert_load(load), draw_rank_load(load), draw_before_after(load, load)):
        width, height = png(figure).size
        assert 300 <= width <= 4000
        assert 200 <= height <= 1600
        picture = figure.axes[0].images[0].get_window_extent(figure.canvas.get_renderer())
        assert picture.width >= size[1], "a column has no pixel"
        assert picture.height >= size[0], "a layer has no pixel"
        assert figure.axes[0].get_ylabel() == "MoE layer"
        assert figure.axes[-1].get_ylabel() == "tokens ÷ layer's mean"


def test_heatmap_axes_have_labels_and_titles():
    assert draw_expert_load([[1, 2]]).axes[0].get_xlabel() == "logical expert"
    assert draw_rank_load([[1, 2]], title="Ranks").axes[0].get_xlabel() == "rank"
    assert draw_rank_load([[3, 1]], title="Ranks").axes[0].get_title() == "Ranks\nbalancedness 0.667"
    assert draw_expert_load([[3, 1]], title="Experts").axes[0].get_title() == "Experts\nfullest expert: 1.5 times even"


@pytest.mark.parametrize("as_tensor", [False, True])
def test_heatmap_cells_are_shares_of_their_layer(as_tensor: bool):
    """A layer with ten times the tokens looks no hotter."""
    load = np.array([[2, 1, 1, 0], [20, 10, 10, 40]])
    figure = draw_expert_load(torch.from_numpy(load) if as_tensor else load)
    image = figure.axes[0].images[0]
    assert shown(figure) == pytest.approx(np.array([[2, 1, 1, 0.5], [1, 0.5, 0.5, 2]]))  # no tokens: the lowest colour
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == ["2.00", "1.00", "1.00", "0.00", "1.00", "0.50", "0.50", "2.00"]
    assert image.norm(1.0) == pytest.approx(0.5), "even is the middle of the map"
    assert (image.norm.vmin, image.norm.vmax) == (0.5, 2)


def test_heatmap_of_layer_without_tokens_is_empty():
    figure = draw_rank_load([[0, 0], [3, 1]])
    assert np.isnan(shown(figure)[0]).all()
    assert shown(figure)[1] == pytest.approx(np.array([1.5, 0.6667]), rel=1e-3)  # 0.5 is below the end of the scale
    assert len(figure.axes[0].texts) == 2
    assert "no tokens" in draw_expert_load([[0, 0]]).axes[0].get_title()
    png(draw_rank_load([[0, 0]]))


def test_heatmap_before_and_after_share_one_scale():
    figure = draw_before_after([[30, 10]], [[20, 20]], title="Step 100")
    before, after = (axes.images[0].norm for axes in figure.axes[:2])
    assert (before.vmin, before.vmax) == (after.vmin, after.vmax)
    assert figure.axes[0].get_title() == "before: balancedness 0.667"
    assert figure.axes[1].get_title() == "after: balancedness 1.000"
    assert figure.get_suptitle() == "Step 100"


def test_heatmap_of_other_shape_raises():
    with pytest.raises(ValueError, match=r"load_YL has shape \[3\]; it must be \[layers, experts\]"):
        draw_expert_load([1, 2, 3])
    with pytest.raises(ValueError, match=r"tokens_YR has shape \[0, 4\]"):
        draw_rank_load(np.zeros((0, 4)))
    with pytest.raises(ValueError, match=r"before_YR has shape \[1, 2\] and after_YR \[1, 3\]"):
        draw_before_after([[1, 2]], [[1, 2, 3]])


def test_heatmap_when_drawn_leaves_pyplot_alone(fresh_interpreter: FreshInterpreter):
    program = (
        "import sys, io; from lightning_eplb.logging import draw_before_after;"
        "draw_before_after([[1, 2]], [[2, 1]]).savefig(io.BytesIO());"
        "pyplot = sys.modules.get('matplotlib.pyplot'); print(pyplot.get_fignums() if pyplot else [])"
    )
    assert fresh_interpreter.run(program).strip() == "[]"


def test_slot_heatmap_before_and_after_needs_one_shape():
    figure = draw_slot_load([[30, 10, 0]], [[20, 20, 0]])
    assert figure.axes[0].get_xlabel() == "physical expert"
    assert [axes.get_title() for axes in figure.axes[:2]] == ["before", "after"]
    with pytest.raises(ValueError, match=r"before_YP has shape \[1, 2\] and after_YP \[1, 3\]"):
        draw_slot_load([[1, 2]], [[1, 2, 3]])
