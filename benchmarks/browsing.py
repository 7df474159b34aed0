"""What the benchmarks in a real browser share: an app in a process of its own, and pages of it."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from tests.browser import executable

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def running(*command: str, port: int, path: str, says: bytes) -> Iterator[str]:
    """The address of a Python program once it answers at `path` with these words; killed afterwards."""
    program = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        while not _answers(f"{url}{path}", says):
            if program.poll() is not None:
                raise RuntimeError(f"It ended with status {program.returncode}: {' '.join(command)}")
            time.sleep(0.02)
        yield url
    finally:
        program.kill()  # how long it takes to end is nobody's question here
        program.wait()


@contextlib.contextmanager
def app() -> Iterator[str]:
    """The address of the app on the embedded model, once it is ready."""
    port = free_port()
    with running(
        "app.py", "--port", str(port), "--no-browser", port=port, path="/healthz", says=b'"ready":true'
    ) as url:
        yield url


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


def until_three_replies(page: Page, url: str) -> Page:
    """Opens the app; the page once its three first replies are whole."""
    page.goto(url)
    page.wait_for_function("document.querySelectorAll('.cell .tag:not(:empty)').length >= 3")
    return page


def _answers(url: str, says: bytes) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return says in answer.read()
    except OSError:
        return False
