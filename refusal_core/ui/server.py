"""The app as a program: its command line, what its server lets through, how it starts and ends.

Nothing leaves the machine unless a hub id, a public list, two servers or `--share` ask for it: the page may load from and
talk to its own server only, and its policy says so to the browser. Only what the page needs is served; uploads are closed
because nothing uploads.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from gradio.themes import Base
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from refusal_core.chat_model import ORGANISM, ModelError
from refusal_core.endpoints import add_endpoints, read_endpoints
from refusal_core.placement import add_placement, asked_for, read_placement
from refusal_core.plots import PLOTLY_JS
from refusal_core.ui.component import ASSETS
from refusal_core.ui.engine import EMBEDDED, Engine, Engines, Failed, Progress
from refusal_core.ui.lending import give_back
from refusal_core.ui.page import build
from refusal_core.ui.talk import MAX_NEW_TOKENS, Stops

OFFERED = (
    EMBEDDED,
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
)
"""The models to choose from; on one's own machine any other as well."""

TOKENS_ON_A_SPACE = 120
MAX_BODY = 9_000_000
"""The largest that is sent is a direction's files, in base64."""
QUEUE = 64
THREADS = 400
"""Enough for all who wait in line, each in a thread that sleeps, and for whoever is served."""

POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio compiles the components' templates and scripts in the page.
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONOSPACE = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


class Guard:
    """Adds the security headers to every answer; turns away uploads and bodies larger than any prompt."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request of the ASGI server."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        if refusal := _turned_away(scope):
            await refusal(scope, receive, send_guarded)
        else:
            await _up_to(MAX_BODY, self._app, scope, receive, send_guarded)


class FirstPaint:
    """Puts into the head of the page what is seen of it before Gradio's scripts are there; nothing of Gradio's offers that."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._style = app, f"<style>{(ASSETS / 'first.css').read_text('utf-8')}</style></head>".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request of the ASGI server."""
        if scope["type"] != "http" or scope["path"] != "/" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        begun: list[Message] = []
        page = bytearray()

        async def send_whole(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.append(message)
                return
            page.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            whole = bytes(page).replace(b"</head>", self._style, 1)
            headers = [(name, value) for name, value in begun[0]["headers"] if name.lower() != b"content-length"]
            await send({**begun[0], "headers": [*headers, (b"content-length", str(len(whole)).encode())]})
            await send({**message, "body": whole})

        await self._app(scope, receive, send_whole)


async def _up_to(most: int, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Serves one request with a body of at most `most` bytes, whatever length it says, or none, that it has.

    Where more arrive the answer is status 413, and to the app the visitor has gone.
    """
    n, begun, over, answered = 0, False, False, False

    async def receive_counted() -> Message:
        nonlocal n, over, answered
        message: Message = {"type": "http.disconnect"} if over else await receive()
        n += len(message.get("body", b""))
        if n > most and not over:
            over = True
            if not begun:
                answered = True
                await _too_large(scope, receive, send)
        return {"type": "http.disconnect"} if over else message

    async def send_unless_answered(message: Message) -> None:
        nonlocal begun
        begun = True
        if not answered:
            await send(message)

    try:
        await app(scope, receive_counted, send_unless_answered)
    except ClientDisconnect:
        if not over:
            raise


async def _too_large(scope: Scope, receive: Receive, send: Send) -> None:
    # Closed, so that the rest of the body is not waited for.
    refusal = PlainTextResponse(f"A request has at most {MAX_BODY:,} bytes.", 413, {"connection": "close"})
    await refusal(scope, receive, send)


def _turned_away(scope: Scope) -> ASGIApp | None:
    if scope["path"].startswith("/gradio_api/upload"):
        return PlainTextResponse("Nothing is uploaded here.", 403)
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if not length.isdigit() or int(length) > MAX_BODY:
        return _too_large
    return None


def routes(engine: Engine) -> list[BaseRoute]:
    """What is served besides the page itself."""

    def health(request: Request) -> JSONResponse:
        status = engine.status
        failed = isinstance(status, Failed)
        ready = not failed and not isinstance(status, Progress)
        return JSONResponse({"ready": ready, "failed": failed}, 503 if failed else 200)

    def plotly(request: Request) -> FileResponse:
        return FileResponse(PLOTLY_JS, media_type="text/javascript")

    return [
        Route("/healthz", health),
        Route("/ui/plotly.min.js", plotly),
        Mount("/ui", StaticFiles(directory=ASSETS)),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="app.py", description="Explore the refusal direction of a chat model.")
    parser.add_argument("--model", default=str(ORGANISM), help="folder or hub id; default: the embedded toy model")
    add_placement(parser)
    parser.add_argument(
        "--prompts",
        default="embedded",
        help="a .jsonl, .json or .csv file, or a public list of the Hugging Face hub, such as jailbreakbench; default: the "
        "embedded lists",
    )
    parser.add_argument("--host", help="address to listen on; default: 127.0.0.1, only this machine")
    parser.add_argument("--port", type=int, help="port; default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="a public link through Gradio's servers")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    add_endpoints(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the app until it is interrupted, and ends the process; returns the exit status of one that cannot begin."""
    parser = _parser()
    options = parser.parse_args(arguments)
    placed = read_placement(options)
    try:
        pair = read_endpoints(options)
        asked_for(**placed)  # what cannot be is said before the page is up
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    if pair and (options.model != str(ORGANISM) or any(placed.values())):
        parser.error(
            "--model, --device, --dtype and --four-bit are of a model here, --baseline and --ablated ask two servers instead: "
            "give one or the other"
        )
    engine, stops = Engine(options.model, options.prompts, pair=pair, placed=placed), Stops()
    engines = Engines(engine, () if pair else OFFERED, any_model=not pair and _is_private(options))
    page = build(engines, stops, TOKENS_ON_A_SPACE if "SPACE_ID" in os.environ else MAX_NEW_TOKENS)
    page.queue(max_size=QUEUE)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        _, url, shared = page.launch(
            server_name=options.host,
            server_port=options.port,
            share=options.share,
            inbrowser=not options.no_browser and _has_browser(),
            prevent_thread_lock=True,
            quiet=True,
            head=f"<style>{(ASSETS / 'page.css').read_text('utf-8')}</style>",
            theme=Base(font=FONTS, font_mono=MONOSPACE),
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            pwa=False,
            show_error=False,
            max_threads=THREADS,
            ssr_mode=False,
            app_kwargs={"middleware": [Middleware(Guard), Middleware(FirstPaint)], "routes": routes(engine)},
        )
    except OSError as error:
        print(f"The app cannot listen there ({error}): give another --host or --port.", file=sys.stderr)
        engines.close()
        return 1
    print(f"The page is at {url}" + (f" and at {shared}" if shared else "") + " (Ctrl-C ends it)", flush=True)
    engine.start()  # behind a page that is up: what it imports takes longer than all that the page needs
    ended.wait()
    stops.stop_all()
    engines.close()
    page.close(verbose=False)
    give_back()
    # A thread in the middle of a step, which is native code, would abort an interpreter that winds down: leave without.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _is_private(options: argparse.Namespace) -> bool:
    """Whether nobody but this machine's user can open the page, so that any model of theirs may be loaded."""
    host = options.host or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    return (
        host in ("127.0.0.1", "localhost", "::1")
        and not options.share
        and not {"SPACE_ID", "GRADIO_SHARE"} & set(os.environ)
    )


def _has_browser() -> bool:
    """Whether somebody sits in front of this machine who wants the page opened."""
    at_a_terminal = sys.stdout.isatty() and "SSH_CONNECTION" not in os.environ and "SPACE_ID" not in os.environ
    has_display = sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    return at_a_terminal and has_display and not Path("/.dockerenv").exists()
