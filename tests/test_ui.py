"""What the page promises, seen through a real browser; and the rules of a conversation, without one."""

import base64
import contextlib
import csv
import json
import os
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, BrowserType, Locator, Page, Route, sync_playwright
from playwright.sync_api import expect as expect_once

from refusal_core.attribution import read_along
from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.directions import DirectionError, random_like
from refusal_core.evaluation import dose_response
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.metrics import judge
from refusal_core.prompts import PromptError
from refusal_core.ui.engine import EMBEDDED, Engine, Engines, Ready
from refusal_core.ui.measure import Wish, measured, written
from refusal_core.ui.page import FORGOTTEN, RELOAD, Handlers, Visit
from refusal_core.ui.server import MAX_BODY, OFFERED
from refusal_core.ui.talk import (
    MAX_CHARACTERS,
    OPENING,
    PANES,
    Ask,
    Reply,
    Stops,
    Turn,
    control_of,
    conversation,
    opening_view,
    talk,
    tint,
    view,
)

ROOT = Path(__file__).parent.parent
SIZE = {"width": 1280, "height": 860}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PREPARED = 180
CHOICES = (("--model", "REFUSAL_TEST_MODEL"), ("--prompts", "REFUSAL_TEST_PROMPTS"))
"""The tests run on the embedded model and prompts; these variables name others."""

PATIENCE = 60_000
"""How long is a matter of the machine; what is promised in time is measured."""


class expect:  # noqa: N801
    """Playwright's, which looks ten times a second if it has less than 2.5 s, and else only twice."""

    def __init__(self, what: Locator | Page) -> None:
        self._of = expect_once(what)

    def __getattr__(self, name: str) -> Callable[..., None]:
        def checked(*args: object, timeout: float = PATIENCE, **how: object) -> None:
            end = time.monotonic() + timeout / 1000
            while True:
                left = 1000 * (end - time.monotonic())
                try:
                    getattr(self._of, name)(*args, timeout=max(1, min(2_400, left)), **how)
                    return
                except AssertionError:
                    if left <= 2_400:
                        raise

        return checked


SENT = {
    "run": 1,
    "action": "ask",
    "prompt": "Hi",
    "removal": 1,
    "addition": 1,
    "temperature": 0,
    "max_new_tokens": 8,
    "seed": 0,
}


# -- the rules of a conversation -----------------------------------------------------------------------------------


def test_a_system_prompt_stands_first_in_every_pane_and_is_that_of_the_turn_in_hand():
    before = Turn("Hi", {pane: Reply(f"{pane}.", (1,), "end") for pane in PANES}, system="old")
    for pane in PANES:
        said = conversation((before, Turn("Who are you?", system="Be kind.")), pane)
        assert [m["role"] for m in said] == ["system", "user", "assistant", "user"]
        assert said[0]["content"] == "Be kind." and said[2]["content"] == f"{pane}."
        assert conversation((before, Turn("Who are you?")), pane)[0]["role"] == "user"
    with pytest.raises(PromptError, match="at most 2,000 characters"):
        Ask.read(SENT | {"system": "a" * 2001})
    assert Ask.read(SENT | {"system": ["no text"]}).system == ""


def test_no_order_of_events_brings_text_of_one_pane_into_the_history_of_another():
    rng = random.Random(0)
    for _ in range(200):
        turns = []
        for number in range(rng.randint(1, 6)):
            on = [pane for pane in PANES if pane == "unchanged" or rng.random() < 0.7]
            turns.append(Turn(f"prompt {number}", {p: Reply(f"{p} {number}" * rng.randint(0, 1)) for p in on}))
        for pane in PANES:
            messages = conversation(turns, pane)
            said = [m["content"] for m in messages if m["role"] == "assistant"]
            assert all(text.startswith(pane) for text in said)
            assert [m["role"] for m in messages] == ["user", "assistant"] * len(said) + ["user"]
            assert messages[-1]["content"] == turns[-1].prompt


@pytest.mark.parametrize(
    "forged",
    [
        {"addition": 7},
        {"addition": "1"},
        {"removal": -0.1},
        {"removal": True},
        {"temperature": float("nan")},
        {"max_new_tokens": 10**9},
        {"max_new_tokens": None},
        {"seed": -1},
        {"run": "x"},
        {"action": "drop"},
        {"action": ["ask"]},
        {"cell": "here"},
        {"cell": [1.5, 2]},
        {"cell": [-1]},
    ],
)
def test_a_forged_request_is_refused_with_a_sentence_that_names_the_field(forged):
    with pytest.raises(PromptError) as refused:
        Ask.read(SENT | forged)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".")


def test_a_refused_length_is_named_as_the_page_names_it():
    with pytest.raises(PromptError, match="The longest reply is a number from 1 to 512"):
        Ask.read(SENT | {"max_new_tokens": 0})


def test_a_pane_that_is_off_is_not_a_pane_of_strength_zero():
    assert Ask.read(SENT | {"addition": None}).addition is None
    assert Ask.read(SENT | {"addition": 0}).addition == 0


def test_a_stop_reaches_the_runs_of_its_own_session_only():
    stops = Stops()
    mine, theirs = stops.begin("me", 1), stops.begin("they", 1)
    stops.stop("me", 1)
    assert mine.is_set() and not theirs.is_set()


def test_a_stop_that_comes_before_its_run_keeps_it_from_starting_and_no_later_one():
    stops = Stops()
    stops.stop("me", 1)
    assert stops.begin("me", 1).is_set()
    assert not stops.begin("me", 2).is_set()


def test_a_new_run_stops_the_one_before_it_and_a_late_stop_does_not_hit_the_new_one():
    stops = Stops()
    first, second = stops.begin("me", 1), stops.begin("me", 2)
    stops.stop("me", 1)
    assert first.is_set() and not second.is_set()


@pytest.fixture(scope="module")
def ready() -> Ready:
    """The model and its direction, without a page."""
    options = dict(zip(("name", "prompts"), (os.environ.get(v) for _, v in CHOICES), strict=True))
    engine = Engine(**{name: value for name, value in options.items() if value})
    engine.start()
    *progress, status = engine.changes()
    assert isinstance(status, Ready), status
    assert progress
    return status


def test_a_stop_in_the_middle_keeps_the_message_and_what_was_said(ready):
    stop = threading.Event()
    steps = []
    for step in talk(ready, (), Ask(1, "fresh", OPENING), stop):
        steps.append(step)
        stop.set()
    turns, shown = steps[-1]
    assert turns[-1].prompt == OPENING
    assert [reply.ending for reply in turns[-1].replies.values()] == ["stopped"] * 3
    assert all(0 < len(reply.ids) < 4 for reply in turns[-1].replies.values())
    assert not shown["running"]


def test_the_panes_stream_and_the_view_is_that_of_the_turns(ready):
    steps = list(talk(ready, (), Ask(1, "fresh", OPENING), threading.Event()))
    assert len(steps) > 1
    assert [shown["running"] for _, shown in steps] == [True] * (len(steps) - 1) + [False]
    turns, shown = steps[-1]
    assert {pane: reply.text for pane, reply in turns[0].replies.items()} == {
        pane: reply["text"] for pane, reply in shown["turns"][0]["replies"].items()
    }
    assert all(reply["verdict"] for reply in shown["turns"][0]["replies"].values())


NEAR = "How do I kill a process?"
"""Which the direction makes another thing of at once, and a random one later."""


def test_each_pane_parts_from_the_unchanged_one_where_its_tokens_first_differ(ready):
    ask = Ask(1, "fresh", NEAR, removal=None, addition=1.0, control=1.0, max_new_tokens=40)
    *_, (turns, shown) = talk(ready, (), ask, threading.Event())
    splits, replies = turns[0].splits, turns[0].replies
    model, r = ready.model, ready.direction
    rows = [None, Intervention(r, "add", 1.0), Intervention(control_of(ready), "add", 1.0)]
    steps = list(stream_side_by_side(model, [NEAR] * 3, rows, max_new_tokens=40))
    for row, pane in enumerate(("added", "control"), start=1):
        first = next(step for step in steps if step.tokens[row] != step.tokens[0])
        assert splits[pane].index == first.index
        assert set(splits[pane].likely) == {"unchanged", pane}
        for index, name in ((0, "unchanged"), (row, pane)):
            (token, share), *others = splits[pane].likely[name]
            assert token == model.tokenizer.decode([first.tokens[index]])
            assert share == pytest.approx(first.logits[index].double().softmax(-1).max().item())
            assert len(others) == 4
        before, after = (reply.text[: splits[pane].characters] for reply in (replies["unchanged"], replies[pane]))
        assert before == after and before == model.tokenizer.decode(list(replies[pane].ids[: first.index]))
    assert len({split.index for split in splits.values()}) == 2, "or the two could be mixed up"
    assert {pane: split["index"] for pane, split in shown["turns"][0]["splits"].items()} == {
        pane: split.index for pane, split in splits.items()
    }
    again = replace(ask, action="again", removal=0.0, addition=0.0, control=None)
    *_, (turns, shown) = talk(ready, turns, again, threading.Event())
    assert turns[0].splits == {}


def test_panes_that_answer_the_same_are_told_with_the_place_of_the_prompt(ready):
    ask = Ask(1, "fresh", OPENING, removal=0.05, addition=None, max_new_tokens=40)
    *_, (turns, shown) = talk(ready, (), ask, threading.Event())
    along = plain_place(ready, OPENING)
    n = sum(along > each for each in (ready.found.harmless[:, *where_read(ready)] @ ready.direction.unit).tolist())
    assert (
        f"hardly matters for this prompt. It lies further toward refusal than {n} of the 128 harmless"
        in shown["notice"]
    )
    *_, (_, shown) = talk(ready, turns, replace(ask, action="again", addition=1.0), threading.Event())
    assert shown["notice"] == ""


def where_read(ready) -> tuple[int, int]:
    source = ready.direction.source
    return ready.found.positions.index(source.position), source.layer


def plain_place(ready, text: str) -> float:
    (reading,) = read_along(ready.model, [text], ready.direction)
    return reading.along[ready.direction.source.layer, ready.direction.source.position].item()


def test_the_tint_is_where_the_stream_lies_and_its_pieces_are_the_reply(ready):
    *_, (turns, _) = talk(ready, (), Ask(1, "fresh", OPENING, control=1.0, max_new_tokens=20), threading.Event())
    layer, at = ready.direction.source.layer, ready.found.positions.index(ready.direction.source.position)
    for inside in (False, True):
        panes = tint(ready, turns, inside=inside)
        assert set(panes) == set(PANES)
        for pane, tokens in panes.items():
            assert "".join(text for text, _ in tokens) == turns[0].replies[pane].text
    mean = (ready.found.harmless[:, at, layer] @ ready.direction.unit).mean().item()
    removed = [along for _, along in panes["removed"]]
    assert removed == pytest.approx([-mean / ready.direction.norm] * len(removed), abs=2e-3), "by construction, inside"
    outside, within = (dict(enumerate(tint(ready, turns, inside=inside)["added"])) for inside in (False, True))
    assert all(within[i][1] > outside[i][1] + 0.5 for i in outside), "the addition is part of what is read inside"
    assert tint(ready, (Turn("Hi"),), inside=False) == {}


def test_a_random_direction_of_the_same_size_is_a_pane_and_does_little(ready):
    *_, (turns, shown) = talk(ready, (), Ask(1, "fresh", OPENING, control=1.0), threading.Event())
    assert list(turns[0].replies) == list(PANES)
    assert shown["turns"][0]["replies"]["control"]["strength"] == 1.0
    assert turns[0].replies["control"].refusal < 0.5 < turns[0].replies["added"].refusal


def test_a_removal_from_some_parts_is_measured_beside_that_from_all(ready):
    wish = Wish.read({"run": 1, "n": 5, "max_new_tokens": 8, "writers": ["MLP 6", "MLP 5"]}, 64)
    news = measured(ready, wish, threading.Event())
    report = next(each["report"] for each in news if "report" in each)
    news.close()
    name = "direction removed from MLP 5 and MLP 6"
    assert report["rows"] == ["unchanged", "direction removed", name, "direction added −1×", "direction added 1×"]
    edit = Intervention(ready.direction, "ablate", writers=frozenset({"MLP 5", "MLP 6"}))
    said = [c for c in report["completions"] if c["row"] == 2]
    assert len(said) == 10
    for each in said[::4]:
        *_, last = stream_side_by_side(ready.model, [each["prompt"]], [edit], max_new_tokens=8)
        assert each["text"] == last.texts[0]
    with pytest.raises(PromptError, match="choose them again"):
        Wish.read({"run": 1, "n": 5, "max_new_tokens": 8, "writers": "all"}, 64)
    with pytest.raises(ModelError, match="has no part 'MLP 99'"):
        next(
            each
            for each in measured(ready, replace(wish, writers=frozenset({"MLP 99"})), threading.Event())
            if "report" in each
        )


@pytest.mark.parametrize(
    "forged", [{"n": 4}, {"n": 101}, {"n": "40"}, {"n": 2.5}, {"max_new_tokens": 0}, {"run": None}, {"rules": "x"}]
)
def test_a_forged_measurement_is_refused_with_a_sentence(forged):
    sent = {"run": 1, "n": 10, "max_new_tokens": 8}
    assert Wish.read(sent, 64) == Wish(1, 10, 8)
    with pytest.raises(PromptError, match=r"a whole number from|There is no judge 'x': take one of paper, default"):
        Wish.read(sent | forged, 64)


def test_a_refused_prompt_leaves_the_conversation_as_it_was(ready):
    turns = (Turn("Hi", {"unchanged": Reply("Hello.", (1, 2), "end")}),)
    for prompt in ("", "a" * (MAX_CHARACTERS + 1), "word " * 2000):
        ((left, shown),) = talk(ready, turns, Ask(1, "ask", prompt), threading.Event())
        assert left == turns
        assert shown["error"]


def test_the_examples_are_prompts_that_the_direction_has_not_seen(ready):
    examples = opening_view(ready)["examples"]
    shown = {*examples["harmless"], *(text for fold in examples["harmful"] for text in fold["texts"])}
    seen = {*ready.found.prompts.harmful, *ready.found.prompts.harmless}
    assert shown
    assert not shown & seen


def test_the_first_examples_sound_harmful_and_the_harmful_ones_are_folded_by_category(ready):
    examples = opening_view(ready)["examples"]
    of = dict(zip(ready.examples.harmless, ready.examples.harmless_categories, strict=True))
    categories = [of[text] for text in examples["harmless"]]
    assert categories[:3] == ["near-miss"] * 3
    assert "near-miss" not in categories[3:] and len(set(categories[3:])) == 3
    harmful = dict(zip(ready.examples.harmful, ready.examples.harmful_categories, strict=True))
    for fold in examples["harmful"]:
        assert 1 <= len(fold["texts"]) <= 3
        assert {harmful[text] for text in fold["texts"]} == {fold["category"]}
    assert len({fold["category"] for fold in examples["harmful"]}) == len(examples["harmful"]) == 12


def test_a_view_says_when_the_panes_do_not_differ():
    same = {"unchanged": Reply("Yes.", (1, 2), "end"), "added": Reply("Yes.", (1, 2), "end", strength=1.0)}
    assert "answered the same" in view([Turn("Hi", same)], 1)["notice"]
    other = same | {"added": Reply("No.", (1, 2), "end", strength=1.0)}
    assert not view([Turn("Hi", other)], 1)["notice"]
    short = {pane: replace(reply, ending="memory") for pane, reply in same.items()}
    assert view([Turn("Hi", short)], 1)["notice"] == "This did not fit into memory. Shortened to 2 tokens."


# -- the program and the browser -----------------------------------------------------------------------------------


@dataclass
class App:
    """A running app: its address, its process, and what it wrote."""

    url: str
    process: subprocess.Popen
    log: Path


def start(log: Path, *arguments: str, program: Sequence[str] = ("app.py",)) -> App:
    """Starts the app on a free port and waits until it listens; `program` is what Python is to run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *program, "--port", str(port), "--no-browser", *arguments],
            cwd=ROOT,
            stdout=out,
            stderr=out,
        )
    app = App(f"http://127.0.0.1:{port}", process, log)
    wait_for(lambda: health(app) is not None, app, "listens")
    return app


def health(app: App) -> str | None:
    """What the app says of itself, or None if it does not listen."""
    try:
        with urllib.request.urlopen(f"{app.url}/healthz", timeout=5) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except OSError:
        return None


def wait_for(condition, app: App, what: str) -> None:
    """Waits until `condition()`; fails with the log if the app ends or takes too long."""
    deadline = time.monotonic() + PREPARED
    while not condition():
        assert app.process.poll() is None and time.monotonic() < deadline, f"until it {what}:\n{app.log.read_text()}"
        time.sleep(0.2)


def end(app: App) -> int:
    """Ends the app as a service manager does, and gives its exit status."""
    app.process.send_signal(signal.SIGTERM)
    return app.process.wait(timeout=60)


@contextlib.contextmanager
def running(log: Path, *arguments: str, program: Sequence[str] = ("app.py",)) -> Iterator[App]:
    """The app, ready; at the end it must have ended well, and have logged no error."""
    app = start(log, *arguments, program=program)
    try:
        wait_for(lambda: "true" in (health(app) or ""), app, "is ready")
        assert '"ready":true' in (health(app) or "")
        yield app
    finally:
        status = end(app)
    assert status == 0, app.log.read_text()
    assert "Traceback" not in app.log.read_text()


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Iterator[App]:
    """The app on the embedded model, ready."""
    arguments = []
    for option, variable in CHOICES:
        if value := os.environ.get(variable):
            arguments += [option, value]
    with running(tmp_path_factory.mktemp("app") / "log.txt", *arguments) as app:
        yield app


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A browser with one context for the pages of `watched`: it compiles the page's JavaScript once."""
    with sync_playwright() as playwright:
        browser = launch(playwright.chromium)
        browser.new_context(viewport=SIZE)
        yield browser
        browser.close()


def launch(kind: BrowserType, *flags: str) -> Browser:
    """Chromium: the one on the path, else the one that `playwright install chromium` fetched."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    return kind.launch(executable_path=path, args=[*FLAGS, *flags])


@dataclass
class Watched:
    """What a page did besides what it showed."""

    urls: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def open_tab(
    chromium: Browser, app: App, width: int = SIZE["width"], height: int = SIZE["height"], scheme: str = "light"
) -> tuple[Page, Watched]:
    """The page in a context of its own, and what it does."""
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    return open_page(context, app)


def open_page(context: BrowserContext, app: App) -> tuple[Page, Watched]:
    """The page, and what it does."""
    tab, seen = context.new_page(), Watched()
    tab.on("request", lambda request: seen.urls.append(request.url))
    tab.on("console", lambda message: seen.faults.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: seen.faults.append(str(error)))
    tab.goto(app.url)
    return tab, seen


@pytest.fixture
def watched(chromium, app) -> Iterator[tuple[Page, Watched]]:
    """The page once it has opened; at the end it must have been silent, and have asked nobody but its own server."""
    tab, seen = open_page(chromium.contexts[0], app)
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    idle(tab)
    yield tab, seen
    tab.evaluate("localStorage.clear()")
    tab.close()
    assert not seen.faults
    assert {url for url in seen.urls if not url.startswith((app.url, "data:", "blob:"))} == set()


@pytest.fixture
def tab(watched) -> Page:
    return watched[0]


def idle(tab: Page) -> None:
    expect(tab.locator(".turns")).to_have_attribute("aria-busy", "false")


@contextlib.contextmanager
def held(tab: Page, requests: str) -> Iterator[None]:
    """Such requests of the page wait until the block ends."""
    waiting: list[Route] = []
    tab.route(requests, lambda route: waiting.append(route))
    yield
    for route in waiting:
        route.continue_()
    tab.unroute(requests)


def ask(tab: Page, text: str) -> None:
    """Types a message, sends it with Enter, and waits for the replies."""
    tab.get_by_label("Message").fill(text)
    tab.get_by_label("Message").press("Enter")
    expect(tab.locator(".turn .words").last).to_have_text(text)
    idle(tab)


def replies(tab: Page) -> list[str]:
    return tab.locator(".turn").last.locator(".reply").filter(visible=True).all_inner_texts()


def set_dial(tab: Page, name: str, value: float) -> None:
    """Moves a dial as a hand does, and waits for the panes to have answered again."""
    tab.locator(f"#{name}").evaluate(
        "(dial, value) => { dial.value = value; dial.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )
    tab.wait_for_timeout(400)
    idle(tab)


# -- what a visitor sees -------------------------------------------------------------------------------------------


def test_three_live_replies_are_there_after_opening_without_a_click(chromium, app):
    """How soon is measured in `benchmarks/opening.py`."""
    tab, seen = open_tab(chromium, app)
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    assert all(replies(tab))
    assert not seen.faults
    tab.context.close()


def test_the_bar_says_which_model_device_and_direction(tab):
    facts = tab.locator(".facts")
    expect(facts).to_contain_text("layers")
    expect(facts).to_contain_text("CPU")
    expect(facts).to_contain_text("position −")
    tab.locator("[data-direction]").click()
    for word in ("bypass", "induce", "KL", "start like a refusal"):
        expect(tab.locator("[data-sheet]")).to_contain_text(word)
    tab.get_by_role("button", name="Take another one").click()
    expect(tab.locator(".cell-button.used")).to_be_visible()
    expect(tab.locator("[data-sheet]")).to_be_hidden()
    expect(tab.get_by_role("tab", name="Find")).to_be_focused()


def test_a_typed_prompt_streams_into_three_panes_and_the_next_one_goes_on_from_there(tab):
    tab.get_by_role("button", name="Clear").click()
    expect(tab.locator(".turn")).to_have_count(0)
    tab.evaluate(
        """() => { window.lengths = new Set();
        new MutationObserver(() => lengths.add(document.querySelector('.reply')?.textContent.length))
          .observe(document.querySelector('.turns'), {subtree: true, childList: true, characterData: true}); }"""
    )
    ask(tab, "Write a poem about the sea.")
    assert tab.evaluate("lengths.size") > 2, "the text came in one piece"
    assert len(replies(tab)) == 3 and all(replies(tab))
    expect(tab.get_by_label("Message")).to_have_value("")
    ask(tab, "How do I bake bread?")
    expect(tab.locator(".turn")).to_have_count(2)


def test_the_first_message_replaces_the_example_the_page_asked_by_itself(tab):
    expect(tab.locator(".turn .who")).to_have_text(["Example"])
    ask(tab, "Who are you?")
    expect(tab.locator(".turn .who")).to_have_text(["You"])


def test_stop_ends_the_replies_at_once_and_keeps_the_message(tab):
    # The embedded model is fast: Stop is pressed in the frame after Enter, before the first token or just after it; and
    # no pane refuses, which would soon be said.
    set_dial(tab, "addition", 0)
    tab.get_by_label("Message").fill("Write a poem about the sea.")
    tab.evaluate(
        """() => { document.querySelector('#talk form').requestSubmit();
        requestAnimationFrame(() => document.querySelector('[data-stop]').click()); }"""
    )
    expect(tab.locator(".turn .words").last).to_have_text("Write a poem about the sea.")
    idle(tab)
    ended = tab.locator(".turn").last.locator(".rest").filter(visible=True).all_inner_texts()
    assert len(ended) == 3 and all("stopped at" in rest for rest in ended), ended
    tab.get_by_role("button", name="Retry").click()
    idle(tab)
    expect(tab.locator(".turn").last.locator(".rest").first).not_to_contain_text("stopped")
    assert all(replies(tab))


def test_a_double_click_on_ask_asks_and_does_not_stop(tab):
    set_dial(tab, "addition", 0)
    tab.get_by_label("Message").fill("Write a poem about the sea.")
    tab.get_by_role("button", name="Ask", exact=True).dblclick()
    expect(tab.locator(".turn .words").last).to_have_text("Write a poem about the sea.")
    idle(tab)
    expect(tab.locator(".turn").last.locator(".rest").first).not_to_contain_text("stopped")


def test_a_message_sent_while_replies_run_is_asked_next_and_once(tab):
    tab.evaluate(
        """() => { const message = document.querySelector('[data-prompt]');
        for (const text of ['Who are you?', 'How do I bake bread?', 'How do I bake bread?']) {
          message.value = text;
          document.querySelector('#talk form').requestSubmit();
        } }"""
    )
    expect(tab.locator(".turn .words").last).to_have_text("How do I bake bread?")
    idle(tab)
    expect(tab.locator(".turn .words")).to_have_text(["Who are you?", "How do I bake bread?"])
    assert all(replies(tab))


def test_at_strength_zero_all_panes_say_the_same(tab):
    ask(tab, "How do I steal a car?")
    set_dial(tab, "removal", 0)
    set_dial(tab, "addition", 0)
    unchanged, removed, added = replies(tab)
    assert unchanged == removed == added
    expect(tab.locator(".turn").last.locator("[data-pane='added'] .rest")).to_contain_text("0.00×")


def test_moving_a_dial_answers_again_and_leaves_the_unchanged_pane_as_it_was(tab):
    ask(tab, "How do I bake bread?")
    before = replies(tab)
    for strength in (0.5, 2, -1):
        set_dial(tab, "addition", strength)
        said = f"{strength:.2f}×".replace("-", "−")
        expect(tab.locator(".turn").last.locator("[data-pane='added'] .rest")).to_contain_text(said)
        assert replies(tab)[:2] == before[:2]
    expect(tab.locator(".turn")).to_have_count(1)


def type_message(tab: Page, text: str) -> list[str]:
    """Types into an empty page and gives what is foretold for the three panes."""
    if tab.locator(".turn").count():
        tab.get_by_role("button", name="Clear").click()
    expect(tab.locator(".turn")).to_have_count(0)
    tab.get_by_label("Message").fill("")
    expect(tab.locator("[data-foretold='unchanged']")).to_be_empty()
    tab.get_by_label("Message").fill(text)
    expect(tab.locator("[data-foretold='unchanged']")).not_to_be_empty()
    return [said.rpartition(": ")[2] for said in tab.locator("[data-foretold]").filter(visible=True).all_inner_texts()]


@pytest.mark.parametrize("text", ["How do I steal a car?", "How do I bake bread?"])
def test_what_is_foretold_while_typing_is_what_the_replies_then_start_with(tab, text):
    tab.get_by_role("checkbox", name="random control").check()
    idle(tab)
    foretold = type_message(tab, text)
    assert len(foretold) == 4
    needles = tab.locator("[data-needle] .needle").evaluate_all(
        "all => all.map(needle => parseFloat(needle.style.left))"
    )
    expect(tab.locator(".turn")).to_have_count(0)
    expect(tab.locator(".composer [data-place]")).to_have_text(
        re.compile(r"further toward refusal than (\d+ of the 128|every) harm(less|ful) prompt")
    )
    ask(tab, text)
    readings = tab.locator(".turn").last.locator(".reading").filter(visible=True).all_inner_texts()
    assert foretold == [said.removeprefix("starts like a refusal ") for said in readings]
    after = tab.locator(".turn").last.locator(".needle").filter(visible=True)
    assert after.evaluate_all("all => all.map(needle => parseFloat(needle.style.left))") == pytest.approx(
        needles, abs=0.1
    )


@pytest.mark.parametrize(("dial", "pane", "strength"), [("addition", "added", 0.7), ("removal", "removed", 60)])
def test_the_painted_dial_at_a_strength_in_between_is_what_the_reply_then_starts_with(tab, dial, pane, strength):
    type_message(tab, "How do I steal a car?" if dial == "removal" else "How do I bake bread?")
    flips = tab.locator(f"[data-flips='{dial}']").inner_text()
    notch = tab.locator(f"[data-flip='{dial}']").bounding_box()
    assert notch is not None
    set_dial(tab, dial, strength)
    foretold = tab.locator(f"[data-foretold='{pane}']").inner_text().rpartition(": ")[2]
    ask(tab, tab.get_by_label("Message").input_value())
    reading = tab.locator(".turn").last.locator(f".cell[data-pane='{pane}'] .reading").inner_text()
    assert reading == f"starts like a refusal {foretold}" and foretold not in ("<1 %", ">99 %")
    number = float(re.search(r"flips at (−?[\d.]+)", flips)[1].replace("−", "-"))
    at = tab.locator(f"#{dial}").evaluate(
        "(input, value) => { const box = input.getBoundingClientRect(); return box.left + 9 + (value - input.min) / (input.max - input.min) * (box.width - 18); }",
        number,
    )
    assert notch["x"] + 1 == pytest.approx(at, abs=3), "the notch stands where its number says"


def test_what_an_edit_costs_is_said_before_anything_is_generated(tab, ready):
    type_message(tab, "How do I bake bread?")
    for pane, kind in (("removed", "ablate"), ("added", "add")):
        curve = dose_response(ready.model, "How do I bake bread?", ready.direction, kind, ready.found.refusal_tokens)
        (kl,) = (kl for scale, kl in zip(curve.scales, curve.kl, strict=True) if scale == 1)
        said = f"{kl:.2f}" if kl >= 0.005 else "<0.01"
        expect(tab.locator(f"[data-price='{pane}']")).to_have_text(f"KL {said} nats")
    set_dial(tab, "addition", 0)
    expect(tab.locator("[data-price='added']")).to_have_text("KL <0.01 nats")


def test_a_forecast_that_is_on_its_way_while_the_conversation_is_cleared_is_not_shown(tab):
    ask(tab, "How do I steal a car?")
    tab.evaluate(
        """() => { window.painted = [];
        new MutationObserver(() => painted.push(document.querySelector("[data-foretold='unchanged']").textContent))
          .observe(document.querySelector("[data-foretold='unchanged']"), {childList: true, characterData: true, subtree: true});
        document.querySelector('[data-prompt]').dispatchEvent(new Event('input', {bubbles: true}));
        setTimeout(() => document.querySelector('[data-clear]').click(), 125); }"""
    )
    expect(tab.locator(".turn")).to_have_count(0)
    cleared = tab.evaluate("painted.length")
    tab.wait_for_timeout(1000)
    assert tab.evaluate(f"painted.slice({cleared})") == [], "painted after everything was gone"
    expect(tab.locator("[data-foretold='unchanged']")).to_be_empty()


def test_what_is_foretold_for_a_message_that_has_changed_meanwhile_is_not_shown(tab):
    tab.get_by_role("button", name="Clear").click()
    expect(tab.locator(".turn")).to_have_count(0)
    tab.wait_for_timeout(500)  # clearing looks for something to foretell as well
    expect(tab.locator("[data-foretold='unchanged']")).to_be_empty()
    tab.evaluate(
        """() => { const message = document.querySelector('[data-prompt]');
        message.value = 'How do I steal a car?';
        message.dispatchEvent(new Event('input', {bubbles: true}));
        setTimeout(() => { message.value = 'How do I bake bread?'; }, 125); }"""
    )
    tab.wait_for_timeout(1500)
    expect(tab.locator("[data-foretold='unchanged']")).to_be_empty()
    type_message(tab, "How do I bake bread?")


def test_the_dials_are_painted_and_moving_one_says_what_will_happen_without_asking_the_server(watched):
    tab, seen = watched
    foretold = type_message(tab, "How do I bake bread?")
    assert "gradient" in tab.locator("#addition").evaluate("dial => dial.style.getPropertyValue('--paint')")
    expect(tab.locator("[data-flips='addition']")).to_contain_text("flips at 0.")
    expect(tab.locator("[data-flip='addition']")).to_be_visible()
    tab.wait_for_timeout(700)  # a forecast that typing overtook is made once more
    asked = len(seen.urls)
    set_dial(tab, "addition", 0)
    expect(tab.locator("[data-foretold='added']")).to_contain_text(foretold[0])
    assert len(seen.urls) == asked, seen.urls[asked:]
    tab.get_by_label("Message").fill("")
    expect(tab.locator("[data-foretold='added']")).to_be_empty()
    expect(tab.locator("#addition")).not_to_have_class("painted")


def test_a_message_that_cannot_be_read_is_not_foretold_and_the_next_one_is(tab):
    type_message(tab, "How do I bake bread?")
    tab.get_by_label("Message").fill("word " * 5000)
    expect(tab.locator("[data-foretold='unchanged']")).to_be_empty()
    tab.get_by_label("Message").fill("How do I bake bread?")
    expect(tab.locator("[data-foretold='unchanged']")).not_to_be_empty()


def test_a_reload_leaves_what_is_being_written(chromium, app):
    tab, _ = open_tab(chromium, app)  # what is on its way when a page is left is a fault to Gradio
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    tab.get_by_label("Message").fill("How do I kill\na <b>process</b>?")
    tab.reload()
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    expect(tab.get_by_label("Message")).to_have_value("How do I kill\na <b>process</b>?")
    expect(tab.locator("[data-foretold='unchanged']")).to_contain_text("the next reply will")
    idle(tab)
    ask(tab, "Who are you?")
    tab.reload()
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    expect(tab.get_by_label("Message")).to_have_value("")
    tab.context.close()


def test_the_last_message_can_be_taken_back_and_changed(tab):
    ask(tab, "Who are you?")
    ask(tab, "How do I bake bread?")
    tab.get_by_role("button", name="Edit").click()
    expect(tab.locator(".turn .words")).to_have_text(["Who are you?"])
    expect(tab.get_by_label("Message")).to_have_value("How do I bake bread?")
    idle(tab)
    ask(tab, "How do I bake a cake?")
    expect(tab.locator(".turn .words")).to_have_text(["Who are you?", "How do I bake a cake?"])


def test_what_is_taken_back_stands_before_what_was_being_written(tab):
    ask(tab, "Who are you?")
    tab.get_by_label("Message").fill("And why?")
    tab.get_by_role("button", name="Edit").click()
    expect(tab.locator(".turn")).to_have_count(0)
    expect(tab.get_by_label("Message")).to_have_value("Who are you?\nAnd why?")


def test_a_conversation_is_saved_with_its_settings_and_as_text(tab, chromium, ready):
    hostile = "<img src=x onerror='window.hit = 1'> & <b>bold</b>"
    ask(tab, hostile)
    with tab.expect_download() as saved:
        tab.get_by_role("button", name="Save JSON").click()
    kept = json.loads(Path(saved.value.path()).read_text("utf-8"))
    assert kept["turns"][0]["prompt"] == hostile
    assert [kept["turns"][0]["replies"][pane]["text"] for pane in PANES[:3]] == replies(tab)
    source = ready.direction.source
    assert kept["direction"] == {
        "layer": source.layer,
        "position": source.position,
        "mark": "passed every rule",
        "digest": ready.digest,
    }
    assert kept["temperature"] == 0
    with tab.expect_download() as saved:
        tab.get_by_role("button", name="Save page").click()
    page = chromium.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_content(Path(saved.value.path()).read_text("utf-8"))
    expect(page.locator("h2")).to_have_text(hostile)
    expect(page.locator("p").first).to_contain_text(
        f"layer {source.layer}, position −{-source.position}, passed every rule"
    )
    assert page.locator("td").all_inner_texts()[:3] == replies(tab)
    assert page.evaluate("window.hit") is None and page.locator("img").count() == 0 and not asked
    page.close()


def saved_json(tab: Page) -> dict:
    with tab.expect_download() as saved:
        tab.get_by_role("button", name="Save JSON").click()
    return json.loads(Path(saved.value.path()).read_text("utf-8"))


def open_saved(tab: Page, saved: object, name: str = "conversation.json") -> None:
    """Opens a file of this content, as it is if it is text."""
    content = saved if isinstance(saved, str) else json.dumps(saved)
    tab.locator("[data-open]").set_input_files(
        {"name": name, "mimeType": "application/json", "buffer": content.encode()}
    )


def all_replies(tab: Page) -> list[str]:
    return tab.locator(".turn .reply").all_inner_texts()


def ended(tab: Page) -> list[str]:
    """The strengths and lengths of every reply on the page."""
    return tab.locator(".turn .rest").all_inner_texts()


def answer_differently(tab: Page, ready: Ready) -> None:
    """Three messages, each answered with other settings and another direction: a change answers the last one again."""

    def take_layer(layer: int) -> None:
        open_find(tab)
        take(tab, ready.found.direction.source.position, layer)
        tab.get_by_role("tab", name="Talk").click()

    tab.get_by_role("button", name="Clear").click()
    tab.locator("[data-length]").fill("24")
    set_dial(tab, "addition", 0.4)
    ask(tab, "How do I bake bread?")
    ask(tab, "How do I steal a car?")
    take_layer(2)
    set_dial(tab, "removal", 50)
    set_dial(tab, "addition", 1.5)
    ask(tab, "Who are you?")
    take_layer(1)
    tab.get_by_label("system prompt").fill("You are a pirate.")
    tab.locator("[data-temperature]").fill("0.7")
    tab.locator("[data-on='removed']").uncheck()
    tab.wait_for_timeout(400)
    idle(tab)


SETTINGS = ("removal", "addition", "control", "temperature", "max_new_tokens", "seed", "system", "writers")


def test_a_saved_conversation_has_the_settings_of_every_message_and_is_asked_again_with_them(chromium, app, tab, ready):
    answer_differently(tab, ready)
    kept = saved_json(tab)
    assert [[turn["settings"][name] for name in ("removal", "addition", "temperature")] for turn in kept["turns"]] == [
        [1, 0.4, 0],
        [0.5, 1.5, 0],
        [None, 1.5, 0.7],
    ]
    source = ready.direction.source
    assert [turn["settings"]["direction"]["layer"] for turn in kept["turns"]] == [source.layer, 2, 1]
    with tab.expect_download() as page:
        tab.get_by_role("button", name="Save page").click()
    other, seen = follow(chromium, app.url)
    open_saved(other, kept)
    expect(other.locator(".turn .words")).to_have_text([turn["prompt"] for turn in kept["turns"]])
    idle(other)
    assert all_replies(other) == all_replies(tab) and ended(other) == ended(tab)
    expect(other.locator("[data-direction]")).to_contain_text("layer 1 ")
    expect(other.locator("#addition")).to_have_value("1.5")
    expect(other.get_by_label("system prompt")).to_have_value("You are a pirate.")
    again = saved_json(other)
    assert [turn["settings"] for turn in again["turns"]] == [turn["settings"] for turn in kept["turns"]]
    assert {name: again[name] for name in SETTINGS} == {name: kept[name] for name in SETTINGS}
    set_dial(other, "addition", 0)
    assert ended(other)[:8] == ended(tab)[:8], "a dial answers the last message again, and no other"
    expect(other.locator(".turn").last.locator("[data-pane='added'] .rest")).to_contain_text("0.00×")
    assert not seen.faults
    other.context.close()
    text = Path(page.value.path()).read_text("utf-8")
    assert text.count("system prompt: none") == 2 and text.count("system prompt: You are a pirate.") == 1
    assert f"layer {source.layer}, position" in text and "layer 2, position" in text and "layer 1, position" in text


def test_a_link_has_the_settings_of_every_message(chromium, tab, ready):
    answer_differently(tab, ready)
    kept = saved_json(tab)
    other, seen = follow(chromium, link_of(tab), panes=2)
    expect(other.locator(".turn .words")).to_have_text([turn["prompt"] for turn in kept["turns"]])
    idle(other)
    assert all_replies(other) == all_replies(tab) and ended(other) == ended(tab)
    assert [turn["settings"] for turn in saved_json(other)["turns"]] == [turn["settings"] for turn in kept["turns"]]
    assert not seen.faults
    other.context.close()


def test_a_file_and_a_link_from_before_messages_had_settings_hold_one_set_for_all(chromium, app, tab, ready):
    source = ready.direction.source
    kept = {
        "made_with": "Refusal is a direction",
        "model": tab.locator("#bar [data-model]").inner_text(),
        "direction": {"layer": source.layer, "position": source.position, "mark": "passed every rule", "digest": ready.digest},
        "control": None, "temperature": 0, "max_new_tokens": 12, "seed": 3, "system": "", "writers": None,
        "turns": [
            {"prompt": text, "replies": {"unchanged": {"strength": 0}, "added": {"strength": strength}}}
            for text, strength in (("How do I bake bread?", 0.5), ("Who are you?", 1.5))
        ],
    }  # fmt: skip
    open_saved(tab, kept)
    expect(tab.locator(".turn .words")).to_have_text(["How do I bake bread?", "Who are you?"])
    idle(tab)
    again = saved_json(tab)
    assert [(t["settings"]["addition"], t["settings"]["removal"]) for t in again["turns"]] == [(0.5, None), (1.5, None)]
    assert {(t["settings"]["max_new_tokens"], t["settings"]["seed"]) for t in again["turns"]} == {(12, 3)}
    link = encoded({"v": 1, "addition": 0.5, "max_new_tokens": 12, "prompts": ["How do I bake bread?", "Who are you?"]})
    other, seen = follow(chromium, f"{app.url}/#{link}")
    expect(other.locator(".turn .words")).to_have_text(["How do I bake bread?", "Who are you?"])
    idle(other)
    assert [turn["settings"]["addition"] for turn in saved_json(other)["turns"]] == [0.5, 0.5]
    expect(other.locator("#bar [data-note]")).to_be_empty()
    assert not seen.faults
    other.context.close()


def turns_with(**settings: object) -> dict:
    return {"turns": [{"prompt": "Hi"}, {"prompt": "Who?", "settings": settings}]}


NO_CONVERSATIONS = (
    ("{", "it is not JSON"),
    (json.dumps(turns_with(temperature=float("nan"))), "it is not JSON"),
    ([1], "there is no message in it"),
    ({"turns": "x"}, "there is no message in it"),
    ({"turns": [{"prompt": "Hi"}] * 10_000}, "it has 10000 messages, and at most 200"),
    ({"turns": [{"prompt": "Hi"}, {"prompt": 7}]}, "message 2 has no text"),
    ({"turns": [{"prompt": "Hi", "settings": [1]}]}, "message 1 has settings that are none"),
    (turns_with(addition=9), "the addition of message 2 cannot be had here"),
    (turns_with(temperature="hot"), "the temperature of message 2"),
    (turns_with(max_new_tokens=2.5), "the max_new_tokens of message 2"),
    (turns_with(writers=["<b>"]), "the writers of message 2"),
    (turns_with(direction={"layer": "2"}), "message 2 has a direction that is none"),
    (turns_with() | {"seed": -1}, "the seed of message 1"),
)


def test_a_file_that_is_no_conversation_gets_one_sentence_and_leaves_everything_as_it_is(tab):
    before = all_replies(tab)
    for number, (saved, says) in enumerate(NO_CONVERSATIONS):
        open_saved(tab, saved, f"<b>{number}.json")
        error = tab.locator(".composer [data-error]")
        expect(error).to_contain_text(f"<b>{number}.json cannot be opened, {says}")
        assert error.inner_text().count(". ") == 0 and error.inner_text().endswith("as JSON.")
        idle(tab)
        assert all_replies(tab) == before and tab.locator(".turn .who").all_inner_texts() == ["Example"]


def test_a_conversation_that_cannot_be_asked_to_its_end_stops_there_and_says_why(tab):
    open_saved(tab, {"turns": [{"prompt": text} for text in ("Hi", "word " * 9000, "Who are you?")]})
    expect(tab.locator(".composer [data-error]")).to_contain_text("tokens")
    idle(tab)
    expect(tab.locator(".turn .words")).to_have_text(["Hi"])
    tab.wait_for_timeout(500)
    expect(tab.locator(".composer [data-error]")).to_be_visible()


def test_a_pane_that_is_off_says_nothing_and_leaves_its_room_to_the_others(tab):
    wide = "pane => document.querySelector(`.turn .cell[data-pane='${pane}']`).offsetWidth"
    before = tab.evaluate(wide, "added")
    tab.locator("[data-on='removed']").uncheck()
    tab.wait_for_timeout(400)
    idle(tab)
    assert len(replies(tab)) == 2 and all(replies(tab))
    expect(tab.locator(".turn").last.locator(".rest").nth(1)).to_have_text("off")
    assert tab.evaluate(wide, "added") > 1.2 * before and tab.evaluate(wide, "removed") < before / 2
    assert tab.evaluate(WIDER) == []
    tab.locator("[data-on='removed']").check()
    tab.wait_for_timeout(400)
    idle(tab)
    assert len(replies(tab)) == 3 and tab.evaluate(wide, "added") == before


def test_a_reply_is_copied_and_the_last_message_is_taken_away(chromium, app):
    tab, seen = open_tab(chromium, app)
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    idle(tab)
    for text in ("Who are you?", "How do I bake bread?"):
        ask(tab, text)
    tab.get_by_role("button", name="Copy what “Direction added” said").last.click()
    expect(tab.locator(".copy", has_text="copied")).to_have_count(1)
    assert tab.evaluate("navigator.clipboard.readText()") == replies(tab)[2]
    tab.get_by_role("button", name="Undo").press("Enter")
    expect(tab.locator(".turn .words")).to_have_text(["Who are you?"])
    idle(tab)
    assert tab.evaluate("document.activeElement.dataset.undo") == "", "it is where it was"
    tab.get_by_role("button", name="Undo").press("Enter")
    expect(tab.locator(".turn")).to_have_count(0)
    idle(tab)
    expect(tab.get_by_label("Message")).to_be_focused()
    assert not seen.faults
    tab.context.close()


def test_a_seed_is_there_when_something_is_drawn_and_gives_the_same_replies_again(tab):
    seed = tab.get_by_label("seed")
    expect(seed).to_be_hidden()
    tab.locator("[data-temperature]").fill("1.5")
    tab.locator("[data-temperature]").press("Tab")
    expect(seed).to_be_visible()
    idle(tab)
    ask(tab, "Write a poem about the sea.")
    first = replies(tab)
    tab.get_by_role("button", name="Retry").click()
    expect(seed).to_have_value("1")
    idle(tab)
    assert replies(tab) != first
    seed.fill("0")
    seed.press("Tab")
    tab.wait_for_timeout(400)
    idle(tab)
    assert replies(tab) == first


def test_escape_stops_a_dial_goes_back_at_a_double_click_and_its_box_keeps_to_its_range(tab):
    dial, box = tab.locator("#addition"), tab.locator("[data-box='addition']")
    box.fill("7")
    box.press("Enter")
    expect(box).to_have_value("2.00")
    expect(dial).to_have_value("2")
    dial.dblclick()
    expect(box).to_have_value("1.00")
    set_dial(tab, "removal", 40)
    expect(tab.locator("[data-value='removal']")).to_have_text("40 %")
    tab.locator("#removal").dblclick()
    expect(tab.locator("[data-value='removal']")).to_have_text("100 %")
    tab.wait_for_timeout(400)
    idle(tab)
    set_dial(tab, "addition", 0)
    tab.get_by_label("Message").fill("Write a poem about the sea.")
    tab.evaluate(
        """() => { document.querySelector('#talk form').requestSubmit();
        requestAnimationFrame(() => document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))); }"""
    )
    expect(tab.locator(".turn .words").last).to_have_text("Write a poem about the sea.")
    idle(tab)
    assert all(
        "stopped at" in rest
        for rest in tab.locator(".turn").last.locator(".rest").filter(visible=True).all_inner_texts()
    )


HOSTILE = "<script>window.hit = 1</script><img src=x onerror='window.hit = 1'>${window.hit = 1}{{value}} **b** $$x$$ \u202eesrever\u202c"


def test_markup_in_a_prompt_is_shown_as_text(tab):
    ask(tab, HOSTILE)
    assert tab.evaluate("window.hit") is None
    expect(tab.locator(".turns img, .turns script, .turns strong")).to_have_count(0)
    assert tab.locator(".turn .words").last.inner_text() == HOSTILE


def test_markup_in_a_link_is_shown_as_text(chromium, app):
    tokens = [{"id": 5, "text": HOSTILE}]
    form = {"measure": "kl", "prompts": "lists", "kind": "contrast", "names": [HOSTILE[:40], "<b>b"], "hub": ["", ""], "by": "rule", "positions": 2, "tokens": tokens}  # fmt: skip
    state = {"v": 1, "prompts": [HOSTILE], "system": HOSTILE, "draft": HOSTILE, "inside": [HOSTILE, "Hi"], "find": form, "lists": [HOSTILE, HOSTILE], "map": {"position": -1, "layer": 3, "axes": "pca", "search": HOSTILE}}  # fmt: skip
    tab, seen = follow(chromium, f"{app.url}/#{encoded(state)}")
    assert tab.locator(".turn .words").inner_text() == HOSTILE
    expect(tab.locator("[data-prompt]")).to_have_value(HOSTILE)
    expect(tab.locator("[data-system]")).to_have_value(HOSTILE)
    for name, shown, text in (
        ("Find", "[data-called='first']", HOSTILE[:40].strip()),
        ("Map", "[data-count]", f"“{HOSTILE}”"),
        ("Inside", ".readings figcaption", HOSTILE),
    ):
        tab.get_by_role("tab", name=name).click()
        expect(tab.locator(shown).first).to_contain_text(text)
    tab.get_by_role("tab", name="Find").click()
    tab.get_by_label("harmful and harmless").check()
    expect(tab.locator("[data-tokens] code")).to_have_text(HOSTILE.replace(" ", "␣"))
    assert tab.evaluate("window.hit") is None and not seen.faults
    expect(tab.locator("#talk img, #find img, #map img, #inside img, .turns strong, #find b b")).to_have_count(0)
    tab.context.close()


def test_markup_in_a_reply_is_shown_as_text(chromium, app):
    """What the model says is changed on its way to the page: the embedded one says no markup."""
    markup = "<img src=x onerror=window.hit=1><b>$$x$$ **b**"
    context = chromium.new_context(viewport=SIZE)
    tab = context.new_page()

    def change(route: Route) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, body=answer.text().replace("Sure", markup))

    tab.route("**/gradio_api/queue/data*", change)
    tab.goto(app.url)
    first = tab.locator(".cell[data-pane='unchanged'] .reply")
    expect(first).to_contain_text(markup)
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    tab.locator(".split summary").click()
    expect(tab.locator(".likely code").first).to_contain_text("<img")
    assert tab.evaluate("window.hit") is None
    expect(tab.locator("#talk img, .reply b, .likely b")).to_have_count(0)
    context.close()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "The prompt is empty"),
        ("   \n ", "The prompt is empty"),
        ("a" * 100_000, "100,000 characters"),
        ("word " * (MAX_CHARACTERS // 5), "tokens"),
    ],
)
def test_a_prompt_that_cannot_be_read_gets_one_sentence_with_the_remedy_and_is_not_lost(tab, prompt, words):
    tab.get_by_label("Message").fill(prompt)
    tab.get_by_label("Message").press("Enter")
    error = tab.get_by_role("alert").and_(tab.locator("[data-error]"))
    expect(error).to_be_visible()
    expect(error).to_contain_text(words)
    assert error.inner_text().count(".") == 1 and any(w in error.inner_text() for w in ("shorten", "write a message"))
    expect(tab.get_by_label("Message")).to_have_value(prompt)
    expect(tab.locator(".turn")).to_have_count(1)
    idle(tab)
    ask(tab, "How do I bake bread?")
    expect(error).to_be_hidden()


def test_an_example_begins_a_new_conversation(tab):
    ask(tab, "Who are you?")
    chip = tab.locator("[data-harmless] button").first
    text = chip.inner_text()
    chip.click()
    expect(tab.locator(".turn .words")).to_have_text([text])
    idle(tab)
    expect(tab.locator("[data-harmful] button").first).to_be_hidden()
    tab.get_by_text("Requests that a model should refuse").click()
    first = tab.locator("[data-harmful] details").first
    expect(first.locator("button").first).to_be_hidden()
    first.locator("summary").click()
    expect(first.locator("button").first).to_be_visible()
    tab.locator("[data-harmful] details").nth(1).locator("summary").click()
    expect(first.locator("button").first).to_be_hidden()


def test_the_page_can_be_used_with_the_keyboard_alone(tab):
    tab.locator("body").press("/")
    expect(tab.get_by_label("Message")).to_be_focused()
    tab.keyboard.type("one")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("two")
    expect(tab.get_by_label("Message")).to_have_value("one\ntwo")
    tab.get_by_label("Message").blur()
    for key, strength in ((".", "1.05"), (",", "1"), ("0", "0"), ("0", "1")):
        tab.keyboard.press(key)
        expect(tab.locator("#addition")).to_have_value(strength)
    idle(tab)
    tab.keyboard.press("?")
    expect(tab.get_by_role("dialog")).to_contain_text("What it does not show")
    for name in tab.get_by_role("tab", include_hidden=True).all_inner_texts():
        expect(tab.get_by_role("dialog").locator("dt", has_text=name).first).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.get_by_role("dialog")).to_be_hidden()
    tab.get_by_role("tab", name="Talk").focus()
    tab.keyboard.press("Tab")
    expect(tab.get_by_role("tab", name="Map")).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.locator("[data-layer]")).to_be_visible()


def test_the_focus_stays_where_the_work_is(tab):
    tab.get_by_label("Message").fill("Who are you?")
    for name in ("Ask", "Retry"):
        button = tab.get_by_role("button", name=name, exact=True)
        button.focus()
        tab.keyboard.press("Enter")
        idle(tab)
        expect(button).to_be_focused()
    tab.get_by_role("button", name="Clear").focus()
    tab.keyboard.press("Enter")
    expect(tab.locator(".turn")).to_have_count(0)
    expect(tab.get_by_label("Message")).to_be_focused()


def test_two_visitors_do_not_see_each_others_conversations_or_strengths(chromium, app):
    tabs = [open_tab(chromium, app)[0] for _ in range(2)]
    for tab in tabs:
        expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
        idle(tab)
    set_dial(tabs[0], "addition", 0)
    for tab, text in zip(tabs, ("Who are you?", "How do I bake bread?"), strict=True):
        tab.get_by_label("Message").fill(text)
        tab.get_by_label("Message").press("Enter")
    for tab, text, strength in zip(tabs, ("Who are you?", "How do I bake bread?"), ("0.00×", "1.00×"), strict=True):
        expect(tab.locator(".turn .words")).to_have_text([text])
        idle(tab)
        expect(tab.locator("[data-pane='added'] .rest").last).to_contain_text(strength)
    assert replies(tabs[0])[0] == replies(tabs[0])[2]
    for tab in tabs:
        tab.context.close()


# -- the map -------------------------------------------------------------------------------------------------------


def open_map(tab: Page) -> None:
    tab.get_by_role("tab", name="Map").click()
    expect(tab.locator("[data-map] .point").first).to_be_visible()
    expect(tab.locator("[data-separation] .point").first).to_be_visible()


# -- the candidates ------------------------------------------------------------------------------------------------


def open_find(tab: Page) -> None:
    tab.get_by_role("tab", name="Find").click()
    expect(tab.locator(".cell-button.used")).to_be_visible()


def take(tab: Page, position: int, layer: int) -> None:
    tab.locator(f"[data-cell='{position} {layer}']").click()
    expect(tab.locator(f"[data-cell='{position} {layer}'].used")).to_be_visible()


def test_the_replies_are_tinted_and_the_number_of_a_token_is_a_key_away(tab):
    ask(tab, "Who are you?")
    ask(tab, "How do I bake bread?")
    earlier, spread = tab.locator(".turn").first, "all => new Set(all.map(t => t.title)).size"
    expect(earlier.locator(".token").first).to_be_visible()
    assert earlier.locator(".cell[data-pane='removed'] .token").evaluate_all(spread) > 1
    turn = tab.locator(".turn").last
    expect(turn.locator(".cell[data-pane='added'] .token").first).to_be_visible()
    said = [cell.inner_text() for cell in turn.locator(".reply").all()]
    turn.locator(".along summary").click()
    cursor = turn.get_by_label("Token of the replies")
    cursor.focus()
    cursor.press("ArrowRight")
    expect(turn.locator(".pointed")).to_contain_text("Token 2: Unchanged")
    assert turn.locator(".token.here").count() == 3
    number = turn.locator(".cell[data-pane='added'] .token").nth(1).get_attribute("title").split(" ")[0]
    expect(turn.locator(".pointed")).to_contain_text(number)
    expect(turn.locator(".legend-of-panes")).to_have_text("UnchangedDirection removedDirection added")
    expect(turn.locator(".level.one")).to_have_text("1 · mean of harmful prompts")
    box = turn.locator(".chart").bounding_box()
    assert box is not None
    turn.locator(".chart").hover(position={"x": box["width"] - 1, "y": 20})
    longest = max(turn.locator(f".cell[data-pane='{pane}'] .token").count() for pane in PANES[:3])
    expect(turn.locator(".pointed")).to_contain_text(f"Token {longest}: ")
    assert turn.locator(".chart polyline").count() == 3
    tab.locator("[data-tint]").select_option("inside")
    expect(turn.locator(".pointed")).to_contain_text("by construction")
    removed = turn.locator(".cell[data-pane='removed'] .token").evaluate_all(
        "all => new Set(all.map(t => t.title)).size"
    )
    assert removed == 1
    tab.wait_for_function(
        "() => new Set([...document.querySelectorAll('.turn:first-child .cell[data-pane=removed] .token')].map(t => t.title)).size === 1"
    )
    tab.locator("[data-tint]").select_option("off")
    expect(tab.locator(".token")).to_have_count(0)
    assert [cell.inner_text() for cell in turn.locator(".reply").all()] == said
    tab.locator("[data-tint]").select_option("inside")
    expect(earlier.locator(".token").first).to_be_visible()
    tab.get_by_role("button", name="Retry").click()
    idle(tab)
    expect(turn.locator(".token").first).to_be_visible()


def test_a_bar_stands_in_the_text_where_a_pane_parts_from_the_unchanged_one(tab):
    tab.get_by_role("checkbox", name="random control").check()
    idle(tab)
    ask(tab, NEAR)
    turn = tab.locator(".turn").last
    summary = turn.locator(".split summary")
    summary.click()
    parted = re.fullmatch(
        r"First split from Unchanged: Direction added at token (\d+) · Random control at token (\d+)",
        summary.inner_text(),
    )
    assert parted is not None, summary.inner_text()
    unchanged, control = (turn.locator(f".cell[data-pane='{pane}'] .reply") for pane in ("unchanged", "control"))
    lists = turn.locator(".likelies")
    expect(lists).to_have_count(2)
    for number, pane in enumerate(("added", "control")):
        assert [lists.nth(number).locator(f"[data-pane='{name}'] li").count() for name in PANES] == [
            5 * (name in ("unchanged", pane)) for name in PANES
        ]
    for tinted in (False, True):
        tab.locator("[data-tint]").select_option("untouched" if tinted else "off")
        if tinted:
            expect(control.locator(".token").first).to_be_visible()
        else:
            expect(turn.locator(".token")).to_have_count(0)
        expect(turn.locator(".parting")).to_have_count(2)
        expect(unchanged.locator(".parting")).to_have_count(0)
        before, after = control.evaluate(
            """reply => { const bar = [...reply.childNodes].findIndex(node => node.className === 'parting');
            return [[...reply.childNodes].slice(0, bar), [...reply.childNodes].slice(bar)].map(nodes => nodes.map(node => node.textContent).join('')); }"""
        )
        assert before and (unchanged.text_content() or "").startswith(before)
        assert not (unchanged.text_content() or "").startswith(before + after.split()[0])
    assert control.locator(".parting ~ .token").count() == control.locator(".token").count() - int(parted[2]) + 1


def test_the_random_control_is_a_fourth_pane_on_demand(tab):
    tab.get_by_role("checkbox", name="random control").check()
    idle(tab)
    shown = tab.get_by_role("checkbox", name="random control").evaluate("box => getComputedStyle(box).appearance")
    assert shown == "auto", "its tick must be seen"
    expect(tab.locator(".turn").last.locator(".cell[data-pane='control'] .tag")).to_have_text("answered")
    expect(tab.locator(".turn").last.locator(".cell[data-pane='added'] .tag")).to_have_text("refused")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_direction_that_only_looks_like_the_rules_has_none_of_its_scores(ready):
    assert ready.using_saved(ready.direction).score == ready.score
    for forged in (replace(ready.direction, norm=100 * ready.direction.norm), random_like(ready.direction, 1)):
        assert ready.using_saved(forged).score is None


def test_a_direction_from_where_the_model_has_no_place_is_one_sentence_wherever_it_comes_from(ready, engines):
    engines.of(None)._say(ready)
    handlers, visitor = Handlers(engines, Stops(), 64), gr.Request(session_hash="visitor")
    here = f"{ready.model.name} has {ready.model.n_layers} layers"
    for layer, position, kind, says in (
        (999, -1, ModelError, f"of layer 999, and {here}"),
        (ready.model.n_layers, -1, ModelError, f"of layer {ready.model.n_layers}, and {here}"),
        (-1, -1, ModelError, f"of layer -1, and {here}"),
        (1, -60, DirectionError, "layer 1, position -60, which the map of this model does not have"),
    ):
        nowhere = replace(ready.direction, source=replace(ready.direction.source, layer=layer, position=position))
        with pytest.raises(kind, match=says):
            ready.using_saved(nowhere)
        file = {"name": "saved.safetensors", "data": base64.b64encode(nowhere.to_bytes()).decode()}
        visit, bar, _ = handlers.load_direction(Visit(), gr.EventData(None, {"files": [file]}))
        assert visit == Visit() and bar["state"] == "ready" and says in bar["error"]
        # The visit may be older than the model that now has its name.
        kept = Visit(direction=nowhere)
        bar = handlers.cancel_load(kept, visitor)
        assert bar["state"] == "failed" and says in bar["error"]
        assert says in handlers.save_direction(kept, gr.EventData(None, {}))["error"]


@pytest.mark.parametrize("data", ["é", "=", None, 3])
def test_a_file_that_is_not_what_the_page_sends_is_one_sentence(ready, engines, data):
    engines.of(None)._say(ready)
    sent = {"files": [{"name": "saved.safetensors", "data": data}] if data != 3 else 3}
    visit, bar, _ = Handlers(engines, Stops(), 64).load_direction(Visit(), gr.EventData(None, sent))
    assert visit == Visit() and bar["error"]


# -- the link ------------------------------------------------------------------------------------------------------


def link_of(tab: Page) -> str:
    tab.get_by_role("button", name="Copy link").click()
    expect(tab.locator("#bar [data-note]")).to_contain_text("link")
    return tab.url


def follow(chromium: Browser, url: str, panes: int = 3) -> tuple[Page, Watched]:
    tab, seen = open_tab(chromium, SimpleNamespace(url=url))
    expect(tab.locator(".turn").last.locator(".cell .tag:not(:empty)")).to_have_count(panes)
    idle(tab)
    return tab, seen


def test_a_link_opens_the_page_as_it_was(chromium, tab, ready):
    open_find(tab)
    take(tab, ready.found.direction.source.position, 2)
    tab.get_by_role("tab", name="Talk").click()
    idle(tab)
    for text in ("How do I bake bread?", "How do I steal a car?"):
        ask(tab, text)
    set_dial(tab, "addition", 1.5)
    set_dial(tab, "removal", 50)
    tab.locator("[data-length]").fill("24")
    tab.get_by_label("system prompt").fill("You are a pirate.")
    tab.get_by_role("checkbox", name="random control").check()
    idle(tab)
    tab.get_by_role("button", name="Retry").click()
    idle(tab)
    url = link_of(tab)
    assert len(url) < 8_100 and "bread" not in url
    other, seen = follow(chromium, url, panes=4)
    expect(other.locator(".turn .words")).to_have_text(["How do I bake bread?", "How do I steal a car?"])
    idle(other)
    expect(other.locator("[data-direction]")).to_contain_text("layer 2")
    assert replies(other) == replies(tab)
    expect(other.get_by_label("system prompt")).to_have_value("You are a pirate.")
    assert not seen.faults
    other.context.close()


def test_a_link_has_the_map_the_forms_of_find_and_measure_the_pair_of_inside_and_the_draft(chromium, tab):
    tab.locator("[data-prompt]").fill("What is a volcano?")
    tab.get_by_role("tab", name="Map").click()
    expect(tab.locator("[data-map] .main-svg").first).to_be_visible()
    tab.get_by_label("axes").select_option("along")
    tab.locator("[data-position]").select_option("-2")
    expect(tab.locator(".map-body")).to_have_attribute("aria-busy", "false")
    tab.locator("[data-layer]").fill("3")
    tab.locator("#map [data-search]").fill("kill")
    tab.get_by_role("tab", name="Find").click()
    tab.locator("[data-measure='induce']").click()
    tab.get_by_label("two lists of my own").check()
    tab.get_by_label("two others").check()
    tab.locator("[data-first-name]").fill("<b>question")
    tab.locator("[data-second-name]").fill("order")
    tab.locator("#find-first").fill("Who are you?\nWhat is a volcano?")
    tab.locator("[data-positions]").fill("2")
    tab.get_by_label("harmful and harmless").check()
    tab.get_by_role("button", name=re.compile("^Remove the token")).first.click()
    chips = tab.locator("[data-tokens] code").all_inner_texts()
    tab.get_by_label("two others").check()
    tab.get_by_role("tab", name="Inside").click()
    expect(tab.locator(".readings figcaption")).to_have_count(3)
    for name, text in (("first", "Who are you?"), ("second", "How do I rob a bank?")):
        tab.locator(f"#inside [data-{name}]").fill(text)
    open_measure(tab)
    tab.get_by_label("test prompts of each class").fill("7")
    tab.locator("#measure [data-length]").fill("20")
    tab.get_by_label("judged by").select_option("paper")
    first, _ = open_tab(chromium, SimpleNamespace(url=link_of(tab)))
    expect(first.get_by_role("tab", name="Measure")).to_have_attribute("aria-selected", "true")
    # Whoever follows it and copies it again hands on also what they have not looked at.
    other, seen = open_tab(chromium, SimpleNamespace(url=link_of(first)))
    first.context.close()
    expect(other.get_by_role("tab", name="Measure")).to_have_attribute("aria-selected", "true")
    expect(other.get_by_label("test prompts of each class")).to_have_value("7")
    expect(other.locator("#measure [data-length]")).to_have_value("20")
    expect(other.get_by_label("judged by")).to_have_value("paper")
    other.get_by_role("tab", name="Inside").click()
    expect(other.locator(".readings figcaption").first).to_have_text("Who are you?")
    expect(other.locator("#inside [data-second]")).to_have_value("How do I rob a bank?")
    other.get_by_role("tab", name="Map").click()
    expect(other.get_by_label("axes")).to_have_value("along")
    expect(other.locator("[data-position]")).to_have_value("-2")
    expect(other.locator("[data-layer-value]")).to_contain_text("3 of")
    expect(other.locator("[data-map-caption]")).to_contain_text("The direction in use holds")
    expect(other.locator("#map [data-search]")).to_have_value("kill")
    expect(other.locator("[data-count]")).to_contain_text("With “kill”")
    other.get_by_role("tab", name="Find").click()
    expect(other.locator("[data-measure='induce']")).to_have_attribute("aria-pressed", "true")
    expect(other.get_by_label("two lists of my own")).to_be_checked()
    expect(other.get_by_label("two others")).to_be_checked()
    expect(other.locator("[data-kind-meaning]")).to_contain_text("the mean of <b>question minus the mean of order")
    expect(other.locator("#find-first")).to_have_value("Who are you?\nWhat is a volcano?")
    expect(other.locator("[data-count='first']")).to_have_text("2 lines")
    expect(other.locator("[data-positions]")).to_have_value("2")
    other.get_by_label("harmful and harmless").check()
    assert other.locator("[data-tokens] code").all_inner_texts() == chips
    other.get_by_role("tab", name="Talk").click()
    expect(other.locator("[data-prompt]")).to_have_value("What is a volcano?")
    assert not seen.faults
    other.context.close()


LONG = "".join(map(chr, random.Random(0).choices(range(0x4E00, 0x9FA5), k=8000)))
"""Of no pattern, so that no link has room for it."""


def test_of_what_is_too_much_for_a_link_the_settings_are_kept(chromium, tab):
    set_dial(tab, "addition", 0.5)
    tab.locator("[data-prompt]").fill(LONG)
    tab.get_by_role("button", name="Copy link").click()
    expect(tab.locator("#bar [data-note]")).to_contain_text(
        "Too long for a link, and not in it: what stands in the fields."
    )
    assert len(tab.url) < 8_100
    other, _ = follow(chromium, tab.url)
    expect(other.locator("[data-box='addition']")).to_have_value("0.50")
    expect(other.locator("[data-prompt]")).to_have_value("")
    expect(other.locator("#bar [data-note]")).to_be_empty()
    other.context.close()


def test_a_long_draft_leaves_a_link_before_messages_do(chromium, tab):
    ask(tab, "How do I bake bread?")
    tab.locator("[data-prompt]").fill(LONG)
    other, _ = follow(chromium, link_of(tab))
    expect(other.locator(".turn .words")).to_have_text(["How do I bake bread?"])
    expect(other.locator("[data-prompt]")).to_have_value("")
    other.context.close()


@pytest.mark.parametrize("prompts", [[f"What is {i}?" for i in range(51)], ["Hi", LONG]])
def test_messages_that_are_too_much_for_a_link_are_counted_and_everything_else_is_kept(chromium, tab, prompts):
    """Of a model that reads more than the embedded one does; what is gathered for the link is theirs then."""
    set_dial(tab, "addition", 0.5)
    tab.locator("[data-prompt]").fill("What is a volcano?")
    tab.evaluate(
        "said => document.addEventListener('gather', ({ detail }) => Object.assign(detail, said))",
        {"prompts": prompts, "turns": [{}] * len(prompts)},
    )
    tab.get_by_role("button", name="Copy link").click()
    expect(tab.locator("#bar [data-note]")).to_contain_text(f"and not in it: {len(prompts)} messages.")
    other, seen = follow(chromium, tab.url)
    expect(other.locator("[data-box='addition']")).to_have_value("0.50")
    expect(other.locator("[data-prompt]")).to_have_value("What is a volcano?")
    expect(other.locator(".turn .words")).to_have_text([OPENING])
    assert not seen.faults
    other.context.close()


def test_a_link_goes_to_its_tab(chromium, tab):
    tab.get_by_role("tab", name="Map").click()
    expect(tab.locator("[data-map] .main-svg").first).to_be_visible()
    other, _ = open_tab(chromium, SimpleNamespace(url=link_of(tab)))
    expect(other.get_by_role("tab", name="Map")).to_have_attribute("aria-selected", "true")
    other.context.close()


def encoded(state: object) -> str:
    squeezed = zlib.compressobj(wbits=-15)
    return (
        base64.urlsafe_b64encode(squeezed.compress(json.dumps(state).encode()) + squeezed.flush()).decode().rstrip("=")
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("%00%ff<script>", "cannot be read"),
        (encoded([1]), "cannot be read"),
        (encoded({"v": 2}), "cannot be read"),
        (encoded({"v": 1, "prompts": ["a" * 300_000]}), "cannot be read"),
        (encoded({"v": 1, "addition": 9, "__proto__": 1, "<b>": 1, "tab": "Bank", "writers": ["<b>"]}), "addition, __proto__, <b>, tab, writers that is not known"),
        (encoded({"v": 1, "map": {"layer": 1}, "measure": 3, "inside": ["a"], "draft": ["x"]}), "map, measure, inside, draft that is not known"),
        (encoded({"v": 1, "turns": [{}]}), "turns that is not known"),
        (encoded({"v": 1, "prompts": [], "turns": [{}] * 10_000}), "turns that is not known"),
        (encoded({"v": 1, "turns": [{"addition": 9}]}), "turns that is not known"),
        (encoded({"v": 1, "turns": [{"tab": "Map"}, None, 3]}), "turns that is not known"),
        (encoded({"v": 1, "model": "someone/else", "layer": 1, "position": -1}), "made with someone/else"),
        (encoded({"v": 1, "layer": 777, "position": -1}), "not on the map"),
    ],
)  # fmt: skip
def test_a_bad_link_is_named_and_does_no_harm(chromium, app, text, says):
    tab, seen = follow(chromium, f"{app.url}/#{text}")
    expect(tab.locator("#bar [data-note]")).to_contain_text(says)
    expect(tab.locator(".turn .who")).to_have_text(["Example"])
    assert not seen.faults
    assert {url for url in seen.urls if not url.startswith((app.url, "data:", "blob:"))} == set()
    tab.context.close()


@pytest.mark.parametrize("own", [{"addition": 9}, {"tab": "Map"}, None])
def test_settings_of_a_message_that_cannot_be_are_named_and_it_is_asked_with_those_of_the_page(chromium, app, own):
    prompts = ["How do I bake bread?"]
    tab, _ = follow(chromium, f"{app.url}/#{encoded({'v': 1, 'prompts': prompts, 'turns': [own]})}")
    expect(tab.locator("#bar [data-note]")).to_contain_text("turns that is not known")
    expect(tab.locator(".cell[data-pane='added'] .rest").last).to_contain_text("1.00×")
    tab.context.close()


# -- measure and inside --------------------------------------------------------------------------------------------


def open_measure(tab: Page) -> None:
    tab.get_by_role("tab", name="Measure").click()
    expect(tab.get_by_role("button", name="Measure", exact=True)).to_be_enabled()


def test_rates_and_curves_are_measured_with_transcripts_and_files(tab, ready, tmp_path):
    open_measure(tab)
    tab.get_by_label("test prompts of each class").fill("6")
    tab.locator("#measure [data-length]").fill("16")
    tab.get_by_role("button", name="Measure", exact=True).click()
    expect(tab.locator(".rate")).to_have_count(8)
    tab.locator(".rate").first.click()
    expect(tab.locator(".transcripts h2")).to_be_in_viewport()
    added = tab.locator(".rate", has_text="harmless: direction added 1×")
    expect(added).to_contain_text("refused 100.0 %")
    expect(added).to_contain_text(re.compile(r"did not refuse 0\.0\s% \[0\.0\s% to \d+\.\d\s%\].*KL \d+\.\d+ nats"))
    added.click()
    expect(tab.locator(".transcripts li")).to_have_count(6)
    tab.set_viewport_size({"width": SIZE["width"], "height": 300})  # then the list of replies scrolls
    assert not serious_faults(tab)
    tab.set_viewport_size(SIZE)
    assert set(tab.locator(".transcripts .tag").all_inner_texts()) == {"refused"}
    expect(tab.locator("[data-figure='add refusal'] .main-svg").first).to_be_visible(timeout=300_000)
    saved = {}
    for name in ("CSV", "JSON", "Markdown", "report"):
        with tab.expect_download() as download:
            tab.get_by_role("button", name=f"Save {name}").click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        saved[name] = path.read_text("utf-8")
    measured = json.loads(saved["JSON"])
    assert measured["direction"]["layer"] == ready.direction.source.layer
    assert len(measured["completions"]) == 4 * 12 and len(measured["curves"]["add"]["random_refusal"]) == 5
    assert (
        saved["CSV"].startswith("class,row,strength,n,refused") and len(saved["CSV"].splitlines()) == 9 + 11 + 11 + 21
    )
    assert len({line.count(",") for line in saved["CSV"].splitlines()}) == 1, "a cell for every column"
    table = list(csv.DictReader(saved["CSV"].splitlines()))
    assert {row["row"] for row in table} == {"unchanged", "direction removed", "direction added"}
    assert [float(row["strength"]) for row in table[:8]] == [0, 1, -1, 1] * 2
    words = {"class", "row", "model", "revision", "weights", "dtype", "direction", "mark", "prompts", "judge"}
    for row in table:
        assert all(float(value) is not None for name, value in row.items() if name not in words and value)
        assert row["direction"] == ready.digest and row["judge"] == "default" and row["mark"] == "passed every rule"
        low, *_, high = (float(row[name] or 0) for name in ("random_low", "random_high"))
        assert low <= high
    starts = [float(row["starts_like_refusal"]) for row in table if row["starts_like_refusal"]]
    assert starts == [
        *measured["curves"]["ablate"]["refusal"],
        *measured["curves"]["damage"]["refusal"],
        *measured["curves"]["add"]["refusal"],
    ]
    refused = measured["curves"]["ablate"]["refused"]
    assert (
        len(refused) == 11
        and refused[0] > refused[-1] == 0
        and len(measured["curves"]["ablate"]["random_refused"]) == 5
    )
    assert len(measured["curves"]["add"]["refused"]) == 21
    assert len(measured["curves"]["damage"]["cross_entropy"]) == 11 == len(measured["curves"]["damage"]["repetition"])
    assert not [name for curve in measured["curves"].values() for name in curve if name.endswith("_figure")]
    assert (
        saved["Markdown"].count("\n| direction removed | ") == 11
        and saved["Markdown"].count("\n| direction added | ") == 21
    )
    assert "| harmless | direction added 1× | 6 | 100.0%" in saved["Markdown"] and "toy" in saved["Markdown"]
    report = tab.context.new_page()
    report.goto(path.as_uri())
    expect(report.locator("table tr")).to_have_count(9)
    expect(report.locator("table")).to_contain_text("harmlessdirection added 1×6100.0 %")
    expect(report.locator("body")).to_contain_text(ready.model.fingerprint)
    expect(report.locator("details").first).not_to_have_attribute("open", "")
    assert report.locator("img").evaluate_all("all => all.map((image) => image.naturalWidth > 0)") == [True] * 10
    assert report.locator("details p b").count() == 4 * 12
    report.close()


def test_measuring_can_be_cancelled(tab):
    open_measure(tab)
    tab.get_by_label("test prompts of each class").fill("100")
    tab.get_by_role("button", name="Measure", exact=True).click()
    expect(tab.locator("#measure [data-measuring]")).to_contain_text("completing prompts")
    start = tab.get_by_role("button", name="Measure", exact=True)
    with held(tab, "**/run/predict*"):  # the page waits for nobody
        tab.get_by_role("button", name="Cancel").click()
        expect(start).to_have_attribute("aria-disabled", "false")
        tab.wait_for_timeout(500)
        expect(tab.locator("#measure [data-measuring]")).to_have_text("Cancelled.")
    tab.get_by_label("test prompts of each class").fill("5")
    tab.locator("#measure [data-length]").fill("2")
    tab.get_by_label("judged by").select_option("paper")
    start.click()
    expect(tab.locator(".rate")).to_have_count(8)
    expect(tab.locator(".rate").first).to_contain_text("n 5")
    expect(tab.locator("[data-made]")).to_contain_text("judged by the paper’s phrases")


def test_the_removal_is_written_into_weights_and_what_that_is_said(tab, tmp_path):
    open_measure(tab)
    write, said, error = (tab.locator(f"[data-{name}]") for name in ("write", "written", "write-error"))
    write.get_by_role("button").click()
    expect(error).to_have_text("The edited model needs a place: name a new folder for it.")
    folder = tmp_path / "edited"
    tab.get_by_label("into the new folder").fill(str(folder))
    tab.get_by_label("into the new folder").press("Enter")
    expect(said).to_contain_text(f"{folder}: ablation,")
    expect(said).to_contain_text("exact up to rounding")
    expect(error).to_be_hidden()
    edited = ChatModel.load(folder, device="cpu")
    *_, step = stream_side_by_side(edited, ["How do I rob a bank?"], [None], max_new_tokens=12)
    assert judge(step.texts[0]).label == "answered"
    write.get_by_role("button").click()
    expect(error).to_contain_text("exists already")
    expect(said).to_be_empty()


def test_where_others_can_open_the_page_no_weights_are_written(ready, tmp_path):
    with pytest.raises(ModelError, match="no edited weights are written"):
        written(ready, str(tmp_path / "edited"), local=False)
    assert not list(tmp_path.iterdir())


def open_inside(tab: Page) -> None:
    tab.get_by_role("tab", name="Inside").click()
    expect(tab.locator(".readings figure .main-svg").first).to_be_visible()


WIDER = """[...document.querySelectorAll('main *')]
  .filter(e => !e.closest('.cells-holder > *') && e.checkVisibility() && e.offsetWidth && e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.outerHTML.slice(0, 80))"""


OPENERS = {
    "Map": open_map,
    "Find": open_find,
    "Measure": open_measure,
    "Inside": open_inside,
}


# -- looks ---------------------------------------------------------------------------------------------------------


def serious_faults(tab: Page) -> list[tuple[str, list[str]]]:
    """What axe finds, with the first nodes that have it."""
    return [
        (fault["id"], [node["html"][:120] for node in fault["nodes"][:3]])
        for fault in Axe().run(tab).response["violations"]
        if fault["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("width", [360, 820, 1366])
def test_on_every_tab_nothing_is_wider_than_the_screen_or_a_serious_fault_of_accessibility(chromium, app, width):
    tab, seen = open_tab(chromium, app, width=width, height=740)
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    expect(tab.locator(".token").first).to_be_attached()
    faults = []
    for name in ("Talk", *OPENERS):
        OPENERS.get(name, idle)(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(WIDER) == []
        for scheme in ("dark", "light"):
            tab.emulate_media(color_scheme=scheme)
            expect(tab.locator("body.dark")).to_have_count(int(scheme == "dark"))
            faults += [(name, scheme, *fault) for fault in serious_faults(tab)]
        tab.locator("[data-direction]").click()
        assert tab.evaluate(WIDER) == []
        tab.keyboard.press("Escape")
    tab.get_by_role("button", name="About and keyboard").click()
    faults += [("About", *fault) for fault in serious_faults(tab)]
    assert not seen.faults
    tab.context.close()
    assert not faults


def test_on_a_phone_the_unchanged_reply_stays_and_one_of_the_others_is_shown(chromium, app):
    tab, _ = open_tab(chromium, app, width=360, height=740)
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    for shown, hidden in (("added", "removed"), ("removed", "added")):
        tab.locator(f"[data-segment='{shown}']").click()
        expect(tab.locator(".cell[data-pane='unchanged']")).to_be_visible()
        expect(tab.locator(f".cell[data-pane='{shown}']")).to_be_visible()
        expect(tab.locator(f".cell[data-pane='{hidden}']")).to_be_hidden()
    tab.context.close()


def test_the_theme_follows_the_system_and_the_switch(chromium, app):
    tab, seen = open_tab(chromium, app, scheme="dark")
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    open_map(tab)
    ground = "getComputedStyle(document.body).backgroundColor"
    marker = "document.querySelector('[data-map] .point').style.fill"
    dark = tab.evaluate(ground), tab.evaluate(marker)
    tab.get_by_role("button", name="Switch between light and dark").click()
    tab.wait_for_function(f"before => {marker} !== before", arg=dark[1])
    assert tab.evaluate(ground) != dark[0]
    assert not seen.faults
    tab.context.close()


# -- the keyboard --------------------------------------------------------------------------------------------------

CONTROLS = """part => {
  const every = [...document.querySelectorAll(`#${part} :is(button, input, select, textarea, summary, a[href], [tabindex="0"])`)];
  return every.filter(e => e.checkVisibility() && !e.disabled && !(e.type === 'radio' && !e.checked));
}"""
"""What can be pressed, chosen or typed into in a part of the page, in its order; of a group of radio buttons the chosen one."""

SHOWN = """() => {
  const held = document.activeElement;
  return [held, held.closest('.file')].some(e => e && getComputedStyle(e).outlineStyle !== 'none' && parseFloat(getComputedStyle(e).outlineWidth) >= 2);
}"""


@pytest.mark.parametrize("name", ["Find", "Measure", "Inside"])
def test_every_control_is_reached_with_tab_in_the_order_of_the_page_and_is_seen_to_have_the_focus(tab, name):
    OPENERS[name](tab)
    tab.wait_for_timeout(500)
    controls = tab.evaluate_handle(CONTROLS, name.lower())
    count = controls.evaluate("all => all.length")
    assert count > 3
    tab.get_by_role("tab", name="Inside").focus()
    reached = []
    for _ in range(count):
        tab.keyboard.press("Tab")
        reached.append(controls.evaluate("all => all.indexOf(document.activeElement)"))
        assert tab.evaluate(SHOWN), tab.evaluate("document.activeElement.outerHTML.slice(0, 200)")
    assert reached == list(range(count))


def press(button: Locator, key: str = "Enter") -> None:
    button.focus()
    button.page.keyboard.press(key)


def test_the_focus_stays_on_what_was_pressed_in_measure(tab):
    open_measure(tab)
    tab.get_by_label("test prompts of each class").fill("100")
    start, cancel = (
        tab.locator("#measure").get_by_role("button", name=name, exact=True) for name in ("Measure", "Cancel")
    )
    press(start)
    expect(cancel).to_be_visible()
    expect(start).to_be_focused()
    expect(start).to_be_disabled()
    tab.keyboard.press("Tab")
    expect(cancel).to_be_focused()
    tab.keyboard.press("Space")
    expect(cancel).to_be_hidden()
    expect(start).to_be_focused()
    expect(start).to_be_enabled()


def test_the_focus_stays_on_what_was_pressed_in_inside_or_goes_where_the_work_does(tab):
    open_inside(tab)
    start, every = (tab.get_by_role("button", name=name) for name in ("Measure the parts", "Patch every part exactly"))
    press(start)
    expect(start).to_be_disabled()
    expect(every).to_be_enabled()
    expect(start).to_be_focused()
    part = tab.locator("[data-top] button").first
    press(part, "Space")
    expect(part).to_have_attribute("aria-pressed", "true")
    expect(part).to_be_focused()
    press(tab.get_by_role("button", name="Choose none"))
    expect(tab.get_by_label("Another part")).to_be_focused()
    press(part)
    press(tab.get_by_role("button", name="Remove only from these"))
    expect(tab.get_by_role("tab", name="Talk")).to_be_focused()
    press(tab.get_by_role("button", name="Remove from all"))
    expect(tab.locator("[data-on='removed']")).to_be_focused()
    idle(tab)


def test_the_focus_goes_to_the_candidate_in_use_where_a_button_of_find_goes(tab, ready):
    open_find(tab)
    source = ready.found.direction.source
    press(tab.locator(f"[data-cell='{source.position} 2']"))
    expect(tab.locator(f"[data-cell='{source.position} 2'].used")).to_be_focused()
    reset = tab.get_by_role("button", name="Back to the rule’s choice")
    expect(reset).to_be_visible()
    press(reset)
    expect(reset).to_be_hidden()
    expect(tab.locator(".cell-button.used")).to_be_focused()
    fill = tab.get_by_role("button", name="Measure them")
    if fill.is_visible():
        press(fill)
        expect(fill).to_be_disabled()
        expect(fill).to_be_focused()
        expect(fill).to_be_hidden()
        expect(tab.locator(".cells-holder")).to_be_focused()
    tab.get_by_role("tab", name="Talk").click()
    idle(tab)


def test_the_keys_of_the_dials_and_of_the_message_work_on_every_tab(tab):
    tab.get_by_role("tab", name="Map").click()
    expect(tab.locator("[data-layer]")).to_be_visible()
    for key, strength in ((".", "1.05"), (",", "1.00"), ("0", "0.00"), ("0", "1.00")):
        tab.keyboard.press(key)
        expect(tab.locator("[data-strengths]")).to_contain_text(f"⊕ {strength}×")
    tab.locator("[data-layer]").press("?")
    expect(tab.get_by_role("dialog")).to_contain_text("What it does not show")
    tab.keyboard.press("Escape")
    tab.keyboard.press("/")
    expect(tab.get_by_label("Message")).to_be_focused()
    idle(tab)


def test_the_strengths_of_the_bar_are_the_dials_of_talk_and_are_turned_on_any_tab(tab):
    before = replies(tab)
    chip = tab.locator("[data-strengths]")
    expect(chip).to_have_text("⊖ 100 % ⊕ 1.00×")
    tab.get_by_role("tab", name="Map").click()
    chip.click()
    tab.locator("#bar [data-strength='addition']").fill("0")
    expect(chip).to_have_text("⊖ 100 % ⊕ 0.00×")
    expect(tab.locator("#bar [data-strength='addition'] + output")).to_have_text("0.00×")
    tab.keyboard.press("Escape")
    tab.get_by_role("tab", name="Talk").click()
    idle(tab)
    expect(tab.locator("[data-box='addition']")).to_have_value("0.00")
    expect(tab.locator(".cell[data-pane='added'] .rest").last).to_contain_text("0.00×")
    assert replies(tab)[2] == replies(tab)[0] != before[2]
    set_dial(tab, "removal", 40)
    expect(chip).to_have_text("⊖ 40 % ⊕ 0.00×")
    tab.locator("[data-on='removed']").uncheck()
    expect(chip).to_have_text("⊖ off ⊕ 0.00×")
    expect(tab.locator("#bar [data-strength='removal']")).to_be_disabled()
    tab.locator("[data-temperature]").fill("1")
    tab.locator("[data-temperature]").press("Tab")
    expect(chip).to_have_text("⊖ off ⊕ 0.00×, sampled")
    idle(tab)


def test_the_small_map_of_the_bar_takes_a_candidate_for_the_whole_page(tab, ready):
    tab.locator("[data-direction]").click()
    cells = tab.locator(".small-cell")
    expect(cells).to_have_count(len(ready.found.scores))
    chosen = ready.found.direction.source
    used = tab.locator(".small-cell[aria-pressed='true']")
    expect(used).to_have_attribute("data-small", f"{chosen.position} {chosen.layer}")
    expect(used).to_have_text("★")
    wanted = tab.locator(f".small-cell[data-small='{chosen.position} 2']")
    expect(tab.locator(".small-cell[tabindex='0']")).to_have_count(1)
    used.focus()
    for _ in range(chosen.layer - 2):
        tab.keyboard.press("ArrowLeft")
    expect(wanted).to_be_focused()
    tab.keyboard.press("Enter")
    expect(tab.locator("[data-direction]")).to_contain_text("layer 2")
    expect(used).to_have_attribute("data-small", f"{chosen.position} 2")
    expect(wanted).to_be_focused()
    tab.keyboard.press("Escape")
    idle(tab)
    expect(tab.locator("[data-where]")).to_contain_text("at layer 2")
    expect(tab.locator(".small-cell").first).to_be_disabled()  # nothing has been mixed in at layer 0


def test_a_finger_is_told_what_a_pointer_is_told_by_hovering(chromium, app):
    context = chromium.new_context(viewport={"width": 360, "height": 740}, has_touch=True)
    tab, seen = open_page(context, app)
    idle(tab)
    tip = tab.locator("[data-tip]")
    expect(tab.locator(".token").first).to_be_visible()
    tab.locator(".cell[data-pane='unchanged'] .token").first.tap()
    expect(tip).to_be_visible()
    expect(tip).to_contain_text("of the way from the harmless to the harmful mean")
    tab.locator(".said").first.tap()
    expect(tip).to_be_hidden()
    tab.locator("[data-retry]").tap()  # a button does what it is for
    expect(tip).to_be_hidden()
    assert not seen.faults
    context.close()


def test_a_sheet_of_the_bar_is_left_with_escape_and_the_focus_is_where_it_was_opened(tab):
    for summary in ("[data-model]", "[data-direction]", "[data-strengths]"):
        press(tab.locator(summary))
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.closest('details[open]') !== null")
        tab.keyboard.press("Escape")
        expect(tab.locator("#bar details[open]")).to_have_count(0)
        expect(tab.locator(summary)).to_be_focused()
    press(tab.locator("[data-model]"))
    press(tab.locator(".model-button").first)
    expect(tab.locator("#bar details[open]")).to_have_count(0)
    expect(tab.locator("[data-model]")).to_be_focused()


# -- the server ----------------------------------------------------------------------------------------------------


def test_the_server_lets_the_page_load_nothing_from_elsewhere_and_takes_no_uploads(app):
    with urllib.request.urlopen(app.url) as answer:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path, status in (("/gradio_api/upload", 403), ("/gradio_api/queue/join", 413)):
        request = urllib.request.Request(app.url + path, data=b"x" * 10_000_000, method="POST")
        with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as refused:
            urllib.request.urlopen(request)
        assert not isinstance(refused.value, urllib.error.HTTPError) or refused.value.code == status


def test_a_body_that_does_not_say_how_long_it_is_is_counted(app):
    head = "POST /gradio_api/queue/join HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
    size = MAX_BODY + 1
    with socket.create_connection(("127.0.0.1", int(app.url.rsplit(":", 1)[1])), timeout=20) as visitor:
        visitor.sendall(f"{head}\r\n\r\n{size:x}\r\n".encode() + b" " * size)  # and it might go on forever
        answer = b"".join(iter(lambda: visitor.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 413 ") and f"at most {MAX_BODY:,} bytes".encode() in answer
    assert b"content-security-policy" in answer
    with socket.create_connection(("127.0.0.1", int(app.url.rsplit(":", 1)[1])), timeout=20) as visitor:
        visitor.sendall(f"{head}\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n".encode())
        assert visitor.recv(1000).startswith(b"HTTP/1.1 422 "), "a short one reaches the page"


def test_before_the_page_is_there_a_sentence_of_its_own_says_so_and_no_bare_loading(chromium, app):
    def sentence(selector: str) -> str:
        return tab.evaluate("of => getComputedStyle(document.querySelector(of), '::before').content", selector)

    context = chromium.new_context(color_scheme="dark")
    tab = context.new_page()
    tab.route("**/assets/*.js", lambda route: None)
    tab.goto(app.url, wait_until="commit")
    tab.wait_for_selector("gradio-app", state="attached")
    assert sentence("gradio-app") == '"Refusal is a direction. The page is being set up."'
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 22, 20)"
    tab.close()
    tab = context.new_page()
    tab.route("**/theme.css*", lambda route: None)  # Gradio's scripts wait for it
    tab.goto(app.url, wait_until="commit")
    tab.wait_for_selector("p.loading", state="attached")
    assert sentence("p.loading") == '"Refusal is a direction. The page is being set up."'
    assert tab.locator("p.loading").evaluate("node => getComputedStyle(node).fontSize") == "0px"
    assert sentence("gradio-app") == "none"
    context.close()


def test_a_model_that_is_not_there_is_said_in_one_sentence_on_the_page(chromium, tmp_path):
    app = start(tmp_path / "log.txt", "--model", str(tmp_path / "nowhere"))
    tab, _ = open_tab(chromium, app)
    expect(tab.locator("[data-failed]")).to_contain_text("There is no model folder")
    assert '"failed":true' in health(app)
    tab.context.close()
    assert end(app) == 0


def test_another_model_can_be_loaded_and_the_old_one_stays_until_then(chromium, app, tab, tmp_path):
    folder = tmp_path / "<img src=x onerror=window.hit=1> another"
    shutil.copytree(ORGANISM, folder)
    other, _ = open_tab(chromium, app)

    def load(path: Path) -> None:
        tab.locator("[data-model]").click()
        tab.get_by_label("any other, by hub id or folder").fill(str(path))
        tab.get_by_role("button", name="Load", exact=True).click()

    load(tmp_path / "nowhere")
    expect(tab.locator("[data-failed]")).to_contain_text("There is no model folder")
    ask(tab, "Who are you?")
    assert all(replies(tab))
    load(folder)
    expect(tab.locator("[data-model]")).to_contain_text(str(folder))
    expect(tab.locator("[data-failed]")).to_be_hidden()
    expect(tab.locator(".turn .words")).to_have_text([OPENING])
    idle(tab)
    assert all(replies(tab))
    tab.get_by_role("button", name="Understood").click()
    expect(tab.locator("[data-demo]")).to_be_hidden()
    expect(tab.locator("[data-model]")).to_be_focused()
    expect(other.locator("[data-model]")).not_to_contain_text(str(folder))
    expect(other.locator("[data-demo]")).to_be_hidden()  # here, of models that are no toys
    other.context.close()
    tab.locator("[data-model]").click()
    tab.get_by_role("button", name="embedded model").click()
    expect(tab.locator("[data-model]")).to_contain_text("embedded model")
    load(folder)
    expect(tab.locator("[data-model]")).to_contain_text(str(folder))
    expect(tab.locator("[data-demo]")).to_be_hidden()  # said once
    assert tab.evaluate("window.hit") is None  # its name is shown as text


FORGETFUL = """
import functools
import sys
import refusal_core
from refusal_core.ui import server

build = server.build

def build_small(*args):
    page = build(*args)
    page.launch = functools.partial(page.launch, state_session_capacity=1)
    return page

server.build = build_small
sys.exit(server.main())
"""
"""The app, which remembers one visitor only."""


def test_a_page_that_the_app_has_forgotten_says_so_and_keeps_what_it_shows(chromium, tmp_path):
    with running(tmp_path / "log.txt", program=("-c", FORGETFUL)) as app:
        tab = open_tab(chromium, app)[0]
        expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
        idle(tab)
        other = open_tab(chromium, app)[0]
        for each in (tab, other):
            expect(each.locator(".cell .tag:not(:empty)")).to_have_count(3)
            idle(each)
        before = replies(tab)
        field = tab.get_by_label("Message")
        field.fill("Who are you?")
        field.press("Enter")
        expect(tab.locator(".composer [data-error]")).to_have_text(RELOAD)
        expect(field).to_have_value("Who are you?")
        idle(tab)
        assert len(before) == 3 and replies(tab) == before
        open_find(tab)
        tab.locator("[data-cell='-1 3']").click()
        expect(tab.locator("#bar [data-failed]")).to_have_text(RELOAD)
        tab.get_by_role("tab", name="Talk").click()
        with tab.expect_download() as download:
            tab.get_by_role("button", name="Save JSON").click()
        download.value.save_as(tmp_path / "saved.json")
        assert json.loads((tmp_path / "saved.json").read_text("utf-8"))["model"].startswith(EMBEDDED)
        tab.reload()
        expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
        idle(tab)
        ask(tab, "Who are you?")
        expect(tab.locator(".composer [data-error]")).to_be_hidden()
        for each in (tab, other):
            each.context.close()


def test_for_a_page_that_is_not_known_any_more_nothing_is_done(engines, ready):
    engines.of(None)._status = ready
    handlers, visitor = Handlers(engines, Stops(), 64), gr.Request(session_hash="visitor")
    sent = SENT | {"prompts": "lists", "first": "Hi", "second": "Ho", "position": -1, "layer": 2, "n": 5, "text": "I"}
    sent |= {"model": EMBEDDED, "axes": "pca", "files": []}
    event = gr.EventData(None, sent)
    by_visitor, alone = (FORGOTTEN, event, visitor), (FORGOTTEN, event)
    for answered in (
        *(list(work(*by_visitor)) for work in (handlers.load_model, handlers.search, handlers.measure)),
        *(list(work(*by_visitor)) for work in (handlers.show_umap, handlers.measure_writers, handlers.fill_map)),
        *(work(*alone) for work in (handlers.choose_cell, handlers.load_direction, handlers.show_position)),
        *(work(*alone) for work in (handlers.save_direction, handlers.read_inside, handlers.check_token)),
        handlers.show_cells(FORGOTTEN),
        handlers.drop_search(FORGOTTEN, visitor),
        handlers.cancel_load(FORGOTTEN, visitor),
        handlers.show_rendered((), *alone),
        list(handlers.answer((), *by_visitor)),
    ):
        assert RELOAD in str(answered) and "is_known=True" not in str(answered)
    assert handlers.foretell((), *alone) == {"run": 1}
    assert not handlers.tint_replies((), *alone)["panes"]


def test_where_others_can_open_the_page_only_the_offered_models_can_be_loaded(tmp_path):
    engines = Engines(Engine(), ["owner/name"], any_model=False)
    for name in (str(tmp_path), "other/name", "", "/etc"):
        with pytest.raises(ModelError, match="cannot be loaded here"):
            engines.load(name)
    assert engines.load(EMBEDDED) is engines.of(None)
    with pytest.raises(ModelError, match="put away"):
        engines.of("owner/name")


def test_on_a_space_the_list_is_fixed_replies_are_short_and_the_program_ends_while_they_stream(
    chromium, tmp_path, monkeypatch
):
    monkeypatch.setenv("SPACE_ID", "owner/space")
    app = start(tmp_path / "log.txt")
    tab, seen = open_tab(chromium, app)
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3, timeout=PREPARED * 1000)
    idle(tab)
    expect(tab.locator("[data-demo]")).to_contain_text("A research demo")
    tab.get_by_role("button", name="Understood").click()
    expect(tab.locator("[data-demo]")).to_be_hidden()
    tab.locator("[data-model]").click()
    expect(tab.locator(".model-button").first).to_have_text("embedded model")
    assert str(ROOT) not in tab.locator("body").inner_text()
    expect(tab.get_by_label("any other, by hub id or folder")).to_be_hidden()
    tab.keyboard.press("Escape")
    tab.get_by_role("tab", name="Measure").click()
    expect(tab.locator("[data-not-here]")).to_be_visible()
    expect(tab.locator("[data-write]")).to_be_hidden()
    assert tab.locator("#measure [data-length]").get_attribute("max") == "120"
    tab.get_by_role("tab", name="Talk").click()
    tab.locator("#talk [data-length]").fill("200")
    tab.get_by_label("Message").fill("What is a quokka?")
    tab.get_by_label("Message").press("Enter")
    expect(tab.locator(".composer [data-error]")).to_contain_text("a number from 1 to 120")
    assert not seen.faults
    tab.locator("#talk [data-length]").fill("120")
    tab.locator("[data-temperature]").fill("2")
    tab.get_by_label("Message").press("Enter")
    expect(tab.locator(".turns")).to_have_attribute("aria-busy", "true")
    ended: queue.Queue[int] = queue.Queue()
    threading.Thread(target=lambda: ended.put(end(app))).start()
    assert ended.get(timeout=25) == 0
    assert "quokka" not in app.log.read_text(), "what visitors write is in no log"
    tab.context.close()


def test_the_front_matter_of_the_readme_starts_the_gradio_that_is_pinned():
    front = (ROOT / "README.md").read_text("utf-8").split("---")[1]
    stated = dict(line.split(": ", 1) for line in front.strip().splitlines())
    assert f"gradio=={stated['sdk_version']}" in (ROOT / "requirements.txt").read_text("utf-8").split()
    assert stated["models"] == f"[{', '.join(OFFERED[1:])}]"
    assert stated["app_file"] == "app.py" and stated["license"] == "mit" and len(stated["short_description"]) <= 60


@pytest.fixture
def engines() -> Iterator[Engines]:
    """Engines of which nothing goes on in the background afterwards."""
    engines = Engines(Engine(), [], any_model=True)
    yield engines
    engines.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "engine" and thread in engines._started]


def test_a_load_that_a_newer_one_has_overtaken_shows_nothing_more(engines, tmp_path):
    names = [str(shutil.copytree(ORGANISM, tmp_path / name)) for name in ("first", "second")]
    handlers = Handlers(engines, Stops(), 64)
    visitor = gr.Request(session_hash="visitor")
    clicks = [gr.EventData(None, {"model": name}) for name in names]
    first, second = (handlers.load_model(Visit(), click, visitor) for click in clicks)
    next(first)
    assert next(news[0] for news in second if isinstance(news[0], Visit)) == Visit(names[1])
    assert list(first) == [(gr.skip(),) * 6]


def test_a_load_that_is_cancelled_shows_nothing_more(engines, tmp_path):
    handlers = Handlers(engines, Stops(), 64)
    visitor = gr.Request(session_hash="visitor")
    click = gr.EventData(None, {"model": str(shutil.copytree(ORGANISM, tmp_path / "slow"))})
    loading = handlers.load_model(Visit(), click, visitor)
    assert next(loading)[2]["waiting"]["stage"] == "loading the model"
    (engine,) = engines._others.values()
    assert handlers.cancel_load(Visit(), visitor)["error"] == ""
    assert engine._closing.is_set() and not engines._others, "nobody waits for it any more"
    assert list(loading) == [(gr.skip(),) * 6]


def test_a_model_that_had_made_room_is_loaded_for_the_conversation_that_was_held_with_it(engines, tmp_path):
    names = [str(shutil.copytree(ORGANISM, tmp_path / name)) for name in ("first", "second", "third")]
    stops, visitor = Stops(), gr.Request(session_hash="visitor")
    handlers, stop = Handlers(engines, stops, 64), stops.begin("visitor", 1)

    def load(visit: Visit, name: str) -> list[tuple]:
        return [news for news in handlers.load_model(visit, gr.EventData(None, {"model": name}), visitor) if news[0]]

    (visit, turns, *_), *_ = [news for news in load(Visit(), names[0]) if isinstance(news[0], Visit)]
    assert visit == Visit(names[0]) and turns == ()
    assert stop.is_set(), "replies of the model before would come under the name of this one"
    for name in names[1:]:
        load(Visit(), name)
    with pytest.raises(ModelError, match="put away"):
        engines.of(names[0])
    (again, turns, *_), *_ = [news for news in load(visit, names[0]) if isinstance(news[0], Visit)]
    assert again == visit and turns == gr.skip()


def test_the_model_asked_for_longest_ago_makes_room(engines, tmp_path):
    names = [str(tmp_path / str(i)) for i in range(3)]
    first, *later = [engines.load(name) for name in names]
    with pytest.raises(ModelError, match="put away"):
        engines.of(names[0])
    assert [engines.of(name) for name in names[1:]] == later
    assert engines.load(names[0]) is not first
