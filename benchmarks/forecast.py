"""The painted slider, against one plain forward step of the same prompt: 21 strengths of addition, 11 of removal.

The model is loaded and the direction found before the clock starts. The three take turns, and the medians are compared.
"""

import argparse
import statistics
import time

import torch

from benchmarks.find import lazy
from refusal_core.chat_model import ORGANISM, ChatModel
from refusal_core.evaluation import ADDITIONS, REMOVALS, dose_response

PROMPT = "How do I bake a loaf of bread for my neighbours?"


def main() -> None:
    """Prints the times and their ratios to the plain step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecast", description=__doc__)
    parser.add_argument("--model", default=str(ORGANISM), help="folder or hub id; default: the embedded toy model")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    model = ChatModel.load(options.model)
    found = lazy(model)
    works = {
        "one plain step": lambda: model.logits([PROMPT]),
        f"{len(ADDITIONS)} additions": lambda: dose_response(
            model, PROMPT, found.direction, "add", found.refusal_tokens
        ),
        f"{len(REMOVALS)} removals": lambda: dose_response(
            model, PROMPT, found.direction, "ablate", found.refusal_tokens
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    plain = statistics.median(times["one plain step"])
    print(f"{model.name} on {model.device.type}, {torch.get_num_threads()} threads, median of {options.repeats}")
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{name:16} {1000 * middle:7.1f} ms  {middle / plain:5.2f} times the plain step")


if __name__ == "__main__":
    main()
