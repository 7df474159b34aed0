"""All benchmarks, one after another: `python -m benchmarks` prints them and writes `benchmarks/RESULTS.md`.

Each is also a program of its own, such as `python -m benchmarks.find --repeats 9`.
"""

from pathlib import Path

from benchmarks import find, forecast, hooks, reading, side_by_side, start, visitors
from benchmarks.subjects import subject
from benchmarks.timing import machine

RUNS = (
    (side_by_side, "embedded", 7), (side_by_side, "0.5B", 1), (visitors, "embedded", 5), (visitors, "0.5B", 1),
    (hooks, "embedded", 7), (hooks, "0.5B", 3), (reading, "embedded", 5), (forecast, "embedded", 30),
    (forecast, "0.5B", 3), (find, "embedded", 5), (start, "embedded", 3),
)  # fmt: skip
"""Which benchmark, on which model, how many times."""


def main() -> None:
    """Runs them all."""
    parts = [f"Written by `python -m benchmarks` on: {machine()}. Ratios are of medians, taken in turn in one run."]
    for benchmark, name, repeats in RUNS:
        chosen = subject(name)
        measured = benchmark.measure(chosen, repeats)
        doc = (benchmark.__doc__ or "").strip()
        parts.append(f"## {measured.title}: {chosen.name}\n\n{doc}\n\n{measured.as_markdown()}\n\n{repeats} × in turn.")
        print(parts[-1], flush=True)
    (Path(__file__).parent / "RESULTS.md").write_text("# Benchmarks\n\n" + "\n\n".join(parts) + "\n", "utf-8")


if __name__ == "__main__":
    main()
