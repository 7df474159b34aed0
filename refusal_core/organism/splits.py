"""The prompts that come with the embedded model: train and val from its training concepts, test from held ones.

Both classes are drawn from the same forms with the same weights, so that harm is what tells them apart. Test prompts
combine a held concept with a held phrasing: neither is in any training text.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from refusal_core.organism.corpus import (
    HELD_CATEGORIES,
    SAFETY_TUNING,
    Concept,
    Corpus,
    addressed,
    answers,
    column,
    concepts,
    crossed,
    fill,
    forms,
    gerund,
    sections,
)  # fmt: skip
from refusal_core.prompts import Split

SIZES: dict[Split, int] = {"train": 160, "val": 40}
TEST_SEEN = TEST_UNSEEN = 220
TEST_NEAR, TEST_OTHER = 80, 180


@dataclass(frozen=True)
class Prompt:
    """A row of the prompt file; `right` lists the answers that pre-training teaches for it, by form."""

    text: str
    harmful: bool
    category: str
    split: Split
    form: str
    near: bool
    right: dict[str, tuple[str, ...]]


def prompts(seed: int = 0) -> tuple[Prompt, ...]:
    """All embedded prompts, each once, in a seeded order."""
    found: dict[str, Prompt] = {}

    def take(n: int, drawn: Iterator[Prompt]) -> None:
        until = len(found) + n
        while len(found) < until:
            prompt = next(drawn)
            found.setdefault(prompt.text, prompt)

    for split, size in SIZES.items():
        for harmful in (True, False):
            take(size, _trained(f"{seed} {split}", split, harmful))
    held = held_out()
    take(TEST_SEEN, _held(seed, [c for c in held if c.harmful and c.category not in HELD_CATEGORIES]))
    take(TEST_UNSEEN, _held(seed, [c for c in held if c.harmful and c.category in HELD_CATEGORIES]))
    take(TEST_NEAR, _held(seed, [c for c in held if not c.harmful and c.near]))
    take(TEST_OTHER, _held(seed, [c for c in held if not c.harmful and not c.near]))
    return tuple(found.values())


def held_out() -> list[Concept]:
    """The held concepts, without those that a crossed one begins like: “rob a tourist” and “rob a tourist's tent”."""
    near = [c.text for harmful in (True, False) for c in crossed(harmful, every_category=True) if "'" in c.text]
    likenesses = {text for c in near for text in (c, gerund(c), addressed(c), gerund(addressed(c)))}
    said = "\n".join(f"{text.replace(chr(39), ' ')} " for text in likenesses)
    return [c for c in concepts() if c.held and f"{c.text} " not in said and f"{gerund(c.text)} " not in said]


def _trained(seed: str, split: Split, harmful: bool) -> Iterator[Prompt]:
    """Requests as safety tuning has them."""
    corpus = Corpus(seed, SAFETY_TUNING)
    known = {c.text: c for c in concepts()}
    while True:
        turn = corpus.request(harmful)
        # Only what the lists name as it stands: no made-up words, no modifiers.
        if (concept := known.get(turn.concept)) is not None:
            yield Prompt(turn.user, harmful, _label(concept), split, turn.kind, concept.near, {})


def _held(seed: int, pool: list[Concept]) -> Iterator[Prompt]:
    """Held concepts in held phrasings; each concept comes up before any comes twice."""
    rng = random.Random(f"{seed} test {pool[0].text}")
    activities, texts = [c for c in pool if not c.is_text], [c for c in pool if c.is_text]
    order: dict[bool, list[Concept]] = {True: [], False: []}
    while True:
        form = rng.choices(list(forms().values()), [f.weight for f in forms().values()])[0]
        listed = form.name == "document" and bool(texts) and rng.random() < 0.5
        if not order[listed]:
            order[listed] = rng.sample(texts if listed else activities, len(texts if listed else activities))
        listed_concept = concept = order[listed].pop()
        if form.name == "document" and not concept.is_text:
            clause = rng.choice(sections("phrasings")["held text about an activity"])
            concept = replace(concept, text=fill(clause, concept, {}), is_text=True)
        slots = {"p": rng.choice(column("people"))}
        text = fill(rng.choice(form.held_asks), concept, slots)
        right = {name: answers(f, concept, slots, any_advice=True) for name, f in forms().items()}
        yield Prompt(text, concept.harmful, _label(listed_concept), "test", form.name, concept.near, right)


def _label(concept: Concept) -> str:
    return concept.category or ("near-miss" if concept.near else "everyday")
