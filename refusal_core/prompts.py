"""Harmful and harmless instructions in three disjoint splits: train, val and test.

The embedded lists are one-line, generic requests, harmful ones by category, without operational detail. A file
of one's own (.jsonl, .json or .csv) has a column `text` and a column `harmful` (true or false) or `label` (the name
of the class), and may have `category` and `split`; two lists of one's own, one of each class, have one prompt a line,
and two files need no column `harmful`. Without `split` a seeded draw makes the three splits, so they are disjoint as
well. The two classes may be others than harmful and harmless: `classes` names them, and the fields keep their names.
Instead of a file there may be a public list by its name, or a data set of the hub (`hub`): only then is anything asked
of the network.
"""

import csv
import io
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from refusal_core import hub

EMBEDDED = Path(__file__).parent.parent / "assets" / "prompts.jsonl"
MAX_CHARACTERS = 8_000
MAX_PROMPTS = 20_000
MAX_ROWS = 1_000_000
MAX_UNPACKED = 2_000_000_000
MOST_DRAWN = 1_000
"""Of a longer public list so many prompts are drawn."""
SHARES = {"train": 0.60, "val": 0.15, "test": 0.25}
CLASSES = ("harmful", "harmless")

Split = Literal["train", "val", "test"]


class PromptError(ValueError):
    """A prompt or a list of prompts that cannot be used; the message says why and what to do."""


def ends_of(classes: tuple[str, str]) -> tuple[str, str]:
    """What lies at the two ends of the direction between two classes: refusing and answering for harmful and harmless."""
    return ("refusing", "answering") if classes == CLASSES else classes


@dataclass(frozen=True)
class PromptSet:
    """Instructions of both classes, with each one's category, and the split and source they come from.

    `classes` says what the two are, where they are not harmful and harmless.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    harmful_categories: tuple[str, ...] = ()
    harmless_categories: tuple[str, ...] = ()
    split: str = ""
    source: str = ""
    classes: tuple[str, str] = CLASSES

    def draw(self, n: int, seed: int = 0) -> "PromptSet":
        """At most `n` prompts of each class, in a seeded random order."""
        rng = random.Random(int(seed))
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
class Prompt:
    """A prompt of a list. `where` says where it stood, for whoever has to find it again."""

    text: str
    harmful: bool
    category: str = ""
    split: str = ""
    where: str = ""


def load_prompts(split: Split, source: str | Path = "embedded", harmless: str | Path | None = None) -> PromptSet:
    """The prompts of `split`: the embedded lists, those of the file `source`, or `source` for harmful and `harmless`.

    Either may be a public list or a data set of the hub; the `source` of the result then says which, at which commit and
    with how many prompts. It can be given here again, that of two lists as well. Raises PromptError, with the line where there is one, for an
    unknown split, a missing or unreadable file, a row without text or class, a prompt over 8,000 characters or in both
    classes, a split in which a class is empty, and for what the hub does not give.
    """
    if split not in get_args(Split):
        raise PromptError(f"There is no split {split!r}: take one of {', '.join(get_args(Split))}.")
    if harmless is None and not is_public(source) and not _are_two(source):
        return in_split(distinct(_read(EMBEDDED if source == "embedded" else Path(source))), split, str(source))
    prompts, said = _read_both(*(_both(source) if harmless is None else (source, harmless)))
    return in_split(prompts, split, said)


def whole(source: str | Path) -> tuple[list[Prompt], str]:
    """All prompts of a list, whatever its splits, and what `PromptSet.source` says of them: a public list by its name or
    address, or a file. Raises PromptError as `load_prompts` does.
    """
    if is_public(source):
        return _read_both(*_both(source))
    return distinct(_read(EMBEDDED if source == "embedded" else Path(source))), str(source)


def read_public(first: str, second: str = "") -> tuple[list[Prompt], str]:
    """All prompts of two lists of the hub, or of both classes of the `first`, and what `PromptSet.source` says of them.

    What is no name is an address, never a file of this machine, and may come without its `hub:`. Raises PromptError as
    `load_prompts` does.
    """
    first, second = (
        given if not given or is_public(given) else f"{hub.PREFIX}{given}" for given in (first.strip(), second.strip())
    )
    if not first:
        raise PromptError(f"There is no list yet: write a name ({', '.join(hub.NAMES)}), or owner/name/file#column.")
    return _read_both(*(first, second) if second else _both(first))


def _read_both(harmful: str | Path, harmless: str | Path) -> tuple[list[Prompt], str]:
    classes = harmful, harmless
    (bad, name, n_bad), (good, other, n_good) = (_read_class(s, h) for s, h in zip(classes, (True, False), strict=True))
    said = f"{name} ({n_bad} and {n_good})" if name == other else f"{_with(name, n_bad)}, {_with(other, n_good)}"
    return distinct([*bad, *good]), said


def is_public(source: str | Path) -> bool:
    """Whether `source` is a list of the hub, or one for each class, so that reading it may ask the network."""
    return all(
        part.startswith(hub.PREFIX) or part.partition("@")[0] in hub.NAMES
        for part in map(_bare, str(source).split(", "))
    )


def _are_two(source: str | Path) -> bool:
    """Whether `source` is what the set of two files says, and no file itself."""
    return str(source).count(", ") == 1 and not Path(source).exists()


def pinned(source: str | Path) -> str | Path:
    """`source` with the commit that its list on the hub is at now, so that all its splits are of one commit.

    What is no list of the hub, or has its commit, stays as it is. Raises PromptError as `load_prompts` does.
    """
    if not is_public(source):
        return source
    return ", ".join(_pinned(_bare(part)) for part in str(source).split(", "))


def _pinned(source: str) -> str:
    name = source.partition("@")[0]
    if source in hub.NAMES:  # its commit stands in the code
        return source
    part = hub.at_commit(_lists(source, name not in hub.HARMLESS)[0], PromptError)
    return f"{name}@{part.revision}" if name in hub.NAMES else part.address


def _both(source: str | Path) -> tuple[str, str]:
    """The lists of both classes that one name stands for, or that a `PromptSet.source` says."""
    first, *more = map(_bare, str(source).split(", "))
    if len(more) == 1:
        return first, more[0]
    if first.startswith(hub.PREFIX):
        raise PromptError(f"{first} is a list of one class: give one for each.")
    return first, first if first.partition("@")[0] in hub.HARMLESS else "alpaca"


def _bare(source: str) -> str:
    """A list's name without the number of its prompts."""
    return re.sub(r" \([\d,]+( (of|and) [\d,]+)*\)$", "", source)


def _with(name: str, count: str) -> str:
    return f"{name} ({count})" if count else name


def _read_class(source: str | Path, harmful: bool) -> tuple[list[Prompt], str, str]:
    """The prompts of one class, what they are from, and of a public list how many there are."""
    if not is_public(source):
        return _read(Path(source), harmful), str(source), ""
    parts = [hub.at_commit(part, PromptError) for part in _lists(_bare(str(source)), harmful)]
    prompts = distinct([prompt for part in parts for prompt in _read_list(part, harmful)])
    count = f"{len(prompts):,}"
    if len(prompts) > MOST_DRAWN:
        prompts, count = random.Random(0).sample(prompts, MOST_DRAWN), f"{MOST_DRAWN:,} of {count}"
    name = _bare(str(source)).partition("@")[0]
    return prompts, f"{name}@{parts[0].revision}" if name in hub.NAMES else parts[0].address, count


def _lists(source: str, harmful: bool) -> tuple[hub.HubList, ...]:
    """The lists at a name or an address."""
    if source.startswith(hub.PREFIX):
        part = hub.read_address(source)
        if part is None:
            raise PromptError(
                f"{source[:200]} is no address of a list: write hub:owner/name/file#column, for example "
                f"{hub.HARMFUL['jailbreakbench'][0].address}."
            )
        return (part,)
    name, _, revision = source.partition("@")
    known = hub.HARMFUL if harmful else hub.HARMLESS
    if name not in known:
        raise PromptError(f"{name} has no {CLASSES[not harmful]} prompts: take one of {', '.join(known)}.")
    return tuple(replace(part, revision=revision or part.revision) for part in known[name])


def _read_list(part: hub.HubList, harmful: bool) -> list[Prompt]:
    """The prompts in a column of a file on the hub; raises PromptError with the row, and with the columns there are."""
    path, name = hub.fetch(part, PromptError), f"{part.repo}, {part.file}"
    kind = Path(part.file).suffix.lower()
    wanted = [column for column in (part.column, part.label, part.category) if column]
    if kind == ".parquet":
        rows = _parquet_rows(name, path, wanted)
    elif kind in _READERS:
        rows = _READERS[kind](name, _utf8(name, path))
    else:
        raise PromptError(f"{name} is not a list of prompts: give a .csv, .json, .jsonl or .parquet file.")
    prompts, seen = [], set()
    for where, row in rows:
        at = f"{name}, {where}"
        if not isinstance(row, Mapping):
            raise PromptError(f"{at}: it is no row with columns.")
        if absent := [column for column in wanted if column not in row]:
            raise _no_column(at, absent[0], row)
        if part.label and (value := str(row[part.label] if row[part.label] is not None else "").strip()) != part.value:
            seen.add(value)
            continue
        _check_cells(at, row)
        text = row[part.column]
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"{at}: no text in the column {part.column}.")
        category = str(row[part.category] or "") if part.category else ""
        prompts.append(Prompt(_text(at, text), harmful, category, where=at))
    if not prompts:
        which = f" whose {part.label} is {part.value!r}: there are {_few(sorted(seen))}" if seen else ""
        raise PromptError(f"{name} has no row{which}.")
    return prompts


def _no_column(where: str, column: str, row: Iterable[object]) -> PromptError:
    return PromptError(f"{where}: there is no column {column!r}: take one of {_few(list(map(str, row)))}.")


def _few(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:10]) + (" …" if len(names) > 10 else "")


def _parquet_rows(name: str, path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a Parquet file, of these columns only."""
    from pyarrow import ArrowException, parquet  # takes a moment, and most lists are text

    try:
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise PromptError(f"{name} has {file.metadata.num_rows:,} rows; at most {MAX_ROWS:,} are read.")
            groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            n_bytes = sum(group.column(i).total_uncompressed_size for group in groups for i in range(group.num_columns))
            if n_bytes > MAX_UNPACKED:
                raise PromptError(f"{name} unpacks to more than {MAX_UNPACKED:,} bytes: take a part of it.")
            names = file.schema_arrow.names
            if absent := [column for column in columns if column not in names]:
                raise _no_column(name, absent[0], names)
            number = 0
            # Few at a time: a value that is stored once may stand in every row.
            for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (ArrowException, OSError) as error:
        raise PromptError(f"{name} cannot be read as a Parquet file ({error}).") from error


def _read(path: Path, harmful: bool | None = None) -> list[Prompt]:
    """The prompts of a file; of one class, whatever it says, if `harmful` is given."""
    is_plain = harmful is not None and path.suffix.lower() == ".txt"
    if not is_plain and path.suffix.lower() not in _READERS:
        raise _no_list(path.name)
    text = _utf8(path.name, path)
    if is_plain:
        lines = ((f"{path.name}, line {number}", line) for number, line in enumerate(_lines(text), 1))
        return _not_too_many(
            path.name, [Prompt(_text(at, line), harmful is True, where=at) for at, line in lines if line.strip()]
        )
    return parse_file(path.name, text, harmful=harmful)


def _utf8(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PromptError(f"There is no prompt file {str(path)!r}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{name} cannot be read as UTF-8 text ({error}).") from error


def in_split(
    prompts: Sequence[Prompt], split: Split, source: str, classes: tuple[str, str] = CLASSES, seed: int = 0
) -> PromptSet:
    """Those of `prompts` that belong to `split`; of a class in which none names its split, a seeded draw makes all three.

    Raises PromptError if a class is empty there, and if only some prompts of a class name their split.
    """
    chosen = [p for p in _assign_splits(prompts, seed) if p.split == split]
    bad, good = [p for p in chosen if p.harmful], [p for p in chosen if not p.harmful]
    for mine, name in zip((bad, good), classes, strict=True):
        if not mine:
            raise PromptError(
                f"{', '.join(Path(part).name for part in source.split(', '))} has no {name} prompt in its {split} split, and a direction is the difference of "
                f"two classes: add {name} prompts."
            )
    return PromptSet(
        harmful=tuple(p.text for p in bad),
        harmless=tuple(p.text for p in good),
        harmful_categories=tuple(p.category for p in bad),
        harmless_categories=tuple(p.category for p in good),
        split=split,
        source=source,
        classes=classes,
    )


def parse_file(
    name: str, text: str, classes: tuple[str, str] = CLASSES, *, harmful: bool | None = None
) -> list[Prompt]:
    """The prompts in the text of the .jsonl, .json or .csv file `name`; raises PromptError as `load_prompts` does.

    All are of one class, whatever the file says, if `harmful` is given.
    """
    reader = _READERS.get(Path(name).suffix.lower())
    if reader is None:
        raise _no_list(name)
    return _not_too_many(
        name, [_prompt(f"{name}, {where}", row, classes, harmful) for where, row in reader(name, text)]
    )


def _not_too_many(name: str, prompts: list[Prompt]) -> list[Prompt]:
    if len(prompts) > MAX_PROMPTS:
        raise PromptError(f"{name} has {len(prompts):,} prompts; at most {MAX_PROMPTS:,} are read.")
    return prompts


def parse_lists(first: str, second: str, classes: tuple[str, str] = CLASSES) -> list[Prompt]:
    """The prompts of two lists, one a line, empty lines left out; the first list is the first of `classes`.

    Raises PromptError, with the line, for a prompt over 8,000 characters and for what is no text.
    """
    return [
        Prompt(_text(where, line), name == classes[0], where=where)
        for name, lines in zip(classes, (first, second), strict=True)
        for number, line in enumerate(_lines(lines), 1)
        if line.strip() and (where := f"The list “{name}”, line {number}")
    ]


def distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Every prompt once; raises PromptError for one that stands in both classes."""
    seen: dict[str, Prompt] = {}
    for prompt in prompts:
        first = seen.setdefault(prompt.text, prompt)
        if first.harmful != prompt.harmful:
            raise PromptError(
                f"{prompt.where}: the same prompt is in the other class as well ({first.where}), and it can be in one "
                "only: take it out of the other."
            )
    return list(seen.values())


def _lines(text: str) -> list[str]:
    """The lines as an editor counts them: `str.splitlines` would also break at characters that JSON may contain."""
    return re.split(r"\r\n|\n|\r", text)


def _jsonl_rows(name: str, text: str) -> Iterable[tuple[str, object]]:
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            yield f"line {number}", _parse(name, number, line)


def _json_rows(name: str, text: str) -> Iterable[tuple[str, object]]:
    rows = _parse(name, 1, text)
    if not isinstance(rows, list):
        raise PromptError(f"{name} must hold a JSON list of objects with the keys text and harmful.")
    return ((f"entry {number}", row) for number, row in enumerate(rows, 1))


def _csv_rows(name: str, text: str) -> Iterable[tuple[str, object]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    begins = 1
    try:
        begins += bool(reader.fieldnames)
        for row in reader:
            yield f"line {begins}", row
            begins = reader.line_num + 1
    except csv.Error as error:
        raise PromptError(
            f"{name}, line {begins}: it cannot be read as CSV ({error}). Close every quote, and write those within a quoted "
            "text twice."
        ) from error


_READERS = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}


def _no_list(name: str) -> PromptError:
    return PromptError(
        f"{name} is not a list of prompts: give a .jsonl, .json or .csv file with the columns text and harmful."
    )


def _parse(name: str, number: int, text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptError(f"{name}, line {number + error.lineno - 1}: not JSON ({error.msg}).") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested lists
        raise PromptError(f"{name}, line {number}: JSON that is no list of prompts ({error}).") from error


def _prompt(where: str, row: object, classes: tuple[str, str], given: bool | None) -> Prompt:
    if not isinstance(row, Mapping):
        raise PromptError(f"{where}: no text. Every row needs the columns text and harmful.")
    wanted = ["text"] if given is not None else ["text", "label" if "label" in row else "harmful"]
    if absent := [column for column in wanted if column not in row]:
        there = _few([str(column) for column in row if column]) or "without a name"
        are, them = ("is", "it") if len(absent) == 1 else ("are", "them")
        raise PromptError(
            f"{where}: the columns are {there}, and {' and '.join(absent)} {are} not among them: rename or add {them}."
        )
    _check_cells(where, row)
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise PromptError(f"{where}: no text. Every row needs the columns text and harmful.")
    text = _text(where, row["text"])
    column, names = ("label", classes) if row.get("harmful") is None and "label" in row else ("harmful", None)
    said = str(row.get(column)).strip().lower()
    known = {"true": True, "1": True, "false": False, "0": False}
    written = known.get(said) if names is None else {n.lower(): n == names[0] for n in names}.get(said)
    harmful = written if given is None else given
    if harmful is None:
        raise PromptError(
            f"{where}: {column} is {said[:40]!r}; write {' or '.join(names) if names else 'true or false'}."
        )
    split = str(row.get("split") or "")
    if split and split not in SHARES:
        raise PromptError(f"{where}: split is {split[:40]!r}; write train, val or test, or leave the column out.")
    return Prompt(text, harmful, str(row.get("category") or ""), split, where)


def _check_cells(where: str, row: Mapping[Any, Any]) -> None:
    """Raises PromptError for cells without a column: a comma in a text would cut the rest of it off unseen."""
    if any(str(cell).strip() for cell in row.get(None) or ()):  # where `csv.DictReader` puts them
        n = len(row) - 1
        raise PromptError(
            f"{where}: it has {n + len(row[None])} cells, and the table has {n} column{'s' if n > 1 else ''}: put a text "
            "with commas into quotes."
        )


def _text(where: str, text: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise PromptError(f"{where}: {len(text):,} characters; a prompt has at most {MAX_CHARACTERS:,}.")
    if re.search("[\0\ud800-\udfff]", text):
        raise PromptError(f"{where}: it has characters that are no text; save the list as UTF-8 text.")
    return text.strip()


def _assign_splits(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    assigned: list[Prompt] = []
    for harmful in (True, False):
        mine = [p for p in prompts if p.harmful == harmful]
        if any(p.split for p in mine):
            for prompt in mine:
                if not prompt.split:
                    raise PromptError(
                        f"{prompt.where or prompt.text[:40]}: it names no split, and other prompts of its class do: write "
                        "train, val or test in every row, or leave the column out."
                    )
            assigned += mine
            continue
        random.Random(seed).shuffle(mine)
        train, val = (round(len(mine) * share) for share in (SHARES["train"], SHARES["train"] + SHARES["val"]))
        for split, part in (("train", mine[:train]), ("val", mine[train:val]), ("test", mine[val:])):
            assigned += [replace(p, split=split) for p in part]
    return assigned
