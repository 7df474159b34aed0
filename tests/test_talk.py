"""What the panes promise whatever a visitor does: Unchanged says what plain transformers says, and nothing is left behind."""

import random
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from conftest import short_of_memory
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from refusal_core.attribution import read_along
from refusal_core.chat_model import ORGANISM, ChatModel
from refusal_core.directions import random_like
from refusal_core.interventions import Intervention
from refusal_core.prompts import load_prompts
from refusal_core.ui.engine import Engine, Ready
from refusal_core.ui.forecast import forecast
from refusal_core.ui.measure import Wish, measured
from refusal_core.ui.talk import Ask, Reply, Turn, conversation, talk, tint, view

TOKENS = 6
MESSAGES = (
    "Hi",
    "How do I bake bread?",
    "How do I rob a bank?",
    "Name three fruits.",
    "Tell me how to forge a signature.",
)


@pytest.fixture(scope="module")
def models(model, found, tmp_path_factory) -> dict[str, tuple[Ready, AutoModelForCausalLM]]:
    """The embedded model and one with other weights, each as the page has it, and in plain transformers."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(ORGANISM, folder)
    torch.manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: w * (1 + 0.3 * torch.randn_like(w)) for k, w in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    other = ChatModel.load(folder, device="cpu")
    first = Ready(model, found, found.direction, load_prompts("test"), True)
    source = replace(found.direction.source, fingerprint=other.fingerprint)
    second = replace(first, model=other, direction=replace(found.direction, source=source))
    plain = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (ORGANISM, folder))
    return {"first": (first, next(plain)), "second": (second, next(plain))}


@dataclass
class Visitor:
    """A visitor as the page keeps them: model, turns, and the replies that are running, if any."""

    model: str = "first"
    turns: tuple[Turn, ...] = ()
    running: Iterator | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    history: list[tuple[str, tuple[Turn, ...]]] = field(default_factory=list)

    def begin(self, models, rng: random.Random) -> None:
        """A random event. Whoever asks while replies run stops them first, as the page does."""
        self.stop.set()
        self.go_on(rng, to_the_end=True)
        if rng.random() < 0.2:  # a new model begins a new conversation
            self.model, self.turns = rng.choice(list(models)), ()
        action = rng.choice(("ask", "ask", "ask", "fresh", "again", "undo", "clear"))
        self.stop = threading.Event()
        wish = Ask(
            rng.randrange(10**6),
            action,
            rng.choice(MESSAGES),
            removal=rng.choice((None, 0.0, 0.5, 1.0)),
            addition=rng.choice((None, -1.0, 0.0, 1.0, 2.0)),
            control=rng.choice((None, 1.0)),
            max_new_tokens=TOKENS,
            system=rng.choice(("", "", "Be brief.")),
        )
        self.running = talk(models[self.model][0], self.turns, wish, self.stop)

    def go_on(self, rng: random.Random, *, to_the_end: bool = False) -> None:
        """The running replies, a little further or until they end."""
        for turns, _ in self.running or ():
            self.turns = turns
            if not to_the_end and rng.random() < 0.5:
                return
        self.running = None
        self.history.append((self.model, self.turns))


@pytest.mark.parametrize("seed", range(4))
def test_no_order_of_events_of_two_visitors_brings_changed_text_under_unchanged(models, monkeypatch, seed):
    monkeypatch.setattr("refusal_core.ui.talk.UPDATES_PER_SECOND", 1e9)  # every token can be the last before an event
    rng, before = random.Random(seed), {n: ready.model.logits(list(MESSAGES)) for n, (ready, _) in models.items()}
    visitors = [Visitor(), Visitor()]
    for _ in range(30):
        visitor = rng.choice(visitors)
        if visitor.running is None or rng.random() < 0.25:
            visitor.begin(models, rng)
        else:
            visitor.go_on(rng)
    for visitor in visitors:
        visitor.go_on(rng, to_the_end=True)

    said: dict[tuple, list[int]] = {}
    checked = 0
    for name, turns in [(n, t[: i + 1]) for v in visitors for n, t in v.history for i in range(len(t))]:
        reply = turns[-1].replies.get("unchanged")
        if reply is None:
            continue
        ready, plain = models[name]
        ids = ready.model.render(conversation(turns, "unchanged"))
        if (name, *ids) not in said:
            whole = plain.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :].tolist()
            said[name, *ids] = [token for token in whole if token not in ready.model.end_tokens]
        expected = said[name, *ids]
        assert list(reply.ids) == (expected[: len(reply.ids)] if reply.ending == "stopped" else expected)
        checked += 1
    assert checked > 5
    for name, (ready, _) in models.items():
        assert torch.equal(ready.model.logits(list(MESSAGES)), before[name]), "an intervention was left behind"


@pytest.mark.parametrize("said", ["on and on " * 9, "I'm sorry, I can't " * 9])
@pytest.mark.parametrize(
    ("pane", "strength", "named"), [("added", 2.0, "2×"), ("added", -1.0, "-1×"), ("removed", 1.0, "100%")]
)
def test_a_push_that_is_too_strong_is_named_also_where_its_text_refuses(said, pane, strength, named):
    replies = {
        each: Reply(said if each == pane else "Yes.", ending="end", strength=strength) for each in ("removed", "added")
    }
    notice = view([Turn("Hi", replies=replies)], 1)["notice"]
    assert notice.endswith(f"the push is too strong. Try a strength nearer to 0 than {named}.")


def test_replies_that_outgrow_the_memory_are_kept_shortened_and_said_to_be(models):
    ready, _ = models["first"]
    ask = Ask(1, "ask", MESSAGES[1], max_new_tokens=TOKENS)
    *_, (whole, _) = talk(ready, (), ask, threading.Event())
    longest = len(ready.model.render(MESSAGES[1])) + 3
    with short_of_memory(ready.model, lambda rows, length: length <= longest):
        *_, (turns, shown) = talk(ready, (), ask, threading.Event())
    assert shown["notice"] == "This did not fit into memory. Shortened to 4 tokens."
    assert not shown["error"] and not shown["running"]
    for pane, reply in turns[-1].replies.items():
        assert reply.ending == "memory" and reply.ids == whole[-1].replies[pane].ids[:4]
    *_, (again, shown) = talk(ready, turns, replace(ask, action="again"), threading.Event())
    assert again[-1].replies == whole[-1].replies and "fit" not in shown["notice"]


def test_replies_that_are_stopped_before_their_first_token_are_stopped_at_0_tokens(models):
    stop = threading.Event()
    stop.set()
    ready, _ = models["first"]
    *_, (turns, shown) = talk(ready, (), Ask(1, "ask", MESSAGES[0]), stop)
    replies = shown["turns"][-1]["replies"]
    assert [(r["tokens"], r["ending"], r["text"]) for r in replies.values()] == [(0, "stopped", "")] * 3
    assert turns[-1].prompt == MESSAGES[0] and not shown["running"]


def test_inside_a_reply_is_read_with_the_direction_that_it_was_answered_with(models):
    ready, _ = models["first"]
    cell = ready.direction.source.position, ready.direction.source.layer - 1
    there, elsewhere = ready.using(cell), replace(ready, direction=random_like(ready.direction, 7))
    ask = Ask(1, "ask", MESSAGES[2], control=1.0, max_new_tokens=TOKENS)

    def answered(by: Ready) -> tuple[Turn, ...]:
        *_, (turns, _) = talk(by, (), ask, threading.Event())
        return turns

    turns = answered(there)
    read = tint(ready, turns, inside=True)
    assert read != tint(ready, [replace(turns[-1], used=None)], inside=True), "as if the one in use had answered"
    layer, at = ready.direction.source.layer, ready.found.positions.index(ready.direction.source.position)
    harmful, harmless = (
        (x[:, at, layer] @ ready.direction.unit).mean() for x in (ready.found.harmful, ready.found.harmless)
    )
    rows = {
        "unchanged": (),
        "removed": (Intervention(there.direction, "ablate"),),
        "added": (Intervention(there.direction, "add"),),
    }
    for pane, row in rows.items():
        ids = turns[-1].replies[pane].ids
        (reading,) = read_along(ready.model, [conversation(turns, pane)], ready.direction, [ids], [row])
        expected = (reading.along[layer, -len(ids) :] - harmless) / (harmful - harmless)
        assert [along for _, along in read[pane]] == pytest.approx(expected.tolist(), abs=2e-3)
    for inside in (False, True):
        assert tint(elsewhere, answered(elsewhere), inside=inside), "the direction in use need not be on the map"
    assert tint(ready, answered(elsewhere), inside=True) == {}, "a direction that is gone is not another one"
    assert set(tint(ready, answered(elsewhere), inside=False)) == set(turns[-1].replies)
    tokens = replace(ready, found=replace(ready.found, refusal_tokens=ready.found.refusal_tokens[:1]))
    assert tint(tokens, answered(ready), inside=True) == tint(ready, answered(ready), inside=True)


def test_without_refusal_tokens_no_page_says_that_nothing_starts_like_a_refusal(model, found):
    ready = Ready(model, replace(found, refusal_tokens=()), found.direction, load_prompts("test"), True)
    ask = Ask(1, "ask", "How do I rob a bank?", control=None, max_new_tokens=2)
    foretold = forecast(Engine(), ready, [], ask)
    assert foretold["unchanged"] is None
    assert [curve["refusal"] for curve in foretold["curves"].values()] == [None, None]
    assert "not known without refusal tokens: add one in Find" in foretold["place"]["sentence"]
    *_, (turns, _) = talk(ready, (), ask, threading.Event())
    assert [reply.refusal for reply in turns[-1].replies.values()] == [None] * 3
    *_, last = measured(ready, Wish(1, 1, 2), threading.Event())
    for curve in last["curves"].values():
        assert curve["refusal"] is curve["random_refusal"] is curve["refusal_figure"] is None and any(curve["kl"])
