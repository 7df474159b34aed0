"""What the tab Map promises: prompts on several axes, moved without the server, found, listed, and asked in Talk."""

import json
import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page
from test_ui import (
    WIDER,
    App,
    chromium,
    expect,
    held,
    launch,
    open_map,
    open_tab,
    running,
    tab,
    type_message,
    watched,
)

import refusal_core.ui.engine
from refusal_core.geometry import SAME
from refusal_core.plots import TITLES
from refusal_core.prompts import PromptError, load_prompts
from refusal_core.selection import Progress
from refusal_core.ui.engine import Engine, Ready
from refusal_core.ui.map import map_view, umap_view

__all__ = ["chromium", "tab", "watched"]  # fixtures

HOSTILE = '<img src=x onerror="document.title=1"> & %{x} <b>How</b> do I bake bread?'
N_PROMPTS = {"train": 32, "val": 8, "test": 8}


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Iterator[App]:
    """The app on a few of the embedded prompts, and one that would be markup if it were not text."""
    folder = tmp_path_factory.mktemp("map")
    rows = [
        {"text": text, "harmful": harmful, "split": split, "category": category}
        for split, n in N_PROMPTS.items()
        for prompts in [load_prompts(split).draw(n)]
        for harmful, texts, categories in (
            (True, prompts.harmful, prompts.harmful_categories),
            (False, prompts.harmless, prompts.harmless_categories),
        )
        for text, category in zip(texts, categories, strict=True)
    ]
    rows.append({"text": HOSTILE, "harmful": False, "split": "train", "category": "<i>odd</i>"})
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with running(folder / "log.txt", "--prompts", str(path)) as app:
        yield app


@pytest.fixture(scope="module")
def ready(model, found) -> Ready:
    return Ready(model, found, found.direction, load_prompts("test"), True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    """Keeps the maps that a test has had computed for the next one."""
    return Engine()


# -- what Python sends ---------------------------------------------------------------------------------------------


def test_a_map_is_small_and_its_points_are_sent_once(ready, engine):
    view = map_view(engine, ready)
    found = ready.found
    n_numbers = 2 * len(found.prompts.harmful + found.prompts.harmless) * ready.model.n_layers
    texts = len(json.dumps(view.pop("prompts")))
    assert len(json.dumps(view["points"])) < 3 * n_numbers
    assert texts + len(json.dumps(view)) < 40_000
    assert not any("x" in trace or "hovertext" in trace for trace in json.loads(view["map"])["data"])


def test_what_is_claimed_of_the_first_component_is_what_the_activations_say(ready, engine):
    found, claims = ready.found, set()
    for pos in (found.positions[0], -1):
        at = found.positions.index(pos)
        cosines = []
        for layer in range(ready.model.n_layers):
            harmful, harmless = found.harmful[:, at, layer].double(), found.harmless[:, at, layer].double()
            r, x = harmful.mean(0) - harmless.mean(0), torch.cat([harmful, harmless])
            first = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[0]
            cosines.append(float((first @ r).abs() / r.norm()) if r.norm() > 1e-6 else 0.0)
        late = [layer for layer in range(len(cosines)) if min(cosines[layer:]) >= SAME]
        claim = map_view(engine, ready, pos)["claim"]
        claims.add(bool(late))
        if late:
            assert f"From layer {late[0]} on" in claim and f"at least {min(cosines[late[0] :]):.3f}" in claim
        else:
            assert "is not the mean difference" in claim and f"|cos| is {cosines[-1]:.2f} there" in claim
            assert f"at most {max(cosines):.2f} (layer {np.argmax(cosines)})" in claim
    assert claims == {True, False}, "both sentences have been seen"


@pytest.mark.parametrize(
    ("position", "axes", "words"),
    [(7, "pca", "no position"), (-1, "umap", "no axes"), (-1, None, "no axes"), ([1], "pca", "no position")],
)
def test_a_forged_map_is_refused_with_a_sentence(ready, position, axes, words):
    with pytest.raises(PromptError, match=words):
        map_view(Engine(), ready, position, axes)
    with pytest.raises(PromptError, match="There is no"):
        list(umap_view(Engine(), ready, position, "0", threading.Event()))


def test_the_axes_along_a_direction_follow_the_one_in_use_and_the_components_do_not(ready, engine):
    source = ready.direction.source
    other = ready.using((source.position, source.layer - 1))
    for axes, follows in (("along", True), ("pca", False), ("turned", False)):
        points = [map_view(engine, r, source.position, axes)["points"] for r in (ready, other, ready)]
        assert points[0] == points[2] and (points[0] != points[1]) == follows
    assert {axes for _, axes in engine.known_maps(ready)} == set(TITLES)


def test_a_layout_that_nobody_waits_for_is_not_begun_and_one_that_is_there_is_given_at_once(ready, monkeypatch):
    may_end, begun = threading.Event(), []

    def layout(found, pos, layer):
        begun.append(layer)
        assert may_end.wait(30)
        return np.zeros((2, 2)), np.ones((2, 2))

    monkeypatch.setattr(refusal_core.ui.engine, "umap_layout", layout)
    engine, stop = Engine(), threading.Event()
    first = threading.Thread(target=lambda: list(engine.umap(ready, -1, 3, threading.Event())))
    first.start()
    second = engine.umap(ready, -1, 4, stop)
    while not begun:
        pass
    news = next(second)
    assert isinstance(news, Progress) and "waiting" in news.stage
    stop.set()
    assert list(second) == []
    may_end.set()
    first.join()
    assert begun == [3]
    (views,) = [list(umap_view(engine, ready, -1, 3, stop))]
    assert len(views) == 1 and views[0]["umap"] and begun == [3]


# -- what a visitor sees -------------------------------------------------------------------------------------------


def places(tab: Page) -> list[str]:
    return tab.locator("[data-map] .point").evaluate_all("points => points.map(p => p.getAttribute('transform'))")


def choose_axes(tab: Page, axes: str) -> None:
    """Puts something else on the axes, and waits until it is drawn."""
    tab.locator("[data-axes]").select_option(axes)
    tab.wait_for_function(f"document.querySelector('[data-map]').layout.uirevision === '{axes}'", timeout=90_000)
    expect(tab.locator(".map-body")).to_have_attribute("aria-busy", "false")


STAR = """() => {
  const { data, layout } = document.querySelector('[data-map]');
  if (layout.scene) return layout.scene.annotations.flatMap(({ x, y, z }) => [x, y, z]);
  return [data[2].x[0], data[2].y[0]];
}"""


def star(tab: Page) -> list[float]:
    """Where the star is drawn."""
    return tab.evaluate(STAR)


STEP = """async () => {
  const wait = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });
  const places = () => [...document.querySelectorAll('[data-map] .point')].map((p) => p.getAttribute('transform')).join();
  const slider = document.querySelector('[data-layer]');
  slider.value = 1;
  slider.dispatchEvent(new Event('input'));
  await wait(0);
  const before = places();
  await wait(600);
  return [before, places()];
}"""
"""Goes to layer 1; where the points are then, and where they are a little later."""


def drag(tab: Page, *corners: tuple[float, float]) -> None:
    """Drags over the map, from corner to corner in shares of its width and height."""
    box = tab.locator("[data-map] .nsewdrag").first.bounding_box()
    assert box
    for index, (x, y) in enumerate(corners):
        tab.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
        if not index:
            tab.mouse.down()
    tab.mouse.up()


def test_the_layer_slider_moves_the_points_without_asking_the_server(watched):
    tab, seen = watched
    open_map(tab)
    tab.wait_for_timeout(500)
    before, asked = places(tab), len(seen.urls)
    edges = "document.querySelector('[data-map]').layout.xaxis.range"
    ranges = tab.evaluate(edges)
    slider = tab.locator("[data-layer]")
    slider.focus()
    slider.press("ArrowRight")
    tab.wait_for_timeout(900)
    after = places(tab)
    assert len(before) == len(after) > 20
    assert sum(a != b for a, b in zip(before, after, strict=True)) > len(before) / 2
    assert tab.evaluate(edges) == ranges, "it is the points that move"
    expect(tab.locator("[data-layer-value]")).to_contain_text(slider.input_value())
    value = slider.input_value()
    tab.locator("body").press("[")
    expect(slider).not_to_have_value(value)
    tab.locator("body").press("]")
    expect(slider).to_have_value(value)
    tab.wait_for_timeout(900)
    tab.emulate_media(reduced_motion="reduce")
    still, moving = tab.evaluate(STEP)
    assert still == moving, "who wants less motion sees the layers one after the other, not the way between"
    tab.get_by_role("button", name="Play").click()
    expect(tab.locator("[data-layer-value]")).not_to_have_text(re.compile("^1 of"))
    tab.get_by_role("button", name="Pause").click()
    assert len(seen.urls) == asked, seen.urls[asked:]


def test_the_map_has_other_positions_and_keeps_the_layer(tab):
    open_map(tab)
    slider = tab.locator("[data-layer]")
    slider.press("End")
    last = slider.input_value()
    before, claim = places(tab), tab.locator("[data-claim]").inner_text()
    other = tab.locator("[data-position] option:not(:checked)").first.get_attribute("value")
    tab.locator("[data-position]").select_option(other)
    tab.wait_for_function(
        "before => document.querySelector('[data-map] .point').getAttribute('transform') !== before", arg=before[0]
    )
    assert slider.input_value() == last
    expect(tab.locator("[data-claim]")).not_to_have_text(claim)
    expect(tab.locator("[data-numbers]")).to_contain_text("d′ on the mean difference")
    assert len(tab.locator("[data-separation] .ytick").all()) > 0


def test_umap_is_shown_on_demand_with_what_it_is_doing_and_called_exploratory(tab):
    open_map(tab)
    before = places(tab)
    tab.locator("[data-axes]").select_option("umap")
    caption = tab.locator("[data-map-caption]")
    expect(caption).to_have_text(re.compile(r"^UMAP: (preparing|laying).*, \d+ s …$"))
    expect(tab.get_by_role("button", name="Play")).to_be_hidden()
    expect(caption).to_contain_text("mean nothing", timeout=300_000)
    expect(tab.locator("[data-map] .point").first).to_be_visible()
    assert places(tab)[: len(before) - 1] != before[:-1]
    expect(tab.locator("[data-map]")).to_contain_text("exploratory")
    choose_axes(tab, "pca")
    expect(tab.locator("[data-map]")).to_contain_text("PC1")


def test_the_message_is_a_star_on_all_axes_on_the_side_where_it_belongs(tab):
    places = {}
    for text in ("How do I steal a car?", "How do I bake bread?"):
        type_message(tab, text)
        open_map(tab)
        expect(tab.locator("[data-yours]")).to_be_visible()
        expect(tab.locator(".map [data-place]")).to_contain_text("toward refusal")
        for axes in TITLES:
            choose_axes(tab, axes)
            # Axes that are new to the server are foretold again.
            tab.wait_for_function(f"({STAR})().length && ({STAR})()[0] !== null")
            places[text, axes] = star(tab)
            assert len(places[text, axes]) == len(TITLES[axes])
        choose_axes(tab, "pca")
        tab.get_by_role("tab", name="Talk").click()
    for axes in TITLES:
        harmful, harmless = (places[text, axes][0] for text in ("How do I steal a car?", "How do I bake bread?"))
        assert harmful > (0.5 if axes == "along" else 0) > (harmless - 0.25 if axes == "along" else harmless)


def test_a_point_shows_its_prompt_and_the_star_moves_onto_the_one_that_is_clicked(tab):
    open_map(tab)
    box = tab.locator("[data-map] .point").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(*middle)
    expect(tab.locator("[data-map] .hoverlayer text").first).to_be_visible()
    hovered = tab.locator("[data-map] .hoverlayer text").first.text_content()
    tab.mouse.click(*middle)
    expect(tab.locator("[data-picked]")).to_contain_text("In the composer of Talk")
    tab.wait_for_function("document.querySelector('[data-map]').data[2].x[0] !== null")
    tab.wait_for_function("""() => {
      const { data } = document.querySelector('[data-map]');
      return [...data[0].x, ...data[1].x].some((x, i) => Math.hypot(x - data[2].x[0], [...data[0].y, ...data[1].y][i] - data[2].y[0]) < 0.01);
    }""")
    tab.get_by_role("button", name="Go to Talk").click()
    expect(tab.get_by_label("Message")).to_be_focused()
    text = tab.get_by_label("Message").input_value()
    assert text in tab.locator("[data-picked]").text_content()
    assert text.split()[0] in hovered


def test_what_was_being_written_comes_back_after_a_prompt_was_picked(tab):
    tab.get_by_label("Message").fill("My own, half written")
    open_map(tab)
    back, own = tab.get_by_role("button", name="Put my own prompt back"), tab.locator("[data-own]")
    expect(own).to_have_value("My own, half written")
    for point in (tab.locator("[data-map] .point").first, tab.locator("[data-map] .point").nth(20)):
        box = point.bounding_box()
        tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        expect(tab.locator("[data-picked]")).to_contain_text("In the composer of Talk")
        expect(own).not_to_have_value("My own, half written")
    back.click()
    expect(own).to_have_value("My own, half written")
    expect(own).to_be_focused()
    expect(tab.get_by_label("Message", exact=True)).to_have_value("My own, half written")
    expect(back).to_be_hidden()


def test_a_search_lists_what_it_finds_as_text_lets_it_stand_out_and_needs_no_mouse(watched):
    tab, seen = watched
    open_map(tab)
    asked, box = len(seen.urls), tab.get_by_label("Search in prompts")
    box.fill("<B>HOW</b>")
    expect(tab.locator("[data-list] button")).to_have_count(1)
    expect(tab.locator("[data-list] button")).to_contain_text(HOSTILE)
    expect(tab.locator("[data-count]")).to_have_text("With “<B>HOW</b>”: 0 harmful, 1 harmless")
    expect(tab.locator("#map img, #map .listed b")).to_have_count(0)
    faint = "document.querySelectorAll('[data-map] .point')"
    n_points = tab.evaluate("document.querySelector('[data-map]').data.slice(0, 2).flatMap(({ x }) => [...x]).length")
    tab.wait_for_function(f"[...{faint}].filter(p => getComputedStyle(p).opacity < 0.5).length === {n_points - 1}")
    tab.evaluate("""() => {
      const map = document.querySelector('[data-map]');
      Plotly.Fx.hover(map, [{ curveNumber: 1, pointNumber: map.data[1].selectedpoints[0] }]);
    }""")
    expect(tab.locator("[data-map] .hoverlayer")).to_contain_text('<img src=x onerror="document.title=1">')
    assert len(seen.urls) == asked, seen.urls[asked:]
    box.press("Tab")
    tab.keyboard.press("Tab")
    while tab.evaluate("!document.activeElement.closest('[data-list]')"):
        tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    expect(tab.locator("[data-picked]")).to_contain_text(HOSTILE)
    expect(tab.locator("#map img")).to_have_count(0)
    box.fill("xyzzy")
    expect(tab.locator("[data-count]")).to_have_text("No prompt has “xyzzy” in it.")
    expect(tab.locator("[data-list]")).to_be_hidden()
    tab.get_by_role("button", name="Clear").click()
    expect(box).to_be_focused()
    expect(box).to_have_value("")
    tab.wait_for_function(f"[...{faint}].every(p => getComputedStyle(p).opacity > 0.5)")


def test_what_is_drawn_around_is_listed_by_class_and_stays_listed_in_other_layers(tab):
    open_map(tab)
    drag(tab, (0.02, 0.02), (0.98, 0.03), (0.98, 0.98), (0.02, 0.97), (0.02, 0.03))
    n_points = tab.evaluate("document.querySelector('[data-map]').data.slice(0, 2).flatMap(({ x }) => [...x]).length")
    expect(tab.locator("[data-list] button")).to_have_count(n_points)
    tab.get_by_role("button", name="Box").click()
    drag(tab, (0.02, 0.02), (0.45, 0.98))
    expect(tab.locator("[data-count]")).to_have_text(re.compile(r"Selected: 0 harmful, \d+ harmless"))
    texts = tab.locator("[data-list] button").all_inner_texts()
    assert 10 < len(texts) < n_points
    tab.locator("[data-layer]").press("Home")
    assert tab.locator("[data-list] button").all_inner_texts() == texts
    assert tab.evaluate("document.querySelector('[data-map]').data[1].selectedpoints.length") == len(texts)
    expect(tab.locator("[data-map] .select-outline, [data-map] .selectionlayer path")).to_have_count(0)
    tab.locator("[data-list] button").first.click()
    assert tab.locator("[data-go]").get_attribute("data-text") in texts[0]
    tab.get_by_role("button", name="Clear").click()
    expect(tab.locator("[data-list]")).to_be_hidden()


def test_axes_that_are_left_before_they_arrive_leave_the_map_as_it_is_and_can_be_had_again(tab):
    open_map(tab)
    busy, axes = tab.locator(".map-body[aria-busy='true']"), tab.locator("[data-axes]")
    with held(tab, "**/queue/join*"):
        axes.select_option("along")
        expect(busy).to_have_count(1)
        axes.select_option("pca")
        expect(busy).to_have_count(0)
    tab.wait_for_timeout(1000)
    expect(tab.locator("[data-map]")).to_contain_text("PC2")
    choose_axes(tab, "along")
    expect(tab.locator("[data-map]")).to_contain_text("along the direction")
    points = "document.querySelector('[data-map]').data[0].x.join()"
    before = tab.evaluate(points)
    with held(tab, "**/queue/join*"):
        tab.locator("#map [data-position]").select_option("-2")
        axes.select_option("pca")
        axes.select_option("along")
        expect(busy).to_have_count(1)
    expect(busy).to_have_count(0)
    tab.wait_for_function(f"before => {points} !== before", arg=before)  # of the other position
    expect(tab.locator("#map [data-position]")).to_have_value("-2")


def test_in_3_d_the_view_is_kept_and_can_be_turned_without_a_mouse_and_no_canvas_is_left_behind(tab):
    open_map(tab)
    for _ in range(2):
        choose_axes(tab, "turned")
        choose_axes(tab, "pca")
    choose_axes(tab, "turned")
    assert tab.locator("[data-map] canvas").count() <= 2
    eye = "document.querySelector('[data-map]')._fullLayout.scene.camera.eye"
    before = tab.evaluate(eye)
    tab.get_by_label("turn").press("ArrowRight")
    tab.wait_for_function(f"x => {eye}.x !== x", arg=before["x"])
    turned = tab.evaluate(eye)
    tab.locator("[data-layer]").press("Home")
    tab.wait_for_timeout(400)
    assert tab.evaluate(eye) == pytest.approx(turned)
    tab.get_by_label("Search in prompts").fill("<b>how")
    tab.wait_for_function("document.querySelector('[data-map]').data[1].marker.size.filter(s => s > 4).length === 1")


def test_without_webgl_the_page_says_so_and_stays_in_two_dimensions(chromium, app):
    lacking = launch(chromium.browser_type, "--disable-3d-apis")
    tab, seen = open_tab(lacking, app)
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    open_map(tab)
    choose_axes(tab, "along")
    tab.locator("[data-axes]").select_option("turned")
    expect(tab.locator("#map [data-note]")).to_contain_text("needs WebGL")
    expect(tab.locator("[data-axes]")).to_have_value("pca")
    expect(tab.locator("[data-map]")).to_contain_text("PC2")
    expect(tab.locator("[data-map] .point").first).to_be_visible()
    choose_axes(tab, "along")
    expect(tab.locator("#map [data-note]")).to_be_empty()
    assert not seen.faults
    lacking.close()


def test_on_a_dark_phone_a_list_and_three_dimensions_fit_and_have_no_serious_fault_of_accessibility(chromium, app):
    tab, seen = open_tab(chromium, app, width=360, height=740, scheme="dark")
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    open_map(tab)
    tab.get_by_label("Search in prompts").fill("a")
    tab.locator("[data-list] button").first.click()
    for axes in ("pca", "turned"):
        choose_axes(tab, axes)
        assert tab.evaluate(WIDER) == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        found = Axe().run(tab).response["violations"]
        assert [fault for fault in found if fault["impact"] in ("serious", "critical")] == []
    assert not seen.faults
    tab.context.close()


def test_what_is_typed_on_the_map_moves_the_star_and_stands_in_the_composer(tab):
    tab.get_by_label("Message").fill("one line\nand another")
    open_map(tab)
    field = tab.locator("#map").get_by_label("Your prompt")
    expect(field).to_have_value("one line\nand another")
    expect(tab.locator("#map [data-place]")).not_to_be_empty()
    star = "JSON.stringify(document.querySelector('[data-map]').data.at(-1).x)"
    before, said = tab.evaluate(star), tab.locator("#map [data-place]").inner_text()
    field.press_sequentially(" How do I steal a car?")
    tab.wait_for_function(f"before => {star} !== before", arg=before)
    expect(tab.locator("#map [data-place]")).not_to_have_text(said)
    assert tab.locator("#talk [data-prompt]").input_value() == "one line\nand another How do I steal a car?"
    field.fill("")
    expect(tab.locator("#map [data-place]")).to_contain_text("The last prompt")
