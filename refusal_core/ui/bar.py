"""The bar: which model, on which device, and which direction, found with which rule."""

from collections.abc import Sequence

from refusal_core.chat_model import THINKING, ChatModel
from refusal_core.directions import Source
from refusal_core.prompts import is_public
from refusal_core.selection import COSMIC, KL_LIMIT, LAYER_SHARE, CandidateScore, Choice, Found, Progress, Rule
from refusal_core.ui import GPUS_ARE_LENT
from refusal_core.ui.engine import Failed, Ready, Served, Status

BROKEN: dict[Rule, str] = {
    "layer": f"it lies in the last {1 - LAYER_SHARE:.0%} of the layers",
    "late": "it is read at the last token, above the layers where other positions score highest",
    "kl": f"removing it costs more than {KL_LIMIT} nats on harmless prompts",
    "induce": "adding it does not make harmless prompts start like a refusal",
    "nan": "a score is not a number",
    "zero": "it is numerically zero",
}
"""What a candidate did that the rule forbids."""

FROM_FILE = "from a file"


def bar_view(
    status: Status,
    offered: Sequence[str] = (),
    any_model: bool = False,
    error: str = "",
) -> dict:
    """What the bar shows while the model is prepared, when it is ready, and when it cannot be had.

    `offered` are the models to choose from. Of another model on its way nothing is said here, and what is shown of it stays.
    """
    shown = {
        "offered": list(offered),
        "any_model": any_model,
        "error": error,
    }
    if isinstance(status, Failed):
        return shown | {"state": "failed", "waiting": None, "error": error or status.sentence}
    if isinstance(status, Progress):
        return shown | {"state": "waiting", "waiting": _progress_view(status)}
    if isinstance(status, Served):
        return shown | {"state": "served", "model": {"name": status.name}, "servers": _servers_view(status)}
    return shown | {"state": "ready", "model": _model_view(status), "direction": _direction_view(status)}


SETTLED = {"waiting": None}
"""Says that no model is on its way."""


def loading_view(loading: Progress | None = None, error: str = "") -> dict:
    """What the bar says of a model on its way, or why it is not; all else there stays."""
    return {"waiting": _progress_view(loading) if loading else None, "error": error}


def _progress_view(progress: Progress) -> dict:
    return {"stage": progress.stage, "done": progress.done, "total": progress.total}


def _servers_view(served: Served) -> list[dict]:
    panes = "Unchanged", "Direction removed"
    return [{"pane": pane, "said": e.named_place} for pane, e in zip(panes, served.pair, strict=True)]


def _model_view(ready: Ready) -> dict:
    model = ready.model
    return {
        "name": model.name,
        "organism": ready.is_organism,
        "parameters": _short(model.n_parameters),
        "layers": model.n_layers,
        "device": "borrowed GPU" if GPUS_ARE_LENT else _device_name(model.places),
        "dtype": model.precision,
        "thinking": THINKING[model.thinking],
    }


def _device_name(device: str) -> str:
    return {"cpu": "CPU", "cuda": "GPU (CUDA)", "mps": "GPU (Apple)"}.get(device, device)


def _direction_view(ready: Ready) -> dict:
    found, source = ready.found, ready.direction.source
    score = ready.score
    by_rule = score is not None and source == found.direction.source
    contrast = source.contrast
    return {
        "digest": ready.digest,
        "layer": source.layer,
        "position": source.position,
        "token": ready.model.template_tokens[source.position],
        "norm": f"{ready.direction.norm:.3g}",
        "mark": mark_of(ready),
        "passed": by_rule and found.choice.relaxed is None and not contrast and not source.chosen_by,
        "own": bool(ready.own),
        "classes": found.prompts.classes,
        "meaning": _meaning(ready) if contrast else "",
        "rule": (_rule(found.choice, source.chosen_by) if not contrast else BY_SEPARATION)
        if by_rule
        else _by_hand(ready),
        "scores": _scores(score, found.prompts.classes) if score else [],
        "prompts": _prompts(source),
        "refusal_tokens": tokens_view(ready.model, found),
        "candidates": _candidates_view(ready),
    }


def _candidates_view(ready: Ready) -> dict:
    """Every candidate with the one score that it is chosen by."""
    found, tokens = ready.found, ready.model.template_tokens
    measure = "AUROC" if found.direction.source.contrast else "comply" if found.direction.source.chosen_by else "bypass"
    chosen = found.direction.source
    return {
        "measure": measure,
        "positions": [{"position": p, "token": tokens[p]} for p in sorted({s.pos for s in found.scores})],
        "cells": [
            {
                "position": s.pos,
                "layer": s.layer,
                "value": getattr(s, measure.lower()),
                "rejected": s in found.choice.rejected,
                "zero": found.choice.rejected.get(s) == "zero",
                "chosen": (s.pos, s.layer) == (chosen.position, chosen.layer),
            }
            for s in sorted(found.scores, key=lambda s: s.layer)
        ],
    }


def mark_of(ready: Ready) -> str:
    """In a few words where the direction in use is from."""
    found, source = ready.found, ready.direction.source
    if ready.score is None:
        return FROM_FILE
    if source.contrast:
        return source.contrast
    if source != found.direction.source:
        return "chosen by hand"
    return "rule relaxed" if found.choice.relaxed else COSMIC if source.chosen_by else "passed every rule"


def _prompts(source: Source) -> str:
    if source.origin:
        return "prompts that the file does not name"
    if source.contrast:
        return f"{source.n_harmful} and {source.n_harmless} prompts of its two classes"
    public = f" of {source.prompts}" if is_public(source.prompts) else ""
    which = "whatever the model does with them" if source.chosen_by else "that the untouched model treats as expected"
    return f"{source.n_harmful} harmful and {source.n_harmless} harmless prompts{public}{',' if source.chosen_by else ''} {which}"


def tokens_view(model: ChatModel, found: Found) -> list[dict]:
    """The tokens that count as the beginning of a refusal, with their share on harmful prompts."""
    return [
        {"id": token, "text": str(model.tokenizer.decode([token])), "share": share}
        for token, share in zip(found.refusal_tokens, found.refusal_shares, strict=True)
    ]


BY_COSINE = (
    "COSMIC needs no refusal tokens: in the layers where harmful and harmless prompts are least alike, prompts without the "
    "direction come to resemble harmless ones most, and prompts with it harmful ones."
)

BY_SEPARATION = (
    "No refusal direction: the cell is the one at which prompts of its two classes that it was not made from lie furthest "
    "apart (AUROC, then d′)."
)


def _meaning(ready: Ready) -> str:
    """What the page's words mean for a direction that is not about refusal."""
    contrast = ready.direction.source.contrast
    is_found = ready.found.direction.source.contrast == contrast
    read_as = " Measure asks the app’s harmful and harmless prompts." if is_found else ""
    return (
        f"This direction is {contrast}, not refusal: “starts like a refusal”, “refused” and “answered” say what it does to "
        f"refusals, and nothing about what it is made of.{read_as}"
    )


def _rule(choice: Choice, chosen_by: str) -> str:
    if choice.relaxed is not None:
        by = f" of {chosen_by}" if chosen_by else ""
        return f"No candidate passed every rule{by}. This one comes nearest, but {BROKEN[choice.relaxed]}."
    if chosen_by:
        return f"Chosen by {chosen_by}. {BY_COSINE}"
    margin = f", {choice.margin:.2f} below the runner-up" if choice.margin is not None else ""
    return (
        f"Lowest bypass score{margin}, of the candidates in the first {LAYER_SHARE:.0%} of the layers that induce "
        f"refusal when added and cost at most {KL_LIMIT} nats when removed."
    )


def _by_hand(ready: Ready) -> str:
    """What the rule says of a candidate that somebody took by hand."""
    if ready.score is None:
        origin = ready.direction.source.origin
        whose = f" It comes from {origin}, which does not say which weights it was read from." if origin else ""
        return f"Loaded from a file: it was not measured here.{whose}"
    rejected = ready.found.choice.rejected.get(ready.score)
    return "Chosen by hand. " + (
        f"The rule discards it: {BROKEN[rejected]}."
        if rejected
        else "The rule does not discard it, as far as measured."
    )


def _scores(chosen: CandidateScore, classes: tuple[str, str]) -> list[dict]:
    """The chosen candidate's numbers, each with what it means."""
    rows = (
        (
            "AUROC",
            chosen.auroc,
            f"chance that a held-out prompt of the class “{classes[0]}” lies further along than one of “{classes[1]}”",
        ),
        ("d′", chosen.d_prime, "distance of the two means in standard deviations, held-out prompts"),
        ("refuse", chosen.refuse, "cosine of harmless prompts with the direction added to harmful ones (COSMIC)"),
        ("comply", chosen.comply, "cosine of harmful prompts without the direction to harmless ones (COSMIC)"),
        ("bypass", chosen.bypass, "log-odds of starting like a refusal, harmful prompts, direction removed"),
        ("induce", chosen.induce, "log-odds of starting like a refusal, harmless prompts, direction added"),
        ("KL", chosen.kl, "nats between the untouched model and the model without it, harmless prompts"),
    )
    return [
        {"name": name, "value": f"{value:+.2f}" if name != "KL" else f"{value:.3f}", "meaning": meaning}
        for name, value, meaning in rows
        if value is not None
    ]


def _short(n: int) -> str:
    """A number of parameters as people say it."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return str(n)
