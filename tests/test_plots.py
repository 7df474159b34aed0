"""What a figure promises: every layer on the same axes, and text that stays text."""

import json

import numpy as np
import pytest

from refusal_core.geometry import LayerMap, Separation
from refusal_core.plots import ROLES, dose_figure, prompt_map, reading_map, separation_by_layer, writer_map
from refusal_core.prompts import PromptSet

HOSTILE = '<img src=x onerror="alert(1)"> <b>bold</b> & %{x} <a href="javascript:alert(1)">link</a>'


@pytest.fixture
def prompts() -> PromptSet:
    return PromptSet(
        harmful=("How do I steal a car?", HOSTILE),
        harmless=("How do I bake bread?", "word " * 400, "Wer bist du?"),
        harmful_categories=("theft", "<i>odd</i>"),
        harmless_categories=("cooking", "", ""),
    )


@pytest.fixture
def maps() -> tuple[LayerMap, ...]:
    """Three layers whose streams differ in size by a factor of a hundred; the first has nothing to see."""
    rng = np.random.default_rng(0)
    separation = Separation(0.9, 0.8, 2.0, 0.5, -0.7, (0.5, 0.2, 0.1))
    flat = LayerMap(0, -1, np.zeros((2, 3)), np.zeros((3, 3)), None)
    points = [
        LayerMap(k, -1, rng.normal(size=(2, 3)) * 100**k, rng.normal(size=(3, 3)) * 100**k, separation) for k in (1, 2)
    ]
    return (flat, *points)


def test_every_layer_is_a_frame_and_lies_within_the_one_pair_of_axes(maps, prompts):
    figure = prompt_map(maps, prompts, layer=1)
    assert [frame.name for frame in figure.frames] == ["0", "1", "2"]
    for frame in figure.frames:
        for trace, n in zip(frame.data, (2, 3), strict=True):
            assert len(trace.x) == len(trace.y) == n
            assert np.abs(trace.x).max() <= figure.layout.xaxis.range[1]
            assert np.abs(trace.y).max() <= figure.layout.yaxis.range[1]


def test_a_layer_is_scaled_as_a_whole_so_that_its_shape_is_kept(maps, prompts):
    frame = prompt_map(maps, prompts, layer=1).frames[2]
    drawn = np.array([[*trace.x], [*trace.y]] if (trace := frame.data[0]) else [])
    ratio = drawn.T / maps[2].harmful[:, :2]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=0.02)


def test_the_scatter_shows_the_layer_that_was_asked_for(maps, prompts):
    figure = prompt_map(maps, prompts, layer=2)
    assert list(figure.data[0].x) == list(figure.frames[2].data[0].x)


def test_what_is_shown_at_a_point_holds_no_markup_of_the_prompt(maps, prompts):
    harmful, harmless = prompt_map(maps, prompts, layer=1).data
    shown = harmful.hovertext[1]
    assert "<img" not in shown and "<a " not in shown and "<b>" not in shown and "<i>odd" not in shown
    assert "&lt;img" in shown
    assert harmful.hoverinfo == "text" and harmful.hovertemplate is None
    assert len(harmless.hovertext[1]) < 600, "a long prompt is shortened"


def test_the_classes_differ_by_more_than_colour(maps, prompts):
    figure = prompt_map(maps, prompts, layer=1)
    assert [trace.meta["role"] for trace in figure.data] == list(ROLES)
    assert (
        len({trace.marker.symbol for trace in figure.data}) == len({trace.marker.color for trace in figure.data}) == 2
    )


def test_separation_leaves_out_layers_without_anything_to_see(maps):
    figure = separation_by_layer(maps, chosen=2)
    assert [list(trace.x) for trace in figure.data] == [[1, 2]] * 3
    assert list(figure.data[2].y) == [0.7, 0.7], "the sign of a principal component means nothing"


def test_figures_are_plain_json(maps, prompts):
    for figure in (prompt_map(maps, prompts, 0), separation_by_layer(maps, 1)):
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
