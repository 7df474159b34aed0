"""Servers on this machine, for tests: transformers' own, and one that breaks as it is told."""

import contextlib
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from transformers.cli.serve import Serve


@contextlib.contextmanager
def transformers_serve() -> Iterator[str]:
    """The address of `transformers serve`, which loads whatever folder a request names as its model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(device="cpu", dtype="float32", host="127.0.0.1", port=port, non_blocking=True, log_level="error")
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            break
        assert time.monotonic() < deadline, "transformers serve does not start"
        time.sleep(0.05)
    try:
        yield url
    finally:
        server.kill_server()


Answer = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


class Scripted:
    """Lists `models` at `url`, and answers chats as `answer` says; `asked` are the bodies of the chats, in order."""

    def __init__(self, answer: Answer, models: tuple[str, ...] = ("small",)) -> None:
        self.answer, self.models = answer, models
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.open = self.most_open = 0
        scripted, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                scripted.headers.append(dict(self.headers))
                send(self, 200, {"object": "list", "data": [{"id": name} for name in scripted.models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                scripted.headers.append(dict(self.headers))
                with lock:
                    scripted.asked.append(body)
                    scripted.open += 1
                    scripted.most_open = max(scripted.most_open, scripted.open)
                try:
                    with contextlib.suppress(OSError):  # whoever asked has gone
                        scripted.answer(self, body)
                finally:
                    with lock:
                        scripted.open -= 1

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def send(request: BaseHTTPRequestHandler, status: int, said: object, **headers: str) -> None:
    data = said if isinstance(said, bytes) else json.dumps(said).encode()
    request.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(data)


def stream(request: BaseHTTPRequestHandler, *events: object) -> None:
    """Server-sent events, and the end of the connection; a text is sent as it is."""
    request.send_response(200)
    request.send_header("Content-Type", "text/event-stream")
    request.end_headers()
    for event in events:
        said = event if isinstance(event, str) else json.dumps(event)
        request.wfile.write(f"data: {said}\n\n".encode())
        request.wfile.flush()


def piece(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}
