"""The table of the README: what `evaluate` prints of the embedded model, beside the weights that `export` writes of it.

`python -m benchmarks.rates` runs the two commands, keeps the numbers in `benchmarks/rates.json`, without the replies, and
puts their table into the README; a test holds the README to that file, and the file to the weights. Run it whenever the
embedded model is another one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from refusal_core.evaluation import Rates, Report

N = 200
KEPT = Path(__file__).parent / "rates.json"
README = Path(__file__).parent.parent / "README.md"
HEAD = "| prompts | model | n |"


def measure(n: int) -> str:
    """What `evaluate --n` says in JSON, with a row for an export made for it; on the CPU, where it is the same everywhere."""
    with tempfile.TemporaryDirectory() as folder:
        exported = str(Path(folder) / "ablation")
        _run("export", "--out", exported)
        return _run("evaluate", "--n", str(n), "--exported", exported, "--json")


def _run(command: str, *options: str) -> str:
    line = [sys.executable, "-m", "refusal_core", command, "--device", "cpu", *options]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


def without_replies(said: str) -> dict:
    """The report that `evaluate --json` has printed, as far as a table needs it."""
    return json.loads(said) | {"completions": []}


def read(kept: dict) -> Report:
    """The report that was kept."""
    names = {field.name for field in fields(Rates)}
    rates = tuple(Rates(**{name: value for name, value in each.items() if name in names}) for each in kept["rates"])
    read_back = {"rates": rates, "completions": (), "damage": (), "directions": tuple(kept.get("directions", ()))}
    return Report(**(kept | read_back))


def put_into(text: str, table: str) -> str:
    """`text` with `table` in the place of the one that it has; raises ValueError if it has none, or several."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith(HEAD)]
    if len(starts) != 1:
        raise ValueError(f"The README has {len(starts)} tables that begin with {HEAD!r}: leave one in it.")
    (start,) = starts
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join([*lines[:start], table, *lines[end:]])


def main() -> None:
    """Measures, and writes the file and the README."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=N, help=f"how many test prompts of each class; default: {N}")
    kept = without_replies(measure(parser.parse_args().n))
    KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")
    table = read(kept).as_markdown()
    README.write_text(put_into(README.read_text("utf-8"), table), "utf-8")
    print(table)


if __name__ == "__main__":
    main()
