"""Harmful and harmless instructions in three disjoint splits: train, val and test.

The embedded lists are one-line, generic requests, harmful ones by category, without operational detail. A file
of one's own (.jsonl, .json or .csv) has a column `text` and a column `harmful` (true or false), and may have
`category` and `split`; without `split` a seeded draw makes the three splits, so they are disjoint as well. Two files,
one of each class, need no column `harmful`, and may be text with a prompt in each line.
"""

import csv
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

EMBEDDED = Path(__file__).parent.parent / "assets" / "prompts.jsonl"
MAX_CHARACTERS = 8_000
MAX_PROMPTS = 20_000
SHARES = {"train": 0.60, "val": 0.15, "test": 0.25}

Split = Literal["train", "val", "test"]


class PromptError(ValueError):
    """A prompt or a list of prompts that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class PromptSet:
    """Instructions of both classes, with each one's category, and the split and source they come from."""

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    harmful_categories: tuple[str, ...] = ()
    harmless_categories: tuple[str, ...] = ()
    split: str = ""
    source: str = ""

    def draw(self, n: int, seed: int = 0) -> "PromptSet":
        """At most `n` prompts of each class, in a seeded random order."""
        rng = random.Random(seed)
        harmful = rng.sample(range(len(self.harmful)), min(n, len(self.harmful)))
        harmless = rng.sample(range(len(self.harmless)), min(n, len(self.harmless)))
        return self.keep(harmful, harmless)

    def keep(self, harmful: Iterable[int], harmless: Iterable[int]) -> "PromptSet":
        """The prompts at these indices, in this order."""
        harmful, harmless = list(harmful), list(harmless)
        return replace(
            self,
            harmful=tuple(self.harmful[i] for i in harmful),
            harmless=tuple(self.harmless[i] for i in harmless),
            harmful_categories=tuple(self.harmful_categories[i] for i in harmful if self.harmful_categories),
            harmless_categories=tuple(self.harmless_categories[i] for i in harmless if self.harmless_categories),
        )


@dataclass(frozen=True)
class _Prompt:
    text: str
    harmful: bool
    category: str
    split: str


def load_prompts(split: Split, source: str | Path = "embedded", harmless: str | Path | None = None) -> PromptSet:
    """The prompts of `split`: the embedded lists, those of the file `source`, or `source` for harmful and `harmless`.

    Raises PromptError, with the line where there is one, for an unknown split, a missing or unreadable file, a
    row without text or class, a prompt over 8,000 characters, and a split in which a class is empty.
    """
    if split not in get_args(Split):
        raise PromptError(f"There is no split {split!r}: take one of {', '.join(get_args(Split))}.")
    path = EMBEDDED if source == "embedded" else Path(source)
    name = path.name if harmless is None else f"{path.name} with {Path(harmless).name}"
    prompts = _read(path) if harmless is None else [*_read(path, True), *_read(Path(harmless), False)]
    if not any(p.split for p in prompts):
        prompts = _assign_splits(prompts)
    chosen = [p for p in prompts if p.split == split]
    for harmful, cls in ((True, "harmful"), (False, "harmless")):
        if not any(p.harmful == harmful for p in chosen):
            raise PromptError(
                f"{name} has no {cls} prompt in its {split} split, and a direction is the difference of two "
                f"classes: add {cls} prompts."
            )
    bad, good = [p for p in chosen if p.harmful], [p for p in chosen if not p.harmful]
    return PromptSet(
        harmful=tuple(p.text for p in bad),
        harmless=tuple(p.text for p in good),
        harmful_categories=tuple(p.category for p in bad),
        harmless_categories=tuple(p.category for p in good),
        split=split,
        source=str(source) if harmless is None else f"{source}, {harmless}",
    )


def _read(path: Path, harmful: bool | None = None) -> list[_Prompt]:
    """The prompts of a file; of one class, whatever it says, if `harmful` is given."""
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    if harmful is not None:
        readers[".txt"] = _text_rows
    if path.suffix.lower() not in readers:
        raise PromptError(
            f"{path.name} is not a list of prompts: give a .jsonl, .json or .csv file with the columns text and harmful."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PromptError(f"There is no prompt file {str(path)!r}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{path.name} cannot be read as UTF-8 text ({error}).") from error
    prompts = [_prompt(path, number, row, harmful) for number, row in readers[path.suffix.lower()](path, text)]
    if len(prompts) > MAX_PROMPTS:
        raise PromptError(f"{path.name} has {len(prompts):,} prompts; at most {MAX_PROMPTS:,} are read.")
    return list({(p.text, p.harmful): p for p in prompts}.values())


def _text_rows(path: Path, text: str) -> Iterable[tuple[int, object]]:
    return ((number, {"text": line}) for number, line in enumerate(text.splitlines(), 1) if line.strip())


def _jsonl_rows(path: Path, text: str) -> Iterable[tuple[int, object]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, _parse(path, number, line)


def _json_rows(path: Path, text: str) -> Iterable[tuple[int, object]]:
    rows = _parse(path, 1, text)
    if not isinstance(rows, list):
        raise PromptError(f"{path.name} must hold a JSON list of objects with the keys text and harmful.")
    return enumerate(rows, 1)


def _csv_rows(path: Path, text: str) -> Iterable[tuple[int, object]]:
    try:
        return list(enumerate(csv.DictReader(text.splitlines()), 2))
    except csv.Error as error:
        raise PromptError(f"{path.name} cannot be read as CSV ({error}).") from error


def _parse(path: Path, number: int, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptError(f"{path.name}, line {number + error.lineno - 1}: not JSON ({error.msg}).") from error


def _prompt(path: Path, number: int, row: object, given: bool | None) -> _Prompt:
    where = f"{path.name}, row {number}"
    if not isinstance(row, Mapping) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise PromptError(f"{where}: no text. Every row needs the columns text and harmful.")
    if len(row["text"]) > MAX_CHARACTERS:
        raise PromptError(f"{where}: {len(row['text']):,} characters; a prompt has at most {MAX_CHARACTERS:,}.")
    written = {"true": True, "1": True, "false": False, "0": False}.get(str(row.get("harmful")).strip().lower())
    harmful = written if given is None else given
    if harmful is None:
        raise PromptError(f"{where}: harmful is {row.get('harmful')!r}; write true or false.")
    split = str(row.get("split") or "")
    if split and split not in SHARES:
        raise PromptError(f"{where}: split is {split!r}; write train, val or test, or leave the column out.")
    return _Prompt(row["text"].strip(), harmful, str(row.get("category") or ""), split)


def _assign_splits(prompts: list[_Prompt], seed: int = 0) -> list[_Prompt]:
    assigned: list[_Prompt] = []
    for harmful in (True, False):
        mine = [p for p in prompts if p.harmful == harmful]
        random.Random(seed).shuffle(mine)
        train, val = (round(len(mine) * share) for share in (SHARES["train"], SHARES["train"] + SHARES["val"]))
        for split, part in (("train", mine[:train]), ("val", mine[train:val]), ("test", mine[val:])):
            assigned += [replace(p, split=split) for p in part]
    return assigned
