"""What the tab Find promises: the candidates, a direction of one's own, and a prompt as the model reads it."""

import gc
import json
import re
import shutil
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import Plain
from hub import Hub, Repo, hub
from playwright.sync_api import Page
from test_ui import (
    OPENING,
    WIDER,
    App,
    ask,
    chromium,
    end,
    expect,
    idle,
    open_find,
    open_map,
    open_tab,
    replies,
    running,
    start,
    tab,
    take,
    watched,
)

from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.directions import DirectionError
from refusal_core.evaluation import unseen
from refusal_core.prompts import MAX_CHARACTERS, PromptError, PromptSet, load_prompts
from refusal_core.selection import Progress
from refusal_core.ui.bar import bar_view
from refusal_core.ui.engine import Engine, Engines, Ready, filled, is_known
from refusal_core.ui.find import MOST_SHOWN, asked_cell, find_view, rendered_view
from refusal_core.ui.map import map_view
from refusal_core.ui.measure import Wish, measured
from refusal_core.ui.page import FAILURE, Handlers, Visit
from refusal_core.ui.search import FEWEST, MOST, MOST_CHARACTERS, MOST_KEPT, Search, Searches, search
from refusal_core.ui.talk import Stops

__all__ = ["chromium", "hub", "tab", "watched"]  # fixtures

EMBEDDED = {split: load_prompts(split) for split in ("train", "val", "test")}
BAD, GOOD = EMBEDDED["train"].harmful[40:64], EMBEDDED["train"].harmless[40:64]
QUESTIONS, ORDERS = ([t for t in EMBEDDED["train"].harmless if t.endswith(end)][:20] for end in ("?", "."))


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """A few of the embedded prompts: the search is the same, and shorter."""
    path = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    rows = [
        {"text": text, "harmful": harmful, "split": split, "category": category}
        for (split, prompts), n in zip(EMBEDDED.items(), (24, 6, 20), strict=True)
        for harmful, texts, categories in (
            (True, prompts.harmful, prompts.harmful_categories),
            (False, prompts.harmless, prompts.harmless_categories),
        )
        for text, category in list(zip(texts, categories, strict=True))[:n]
    ]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


@pytest.fixture(scope="module")
def engine(few: Path) -> Iterator[Engine]:
    engine = Engine(prompts=few)
    engine.start()
    *_, status = engine.changes()
    assert isinstance(status, Ready), status
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def ready(engine: Engine) -> Ready:
    status = engine.status
    assert isinstance(status, Ready)
    return status


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    """A data set with a list of each class."""
    folder = tmp_path_factory.mktemp("lists")
    for name, texts in (("bad", BAD), ("good", GOOD)):
        (folder / f"{name}.json").write_text(json.dumps([{"text": text} for text in texts]))
    return folder


@pytest.fixture(scope="module")
def app(tmp_path_factory, few: Path, lists: Path) -> Iterator[App]:
    """The app on a few prompts, ready, with a hub on this machine."""
    folder, served = tmp_path_factory.mktemp("app"), Hub()
    served.repos["datasets/a/mine"] = Repo({"1" * 40: lists})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", served.url)
        patch.setenv("HF_HUB_CACHE", str(folder / "hub"))
        with running(folder / "log.txt", "--prompts", str(few)) as app:
            yield app
    served.close()


# -- what may be asked for -----------------------------------------------------------------------------------------

LISTS = {"run": 1, "prompts": "lists", "kind": "refusal", "first": "\n".join(BAD), "second": "\n".join(GOOD)}
CONTRAST = LISTS | {
    "kind": "contrast",
    "first": "\n".join(QUESTIONS),
    "second": "\n".join(ORDERS),
    "first_name": "question",
    "second_name": "order",
}


def test_what_was_sent_is_read_and_what_is_there_twice_is_left_out(ready):
    wish = Search.read(LISTS | {"second": "\n\n".join([*GOOD, GOOD[3]]), "tokens": [43, 888, 43]}, ready.model)
    assert [p.text for p in wish.prompts if p.harmful] == list(BAD)
    assert [p.text for p in wish.prompts if not p.harmful] == list(GOOD)
    assert wish.n_given == len(BAD) + len(GOOD) + 1 and wish.tokens == (43, 888)
    assert Search.read(CONTRAST | {"tokens": [43]}, ready.model).tokens is None, "a contrast knows no refusal"
    app_lists = Search.read({"run": 2, "prompts": "app", "tokens": None}, ready.model)
    assert not app_lists.prompts and app_lists.tokens is None and app_lists.n_positions is None


@pytest.mark.parametrize(
    ("forged", "says"),
    [
        ({"run": "1"}, "reload it"),
        ({"first": ""}, "There are 0 different harmful prompts"),
        ({"first": "", "second": " \n "}, "Both lists are empty"),
        ({"first": "\n".join(BAD[: FEWEST - 1])}, f"from {FEWEST} to 1,000: add some"),
        ({"first": "\n".join(f"{i}?" for i in range(MOST + 1))}, "1,001 different harmful prompts"),
        ({"first": LISTS["first"] + "\n\n" + "a" * 100_000}, "“harmful”, line 26: 100,000 characters"),
        ({"first": LISTS["first"] + "\nword\0"}, "line 25: it has characters that are no text"),
        ({"first": LISTS["first"] + "\n" + GOOD[1]}, "“harmless”, line 2: the same prompt is in the other class"),
        ({"second": LISTS["second"] + "\n" + "word " * 1000}, "line 25: it is too long for embedded model"),
        ({"first": "a" * (MOST_CHARACTERS + 1)}, "at most 400,000"),
        ({"first": ["no text"]}, "There are 0 different harmful"),
        ({"kind": "contrast"}, "two names that differ"),
        ({"kind": "contrast", "first_name": "Rude", "second_name": " rude"}, "two names that differ"),
        ({"kind": "contrast", "first_name": "a" * 41, "second_name": "b"}, "at most 40"),
        ({"kind": "contrast", "first_name": "a", "second_name": "b", "prompts": "app"}, "are harmful and harmless ones"),
        ({"prompts": "file"}, "no file yet"),
        ({"prompts": "file", "file_name": "a.exe", "file_text": "x"}, "a.exe is not a list"),
        ({"prompts": "file", "file_name": "../a.csv", "file_text": "text,harmful\n"}, "^a.csv has no prompt in it"),
        ({"prompts": "file", "file_name": "a.csv", "file_text": "text,harmful\na,true\nb,maybe"}, "a.csv, line 3: harmful"),
        ({"prompts": "file", "file_name": "a.json", "file_text": "[" * 100_000}, "a.json, line 1: JSON that"),
        ({"tokens": []}, "There are 0 refusal tokens"),
        ({"tokens": list(range(17))}, "from 1 to 16"),
        ({"tokens": [10**9]}, "not one of embedded model"),
        ({"tokens": [True]}, "not one of embedded model"),
        ({"tokens": "43"}, "There are 0 refusal tokens"),
        ({"n_positions": 0}, "read at 1 to 5 of them, not 0"),
        ({"n_positions": 6}, "read at 1 to 5 of them, not 6"),
        ({"n_positions": "2"}, "is a whole number"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_made_is_refused_with_the_line_and_the_remedy(ready, forged, says):
    with pytest.raises(PromptError, match=says) as refused:
        Search.read(LISTS | forged, ready.model)
    assert "\n" not in str(refused.value) and str(refused.value).endswith(".") and len(str(refused.value)) < 400


def found_from(ready: Ready, few: Path, sent: dict) -> Ready:
    *progress, last = search(ready, Search.read(sent, ready.model), few, threading.Event())
    assert progress and all(isinstance(news, Progress) for news in progress)
    assert isinstance(last, Ready)
    return last


@pytest.fixture(scope="module")
def own(ready: Ready, few: Path) -> Ready:
    return found_from(ready, few, LISTS)


@pytest.fixture(scope="module")
def contrast(ready: Ready, few: Path) -> Ready:
    return found_from(ready, few, CONTRAST)


def test_own_lists_give_a_refusal_direction_of_their_own_prompts_and_set_some_aside(ready, few, own):
    found, before = own.found, ready.found
    seen = {*found.prompts.harmful, *found.validation.harmful, *own.examples.harmful}
    assert seen <= set(BAD) and not {*found.prompts.harmful, *found.validation.harmful} & {*own.examples.harmful}
    assert found.counts["train", "harmful"][1] == 14 and found.counts["val", "harmless"][1] == 4
    assert len(own.examples.harmful) == len(own.examples.harmless) == 6 == own.set_aside / 2
    assert found.direction.source.prompts == "your lists" and not found.direction.source.contrast
    assert torch.cosine_similarity(own.direction.unit, ready.direction.unit, dim=0) > 0.5
    assert ready.found is before and ready.direction is before.direction, "the app's own stays"
    again = found_from(ready, few, LISTS)
    assert again.found.prompts == found.prompts and torch.equal(again.direction.unit, own.direction.unit)
    origin = find_view(own, before)["origin"]
    assert origin.startswith("From your lists: ") and "12 prompts are set aside" in origin


def test_a_contrast_is_measured_on_the_apps_prompts_and_refusals_keep_their_tokens(engine, ready, contrast):
    assert contrast.found.refusal_tokens == ready.found.refusal_tokens
    assert contrast.examples is ready.examples
    shown = find_view(contrast, ready.found)
    assert shown["contrast"] == "question − order" and "This is not a refusal direction" in shown["origin"]
    classes = {"harmful": "question", "harmless": "order"}
    assert shown["classes"] == ("question", "order") and map_view(engine, contrast)["classes"] == classes
    bar = bar_view(contrast)["direction"]
    assert (
        bar["classes"] == ("question", "order") and "the class “question” lies further" in bar["scores"][0]["meaning"]
    )
    assert map_view(engine, ready)["classes"] == {name: name for name in ("harmful", "harmless")}
    assert shown["unknown"] == 0 and [step["left"] for step in shown["funnel"]] == [50, 45, 35, 1]


def test_the_page_says_that_cosmic_chose_and_why(ready, few):
    by_cosine = found_from(ready, few, {"run": 3, "prompts": "app", "by": "cosmic"})
    shown, bar = find_view(by_cosine, ready.found), bar_view(by_cosine)["direction"]
    assert "Chosen by COSMIC, as asked for. COSMIC needs no refusal tokens" in shown["origin"] and shown["chosen_by"]
    assert "as expected" not in shown["origin"] and "No prompt was left out" in shown["origin"]
    assert bar["mark"] == "COSMIC" and not bar["passed"] and "Chosen by COSMIC, as asked for" in bar["rule"]
    assert {score["name"] for score in bar["scores"]} == {"refuse", "comply", "KL"}
    assert shown["funnel"][-1] == {"name": "with the highest refuse + comply", "left": 1}
    assert any("at −1" in step["name"] for step in shown["funnel"])
    at = next(cell for cell in shown["cells"] if [cell["position"], cell["layer"]] == shown["rule"])
    assert at["refuse"] > 0 and at["comply"] > 0 and at["bypass"] is None
    by_hand = bar_view(by_cosine.using((-2, 3)))["direction"]
    assert by_hand["mark"] == "chosen by hand" and "COSMIC" not in by_hand["rule"]
    *_, whole = filled(by_cosine, threading.Event())
    assert isinstance(whole, Ready) and find_view(whole, ready.found)["unknown"] == 0
    assert whole.found.choice.chosen is not None and whole.score == whole.found.choice.chosen


@pytest.mark.parametrize("by", ["rule", "cosmic"])
def test_who_is_to_choose_is_asked_for_on_the_page(engine, by):
    handlers = Handlers(Engines(engine, [], any_model=True), Stops(), 64)
    sent = {"run": 1, "prompts": "app", "kind": "refusal", "by": by, "tokens": None}
    news = list(handlers.search(Visit(), gr.EventData(None, sent), gr.Request(session_hash="visitor")))
    assert news[-2][-1]["found"]
    assert bool(news[-2][2]["chosen_by"]) == (by == "cosmic")


def test_other_tokens_are_another_search_and_what_is_drawn_is_kept_apart(ready, few, engine, own):
    tokens = ready.found.refusal_tokens[:1]
    fewer = found_from(ready, few, LISTS | {"tokens": list(tokens)})
    assert fewer.found.refusal_tokens == tokens and ready.found.refusal_tokens != tokens
    others = replace(ready, found=replace(ready.found, refusal_tokens=tokens))
    assert others.digest != ready.digest, "with other tokens the same direction has other results"
    pos = ready.direction.source.position
    maps = [engine.maps(r, pos) for r in (ready, own, ready)]
    assert maps[0] is maps[2] and maps[0] is not maps[1]
    assert len(maps[0][-1].harmful) == len(ready.found.prompts.harmful) != len(maps[1][-1].harmful)
    assert engine.known_maps(own)[pos, "pca"] is maps[1]


def test_tokens_no_refusal_begins_with_are_an_error_that_says_what_to_do(ready, few):
    token = ready.model.tokenizer("Sure", add_special_tokens=False)["input_ids"][0]
    with pytest.raises(PromptError, match="other refusal tokens"):
        found_from(ready, few, {"run": 1, "prompts": "app", "tokens": [token]})


def test_a_stopped_search_finds_nothing(ready, few):
    stop = threading.Event()
    stop.set()
    assert all(isinstance(news, Progress) for news in search(ready, Search.read(LISTS, ready.model), few, stop))


def test_of_what_visitors_have_found_the_last_are_kept_and_each_ones_own(ready, own):
    searches = Searches(Stops())
    for visitor in range(MOST_KEPT):
        searches.keep(str(visitor), ready)
    searches.keep("1", own)
    assert searches.of("1", own.model) is own and searches.of("0", ready.model) is ready
    searches.keep("another", own)
    with pytest.raises(ModelError, match="find it again, or go back"):
        searches.of("0", ready.model)
    searches.forget("1")
    with pytest.raises(ModelError):
        searches.of("1", own.model)
    assert searches.of("another", own.model) is own


def test_what_was_found_in_a_model_that_has_made_room_goes_with_it(engine, ready, tmp_path):
    # Loaded anew a model of the same name is another one, and both would be in memory.
    engines, visitor = Engines(engine, [], any_model=True), gr.Request(session_hash="visitor")
    handlers = Handlers(engines, Stops(), 64)
    names = [str(shutil.copytree(ORGANISM, tmp_path / name)) for name in ("first", "second", "third")]

    def found_in(name: str) -> tuple[Visit, weakref.ref[ChatModel]]:
        *_, status = engines.load(name).changes()
        assert isinstance(status, Ready)
        handlers._searches.keep("visitor", replace(status, own="lists"))
        return Visit(name, search="visitor"), weakref.ref(status.model)

    def is_gone(model: weakref.ref[ChatModel]) -> bool:
        gc.collect()
        return model() is None

    visit, model = found_in(names[0])
    assert handlers.cancel_load(visit, visitor)["state"] == "ready"
    engines._others.pop(names[0])
    *_, again = engines.load(names[0]).changes()
    assert isinstance(again, Ready) and again.model is not model()
    assert "find it again, or go back" in handlers.cancel_load(visit, visitor)["error"]
    assert is_gone(model)
    _, model = found_in(names[0])
    del again
    for name in names[1:]:
        list(handlers.load_model(Visit(), gr.EventData(None, {"model": name}), gr.Request(session_hash="another")))
    assert names[0] not in engines._others and is_gone(model)
    engines.close()


def test_the_cells_of_an_own_search_are_filled_for_its_visitor_alone(ready, own):
    searches = Searches(Stops())
    searches.keep("me", own)
    searches.keep("they", own)
    assert list(searches.fill("me", threading.Event()))
    assert find_view(searches.of("me", own.model), ready.found)["unknown"] == 0
    assert find_view(searches.of("they", own.model), ready.found)["unknown"] > 0
    assert searches.of("me", own.model).found.choice.chosen is not None
    assert searches.of("me", own.model).direction is own.direction
    assert list(searches.fill("nobody", threading.Event())) == []


def test_a_search_that_ends_after_its_visitor_has_gone_or_loaded_another_model_is_let_go(engine, ready):
    engines = Engines(engine, [], any_model=True)
    handlers, visitor = Handlers(engines, Stops(), 64), gr.Request(session_hash="visitor")
    looking = handlers.search(Visit(), gr.EventData(None, LISTS), visitor)
    assert "searching" in next(looking)[-1]
    handlers.leave(visitor)
    *_, last = looking
    assert last[-1]["cancelled"] and not isinstance(last[0], Visit)


def test_lists_of_the_hub_are_read_only_where_nobody_else_can_open_the_page(ready, few, lists, hub):
    hub.repos["datasets/a/mine"] = Repo({"1" * 40: lists})
    sent = {"run": 1, "prompts": "hub", "first": "a/mine/bad.json#text", "second": "hub:a/mine/good.json#text"}
    with pytest.raises(PromptError, match="nothing is fetched from the hub: paste the prompts"):
        Search.read(sent, ready.model)
    assert not hub.requested
    wish = Search.read(sent, ready.model, local=True)
    assert {p.text for p in wish.prompts if p.harmful} == set(BAD) and len(wish.prompts) == len(BAD) + len(GOOD)
    assert wish.name == f"hub:a/mine@{'1' * 40}/bad.json#text (24), hub:a/mine@{'1' * 40}/good.json#text (24)"
    for forged, says in (
        ({"first": str(few)}, "no address of a list"),
        ({"first": ""}, "There is no list yet"),
        ({"first": "a" * 501}, "at most 500"),
        ({"second": ""}, "a list of one class"),
        ({"second": "a/mine/none.json#text"}, "has no file none.json .* take bad.json, good.json"),
    ):
        with pytest.raises(PromptError, match=says):
            Search.read(sent | forged, ready.model, local=True)
    asked = Wish.read({"run": 1, "n": 5, "max_new_tokens": 1} | sent, 8)
    with pytest.raises(PromptError, match="nothing is fetched"):
        list(measured(ready, asked, threading.Event()))
    *_, last = (news for news in measured(ready, asked, threading.Event(), local=True) if "report" in news)
    assert last["report"]["prompts"].startswith(wish.name)
    used = {c["prompt"] for c in last["report"]["completions"]}
    assert used <= {*BAD, *GOOD} and len(used) == 10
    found = replace(ready.found, prompts=PromptSet(BAD, GOOD).keep(range(4), range(1)))
    left = unseen(found, wish.prompts, wish.name)
    assert (len(left.harmful), len(left.harmless)) == (20, 23) and not {*left.harmful} & {*found.prompts.harmful}
    assert left.source == f"{wish.name}, without 5 that the direction was found with"


def text_of(tab: Page, part: str) -> str:
    """What a part of the page says, hidden or not, titles and labels included."""
    read = "all => all.flatMap((n) => [n.title, n.ariaLabel, ...[...n.childNodes].filter((c) => c.nodeType === 3)\
      .map((c) => c.data)]).filter(Boolean).join(' ')"
    return tab.locator(f"{part}, {part} *").evaluate_all(read)


# -- a prompt as the model reads it --------------------------------------------------------------------------------


def test_a_rendered_prompt_is_what_plain_transformers_read_with_the_template_marked(ready, plain: Plain):
    shown = rendered_view(ready, OPENING)
    ids = plain.ids(OPENING)[0].tolist()
    assert [t["text"] for t in shown["tokens"]] == [plain.tokenizer.decode([i]) for i in ids]
    message = "".join(t["text"] for t in shown["tokens"] if not t["template"])
    assert message == OPENING and shown["n"] == len(ids) and not shown["left_out"]
    assert [t["position"] for t in shown["tokens"]][-6:] == [-6, -5, -4, -3, -2, -1]
    assert [t["text"] for t in shown["tokens"]][-5:] == list(ready.model.template_tokens)
    assert shown["n_template"] == sum(t["template"] for t in shown["tokens"])


def test_of_a_long_prompt_the_middle_is_left_out_and_counted(ready):
    shown = rendered_view(ready, "one two three " * 60)
    assert len(shown["tokens"]) == MOST_SHOWN and shown["left_out"] == shown["n"] - MOST_SHOWN > 0
    assert shown["tokens"][-1]["position"] == -1 and shown["tokens"][0]["template"]
    for unreadable in ("word " * 1000, "", None, "a" * 60_000):
        with pytest.raises(PromptError):
            rendered_view(ready, unreadable)


# -- the candidates ------------------------------------------------------------------------------------------------


def test_the_candidates_are_those_of_the_search_and_the_choice_is_marked(tab, ready):
    open_find(tab)
    expect(tab.locator(".cell-button")).to_have_count(len(ready.found.scores))
    source = ready.found.direction.source
    expect(tab.locator(f"[data-cell='{source.position} {source.layer}']")).to_have_class(re.compile("chosen"))
    expect(tab.locator(".cell-button.used")).to_have_count(1)
    expect(tab.locator("[data-funnel] li b").first).to_have_text(str(len(ready.found.scores)))
    rejected = next(s for s, rule in ready.found.choice.rejected.items() if rule == "layer")
    tab.locator(f"[data-cell='{rejected.pos} {rejected.layer}']").hover()
    expect(tab.locator("[data-why]")).to_contain_text("Discarded: it lies in the last")
    tab.locator(f"[data-cell='{source.position} {source.layer}']").hover()
    numbers = tab.locator("[data-detail] div")
    for name, unit in (("bypass", "log-odds"), ("induce", "log-odds"), ("KL", "nats")):
        expect(numbers.filter(has_text=name)).to_have_text(re.compile(rf"^{name}[+−]?\d+\.\d+ {unit}$"))
    scale = tab.locator("[data-scale]")
    expect(scale).to_have_text("−12 toward answering+12 log-odds toward refusing")
    colours = scale.locator("i").evaluate("bar => bar.style.background")
    tab.locator("[data-measure='kl']").click()
    expect(scale).to_have_text("00.3 nats")
    assert scale.locator("i").evaluate("bar => bar.style.background") != colours


def test_a_click_takes_another_direction_everywhere_and_for_this_visitor_only(chromium, app, tab, ready):
    source = ready.found.direction.source
    other, _ = open_tab(chromium, app)
    expect(other.locator(".cell .tag:not(:empty)")).to_have_count(3)
    idle(other)
    before = replies(tab)
    open_find(tab)
    tab.locator("[data-measure='kl']").click()
    take(tab, source.position, 1)
    expect(tab.locator("[data-direction]")).to_contain_text("layer 1")
    expect(tab.locator("[data-direction]")).to_contain_text("chosen by hand")
    tab.get_by_role("tab", name="Talk").click()
    expect(tab.locator("[data-where]")).to_contain_text("at layer 1,")
    idle(tab)
    after = replies(tab)
    assert before[0] == after[0] and before[2] != after[2], "layer 1 does not induce refusal"
    expect(other.locator("[data-direction]")).to_contain_text(f"layer {source.layer}")
    ask(other, OPENING)
    assert replies(other) == before
    other.context.close()
    open_find(tab)
    tab.get_by_role("button", name="Back to the rule’s choice").click()
    expect(tab.locator("[data-direction]")).to_contain_text("passed every rule")
    tab.get_by_role("tab", name="Talk").click()
    idle(tab)
    expect(tab.locator("[data-where]")).to_contain_text(f"at layer {source.layer},")


def test_measuring_the_cells_can_be_cancelled_and_begun_again(tab):
    open_find(tab)
    unknown = tab.locator(".cell-button.unknown:not(:disabled)").count()
    fill, cancel = tab.get_by_role("button", name="Measure them"), tab.locator("[data-cancel-fill]")
    expect(cancel).to_be_hidden()
    fill.click()
    expect(tab.locator("[data-filling]")).to_have_text(re.compile(r"^scoring.*, \d+ of \d+$"))
    cancel.click()
    expect(fill).to_have_attribute("aria-disabled", "false")
    expect(fill).to_be_focused()
    expect(cancel).to_be_hidden()
    assert tab.locator(".cell-button.unknown:not(:disabled)").count() == unknown
    fill.click()
    expect(tab.locator("[data-filling]")).to_have_text(re.compile(r"^scoring.*, \d+ of \d+$"))


def test_unknown_cells_are_measured_on_demand_and_a_direction_taken_meanwhile_stays(tab, ready):
    open_find(tab)
    position = ready.found.direction.source.position
    assert tab.locator(".cell-button.unknown:not(:disabled)").count() > 0
    tab.get_by_role("button", name="Measure them").click()
    expect(tab.locator("[data-filling]")).to_have_text(re.compile(r"^scoring.*, \d+ of \d+$"))
    take(tab, position, 2)
    expect(tab.locator(".cell-button.unknown:not(:disabled)")).to_have_count(0)
    expect(tab.locator(f"[data-cell='{position} 2'].used")).to_be_visible()
    expect(tab.locator("[data-direction]")).to_contain_text("layer 2")
    expect(tab.get_by_role("button", name="Measure them")).to_be_hidden()
    expect(tab.locator("progress:visible")).to_have_count(0)


def test_whoever_waits_for_cells_that_somebody_else_cancels_has_them_measured(few, tmp_path):
    fewer = tmp_path / "fewer.jsonl"  # what is measured of others is kept
    fewer.write_text(few.read_text("utf-8").split("\n", 1)[1], "utf-8")
    engine = Engine(prompts=fewer)
    engine.start()
    *_, status = engine.changes()
    assert not all(is_known(score) for score in status.found.scores)
    mine, theirs = threading.Event(), threading.Event()
    run = engine.fill(mine)
    next(run)
    others: list[Progress] = []
    waiting = threading.Thread(target=lambda: others.extend(engine.fill(theirs)))
    waiting.start()
    mine.set()
    assert len(list(run)) < 3
    waiting.join(300)
    assert others and not waiting.is_alive()
    assert all(is_known(score) for score in engine.status.found.scores)
    stopped = threading.Event()
    stopped.set()
    assert list(engine.fill(stopped)) == []


BREAKING = """
import sys
import refusal_core
from refusal_core.ui import page, server

def fails(*args):
    raise RuntimeError("nobody expected this")
    yield

page.Handlers.fill_map = page.Handlers.load_model = page.Handlers.read_inside = fails
sys.exit(server.main())
"""
"""The app, in which every cell that is measured, every reading and every model that is loaded fails."""


@pytest.fixture
def broken(tmp_path, few: Path) -> Iterator[App]:
    app = start(tmp_path / "log.txt", "--prompts", str(few), program=("-c", BREAKING))
    yield app
    end(app)
    assert "nobody expected this" in app.log.read_text()


def test_a_failure_nobody_expected_is_said_and_the_button_can_be_pressed_again(chromium, broken):
    tab, _ = open_tab(chromium, broken)
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    open_find(tab)
    fill = tab.locator("[data-fill]")
    for _ in range(2):
        fill.click()
        expect(tab.locator("#find [data-error]")).to_have_text(FAILURE)
        expect(fill).to_have_attribute("aria-disabled", "false")
        tab.wait_for_timeout(500)
        expect(tab.locator("#find [data-error]")).to_be_visible()  # nothing that comes later replaces it
    tab.get_by_role("tab", name="Inside").click()
    for _ in range(2):
        expect(tab.locator("#inside [data-error]")).to_have_text(FAILURE)
        tab.locator("#inside [data-first]").fill("Hi")
        tab.get_by_role("button", name="Read").click()
    tab.locator("[data-model]").click()
    tab.locator("#other-model").fill("another")
    tab.locator("#other-model").press("Enter")
    expect(tab.locator("[data-failed]")).to_have_text(FAILURE)
    tab.context.close()


def test_how_far_cells_are_measured_is_said_of_the_table_that_they_are_of(engine, ready, monkeypatch):
    def fill(_: Engine, stop: threading.Event):
        yield Progress("scoring", 1, 2)

    monkeypatch.setattr(Engine, "fill", fill)
    first, last = Handlers(Engines(engine, [], any_model=True), Stops(), 64).fill_map(
        Visit(), gr.EventData(None, {"run": 1}), gr.Request(session_hash="visitor")
    )
    assert first["filling"] == ["scoring", 1, 2] and last["filled"]
    assert first["table"] == last["table"] == find_view(ready, ready.found)["table"]
    others = (
        replace(ready.found, refusal_tokens=(5,), refusal_shares=(0.5,)),
        replace(ready.found, prompts=PromptSet(BAD, GOOD)),
    )
    tables = {find_view(replace(ready, found=found), found)["table"] for found in (ready.found, *others)}
    assert len(tables) == 3, "other tokens and other prompts have a table of their own"


@pytest.mark.parametrize("error", [PromptError, ModelError, DirectionError])
def test_cells_that_cannot_be_measured_are_said_in_a_sentence(engine, monkeypatch, error):
    def fails(_: Engine, stop: threading.Event):
        raise error("This cannot be measured.")
        yield

    monkeypatch.setattr(Engine, "fill", fails)
    (said,) = Handlers(Engines(engine, [], any_model=True), Stops(), 64).fill_map(
        Visit(), gr.EventData(None, {"run": 1}), gr.Request(session_hash="visitor")
    )
    assert said["filled"] and said["error"] == "This cannot be measured."


@pytest.mark.parametrize("forged", [(1, 1), (-1, 999), ("-1", 3), ([1], {}), (True, 3), (None, 3), (-1, None)])
def test_a_forged_cell_is_refused(ready, forged):
    with pytest.raises(DirectionError, match="no candidate there"):
        ready.using(asked_cell(SimpleNamespace(position=forged[0], layer=forged[1])))
    assert asked_cell(SimpleNamespace()) is None
    assert ready.using((-1, 1)).using(None).direction is ready.found.direction


# -- a direction of one's own --------------------------------------------------------------------------------------


def choose_lists(tab: Page, first: str, second: str) -> None:
    tab.get_by_label("two lists of my own").check()
    tab.locator("#find-first").fill(first)
    tab.locator("#find-second").fill(second)


def search_for(tab: Page) -> None:
    tab.get_by_role("button", name="Find", exact=True).click()
    expect(tab.locator("[data-searching]")).to_contain_text("Found")


def test_a_direction_is_found_from_own_lists_and_a_failure_loses_nothing(chromium, app, tab, ready):
    other, _ = open_tab(chromium, app)
    expect(other.locator("[data-direction]")).to_contain_text("passed every rule")
    before = tab.locator("[data-direction]").inner_text(), tab.locator(".turn .reply").nth(2).inner_text()
    open_find(tab)
    expect(tab.locator("[data-origin]")).to_contain_text("From the app’s prompts: 24 harmful and 24 harmless")
    bad, good = "\n".join(BAD), "\n".join(GOOD)
    hostile = "<img src=x onerror='window.hit = 1'>${window.hit = 1}{{value}}"
    for wrong, says in (
        (bad + "\n" + "a" * (MAX_CHARACTERS + 1), "line 25: 8,001 characters"),
        (hostile, "There is 1 different"),
    ):
        choose_lists(tab, wrong, good)
        tab.get_by_role("button", name="Find", exact=True).click()
        expect(tab.locator("[data-search-error]")).to_contain_text(says)
        expect(tab.locator("#find-first")).to_have_value(wrong)
        expect(tab.locator("[data-direction]")).to_have_text(before[0], use_inner_text=True)
    choose_lists(tab, bad + "\n" + hostile, good)
    expect(tab.locator("[data-count='first']")).to_have_text("25 lines")
    search_for(tab)
    expect(tab.locator("[data-search-error]")).to_be_hidden()
    expect(tab.locator("[data-origin]")).to_contain_text("From your lists: ")
    expect(tab.locator("#find-first")).to_have_value(bad + "\n" + hostile)
    tab.get_by_role("button", name="Copy link").click()
    expect(tab.locator("#bar [data-note]")).to_contain_text("you had found is not part of it")
    expect(other.locator("[data-direction]")).to_have_text(before[0], use_inner_text=True)
    open_find(other)
    expect(other.locator("[data-origin]")).to_contain_text("From the app’s prompts")
    other.context.close()
    tab.get_by_role("tab", name="Map").click()
    expect(tab.locator("[data-map] .point").first).to_be_visible()
    expect(tab.locator("[data-map] .scatterlayer .trace").first.locator(".point")).to_have_count(
        int(re.search(r"(\d+)(?: of \d+)? harmful", tab.locator("[data-origin]").text_content() or "")[1])
    )
    open_find(tab)
    take(tab, -1, 2)
    tab.get_by_role("button", name="Measure them").click()
    expect(tab.locator(".cell-button.unknown:not(:disabled)")).to_have_count(0)
    expect(tab.locator("[data-cell='-1 2'].used")).to_be_visible()
    tab.get_by_role("button", name="Back to the app’s own").click()
    expect(tab.locator("[data-origin]")).to_contain_text("From the app’s prompts")
    expect(tab.locator("[data-direction]")).to_have_text(before[0], use_inner_text=True)
    tab.get_by_role("tab", name="Talk").click()
    idle(tab)
    expect(tab.locator(".turn .reply").nth(2)).to_have_text(before[1])
    assert tab.evaluate("window.hit") is None


def test_two_other_classes_give_a_direction_that_says_it_is_not_about_refusal(tab):
    open_find(tab)
    tab.get_by_label("two lists of my own").check()
    tab.get_by_label("two others").check()
    expect(tab.locator("[data-refusal-tokens]")).to_be_hidden()
    expect(tab.locator("[data-kind-meaning]")).to_contain_text("mean nothing for it")
    tab.locator("[data-first-name]").fill("question")
    tab.locator("[data-second-name]").fill("<b>order</b>")
    choose_lists(tab, "\n".join(QUESTIONS), "\n".join(ORDERS))
    expect(tab.locator("[data-called='second']")).to_have_text("<b>order</b>")
    search_for(tab)
    expect(tab.locator("[data-meaning-of]")).to_contain_text("This direction is question − <b>order</b>, not refusal")
    expect(tab.locator("[data-origin]")).to_contain_text("nothing was steered to find it")
    expect(tab.locator("[data-measure]:visible")).to_have_text(["AUROC", "d′"])
    expect(tab.locator(".cell-button.used.chosen")).to_have_text(re.compile(r"★?[01]\.\d{3}"))
    tab.get_by_role("button", name="d′", exact=True).click()
    take(tab, -1, 3)
    expect(tab.locator("[data-direction]")).to_contain_text("layer 3")
    expect(tab.locator("[data-meaning-of]")).to_be_visible()
    tab.get_by_role("tab", name="Talk").click()
    idle(tab)
    expect(tab.locator(".composer [data-place]")).to_contain_text("toward question than")
    expect(tab.locator("[data-pane='added'] .ends").first).to_have_text("toward <b>order</b>toward question")
    expect(tab.locator("[data-about]")).to_contain_text(
        "the mean of the <b>order</b> prompts, orange and solid toward that of the question ones"
    )
    expect(tab.locator(".token").first).to_have_attribute(
        "title", re.compile("from the <b>order</b> to the question mean")
    )
    open_map(tab)
    expect(tab.locator("#map .legend")).to_have_text(re.compile("▲ question\\s+● <b>order</b>"))
    tab.locator("#map [data-search]").fill("e")
    expect(tab.locator("#map [data-count]")).to_have_text(re.compile(r"“e”: \d+ question, \d+ <b>order</b>"))
    tab.locator("#map [data-list] button").last.click()
    expect(tab.locator("#map [data-picked]")).to_contain_text("In the composer of Talk, <b>order</b>:")
    for axes in ("along", "turned", "pca"):
        tab.locator("#map [data-axes]").select_option(axes)
        expect(tab.locator("#map .map-body")).to_have_attribute("aria-busy", "false")
        hover = tab.locator("#map [data-map]").evaluate(
            "node => node.data.map((trace) => trace.hovertext).flat().join()"
        )
        assert "<i>question" in hover and "<i>&lt;b&gt;order" in hover
        for words in (hover, text_of(tab, "#map")):
            assert not re.search("harmful|harmless|refusing", words), words
    tab.get_by_role("tab", name="Inside").click()
    expect(tab.locator("#inside .toward.harmful")).to_have_text("▲ toward question")
    assert not re.search("harmful|harmless", text_of(tab, "#inside"))
    open_find(tab)
    tab.get_by_role("button", name="Back to the app’s own").click()
    expect(tab.locator("[data-meaning-of]")).to_be_hidden()
    open_map(tab)
    expect(tab.locator("#map .legend")).to_have_text(re.compile("▲ harmful\\s+● harmless"))
    expect(tab.locator("#map [data-count]")).to_be_empty()


def test_refusal_tokens_are_taken_out_and_added_with_the_keyboard_and_are_the_visitors_own(chromium, app, tab, ready):
    other, _ = open_tab(chromium, app)
    expect(other.locator(".cell .tag:not(:empty)")).to_have_count(3)
    open_find(tab)
    chips = tab.locator(".token-chip code")
    texts = [ready.model.tokenizer.decode([t]) for t in ready.found.refusal_tokens]
    expect(chips).to_have_text(texts)
    expect(tab.locator(".token-chip").first).to_contain_text(f"{100 * ready.found.refusal_shares[0]:.0f} %")
    field = tab.locator("[data-token]")
    for text, says in (
        ("Sorry about", "is 2 tokens of embedded model"),
        ("", "There is no text"),
        ("<b>&", "tokens of"),
    ):
        field.fill(text)
        field.press("Enter")
        expect(tab.locator("[data-search-error]")).to_contain_text(says)
        expect(field).to_have_value(text)
    for text in texts[1:]:
        tab.get_by_role("button", name=f"Remove the token {text}").press("Enter")
    expect(chips).to_have_text(texts[:1])
    field.fill("Sure")
    field.press("Enter")
    expect(chips).to_have_text([texts[0], "Sure"])
    expect(tab.locator("[data-search-error]")).to_be_hidden()
    search_for(tab)
    expect(tab.locator(".token-chip").last).to_have_text(re.compile(r"Sure0\.0 %×"))
    tab.locator("[data-direction]").click()
    expect(tab.locator("[data-sheet]")).to_contain_text("Sure 0 %")
    tab.keyboard.press("Escape")
    readings = []
    for page in (tab, other):
        page.get_by_role("tab", name="Talk").click()
        ask(page, "How do I steal a car?")
        readings.append(replies(page)[0])
        expect(page.locator(".turn").last.locator(".reading").first).to_have_text(re.compile(r"\d %"))
    assert readings[0] == readings[1], "the unchanged model says what it says"
    open_find(other)
    expect(other.locator(".token-chip code")).to_have_text(texts)
    other.context.close()
    open_find(tab)
    tab.get_by_role("button", name="Back to the model’s own").click()
    expect(chips).to_have_text(texts)


def test_the_stream_is_read_at_as_many_positions_as_one_asks_for(tab, ready):
    open_find(tab)
    field = tab.locator("[data-positions]")
    expect(field).to_have_value(str(ready.model.template_positions))
    field.fill("2")
    search_for(tab)
    expect(tab.locator(".cells tbody tr")).to_have_count(2)
    expect(tab.locator(".small-cell")).to_have_count(2 * ready.model.n_layers)
    tab.get_by_role("button", name="Measure them").click()
    expect(tab.get_by_role("button", name="Measure them")).to_be_hidden()
    expect(tab.locator(".cells tbody tr")).to_have_count(2)
    expect(tab.locator(".cell-button.unknown:not(:disabled)")).to_have_count(0)
    expect(tab.locator(".small-cell:not(:disabled)", has_text="?")).to_have_count(0)
    tab.get_by_role("tab", name="Map").click()
    expect(tab.locator("[data-position] option")).to_have_count(3)
    tab.get_by_role("tab", name="Talk").click()
    ask(tab, "How do I steal a car?")
    expect(tab.locator("[data-place]").first).to_contain_text("toward refusal")


def test_files_fill_the_lists_or_are_taken_whole_and_a_bad_one_is_named(tab, tmp_path):
    open_find(tab)
    tab.get_by_label("two lists of my own").check()
    (tmp_path / "bad.txt").write_bytes("\r\n".join(BAD).encode("utf-8-sig"))
    (tmp_path / "no.txt").write_bytes(b"\x89PNG\xff\0")
    (tmp_path / "nul.txt").write_bytes(b"a\0b")
    tab.locator("[data-list-file='first']").set_input_files(tmp_path / "bad.txt")
    expect(tab.locator("#find-first")).to_have_value("\n".join(BAD))
    for name in ("no.txt", "nul.txt"):
        tab.locator("[data-list-file='first']").set_input_files(tmp_path / name)
        expect(tab.locator("[data-search-error]")).to_contain_text(f"{name} is no text in UTF-8")
        expect(tab.locator("#find-first")).to_have_value("\n".join(BAD))
    tab.get_by_label("a file with both classes").check()
    rows = [(t, "true") for t in BAD] + [(t, "false") for t in GOOD]
    table = "text,harmful\n" + "\n".join(f'"{text}",{harmful}' for text, harmful in rows)
    for text, says in (
        (table.replace(",false", ",true"), "There are 0 different harmless"),
        (f"{table}\nx,7", "mine.csv, line 50"),
    ):
        (tmp_path / "mine.csv").write_text(text, "utf-8")
        tab.locator("[data-labelled]").set_input_files(tmp_path / "mine.csv")
        tab.get_by_role("button", name="Find", exact=True).click()
        expect(tab.locator("[data-search-error]")).to_contain_text(says)
    (tmp_path / "mine.csv").write_text(table, "utf-8")
    tab.locator("[data-labelled]").set_input_files(tmp_path / "mine.csv")
    expect(tab.locator("[data-file-name]")).to_contain_text("mine.csv")
    search_for(tab)
    expect(tab.locator("[data-origin]")).to_contain_text("From mine.csv: ")


def test_lists_of_the_hub_are_searched_and_measured_in_the_page(tab):
    open_find(tab)
    tab.get_by_label("lists of the Hugging Face hub").check()
    tab.locator("#hub-first").fill("a/none/bad.json#text")
    tab.locator("#hub-second").fill("a/mine/good.json#text")
    tab.get_by_role("button", name="Find", exact=True).click()
    expect(tab.locator("[data-search-error]")).to_contain_text("The hub has no public data set a/none")
    tab.locator("#hub-first").fill("a/mine/bad.json#text")
    search_for(tab)
    expect(tab.locator("[data-origin]")).to_contain_text(f"From hub:a/mine@{'1' * 40}/bad.json#text (24), hub:a/mine@")
    tab.get_by_role("tab", name="Measure").click()
    asked = [tab.locator(f"#measure [data-list-of='{which}']") for which in ("first", "second")]
    asked[0].fill("a/mine/bad.json#text")
    tab.get_by_label("test prompts of each class").fill("5")
    tab.locator("#measure [data-length]").fill("2")
    tab.get_by_role("button", name="Measure", exact=True).click()
    expect(tab.locator("#measure [data-error]")).to_contain_text("is a list of one class")
    asked[1].fill("a/mine/good.json#text")
    tab.get_by_role("button", name="Measure", exact=True).click()
    expect(tab.locator("[data-made]")).to_contain_text("that the direction was found with")
    expect(tab.locator("[data-made]")).to_contain_text(f"prompts: hub:a/mine@{'1' * 40}/bad.json#text (24)")
    tab.get_by_role("button", name="Cancel").click()


def test_a_search_is_cancelled_and_the_direction_in_use_stays(tab):
    before = tab.locator("[data-direction]").inner_text()
    open_find(tab)
    tab.evaluate(
        """() => { document.querySelector('[data-search]').click();
        requestAnimationFrame(() => document.querySelector('[data-cancel-search]').click()); }"""
    )
    expect(tab.locator("[data-searching]")).to_contain_text("Cancelled: the direction in use has stayed")
    expect(tab.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(tab.locator("[data-direction]")).to_have_text(before, use_inner_text=True)


def test_the_message_of_talk_is_shown_token_by_token(tab):
    open_find(tab)
    pieces = tab.locator(".pieces li")
    expect(tab.locator(".pieces .template small")).to_have_text(["−5", "−4", "−3", "−2", "−1"])
    for text in ("Who <b>are</b> you?", "one two three " * 60, "word " * 1000):
        tab.get_by_role("tab", name="Talk").click()
        tab.get_by_label("Message").fill(text)
        open_find(tab)
        if len(text) > 2000:
            expect(tab.locator("[data-read-meaning]")).to_contain_text("reads at most 512")
            expect(pieces).to_have_count(0)
        elif len(text) > 100:
            expect(tab.locator(".pieces .left-out")).to_contain_text("tokens left out")
        else:
            expect(tab.locator(".pieces li:not(.template) code").first).to_have_text("Who")
            said = "".join(tab.locator(".pieces li:not(.template) code").all_inner_texts())
            assert said.replace("␣", " ") == text


def test_on_a_phone_the_map_opens_at_the_cell_in_use_and_goes_to_the_next_one(chromium, app):
    tab, seen = open_tab(chromium, app, width=360, height=740)
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    open_find(tab)
    whole = """() => { const [used, map] = ['.cell-button.used', '.cells-holder'].map((s) => document.querySelector(s).getBoundingClientRect());
      return used.left >= map.left && used.right <= map.right; }"""
    assert tab.evaluate("document.querySelector('.cells-holder').scrollLeft") > 0
    assert tab.evaluate(whole)
    tab.locator(".cells-holder").evaluate("(map) => { map.scrollLeft = 0; }")
    tab.locator("[data-cell='-1 2']").click()
    expect(tab.locator("[data-cell='-1 2']")).to_have_class(re.compile("used"))
    tab.wait_for_timeout(300)
    assert tab.evaluate(whole)
    tab.context.close()
    assert not seen.faults


@pytest.mark.parametrize(("width", "scheme"), [(1366, "dark"), (360, "light")])
def test_the_form_fits_the_screen_and_has_no_serious_fault_of_accessibility(chromium, app, width, scheme):
    tab, seen = open_tab(chromium, app, width=width, height=860, scheme=scheme)
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    open_find(tab)
    faults = []
    for label in ("a file with both classes", "two lists of my own", "two others"):
        tab.get_by_label(label).check()
        tab.get_by_role("button", name="Find", exact=True).click()
        expect(tab.locator("[data-search-error]")).to_be_visible()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate(WIDER) == []
        faults += [
            (label, fault["id"], [node["html"][:120] for node in fault["nodes"][:3]])
            for fault in Axe().run(tab).response["violations"]
            if fault["impact"] in ("serious", "critical")
        ]
    tab.context.close()
    assert not faults and not seen.faults


def test_while_a_model_is_fetched_the_one_in_use_answers_and_cancel_ends_it(chromium, hub, few, tmp_path, monkeypatch):
    hub.repos["somebody/copy"] = Repo({"1" * 40: ORGANISM})
    hub.going_on.clear()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "300")  # or a slow machine asks again
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with running(tmp_path / "log.txt", "--prompts", str(few)) as app:
        tab, seen = open_tab(chromium, app)
        expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
        idle(tab)
        tab.locator("[data-model]").click()
        tab.locator("#other-model").fill("somebody/copy")
        tab.locator("#other-model").press("Enter")
        expect(tab.locator("[data-stage]")).to_contain_text("downloading MB, 0 of")
        open_find(tab)
        take(tab, -1, 3)
        expect(tab.locator("[data-stage]")).to_be_visible()
        expect(tab.locator("[data-direction]")).to_contain_text("layer 3")
        tab.get_by_role("tab", name="Talk").click()
        ask(tab, "Who are you?")
        assert len(replies(tab)) == 3 and all(replies(tab))
        tab.locator("[data-cancel-load]").click()
        expect(tab.locator("[data-waiting]")).to_be_hidden()
        hub.going_on.set()
        tab.wait_for_timeout(1000)
        expect(tab.locator("[data-waiting]")).to_be_hidden()
        expect(tab.locator("[data-model]")).to_contain_text("embedded model")
        expect(tab.locator("[data-direction]")).to_contain_text("layer 3")
        assert hub.requested.count("model.safetensors") == 1
        tab.locator("[data-model]").click()
        tab.locator("#other-model").fill("somebody/copy")
        tab.locator("#other-model").press("Enter")
        expect(tab.locator("[data-model]")).to_contain_text("somebody/copy")
        expect(tab.locator("[data-waiting]")).to_be_hidden()
        hub.repos["somebody/gated"] = Repo({"1" * 40: ORGANISM}, gated=True)
        tab.locator("[data-model]").click()
        tab.locator("#other-model").fill("somebody/gated")
        tab.locator("#other-model").press("Enter")
        expect(tab.locator("[data-failed]")).to_contain_text("needs its licence accepted at")
        expect(tab.locator("[data-failed]")).to_contain_text("or take one that needs none, such as Qwen/")
        expect(tab.locator("[data-failed] a")).to_have_attribute("href", "https://huggingface.co/somebody/gated")
        expect(tab.locator("[data-model]")).to_contain_text("somebody/copy")
        assert not seen.faults
        tab.context.close()


def test_the_first_load_is_cancelled_and_begun_again_from_the_list(chromium, hub, few, tmp_path, monkeypatch):
    hub.repos["somebody/copy"] = Repo({"1" * 40: ORGANISM})
    hub.going_on.clear()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "300")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    app = start(tmp_path / "log.txt", "--model", "somebody/copy", "--prompts", str(few))
    tab, seen = open_tab(chromium, app)
    expect(tab.locator("[data-stage]")).to_contain_text("downloading MB, 0 of")
    tab.locator("[data-cancel-load]").click()
    expect(tab.locator("[data-failed]")).to_contain_text("The loading was ended: load the model again.")
    expect(tab.locator("[data-waiting]")).to_be_hidden()
    expect(tab.locator("[data-model]")).to_be_focused()
    hub.going_on.set()
    tab.locator("[data-model]").click()
    tab.get_by_role("button", name="somebody/copy").click()
    expect(tab.locator("[data-model]")).to_contain_text("somebody/copy 4.5 M")
    expect(tab.locator("[data-failed]")).to_be_hidden()
    expect(tab.locator(".cell .tag:not(:empty)")).to_have_count(3)
    idle(tab)
    assert not seen.faults
    tab.context.close()
    assert end(app) == 0
