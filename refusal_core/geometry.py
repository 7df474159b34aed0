"""How harmful and harmless prompts lie in the residual stream, layer by layer.

    PCA of harmful ∪ harmless at one position    coordinates, explained variance, |cos(PC1, r̂)|
    (x − μ)·r̂ / ‖r‖ and q·(x − μ) / ‖r‖         along a direction r, and along q, the PC1 of x − (x·r̂) r̂
    AUROC, d′ of the projection x·r̂             r̂ fit on the training prompts, measured on the validation prompts

The paper's claims to look for: PC1 alone separates the classes, and from some layer on PC1 *is* the mean
difference. Signs are free in a PCA: PC1 points along r̂, and every other axis so that the prompts move least from
the layer before; otherwise the cloud flips from layer to layer.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float

from refusal_core.directions import ZERO_NORM, Direction
from refusal_core.metrics import auroc, d_prime
from refusal_core.selection import Found

N_AXES = 3
SAME = 0.9
"""|cos| from which on two directions count as one."""


@dataclass(frozen=True)
class Separation:
    """How well one layer and position tells harmful from harmless.

    `auroc` and `d_prime` are of the projection on the mean difference, of validation prompts; `auroc_pc1` is of the
    training prompts on the first component, which never saw a label; `cos_pc1` is that component's |cos| with the mean
    difference; `silhouette` is of the components in the map.
    """

    auroc: float
    auroc_pc1: float
    d_prime: float
    silhouette: float
    cos_pc1: float


@dataclass(frozen=True, eq=False)
class LayerMap:
    """The prompts of one layer and position on a few axes at right angles: (x − center) · axes.

    `shares` are the axes' shares of the variance. `unit` is the length that is drawn as 1: of components the
    root-mean-square distance of the prompts from their centre, of a direction its norm. `center` and `axes` are None
    where there is nothing to see: at layer 0 a template token is the same in every prompt. `separation` comes with
    the principal components.
    """

    layer: int
    pos: int
    harmful: Float[np.ndarray, "harmful axis"]
    harmless: Float[np.ndarray, "harmless axis"]
    unit: float = 1.0
    shares: tuple[float, ...] = ()
    separation: Separation | None = None
    center: Float[np.ndarray, " d_model"] | None = None
    axes: Float[np.ndarray, "axis d_model"] | None = None

    def coordinates(self, x: Float[np.ndarray, "... d_model"]) -> Float[np.ndarray, "... axis"]:
        """Where other activations of this layer and position lie; at the origin where there is nothing to see."""
        if self.axes is None or self.center is None:
            return np.zeros((*x.shape[:-1], self.harmful.shape[-1]))
        return (x - self.center) @ self.axes.T

    @property
    def points(self) -> Float[np.ndarray, "prompt axis"]:
        """The prompts of both classes, the harmful ones first."""
        return np.concatenate([self.harmful, self.harmless])


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
    """One `LayerMap` per layer in three principal components, of the training prompts at position `pos`."""
    maps: list[LayerMap] = []
    for layer, harmful, harmless in _layers(found, pos):
        r = harmful.mean(0) - harmless.mean(0)
        if np.linalg.norm(r) < ZERO_NORM:
            maps.append(_flat(layer, pos, len(harmful), len(harmless), N_AXES))
            continue
        unit = r / np.linalg.norm(r)
        mean, axes = _principal(np.concatenate([harmful, harmless]), N_AXES)
        here = _map(layer, pos, harmful, harmless, mean, axes)
        signs = _still_signs(here, maps)
        signs[0] = 1.0 if axes[0] @ unit >= 0 else -1.0
        here = _on_axes(here, np.diag(signs))
        at = found.positions.index(pos)
        val = [x[:, at, layer].double().numpy() @ unit for x in (found.val_harmful, found.val_harmless)]
        size = float(np.sqrt((here.points**2).sum(1).mean()))
        maps.append(replace(here, unit=size, separation=_separation(here, val, abs(axes[0] @ unit))))
    return tuple(maps)


def turned(maps: Sequence[LayerMap]) -> tuple[LayerMap, ...]:
    """The same maps with the second and third component turned in their plane so that the prompts move least.

    Components of about the same variance change places between layers: in three dimensions the cloud, which is the
    same, would jump by a quarter turn.
    """
    still: list[LayerMap] = []
    for here in maps:
        turn = np.eye(here.points.shape[1])
        if here.axes is not None and still and still[-1].axes is not None:
            # The orthogonal map that brings the points nearest to those of the layer before (Procrustes).
            u, _, vt = np.linalg.svd(here.points[:, 1:].T @ still[-1].points[:, 1:])
            turn[1:, 1:] = (u @ vt).T
        still.append(_on_axes(here, turn))
    return tuple(still)


def along_maps(found: Found, pos: int, direction: Direction) -> tuple[LayerMap, ...]:
    """One `LayerMap` per layer, of the training prompts at position `pos`: along `direction`, and at right angles to it.

    The first axis is r̂, the second the first principal component of what is orthogonal to it. Drawn in ‖r‖ and from
    the mean of the harmless prompts, so that where the direction was read the harmful ones have theirs at 1.
    """
    unit = direction.unit.double().numpy()
    maps: list[LayerMap] = []
    for layer, harmful, harmless in _layers(found, pos):
        both = np.concatenate([harmful, harmless])
        if np.ptp(both, axis=0).max() < ZERO_NORM:
            maps.append(_flat(layer, pos, len(harmful), len(harmless), 2))
            continue
        _, spread = _principal(both - np.outer(both @ unit, unit), 1)
        axes = np.concatenate([unit[None], spread])
        here = _map(layer, pos, harmful, harmless, harmless.mean(0), axes)
        signs = _still_signs(here, maps)
        signs[0] = 1.0
        maps.append(replace(_on_axes(here, np.diag(signs)), unit=direction.norm))
    return tuple(maps)


def first_component_is_difference(maps: Sequence[LayerMap]) -> int | None:
    """The layer from which on |cos(PC1, mean difference)| stays at `SAME` or more; None if it does not at the last."""
    cosines = [m.separation.cos_pc1 if m.separation else 0.0 for m in maps]
    return next((layer for layer in range(len(cosines)) if min(cosines[layer:]) >= SAME), None)


def umap_is_loaded() -> bool:
    """Whether UMAP has been imported here: the first layout takes half a minute for that and for compiling it."""
    return "umap" in sys.modules


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


def _layers(found: Found, pos: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Every layer with the harmful and the harmless training prompts' `resid_pre` there, in float64."""
    at = found.positions.index(pos)
    for layer in range(found.harmful.shape[2]):
        yield layer, found.harmful[:, at, layer].double().numpy(), found.harmless[:, at, layer].double().numpy()


def _flat(layer: int, pos: int, n_harmful: int, n_harmless: int, n_axes: int) -> LayerMap:
    return LayerMap(layer, pos, np.zeros((n_harmful, n_axes)), np.zeros((n_harmless, n_axes)), shares=(0.0,) * n_axes)


def _map(
    layer: int, pos: int, harmful: np.ndarray, harmless: np.ndarray, center: np.ndarray, axes: np.ndarray
) -> LayerMap:
    points = [(x - center) @ axes.T for x in (harmful, harmless)]
    total = np.concatenate([harmful, harmless]).var(0).sum()
    shares = np.concatenate(points).var(0) / total
    return LayerMap(layer, pos, points[0], points[1], shares=tuple(shares.tolist()), center=center, axes=axes)


def _still_signs(here: LayerMap, before: Sequence[LayerMap]) -> Float[np.ndarray, " axis"]:
    """The signs of the axes with which the prompts move least from the layer before: Σ|s x − y|² is least for s x·y ≥ 0."""
    if not before:
        return np.ones(here.points.shape[1])
    return np.where((here.points * before[-1].points).sum(0) < 0, -1.0, 1.0)


def _on_axes(here: LayerMap, turn: Float[np.ndarray, "axis axis"]) -> LayerMap:
    """The same points on other axes of the same space, the rows of `turn` in the old ones."""
    if here.axes is None:
        return here
    shares = here.points @ turn.T
    shares = shares.var(0) / here.points.var(0).sum() * sum(here.shares)
    return replace(
        here,
        harmful=here.harmful @ turn.T,
        harmless=here.harmless @ turn.T,
        axes=turn @ here.axes,
        shares=tuple(shares.tolist()),
    )


def _principal(
    points: Float[np.ndarray, "point d_model"], n: int
) -> tuple[Float[np.ndarray, " d_model"], Float[np.ndarray, "axis d_model"]]:
    """The mean, and the first `n` principal components; those that so few points do not have are zero."""
    from sklearn.decomposition import PCA  # not before there is something to draw: the page is up sooner without

    pca = PCA(min(n, *points.shape), svd_solver="full").fit(points)
    components = np.asarray(pca.components_)
    return np.asarray(pca.mean_), np.pad(components, ((0, n - len(components)), (0, 0)))


def _separation(here: LayerMap, val: Sequence[np.ndarray], cos_pc1: float) -> Separation:
    from sklearn.metrics import silhouette_score

    labels = np.repeat([1, 0], [len(here.harmful), len(here.harmless)])
    held_out = [torch.from_numpy(along) for along in val]
    return Separation(
        auroc=auroc(*held_out),
        auroc_pc1=auroc(torch.from_numpy(here.harmful[:, 0]), torch.from_numpy(here.harmless[:, 0])),
        d_prime=d_prime(*held_out),
        silhouette=float(silhouette_score(here.points, labels)) if len(labels) - 1 > 1 else float("nan"),
        cos_pc1=float(cos_pc1),
    )
