"""Who comes while all seats are taken waits in line, is told the place, and gets a seat that is given up."""

import threading
from collections.abc import Callable, Iterator

import gradio as gr
import pytest

from refusal_core.prompts import load_prompts
from refusal_core.ui import line as line_module
from refusal_core.ui.engine import Engine, Engines, Ready
from refusal_core.ui.line import Line
from refusal_core.ui.page import LONG_WORK_AT_ONCE, VISITORS_AT_ONCE, Handlers, Visit
from refusal_core.ui.talk import Stops

ASKED = {"action": "ask", "prompt": "Hi", "removal": 1, "addition": 1, "temperature": 0, "max_new_tokens": 4, "seed": 0}
SOUGHT = {"prompts": "app", "kind": "refusal"}
MEASURED = {"n": 5, "max_new_tokens": 8, "rules": "default"}


class Visitor:
    """A place in a line: what was said of the wait is kept, and `leave` gives the place up."""

    def __init__(self, line: Line) -> None:
        self.stop, self.said = threading.Event(), []
        self._place = line.joined(self.stop)
        self._waits = self._place.__enter__()
        self.thread = threading.Thread(target=self._wait, daemon=True)  # one that is never served must not keep the run
        self.thread.start()

    def _wait(self) -> None:
        for progress in self._waits:
            self.said.append(progress.stage)

    @property
    def is_served(self) -> bool:
        self.thread.join(10)
        return not self.thread.is_alive()

    @property
    def waits(self) -> bool:
        self.thread.join(0.3)
        return self.thread.is_alive()

    def leave(self) -> None:
        self._place.__exit__(None, None, None)


def test_seats_go_to_who_came_first_and_places_are_told_as_they_change():
    line = Line(2)
    visitors = [Visitor(line) for _ in range(5)]
    assert all(v.is_served for v in visitors[:2]) and all(v.waits for v in visitors[2:])
    visitors[1].leave()
    assert visitors[2].is_served and all(v.waits for v in visitors[3:])
    visitors[0].leave()
    visitors[2].leave()
    assert all(v.is_served for v in visitors)
    places = [[stage.split(",")[0] for stage in v.said] for v in visitors]
    assert places[:3] == [[], [], ["you are number 1 in line"]]
    assert places[3] == [f"you are number {n} in line" for n in (2, 1)]
    assert places[4][:2] == [f"you are number {n} in line" for n in (3, 2)]


def test_whoever_stops_waits_no_longer_and_those_behind_come_nearer():
    line = Line(1)
    first, second, third = (Visitor(line) for _ in range(3))
    assert third.waits
    second.stop.set()
    assert second.is_served and third.waits
    second.leave()
    assert third.waits and third.said[-1] == "you are number 1 in line"
    first.leave()
    assert third.is_served


def test_the_time_that_is_told_is_that_of_earlier_work_and_what_was_stopped_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(line_module.time, "monotonic", lambda: now[0])
    line = Line(2)
    for seconds, is_stopped in ((40.0, False), (2.0, True)):
        stop = threading.Event()
        with line.joined(stop) as waits:
            assert list(waits) == []
            now[0] += seconds
            if is_stopped:
                stop.set()
    going = threading.Event()
    with (
        line.joined(going),
        line.joined(going),
        line.joined(going) as third,
        line.joined(going),
        line.joined(going) as fifth,
    ):
        assert next(third).stage == "you are number 1 in line, about 40 s"
        assert next(fifth).stage == "you are number 3 in line, about 80 s"


@pytest.fixture
def handlers(model, found) -> Iterator[Handlers]:
    engines, stops = Engines(Engine(), [], any_model=True), Stops()
    engines.of(None)._status = Ready(model, found, found.direction, load_prompts("test"), True)
    yield Handlers(engines, stops, 64)
    stops.stop_all()


@pytest.mark.parametrize(
    ("work", "sent", "seats", "said"),
    [
        ("answer", ASKED, VISITORS_AT_ONCE, lambda news: news[1].get("notice")),
        ("search", SOUGHT, LONG_WORK_AT_ONCE, lambda news: news[-1].get("searching", [""])[0]),
        ("measure", MEASURED, LONG_WORK_AT_ONCE, lambda news: news.get("measuring", [""])[0]),
        ("measure_writers", {"every": False}, LONG_WORK_AT_ONCE, lambda news: news.get("measuring", [""])[0]),
    ],
)
def test_the_page_serves_so_many_at_once_and_tells_the_next_one_the_place(
    handlers, work: str, sent: dict, seats: int, said: Callable
):
    def visit(number: int) -> Iterator:
        visitor, event = gr.Request(session_hash=str(number)), gr.EventData(None, sent | {"run": 1})
        turns = ((),) if work == "answer" else ()
        return getattr(handlers, work)(*turns, Visit(), event, visitor)

    begun = [visit(number) for number in range(seats)]
    assert not any("in line" in str(said(next(each))) for each in begun)
    late = visit(seats)
    assert str(said(next(late))).lower().startswith("you are number 1 in line")
    begun[0].close()  # the visitor has gone
    assert "in line" not in str(said(next(late)))
    for each in (*begun, late):
        each.close()
    assert "in line" not in str(said(next(visit(seats + 1))))
