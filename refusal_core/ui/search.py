"""Search: a direction found anew for one visitor, from prompts or with refusal tokens of their own.

What is found belongs to the visit: the app's own direction, and everybody else's, stay as they are.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from refusal_core.chat_model import ChatModel, ModelError
from refusal_core.prompts import (
    CLASSES,
    Prompt,
    PromptError,
    PromptSet,
    distinct,
    in_split,
    load_prompts,
    parse_file,
    parse_lists,
    read_public,
)
from refusal_core.selection import By, Found, Progress, find_contrast, find_direction, read_at_most
from refusal_core.ui.engine import Ready, filled
from refusal_core.ui.lending import SEARCH, on_gpu
from refusal_core.ui.talk import Stops

FEWEST, MOST = 12, 1_000
"""How many prompts a class has: with fewer than 12 a draw leaves less than two to choose a cell by."""

MOST_CHARACTERS = 400_000
MOST_NAME = 40
MOST_ADDRESS = 500
MOST_TOKENS = 16
MOST_KEPT = 4


@dataclass(frozen=True)
class Search:
    """What a visitor wants found. Without `prompts` those of the app; `tokens` are None for those that these give.

    `by` is who chooses and `n_positions` where is read, as in `find_direction`. `n_given` counts the prompts before those that are there twice were left out.
    """

    run: int
    prompts: tuple[Prompt, ...] = ()
    classes: tuple[str, str] = CLASSES
    tokens: tuple[int, ...] | None = None
    name: str = "the app’s prompts"
    n_given: int = 0
    by: By | None = None
    n_positions: int | None = None

    @classmethod
    def read(cls, sent: Mapping[str, object], model: ChatModel, *, local: bool = False) -> "Search":
        """The search in what a browser sent, which may be anything; raises PromptError with the line or the field.

        Lists of the hub are fetched here, if the page is `local`: open to nobody but this machine's user.
        """
        run = sent.get("run")
        if type(run) is not int:
            raise PromptError("The page asked for a search without a number: reload it.")
        classes = _classes(sent)
        given, name = _given(sent, classes, local)
        prompts = distinct(given)
        for wanted, cls_name in ((True, classes[0]), (False, classes[1])) if given else ():
            n = sum(p.harmful == wanted for p in prompts)
            if not FEWEST <= n <= MOST:
                told = "add some" if n < FEWEST else "leave some out"
                raise PromptError(
                    f"There {'is' if n == 1 else 'are'} {n:,} different {cls_name} prompt{'' if n == 1 else 's'}, and "
                    f"each class needs from {FEWEST} to {MOST:,}: {told}."
                )
        for prompt in prompts:
            _check_length(prompt, model)
        tokens = _tokens(sent.get("tokens"), model) if classes == CLASSES else None
        by = "cosmic" if sent.get("by") == "cosmic" else None
        return cls(run, tuple(prompts), classes, tokens, name, len(given), by, _n_positions(sent, model))


def _n_positions(sent: Mapping[str, object], model: ChatModel) -> int | None:
    asked = sent.get("n_positions")
    if asked is None or type(asked) is int:
        return None if asked is None else read_at_most(model, asked)
    raise PromptError("How many positions are read is a whole number: set it again.")


def _classes(sent: Mapping[str, object]) -> tuple[str, str]:
    if sent.get("kind") != "contrast":
        return CLASSES
    first, second = (" ".join(str(sent.get(key) or "").split()) for key in ("first_name", "second_name"))
    if not first or not second or first.lower() == second.lower():
        raise PromptError("Two classes need two names that differ: name both, for example polite and rude.")
    if max(len(first), len(second)) > MOST_NAME:
        raise PromptError(f"The name of a class has at most {MOST_NAME} characters: shorten it.")
    return first, second


def _given(sent: Mapping[str, object], classes: tuple[str, str], local: bool) -> tuple[list[Prompt], str]:
    """The prompts that were sent, and what they are from; none where the app's own are meant."""
    fields = [sent.get(key) for key in ("first", "second", "file_name", "file_text")]
    first, second, file_name, file_text = (value if isinstance(value, str) else "" for value in fields)
    if (n := len(first) + len(second) + len(file_text)) > MOST_CHARACTERS:
        raise PromptError(f"The lists have {n:,} characters and at most {MOST_CHARACTERS:,} are read: shorten them.")
    if sent.get("prompts") == "lists":
        given = parse_lists(first, second, classes)
        if not given:
            raise PromptError("Both lists are empty: write one prompt a line into each.")
        return given, "your lists"
    if sent.get("prompts") == "file":
        file_name = Path(file_name).name[:80]
        if not file_name:
            raise PromptError("There is no file yet: choose a .csv, .json or .jsonl file.")
        given = parse_file(file_name, file_text.removeprefix("\ufeff"), classes)
        if not given:
            raise PromptError(f"{file_name} has no prompt in it: choose another file.")
        return given, file_name
    if sent.get("prompts") == "hub":
        return asked_public(first, second, local)
    if classes != CLASSES:
        raise PromptError(
            "The app’s prompts are harmful and harmless ones: give two lists, or a file, for other classes."
        )
    return [], "the app’s prompts"


def asked_public(first: str, second: str, local: bool) -> tuple[list[Prompt], str]:
    """The prompts of lists of the hub that a browser names; raises PromptError, also where the page is open to others."""
    if not local:
        raise PromptError(
            "Where others can open the page nothing is fetched from the hub: paste the prompts, or give a file."
        )
    if max(len(first), len(second)) > MOST_ADDRESS:
        raise PromptError(f"The address of a list has at most {MOST_ADDRESS} characters: shorten it.")
    return read_public(first, second)


def _check_length(prompt: Prompt, model: ChatModel) -> None:
    try:
        model.render(prompt.text)
    except PromptError as error:
        raise PromptError(
            f"{prompt.where}: it is too long for {model.name}, which reads at most {model.n_ctx:,} tokens: shorten it, or "
            "leave it out."
        ) from error


def _tokens(sent: object, model: ChatModel) -> tuple[int, ...] | None:
    if sent is None:
        return None
    tokens = list(sent) if isinstance(sent, list | tuple) else []
    if not all(type(token) is int and 0 <= token < model.d_vocab for token in tokens):
        raise PromptError(f"A refusal token is not one of {model.name}: take the model’s own again.")
    if not 1 <= len(set(tokens)) <= MOST_TOKENS:
        raise PromptError(f"There are {len(set(tokens))} refusal tokens, and from 1 to {MOST_TOKENS} are needed.")
    return tuple(dict.fromkeys(tokens))


def search(ready: Ready, wish: Search, source: str | Path, stop: threading.Event) -> Iterator[Progress | Ready]:
    """Progress and, last, the same with what was found in use; ends early when `stop` is set.

    `source` is where the app's own prompts are. Of a contrast, refusals are still told by the model's own tokens, and
    measured on the app's prompts. Raises PromptError as `find_direction` and `find_contrast` do, and where the model
    treats fewer than two prompts of a class as expected.
    """
    parts = _parts(wish, source)
    train, val = parts["train"], parts["val"]
    find, how = find_contrast, {"n_positions": wish.n_positions}
    if wish.classes == CLASSES:
        find, how = find_direction, how | {"by": wish.by, "refusal_tokens": wish.tokens}
    for found in on_gpu(find, ready.model, train, val, **how, model=ready.model, seconds=SEARCH, stop=stop):
        if not isinstance(found, Found):
            yield found
            continue
        for (split, cls), (kept, n) in found.counts.items():
            if kept < 2:
                raise PromptError(
                    f"The unmodified model treats only {kept} of {n} {cls} prompts of the {split} split as expected, too "
                    "few to go by: take more prompts, or other refusal tokens."
                )
        if found.direction.source.contrast:
            own = ready.found
            found = replace(found, refusal_tokens=own.refusal_tokens, refusal_shares=own.refusal_shares)
        examples = parts["test"] if wish.prompts and wish.classes == CLASSES else None
        twice = wish.n_given - len(wish.prompts)
        yield replace(
            ready,
            found=found,
            direction=found.direction,
            examples=examples or ready.examples,
            own=wish.name
            + (f" ({twice} that {'was' if twice == 1 else 'were'} there twice left out)" if twice else ""),
            set_aside=len(examples.harmful) + len(examples.harmless) if examples else 0,
        )


def _parts(wish: Search, source: str | Path) -> dict[str, Any]:
    """The prompts to train and to validate on, and those that are set aside: None where a file has none."""
    if not wish.prompts:
        return {"train": load_prompts("train", source), "val": load_prompts("val", source), "test": None}
    parts: dict[str, PromptSet | None] = {
        split: in_split(wish.prompts, split, wish.name, wish.classes) for split in ("train", "val")
    }
    has_test = (
        not any(p.split for p in wish.prompts) or len({p.harmful for p in wish.prompts if p.split == "test"}) == 2
    )
    return parts | {"test": in_split(wish.prompts, "test", wish.name, wish.classes) if has_test else None}


class Searches:
    """What visitors have had found, the last of each. At most `MOST_KEPT`: activations are large, the oldest go."""

    def __init__(self, stops: Stops) -> None:
        self._stops, self._lock = stops, threading.Lock()
        self._kept: dict[str, tuple[Ready, threading.Event]] = {}

    def of(self, session: str, model: ChatModel) -> Ready:
        """What this session has had found in `model`; raises ModelError if it, or the model it was found in, made room."""
        with self._lock:
            ready, _ = self._kept.get(session, (None, None))
        if ready is not None and ready.model is model:
            return ready
        self.forget(session)  # a model that was loaded anew would not be the one that this keeps in memory
        raise ModelError(
            "The direction that you had found was put away to make room for others: find it again, or go back to the "
            "app’s own."
        )

    def keep_only(self, models: Sequence[ChatModel]) -> None:
        """Lets go of what was found in any other model."""
        with self._lock:
            others = [s for s, (ready, _) in self._kept.items() if not any(ready.model is m for m in models)]
        for session in others:
            self.forget(session)

    def keep(self, session: str, ready: Ready) -> None:
        """Keeps it for this session, instead of what it had."""
        with self._lock:
            self._kept.pop(session, None)
            self._kept[session] = ready, self._stops.begin(f"{session} cells", 0)
            oldest = list(self._kept)[:-MOST_KEPT]
        for other in oldest:
            self.forget(other)

    def fill(self, session: str, stop: threading.Event) -> Iterator[Progress]:
        """Measures every candidate of it; afterwards `of` has the whole table.

        Ends early once `stop` is set, or it is forgotten.
        """
        with self._lock:
            kept = self._kept.get(session)
        if kept is None:
            return
        ready, forgotten = kept
        for news in filled(ready, stop):
            if forgotten.is_set():
                return
            if isinstance(news, Progress):
                yield news
                continue
            with self._lock:
                if self._kept.get(session) is kept:
                    self._kept[session] = news, kept[1]

    def forget(self, session: str) -> None:
        """Lets go of what this session has had found."""
        with self._lock:
            self._kept.pop(session, None)
        self._stops.forget(f"{session} cells")
