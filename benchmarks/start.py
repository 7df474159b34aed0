"""From nothing to the first page, against importing torch, transformers and gradio: processes of their own.

The page is there when the server answers; the model is loaded, and its direction found, behind it. Needs
`tests/requirements.txt`.
"""

import subprocess
import sys

from benchmarks.browsing import ROOT, free_port, running
from benchmarks.subjects import Subject
from benchmarks.timing import Measured, main, take_turns


def measure(subject: Subject, repeats: int) -> Measured:
    """All in turn; the app always starts on the embedded model."""
    works = {
        "import torch, transformers, gradio": lambda: _python("-c", "import torch, transformers, gradio"),
        "import refusal_core.selection": lambda: _python("-c", "import refusal_core.selection"),
        "app.py to its first page": lambda: _app_until("/", b"<html"),
        "app.py until the model is ready": lambda: _app_until("/healthz", b'"ready":true'),
    }
    goals = {"app.py to its first page": 1.3}
    return Measured("Start", "import torch, transformers, gradio", take_turns(works, repeats), goals)


def _python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, cwd=ROOT)


def _app_until(path: str, says: bytes) -> None:
    port = free_port()
    with running("app.py", "--port", str(port), "--no-browser", port=port, path=path, says=says):
        pass


if __name__ == "__main__":
    main(measure, __doc__)
