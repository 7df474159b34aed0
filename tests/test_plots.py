"""What a figure promises: every layer on the same axes, and text that stays text."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from refusal_core.geometry import LayerMap, Separation
from refusal_core.plots import (
    ROLES,
    TITLES,
    dose_figure,
    points_of,
    prompt_map,
    reading_map,
    separation_by_layer,
    star_on_map,
    umap_map,
    writer_map,
)


@pytest.fixture
def maps() -> tuple[LayerMap, ...]:
    """Three layers whose streams differ in size by a factor of a hundred; the first has nothing to see."""
    rng = np.random.default_rng(0)
    separation = Separation(0.9, 0.8, 2.0, 0.5, 0.7)
    flat = LayerMap(0, -1, np.zeros((2, 3)), np.zeros((3, 3)))
    points = [(rng.normal(size=(2, 3)) * 100**k, rng.normal(size=(3, 3)) * 100**k) for k in (1, 2)]
    rest = {"shares": (0.5, 0.2, 0.1), "separation": separation, "center": np.ones(3), "axes": np.eye(3)}
    return (flat, *(LayerMap(k, -1, *p, unit=float(100**k), **rest) for k, p in enumerate(points, 1)))


def unpacked(packed: dict, role: str, n: int, n_layers: int = 3) -> np.ndarray:
    """What the page makes of packed coordinates, in the shape [layer, prompt, axis]."""
    whole = np.frombuffer(base64.b64decode(packed[role]), "<i2")
    return whole.reshape(n_layers, -1, n).swapaxes(1, 2) * packed["step"]


@pytest.mark.parametrize("axes", list(TITLES))
def test_packed_points_are_those_of_the_layers_in_their_units_within_a_step_and_within_the_axes(maps, axes):
    packed, layout = json.loads(json.dumps(points_of(maps, axes))), prompt_map(maps, axes, "refusing").layout
    ranges = [
        (layout.scene if axes == "turned" else layout)[f"{name}axis"].range for name in "xyz"[: len(TITLES[axes])]
    ]
    low, high = np.array(ranges).T
    for role, n in (("harmful", 2), ("harmless", 3)):
        drawn = unpacked(packed, role, n)
        wanted = np.stack([getattr(m, role)[:, : len(low)] / m.unit for m in maps])
        np.testing.assert_allclose(drawn, wanted, atol=packed["step"])
        assert packed["step"] < (high - low).min() / 10_000, "less than a pixel"
        assert (drawn >= low).all() and (drawn <= high).all()


def test_points_are_shorter_than_three_letters_a_number(maps):
    many = [replace(m, harmful=np.ones((500, 3)), harmless=np.ones((500, 3))) for m in maps]
    assert len(json.dumps(points_of(many, "pca"))) < 3 * (3 * 1000 * 2)


def test_a_star_lies_where_a_prompt_with_its_activations_lies(maps):
    activations = np.array([m.harmful[1] + (0 if m.center is None else m.center) for m in maps])
    for axes, titles in TITLES.items():
        star = np.array(star_on_map(maps, activations, axes))
        np.testing.assert_allclose(star, [m.harmful[1, : len(titles)] / m.unit for m in maps], atol=1e-3)


def test_axes_without_a_sign_are_drawn_around_0_and_those_of_a_direction_as_far_as_there_are_prompts(maps):
    low, high = prompt_map(maps, "pca", "refusing").layout.xaxis.range
    assert low == -high
    right = [replace(m, harmful=np.abs(m.harmful), harmless=np.abs(m.harmless)) for m in maps]
    low, high = prompt_map(right, "along", "refusing").layout.xaxis.range
    assert -0.1 * high < low < 0
    assert prompt_map(maps[:1], "pca", "refusing").layout.xaxis.range == (-1, 1), "a range of no width cannot be drawn"


def test_the_classes_differ_by_more_than_colour(maps):
    for figure in (
        prompt_map(maps, "pca", "refusing"),
        prompt_map(maps, "turned", "refusing"),
        umap_map(np.ones((2, 2)), np.ones((3, 2))),
    ):
        assert [trace.meta["role"] for trace in figure.data] == list(ROLES)
        assert len({t.marker.symbol for t in figure.data}) == len({t.marker.color for t in figure.data}) == 2


def test_separation_leaves_out_layers_without_anything_to_see(maps):
    figure = separation_by_layer(maps, chosen=2)
    assert [list(trace.x) for trace in figure.data] == [[1, 2]] * 5
    assert [trace.y[0] for trace in figure.data] == [0.8, 0.9, 0.7, 0.5, 2.0]
    assert [trace.yaxis for trace in figure.data] == [*["y"] * 4, "y2"], "d′ has no upper end"


def test_figures_are_plain_json(maps):
    for figure in (prompt_map(maps, "turned", "refusing"), separation_by_layer(maps, 1)):
        assert json.loads(figure.to_json())["data"]


def test_a_reading_has_a_cell_for_every_layer_and_token_and_no_markup():
    along = np.array([[0.0, 1.0, -3.0], [0.5, -0.5, 2.0]])
    figure = reading_map([" a", "<b>", "\n"], along, reach=2.0)
    (heat,) = figure.data
    assert np.array(heat.z, float).tolist() == along.tolist() and (heat.zmin, heat.zmax) == (-2, 2)
    assert list(figure.layout.xaxis.ticktext) == ["␣a", "&lt;b&gt;", "⏎"]
    assert "<b>" not in json.dumps(heat.hovertext) and "-3.000" in heat.hovertext[0][2]


def test_a_part_that_a_layer_does_not_have_is_a_hole_in_the_map():
    (heat,) = writer_map(np.array([[1.0, np.nan], [-0.5, 0.25]]), ["attention", "MLP"], "log-odds").data
    assert heat.z[0][1] is None and heat.zmax == 1
    assert json.loads(writer_map(np.full((2, 1), np.nan), ["MLP"], "x").to_json())["data"][0]["zmax"] == 1


def test_the_band_of_a_curve_goes_around_the_random_directions():
    band, line = dose_figure((0.0, 1.0), (0.1, 0.9), ((0.05, 0.1), (0.15, 0.2)), "probability").data
    assert list(zip(band.x, band.y, strict=True)) == [(0, 0.15), (1, 0.2), (1, 0.1), (0, 0.05)]
    assert list(line.y) == [0.1, 0.9] and line.meta["role"] == "ink"
    (alone,) = dose_figure((0.0, 1.0), (0.1, 0.9), None, "cross-entropy").data
    assert list(alone.y) == [0.1, 0.9]
