"""What a terminal shows: columns that fit, text that cannot steer it, and a chat that outlives Ctrl-C."""

import io
import signal

import pytest

from refusal_core.chat_model import ChatModel
from refusal_core.directions import Direction
from refusal_core.generation import stream_side_by_side
from refusal_core.interventions import Intervention
from refusal_core.selection import Progress
from refusal_core.terminal import cells, chat, followed, plain, side_by_side, wrapped

PROMPT = "How do I rob a bank?"
TEXTS = ("I cannot help with that, and there is more to say.", "Sure: 面白い質問ですね、では始めましょう。", "x" * 200)


class Terminal(io.StringIO):
    """A terminal that keeps what is written, and interrupts the program when it has read `until`."""

    def __init__(self, until: str = "") -> None:
        super().__init__()
        self.until = until

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.until and self.until in text:
            self.until = ""
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.mark.parametrize("width", [78, 100, 161])
def test_columns_fit_the_width_and_lose_nothing(width):
    lines = side_by_side(("one", "two", "three"), TEXTS, width)
    assert all(cells(line) <= width for line in lines)
    each = (width - 6) // 3
    assert "".join(lines).count("x") == 200
    assert any(line.startswith("I cannot help") for line in lines)
    assert lines[0].split() == ["one", "two", "three"] and lines[0].index("two") == each + 3


@pytest.mark.parametrize("width", [12, 40, 77])
def test_where_it_is_narrow_the_texts_stand_one_below_the_other(width):
    lines = side_by_side(("one", "two", "three"), TEXTS, width)
    assert all(cells(line) <= width for line in lines)
    assert [line for line in lines if line.startswith("──")] == ["── one", "── two", "── three"]


def test_lines_break_between_words_and_only_long_words_within():
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert wrapped("abcdefgh", 3) == ["abc", "def", "gh"]
    assert wrapped("a\n\nb", 9) == ["a", "", "b"]
    assert wrapped("面白い", 4) == ["面白", "い"]


def test_a_reply_cannot_steer_the_terminal():
    shown = plain("red \x1b[31m and a title \x1b]0;gone\x07, back\rwards\u202e")
    assert "\x1b" not in shown and "\x07" not in shown and "\r" not in shown and "\u202e" not in shown
    assert "[31m" in shown
    assert not {"\x1b", "\x07"} & set("".join(side_by_side(("a", "b", "c"), (shown,) * 3, 90)))


def test_bars_are_drawn_on_a_terminal_only():
    events = [Progress("reading prompts", 1, 2), Progress("reading prompts", 2, 2), Progress("scoring", 1, 3), "done"]
    terminal, file = Terminal(), io.StringIO()
    assert followed(events, terminal) == followed(events, file) == "done"
    assert file.getvalue() == ""
    drawn = terminal.getvalue()
    assert "100%" in drawn and " 50%" in drawn and " 33%" in drawn
    assert drawn.count("\n") == 2, "a line for each stage"


def talk(model: ChatModel, direction: Direction, *said: str, out: io.StringIO | None = None) -> str:
    lines, out = iter(said), out or io.StringIO()

    def read(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line.encode("latin-1").decode() if line.startswith("latin-1") else line

    chat(model, direction, max_new_tokens=24, read=read, to=out)
    return out.getvalue()


def test_the_chat_shows_the_replies_that_the_batch_gives(model: ChatModel, direction: Direction):
    rows = [None, Intervention(direction, "ablate"), Intervention(direction, "add", 0.5)]
    *_, last = stream_side_by_side(model, [PROMPT] * 3, rows, max_new_tokens=24)
    shown = talk(model, direction, "/strength 1 0.5", "", PROMPT, "/quit", "never read")
    titles = ("unchanged", "direction removed × 1", "direction added × 0.5")
    assert "\n".join(side_by_side(titles, last.texts, 79)) in shown
    assert shown.count("unchanged") == 1, "an empty line asks nothing"


def test_the_chat_goes_on_after_mistakes(model: ChatModel, direction: Direction):
    shown = talk(
        model, direction, "/strength much", "/strength inf", "/help", "word " * 20_000, "latin-1 é", "a\udcff", "Hi"
    )
    assert shown.count("A strength is one or two numbers") == 2
    assert "shorten it" in shown and shown.count("/clear ") == 2
    assert "no UTF-8 text: type it anew" in shown and "characters that are no text" in shown
    assert "unchanged" in shown


def test_ctrl_c_stops_the_reply_and_not_the_chat(model: ChatModel, direction: Direction):
    terminal = Terminal(until="unchanged")
    shown = talk(model, direction, PROMPT, "Hi", out=terminal)
    assert "(stopped)" in shown
    assert "unchanged" in shown[shown.index("(stopped)") :], "and the next message is answered"
