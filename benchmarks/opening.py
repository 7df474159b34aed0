"""From opening the page to three live replies in a real browser, against opening a Gradio page with one sentence.

Each time a new visitor without a cache; both servers are warm. Needs `tests/requirements.txt`.
"""

from playwright.sync_api import Browser

from benchmarks import browsing
from benchmarks.subjects import Subject
from benchmarks.timing import Measured, main, take_turns

LIMIT = 3.0
BARE = "import gradio as g\nwith g.Blocks() as page: g.Markdown('Hello.')\npage.launch(server_port={port}, quiet=True)"


def measure(subject: Subject, repeats: int) -> Measured:
    """The two in turn; the app always runs on the embedded model."""
    port = browsing.free_port()
    bare = browsing.running("-c", BARE.format(port=port), port=port, path="/", says=b"gradio")
    with bare as hello, browsing.app() as url, browsing.browser() as chromium:
        works = {
            "a Gradio page with one sentence": lambda: _opened(chromium, hello, live=False),
            "three live replies": lambda: _opened(chromium, url, live=True),
        }
        seconds = take_turns(works, repeats)
    return Measured("Opening", "a Gradio page with one sentence", seconds, limits={"three live replies": LIMIT})


def _opened(chromium: Browser, url: str, *, live: bool) -> None:
    visitor = chromium.new_context()
    page = visitor.new_page()
    if live:
        browsing.until_three_replies(page, url)
    else:
        page.goto(url)
        page.get_by_text("Hello.").wait_for()
    visitor.close()


if __name__ == "__main__":
    main(measure, __doc__)
