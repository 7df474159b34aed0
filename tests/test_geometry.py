"""What the map promises: the components are PCA's, the signs hold still, and the numbers are those of the points."""

import numpy as np
import torch

from refusal_core.geometry import pca_maps
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


def test_auroc_is_the_share_of_pairs_in_order(found: Found):
    source = found.direction.source
    here = pca_maps(found, source.position)[source.layer]
    pairs = (here.harmful[:, 0][:, None] > here.harmless[:, 0][None]).mean()
    assert here.separation is not None
    np.testing.assert_allclose(here.separation.auroc_pc1, pairs, atol=1e-9)
