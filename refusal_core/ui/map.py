"""Map: where harmful and harmless prompts lie in the residual stream, and how well each layer tells them apart."""

from refusal_core.plots import prompt_map, separation_by_layer, umap_map
from refusal_core.prompts import PromptError
from refusal_core.ui.engine import Engine, Ready


def map_view(engine: Engine, ready: Ready, wanted: object = None) -> dict:
    """Both figures at position `wanted` (by default the direction's), every layer in them.

    The page moves through the layers by itself. Raises PromptError for a position that was not read.
    """
    found, model = ready.found, ready.model
    source = ready.direction.source
    pos = _position(ready, source.position if wanted is None else wanted)
    maps = engine.maps(ready, pos)
    layer = source.layer
    return {
        "model": model.name,
        "position": pos,
        "positions": [
            {"position": p, "token": model.template_tokens[p] if -p <= len(model.template_tokens) else ""}
            for p in found.positions
        ],
        "layer": layer,
        "chosen": {"layer": source.layer, "position": source.position},
        "map": prompt_map(maps, found.prompts, layer).to_json(),
        "separation": separation_by_layer(maps, layer).to_json(),
        "texts": {"harmful": list(found.prompts.harmful), "harmless": list(found.prompts.harmless)},
        "layers": [
            {
                "explained": list(m.separation.explained[:2]),
                "auroc_pc1": m.separation.auroc_pc1,
                "auroc": m.separation.auroc,
                "d_prime": m.separation.d_prime,
                "cos": abs(m.separation.cos_pc1),
            }
            if m.separation
            else None
            for m in maps
        ],
    }


def umap_view(engine: Engine, ready: Ready, wanted: object, layer: object) -> dict:
    """The same prompts at one layer as UMAP lays them out. Raises PromptError for what was not read."""
    pos = _position(ready, wanted)
    if type(layer) is not int or not 0 <= layer < ready.model.n_layers:
        raise PromptError(f"There is no layer {str(layer)[:20]!r}: take one from 0 to {ready.model.n_layers - 1}.")
    figure = umap_map(*engine.umap(ready, pos, layer), ready.found.prompts)
    return {"umap": figure.to_json(), "model": ready.model.name, "position": pos, "layer": layer}


def _position(ready: Ready, wanted: object) -> int:
    positions = ready.found.positions
    pos = next((p for p in positions if p == wanted), None)
    if pos is None:
        raise PromptError(f"There is no position {str(wanted)[:20]!r}: take one from {positions[0]} to -1.")
    return pos
