"""A Space with ZeroGPU hardware on this machine: `spaces` itself with its forked workers, and no GPU.

Two things are stood in for. `Lender` is the service that says which worker may use which GPU, at the addresses and in the
words that `spaces.zero.api` has. And this file as a program is the app with what a worker does to CUDA left out, so
that "on the GPU" is the worker's CPU; it notes which process runs each step of a model.
"""

import http.server
import json
import os
import signal
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

STEPS, OFFERED = "REFUSAL_TEST_STEPS", "REFUSAL_TEST_OFFERED"
N_GPUS = 4
QUOTA = {"left": 7, "wait": "PT34M12S"}


class Lender:
    """Lends `N_GPUS` GPUs that are not there. `refusal` is the status and the body that the next calls are refused with."""

    def __init__(self) -> None:
        self.refusal: tuple[int, dict] | None = None
        self.reports = 0
        self.durations: list[int] = []
        self.workers: dict[int, int] = {}
        self.seen: set[int] = set()
        self.in_use: set[int] = set()
        self._news = threading.Condition()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def take_back(self) -> None:
        """Ends the workers that have a GPU, as the platform does with those that take too long."""
        with self._news:
            for gpu in self.in_use:
                os.kill(self.workers[gpu], signal.SIGKILL)

    def all_are_back(self, patience: float) -> bool:
        """Whether no GPU is in use, at the latest after so many seconds."""
        with self._news:
            return self._news.wait_for(lambda: not self.in_use, timeout=patience)

    def answer(self, call: str, asked: dict[str, str]) -> tuple[int, dict]:
        """Status and body of a call."""
        with self._news:
            if call == "/startup-report":
                self.reports += 1
            elif call == "/schedule":
                if self.refusal is not None:
                    return self.refusal
                assert self._news.wait_for(lambda: len(self.in_use) < N_GPUS, timeout=60)
                gpu = min(set(range(N_GPUS)) - self.in_use, key=lambda i: (i not in self.workers, i))
                self.in_use.add(gpu)
                self.durations.append(int(asked["durationSeconds"]))
                lent = {"nvidiaIndex": gpu, "nvidiaUUID": f"GPU-{gpu}", "allowToken": str(gpu)}
                return 200, lent | {"idle": gpu in self.workers}
            elif call == "/allow":
                self.workers[int(asked["allowToken"])] = int(asked["pid"])
                self.seen.add(int(asked["pid"]))
            elif call == "/release":
                gpu = int(asked["allowToken"])
                self.in_use.discard(gpu)
                if asked["fail"] == "true":
                    self.workers.pop(gpu, None)
                self._news.notify_all()
        return 200, {}

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        lender = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                url = urlsplit(self.path)
                status, body = lender.answer(url.path, {k: v[0] for k, v in parse_qs(url.query).items()})
                sent = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(sent)))
                self.end_headers()
                self.wfile.write(sent)

            def log_message(self, format: str, *args) -> None:
                pass

        return Handler


def main() -> int:
    import torch

    # `spaces` puts its own in their places, and a torch for CPUs has none.
    version, torch.version.cuda = torch.version.cuda, torch.version.cuda or "13.0"
    torch._C._cuda_init = getattr(torch._C, "_cuda_init", lambda: None)
    torch.cuda._is_in_bad_fork = bool

    import spaces.zero.torch as cuda

    from refusal_core.chat_model import ChatModel
    from refusal_core.ui import server

    torch.version.cuda = version
    cuda.init, cuda.move = (lambda uuid: None), (lambda callback=None: None)
    server.OFFERED = (*server.OFFERED, *filter(None, [os.environ.get(OFFERED)]))
    run, steps = ChatModel._run, Path(os.environ[STEPS])

    def noted(self, *args, **kwargs):
        with steps.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return run(self, *args, **kwargs)

    ChatModel._run = noted
    return server.main()


if __name__ == "__main__":
    sys.exit(main())
