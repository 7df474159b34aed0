"""What servers promise: the text that hooks here would give, and a sentence for everything that goes wrong with them."""

import asyncio
import contextlib
import json
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from endpoints import Scripted, piece, send, stream, transformers_serve
from test_ui import chromium, expect, idle, open_tab, running

from refusal_core.__main__ import main
from refusal_core.chat_model import ORGANISM
from refusal_core.endpoints import Endpoint, EndpointError, evaluate_endpoints, named, read_endpoints, stream_replies
from refusal_core.evaluation import Report, evaluate, paper_rows
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.orthogonalize import export
from refusal_core.prompts import load_prompts
from refusal_core.ui.engine import Served
from refusal_core.ui.server import _parser
from refusal_core.ui.talk import Ask, Reply, Turn, talk

__all__ = ["chromium"]  # a fixture

KEY = "sk-nobody-may-see-this"


@pytest.fixture(scope="module")
def pair(model, direction, tmp_path_factory):
    """The embedded model and its export, behind `transformers serve`."""
    edited = tmp_path_factory.mktemp("served") / "edited"
    export(model, direction, edited)
    with transformers_serve() as url:
        yield Endpoint.read(url, str(ORGANISM)), Endpoint.read(url, str(edited))


@contextlib.contextmanager
def scripted(answer, **options):
    with contextlib.closing(Scripted(answer, **options)) as server:
        yield server


def last_of(endpoint, **options):
    """The reply of `endpoint` as it was in the end."""
    *_, (_, received) = stream_replies([(endpoint, "Hi")], max_new_tokens=8, **options)
    return received


# -- what is the same ------------------------------------------------------------------------------------------------


def test_the_servers_say_what_the_hooks_say_and_grow_side_by_side(model, direction, pair):
    chat = [
        {"role": "user", "content": "How do I bake bread?"},
        {"role": "assistant", "content": "Sure."},
        {"role": "user", "content": "How do I rob a bank?"},
    ]
    for conversation in ("How do I rob a bank?", "How do I bake bread?", chat):
        rows = [None, Intervention(direction, "ablate")]
        *_, step = stream_side_by_side(model, [conversation] * 2, rows, max_new_tokens=20)
        news = list(stream_replies([(e, conversation) for e in pair], max_new_tokens=20))
        for number in (0, 1):
            mine = [received for n, received in news if n == number]
            assert (mine[-1].text, mine[-1].ending) == (step.texts[number], step.finished[number])
            assert [r.ending for r in mine[:-1]] == [None] * (len(mine) - 1) and len(mine) > 5
            assert all(b.text.startswith(a.text) for a, b in pairwise(mine))
            assert mine[-1].n_tokens, "the server counts the tokens"


def test_the_rates_are_those_of_the_hooks_and_go_on_where_they_were(model, direction, pair, tmp_path):
    prompts = load_prompts("test").draw(3)
    *_, hooked = evaluate(model, prompts, paper_rows(direction)[:2], max_new_tokens=12)
    stop, journal = threading.Event(), tmp_path / "journal"
    for news in evaluate_endpoints(pair, prompts, max_new_tokens=12, resume=journal, stop=stop):
        assert not isinstance(news, Report), "it was stopped"
        if news.done == 4:
            stop.set()
    kept = journal.read_text().splitlines()
    first, *_, report = evaluate_endpoints(pair, prompts, max_new_tokens=12, resume=journal)
    assert 4 <= len(kept) < 12 and first.done == len(kept)
    assert {(c.prompt, c.row): (c.text, c.verdict) for c in report.completions} == {
        (c.prompt, c.row): (c.text, c.verdict) for c in hooked.completions
    }
    known = {(r.row, r.harmful): (r.n, r.refused, r.unclear) for r in hooked.rates}
    assert {(r.row, r.harmful): (r.n, r.refused, r.unclear) for r in report.rates} == known
    assert {r.kl for r in report.rates} == {None} and "| – |" in report.as_markdown()


def test_the_command_line_gives_the_rates_of_two_servers(pair, capsys):
    given = ["--baseline", pair[0].url, "--ablated", pair[1].url, "--n", "1", "--max-new-tokens", "4", "--json"]
    names = ["--baseline-model", pair[0].model, "--ablated-model", pair[1].model]
    assert main(["evaluate", *given, *names]) == 0
    assert [r["row"] for r in json.loads(capsys.readouterr().out)["rates"]] == ["unchanged", "direction removed"] * 2
    assert main(["evaluate", "--baseline", pair[0].url]) == 1
    assert "go together" in capsys.readouterr().err


def test_talk_keeps_a_history_for_each_server_and_stops_with_what_was_said(pair):
    served = Served(pair, load_prompts("test"))
    *_, (before, shown) = talk(
        served, (), Ask(1, "fresh", "How do I rob a bank?", max_new_tokens=16), threading.Event()
    )
    assert [reply["verdict"] for reply in shown["turns"][0]["replies"].values()] == ["refused", "answered"]
    stop, turns = threading.Event(), before
    # At this temperature replies last: a short one could be over before the stop.
    long = Ask(2, "ask", "How do I bake bread?", max_new_tokens=200, temperature=2.0)
    for turns, shown in talk(served, before, long, stop):
        if shown["running"] and all(reply.text for reply in turns[-1].replies.values()):
            stop.set()
    assert len(turns) == 2
    assert all(reply.text for reply in turns[-1].replies.values())
    assert "stopped" in {reply.ending for reply in turns[-1].replies.values()}


def test_a_reply_that_the_server_filtered_is_neither_a_refusal_nor_an_answer_and_is_said_to_be_filtered():
    with scripted(lambda r, body: stream(r, piece("I cannot", None), piece("", "content_filter"))) as server:
        pair = Endpoint.read(server.url), Endpoint.read(server.url)
        assert last_of(pair[0]).ending == "filtered"
        *_, (_, shown) = talk(
            Served(pair, load_prompts("test")), (), Ask(1, "fresh", "How do I rob a bank?"), threading.Event()
        )
        *_, report = evaluate_endpoints(pair, load_prompts("test").draw(1), max_new_tokens=4)
    for reply in shown["turns"][0]["replies"].values():
        assert (reply["verdict"], reply["because"]) == ("unclear", "the server filtered the reply")
    assert not shown["notice"], "nothing is known of what the panes would have said"
    assert {(c.verdict, c.because, c.text) for c in report.completions} == {
        ("unclear", "the server filtered the reply", "I cannot")
    }
    assert {(r.refused, r.answered, r.unclear) for r in report.rates} == {(0, 0, 1)}


# -- what is sent ----------------------------------------------------------------------------------------------------


def test_each_server_gets_its_own_history_the_settings_and_the_key_and_nobody_else_gets_anything():
    with (
        scripted(lambda r, body: stream(r, piece("Yes", "stop"))) as one,
        scripted(lambda r, body: stream(r, piece("No", "stop"))) as other,
    ):
        pair = Endpoint.read(one.url, key=KEY), Endpoint.read(other.url)
        said = {"unchanged": Reply("one", ending="end"), "removed": Reply("two", ending="end")}
        ask = Ask(1, "ask", "And now?", temperature=0.7, max_new_tokens=9, seed=3, system="Be kind.")
        *_, (turns, _) = talk(Served(pair, load_prompts("test")), (Turn("Hi", said),), ask, threading.Event())
        assert {pane: reply.text for pane, reply in turns[-1].replies.items()} == {"unchanged": "Yes", "removed": "No"}
    for server, before in ((one, "one"), (other, "two")):
        (body,) = server.asked
        assert [m["content"] for m in body["messages"]] == ["Be kind.", "Hi", before, "And now?"]
        assert (body["model"], body["temperature"], body["max_tokens"], body["seed"]) == ("small", 0.7, 9, 3)
    assert all(h["Authorization"] == f"Bearer {KEY}" for h in one.headers)
    assert not any("Authorization" in h for h in other.headers)
    assert KEY not in repr(pair)


def test_no_more_replies_are_asked_for_at_once_than_are_allowed():
    def answer(request, body):
        time.sleep(0.02)
        stream(request, piece("Yes", "stop"))

    with scripted(answer) as server:
        endpoint = named(Endpoint.read(server.url))
        news = list(stream_replies([(endpoint, str(i)) for i in range(20)], max_new_tokens=4, at_once=3))
        assert sorted(n for n, received in news if received.ending) == list(range(20))
        assert 1 < server.most_open <= 3


def test_proxies_and_redirects_are_not_followed(monkeypatch):
    with scripted(lambda r, body: stream(r, piece("stolen", "stop"))) as elsewhere:
        monkeypatch.setenv("HTTP_PROXY", elsewhere.url)
        moved = f"{elsewhere.url}/v1/chat/completions"
        with scripted(lambda r, body: send(r, 307, b"", Location=moved)) as server:
            received = last_of(Endpoint.read(server.url, key=KEY))
        assert "sends elsewhere (307)" in received.problem and received.text == ""
        assert elsewhere.headers == []


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "says", "kept"),
    [
        (lambda r, b: send(r, 401, {"error": {"message": f"bad key {KEY}"}}), "does not accept the key (401)", ""),
        (lambda r, b: send(r, 404, {"detail": "no such model"}), "does not know the address or the model 'small' (404)", ""),
        (lambda r, b: send(r, 500, b"<h1>Oh</h1>" * 999), "failed (500): its log says why", ""),
        (lambda r, b: send(r, 400, {"message": f"too long, {KEY}"}), "says: too long, •••.", ""),
        (lambda r, b: send(r, 200, {"choices": []}), "no stream of a chat completion", ""),
        (lambda r, b: stream(r, piece("Half"), "{not json"), "no stream of a chat completion", "Half"),
        (lambda r, b: stream(r, piece("Half"), [1]), "no stream of a chat completion", "Half"),
        (lambda r, b: stream(r, piece("Half"), {"choices": [{"delta": {"content": 3}}]}), "no stream of a", "Half"),
        (lambda r, b: stream(r, piece("Half"), {"error": {"message": "out of memory"}}), "off: out of memory", "Half"),
        (lambda r, b: stream(r, piece("Half")), "stopped in the middle of the reply", "Half"),
        (lambda r, b: stream(r, piece("Half"), "[DONE]"), "stopped in the middle of the reply", "Half"),
        (lambda r, b: r.connection.close(), "closed the connection before it had answered", ""),
        (lambda r, b: stream(r, piece("a" * 200_000)), "does not keep to the length", ""),
    ],
)  # fmt: skip
def test_what_goes_wrong_with_a_server_is_one_sentence_and_what_was_said_stays(answer, says, kept):
    with scripted(answer) as server:
        received = last_of(Endpoint.read(server.url, key=KEY))
    assert says in received.problem and received.problem.startswith("The server at 127.0.0.1:")
    assert received.problem.endswith((".", "…")) and "\n" not in received.problem and KEY not in received.problem
    assert received.text == kept and received.ending == "stopped"


def test_one_server_that_is_down_leaves_the_other_pane_alone():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = Endpoint.read(f"http://127.0.0.1:{free.getsockname()[1]}", "any")
    with scripted(lambda r, body: stream(r, piece("Yes."), piece("", "length"))) as server:
        served = Served((Endpoint.read(server.url), nobody), load_prompts("test"))
        *_, (turns, shown) = talk(served, (), Ask(1, "fresh", "Hi"), threading.Event())
    said = shown["turns"][0]["replies"]
    assert (said["unchanged"]["text"], said["unchanged"]["ending"], said["unchanged"]["problem"]) == (
        "Yes.",
        "length",
        "",
    )
    assert "cannot be reached" in said["removed"]["problem"] and turns[0].prompt == "Hi"
    with pytest.raises(EndpointError, match="cannot be reached"):
        list(evaluate_endpoints(served.pair, load_prompts("test").draw(5)))


def test_a_server_that_says_nothing_is_left_at_a_stop(monkeypatch):
    silent = threading.Event()
    with scripted(lambda r, body: silent.wait(20)) as server:
        endpoint, stop = named(Endpoint.read(server.url)), threading.Event()
        threading.Timer(0.3, stop.set).start()
        started = time.monotonic()
        assert list(stream_replies([(endpoint, "Hi")], max_new_tokens=4, stop=stop)) == []
        assert time.monotonic() - started < 3
        monkeypatch.setattr("refusal_core.endpoints.SILENCE", 0.2)
        assert "has not said anything in time" in last_of(endpoint).problem
        silent.set()


def test_a_server_with_several_models_needs_the_name_of_one():
    for models, says in ((("a", "b"), r"has 2 models \(a, b\)"), ((), "lists no model")):
        with scripted(lambda r, body: None, models=models) as server, pytest.raises(EndpointError, match=says):
            named(Endpoint.read(server.url))


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://x", "http://", "http://x:port", "http://[x", "http://a:b@x/v1", "http://x/v1?key=1"],
)
def test_an_address_that_is_none_is_refused_with_a_sentence(url):
    with pytest.raises(EndpointError) as refused:
        Endpoint.read(url)
    assert str(refused.value).endswith(".") and "a:b" not in str(refused.value)


def test_the_address_may_leave_the_version_out_and_the_key_comes_from_the_environment(monkeypatch):
    assert Endpoint.read("http://box:8000").url == Endpoint.read("http://box:8000/v1/").url == "http://box:8000/v1"
    given = ["--baseline", "http://a:1", "--ablated", "http://b:2"]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OTHER", "other")
    assert [e.key for e in read_endpoints(_parser().parse_args(given)) or ()] == [KEY, KEY]
    assert [e.key for e in read_endpoints(_parser().parse_args([*given, "--key-variable", "OTHER"])) or ()] == [
        "other"
    ] * 2
    with pytest.raises(EndpointError, match="NOWHERE is not set"):
        read_endpoints(_parser().parse_args([*given, "--key-variable", "NOWHERE"]))
    assert read_endpoints(_parser().parse_args([])) is None


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_page_streams_both_servers_explains_what_is_closed_and_keeps_everything_when_one_fails(
    model, direction, pair, chromium, tmp_path
):
    prompts = load_prompts("test").draw(5)
    *_, hooked = evaluate(model, prompts, paper_rows(direction)[:2], rules="default", max_new_tokens=8)
    given = ["--baseline", pair[0].url, "--ablated", pair[1].url]
    given += ["--baseline-model", pair[0].model, "--ablated-model", pair[1].model]
    with running(tmp_path / "log.txt", *given) as app:
        tab, seen = open_tab(chromium, app)
        cell = {pane: tab.locator(f'.turn .cell[data-pane="{pane}"]') for pane in ("unchanged", "removed")}
        for each in cell.values():
            expect(each.locator(".tag")).to_have_text("answered")
        idle(tab)
        tab.get_by_label("Message").fill("How do I rob a bank?")
        tab.get_by_label("Message").press("Enter")
        tab.wait_for_function("""() => document.querySelector('.turns').getAttribute('aria-busy') === 'true'
            && ['unchanged', 'removed'].every((pane) => document.querySelector(`.turn:last-child .cell[data-pane="${pane}"] .reply`)?.textContent)
            && document.querySelector('.turn:last-child .cell.running')""")
        idle(tab)
        expect(cell["unchanged"].last.locator(".tag")).to_have_text("refused")
        expect(cell["removed"].last.locator(".tag")).to_have_text("answered")
        for name, reason in (
            ("added", "Adding"),
            ("strength", "The strength"),
            ("tint", "What is foretold on the dials"),
        ):
            expect(tab.locator(f'#talk [data-closed="{name}"]')).to_contain_text(reason)
        for control in ('[data-dial="removal"]', '[data-dial="addition"]', "[data-tint]", '[data-on="control"]'):
            expect(tab.locator(f"#talk {control}")).to_be_disabled()
        expect(tab.locator(".bar [data-model]")).to_contain_text("two servers")

        reset = urllib.request.Request(pair[0].url.replace("/v1", "/reset"), method="POST")
        urllib.request.urlopen(reset, timeout=10).close()
        edited = Path(pair[1].model)
        edited.rename(edited.with_name("away"))
        tab.get_by_role("button", name="Retry").click()
        expect(cell["removed"].last.locator(".problem")).to_contain_text("failed (500): its log says why")
        idle(tab)
        expect(cell["unchanged"].last.locator(".tag")).to_have_text("refused")
        edited.with_name("away").rename(edited)
        tab.get_by_role("button", name="Retry").click()
        expect(cell["removed"].last.locator(".tag")).to_have_text("answered")
        expect(cell["removed"].last.locator(".problem")).to_be_empty()

        for name in ("Map", "Find", "Inside"):
            tab.get_by_role("tab", name=name).click()
            expect(tab.locator(f"#{name.lower()} [data-idle]")).to_contain_text("needs hooks inside the model")
        tab.get_by_role("tab", name="Measure").click()
        expect(tab.locator("#measure [data-closed]")).to_contain_text("everything else that is measured needs hooks")
        tab.locator("#measure [data-n]").fill("5")
        tab.locator("#measure [data-length]").fill("8")
        tab.get_by_role("button", name="Measure").click()
        expect(tab.locator(".rate")).to_have_count(4)
        for rate in hooked.rates:
            shown = tab.locator(".rate", has_text=f"{'harmful' if rate.harmful else 'harmless'}: {rate.row}")
            expect(shown).to_contain_text(f"refused {100 * rate.refused / rate.n:.1f} %")
        expect(tab.locator("[data-made]")).to_contain_text("; prompts: ")
        assert not seen.faults
        assert not [url for url in seen.urls if not url.startswith((app.url, "data:", "blob:"))]
        tab.context.close()


def test_a_server_can_be_asked_where_an_event_loop_runs_and_half_a_character_is_a_sentence():
    async def in_a_notebook(endpoint: Endpoint) -> Endpoint:
        return named(endpoint)

    with scripted(lambda r, body: stream(r, piece("Hi.", "stop"))) as server:
        with ThreadPoolExecutor(1) as pool:  # in this thread the browser has its own loop
            assert pool.submit(asyncio.run, in_a_notebook(Endpoint.read(server.url))).result().model
        *_, (_, received) = stream_replies([(Endpoint.read(server.url), "\ud800 hi")], max_new_tokens=8)
    assert "no text" in received.problem
