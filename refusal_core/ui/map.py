"""Map: where the prompts of two classes lie in the residual stream, and how well each layer tells them apart."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from refusal_core.geometry import LayerMap, first_component_is_difference
from refusal_core.plots import TITLES, packed, points_of, prompt_map, separation_by_layer, umap_map
from refusal_core.prompts import PromptError, ends_of
from refusal_core.selection import Progress
from refusal_core.ui.engine import Engine, Ready


def map_view(engine: Engine, ready: Ready, position: object = None, axes: object = "pca") -> dict:
    """The prompts at `position` (by default the direction's) on `axes`, in every layer, and the numbers of each.

    The page moves through the layers by itself. Raises PromptError for a position that was not read, or other axes.
    """
    found, model = ready.found, ready.model
    source = ready.direction.source
    pos = _position(ready, source.position if position is None else position)
    if not isinstance(axes, str) or axes not in TITLES:
        raise PromptError(f"There are no axes {str(axes)[:20]!r}: take one of {', '.join(TITLES)}.")
    maps, components = engine.maps(ready, pos, axes), engine.maps(ready, pos)
    return {
        "model": model.name,
        "found": found.digest,
        "direction": ready.digest,
        "axes": axes,
        "position": pos,
        "positions": [
            {"position": p, "token": model.template_tokens[p] if -p <= len(model.template_tokens) else ""}
            for p in found.positions
        ],
        "chosen": {"layer": source.layer, "position": source.position},
        "map": prompt_map(maps, axes, ends_of(found.prompts.classes)[0]).to_json(),
        "points": points_of(maps, axes),
        "separation": separation_by_layer(components, source.layer).to_json(),
        "claim": _claim(components),
        "classes": {"harmful": found.prompts.classes[0], "harmless": found.prompts.classes[1]},
        "prompts": {
            "harmful": _with_categories(found.prompts.harmful, found.prompts.harmful_categories),
            "harmless": _with_categories(found.prompts.harmless, found.prompts.harmless_categories),
        },
        "layers": [_numbers(here, on_axes) for here, on_axes in zip(components, maps, strict=True)],
    }


def umap_view(engine: Engine, ready: Ready, position: object, layer: object, stop: threading.Event) -> Iterator[dict]:
    """The same prompts at one layer as UMAP lays them out, after what is being done until then.

    Raises PromptError for what was not read.
    """
    pos = _position(ready, position)
    if type(layer) is not int or not 0 <= layer < ready.model.n_layers:
        raise PromptError(f"There is no layer {str(layer)[:20]!r}: take one from 0 to {ready.model.n_layers - 1}.")
    about = {"model": ready.model.name, "found": ready.found.digest, "position": pos, "layer": layer}
    for news in engine.umap(ready, pos, layer, stop):
        if isinstance(news, Progress):
            yield about | {"doing": news.stage}
        else:
            harmful, harmless = news
            points = packed({"harmful": harmful[None], "harmless": harmless[None]})
            yield about | {"umap": umap_map(harmful, harmless).to_json(), "points": points}


def _numbers(here: LayerMap, on_axes: LayerMap) -> dict | None:
    """What is measured at a layer; None where there is nothing to see."""
    measured = here.separation
    if measured is None:
        return None
    return {
        "shares": [round(share, 4) for share in on_axes.shares],
        "auroc_pc1": round(measured.auroc_pc1, 4),
        "auroc": round(measured.auroc, 4),
        "d_prime": None if np.isnan(measured.d_prime) else round(measured.d_prime, 3),
        "cos": round(measured.cos_pc1, 4),
        "silhouette": None if np.isnan(measured.silhouette) else round(measured.silhouette, 3),
    }


def _claim(maps: Sequence[LayerMap]) -> str:
    """Whether the first component is the mean difference, and from which layer on, as the numbers have it."""
    cosines = {m.layer: m.separation.cos_pc1 for m in maps if m.separation}
    since = first_component_is_difference(maps)
    if since is None:
        highest = max(cosines, key=lambda layer: cosines[layer])
        return (
            "At this position the first component is not the mean difference of the classes up to the last layer: "
            f"|cos| is {cosines[max(cosines)]:.2f} there, and at most {cosines[highest]:.2f} (layer {highest})."
        )
    least = min(cosine for layer, cosine in cosines.items() if layer >= since)
    return (
        f"From layer {since} on the first component is the mean difference of the classes: |cos| is at least "
        f"{least:.3f} there."
    )


def _with_categories(texts: Sequence[str], categories: Sequence[str]) -> list[list[str]]:
    return [list(pair) for pair in zip(texts, categories or [""] * len(texts), strict=True)]


def _position(ready: Ready, wanted: object) -> int:
    positions = ready.found.positions
    pos = next((p for p in positions if p == wanted), None)
    if pos is None:
        raise PromptError(f"There is no position {str(wanted)[:20]!r}: take one from {positions[0]} to -1.")
    return pos
