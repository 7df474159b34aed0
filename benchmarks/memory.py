"""How much memory finding a direction takes beside the model: the peak of a process of its own, sampled every 2 ms.

Random weights in the shape of Qwen2.5-0.5B, 128 + 128 prompts to train on, of which the logits and the streams are kept,
and 2 + 2 to choose by: every step is as large as with 32 + 32, there are fewer of them. COSMIC chooses, because a random
model refuses nothing.
"""

import argparse
import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.subjects import half_billion
from benchmarks.timing import machine
from refusal_core.prompts import load_prompts
from refusal_core.selection import find_direction

GIB = 2**30
MOST_ADDED = GIB
"""Finding a direction takes no more than the model and this."""

VALIDATION = 2


@dataclass(frozen=True)
class Memory:
    """Bytes: of the weights, of the process with the model in it, and of the process at its largest."""

    weights: int
    before: int
    peak: int

    title = "Memory"

    @property
    def is_kept_to(self) -> bool:
        """Whether the goal is."""
        return self.peak - self.before <= MOST_ADDED

    def as_markdown(self) -> str:
        """A table with a line for each."""
        lines = [
            "| what | GiB | goal |",
            "|---|---|---|",
            f"| weights | {self.weights / GIB:.2f} | |",
            f"| process with the model in it | {self.before / GIB:.2f} | |",
            f"| process at its largest while finding | {self.peak / GIB:.2f} | |",
            f"| added by finding | **{(self.peak - self.before) / GIB:.2f}** | ≤ {MOST_ADDED / GIB:g} |",
        ]
        return "\n".join(lines)


def measure() -> Memory:
    """What a child process says of itself."""
    child = [sys.executable, "-m", "benchmarks.memory", "--child"]
    said = subprocess.run(child, check=True, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
    return Memory(**json.loads(said.stdout.splitlines()[-1]))


def measure_here() -> Memory:
    """Loads the model and finds its direction in this process."""
    model = half_billion()
    process, done, peak = psutil.Process(), threading.Event(), 0
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in find_direction(model, load_prompts("train"), load_prompts("val").draw(VALIDATION), by="cosmic"):
            pass
    finally:
        done.set()
        watcher.join()
    return Memory(model.n_parameters * model.dtype.itemsize, before, peak)


def main() -> None:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", action="store_true", help="measure this process, and say it as JSON")
    if parser.parse_args().child:
        found = measure_here()
        print(json.dumps({"weights": found.weights, "before": found.before, "peak": found.peak}))
    else:
        print(f"{Memory.title}: random weights in the shape of Qwen2.5-0.5B\n{machine()}\n{measure().as_markdown()}")


if __name__ == "__main__":
    main()
