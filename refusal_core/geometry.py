"""How harmful and harmless prompts lie in the residual stream, layer by layer.

    PCA of harmful ∪ harmless at one position    coordinates, explained variance, |cos(PC1, r̂)|
    AUROC, d′ of the projection x·r̂             r̂ fit on the training prompts, measured on the validation prompts

The paper's claims to look for: PC1 alone separates the classes, and from some layer on PC1 *is* the mean
difference. Signs are free in a PCA, so PC1 points along r̂ and every later axis along the previous layer's:
otherwise the cloud flips from layer to layer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, silhouette_score

from refusal_core.directions import ZERO_NORM
from refusal_core.selection import Found

N_AXES = 3


@dataclass(frozen=True)
class Separation:
    """How well one layer and position tells harmful from harmless.

    `auroc` and `d_prime` are of the projection on the direction, of validation prompts; `auroc_pc1` is of the
    training prompts on the first component, which never saw a label; `explained` are shares of variance.
    """

    auroc: float
    auroc_pc1: float
    d_prime: float
    silhouette: float
    cos_pc1: float
    explained: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class LayerMap:
    """The prompts of one layer in its first three principal components.

    `separation` is None where there is nothing to see: at layer 0 a template token is the same in every prompt.
    """

    layer: int
    pos: int
    harmful: Float[np.ndarray, "harmful axis"]
    harmless: Float[np.ndarray, "harmless axis"]
    separation: Separation | None


def pca_maps(found: Found, pos: int) -> tuple[LayerMap, ...]:
    """One `LayerMap` per layer, of the training prompts at position `pos` (−(P+1) … −1)."""
    maps: list[LayerMap] = []
    previous: np.ndarray | None = None
    for layer in range(found.harmful.shape[2]):
        at = found.positions.index(pos)
        harmful, harmless = found.harmful[:, at, layer], found.harmless[:, at, layer]
        r = harmful.double().mean(0) - harmless.double().mean(0)
        if r.norm() < ZERO_NORM:
            flat = (np.zeros((len(harmful), N_AXES)), np.zeros((len(harmless), N_AXES)))
            maps.append(LayerMap(layer, pos, *flat, None))
            continue
        unit = (r / r.norm()).numpy()
        pca = PCA(N_AXES, svd_solver="full").fit(torch.cat([harmful, harmless]).double().numpy())
        axes = _align(np.asarray(pca.components_), unit, previous)
        previous = axes
        points = [(x.double().numpy() - pca.mean_) @ axes.T for x in (harmful, harmless)]
        val = [x[:, at, layer].double().numpy() @ unit for x in (found.val_harmful, found.val_harmless)]
        maps.append(LayerMap(layer, pos, points[0], points[1], _separation(points, val, axes[0] @ unit, pca)))
    return tuple(maps)


def _align(axes: np.ndarray, unit: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """The same axes with the signs that keep the picture still: PC1 along r̂, the others along the last layer's."""
    reference = axes.copy() if previous is None else previous.copy()
    reference[0] = unit
    return axes * np.where((axes * reference).sum(1, keepdims=True) < 0, -1.0, 1.0)


def _separation(points: list[np.ndarray], val: list[np.ndarray], cos_pc1: float, pca: PCA) -> Separation:
    labels = np.repeat([1, 0], [len(points[0]), len(points[1])])
    spread = np.sqrt((val[0].var(ddof=1) + val[1].var(ddof=1)) / 2) if min(map(len, val)) > 1 else np.nan
    return Separation(
        auroc=_auroc(*val),
        auroc_pc1=_auroc(points[0][:, 0], points[1][:, 0]),
        d_prime=float((val[0].mean() - val[1].mean()) / spread),
        silhouette=float(silhouette_score(np.concatenate(points), labels)) if len(labels) - 1 > 1 else float("nan"),
        cos_pc1=float(cos_pc1),
        explained=tuple(pca.explained_variance_ratio_.tolist()),
    )


def _auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    return float(roc_auc_score(labels, np.concatenate([positive, negative])))
