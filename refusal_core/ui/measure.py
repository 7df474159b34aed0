"""Measure: how strong the effect is, how sure that is, and at what price."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from refusal_core.chat_model import ModelError
from refusal_core.endpoints import evaluate_endpoints
from refusal_core.evaluation import (
    Damage,
    DoseCurve,
    RefusalCurve,
    Report,
    by_strength,
    damage_table,
    dose_table,
    evaluate,
    paper_rows,
    unseen,
)
from refusal_core.interventions import Intervention
from refusal_core.metrics import Rules
from refusal_core.orthogonalize import export
from refusal_core.plots import dose_figure
from refusal_core.prompts import PromptError
from refusal_core.selection import Progress
from refusal_core.ui.bar import mark_of
from refusal_core.ui.engine import Ready, Served
from refusal_core.ui.lending import MEASUREMENT, on_gpu
from refusal_core.ui.search import asked_public
from refusal_core.ui.talk import asked_writers

FEWEST, MOST = 5, 100
RULES: dict[str, Rules] = {rules: rules for rules in get_args(Rules)}


@dataclass(frozen=True)
class Wish:
    """What is to be measured: `n` test prompts of each class, replies of at most `max_new_tokens`, judged by `rules`.

    The prompts are those that are set aside, or of the lists of the hub that `first` and `second` name. Of `writers`, if
    there are any, the removal from these parts alone is measured as well.
    """

    run: int
    n: int
    max_new_tokens: int
    rules: Rules = "default"
    first: str = ""
    second: str = ""
    writers: frozenset[str] | None = None

    @classmethod
    def read(cls, sent: Mapping[str, object], most_tokens: int) -> "Wish":
        """The wish in what a browser sent, which may be anything; raises PromptError and names the field."""
        limits = {"run": (0, 2**53), "n": (FEWEST, MOST), "max_new_tokens": (1, most_tokens)}
        values: dict[str, int] = {}
        for name, (low, high) in limits.items():
            value = sent.get(name)
            if type(value) is not int or not low <= value <= high:
                said = {"n": "The number of prompts", "max_new_tokens": "The longest reply"}.get(name, "The run")
                raise PromptError(f"{said} is a whole number from {low} to {high}: set it again.")
            values[name] = value
        first, second = (str(sent.get(name) or "") for name in ("first", "second"))
        rules = RULES.get(str(sent.get("rules") or "default"))
        if rules is None:
            raise PromptError(f"There is no judge {str(sent.get('rules'))[:40]!r}: take one of {', '.join(RULES)}.")
        return cls(**values, rules=rules, first=first, second=second, writers=asked_writers(sent.get("writers")))


def measured(ready: Ready | Served, wish: Wish, stop: threading.Event, *, local: bool = False) -> Iterator[dict]:
    """Progress, the rates, and the curves by strength with what each costs; ends early when `stop` is set.

    Lists of the hub are fetched if the page is `local`. Raises PromptError for those that cannot be had.
    """
    if isinstance(ready, Served):
        yield from _served(ready, wish, stop)
        return
    yield from on_gpu(_measured, ready.light, wish, local=local, model=ready.model, seconds=MEASUREMENT, stop=stop)


def _measured(ready: Ready, wish: Wish, stop: threading.Event, *, local: bool) -> Iterator[dict]:
    model, direction, tokens = ready.model, ready.direction, ready.found.refusal_tokens
    head = {"run": wish.run, "model": model.name}
    examples = ready.examples
    if wish.first or wish.second:
        yield head | measuring_view(Progress("fetching the prompts", 0, 0))
        examples = unseen(ready.found, *asked_public(wish.first, wish.second, local))
    prompts = examples.draw(wish.n)
    rows = paper_rows(direction)
    if wish.writers:
        rows = (*rows[:2], (Intervention(direction, "ablate", writers=wish.writers),), *rows[2:])
    for news in evaluate(model, prompts, rows, rules=wish.rules, max_new_tokens=wish.max_new_tokens, stop=stop):
        yield head | (
            measuring_view(news) if isinstance(news, Progress) else {"report": _report(news) | _made_with(ready)}
        )
    how: dict[str, Any] = {"rules": wish.rules, "max_new_tokens": wish.max_new_tokens, "stop": stop}
    for news in by_strength(model, prompts, direction, tokens, **how):
        if isinstance(news, Progress):
            yield head | measuring_view(news)
            continue
        (removed, added, damaged), (of_removal, of_addition) = map(_curve, news.doses), news.damage
        curves = {
            "ablate": removed | _refused(news.refusals[0]),
            "add": added | _damage(of_addition) | _refused(news.refusals[1]),
            "damage": damaged | _damage(of_removal),
        }
        yield head | {
            "curves": curves,
            "damage_markdown": f"{dose_table(news.doses, news.refusals)}\n\n{damage_table(news.damage)}",
        }
    if stop.is_set():
        yield head | {"cancelled": True}


def _served(served: Served, wish: Wish, stop: threading.Event) -> Iterator[dict]:
    """Progress and the rates; the curves would need hooks, and the page says so."""
    head = {"run": wish.run, "model": served.name}
    for news in evaluate_endpoints(
        served.pair, served.examples.draw(wish.n), rules=wish.rules, max_new_tokens=wish.max_new_tokens, stop=stop
    ):
        yield head | (measuring_view(news) if isinstance(news, Progress) else {"report": _report(news)})
    yield head | ({"cancelled": True} if stop.is_set() else {"done": True})


def measuring_view(progress: Progress) -> dict:
    """How far work that takes a while is."""
    return {"measuring": [progress.stage, progress.done, progress.total]}


def _made_with(ready: Ready) -> dict:
    return {
        "toy": ready.is_organism,
        "mark": mark_of(ready),
        "direction": asdict(ready.direction.source) | {"norm": ready.direction.norm, "digest": ready.digest},
        "dtype": ready.model.precision,
    }


def _report(report: Report) -> dict:
    """A report without `direction` and `dtype`, which only a model here has."""
    return {
        "model": report.model,
        "fingerprint": report.fingerprint,
        "revision": report.revision,
        "prompts": report.prompts,
        "rules": report.rules,
        "max_new_tokens": report.max_new_tokens,
        "rates": [rate.as_dict() for rate in report.rates],
        "completions": [asdict(completion) for completion in report.completions],
        "rows": list(dict.fromkeys(rate.row for rate in report.rates)),
        "markdown": report.as_markdown(),
    }


def _curve(curve: DoseCurve) -> dict:
    """A curve and its figures; only the price where the probability is not known."""
    bands = [
        (tuple(map(min, zip(*rows, strict=True))), tuple(map(max, zip(*rows, strict=True))))
        for rows in (curve.random_refusal, curve.random_kl)
    ]
    return {
        "n": curve.n,
        "n_random": len(curve.random_kl),
        "harmful": curve.harmful,
        "scales": curve.scales,
        "refusal": curve.refusal or None,
        "kl": curve.kl,
        "random_refusal": curve.random_refusal or None,
        "random_kl": curve.random_kl,
        "refusal_figure": dose_figure(curve.scales, curve.refusal, bands[0], "probability").to_json()
        if curve.refusal
        else None,
        "kl_figure": dose_figure(curve.scales, curve.kl, bands[1], "KL, nats").to_json(),
    }


def _refused(curve: RefusalCurve) -> dict:
    shares, *random = ([k / curve.n for k in counts] for counts in (curve.refused, *curve.random_refused))
    band = tuple(map(min, zip(*random, strict=True))), tuple(map(max, zip(*random, strict=True)))
    return {
        "refused": curve.refused,
        "random_refused": curve.random_refused,
        "refused_figure": dose_figure(curve.scales, shares, band, "share of replies").to_json(),
    }


def _damage(damage: Damage) -> dict:
    measures = (
        ("cross_entropy", damage.cross_entropy, "cross-entropy, nats per token"),
        ("repetition", damage.repetition, "share of 4-grams"),
    )
    return {name: values for name, values, _ in measures} | {
        f"{name}_figure": dose_figure(damage.scales, values, None, title).to_json() for name, values, title in measures
    }


def written(ready: Ready, folder: object, *, local: bool) -> str:
    """Writes the removal into the weights of a checkpoint in the new `folder`; what came of it, in words.

    Raises ModelError where others can open the page, without a folder, and as `export` does.
    """
    if not local:
        raise ModelError("Where others can open the page no edited weights are written: run the app for yourself.")
    if not isinstance(folder, str) or not folder.strip():
        raise ModelError("The edited model needs a place: name a new folder for it.")
    path = Path(folder.strip()).expanduser().absolute()
    return export(ready.model, ready.direction, path, refusal_tokens=ready.found.refusal_tokens or None).in_words
