"""The model and its direction, prepared in the background and shared by everybody who has the page open.

The page is up while the model loads: `Engine.status` says how far that is, and `Engine.changes` waits for news.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from refusal_core.chat_model import ORGANISM, ChatModel, ModelError
from refusal_core.directions import DirectionError
from refusal_core.geometry import LayerMap, pca_maps
from refusal_core.prompts import PromptError, PromptSet, load_prompts
from refusal_core.selection import Found, Progress, find_direction


@dataclass(frozen=True, eq=False)
class Ready:
    """Everything the page needs: the model, its direction, and prompts that the direction has not seen."""

    model: ChatModel
    found: Found
    examples: PromptSet
    is_organism: bool


@dataclass(frozen=True)
class Failed:
    """The model or its direction cannot be had; `sentence` says why and what to do."""

    sentence: str


Status = Progress | Ready | Failed


class Engine:
    """A chat model with its refusal direction, on its way or there."""

    def __init__(self, name: str | Path = ORGANISM, prompts: str | Path = "embedded") -> None:
        self.name, self._prompts = name, prompts
        self._status: Status = Progress("loading the model", 0, 0)
        self._news = threading.Condition()
        self._closing = threading.Event()
        self._maps: dict[int, tuple[LayerMap, ...]] = {}
        self._maps_lock = threading.Lock()

    @property
    def status(self) -> Status:
        """How far the preparation is."""
        return self._status

    def start(self) -> None:
        """Prepares model and direction in a thread of its own."""
        threading.Thread(target=self._prepare, name="engine", daemon=True).start()

    def close(self) -> None:
        """Ends the preparation at its next step."""
        self._closing.set()

    def changes(self, patience: float = 0.3) -> Iterator[Status]:
        """The status now and whenever it has changed, at most every `patience` seconds, until it is final."""
        status = self._status
        yield status
        while isinstance(status, Progress) and not self._closing.wait(patience):
            with self._news:
                self._news.wait_for(lambda seen=status: self._status is not seen, timeout=patience)
            if self._status is not status:
                status = self._status
                yield status

    def maps(self, ready: Ready, pos: int) -> tuple[LayerMap, ...]:
        """The prompts' principal components at template position `pos`, layer by layer; computed once."""
        with self._maps_lock:
            if pos not in self._maps:
                self._maps[pos] = pca_maps(ready.found, pos)
            return self._maps[pos]

    def _prepare(self) -> None:
        status: Status = Failed("The model could not be prepared: the log of the program says why.")
        try:
            status = self._find(ChatModel.load(self.name))
        except (ModelError, PromptError, DirectionError) as error:
            status = Failed(str(error))
        finally:
            # Also after an error nobody expected: it goes on to the log, and the page stops waiting.
            self._say(status)

    def _find(self, model: ChatModel) -> Status:
        train = load_prompts("train", self._prompts)
        for news in find_direction(model, train, stop=self._closing):
            if isinstance(news, Found):
                examples = load_prompts("test", self._prompts)
                return Ready(model, news, examples, Path(self.name).resolve() == ORGANISM.resolve())
            self._say(news)
        return Failed("The preparation was stopped: start the app again.")

    def _say(self, status: Status) -> None:
        with self._news:
            self._status = status
            self._news.notify_all()
