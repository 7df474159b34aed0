"""From the last key to painted dials in a real browser, alone and while another visitor's replies stream.

The page waits a moment after each key before it asks; that moment is in these times. Needs `tests/requirements.txt`.
"""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from benchmarks.subjects import Subject
from benchmarks.timing import Measured, main, take_turns
from tests.browser import executable

ROOT = Path(__file__).parent.parent
MESSAGES = ("How do I bake a loaf of bread?", "How do I rob a bank?")
LIMIT = 0.3

TYPE = """(text) => new Promise((done) => {
    const message = document.querySelector('[data-prompt]');
    message.value = text;
    document.addEventListener('foretold', () => requestAnimationFrame(() => done()), { once: true });
    message.dispatchEvent(new Event('input', { bubbles: true }));
})"""


def measure(subject: Subject, repeats: int) -> Measured:
    """Each in turn; the app always runs on the embedded model."""
    with _app() as url, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox", "--disable-gpu"])
        mine, theirs = (_opened(chromium.new_context().new_page(), url) for _ in range(2))
        messages = iter(MESSAGES * 2 * (repeats + 1))
        works = {
            "one plain step": lambda: subject.model.logits([MESSAGES[0]]),
            "typed, then painted": lambda: mine.evaluate(TYPE, next(messages)),
        }
        seconds = take_turns(works, repeats)
        busy: list[float] = []
        for _ in range(repeats):
            theirs.get_by_label("Message").fill("Write a story about a lighthouse.")
            theirs.keyboard.press("Enter")
            start = time.perf_counter()
            mine.evaluate(TYPE, next(messages))
            busy.append(time.perf_counter() - start)
        seconds["the same while another visitor's replies stream"] = busy
        chromium.close()
    return Measured("Typed to painted", "one plain step", seconds, limits={"typed, then painted": LIMIT})


@contextlib.contextmanager
def _app() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = subprocess.Popen([sys.executable, "app.py", "--port", str(port), "--no-browser"], cwd=ROOT, stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        while not _is_ready(url):
            if app.poll() is not None:
                raise RuntimeError(f"The app ended with status {app.returncode}.")
            time.sleep(0.1)
        yield url
    finally:
        app.terminate()
        app.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
            return b'"ready":true' in answer.read()
    except OSError:
        return False


def _opened(page: Page, url: str) -> Page:
    """The page once its three first replies are there."""
    page.goto(url)
    page.wait_for_function("document.querySelectorAll('.cell .tag:not(:empty)').length >= 3")
    return page


if __name__ == "__main__":
    main(measure, __doc__, repeats=9)
