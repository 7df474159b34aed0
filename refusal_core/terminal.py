"""What a terminal shows: bars of long work, tables, and a chat whose three replies stream side by side.

A reply is text, whatever it contains: characters that would steer the terminal are shown as a replacement character.
"""

import math
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Protocol, TypeVar, runtime_checkable

from refusal_core.chat_model import ChatModel
from refusal_core.directions import Direction
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention, Row
from refusal_core.prompts import PromptError
from refusal_core.selection import Progress

BAR = 30
NARROWEST = 24
"""Columns narrower than this are set one below the other."""

TITLES = ("unchanged", "direction removed", "direction added")
COMMANDS = """\
  /strength S [T]   how much of the direction is removed and added (S for both, or S and T); 1 is the paper's setting
  /clear            begins a new conversation
  /quit             ends the chat, as Ctrl-D does; Ctrl-C stops a reply"""

Event = TypeVar("Event")


@runtime_checkable
class Out(Protocol):
    """A file or terminal to write to."""

    def write(self, text: str, /) -> object:
        """Takes text."""

    def flush(self) -> object:
        """Brings it out."""

    def isatty(self) -> bool:
        """Whether somebody watches."""
        ...


def followed(events: Iterable[Progress | Event], to: Out | None = None) -> Event:
    """The last of the events; the progress before it is drawn as a bar per stage `to` a terminal, by default stderr."""
    out: Out = to or sys.stderr
    last, stage, began = None, "", time.monotonic()
    for event in events:
        if not isinstance(event, Progress):
            last = event
        elif out.isatty():
            if event.stage != stage:
                out.write("\n" if stage else "")
                stage, began = event.stage, time.monotonic()
            out.write(f"\r\033[K{bar(event)} {time.monotonic() - began:4.0f} s")
            out.flush()
    if stage:
        out.write("\n")
    assert last is not None, "work that is not stopped ends in a result"
    return last


def bar(progress: Progress) -> str:
    """How far a stage has come, in one line."""
    share = progress.done / progress.total if progress.total else 0.0
    full = int(share * BAR)
    return f"{progress.stage:<20} {'━' * full}{'─' * (BAR - full)} {share:4.0%}"


# -- columns ---------------------------------------------------------------------------------------------------------


def side_by_side(titles: Sequence[str], texts: Sequence[str], width: int) -> list[str]:
    """The texts as lines of a terminal `width` cells wide: in columns, or one below the other where it is narrow."""
    gap = 3
    each = (width - gap * (len(texts) - 1)) // len(texts)
    if each < NARROWEST:
        return [
            line
            for title, text in zip(titles, texts, strict=True)
            for line in (f"── {title}", *wrapped(text, max(1, width)), "")
        ]
    columns = [[title, "─" * each, *wrapped(text, each)] for title, text in zip(titles, texts, strict=True)]
    rows = zip_longest(*columns, fillvalue="")
    return [(" " * gap).join(cell + " " * (each - cells(cell)) for cell in row).rstrip() for row in rows]


def wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` cells, broken between words, or within one that is longer than a line."""
    lines = []
    for paragraph in plain(text).split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if cells(longer) <= width:
                line = longer
                continue
            if line:
                lines.append(line)
            line = ""
            for character in word:
                if cells(line + character) > width:
                    lines.append(line)
                    line = ""
                line += character
        lines.append(line)
    return lines


def plain(text: str) -> str:
    """`text` without characters that steer a terminal."""
    shown = text.replace("\t", "    ").replace("\r\n", "\n")
    return "".join(c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf") else "\ufffd" for c in shown)


def cells(text: str) -> int:
    """How many cells of a terminal `text` takes."""
    return sum(_cells_of(character) for character in text)


def _cells_of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class Screen:
    """Lines that grow in place. What has scrolled out of the window cannot be redrawn: then all is shown once more."""

    def __init__(self, out: Out) -> None:
        self._out, self._drawn, self._is_stale = out, list[str](), False

    def draw(self, lines: list[str]) -> None:
        """Shows `lines` in place of those before; nothing in between where `out` is no terminal."""
        if not self._out.isatty():
            self._drawn, self._is_stale = lines, True
            return
        same = next((i for i, (a, b) in enumerate(zip(self._drawn, lines, strict=False)) if a != b), len(self._drawn))
        same = min(same, len(lines))
        reach = max(0, len(self._drawn) - (shutil.get_terminal_size().lines - 1))
        self._is_stale |= same < reach
        same = max(same, reach)
        up = len(self._drawn) - same
        self._out.write((f"\033[{up}A" if up else "") + "\r\033[J" + "".join(f"{line}\n" for line in lines[same:]))
        self._out.flush()
        self._drawn = lines

    def finish(self) -> None:
        """Leaves the last lines as they are, whole."""
        if self._is_stale:
            self._out.write("".join(f"{line}\n" for line in ("", *self._drawn)))
        self._out.flush()
        self._drawn, self._is_stale = [], False


# -- the chat --------------------------------------------------------------------------------------------------------


def chat(
    model: ChatModel,
    direction: Direction,
    *,
    max_new_tokens: int,
    read: Callable[[str], str] = input,
    to: Out | None = None,
) -> None:
    """Talks with the unchanged model and the two with the direction removed and added, until `/quit` or the end."""
    out: Out = to or sys.stdout
    removed, added = 1.0, 1.0
    conversations: list[list[dict[str, str]]] = [[], [], []]
    print(f"{plain(model.description)}\n{COMMANDS}", file=out)
    while True:
        try:
            said = read("\n> ").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            print("That is no UTF-8 text: type it anew.", file=out)
            continue
        except KeyboardInterrupt:
            print("\n/quit ends the chat.", file=out)
            continue
        command, *values = said.split()[:3] or [""]
        if command == "/quit":
            return
        if command == "/clear":
            conversations = [[], [], []]
        elif command == "/strength":
            if (strengths := _strengths(values)) is None:
                print(
                    "A strength is one or two numbers from −10 to 10, such as /strength 0.5 or /strength 1 2.", file=out
                )
            else:
                removed, added = strengths
        elif command.startswith("/"):
            print(COMMANDS, file=out)
        elif said:
            rows = [(), (Intervention(direction, "ablate", removed),), (Intervention(direction, "add", added),)]
            titles = (TITLES[0], f"{TITLES[1]} × {removed:g}", f"{TITLES[2]} × {added:g}")
            conversations = _answered(model, conversations, said, rows, titles, max_new_tokens, out)


def _answered(
    model: ChatModel,
    conversations: list[list[dict[str, str]]],
    said: str,
    rows: Sequence[Row],
    titles: Sequence[str],
    max_new_tokens: int,
    out: Out,
) -> list[list[dict[str, str]]]:
    """The conversations with the message and its replies, as far as they came; as they were if it cannot be read."""
    asked = [[*conversation, {"role": "user", "content": said}] for conversation in conversations]
    screen, texts, is_short = Screen(out), ("",) * len(rows), False
    try:
        for step in stream_side_by_side(model, asked, rows, max_new_tokens=max_new_tokens):
            texts, is_short = step.texts, "memory" in step.finished
            screen.draw(side_by_side(titles, texts, shutil.get_terminal_size().columns - 1))
        screen.finish()
        if is_short:
            print("(shortened: more did not fit into memory)", file=out)
    except PromptError as error:
        print(error, file=out)
        return conversations
    except KeyboardInterrupt:
        screen.finish()
        print("(stopped)", file=out)
    return [[*chat, {"role": "assistant", "content": text}] for chat, text in zip(asked, texts, strict=True)]


def _strengths(values: Sequence[str]) -> tuple[float, float] | None:
    try:
        numbers = [float(value.replace("−", "-").replace(",", ".")) for value in values]
    except ValueError:
        return None
    if not numbers or not all(math.isfinite(n) and abs(n) <= 10 for n in numbers):
        return None
    return numbers[0], numbers[-1]
