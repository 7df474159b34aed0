"""All benchmarks, one after another: `python -m benchmarks` prints them and writes `benchmarks/RESULTS.md`.

`--model` leaves out those of other models: on a laptop the ones in the shape of a real model take most of the time.

Each is also a program of its own, such as `python -m benchmarks.find --repeats 9`.
"""

import argparse
from pathlib import Path

from benchmarks import find, forecast, growth, hooks, memory, opening, painted, reading, side_by_side, start, visitors
from benchmarks.subjects import subject
from benchmarks.timing import machine

RUNS = (
    (side_by_side, "embedded", 7), (side_by_side, "0.5B", 1), (visitors, "embedded", 5), (visitors, "0.5B", 1),
    (hooks, "embedded", 7), (hooks, "0.5B", 3), (reading, "embedded", 5), (forecast, "embedded", 30),
    (forecast, "0.5B", 3), (find, "embedded", 5), (start, "embedded", 3), (opening, "embedded", 5),
    (painted, "embedded", 9),
)  # fmt: skip
"""Which benchmark, on which model, how many times."""


def main() -> None:
    """Runs them all, or those of one model."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("embedded", "0.5B"), help="only those of this model")
    only = parser.parse_args().model
    command = "python -m benchmarks" + (f" --model {only}" if only else "")
    parts = [f"Written by `{command}` on: {machine()}. Ratios are of medians, taken in turn in one run."]
    for benchmark, name, repeats in (run for run in RUNS if only in (None, run[1])):
        chosen = subject(name)
        measured = benchmark.measure(chosen, repeats)
        doc = (benchmark.__doc__ or "").strip()
        parts.append(f"## {measured.title}: {chosen.name}\n\n{doc}\n\n{measured.as_markdown()}\n\n{repeats} × in turn.")
        _keep(parts)
    for benchmark in (growth, memory) if only is None else ():
        measured = benchmark.measure()
        parts.append(f"## {measured.title}\n\n{(benchmark.__doc__ or '').strip()}\n\n{measured.as_markdown()}")
        _keep(parts)


def _keep(parts: list[str]) -> None:
    """Prints the last part, and writes all so far: a run of half an hour that is ended early has measured something."""
    print(parts[-1], flush=True)
    (Path(__file__).parent / "RESULTS.md").write_text("# Benchmarks\n\n" + "\n\n".join(parts) + "\n", "utf-8")


if __name__ == "__main__":
    main()
