"""What the map promises: the components are PCA's, the signs hold still, and the numbers are those of the points."""

import numpy as np
import pytest
import torch

from refusal_core.geometry import pca_maps, place, umap_layout
from refusal_core.selection import Found


def test_the_points_are_the_principal_components_up_to_sign(found: Found):
    pos, layer = found.direction.source.position, found.direction.source.layer
    at = found.positions.index(pos)
    x = torch.cat([found.harmful[:, at, layer], found.harmless[:, at, layer]]).double()
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    here = pca_maps(found, pos)[layer]
    points = np.concatenate([here.harmful, here.harmless])
    np.testing.assert_allclose(np.abs(points), np.abs((u * s)[:, :3].numpy()), atol=1e-6)
    assert here.separation is not None
    share = (s**2 / (s**2).sum())[:3].numpy()
    np.testing.assert_allclose(here.separation.explained, share, atol=1e-8)


def test_harmful_prompts_lie_on_the_right_in_every_layer(found: Found):
    for here in pca_maps(found, -1)[1:]:
        assert here.harmful[:, 0].mean() > here.harmless[:, 0].mean()


def test_layer_0_has_nothing_to_see_at_a_template_token(found: Found):
    assert pca_maps(found, -1)[0].separation is None
    before_template = found.positions[0]
    assert pca_maps(found, before_template)[0].separation is not None


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
    for here in pca_maps(found, pos):
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
