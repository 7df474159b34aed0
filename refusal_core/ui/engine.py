"""The model and its direction, prepared in the background and shared by everybody who has the page open.

The page is up while the model loads: `Engine.status` says how far that is, and `Engine.changes` waits for news.
"""

import contextlib
import contextvars
import functools
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.directions import ZERO_NORM, Direction, DirectionError
from refusal_core.endpoints import Endpoint, EndpointError, named
from refusal_core.findings import find_or_recall
from refusal_core.geometry import LayerMap, along_maps, pca_maps, turned, umap_is_loaded, umap_layout
from refusal_core.interventions import Intervention
from refusal_core.prompts import PromptError, PromptSet, is_public, load_prompts, pinned
from refusal_core.selection import CandidateScore, Found, Progress
from refusal_core.ui.lending import SEARCH, load, on_gpu
from refusal_core.ui.line import Line

EMBEDDED = "embedded model"
MOST_LOADED = 3
MOST_MAPS = 64
"""How many maps, and how many layouts, an engine keeps: those that were asked for last."""

Cell = tuple[int, int]
"""A candidate of the selection map: template position and layer."""

MapKey = tuple[int, str, str, str]
"""Of a map: position, axes, the prompts it is made from, and the direction it is made along, if it is."""

_LAYING_OUT = threading.Lock()
"""UMAP's compiled code ends the program when two threads of it, of one model or of two, are in it at once."""


@dataclass(frozen=True, eq=False)
class Ready:
    """Everything the page needs: the model, what was found, the direction in use, and prompts it has not seen.

    `own` says what a visitor had it found from, and `set_aside` how many of those prompts `examples` has then.
    """

    model: ChatModel
    found: Found
    direction: Direction
    examples: PromptSet
    is_organism: bool
    own: str = ""
    set_aside: int = 0

    @property
    def digest(self) -> str:
        """Names what results depend on besides the model: the direction, and the tokens that count as a refusal."""
        return f"{self.direction.digest} {hashlib.sha256(repr(self.found.refusal_tokens).encode()).hexdigest()[:8]}"

    @property
    def light(self) -> "Ready":
        """The same without the activations of the prompts: what goes to another process is small then."""
        kept = ("harmful", "harmless", "val_harmful", "val_harmless")
        return replace(
            self, found=replace(self.found, **{name: getattr(self.found, name)[:0].clone() for name in kept})
        )

    @property
    def score(self) -> CandidateScore | None:
        """The scores of the direction in use, as far as they are measured; None for one that is not on the map."""
        source = self.direction.source
        here = next(s for s in self.found.scores if (s.pos, s.layer) == (source.position, source.layer))
        if here.norm is None or here.norm < ZERO_NORM or not math.isclose(here.norm, self.direction.norm, rel_tol=1e-4):
            return None
        candidate = self.found.candidate(source.position, source.layer)
        return here if torch.allclose(self.direction.unit, candidate.unit, atol=1e-5) else None

    def using(self, cell: Cell | None) -> "Ready":
        """The same with the direction of `cell` in use; None is the rule's choice.

        Raises DirectionError for a cell that is not on the map, and where the direction is numerically zero.
        """
        if cell is None:
            return replace(self, direction=self.found.direction)
        if cell not in {(s.pos, s.layer) for s in self.found.scores}:
            raise DirectionError("There is no candidate there: take a cell of the map.")
        return replace(self, direction=self.found.candidate(*cell))

    def using_saved(self, direction: Direction) -> "Ready":
        """The same with a direction from elsewhere in use.

        Raises ModelError for one of another model, as one of a layer that this one lacks is, and DirectionError for one
        whose weights are not named or whose position is not on the map.
        """
        self.model.check_rows([(Intervention(direction, "ablate"),)], 1)
        source = direction.source
        if not source.fingerprint and not source.origin:
            raise DirectionError("The file does not say which weights its direction was read from: save it anew.")
        if (source.position, source.layer) not in {(s.pos, s.layer) for s in self.found.scores}:
            raise DirectionError(
                f"The direction was read at layer {source.layer}, position {source.position}, which the map of this "
                "model does not have."
            )
        return replace(self, direction=direction)


NEEDS_HOOKS = "needs hooks inside the model, and a server gives only text: start the app with --model for it."
ENDED = "The loading was ended: load the model again."
CLOSED = {
    "added": "Adding the direction at a strength " + NEEDS_HOOKS,
    "strength": "The strength is that of the export, all of it: another one " + NEEDS_HOOKS,
    "tint": "What is foretold on the dials, the needle, the tint and the first split " + NEEDS_HOOKS,
    "measure": "Here two servers answer, unchanged and with the direction removed; everything else that is measured "
    + NEEDS_HOOKS,
    "map": "The map " + NEEDS_HOOKS,
    "find": "Finding a direction " + NEEDS_HOOKS,
    "inside": "What lies inside " + NEEDS_HOOKS,
}
"""What cannot be done with two servers, each with the reason."""


@dataclass(frozen=True)
class Served:
    """Two servers instead of a model here: of the unchanged one, and of the one whose weights lack the direction."""

    pair: tuple[Endpoint, Endpoint]
    examples: PromptSet

    @property
    def name(self) -> str:
        """Both models, each with where it is."""
        return " and ".join(e.named_place for e in self.pair)


@dataclass(frozen=True)
class Failed:
    """The model or its direction cannot be had; `sentence` says why and what to do."""

    sentence: str


Status = Progress | Ready | Served | Failed


class Engine:
    """A chat model with its refusal direction, on its way or there; or two servers, if there is a `pair` of them.

    `placed` is what `ChatModel.load` is told of device, dtype and 4 bits.
    """

    def __init__(
        self,
        name: str | Path = ORGANISM,
        prompts: str | Path = "embedded",
        loading: Line | None = None,
        pair: tuple[Endpoint, Endpoint] | None = None,
        placed: Mapping[str, Any] | None = None,
    ) -> None:
        self.is_organism = Path(name).resolve() == ORGANISM.resolve()
        self.name, self.prompts, self.pair = EMBEDDED if self.is_organism else str(name), prompts, pair
        self._path, self.placed = name, dict(placed or {})
        self.wanted = 0
        self._status: Status = Progress("loading the model", 0, 0)
        self._news = threading.Condition()
        self._closing = threading.Event()
        self.thread: threading.Thread | None = None
        self._maps: dict[MapKey, tuple[LayerMap, ...]] = {}
        self._maps_lock = threading.Lock()
        self._umaps: dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._filling = threading.Lock()
        self._loading = loading or Line(1)

    @property
    def status(self) -> Status:
        """How far the preparation is."""
        return self._status

    def start(self) -> None:
        """Prepares model and direction in a thread of its own, on behalf of the visitor who asks for it, if there is one.

        Anew, if that was ended or has failed before.
        """
        self._closing = threading.Event()
        self._say(Progress("loading the model", 0, 0))
        task, context = functools.partial(self._prepare, self._closing), contextvars.copy_context()
        self.thread = threading.Thread(target=context.run, args=(task,), name="engine", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Ends the preparation at its next step; nobody waits for it any more."""
        self._closing.set()
        if isinstance(self._status, Progress):
            self._say(Failed(ENDED))

    def changes(self, patience: float = 0.3) -> Iterator[Status]:
        """The status now and whenever it has changed, at most every `patience` seconds, until it is final."""
        status = self._status
        yield status
        while isinstance(status, Progress):
            self._closing.wait(patience)
            with self._news:
                self._news.wait_for(lambda seen=status: self._status is not seen, timeout=patience)
            if self._status is not status:
                status = self._status
                yield status

    def maps(self, ready: Ready, pos: int, axes: str = "pca") -> tuple[LayerMap, ...]:
        """The prompts at template position `pos`, layer by layer, on the `axes` of a `prompt_map`; computed once."""
        with self._maps_lock:
            key = _map_key(ready, pos, axes)
            maps = self._maps.pop(key, None)
            if maps is None and axes == "along":
                maps = along_maps(ready.found, pos, ready.direction)
            elif maps is None:
                components = self._maps.get(_map_key(ready, pos, "pca")) or pca_maps(ready.found, pos)
                maps = turned(components) if axes == "turned" else components
            _make_room(self._maps)
            self._maps[key] = maps
            return maps

    def known_maps(self, ready: Ready) -> dict[tuple[int, str], tuple[LayerMap, ...]]:
        """The maps of these prompts computed so far that belong to the direction in use, by position and axes."""
        with self._maps_lock:
            return {key[:2]: maps for key, maps in self._maps.items() if key == _map_key(ready, *key[:2])}

    def umap(
        self, ready: Ready, pos: int, layer: int, stop: threading.Event
    ) -> Iterator[Progress | tuple[np.ndarray, np.ndarray]]:
        """What is done until there is a layout of one layer by UMAP, and at last the layout; computed once.

        One at a time, because each takes seconds of all processors; it is not begun if `stop` is set before its turn.
        """
        key = ready.found.digest, pos, layer
        layout = self._umaps.get(key)
        if layout is None:
            if _LAYING_OUT.locked():
                stage = "waiting for another layout"
            elif umap_is_loaded():
                stage = "laying the prompts out"
            else:
                stage = "preparing UMAP, which takes half a minute the first time"
            # Nothing is yielded under the lock: who goes away in between would keep it.
            yield Progress(stage, 0, 0)
            while not _LAYING_OUT.acquire(timeout=0.2):
                if stop.is_set():
                    return
            try:
                if stop.is_set():
                    return
                layout = self._umaps.get(key) or umap_layout(ready.found, pos, layer)
                _make_room(self._umaps)
                self._umaps[key] = layout
            finally:
                _LAYING_OUT.release()
        yield layout

    def fill(self, stop: threading.Event) -> Iterator[Progress]:
        """Measures every candidate; whoever asks while somebody else's run goes on waits for that one. `stop` ends it early,
        and whoever waits begins anew.

        Afterwards `status` has the whole table. The choice cannot change: what was left out could not have won.
        """
        while not self._filling.acquire(timeout=0.2):
            if stop.is_set():
                return
        try:
            ready = self._status
            if not isinstance(ready, Ready) or all(is_known(s) for s in ready.found.scores):
                return
            for news in filled(ready, stop):
                if self._closing.is_set():
                    return
                if isinstance(news, Ready):
                    self._say(news)
                else:
                    yield news
        finally:
            self._filling.release()

    def _prepare(self, closing: threading.Event) -> None:
        def say(status: Status) -> None:
            if not closing.is_set():  # or another preparation may have begun
                self._say(status)

        status: Status = Failed("The model could not be prepared: the log of the program says why.")
        try:
            if self.pair is not None:
                status = self._ask(self.pair)
                return
            with self._loading.joined(closing) as waits:
                for place in waits:
                    say(place)
                say(Progress("loading the model", 0, 0))
                follow = functools.partial(_fetched, say, closing)
                model = None if closing.is_set() else load(self._path, follow=follow, **self.placed)
            if model is not None:
                status = self._find(model, say, closing)
        except (ModelError, PromptError, DirectionError) as error:
            status = Failed(str(error))
        finally:
            # Also after an error nobody expected: it goes on to the log, and the page stops waiting.
            say(status)

    def _find(self, model: ChatModel, say: Callable[[Status], None], closing: threading.Event) -> Status:
        if is_public(self.prompts):
            say(Progress("fetching the prompts", 0, 0))
        self.prompts = pinned(self.prompts)
        train, val = load_prompts("train", self.prompts), load_prompts("val", self.prompts)
        for news in on_gpu(find_or_recall, model, train, val, model=model, seconds=SEARCH, stop=closing):
            if isinstance(news, Found):
                examples = load_prompts("test", self.prompts)
                return Ready(model, news, news.direction, examples, self.is_organism)
            say(news)
        return Failed(ENDED)

    def _ask(self, pair: tuple[Endpoint, Endpoint]) -> Status:
        """The servers with their models' names. One that does not say its own yet is asked again with every message."""
        self._say(Progress("asking the servers for their models", 0, 0))
        known = list(pair)
        for i, endpoint in enumerate(pair):
            with contextlib.suppress(EndpointError):
                known[i] = named(endpoint, self._closing)
        return Served((known[0], known[1]), load_prompts("test", self.prompts))

    def _say(self, status: Status) -> None:
        with self._news:
            self._status = status
            self._news.notify_all()


def _fetched(say: Callable[[Status], None], closing: threading.Event, done: int, total: int) -> None:
    if closing.is_set():
        raise ModelError(ENDED)
    if done < total:
        say(Progress("downloading MB", done // 10**6, total // 10**6))
    else:
        say(Progress("loading the model", 0, 0))


class Engines:
    """The models that can be talked to, by name. The one the app was started with stays; others come and go.

    At most `MOST_LOADED` are kept: the one that was asked for longest ago makes room. Where the page is open to others
    only the `offered` models can be loaded, never a path of this machine. They are loaded one at a time: a model that
    has made room while it was on its way is not held beside many others.
    """

    def __init__(self, first: Engine, offered: Sequence[str], *, any_model: bool) -> None:
        self.offered, self.any_model = tuple(dict.fromkeys((first.name, *offered))), any_model
        self._first = first
        self._others: dict[str, Engine] = {}
        self._loading = Line(1)
        self._lock = threading.Lock()
        self._started: list[threading.Thread] = []

    def of(self, name: str | None) -> Engine:
        """The engine of a model that was loaded; None is the first. Raises ModelError if it has made room."""
        if name is None:
            return self._first
        with self._lock:
            if name not in self._others:
                raise ModelError(f"{name} was put away to make room for other models: load it again.")
            return self._others[name]

    def load(self, name: str) -> Engine:
        """The engine of a model, on its way if it is new; raises ModelError for one that may not be loaded here."""
        name = name.strip()
        if name == self._first.name:
            with self._lock:
                self._first.wanted += 1
                if isinstance(self._first.status, Failed):
                    self._started += [self._first.thread] if self._first.thread else []  # it may not have ended yet
                    self._first.start()
            return self._first
        if not name or (not self.any_model and name not in self.offered):
            raise ModelError(f"{name[:80] or 'No name'} cannot be loaded here: take one of {', '.join(self.offered)}.")
        with self._lock:
            engine = self._others.pop(name, None)
            if engine is None:
                engine = Engine(
                    ORGANISM if name == EMBEDDED else name,
                    self._first.prompts,
                    self._loading,
                    placed=self._first.placed,
                )
                engine.start()
                self._started = [t for t in (*self._started, engine.thread) if t is not None and t.is_alive()]
            engine.wanted += 1
            self._others[name] = engine
            while len(self._others) >= MOST_LOADED:
                self._others.pop(next(iter(self._others))).close()
            return engine

    def give_up(self, engine: Engine) -> None:
        """Says that one of those who asked for a model no longer waits for it: without any other it is not loaded to its end.

        The first, which nobody who opens the page had to ask for, is where others can open it.
        """
        with self._lock:
            engine.wanted = max(0, engine.wanted - 1)
            for_all = engine is self._first and not self.any_model
            if engine.wanted or for_all or not isinstance(engine.status, Progress):
                return
            self._others = {name: other for name, other in self._others.items() if other is not engine}
        engine.close()

    @property
    def models(self) -> list[ChatModel]:
        """The models that are ready."""
        with self._lock:
            statuses = [engine.status for engine in (self._first, *self._others.values())]
        return [status.model for status in statuses if isinstance(status, Ready)]

    def name_of(self, engine: Engine) -> str | None:
        """The name under which `of` gives it."""
        with self._lock:
            return next((name for name, other in self._others.items() if other is engine), None)

    def forget(self, engine: Engine) -> None:
        """Lets go of a model that could not be loaded, so that it can be tried again; the first one stays."""
        with self._lock:
            self._others = {name: other for name, other in self._others.items() if other is not engine}

    def close(self, patience: float = 10.0) -> None:
        """Ends all preparations, and waits for that: a thread that the program's end overtakes would abort it."""
        for engine in (self._first, *self._others.values()):
            engine.close()
        deadline = time.monotonic() + patience
        for thread in (self._first.thread, *self._started):
            if thread is not None:
                thread.join(max(0.0, deadline - time.monotonic()))


def _map_key(ready: Ready, pos: int, axes: str) -> MapKey:
    """Principal components do not depend on the direction in use."""
    return pos, axes, ready.found.digest, ready.direction.digest if axes == "along" else ""


def filled(ready: Ready, stop: threading.Event) -> Iterator[Progress | Ready]:
    """The same with every candidate measured, after progress; ends early when `stop` is set."""
    found = ready.found
    search = on_gpu(
        find_or_recall,
        ready.model,
        found.prompts,
        found.validation,
        model=ready.model,
        seconds=SEARCH,
        by="cosmic" if found.direction.source.chosen_by else "rule",
        refusal_tokens=found.refusal_tokens,
        n_positions=len(found.directions),
        complete=True,
        stop=stop,
    )
    for news in search:
        if isinstance(news, Found):
            yield replace(ready, found=replace(found, scores=news.scores, choice=news.choice))
        else:
            yield news


def is_known(score: CandidateScore) -> bool:
    """Whether everything that can be measured of a candidate has been."""
    is_zero = score.norm is not None and score.norm < ZERO_NORM
    has_cosines = score.similarity is not None and score.kl is not None
    return (
        is_zero
        or score.decided == "nan"
        or score.auroc is not None
        or has_cosines
        or None not in (score.bypass, score.induce, score.kl)
    )


def _make_room(cache: dict) -> None:
    """Lets go of what was computed longest ago, so that many visitors' directions do not fill the memory."""
    while len(cache) >= MOST_MAPS:
        cache.pop(next(iter(cache)))
