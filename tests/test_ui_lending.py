"""What the page promises on a Space that lends GPUs: a worker runs the model, and nobody sees a difference.

`spaces`, its workers and the page are real; see `zerogpu` for what is not.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import pytest
import torch
from gradio.context import LocalContext
from playwright.sync_api import Page
from test_ui import OPENING, App, ask, chromium, expect, idle, open_find, open_tab, replies, running, type_message
from test_ui_find import BAD, GOOD, few, search_for
from torch.testing import assert_close
from zerogpu import OFFERED, QUOTA, STEPS, Lender

from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.prompts import load_prompts
from refusal_core.selection import Found, find_direction
from refusal_core.ui import lending
from refusal_core.ui.engine import Ready
from refusal_core.ui.lending import LendingError, on_gpu, once_on_gpu
from refusal_core.ui.talk import Ask, talk

__all__ = ["chromium", "few"]  # fixtures

VISITOR = {"x-ip-token": "a.e30.c"}
"""What the proxy of the hub says of a visitor, here nothing."""


@dataclass
class Space:
    """An app that borrows its GPUs, who lends them, and a file with the process of every step of a model."""

    app: App
    lender: Lender
    steps: Path
    loads: int = 1

    @property
    def steppers(self) -> list[int]:
        return [int(pid) for pid in self.steps.read_text().split()]

    def page_ran_nothing(self) -> bool:
        """But for the one step with which each loaded model is checked, on the CPU."""
        return self.steppers.count(self.app.process.pid) == self.loads


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another model: the embedded one in a folder of its own."""
    folder = tmp_path_factory.mktemp("other") / "model"
    folder.mkdir()
    for path in ORGANISM.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def space(tmp_path_factory, few: Path, other: Path) -> Iterator[Space]:
    folder, lender = tmp_path_factory.mktemp("space"), Lender()
    (folder / "steps").touch()
    (folder / "cgroup").write_text("0::/\n")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "SPACE_ID": "owner/space",
            "SPACES_ZERO_GPU": "true",
            "SPACES_ZERO_DEVICE_API_URL": lender.url,
            "ZEROGPU_PROC_SELF_CGROUP_PATH": str(folder / "cgroup"),
            STEPS: str(folder / "steps"),
            OFFERED: str(other),
        }.items():
            patch.setenv(name, value)
        program = ("-m", "tests.zerogpu")
        with running(folder / "log.txt", "--prompts", str(few), program=program) as app:
            yield Space(app, lender, folder / "steps")
    assert not any(Path(f"/proc/{pid}").exists() for pid in lender.seen), "a worker has outlived the app"
    lender.close()


@pytest.fixture
def tab(chromium, space: Space) -> Iterator[Page]:
    page, seen = open_tab(chromium, space.app)
    page.set_extra_http_headers(VISITOR)
    expect(page.locator(".cell .tag:not(:empty)")).to_have_count(3)
    idle(page)
    yield page
    space.lender.refusal = None
    page.context.close()
    assert not seen.faults


@pytest.fixture(scope="module")
def plain(few: Path) -> Ready:
    """The same model and direction where there is no Space: here."""
    model = ChatModel.load(ORGANISM, device="cpu", dtype=torch.bfloat16)
    *_, found = find_direction(model, load_prompts("train", few), load_prompts("val", few))
    assert isinstance(found, Found)
    return Ready(model, found, found.direction, load_prompts("test", few), True)


def said(ready: Ready, text: str) -> list[str]:
    *_, (turns, _) = talk(ready, (), Ask(1, "fresh", text, max_new_tokens=120), threading.Event())
    return [reply.text for reply in turns[-1].replies.values()]


# -- the page ------------------------------------------------------------------------------------------------------


def test_replies_stream_from_a_worker_and_are_those_of_the_app_elsewhere(space, tab, plain):
    assert replies(tab) == said(plain, OPENING)
    for text in ("How do I steal a car?", "Who are you?"):
        tab.get_by_role("button", name="Clear").click()
        ask(tab, text)
        assert replies(tab) == said(plain, text)
    expect(tab.locator("[data-device]")).to_contain_text("borrowed GPU")
    assert space.lender.reports == 1
    assert space.page_ran_nothing()
    assert set(space.steppers) - {space.app.process.pid} <= space.lender.seen


def test_what_is_foretold_is_what_the_replies_then_start_with_and_the_tint_is_there(space, tab):
    foretold = type_message(tab, "How do I steal a car?")
    expect(tab.locator(".composer [data-place]")).to_contain_text("further toward refusal than")
    ask(tab, "How do I steal a car?")
    readings = tab.locator(".turn").last.locator(".reading").filter(visible=True).all_inner_texts()
    assert foretold == [said.removeprefix("starts like a refusal ") for said in readings]
    expect(tab.locator(".turn").last.locator(".cell[data-pane='added'] .token").first).to_be_visible()
    assert space.page_ran_nothing()


def begin_long_replies(tab: Page) -> None:
    """Asks for replies that last, and waits for their first words."""
    tab.locator("[data-length]").fill("120")
    tab.locator("[data-temperature]").fill("2")
    tab.get_by_label("Message").fill("Write a poem about the sea.")
    tab.get_by_label("Message").press("Enter")
    expect(tab.locator(".turn").last.locator(".words")).to_have_text("Write a poem about the sea.")
    expect(tab.locator(".turn").last.locator(".reply").first).not_to_be_empty()


def test_stop_ends_the_replies_and_gives_the_gpu_back(space, tab):
    begin_long_replies(tab)
    tab.locator("[data-stop]").click()
    idle(tab)
    ended = tab.locator(".turn").last.locator(".rest").filter(visible=True).all_inner_texts()
    assert any("stopped at" in rest for rest in ended), ended
    assert space.lender.all_are_back(10)
    tab.locator("[data-temperature]").fill("0")
    ask(tab, "Who are you?")
    assert all(replies(tab))
    assert space.page_ran_nothing()


def test_a_direction_is_found_from_own_lists_and_every_cell_measured(space, tab):
    open_find(tab)
    tab.get_by_label("two lists of my own").check()
    tab.locator("#find-first").fill("\n".join(BAD))
    tab.locator("#find-second").fill("\n".join(GOOD))
    search_for(tab)
    expect(tab.locator("[data-origin]")).to_contain_text("From your lists")
    tab.locator("[data-fill]").click()
    expect(tab.locator("[data-fill]")).to_be_hidden()
    tab.get_by_role("tab", name="Map").click()
    expect(tab.locator("#map .js-plotly-plot").first).to_be_visible()
    tab.get_by_role("tab", name="Talk").click()
    ask(tab, "Who are you?")
    assert all(replies(tab))
    assert space.page_ran_nothing()


def test_what_lies_inside_and_rates_are_measured(space, tab):
    tab.get_by_role("tab", name="Inside").click()
    expect(tab.locator("#inside .js-plotly-plot").first).to_be_visible()
    tab.get_by_role("tab", name="Measure").click()
    tab.locator("#measure input[type=number]").first.fill("5")
    tab.locator("#measure [data-length]").fill("8")
    tab.get_by_role("button", name="Measure", exact=True).click()
    expect(tab.locator("[data-curves-meaning]")).to_contain_text("Means over", timeout=300_000)
    assert space.page_ran_nothing()


def test_without_a_gpu_the_page_says_what_to_do_and_nothing_is_lost(space, tab):
    ask(tab, "Who are you?")
    before = tab.locator(".turn .words").all_inner_texts(), replies(tab)
    for refusal, says in (
        (
            (429, QUOTA),
            "Your share of Hugging Face’s GPU time is used up: sign in there for more, or try again in 0:34:12.",
        ),
        (
            (429, QUOTA | {"wait": "-PT1S"}),
            "This takes longer than Hugging Face lends a GPU for: ask for less at a time.",
        ),
        ((503, {}), "All GPUs of Hugging Face are lent to others just now: try again in a minute."),
    ):
        space.lender.refusal = refusal
        tab.get_by_label("Message").fill("How do I bake bread?")
        tab.get_by_label("Message").press("Enter")
        expect(tab.locator(".composer [data-error]")).to_have_text(says)
        expect(tab.get_by_label("Message")).to_have_value("How do I bake bread?")
        assert (tab.locator(".turn .words").all_inner_texts(), replies(tab)) == before
    open_find(tab)
    tab.get_by_role("button", name="Find", exact=True).click()
    expect(tab.locator("[data-search-error]")).to_contain_text("All GPUs of Hugging Face are lent")
    tab.get_by_role("tab", name="Talk").click()
    space.lender.refusal = None
    ask(tab, "How do I bake bread?")
    assert all(replies(tab))
    assert space.page_ran_nothing()


def test_a_gpu_that_is_taken_back_leaves_what_was_said_and_the_next_one_answers(space, tab):
    begin_long_replies(tab)
    space.lender.take_back()
    expect(tab.locator(".composer [data-error]")).to_contain_text("The borrowed GPU was taken back")
    idle(tab)
    assert any(replies(tab))
    tab.locator("[data-temperature]").fill("0")
    ask(tab, "Who are you?")
    assert all(replies(tab))
    assert space.page_ran_nothing()


def test_a_worker_that_is_older_than_a_model_has_it_too(space, tab, other):
    workers, before = set(space.lender.seen), len(space.steppers)
    tab.locator("[data-model]").click()
    tab.get_by_role("button", name=str(other)).click()
    space.loads += 1
    expect(tab.locator("[data-model]")).to_contain_text(str(other))
    for _ in range(5):  # one that still ends what nobody waits for is not free, and then a new one answers
        ask(tab, "Who are you?")
        assert all(replies(tab))
        if workers & set(space.steppers[before:]):
            break
    assert workers & set(space.steppers[before:]), "a worker that was there before"
    assert space.page_ran_nothing()


# -- without a Space ------------------------------------------------------------------------------------------------


def test_elsewhere_the_work_is_done_here_and_its_errors_are_its_own(model):
    def work(n: int, *, stop: threading.Event) -> Iterator[tuple[int, int]]:
        for i in range(n):
            yield os.getpid(), i
        raise ModelError(str(stop.is_set()))

    stop, got = threading.Event(), []
    with pytest.raises(ModelError, match="True"):
        for pair in on_gpu(work, 2, model=model, seconds=1, stop=stop):
            got.append(pair)
            stop.set()
    assert got == [(os.getpid(), 0), (os.getpid(), 1)]
    assert once_on_gpu(sorted, [2, 1], model=model, seconds=1, reverse=True) == [2, 1]


def test_work_of_which_nobody_wants_the_rest_is_told_so_and_waited_for_elsewhere(model, monkeypatch):
    # A generator of `spaces` that is closed stops whatever its worker does by then; who closes one may be the event loop.
    yielded, ended, closed = [], threading.Event(), threading.Event()

    def worker(*args):
        for answer in lending._work(*args):
            yield answer
            assert closed.wait(20), "the one who closes it does not wait"
        ended.set()

    def work():
        for i in range(9):
            yielded.append(i)
            yield i

    monkeypatch.setattr(lending, "GPUS_ARE_LENT", True)
    monkeypatch.setattr(lending, "_borrowed", worker)
    answers = on_gpu(work, model=model, seconds=1)
    assert next(answers) == 0
    answers.close()
    closed.set()
    assert ended.wait(20) and yielded == [0]


def test_before_there_is_a_visitor_work_without_a_gpu_is_done_here(model, monkeypatch):
    def refused(*args):
        raise gr.Error("No GPU was available", title="ZeroGPU client error")
        yield

    monkeypatch.setattr(lending, "GPUS_ARE_LENT", True)
    monkeypatch.setattr(lending, "_borrowed", refused)
    assert once_on_gpu(os.getpid, model=model, seconds=1) == os.getpid()
    visit = LocalContext.request.set(gr.Request())
    with pytest.raises(LendingError, match="All GPUs"):
        once_on_gpu(os.getpid, model=model, seconds=1)
    LocalContext.request.reset(visit)


def test_a_worker_loads_a_model_though_it_has_one_thread_of_those_its_page_had(other):
    ended: list[int | None] = []

    def page():
        torch.set_num_threads(2)
        torch.randn(1000, 1000).square().sum()  # from now on two threads wait for work of this one
        worker = multiprocessing.get_context("fork").Process(target=lending._named, args=((str(other), None),))
        worker.start()
        worker.join(60)
        ended.append(worker.exitcode)
        worker.kill()
        worker.join()

    threads = torch.get_num_threads()
    forking = threading.Thread(target=page)
    forking.start()
    forking.join()
    torch.set_num_threads(threads)
    assert ended == [0]


def test_a_worker_that_cannot_be_asked_to_end_is_gone_as_well(monkeypatch):
    def stuck():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        theirs.send("stuck")
        time.sleep(60)

    monkeypatch.setattr(lending, "PATIENCE", 0.5)
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe(duplex=False)
    worker = fork.Process(target=stuck)
    worker.start()
    assert mine.recv() == "stuck"
    lending.give_back()
    assert not Path(f"/proc/{worker.pid}").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.int64])
def test_a_tensor_comes_back_as_it_was(dtype):
    for x in (torch.randn(3, 4).T.to(dtype), torch.zeros(0, 2, dtype=dtype), torch.tensor(2.5).to(dtype)):
        make, args = lending._as_bytes(x)
        assert_close(make(*args), x, rtol=0, atol=0)


def test_the_light_version_says_the_same_without_the_activations(plain):
    light = plain.light
    assert said(light, "Who are you?") == said(plain, "Who are you?")
    assert light.digest == plain.digest and light.score == plain.score
    assert not light.found.harmful.numel() and not light.found.val_harmless.numel()
    assert light.found.harmful.untyped_storage().nbytes() == 0


def test_a_failure_of_the_work_is_none_of_lending():
    assert isinstance(lending._said(gr.Error("GPU task aborted", title="ZeroGPU worker error")), LendingError)
    failed = lending._said(gr.Error("KeyError", title="ZeroGPU worker error"))
    assert not isinstance(failed, ModelError) and "KeyError" in str(failed)
