"""How harmful and harmless prompts lie in the residual stream, layer by layer.

    PCA of harmful ∪ harmless at one position    coordinates, explained variance, |cos(PC1, r̂)|
    AUROC, d′ of the projection x·r̂             r̂ fit on the training prompts, measured on the validation prompts

The paper's claims to look for: PC1 alone separates the classes, and from some layer on PC1 *is* the mean
difference. Signs are free in a PCA, so PC1 points along r̂ and every later axis along the previous layer's:
otherwise the cloud flips from layer to layer.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, silhouette_score

from refusal_core.directions import ZERO_NORM, Direction
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
    center: Float[np.ndarray, " d_model"] | None = None
    axes: Float[np.ndarray, "axis d_model"] | None = None

    def coordinates(self, x: Float[np.ndarray, "... d_model"]) -> Float[np.ndarray, "... axis"]:
        """Where other activations of this layer and position lie; at the origin where there is nothing to see."""
        if self.axes is None or self.center is None:
            return np.zeros((*x.shape[:-1], N_AXES))
        return (x - self.center) @ self.axes.T


@dataclass(frozen=True)
class Place:
    """Where a prompt lies along the direction, at the layer and position it was read from.

    `along` is 0 at the mean of the harmless training prompts and 1 at that of the harmful ones; `beyond_harmless` and
    `beyond_harmful` are the shares of those prompts that lie less far toward refusing.
    """

    along: float
    beyond_harmless: float
    beyond_harmful: float


def place(
    found: Found, activations: Float[torch.Tensor, "pos layer d_model"], direction: Direction | None = None
) -> Place:
    """The place of a prompt along `direction` (by default the found one), from its `resid_pre` at `found.positions`."""
    direction = direction or found.direction
    at, layer = found.positions.index(direction.source.position), direction.source.layer
    unit = direction.unit.double()
    harmful, harmless, here = (
        x[..., at, layer, :].double().cpu() @ unit for x in (found.harmful, found.harmless, activations)
    )
    low, high = harmless.mean(), harmful.mean()
    beyond = [float((here > x).double().mean()) for x in (harmless, harmful)]
    return Place(float((here - low) / (high - low)), *beyond)


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
        separation = _separation(points, val, axes[0] @ unit, pca)
        maps.append(LayerMap(layer, pos, points[0], points[1], separation, np.asarray(pca.mean_), axes))
    return tuple(maps)


def umap_layout(
    found: Found, pos: int, layer: int, seed: int = 0
) -> tuple[Float[np.ndarray, "harmful axis"], Float[np.ndarray, "harmless axis"]]:
    """The training prompts of one layer and position in two dimensions by UMAP: exploratory.

    It keeps neighbours together; its distances, its axes and the gaps between its clusters mean nothing.
    """
    from umap import UMAP  # takes seconds to import, and most visitors never ask for it

    at = found.positions.index(pos)
    both = torch.cat([found.harmful[:, at, layer], found.harmless[:, at, layer]]).double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed costs parallelism, and that few prompts have few neighbours
        points = np.asarray(UMAP(n_neighbors=min(15, len(both) - 1), random_state=seed).fit_transform(both), float)
    points -= points.mean(0)
    return points[: len(found.harmful)], points[len(found.harmful) :]


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
