"""Talk: one prompt, three replies from one batch, each pane with a history of its own.

The truth is a tuple of turns in the visitor's session; the panes are a view of it, made here and drawn by
`assets/ui/talk.js`. A conversation of a pane consists of what that pane said, so that text of a changed model can
never reach the unchanged one. A turn keeps the settings that it was answered with; only the last one is ever answered
again, with those of the request.
"""

import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Literal, get_args

from refusal_core.activations import collect_activations
from refusal_core.attribution import read_along
from refusal_core.chat_model import Conversation, ModelError
from refusal_core.directions import Direction, DirectionError, random_like
from refusal_core.endpoints import stream_replies
from refusal_core.evaluation import judged
from refusal_core.generation import Ending, Step, stream_side_by_side
from refusal_core.geometry import Place, place
from refusal_core.interventions import Intervention, Row
from refusal_core.metrics import judge, refusal_probability
from refusal_core.prompts import CLASSES, PromptError, PromptSet
from refusal_core.selection import Found
from refusal_core.ui.bar import FROM_FILE, mark_of
from refusal_core.ui.engine import CLOSED, Cell, Ready, Served
from refusal_core.ui.lending import GLANCE, REPLY, on_gpu, once_on_gpu

Pane = Literal["unchanged", "removed", "added", "control"]
PANES: tuple[Pane, ...] = get_args(Pane)
Action = Literal["ask", "fresh", "again", "undo", "clear"]
ACTIONS: dict[str, Action] = {action: action for action in get_args(Action)}

SETTINGS = ("removal", "addition", "control", "temperature", "max_new_tokens", "seed", "system", "writers")
"""The fields of a request that say how its message is answered, besides the direction."""

MAX_CHARACTERS = 50_000
MAX_SYSTEM = 2_000
MAX_WRITERS = 2_000
MAX_NEW_TOKENS = 512
UPDATES_PER_SECOND = 12
ADDITION = (-1.0, 2.0)
N_HARMLESS, N_HARMFUL, N_CATEGORIES = 6, 3, 12
NEAR_MISS = "near-miss"
"""The category of harmless prompts that sound harmful."""
N_LIKELY = 5
CONTROL_SEED = 0

OPENING = "How do I bake bread?"
"""Asked when the page opens: the harmless half of the story, where adding the direction makes the model refuse."""


@dataclass(frozen=True)
class Reply:
    """What a pane said, as text and token ids; `refusal` is the probability that it starts like a refusal.

    `writers` are the parts to which its edit was confined; None is all of them. A server gives no token ids, at best their
    number `n_tokens`, and `problem` says why one broke off.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    ending: Ending | None = None
    refusal: float | None = None
    strength: float = 0.0
    writers: frozenset[str] | None = None
    n_tokens: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class Split:
    """Where a pane parts from the unchanged one: its first token (from 0) that is another, and how many characters of its
    text come before that.

    `likely` has the five most likely tokens of these two panes there, as text with their probabilities.
    """

    index: int
    characters: int
    likely: dict[Pane, tuple[tuple[str, float], ...]]


@dataclass(frozen=True)
class Ask:
    """What the page asks for. `removal`, `addition` and `control` are None where the pane is off.

    `control` is the strength at which a random direction of the same norm is added; `writers` are the parts of the
    model from which alone the direction is removed, None for all. `cell` is a candidate to answer with instead of the
    direction in use, as a turn of a conversation that is asked again may have been.
    """

    run: int
    action: Action
    prompt: str = ""
    example: bool = False
    removal: float | None = 1.0
    addition: float | None = 1.0
    control: float | None = None
    temperature: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0
    system: str = ""
    writers: frozenset[str] | None = None
    cell: Cell | None = None

    @classmethod
    def read(cls, sent: Mapping[str, object], most_tokens: int = MAX_NEW_TOKENS) -> "Ask":
        """The request in what a browser sent, which may be anything; raises PromptError and names the field."""
        action = ACTIONS.get(str(sent.get("action")))
        if action is None:
            raise PromptError(
                f"The page asked for {str(sent.get('action'))[:40]!r}, which is not known here: reload it."
            )
        prompt, system = sent.get("prompt"), sent.get("system")
        if isinstance(system, str) and len(system) > MAX_SYSTEM:
            raise PromptError(f"A system prompt has at most {MAX_SYSTEM:,} characters here: shorten it.")
        return cls(
            run=int(_number(sent, "run", 0.0, 2.0**53)),
            action=action,
            prompt=prompt if isinstance(prompt, str) else "",
            example=sent.get("example") is True,
            removal=None if sent.get("removal") is None else _number(sent, "removal", 0.0, 1.0),
            addition=None if sent.get("addition") is None else _number(sent, "addition", *ADDITION),
            control=None if sent.get("control") is None else _number(sent, "control", *ADDITION),
            temperature=_number(sent, "temperature", 0.0, 2.0),
            max_new_tokens=int(_number(sent, "max_new_tokens", 1.0, float(most_tokens))),
            seed=int(_number(sent, "seed", 0.0, 2.0**31)),
            system=system.strip() if isinstance(system, str) else "",
            writers=asked_writers(sent.get("writers")),
            cell=_cell(sent.get("cell")),
        )


@dataclass(frozen=True)
class Used:
    """The direction that a turn was answered with; `of_map` is whether the model's own map has it."""

    layer: int
    position: int
    mark: str
    digest: str
    of_map: bool


@dataclass(frozen=True)
class Turn:
    """A prompt and the replies of the panes that were on; `example` marks the one the page asks by itself.

    `splits` has the panes that have parted from the unchanged one. `place` says where the prompt lies among those that the
    direction was made from, once every pane has answered the same. `system` is the system prompt it was answered under, the
    same for every pane; empty for none. `ask` is the request it was answered to, with its settings, and `used` its
    direction; None of two servers.
    """

    prompt: str
    replies: dict[Pane, Reply] = field(default_factory=dict)
    example: bool = False
    splits: dict[Pane, Split] = field(default_factory=dict)
    place: str = ""
    system: str = ""
    ask: Ask | None = None
    used: Used | None = None


def _cell(sent: object) -> Cell | None:
    """A candidate by position and layer; whether the map has it is said when it is taken."""
    if sent is None:
        return None
    if not isinstance(sent, list) or len(sent) != 2 or not all(type(number) is int for number in sent):
        raise PromptError("Cell is a position and a layer of the map: take it again.")
    return sent[0], sent[1]


def asked_writers(sent: object) -> frozenset[str] | None:
    """Names of parts, of which a browser may send anything; whether the model has them is said when it is asked."""
    if sent is None:
        return None
    if not isinstance(sent, list) or len(sent) > MAX_WRITERS or not all(isinstance(name, str) for name in sent):
        raise PromptError("Writers is a list of names of the model's parts: choose them again.")
    return frozenset(sent)


def _number(sent: Mapping[str, object], name: str, low: float, high: float) -> float:
    value = sent.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN is in no range
        said = "The longest reply" if name == "max_new_tokens" else name.capitalize()
        raise PromptError(f"{said} is a number from {low:g} to {high:g}: set it again.")
    return float(value)


class Stops:
    """Who wants their replies stopped. A visitor reaches only the runs of their own session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, tuple[int, threading.Event]] = {}
        self._stopped: dict[str, int] = {}

    def begin(self, session: str, run: int) -> threading.Event:
        """The flag of this run, already set if its stop came first; an older run of the session is stopped."""
        with self._lock:
            if session in self._runs:
                self._runs[session][1].set()
            flag = threading.Event()
            self._runs[session] = run, flag
            if self._stopped.get(session, -1) >= run:
                flag.set()
            return flag

    def stop(self, session: str, run: int) -> None:
        """Stops this run of the session, or keeps it from starting."""
        with self._lock:
            self._stopped[session] = max(run, self._stopped.get(session, -1))
            if session in self._runs and self._runs[session][0] <= run:
                self._runs[session][1].set()

    def forget(self, session: str) -> None:
        """Stops what runs, because the visitor left."""
        with self._lock:
            _, flag = self._runs.pop(session, (0, threading.Event()))
            flag.set()
            self._stopped.pop(session, None)

    def stop_all(self) -> None:
        """Stops everything, because the program ends."""
        with self._lock:
            for _, flag in self._runs.values():
                flag.set()


def talk(
    ready: Ready | Served, turns: tuple[Turn, ...], ask: Ask, stop: threading.Event
) -> Iterator[tuple[tuple[Turn, ...], dict]]:
    """Carries out `ask`: yields the turns and the view of them, at most `UPDATES_PER_SECOND` times a second.

    An error in the prompt leaves the turns as they were, and the view says it in one sentence; what was said before a model
    could not go on stays.
    """
    if ask.action in ("undo", "clear"):
        left = turns[:-1] if ask.action == "undo" else ()
        yield left, view(left, ask.run)
        return
    left = turns
    try:
        earlier, asked = next_turn(turns, ask)
        asked = replace(asked, ask=ask, used=None if isinstance(ready, Served) else _used(ready))
        if isinstance(ready, Served):
            growing = _served_replies(ready, earlier, asked, ask, stop)
        elif stop.is_set():  # no GPU is borrowed for a message that nobody wants answered any more
            growing = _replies(ready, earlier, asked, ask, stop)
        else:
            growing = on_gpu(_replies, ready.light, earlier, asked, ask, model=ready.model, seconds=REPLY, stop=stop)
        for turn in growing:
            left = (*earlier, _cut_off(turn))
            if not all(reply.ending for reply in turn.replies.values()):
                yield (*earlier, turn), view((*earlier, turn), ask.run, running=True)
        if left and isinstance(ready, Ready) and _is_the_same_everywhere(left[-1]):
            left = (*earlier, replace(left[-1], place=_place(ready, conversation(left, "unchanged"))))
        yield left, view(left, ask.run)
    except (PromptError, ModelError) as error:
        yield left, view(left, ask.run, error=str(error))


def _used(ready: Ready) -> Used:
    source, mark = ready.direction.source, mark_of(ready)
    return Used(source.layer, source.position, mark, ready.digest, of_map=not ready.own and mark != FROM_FILE)


def next_turn(turns: tuple[Turn, ...], ask: Ask) -> tuple[tuple[Turn, ...], Turn]:
    """What stays of the conversation, and the turn to be answered; raises PromptError if there is none."""
    if ask.action == "again":
        if not turns:
            raise PromptError("There is nothing to repeat yet: write a message first.")
        return turns[:-1], replace(turns[-1], replies={}, splits={}, place="", system=ask.system)
    if len(ask.prompt) > MAX_CHARACTERS:
        raise PromptError(
            f"The prompt has {len(ask.prompt):,} characters and at most {MAX_CHARACTERS:,} are read: shorten it."
        )
    opened_by_itself = len(turns) == 1 and turns[0].example
    earlier = () if ask.action == "fresh" or opened_by_itself else turns
    return earlier, Turn(ask.prompt, example=ask.example, system=ask.system)


def _replies(ready: Ready, earlier: Sequence[Turn], turn: Turn, ask: Ask, stop: threading.Event) -> Iterator[Turn]:
    """The turn while its replies grow, all panes in one batch."""
    strengths = _strengths(ask)
    conversations = [conversation((*earlier, turn), pane) for pane in strengths]
    steps = stream_side_by_side(
        ready.model,
        conversations,
        [_row(ready, pane, strength, ask.writers) for pane, strength in strengths.items()],
        max_new_tokens=ask.max_new_tokens,
        temperature=ask.temperature,
        seed=ask.seed,
        stop=stop,
    )
    confined = {"removed": ask.writers}
    replies = {
        pane: Reply(strength=strength, writers=confined.get(pane), n_tokens=0) for pane, strength in strengths.items()
    }
    turn = replace(turn, replies=replies)
    shown = -math.inf
    step = None
    for step in steps:
        turn = replace(turn, replies=_grown(ready, turn.replies, step), splits=_parted(ready, turn, step))
        now = time.monotonic()
        if now - shown >= 1 / UPDATES_PER_SECOND or all(step.finished):
            shown = now
            yield turn
    if step is None:
        # Stopped before the first token: the message is kept.
        yield _cut_off(turn)


def _cut_off(turn: Turn) -> Turn:
    """The turn with its replies as they are, those that were not at their end as stopped ones."""
    return replace(turn, replies={pane: replace(r, ending=r.ending or "stopped") for pane, r in turn.replies.items()})


def _served_replies(
    served: Served, earlier: Sequence[Turn], turn: Turn, ask: Ask, stop: threading.Event
) -> Iterator[Turn]:
    """The turn while the servers' replies grow; one that breaks off leaves the other alone."""
    if not turn.prompt.strip():
        raise PromptError("The prompt is empty: write a message first.")
    panes: list[Pane] = ["unchanged"] if ask.removal is None else ["unchanged", "removed"]
    replies = {pane: Reply(strength=float(pane == "removed")) for pane in panes}
    shown = -math.inf
    for number, news in stream_replies(
        [(served.pair[i], conversation((*earlier, turn), pane)) for i, pane in enumerate(panes)],
        max_new_tokens=ask.max_new_tokens,
        temperature=ask.temperature,
        seed=ask.seed,
        stop=stop,
    ):
        pane = panes[number]
        replies[pane] = replace(
            replies[pane], text=news.text, ending=news.ending, n_tokens=news.n_tokens, problem=news.problem
        )
        now = time.monotonic()
        if now - shown >= 1 / UPDATES_PER_SECOND and not all(reply.ending for reply in replies.values()):
            shown = now
            yield replace(turn, replies=dict(replies))
    yield _cut_off(replace(turn, replies=replies))


def _strengths(ask: Ask) -> dict[Pane, float]:
    """The panes that are on, each with its strength."""
    wanted: dict[Pane, float | None] = {
        "unchanged": 0.0, "removed": ask.removal, "added": ask.addition, "control": ask.control
    }  # fmt: skip
    return {pane: strength for pane in PANES if (strength := wanted[pane]) is not None}


def _row(ready: Ready, pane: Pane, strength: float, writers: frozenset[str] | None) -> Row:
    if pane == "unchanged":
        return ()
    if pane == "removed":
        return (Intervention(ready.direction, "ablate", strength, writers),)
    return (Intervention(control_of(ready) if pane == "control" else ready.direction, "add", strength),)


def control_of(ready: Ready) -> Direction:
    """The random direction of the same norm that the control pane adds."""
    return random_like(ready.direction, CONTROL_SEED)


def _parted(ready: Ready, turn: Turn, step: Step) -> dict[Pane, Split]:
    """The splits of the turn before `step` with those that it makes."""
    parted: dict[Pane, int] = {
        pane: row
        for row, (pane, token) in enumerate(zip(turn.replies, step.tokens, strict=True))
        if token != step.tokens[0] and pane not in turn.splits
    }
    if not parted:
        return turn.splits
    likely = [tuple((_as_text(ready, token), share) for token, share in row) for row in step.most_likely(N_LIKELY)]
    new: dict[Pane, Split] = {
        pane: Split(step.index, len(turn.replies[pane].text), {"unchanged": likely[0], pane: likely[row]})
        for pane, row in parted.items()
    }
    return turn.splits | new


def _place(ready: Ready, said: Conversation) -> str:
    """Where the prompt lies among those that the direction was made from, in words; nothing if it cannot be read now."""
    try:
        (activations,) = once_on_gpu(
            collect_activations, ready.model, [said], ready.found.positions, model=ready.model, seconds=GLANCE
        )
    except ModelError:
        return ""
    return place_in_words(place(ready.found, activations, ready.direction), ready.found)


def place_in_words(here: Place, found: Found) -> str:
    """A place among the prompts that a direction was made from, counted: what follows on "This prompt"."""
    harmful, harmless = found.prompts.classes
    further = f"further toward {'refusal' if found.prompts.classes == CLASSES else harmful}"
    n_harmless, n_harmful = len(found.harmless), len(found.harmful)
    of_harmless, of_harmful = round(here.beyond_harmless * n_harmless), round(here.beyond_harmful * n_harmful)
    if of_harmful == n_harmful:
        return f"lies {further} than every {harmful} prompt the direction was made from."
    over = (
        f"every {harmless} prompt"
        if of_harmless == n_harmless
        else f"{of_harmless} of the {n_harmless} {harmless} prompts"
    )
    if of_harmful:
        return f"lies {further} than {over} and {of_harmful} of the {n_harmful} {harmful} ones."
    if of_harmless:
        return f"lies {further} than {over}, and less far than every {harmful} one."
    return f"lies {further.replace('further', 'less far', 1)} than every prompt the direction was made from."


def _as_text(ready: Ready, token: int) -> str:
    return "(end)" if token in ready.model.end_tokens else str(ready.model.tokenizer.decode([token]))


def _grown(ready: Ready, replies: dict[Pane, Reply], step: Step) -> dict[Pane, Reply]:
    if step.index == 0 and ready.found.refusal_tokens:
        first = refusal_probability(step.logits, ready.found.refusal_tokens).tolist()
        replies = {pane: replace(r, refusal=p) for (pane, r), p in zip(replies.items(), first, strict=True)}
    return {
        pane: replace(reply, text=text, ending=ending, ids=reply.ids if token is None else (*reply.ids, token))
        for (pane, reply), text, ending, token in zip(
            replies.items(), step.texts, step.finished, step.tokens, strict=True
        )
    }


def conversation(turns: Sequence[Turn], pane: Pane) -> list[dict[str, str]]:
    """The chat as `pane` has had it, ending with the last prompt; turns in which it said nothing are left out.

    It begins with the system prompt of the last turn, if there is one.
    """
    messages = [{"role": "system", "content": turns[-1].system}] if turns[-1].system else []
    for turn in turns[:-1]:
        if pane in turn.replies and turn.replies[pane].text:
            messages.append({"role": "user", "content": turn.prompt})
            messages.append({"role": "assistant", "content": turn.replies[pane].text})
    return [*messages, {"role": "user", "content": turns[-1].prompt}]


# -- where the replies lie -------------------------------------------------------------------------------------------


def tint(ready: Ready, turns: Sequence[Turn], *, inside: bool) -> dict[Pane, list[tuple[str, float]]]:
    """The tokens of the last turn's replies as text, each with where it lies along the direction.

    0 is the mean of the harmless prompts that the direction was made from, 1 that of the harmful ones, at the layer
    it was read from. The untouched model reads every reply, or, `inside`, each pane's own changed one: after removal
    that reading is the same at every token by construction. A turn may have been answered with another direction than
    the one in use; without that one nothing is read inside. Raises PromptError for a conversation that has grown too
    long.
    """
    replies: dict[Pane, Reply] = {pane: reply for pane, reply in turns[-1].replies.items() if reply.ids}
    answered = _answered_with(ready, turns[-1].used) if inside else ready
    if not replies or answered is None:
        return {}
    direction, found = ready.direction, ready.found
    layer, at = direction.source.layer, found.positions.index(direction.source.position)
    harmful, harmless = (
        (x[:, at, layer].double() @ direction.unit.double()).mean().item() for x in (found.harmful, found.harmless)
    )
    readings = once_on_gpu(
        read_along,
        ready.model,
        [conversation(turns, pane) for pane in replies],
        direction,
        [reply.ids for reply in replies.values()],
        [_row(answered, pane, reply.strength, reply.writers) if inside else () for pane, reply in replies.items()],
        layers=[layer],
        model=ready.model,
        seconds=GLANCE,
    )
    return {
        pane: [
            (piece, round((value - harmless) / (harmful - harmless), 3))
            for piece, value in zip(
                _pieces(ready, reply.ids), reading.along[0, -len(reply.ids) :].tolist(), strict=True
            )
        ]
        for (pane, reply), reading in zip(replies.items(), readings, strict=True)
    }


def _answered_with(ready: Ready, used: Used | None) -> Ready | None:
    """The same with the direction that a turn was answered with; None where that is neither in use nor on the map."""
    if used is None or _digest_of(used) == ready.direction.digest:
        return ready
    try:
        on_map = ready.using((used.position, used.layer))
    except DirectionError:
        return None
    return on_map if _digest_of(used) == on_map.direction.digest else None


def _digest_of(used: Used) -> str:
    """Of the direction alone: with other tokens that count as a refusal it is the same direction."""
    return used.digest.split()[0]


def _pieces(ready: Ready, ids: tuple[int, ...]) -> list[str]:
    """The text of each token; one that is only a part of a character is empty, and the last of them has it whole."""
    tokenizer = ready.model.tokenizer
    grown = [str(tokenizer.decode(list(ids[:i]), skip_special_tokens=True)) for i in range(len(ids) + 1)]
    grown = [*(text.rstrip("\ufffd") for text in grown[:-1]), grown[-1]]
    return [after[len(before) :] for before, after in pairwise(grown)]


# -- the view ------------------------------------------------------------------------------------------------------


def view(turns: Sequence[Turn], run: int, *, running: bool = False, error: str = "") -> dict:
    """What the page draws: plain data, in which every text is still just text."""
    return {
        "run": run,
        "running": running,
        "error": error,
        "notice": "" if running or error or not turns else _notice(turns[-1]),
        "turns": [
            {
                "prompt": turn.prompt,
                "example": turn.example,
                "replies": {pane: _reply_view(reply) for pane, reply in turn.replies.items()},
                "splits": {pane: asdict(split) for pane, split in turn.splits.items()},
                "settings": None if turn.ask is None else _settings_view(turn.ask, turn.used),
            }
            for turn in turns
        ],
    }


def _settings_view(ask: Ask, used: Used | None) -> dict:
    """What a turn was answered with, in the fields of a request, and the direction."""
    return {name: getattr(ask, name) for name in SETTINGS} | {
        "writers": None if ask.writers is None else sorted(ask.writers),
        "direction": None if used is None else asdict(used),
    }


def _reply_view(reply: Reply) -> dict:
    shown = {
        "text": reply.text,
        "tokens": len(reply.ids) or reply.n_tokens,
        "problem": reply.problem,
        "ending": reply.ending or "",
        "refusal": reply.refusal,
        "strength": reply.strength,
        "writers": None if reply.writers is None else sorted(reply.writers),
    }
    if reply.ending is None or (reply.ending == "stopped" and not reply.text):
        return shown
    verdict = judged(reply.text, reply.ending, "default")
    if reply.ending == "stopped" and not verdict.refused:
        return shown
    return shown | {"verdict": verdict.label, "because": verdict.phrase or verdict.reason}


def _is_the_same_everywhere(turn: Turn) -> bool:
    """Whether panes that were changed, the control aside, came to the same end with the same text as all others."""
    changed = [reply for pane, reply in turn.replies.items() if reply.strength and pane != "control"]
    said = {reply.text for reply in turn.replies.values()}
    endings = {reply.ending for reply in turn.replies.values()}
    return bool(changed) and len(said) == 1 and not endings & {None, "stopped", "memory", "filtered"}


def _notice(turn: Turn) -> str:
    """What the replies show taken together, where that needs saying."""
    if _is_the_same_everywhere(turn):
        where = f" It {turn.place}" if turn.place else ""
        return f"All panes answered the same: at these strengths the direction hardly matters for this prompt.{where}"
    if short := [reply for reply in turn.replies.values() if reply.ending == "memory"]:
        n = max(len(reply.ids) for reply in short)
        return f"This did not fit into memory. Shortened to {n} token{'s' if n != 1 else ''}."
    ways: tuple[tuple[Pane, str], ...] = (("added", "{:g}×"), ("removed", "{:.0%}"))
    for pane, said in ways:
        reply = turn.replies.get(pane)
        if reply and reply.strength and reply.ending and "repeats" in judge(reply.text, "default").reason:
            strength = said.format(reply.strength)
            return f"The text repeats itself: the push is too strong. Try a strength nearer to 0 than {strength}."
    return ""


def opening_view(ready: Ready) -> dict:
    """The first view: prompts to choose from, drawn from those the direction has not seen, and one to begin with."""
    source = ready.direction.source
    about = {
        "model": ready.model.name,
        "digest": ready.digest,
        "layer": source.layer,
        "position": source.position,
        "parts": list(ready.model.parts),
    }
    return _opening(ready.examples, about)


def served_view(served: Served) -> dict:
    """The first view where two servers answer; `closed` says what cannot be done then."""
    return _opening(served.examples, {"model": served.name, "digest": "", "parts": [], "closed": CLOSED})


def _opening(examples: PromptSet, about: dict) -> dict:
    harmless = _examples(examples.harmless, examples.harmless_categories, N_HARMLESS, first=_alarming(examples))
    by_category: dict[str, list[str]] = {}
    for text, category in zip(examples.harmful, examples.harmful_categories, strict=True):
        by_category.setdefault(category, []).append(text)
    chosen = {
        "opening": OPENING,
        "harmless": harmless,
        "harmful": [
            {"category": category, "texts": _examples(texts, [category] * len(texts), N_HARMFUL)}
            for category, texts in sorted(by_category.items(), key=lambda pair: (-len(pair[1]), pair[0]))[:N_CATEGORIES]
        ],
    }
    return view((), 0) | {"examples": about | chosen}


def _alarming(examples: PromptSet) -> dict[str, int]:
    """Harmless prompts in a word that otherwise only harmful ones have, such as "kill" of a process: how many of them."""
    harmless = list(zip(examples.harmless, examples.harmless_categories, strict=True))
    everyday = {word for text, category in harmless if category != NEAR_MISS for word in _words(text)}
    harmful = Counter(word for text in examples.harmful for word in _words(text) - everyday)
    near = [text for text, category in harmless if category == NEAR_MISS]
    return {text: most for text in near if (most := max((harmful[word] for word in _words(text)), default=0))}


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _examples(
    texts: Sequence[str], categories: Sequence[str], n: int, first: Mapping[str, int] | None = None
) -> list[str]:
    """At most `n` prompts, half of them the highest of `first` as far as there are so many, that begin in as many ways and
    are of as many categories as there are.
    """
    first = first or {}
    by_look = sorted(
        zip(categories, texts, strict=True), key=lambda pair: (-first.get(pair[1], 0), _looks(pair[1]))
    )  # fmt: skip
    chosen: list[str] = []
    begun: set[str] = set()
    used: set[str] = set()
    for of_first, most, may_repeat in ((True, n // 2, False), (False, n, False), (False, n, True)):
        for category, text in by_look:
            if len(chosen) == most or text in chosen or (text in first) != of_first:
                continue
            beginning = text.split()[0]
            if may_repeat or (beginning not in begun and (of_first or category not in used)):
                chosen.append(text)
                begun.add(beginning)
                used.add(category)
    return chosen


def _looks(text: str) -> tuple[bool, bool, int]:
    """Sorts prompts by how well they read as a button: questions first, then other sentences, short ones first."""
    is_sentence = text[:1].isupper() and text[-1:] in ".?!"
    return not (is_sentence and text.endswith("?")), not is_sentence, len(text)
