"""Find: every candidate direction, layer by position, with its scores and the rule that discarded it."""

from refusal_core.activations import template_prefix
from refusal_core.directions import DirectionError
from refusal_core.prompts import CLASSES, PromptError, is_public
from refusal_core.selection import KL_LIMIT, LAYER_SHARE, CandidateScore, Found, Rule, broken_rules
from refusal_core.ui.bar import BROKEN, BY_COSINE, tokens_view
from refusal_core.ui.engine import Cell, Ready, is_known
from refusal_core.ui.talk import MAX_CHARACTERS

MOST_SHOWN = 80
"""How many tokens of a rendered prompt are shown; of a longer one the middle is left out."""


def asked_cell(sent: object) -> Cell | None:
    """The cell that a browser asks for, which may be anything; None goes back to the rule's choice."""
    wanted = getattr(sent, "position", None), getattr(sent, "layer", None)
    if wanted == (None, None):
        return None
    position, layer = wanted
    if type(position) is not int or type(layer) is not int:
        raise DirectionError("There is no candidate there: take a cell of the map.")
    return position, layer


def find_view(ready: Ready, model_found: Found, error: str = "") -> dict:
    """The selection map with the direction in use; `model_found` is what the app itself found for this model."""
    found, model = ready.found, ready.model
    rule, used = found.direction.source, ready.direction.source
    unknown = sum(not is_known(s) for s in found.scores)
    return {
        "error": error,
        "model": model.name,
        "table": table_of(ready),
        "contrast": rule.contrast,
        "chosen_by": rule.chosen_by,
        "classes": found.prompts.classes,
        "layers": model.n_layers,
        "positions": [
            {"position": p, "token": model.template_tokens[p]} for p in sorted({s.pos for s in found.scores})
        ],
        "template_positions": model.template_positions,
        "cells": [_cell(ready, score) for score in found.scores],
        "rule": [rule.position, rule.layer],
        "used": [used.position, used.layer] if ready.score else [None, None],
        "funnel": _funnel(ready),
        "unknown": unknown,
        "own": bool(ready.own),
        "origin": _origin(ready),
        "tokens": tokens_view(model, found),
        "model_tokens": tokens_view(model, model_found),
    }


def table_of(ready: Ready) -> str:
    """Names the candidates and what they are scored with, however much of it has been measured."""
    found = ready.found
    return " ".join(map(str, (ready.model.name, ready.own, found.digest, *found.refusal_tokens)))


def _cell(ready: Ready, score: CandidateScore) -> dict:
    rejected = ready.found.choice.rejected.get(score)
    return {
        "position": score.pos,
        "layer": score.layer,
        "bypass": score.bypass,
        "induce": score.induce,
        "kl": score.kl,
        "refuse": score.refuse,
        "comply": score.comply,
        "auroc": score.auroc,
        "d_prime": _finite(score.d_prime),
        "norm": score.norm,
        "rejected": rejected,
        "why": f"Discarded: {BROKEN[rejected]}." if rejected else "",
    }


def _finite(value: float | None) -> float | None:
    """None for what is not a number: the page would get it as nothing at all."""
    return value if value is not None and abs(value) < float("inf") else None


def _origin(ready: Ready) -> str:
    """What the candidates were found from, how many prompts that were, and what was done with them."""
    found = ready.found
    classes, counts = found.prompts.classes, found.counts

    def many(split: str) -> str:
        kept, drawn = ([counts[split, cls][i] for cls in CLASSES] for i in (0, 1))
        said = [
            f"{k} {name}" if k == n else f"{k} of {n} {name}" for k, n, name in zip(kept, drawn, classes, strict=True)
        ]
        return " and ".join(said)

    public = f" ({found.prompts.source})" if not ready.own and is_public(found.prompts.source) else ""
    head = f"From {ready.own or 'the app’s prompts'}{public}: {many('train')} prompts to train on, {many('val')} to choose by"
    if found.direction.source.contrast:
        return (
            f"{head}. This is not a refusal direction: it is the mean of the {classes[0]} prompts minus that of the "
            f"{classes[1]} ones. All drawn prompts were kept, and nothing was steered to find it: of the first "
            f"{LAYER_SHARE:.0%} of the layers the cell was taken where the prompts it was not made from lie furthest "
            "apart (AUROC, then d′). Try others: what separates best need not steer best."
        )
    aside = f" {ready.set_aside} prompts are set aside for Measure." if ready.set_aside else ""
    drawn = " The split is a seeded draw: the same lists give the same split." if ready.own else ""
    if found.direction.source.chosen_by:
        no_tokens = (
            ""
            if found.refusal_tokens
            else " “Starts like a refusal” is not known without refusal tokens: add one below."
        )
        return f"{head}. Chosen by {found.direction.source.chosen_by}. {BY_COSINE} No prompt was left out.{no_tokens}{aside}{drawn}"
    if found.choice.relaxed:
        aside += " No candidate passed every rule: below, COSMIC can choose instead, without refusal tokens."
    return f"{head}, those that the unmodified model treats as expected.{aside}{drawn}"


def _funnel(ready: Ready) -> list[dict]:
    """How many candidates are left after each rule, in the order in which they are applied."""
    left = list(ready.found.scores)
    steps = [{"name": "candidates: a mean difference at every layer and template position", "left": len(left)}]
    n_layers, relaxed = ready.model.n_layers, ready.found.choice.relaxed
    names: tuple[tuple[tuple[Rule, ...], str], ...] = (
        (("zero", "nan"), "that are a direction at all"),
        (("layer",), f"in the first {LAYER_SHARE:.0%} of the layers"),
        (("induce",), "that make harmless prompts start like a refusal when added"),
        (("kl",), f"that cost at most {KL_LIMIT} nats when removed"),
    )
    is_contrast, by_cosine = (bool(getattr(ready.found.direction.source, name)) for name in ("contrast", "chosen_by"))
    if by_cosine:
        names = (*names[:2], (("late",), "that are not at −1 above where other positions score highest"), names[3])
    for rules, name in names[:2] if is_contrast else names:
        left = [s for s in left if not set(rules) & set(broken_rules(s, n_layers))]
        unknown = sum(s.kl is None for s in left) if rules == ("kl",) else 0
        # A candidate that another one beats need not be measured; nothing is claimed about it.
        steps.append(
            {
                "name": name + (f" ({unknown} of them not measured: the choice beats them anyway)" if unknown else ""),
                "left": len(left),
            }
        )
    margin = "" if ready.found.choice.margin is None else f", {ready.found.choice.margin:.2f} below the runner-up"
    last = f"with the lowest bypass: the rule’s choice{margin}" if not by_cosine else "with the highest refuse + comply"
    last = last if relaxed is None else "that needs the rules relaxed least"
    return [*steps, {"name": "that separates best: the default" if is_contrast else last, "left": 1}]


def rendered_view(ready: Ready, prompt: object) -> dict:
    """A message alone, token by token as the model reads it; those of the template say so, the last their position.

    Raises PromptError for a message that cannot be read.
    """
    if not isinstance(prompt, str) or len(prompt) > MAX_CHARACTERS:
        raise PromptError(f"A prompt has at most {MAX_CHARACTERS:,} characters here: shorten it.")
    model = ready.model
    ids = model.render(prompt)
    n, first, last = len(ids), template_prefix(model), len(ids) - model.template_positions
    shown = range(n) if n <= MOST_SHOWN else [*range(MOST_SHOWN // 2), *range(n - MOST_SHOWN // 2, n)]
    return {
        "model": model.name,
        "prompt": prompt,
        "n": n,
        "n_template": n - max(0, last - first),
        "left_out": n - len(shown),
        "cut": MOST_SHOWN // 2 if n > MOST_SHOWN else n,
        "tokens": [
            {
                "text": str(model.tokenizer.decode([ids[i]])),
                "template": i < first or i >= last,
                "position": i - n if i >= last - 1 else None,
            }
            for i in shown
        ],
    }
