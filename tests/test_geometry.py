"""What the map promises: the components are PCA's, the signs hold still, and the numbers are those of the points."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from refusal_core.geometry import (
    SAME,
    LayerMap,
    Separation,
    along_maps,
    first_component_is_difference,
    pca_maps,
    place,
    turned,
    umap_layout,
)
from refusal_core.selection import Found


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def test_the_points_are_the_principal_components_up_to_sign(found: Found):
    pos, layer = found.direction.source.position, found.direction.source.layer
    at = found.positions.index(pos)
    x = torch.cat([found.harmful[:, at, layer], found.harmless[:, at, layer]]).double()
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    here = pca_maps(found, pos)[layer]
    np.testing.assert_allclose(np.abs(here.points), np.abs((u * s)[:, :3].numpy()), atol=1e-6)
    share = (s**2 / (s**2).sum())[:3].numpy()
    np.testing.assert_allclose(here.shares, share, atol=1e-8)
    assert ((here.points / here.unit) ** 2).sum(1).mean() == pytest.approx(1)


def test_harmful_prompts_lie_on_the_right_in_every_layer(found: Found):
    for here in pca_maps(found, -1)[1:]:
        assert here.harmful[:, 0].mean() > here.harmless[:, 0].mean()


def test_no_axis_would_let_the_prompts_move_less_with_its_other_sign(found: Found):
    for maps in (pca_maps(found, found.positions[0]), along_maps(found, found.positions[0], found.direction)):
        for before, here in pairwise(maps):
            moved, flipped = (((sign * here.points - before.points) ** 2).sum(0) for sign in (1, -1))
            assert (moved <= flipped)[1:].all(), here.layer


def test_a_turned_cloud_is_the_same_cloud_and_no_other_turn_lets_it_move_less(found: Found):
    maps = pca_maps(found, found.positions[0])
    still = turned(maps)
    for plain, here in zip(maps, still, strict=True):
        np.testing.assert_allclose(here.points[:, 0], plain.points[:, 0])
        np.testing.assert_allclose(distances(here.points), distances(plain.points), atol=1e-6)
        assert sum(here.shares) == pytest.approx(sum(plain.shares))
    angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    for before, here in pairwise(still):
        moved = ((here.points - before.points) ** 2).sum()
        for cos, sin in zip(np.cos(angles), np.sin(angles), strict=True):
            for turn in ([[cos, sin], [-sin, cos]], [[cos, sin], [sin, -cos]]):
                other = np.column_stack([here.points[:, 0], here.points[:, 1:] @ np.array(turn)])
                assert moved <= ((other - before.points) ** 2).sum() + 1e-6


def test_the_axes_along_a_direction_are_the_direction_and_the_largest_spread_at_right_angles(found: Found):
    source, unit = found.direction.source, found.direction.unit.double().numpy()
    maps = along_maps(found, source.position, found.direction)
    at = found.positions.index(source.position)
    for here in maps[1:]:
        assert here.axes is not None
        np.testing.assert_allclose(here.axes[0], unit)
        np.testing.assert_allclose(here.axes @ here.axes.T, np.eye(2), atol=1e-6)
        x = torch.cat([found.harmful[:, at, here.layer], found.harmless[:, at, here.layer]]).double()
        project = torch.eye(len(unit)).double() - torch.outer(*[found.direction.unit.double()] * 2)
        spread = torch.linalg.eigvalsh(project @ torch.cov(x.T, correction=0) @ project)[-1].item()
        assert here.points[:, 1].var() == pytest.approx(spread, rel=1e-6)
    drawn = maps[source.layer].harmful / maps[source.layer].unit, maps[source.layer].harmless / maps[source.layer].unit
    assert [points[:, 0].mean() for points in drawn] == pytest.approx([1, 0], abs=1e-5)
    assert not maps[0].points.any() and maps[0].axes is None


def test_the_first_component_is_the_difference_from_the_layer_on_after_which_no_cosine_is_low():
    def maps(*cosines: float) -> list[LayerMap]:
        none = np.zeros((1, 3))
        measured = [None, *(Separation(1.0, 1.0, 1.0, 1.0, cos) for cos in cosines)]
        return [LayerMap(layer, -1, none, none, separation=s) for layer, s in enumerate(measured)]

    assert first_component_is_difference(maps(0.99, 0.2, SAME, 1.0)) == 3
    assert first_component_is_difference(maps(0.99, 0.99)) == 1, "at layer 0 there is nothing to compare"
    assert first_component_is_difference(maps(0.99, SAME - 0.01)) is None


def test_layer_0_has_nothing_to_see_at_a_template_token(found: Found):
    assert pca_maps(found, -1)[0].separation is None
    before_template = found.positions[0]
    assert pca_maps(found, before_template)[0].separation is not None


def test_one_prompt_of_each_class_has_a_map_as_well(found: Found):
    few = replace(
        found, harmful=found.harmful[:1], harmless=found.harmless[:1], val_harmful=found.val_harmful[:1], val_harmless=found.val_harmless[:1]
    )  # fmt: skip
    for here in (*(maps := pca_maps(few, -1)), *turned(maps), *along_maps(few, -1, found.direction)):
        assert np.isfinite(here.points).all() and len(here.points) == 2
    last = maps[-1]
    assert last.separation is not None and last.separation.cos_pc1 == pytest.approx(1)
    assert last.points.shape[1] == 3 and not last.points[:, 2].any() and last.points[:, 0].any()


def test_umap_keeps_the_classes_together_and_is_the_same_twice(found: Found):
    source = found.direction.source
    first = umap_layout(found, source.position, source.layer)
    again = umap_layout(found, source.position, source.layer)
    assert [len(points) for points in first] == [len(found.harmful), len(found.harmless)]
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    points, labels = np.concatenate(first), np.repeat([1, 0], [len(part) for part in first])
    distances = ((points[:, None] - points[None]) ** 2).sum(-1) + np.diag(np.full(len(points), np.inf))
    nearest = labels[distances.argmin(1)]
    assert (nearest == labels).mean() > 0.9


def test_auroc_is_the_share_of_pairs_in_order(found: Found):
    source = found.direction.source
    here = pca_maps(found, source.position)[source.layer]
    pairs = (here.harmful[:, 0][:, None] > here.harmless[:, 0][None]).mean()
    assert here.separation is not None
    np.testing.assert_allclose(here.separation.auroc_pc1, pairs, atol=1e-9)


def test_a_prompt_of_the_map_lies_where_its_point_is(found: Found):
    pos = found.direction.source.position
    at = found.positions.index(pos)
    maps = pca_maps(found, pos)
    for here in (*maps, *turned(maps), *along_maps(found, pos, found.direction)):
        x = found.harmful[:, at, here.layer].double().numpy()
        np.testing.assert_allclose(here.coordinates(x), here.harmful, atol=1e-9)


def test_the_place_of_a_mean_is_0_or_1_and_its_rank_is_counted_among_the_prompts(found: Found):
    assert place(found, found.harmless.mean(0)).along == pytest.approx(0, abs=1e-5)
    assert place(found, found.harmful.mean(0)).along == pytest.approx(1, abs=1e-5)
    places = [place(found, x) for x in (*found.harmful, *found.harmless)]
    furthest, nearest = max(places, key=lambda p: p.along), min(places, key=lambda p: p.along)
    assert furthest.beyond_harmless == 1
    assert furthest.beyond_harmful >= 1 - 1 / len(found.harmful)
    middle = place(found, found.harmful.median(0).values)
    assert 0.2 < middle.beyond_harmful < 0.8 and middle.beyond_harmless == 1
    assert (nearest.beyond_harmless, nearest.beyond_harmful) == (0, 0)
