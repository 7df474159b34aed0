"""Inside: where a prompt lies along the direction, layer by layer and token by token; who writes it; what it says."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from refusal_core.attribution import Patching, Reading, Writers, patch_writers, read_along, words, write_along
from refusal_core.plots import reading_map, writer_map
from refusal_core.prompts import PromptError
from refusal_core.selection import Progress
from refusal_core.ui.engine import Ready
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
    model, direction = ready.model, ready.direction
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


def writers_view(ready: Ready, stop: threading.Event) -> Iterator[dict]:
    """Which parts write the direction, and which of them the refusal hangs on; with progress."""
    found, direction = ready.found, ready.direction
    yield {"model": ready.model.name, "measuring": ["reading what is written", 0, 1]}
    writers = write_along(ready.model, found.prompts.harmful, found.prompts.harmless, direction)
    validation = found.validation
    for news in patch_writers(ready.model, validation.harmful, validation.harmless, found.refusal_tokens, stop=stop):
        if isinstance(news, Progress):
            yield {"model": ready.model.name, "measuring": [news.stage, news.done, news.total]}
        else:
            yield _writers(ready, writers, news)


def _writers(ready: Ready, writers: Writers, patching: Patching) -> dict:
    source, n_layers = ready.direction.source, ready.model.n_layers
    columns, direct = _by_layer(writers.names, writers.along.numpy(), n_layers)
    if writers.heads is not None:
        columns = [*(f"head {h}" for h in range(writers.heads.shape[1])), *columns]
        direct = np.concatenate([writers.heads.double().numpy(), direct], axis=1)
    effects = _by_layer(patching.names, patching.effect.numpy(), n_layers)[1]
    ranked = sorted(zip(patching.names, patching.effect.tolist(), strict=True), key=lambda pair: -abs(pair[1]))
    return {
        "model": ready.model.name,
        "direction": ready.digest,
        "direct": writer_map(direct, columns, "of ‖r‖").to_json(),
        "patched": writer_map(effects, ["attention", "MLP"], "log-odds").to_json(),
        "heads": writers.heads is not None,
        "below": float(writers.along[: _n_below(writers.names, source.layer)].sum()),
        "layer": source.layer,
        "top": ranked[:N_TOP],
        "scores": [patching.harmful, patching.harmless],
        "n_pairs": patching.n_pairs,
    }


def _by_layer(names: Sequence[str], values: np.ndarray, n_layers: int) -> tuple[list[str], np.ndarray]:
    """The values of attentions and MLPs as a table; the embedding writes the same token for every prompt."""
    parts = ["attention", "MLP"]
    table = np.full((n_layers, len(parts)), np.nan)
    for name, value in zip(names, values, strict=True):
        part, _, layer = name.partition(" ")
        if part in parts:
            table[int(layer), parts.index(part)] = value
    return parts, table


def _n_below(names: Sequence[str], layer: int) -> int:
    """How many writers come before the input of `layer`."""
    return sum(1 for name in names if " " not in name or int(name.split(" ")[1]) < layer)
