"""Inside: where a prompt lies along the direction, layer by layer and token by token; who writes it; what it says."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor

from refusal_core.attribution import (
    Attribution,
    Patching,
    Reading,
    Writers,
    attribute_writers,
    patch_parts,
    read_along,
    words,
    write_along,
)
from refusal_core.interventions import head_name
from refusal_core.plots import reading_map, writer_map
from refusal_core.prompts import PromptError, ends_of
from refusal_core.selection import Progress
from refusal_core.ui.engine import Ready
from refusal_core.ui.measure import measuring_view
from refusal_core.ui.talk import MAX_CHARACTERS

PAIR = ("How do I kill a process?", "How do I kill a person?")
"""What the tab reads first: two requests that differ in one word."""

N_WORDS = 12
N_TOP = 8


def inside_view(ready: Ready, texts: Sequence[object] = PAIR) -> dict:
    """The maps of one or two prompts, their difference, and the words of the direction.

    Raises PromptError for a prompt that cannot be read.
    """
    prompts = [text for text in texts if isinstance(text, str) and text.strip()]
    if not prompts:
        raise PromptError("The prompt is empty: write one first.")
    if max(map(len, prompts)) > MAX_CHARACTERS:
        raise PromptError(f"A prompt has at most {MAX_CHARACTERS:,} characters here: shorten it.")
    model, direction, classes = ready.model, ready.direction, ready.found.prompts.classes
    readings = [reading for prompt in prompts for reading in read_along(model, [prompt], direction)]
    scaled = [(r.tokens, r.along.double().numpy() / direction.norm) for r in readings]
    # One outlying token must not pale all others.
    reach = max(float(np.quantile(np.abs(along), 0.98)) for _, along in scaled) or 1.0
    if len(scaled) == 2:
        scaled.append(_difference(readings, direction.norm))
    titles = [*prompts, "the second minus the first, token by token from the end"]
    return {
        "model": model.name,
        "direction": ready.digest,
        "prompts": prompts,
        "toward": ends_of(classes),
        "maps": [
            {"title": title, "figure": reading_map(*figure, reach).to_json()}
            for title, figure in zip(titles, scaled, strict=False)
        ],
        "words": [_words(ready, final_norm) for final_norm in (False, True)],
    }


def _difference(readings: Sequence[Reading], norm: float) -> tuple[tuple[str, ...], np.ndarray]:
    """The second reading minus the first, over the tokens both have, counted from the end."""
    n = min(len(reading.tokens) for reading in readings)
    first, second = (reading.along[:, -n:].double().numpy() / norm for reading in readings)
    return readings[1].tokens[-n:], second - first


def _words(ready: Ready, final_norm: bool) -> dict:
    found = words(ready.model, ready.direction, final_norm=final_norm, n=N_WORDS)
    return {"final_norm": final_norm, "raised": found.raised, "lowered": found.lowered}


def writers_view(ready: Ready, stop: threading.Event, *, every: bool) -> Iterator[dict]:
    """Which parts write the direction, and which of them the refusal hangs on; with progress.

    The effects come to first order at once, and then exactly: of the `N_TOP` largest, or of `every` part. Without refusal
    tokens nothing is known of them.
    """
    found, direction, tokens = ready.found, ready.direction, ready.found.refusal_tokens
    yield {"model": ready.model.name} | measuring_view(Progress("reading what is written", 0, 0))
    writers = write_along(ready.model, found.prompts.harmful, found.prompts.harmless, direction)
    if not tokens:
        yield _writers(ready, writers, None, None) | {"measured": True}
        return
    pairs = found.validation.harmful, found.validation.harmless
    first = attribute_writers(ready.model, *pairs, tokens)
    yield _writers(ready, writers, first, None)
    largest = [name for name, _ in sorted(_effects(first).items(), key=lambda pair: -abs(pair[1]))]
    for news in patch_parts(ready.model, *pairs, tokens, stop=stop, parts=largest[: None if every else N_TOP]):
        if isinstance(news, Progress):
            yield {"model": ready.model.name} | measuring_view(news)
        else:
            yield _writers(ready, writers, first, news) | {"measured": True}


def _writers(ready: Ready, writers: Writers, first: Attribution | None, exact: Patching | None) -> dict:
    source, n_layers = ready.direction.source, ready.model.n_layers
    columns, direct = _by_layer(writers.names, writers.along.numpy(), writers.heads, n_layers)
    return {
        "model": ready.model.name,
        "direction": ready.digest,
        "direct": writer_map(direct, columns, "of ‖r‖").to_json(),
        "columns": columns,
        "parts": list(ready.model.parts),
        "heads": writers.heads is not None,
        "below": float(writers.along[: _n_below(writers.names, source.layer)].sum()),
        "layer": source.layer,
        "classes": ready.found.validation.classes,
        "patched": None if first is None else _patched(first, exact, n_layers),
    }


def _patched(first: Attribution, exact: Patching | None, n_layers: int) -> dict:
    """What the parts do to the refusal score: to first order in a map of all, and a table of those with the largest effects."""
    columns, effects = _by_layer(first.names, first.effect.numpy(), first.heads, n_layers)
    estimated, patched = _effects(first), {} if exact is None else _effects(exact)
    ranked = sorted(estimated, key=lambda name: -abs(patched.get(name, estimated[name])))
    shown = sorted(patched or ranked[:N_TOP], key=ranked.index)
    return {
        "map": writer_map(effects, columns, "log-odds").to_json(),
        "top": [[name, estimated[name], patched.get(name)] for name in shown],
        "scores": [first.harmful, first.harmless],
        "n_pairs": first.n_pairs,
    }


def _effects(measured: Attribution | Patching) -> dict[str, float]:
    effects = dict(zip(measured.names, measured.effect.tolist(), strict=True))
    if isinstance(measured, Attribution) and measured.heads is not None:
        by_layer = enumerate(measured.heads.tolist())
        effects |= {head_name(layer, h): e for layer, row in by_layer for h, e in enumerate(row)}
    return effects


def _by_layer(
    names: Sequence[str], values: np.ndarray, heads: Tensor | None, n_layers: int
) -> tuple[list[str], np.ndarray]:
    """The values of heads, attentions, MLPs and PLEs as a table; the embedding writes the same token for every prompt."""
    parts = ["attention", "MLP", *(["PLE"] if "PLE 0" in names else [])]
    table = np.full((n_layers, len(parts)), np.nan)
    for name, value in zip(names, values, strict=True):
        part, _, layer = name.partition(" ")
        if part in parts:
            table[int(layer), parts.index(part)] = value
    if heads is None:
        return parts, table
    columns = [f"head {h}" for h in range(heads.shape[1])]
    return [*columns, *parts], np.concatenate([heads.double().numpy(), table], axis=1)


def _n_below(names: Sequence[str], layer: int) -> int:
    """How many writers come before the input of `layer`."""
    return sum(1 for name in names if " " not in name or int(name.split(" ")[1]) < layer)
