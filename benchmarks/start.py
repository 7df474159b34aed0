"""From nothing to the first page, against importing torch, transformers and gradio: processes of their own.

The page is there when the server answers; the model is loaded behind it.
"""

import http.client
import os
import socket
import subprocess
import sys
import time

from benchmarks.browsing import ROOT, free_port
from benchmarks.subjects import Subject
from benchmarks.timing import Measured, main, take_turns


def measure(subject: Subject, repeats: int) -> Measured:
    """The three in turn; the app always starts on the embedded model."""
    works = {
        "import torch, transformers, gradio": lambda: _python("-c", "import torch, transformers, gradio"),
        "import refusal_core.selection": lambda: _python("-c", "import refusal_core.selection"),
        "app.py to its first page": _first_page,
    }
    goals = {"app.py to its first page": 1.3}
    return Measured("Start", "import torch, transformers, gradio", take_turns(works, repeats), goals)


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT)


def _first_page() -> None:
    port = free_port()
    app = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port)], cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ
    )
    try:
        while app.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=10):
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                    connection.request("GET", "/")
                    if connection.getresponse().status == 200:
                        return
            except OSError:
                time.sleep(0.02)
        raise RuntimeError(f"The app ended with status {app.returncode}.")
    finally:
        app.terminate()
        app.wait()


if __name__ == "__main__":
    main(measure, __doc__)
