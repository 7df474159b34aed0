"""Find: every candidate direction, layer by position, with its scores and the rule that discarded it."""

from refusal_core.directions import DirectionError
from refusal_core.selection import KL_LIMIT, LAYER_SHARE, CandidateScore, Rule, broken_rules
from refusal_core.ui.bar import BROKEN
from refusal_core.ui.engine import Cell, Ready, is_known


def asked_cell(sent: object) -> Cell | None:
    """The cell that a browser asks for, which may be anything; None goes back to the rule's choice."""
    wanted = getattr(sent, "position", None), getattr(sent, "layer", None)
    if wanted == (None, None):
        return None
    position, layer = wanted
    if type(position) is not int or type(layer) is not int:
        raise DirectionError("There is no candidate there: take a cell of the map.")
    return position, layer


def find_view(ready: Ready, error: str = "") -> dict:
    """The selection map with the direction in use."""
    found, model = ready.found, ready.model
    rule, used = found.direction.source, ready.direction.source
    unknown = sum(not is_known(s) for s in found.scores)
    return {
        "error": error,
        "model": model.name,
        "layers": model.n_layers,
        "positions": [
            {"position": p, "token": model.template_tokens[p]} for p in sorted({s.pos for s in found.scores})
        ],
        "cells": [_cell(ready, score) for score in found.scores],
        "rule": [rule.position, rule.layer],
        "used": [used.position, used.layer] if ready.score else [None, None],
        "funnel": _funnel(ready),
        "unknown": unknown,
    }


def _cell(ready: Ready, score: CandidateScore) -> dict:
    rejected = ready.found.choice.rejected.get(score)
    return {
        "position": score.pos,
        "layer": score.layer,
        "bypass": score.bypass,
        "induce": score.induce,
        "kl": score.kl,
        "norm": score.norm,
        "rejected": rejected,
        "why": f"Discarded: {BROKEN[rejected]}." if rejected else "",
    }


def _funnel(ready: Ready) -> list[dict]:
    """How many candidates are left after each rule, in the order in which they are applied."""
    left = list(ready.found.scores)
    steps = [{"name": "candidates: a mean difference at every layer and template position", "left": len(left)}]
    n_layers, relaxed = ready.model.n_layers, ready.found.choice.relaxed
    names: tuple[tuple[tuple[Rule, ...], str], ...] = (
        (("zero", "nan"), "that are a direction at all"),
        (("layer",), f"in the first {LAYER_SHARE:.0%} of the layers"),
        (("induce",), "that make harmless prompts refused when added"),
        (("kl",), f"that cost at most {KL_LIMIT} nats when removed"),
    )
    for rules, name in names:
        left = [s for s in left if not set(rules) & set(broken_rules(s, n_layers))]
        unknown = sum(s.kl is None for s in left) if rules == ("kl",) else 0
        # A candidate that another one beats need not be measured; nothing is claimed about it.
        steps.append({"name": name + (f" ({unknown} of them not measured)" if unknown else ""), "left": len(left)})
    last = "with the lowest bypass: the rule’s choice" if relaxed is None else "that needs the rules relaxed least"
    return [*steps, {"name": last, "left": 1}]
