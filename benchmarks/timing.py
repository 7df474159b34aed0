"""Works that take turns on one machine, their medians, and the ratio of each to a named baseline of the same run."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.subjects import Subject, subject


@dataclass(frozen=True)
class Measured:
    """Seconds of each work, in the order they were done.

    `goals` is the ratio to `baseline` each should not exceed, `limits` the seconds.
    """

    title: str
    baseline: str
    seconds: dict[str, list[float]]
    goals: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    def ratio(self, work: str) -> float:
        """The median over that of the baseline."""
        return statistics.median(self.seconds[work]) / statistics.median(self.seconds[self.baseline])

    def as_markdown(self) -> str:
        """A table with a line for each work."""
        lines = ["| work | median | shortest to longest | times the baseline | goal |", "|---|---|---|---|---|"]
        for work, taken in self.seconds.items():
            ratio = "1" if work == self.baseline else f"**{self.ratio(work):.2f}**"
            goal = f"≤ {self.goals[work]:g}" if work in self.goals else ""
            goal = f"≤ {_readable(self.limits[work])}" if work in self.limits else goal
            middle, shortest, longest = (_readable(f(taken)) for f in (statistics.median, min, max))
            name = f"{work} (baseline)" if work == self.baseline else work
            lines.append(f"| {name} | {middle} | {shortest} to {longest} | {ratio} | {goal} |")
        return "\n".join(lines)


def take_turns(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Does every work once unmeasured, then all of them in turn, `repeats` times; the seconds of each."""
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def machine() -> str:
    """What this runs on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text("utf-8").splitlines() if "model name" in line] if cpu.exists() else []  # fmt: skip
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main(measure: Callable[[Subject, int], Measured], doc: str | None, *, repeats: int = 5) -> None:
    """The command line of one benchmark."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="“embedded”, “0.5B” (random), a folder or a hub id")
    parser.add_argument("--repeats", type=int, default=repeats)
    options = parser.parse_args()
    chosen = subject(options.model)
    measured = measure(chosen, options.repeats)
    print(
        f"{measured.title}: {chosen.name}, median of {options.repeats} in turn\n{machine()}\n{measured.as_markdown()}"
    )


def _readable(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
