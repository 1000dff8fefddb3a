"""The page in a browser: it loads without a complaint, fits narrow screens, and its controls do what they say."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_eplb.cli import main
from lightning_eplb.simulation.trace import TraceWriter

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LAYERS, EXPERTS, STEPS = 5, 16, 700


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a load that is skewed in one layer, even in another, and none in the last, with a gap in time."""
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    writer = TraceWriter(folder / "<trace>.npy")
    popularity_YL = random.lognormal(0, 1, (LAYERS, EXPERTS))
    popularity_YL[1] = 1
    for step in range(STEPS):
        load_YL = np.array([random.multinomial(40_000, p_L / p_L.sum()) for p_L in popularity_YL])
        load_YL[-1] = 0
        load_YL[0, 3] = 0
        writer.append(load_YL * (not 300 <= step < 340))
    writer.close()
    output = folder / "new" / "report.html"
    words = ["report", str(folder / "<trace>.npy"), "-o", str(output), "--ep-size", "4", "--num-nodes", "2"]
    assert main([*words, "--num-groups", "2", "--move-tokens", "1", "1"]) == 0
    return output


def test_page_file_is_self_contained(page_file: Path) -> None:
    html = page_file.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:)|url\(|@import|https?://", html)
    assert "default-src 'none'" in html
    assert "&lt;trace&gt;.npy" in html
    assert "<trace>" not in html
    data = json.loads(re.findall(r'id="data">(.*?)</script>', html, re.DOTALL)[0])
    assert [series["name"] for series in data["series"]] == ["static", "deepseek", "balanced"]
    assert (data["layers"], data["experts"], data["edges"][-1]) == (LAYERS, EXPERTS, STEPS)
    assert len(data["pictures"]) == LAYERS


@pytest.mark.slow
def test_page_of_long_trace_is_small_and_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10,000 steps, 32 layers, 64 experts: below 2 MB; and below 20 s of this process' time."""
    start = time.process_time()
    words = ["report", "--synthetic", "drift-30", "--steps", "10000", "--layers", "32", "--experts", "64"]
    assert main([*words, "--num-redundant-experts", "8", "-o", str(tmp_path / "report.html")]) == 0
    assert time.process_time() - start < 60  # no promise of a machine's speed, only that it does not take minutes
    assert (tmp_path / "report.html").stat().st_size < 2e6
    assert "MiB" in capsys.readouterr().out


def test_report_to_unwritable_path_prints_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    words = ["report", "--synthetic", "zipf", "--steps", "60", "-o", str(tmp_path / "file" / "report.html")]
    assert main(words) == 1
    assert re.fullmatch(r"error: .*report.html can't be written: .+\n", capsys.readouterr().err)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine; Debian's package chromium brings one")
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, page_file: Path) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request", lambda request: complaints.append(request.url) if request.url[:5] not in ("file:", "data:") else 0
    )
    page.set_default_timeout(5_000)
    page.goto(page_file.as_uri())
    yield page
    page.close()
    assert complaints == []


@pytest.mark.parametrize("width", [320, 400, 800, 1400])
def test_page_at_any_width_cuts_nothing_off(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("balance", "layers", "experts", "moves-chart"):
        box = page.locator(f"#{name} .plot").bounding_box()
        assert box["width"] > 0.7 * width - 20 or width == 1400
        assert 100 <= box["height"] <= 600
    overlapping = page.evaluate(
        """() => [...document.querySelectorAll('.frame .x, .frame .y, .legend .x')].flatMap((axis) => {
             const boxes = [...axis.children].map((tick) => tick.getBoundingClientRect()).filter((box) => box.width);
             return boxes.slice(1).filter((box, i) => box.left < boxes[i].right && box.top < boxes[i].bottom
               && boxes[i].left < box.right && boxes[i].top < box.bottom);
           }).length"""
    )
    assert overlapping == 0


def test_page_checkbox_shows_and_hides_line(page: Any) -> None:
    line = page.locator("#balance path[data-series=deepseek]")
    assert line.is_visible()
    page.locator("#balance .plot").hover()
    assert re.fullmatch(r"Steps [\d,]+ to [\d,]+: static .*, deepseek .*, balanced .*", told(page, "balance"))
    page.get_by_label("deepseek").uncheck()
    assert not line.is_visible()
    assert "deepseek" not in told(page, "balance")
    page.get_by_label("deepseek").check()
    assert line.is_visible()


def told(page: Any, name: str) -> str:
    return page.locator(f"#{name}-told").inner_text()


def test_page_map_of_layers_shows_chosen_quantity(page: Any) -> None:
    picture = page.locator("#layers img")
    hottest = picture.get_attribute("src")
    page.locator("#layers .plot").focus()
    assert re.fullmatch(r"Steps 0 to \d+, layer 0: hottest expert [\d.]+ times even", told(page, "layers"))
    page.get_by_label("Show", exact=True).select_option(label="Balancedness of the ranks, balanced")
    page.wait_for_function("document.querySelector('#layers-told').textContent.includes('balancedness (balanced)')")
    assert picture.get_attribute("src") != hottest
    assert "balanced policy" in picture.get_attribute("alt")
    assert page.locator("[data-scale=ratio]").is_visible()
    assert not page.locator("[data-scale=hottest]").is_visible()
    for key in ("ArrowDown", "End"):
        page.keyboard.press(key)
    assert told(page, "layers").endswith(
        ("layer 1: balancedness (balanced) 0.99", "layer 1: balancedness (balanced) 1.00")
    )
    for _ in range(LAYERS):
        page.keyboard.press("ArrowDown")
    assert told(page, "layers").endswith(f"layer {LAYERS - 1}: balancedness (balanced) no tokens")


def test_page_layer_can_be_chosen_in_each_way(page: Any) -> None:
    title = page.locator("h2", has_text="Experts of layer")
    picture = page.locator("#experts img")
    first = picture.get_attribute("src")
    previous, following = (
        page.get_by_role("button", name="Previous layer"),
        page.get_by_role("button", name="Next layer"),
    )
    assert previous.is_disabled()
    following.click()
    assert title.inner_text() == "Experts of layer 1 over time"
    assert picture.get_attribute("src") != first
    page.get_by_label("Layer", exact=True).select_option(str(LAYERS - 1))
    assert title.inner_text() == f"Experts of layer {LAYERS - 1} over time"
    assert following.is_disabled()
    previous.click()
    assert title.inner_text() == f"Experts of layer {LAYERS - 2} over time"
    page.locator("#layers .plot").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert title.inner_text() == "Experts of layer 2 over time"
    box = page.locator("#layers .plot").bounding_box()
    page.locator("#layers .plot").click(position={"x": 100, "y": box["height"] * 0.5 / LAYERS})
    assert title.inner_text() == "Experts of layer 0 over time"
    assert picture.get_attribute("src") == first


def test_page_cursor_on_expert_shows_recorded_share(page: Any) -> None:
    page.locator("#experts .plot").focus()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert re.search(r"layer 0, expert 3: 0[.]\d+ times even or less$", told(page, "experts"))
    page.get_by_role("button", name="Next layer").click()
    page.wait_for_function("document.querySelector('#experts-told').textContent.includes('layer 1')")
    share = float(re.findall(r"expert 3: ([\d.]+) times even", told(page, "experts"))[0])
    assert share == pytest.approx(1, abs=0.05)


def test_page_cursor_on_decision_shows_its_moves(page: Any) -> None:
    page.locator("#moves-chart .plot").focus()
    assert re.match(r"Before step 25: \d+ experts moved within a node, \d+ between nodes", told(page, "moves-chart"))
    page.locator("summary", has_text="decisions").click()
    assert page.locator("#decisions").is_visible()
    assert page.locator("#decisions tbody tr").count() == 7


def test_page_controls_are_reached_by_keyboard_and_named(page: Any) -> None:
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(
            """() => { const e = document.activeElement;
              return e === document.body ? null : e.ariaLabel || e.labels?.[0]?.textContent || e.textContent; }"""
        )
        if name is None:
            break
        assert name.strip()
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", name
        reached.append(name.strip())
    wanted = page.locator("input, select, button:not([disabled]), summary, .plot, .wide").count()
    folded = page.locator("details:not([open]) .wide").count()
    assert len(reached) == wanted - folded
    assert page.evaluate("[...document.images].every((image) => image.alt)")


def test_page_text_has_contrast_of_level_aa(page: Any) -> None:
    """Contrast of 4.5 and more, as WCAG 2.2 asks for at level AA, of all that is written on the page's white."""
    contrasts = page.evaluate(
        """() => [...document.querySelectorAll('body *')].filter((e) => e.checkVisibility() && !e.disabled
             && [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())).map((e) => {
             const channels = getComputedStyle(e).color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
               .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
             return [1.05 / (0.05 + 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]), e.tagName];
           })"""
    )
    assert len(contrasts) > 50
    assert min(contrasts)[0] >= 4.5, min(contrasts)


def test_page_when_printed_has_no_controls(page: Any) -> None:
    page.emulate_media(media="print")
    for gone in (".controls", ".told", "summary"):
        assert not page.locator(gone).first.is_visible()
    assert page.locator(".keys").is_visible()
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#all-layers").is_visible()
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert not page.locator("#all-layers").is_visible()
    assert page.pdf().startswith(b"%PDF")


def test_page_without_scripts_draws_all(browser: Any, page_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    for drawn in ("#balance path[data-series=static]", "#layers img", "#experts img", "#sizes", ".keys", "noscript"):
        assert page.locator(drawn).first.is_visible(), drawn
    assert not page.locator(".controls").first.is_visible()
    context.close()
