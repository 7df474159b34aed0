"""The page: the bar, the tabs, and what happens when something is clicked."""

import base64
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from refusal_core.chat_model import ModelError
from refusal_core.directions import Direction, DirectionError
from refusal_core.formats import read_direction, to_gguf
from refusal_core.prompts import PromptError
from refusal_core.selection import Progress, refusal_token
from refusal_core.ui.bar import SETTLED, bar_view, loading_view
from refusal_core.ui.component import part, relay
from refusal_core.ui.engine import CLOSED, ENDED, NEEDS_HOOKS, Cell, Engine, Engines, Failed, Ready, Served, Status
from refusal_core.ui.find import asked_cell, find_view, rendered_view, table_of
from refusal_core.ui.forecast import forecast
from refusal_core.ui.inside import PAIR, inside_view, writers_view
from refusal_core.ui.lending import GLANCE, SEARCH, on_gpu, once_on_gpu
from refusal_core.ui.line import Line
from refusal_core.ui.map import map_view, umap_view
from refusal_core.ui.measure import Wish, measured, measuring_view, written
from refusal_core.ui.search import Search, Searches, search
from refusal_core.ui.talk import (
    MAX_NEW_TOKENS,
    OPENING,
    SETTINGS,
    Ask,
    Stops,
    Turn,
    opening_view,
    served_view,
    talk,
    tint,
    view,
)

VISITORS_AT_ONCE = 16
"""How many get replies; whoever comes later waits in line."""

LONG_WORK_AT_ONCE = 2
"""How many searches go on, and how many measurements of each kind."""

FORECASTS_AT_ONCE = 4
MOST_WAITING = 64
"""How many of a kind of work are in hand or in line."""

TITLE = "Refusal is a direction"
SENT = ("run", "action", "prompt", "example", "cell", *SETTINGS)
"""The fields of a request to the Talk tab."""

SOUGHT = (
    *("run", "prompts", "kind", "first", "second", "first_name", "second_name", "file_name", "file_text"),
    *("by", "tokens", "n_positions"),
)
"""The fields of a search for another direction."""

Turns = tuple[Turn, ...]

FAILURE = "Something went wrong here, and the log says what: try it again."


@dataclass(frozen=True)
class Visit:
    """What a visitor has chosen: a model by its name, a candidate of its map; None is what the app chose.

    A `direction` that they brought along comes before the cell. `search` is the session whose own search the candidates
    are from. What a page shows that has been open for longer than its state was kept, over a night or over a new start of
    the app, `is_known` no more: nothing can be done for it that would not be about something else.
    """

    model: str | None = None
    cell: Cell | None = None
    direction: Direction | None = None
    search: str | None = None
    is_known: bool = True

    @property
    def plain(self) -> "Visit":
        """The same with what the app chose for the model."""
        return Visit(self.model, is_known=self.is_known)


FORGOTTEN = Visit(is_known=False)
RELOAD = (
    "The page has been open for so long that the app no longer knows it: save what you want to keep, and reload it."
)


class Handlers:
    """What the page does when something happens on it. A visit is the visitor's own; models are shared."""

    def __init__(self, engines: Engines, stops: Stops, most_tokens: int) -> None:
        self._engines, self._stops, self._most_tokens = engines, stops, most_tokens
        self._searches = Searches(stops)
        self._loads: dict[str, int] = {}
        self._loading: dict[str, Engine] = {}
        self._talking = Line(VISITORS_AT_ONCE)
        self._searching, self._measuring, self._looking = (Line(LONG_WORK_AT_ONCE) for _ in range(3))

    def open_page(self) -> Iterator[tuple]:
        """Visit, and the bar while the model is prepared; then everything: bar, panes, map, candidates."""
        engine = self._engines.of(None)
        for status in engine.changes():
            if isinstance(status, Ready):
                yield Visit(), self._bar(status) | SETTLED, opening_view(status), gr.skip(), gr.skip()
                yield *(gr.skip(),) * 3, map_view(engine, status), find_view(status, status.found)
            else:
                panes = served_view(status) if isinstance(status, Served) else gr.skip()
                yield Visit(), SETTLED | self._bar(status), panes, gr.skip(), gr.skip()

    def load_model(self, visit: Visit, event: gr.EventData, request: gr.Request) -> Iterator[tuple]:
        """Visit, turns, bar, panes, map and candidates of another model; until it is ready only the bar changes.

        One that has made room meanwhile is loaded for the conversation that was held with it. Nothing more is shown of a load once its visitor has asked for another one.
        """

        def only_bar(loading: Progress | None = None, error: str = "") -> tuple:
            return gr.skip(), gr.skip(), loading_view(loading, error), gr.skip(), gr.skip(), gr.skip()

        if not visit.is_known:
            yield only_bar(error=RELOAD)
            return
        session = str(request.session_hash)
        mine = self._end_load(session)
        wanted = getattr(event, "model", None)
        try:
            engine = self._loading[session] = self._engines.load(wanted if isinstance(wanted, str) else "")
            # What made room would stay in memory with what was found in it.
            self._searches.keep_only(self._engines.models)
        except ModelError as error:
            yield only_bar(error=str(error))
            return
        now = Visit(self._engines.name_of(engine))
        if now.model == visit.model and isinstance(engine.status, Ready):
            yield only_bar()
            return
        status = engine.status
        for status in engine.changes():
            if self._loads.get(session) != mine:
                break
            if isinstance(status, Progress):
                yield only_bar(status)
        if self._loads.get(session) != mine:
            yield (gr.skip(),) * 6  # or Gradio would send at the end what it was sent last
            return
        self._end_load(session)
        if isinstance(status, Ready):
            self._end_search(session)
            if now.model != visit.model:
                self._stops.forget(session)  # or what the other model still says would come under this one's name
            turns = gr.skip() if now.model == visit.model else ()
            yield now, turns, self._bar(status) | SETTLED, opening_view(status), gr.skip(), gr.skip()
            # Not the visit: another direction may have been taken by now.
            yield *(gr.skip(),) * 4, map_view(engine, status), find_view(status, status.found)
        else:
            self._engines.forget(engine)
            yield only_bar(error=status.sentence if isinstance(status, Failed) else ENDED)

    def end_failed_load(self) -> dict:
        """What the bar says of a load that failed as nobody expected."""
        return loading_view(error=FAILURE)

    def cancel_load(self, visit: Visit, request: gr.Request) -> dict:
        """The bar of the model in use, or of none before there is one; what is being loaded goes on if others wait for it."""
        session = str(request.session_hash)
        if session not in self._loading and isinstance(self._in_use(visit), Progress):
            self._engines.give_up(self._engines.of(visit.model))
        self._end_load(session)
        return self._bar(self._in_use(visit)) | SETTLED

    def answer(
        self, turns: Turns, visit: Visit, event: gr.EventData, request: gr.Request
    ) -> Iterator[tuple[Turns, dict]]:
        """The turns while replies grow, and the panes that show them."""
        sent = {name: getattr(event, name, None) for name in SENT}
        if not visit.is_known:
            # Without turns, so that those which the page still shows stay.
            yield turns, {"run": sent["run"], "running": False, "error": RELOAD, "notice": ""}
            return
        try:
            ask = Ask.read(sent, self._most_tokens)
            # Not of a map that the visitor had made: what names a cell alone can only mean the model's own.
            speaker = self._speaker(visit if ask.cell is None else Visit(visit.model, ask.cell))
        except (PromptError, ModelError, DirectionError) as error:
            run = sent["run"]
            yield turns, view(turns, run if isinstance(run, int) else 0, error=str(error))
            return
        if ask.action in ("undo", "clear"):
            yield from talk(speaker, turns, ask, threading.Event())
            return
        stop = self._stops.begin(str(request.session_hash), ask.run)
        with self._talking.joined(stop) as waits:
            for place in waits:
                # Without turns: what the page shows stays, and the message in the composer.
                yield turns, {"run": ask.run, "running": True, "error": "", "notice": f"{place.stage.capitalize()}."}
            yield from talk(speaker, turns, ask, stop)

    def foretell(self, turns: Turns, visit: Visit, event: gr.EventData) -> dict:
        """What the panes would say to the message in the composer."""
        sent = {name: getattr(event, name, None) for name in SENT}
        try:
            ask = Ask.read(sent, self._most_tokens)
            engine, ready = self._ready(visit)
        except (PromptError, ModelError):
            return {"run": sent["run"] if isinstance(sent["run"], int) else -1}
        return forecast(engine, ready, turns, ask)

    def tint_replies(self, turns: Turns, visit: Visit, event: gr.EventData) -> dict:
        """Where each token of the replies of a turn lies along the direction."""
        run, turn, inside = (getattr(event, name, None) for name in ("run", "turn", "inside"))
        shown = {"run": run, "turn": turn, "inside": inside is True, "panes": {}, "nonce": time.monotonic_ns()}
        if type(turn) is not int or not 0 <= turn < len(turns):
            return shown
        try:
            _, ready = self._ready(visit)
            return shown | {"panes": tint(ready, turns[: turn + 1], inside=inside is True)}
        except (PromptError, ModelError):
            # Asking says what is wrong; the replies stay as they are.
            return shown

    def stop_answer(self, event: gr.EventData, request: gr.Request) -> None:
        """Ends the replies of a run."""
        run = getattr(event, "run", None)
        if isinstance(run, int):
            self._stops.stop(str(request.session_hash), run)

    def leave(self, request: gr.Request) -> None:
        """Ends what runs for a visitor who has gone."""
        self._stops.forget(str(request.session_hash))
        for work in ("measure", "inside", "layout", "fill"):
            self._stops.forget(_work_of(str(request.session_hash), work))
        self._end_load(str(request.session_hash))
        self._loads.pop(str(request.session_hash), None)
        self._end_search(str(request.session_hash))

    def choose_cell(self, visit: Visit, event: gr.EventData) -> tuple[Visit, object, object]:
        """Visit, bar and candidates after another direction was taken."""
        try:
            _, ready = self._ready(visit)
        except ModelError as error:
            return visit, self._bar(self._in_use(visit), error=str(error)), gr.skip()
        try:
            now = ready.using(asked_cell(event))
        except DirectionError as error:
            return visit, gr.skip(), self._candidates(visit, ready, str(error))
        source = now.direction.source
        taken = replace(visit, cell=(source.position, source.layer), direction=None)
        return taken, self._bar(now), self._candidates(visit, now)

    def save_direction(self, visit: Visit, event: gr.EventData) -> dict:
        """The direction in use as a file."""
        ending = "gguf" if getattr(event, "format", None) == "gguf" else "safetensors"
        try:
            _, ready = self._ready(visit)
            saved = to_gguf(ready.model, ready.direction) if ending == "gguf" else ready.direction.to_bytes()
        except (ModelError, DirectionError) as error:
            return {"error": str(error), "nonce": time.monotonic_ns()}
        source = ready.direction.source
        name = re.sub(r"[^\w.-]+", "-", f"{source.model} layer {source.layer} position {source.position}")
        return {"name": f"{name}.{ending}", "data": base64.b64encode(saved).decode(), "nonce": time.monotonic_ns()}

    def load_direction(self, visit: Visit, event: gr.EventData) -> tuple[Visit, object, object]:
        """Visit, bar and candidates with a direction from a file, or from two that belong together, in use."""
        try:
            _, ready = self._ready(visit)
            now = ready.using_saved(read_direction(ready.model, _files(getattr(event, "files", None))))
            return replace(visit, direction=now.direction), self._bar(now), self._candidates(visit, now)
        except (ModelError, DirectionError) as error:
            return visit, self._bar(self._in_use(visit), error=str(error)), gr.skip()

    def fill_map(self, visit: Visit, event: gr.EventData, request: gr.Request) -> Iterator[dict]:
        """How far the candidates are measured that the rule did not need; the page then asks for `show_cells`.

        What the visitor takes meanwhile is theirs: nothing of it is touched here.
        """
        run = getattr(event, "run", None)
        stop = self._stops.begin(_work_of(str(request.session_hash), "fill"), run if type(run) is int else 0)
        try:
            engine, ready = self._ready(visit)
            table = table_of(ready)
            for progress in self._searches.fill(visit.search, stop) if visit.search else engine.fill(stop):
                yield {"table": table, "filling": [progress.stage, progress.done, progress.total]}
        except (PromptError, ModelError, DirectionError) as error:
            yield {"error": str(error), "filled": True, "nonce": time.monotonic_ns()}
            return
        yield {"table": table, "filled": True, "nonce": time.monotonic_ns()}

    def show_cells(self, visit: Visit) -> tuple:
        """Bar and candidates as they stand."""
        try:
            _, ready = self._ready(visit)
        except ModelError as error:
            return gr.skip(), {"error": str(error)}
        return self._bar(ready), self._candidates(visit, ready)

    def search(self, visit: Visit, event: gr.EventData, request: gr.Request) -> Iterator[tuple]:
        """Visit, bar, candidates, map and how far the search is; until something is found only the last changes."""
        sent = {name: getattr(event, name, None) for name in SOUGHT}
        session, unchanged = str(request.session_hash), (gr.skip(),) * 4
        echo = {"run": sent["run"], "nonce": time.monotonic_ns()}
        try:
            engine, ready = self._ready(visit.plain)
            run = sent["run"] if isinstance(sent["run"], int) else 0
            stop = self._stops.begin(_work_of(session, "search"), run)
            if sent["prompts"] == "hub":
                yield *unchanged, echo | {"searching": ["fetching the prompts", 0, 0]}
            wish = Search.read(sent, ready.model, local=self._engines.any_model)
            with self._searching.joined(stop) as waits:
                for place in waits:
                    yield *unchanged, echo | {"searching": [place.stage, 0, 0]}
                for news in () if stop.is_set() else search(ready, wish, engine.prompts, stop):
                    if isinstance(news, Progress):
                        yield *unchanged, echo | {"searching": [news.stage, news.done, news.total]}
                    elif not stop.is_set():
                        mine = Visit(visit.model, search=session)
                        candidates = self._candidates(mine, news)  # raises if its model has made room meanwhile
                        self._searches.keep(session, news)
                        yield mine, self._bar(news), candidates, gr.skip(), echo | {"found": True}
                        yield *(gr.skip(),) * 3, map_view(engine, news), gr.skip()
                        return
        except (PromptError, ModelError, DirectionError) as error:
            yield *unchanged, echo | {"error": str(error)}
            return
        yield *unchanged, echo | {"cancelled": True}

    def cancel(self, work: str) -> Callable[[gr.EventData, gr.Request], None]:
        """What ends a visitor's `work`, of the kinds that `leave` ends as well."""

        def end(event: gr.EventData, request: gr.Request) -> None:
            run = getattr(event, "run", None)
            if isinstance(run, int):
                self._stops.stop(_work_of(str(request.session_hash), work), run)

        return end

    def drop_search(self, visit: Visit, request: gr.Request) -> tuple:
        """Visit, bar, candidates and map with the app's own direction in use again."""
        now = visit.plain
        try:
            engine, ready = self._ready(now)
        except ModelError as error:
            return visit, self._bar(self._in_use(visit), error=str(error)), gr.skip(), gr.skip()
        self._searches.forget(str(request.session_hash))
        return now, self._bar(ready), self._candidates(now, ready), map_view(engine, ready)

    def check_token(self, visit: Visit, event: gr.EventData) -> dict:
        """The token that a typed text is, or why it is none."""
        text, nonce = getattr(event, "text", None), {"nonce": time.monotonic_ns()}
        try:
            _, ready = self._ready(visit.plain)
            token = refusal_token(ready.model, text if isinstance(text, str) else "")
        except (PromptError, ModelError) as error:
            return {"error": str(error)} | nonce
        return {"token": {"id": token, "text": str(ready.model.tokenizer.decode([token])), "share": None}} | nonce

    def show_rendered(self, turns: Turns, visit: Visit, event: gr.EventData) -> dict:
        """The message in the composer as the model reads it; without one the last that was asked."""
        text, nonce = getattr(event, "prompt", None), {"nonce": time.monotonic_ns()}
        if not isinstance(text, str) or not text.strip():
            text = turns[-1].prompt if turns else OPENING
        try:
            _, ready = self._ready(visit.plain)
            return rendered_view(ready, text) | nonce
        except (PromptError, ModelError) as error:
            return {"error": str(error)} | nonce

    def show_position(self, visit: Visit, event: gr.EventData) -> dict:
        """The map at another template position, or on other axes."""
        echo = {"asked": getattr(event, "run", None), "nonce": time.monotonic_ns()}
        try:
            engine, ready = self._ready(visit)
            return map_view(engine, ready, getattr(event, "position", None), getattr(event, "axes", None)) | echo
        except (PromptError, ModelError) as error:
            return {"error": str(error)} | echo

    def show_umap(self, visit: Visit, event: gr.EventData, request: gr.Request) -> Iterator[dict]:
        """One layer of the map by UMAP."""
        run = getattr(event, "run", None)
        try:
            engine, ready = self._ready(visit)
            stop = self._stops.begin(_work_of(str(request.session_hash), "layout"), run if isinstance(run, int) else 0)
            wanted = getattr(event, "position", None), getattr(event, "layer", None)
            for news in umap_view(engine, ready, *wanted, stop):
                yield news | {"nonce": time.monotonic_ns()}
        except (PromptError, ModelError) as error:
            yield {"error": str(error), "nonce": time.monotonic_ns()}

    def read_inside(self, visit: Visit, event: gr.EventData) -> dict:
        """Where one or two prompts lie along the direction, and the words that it raises."""
        first, second = getattr(event, "first", None), getattr(event, "second", None)
        # A value that is the same as the last one would not reach the page.
        echo = {"run": getattr(event, "run", None), "nonce": time.monotonic_ns()}
        try:
            _, ready = self._ready(visit)
            asked = (first, second) if first or second else PAIR
            return once_on_gpu(inside_view, ready.light, asked, model=ready.model, seconds=GLANCE) | echo
        except (PromptError, ModelError) as error:
            return {"error": str(error)} | echo

    def measure_writers(self, visit: Visit, event: gr.EventData, request: gr.Request) -> Iterator[dict]:
        """Which parts write the direction, and what the refusal loses without each."""
        run = getattr(event, "run", None)
        try:
            _, ready = self._ready(visit)
            stop = self._stops.begin(_work_of(str(request.session_hash), "inside"), run if isinstance(run, int) else 0)
            every = getattr(event, "every", None) is True
            with self._looking.joined(stop) as waits:
                for place in waits:
                    yield measuring_view(place) | {"measures": run}
                if stop.is_set():
                    return
                for news in on_gpu(
                    writers_view, ready.light, every=every, model=ready.model, seconds=SEARCH, stop=stop
                ):
                    yield news | {"measures": run}
        except (PromptError, ModelError) as error:
            yield {"measures": run, "error": str(error), "measured": True, "nonce": time.monotonic_ns()}

    def measure(self, visit: Visit, event: gr.EventData, request: gr.Request) -> Iterator[dict]:
        """Rates and curves, with progress."""
        sent = {
            name: getattr(event, name, None)
            for name in ("run", "n", "max_new_tokens", "rules", "first", "second", "writers")
        }
        try:
            wish = Wish.read(sent, self._most_tokens)
            speaker = self._speaker(visit)
            stop = self._stops.begin(_work_of(str(request.session_hash), "measure"), wish.run)
            with self._measuring.joined(stop) as waits:
                for place in waits:
                    yield measuring_view(place) | {"run": wish.run}
                if stop.is_set():
                    yield {"run": wish.run, "cancelled": True}
                    return
                yield from measured(speaker, wish, stop, local=self._engines.any_model)
        except (PromptError, ModelError) as error:
            yield {"run": sent["run"], "error": str(error), "nonce": time.monotonic_ns()}

    def write_weights(self, visit: Visit, event: gr.EventData) -> dict:
        """What came of writing the removal into weights."""
        echo = {"nonce": time.monotonic_ns()}
        try:
            _, ready = self._ready(visit)
            return echo | {"written": written(ready, getattr(event, "folder", None), local=self._engines.any_model)}
        except (PromptError, ModelError) as error:
            return echo | {"error": str(error)}

    def _ready(self, visit: Visit) -> tuple[Engine, Ready]:
        """The visit's model with its direction in use; raises ModelError where there is none to be had."""
        status = self._speaker(visit)
        if isinstance(status, Served):
            raise ModelError(f"This {NEEDS_HOOKS}")
        return self._engines.of(visit.model), status

    def _speaker(self, visit: Visit) -> Ready | Served:
        """Who replies, the visit's model or two servers; raises ModelError where nobody does."""
        status = self._in_use(visit)
        if isinstance(status, Failed):
            raise ModelError(status.sentence)
        if isinstance(status, Progress):
            raise ModelError("The model is still being prepared: wait for it.")
        return status

    def _in_use(self, visit: Visit) -> Status:
        """The visit's model with its direction in use, and Failed where there is none.

        Also where a model of the same name has been loaded anew, and has no place for the direction of the one before.
        """
        if not visit.is_known:
            return Failed(RELOAD)
        try:
            status = self._engines.of(visit.model).status
            if not isinstance(status, Ready):
                return status
            status = self._searches.of(visit.search, status.model) if visit.search else status
            return status.using_saved(visit.direction) if visit.direction else status.using(visit.cell)
        except (ModelError, DirectionError) as error:
            return Failed(str(error))

    def _candidates(self, visit: Visit, ready: Ready, error: str = "") -> dict:
        """The candidates, next to what the app itself found for this model."""
        _, own = self._ready(visit.plain)
        return find_view(ready, own.found, error)

    def _end_load(self, session: str) -> int:
        """Waits for no model any more on behalf of this session; the number of its next load."""
        if (engine := self._loading.pop(session, None)) is not None:
            self._engines.give_up(engine)
        self._loads[session] = self._loads.get(session, 0) + 1
        return self._loads[session]

    def _end_search(self, session: str) -> None:
        """Ends what the session is searching, and lets go of what it has had found."""
        self._stops.forget(_work_of(session, "search"))
        self._searches.forget(session)

    def _bar(self, status: Status, error: str = "") -> dict:
        return bar_view(status, self._engines.offered, self._engines.any_model, error)


def _files(sent: object) -> dict[str, bytes]:
    """The files that a browser sent, by name; raises DirectionError for what is none."""
    try:
        if not isinstance(sent, list) or not all(isinstance(file, dict) for file in sent):
            raise ValueError("no list of files")
        return {str(file.get("name")): base64.b64decode(str(file.get("data")), validate=True) for file in sent}
    except ValueError as error:  # what is not ASCII is no binascii.Error
        raise DirectionError("The file could not be read: load it again.") from error


def _work_of(session: str, work: str) -> str:
    """Under which name a session's long work can be stopped, apart from its replies; all of it ends with the program."""
    return f"{session} {work}"


def build(engines: Engines, stops: Stops, most_tokens: int = MAX_NEW_TOKENS) -> gr.Blocks:
    """The page on `engines`; `stops` knows who wants their replies stopped, of at most `most_tokens` new tokens."""
    do = Handlers(engines, stops, most_tokens)
    first = engines.of(None)
    closed = {name: {"closed": CLOSED[name]} if first.pair else {} for name in ("map", "find", "measure", "inside")}
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        turns, visit = gr.State(()), gr.State(FORGOTTEN)
        bar = part("bar", "link", value=bar_view(first.status))
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Talk", id="talk"):
                panes = part("talk", "link", value={"most_tokens": most_tokens})
            with gr.Tab("Map", id="map"):
                atlas = part("map", "figures", value=closed["map"])
            with gr.Tab("Find", id="find"):
                grid = part("find", "search", value=closed["find"])
            with gr.Tab("Measure", id="measure"):
                rates = part("measure", "figures", value=closed["measure"] | {"most_tokens": most_tokens})
            with gr.Tab("Inside", id="inside"):
                depths = part("inside", "figures", value=closed["inside"])
        paint, tints, files = relay("forecast"), relay("tint"), relay("file")
        sought, checked, rendered = relay("search"), relay("token"), relay("rendered")
        weights = relay("weights")

        def after_failure(turns: Turns) -> dict:
            return view(turns, -1, error=FAILURE) | {"nonce": time.monotonic_ns()}

        def failed() -> dict:
            return {"run": -1, "error": FAILURE, "measured": True, "nonce": time.monotonic_ns()}

        def nothing_found() -> dict:
            return {"run": -1, "error": FAILURE, "nonce": time.monotonic_ns()}

        def nothing_filled() -> dict:
            return {"error": FAILURE, "filled": True, "nonce": time.monotonic_ns()}

        def nothing_foretold() -> dict:
            # A value that is the same as the last one would not reach the page.
            return {"run": -1, "nonce": time.monotonic_ns()}

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        many = quiet | {"trigger_mode": "multiple", "concurrency_limit": VISITORS_AT_ONCE}
        # Lines of our own, which say how long they are, and not Gradio's queue.
        in_line = many | {"concurrency_limit": MOST_WAITING}
        past_the_queue = quiet | {"trigger_mode": "multiple", "queue": False}
        page.load(do.open_page, None, [visit, bar, panes, atlas, grid], concurrency_limit=VISITORS_AT_ONCE, **quiet)
        page.unload(do.leave)
        loaded = bar.load_model(do.load_model, visit, [visit, turns, bar, panes, atlas, grid], **many)
        loaded.failure(do.end_failed_load, None, bar, queue=False, **quiet)
        bar.cancel_load(do.cancel_load, visit, bar, **past_the_queue)
        asked = panes.ask(do.answer, [turns, visit], [turns, panes], **in_line)
        asked.failure(after_failure, turns, panes, queue=False, **quiet)
        # Past the queue: a stop must not wait behind what it stops.
        panes.stop(do.stop_answer, None, None, **past_the_queue)
        foretold = panes.forecast(
            do.foretell, [turns, visit], paint, **(many | {"concurrency_limit": FORECASTS_AT_ONCE})
        )
        foretold.failure(nothing_foretold, None, paint, queue=False, **quiet)
        panes.tint(do.tint_replies, [turns, visit], tints, **(many | {"concurrency_limit": FORECASTS_AT_ONCE}))
        bar.save_direction(do.save_direction, visit, files, **past_the_queue)
        bar.load_direction(do.load_direction, visit, [visit, bar, grid], **past_the_queue)
        bar.restore(do.choose_cell, visit, [visit, bar, grid], **past_the_queue)
        for heard, handle, at_once in (
            (atlas.position, do.show_position, 2),
            (atlas.umap, do.show_umap, VISITORS_AT_ONCE),
        ):
            heard(handle, visit, atlas, **(many | {"concurrency_limit": at_once})).failure(
                failed, None, atlas, queue=False, **quiet
            )
        grid.choose(do.choose_cell, visit, [visit, bar, grid], **past_the_queue)
        grid.fill(do.fill_map, visit, grid, **many).failure(nothing_filled, None, grid, queue=False, **quiet)
        grid.cancel_fill(do.cancel("fill"), None, None, **past_the_queue)
        rates.measure(do.measure, visit, rates, **in_line).failure(failed, None, rates, queue=False, **quiet)
        rates.write(do.write_weights, visit, weights, **(many | {"concurrency_limit": 1})).failure(
            nothing_found, None, weights, queue=False, **quiet
        )
        rates.cancel(do.cancel("measure"), None, None, **past_the_queue)
        depths.cancel(do.cancel("inside"), None, None, **past_the_queue)
        depths.read(do.read_inside, visit, depths, **(many | {"concurrency_limit": 2})).failure(
            nothing_found, None, depths, queue=False, **quiet
        )
        depths.measure(do.measure_writers, visit, depths, **in_line).failure(failed, None, depths, queue=False, **quiet)
        grid.show(do.show_cells, visit, [bar, grid], **past_the_queue)
        found = grid.search(do.search, visit, [visit, bar, grid, atlas, sought], **in_line)
        found.failure(nothing_found, None, sought, queue=False, **quiet)
        grid.cancel(do.cancel("search"), None, None, **past_the_queue)
        grid.drop(do.drop_search, visit, [visit, bar, grid, atlas], **past_the_queue)
        grid.token(do.check_token, visit, checked, **past_the_queue)
        grid.read_prompt(do.show_rendered, [turns, visit], rendered, **past_the_queue)
    return page
