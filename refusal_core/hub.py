"""The Hugging Face hub: its public lists of prompts, files at one commit, and what it says in one sentence.

    jailbreakbench                                    a name: these lists, at the commit that stands below
    hub:owner/name@revision/file#column&label=value   a column of any data set, of the rows whose `label` is `value`

A revision may be left out, and so may the condition; what is odd in a column's name is written as in an address (%23 for
a hash). A name without harmless prompts is set against those of Alpaca.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors

MOST_BYTES = 100_000_000
"""A list of prompts is at most so large: what is larger is no list of prompts."""

PREFIX = "hub:"
ADDRESS = re.compile(
    r"hub:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?/(?P<file>[^#]+)#(?P<column>[^&=]+)(&(?P<label>[^&=]+)=(?P<value>[^&=]*))?"
)
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubList:
    """A column of a file in a data set, of all rows or of those whose column `label` says `value`.

    `category` names the column with each prompt's category, if there is one.
    """

    repo: str
    file: str
    column: str
    revision: str | None = None
    label: str | None = None
    value: str = ""
    category: str | None = None

    @property
    def address(self) -> str:
        """What `read_address` reads."""
        at = f"@{self.revision}" if self.revision else ""
        only = f"&{_quoted(self.label)}={_quoted(self.value)}" if self.label else ""
        return f"{PREFIX}{self.repo}{at}/{quote(self.file)}#{_quoted(self.column)}{only}"


_JAILBREAKBENCH = ("JailbreakBench/JBB-Behaviors", "d8d87b8fdcb7806e3b4e45fffb2bc24aa6b17f32")
_ADVBENCH = ("mlabonne/harmful_behaviors", "01cead01398926d81f7c52bdb790ee8cf77ebba7")
_HARMBENCH = ("walledai/HarmBench", "f034bb61be0f0e3a7761111a0741d6c29ebfbdab")
_ALPACA = ("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017")


def _jailbreakbench(file: str) -> HubList:
    return HubList(_JAILBREAKBENCH[0], f"data/{file}-behaviors.csv", "Goal", _JAILBREAKBENCH[1], category="Category")


def _advbench(part: str) -> HubList:
    return HubList(_ADVBENCH[0], f"data/{part}-00000-of-00001.parquet", "text", _ADVBENCH[1])


HARMFUL: dict[str, tuple[HubList, ...]] = {
    "jailbreakbench": (_jailbreakbench("harmful"),),
    "advbench": (_advbench("train"), _advbench("test")),
    "harmbench": (HubList(_HARMBENCH[0], "standard/train-00000-of-00001.parquet", "prompt", _HARMBENCH[1], category="category"),),
}  # fmt: skip
HARMLESS: dict[str, tuple[HubList, ...]] = {
    "jailbreakbench": (_jailbreakbench("benign"),),
    "alpaca": (HubList(_ALPACA[0], "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "instruction", _ALPACA[1], "input"),),
}  # fmt: skip
"""By name; each name's lists are of one data set."""

NAMES = tuple(dict.fromkeys((*HARMFUL, *HARMLESS)))


def read_address(text: str) -> HubList | None:
    """The list at an address of the form above; None for anything else."""
    read = ADDRESS.fullmatch(text)
    if read is None or ".." in unquote(read["file"]).split("/"):
        return None
    label = unquote(read["label"]) if read["label"] else None
    file, column, value = (unquote(read[name] or "") for name in ("file", "column", "value"))
    return HubList(read["repo"], file, column, read["revision"], label, value)


def at_commit(part: HubList, error: type[ValueError]) -> HubList:
    """The same list at the commit that its revision is now; asks the hub if it is not one. Raises `error` as `fetch`."""
    if part.revision and COMMIT.fullmatch(part.revision):
        return part
    with answers(part.repo, part.revision, error, "data set"):
        found = huggingface_hub.resolve_revision(part.repo, repo_type="dataset", revision=part.revision)
    return replace(part, revision=found.resolved)


def fetch(part: HubList, error: type[ValueError]) -> Path:
    """The list's file, from this machine if it has been fetched before.

    Raises `error` if the hub cannot be reached, does not have the file or does not give it, and for one over 100 MB.
    """
    where = {"repo_id": part.repo, "filename": part.file, "repo_type": "dataset", "revision": part.revision}
    with answers(part.repo, part.revision, error, "data set"):
        try:
            size = huggingface_hub.hf_hub_download(**where, dry_run=True).file_size or 0
            if size > MOST_BYTES:
                raise error(
                    f"{part.file} of {part.repo} has {size / 1e6:,.0f} MB, and a list of prompts at most "
                    f"{MOST_BYTES / 1e6:,.0f}: take a smaller one."
                )
            return Path(huggingface_hub.hf_hub_download(**where))
        except hub_errors.RemoteEntryNotFoundError:
            there = huggingface_hub.list_repo_files(part.repo, repo_type="dataset", revision=part.revision)
            lists = [name for name in there if name.endswith((".csv", ".json", ".jsonl", ".parquet"))]
            raise error(
                f"{part.repo} has no file {part.file} at revision {part.revision}: take "
                f"{', '.join(lists[:8]) or 'another data set, for it has no lists'}."
            ) from None


UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
}
"""What the system says where a file cannot be written."""

INSTEAD = {"model": "give a local folder", "data set": "take the embedded prompts, or a file of your own"}
OPEN = {"model": "take one that needs none, such as Qwen/Qwen2.5-0.5B-Instruct", "data set": INSTEAD["data set"]}


@contextlib.contextmanager
def answers(name: str, revision: str | None, error: type[ValueError], what: str) -> Iterator[None]:
    """Turns what the hub, or its silence, says of a model or a data set into one sentence of an `error`."""
    page = f"https://huggingface.co/{'' if what == 'model' else 'datasets/'}{name}"
    try:
        yield
    except hub_errors.GatedRepoError as said:
        raise error(
            f"{name} needs its licence accepted at {page}, and a login (`hf auth login`); or {OPEN[what]}."
        ) from said
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError, hub_errors.HFValidationError) as said:
        raise error(f"The hub has no public {what} {name} (revision {revision or 'main'}): check the name.") from said
    except (hub_errors.RevisionResolutionError, httpx2.HTTPError, OSError) as said:
        if isinstance(said, OSError) and said.errno in UNWRITABLE:
            raise error(
                f"{name} cannot be kept in {constants.HF_HUB_CACHE} ({os.strerror(said.errno)}): make room there, or set "
                "HF_HUB_CACHE to another folder."
            ) from said
        raise error(
            f"{name} is not wholly on this machine and the hub cannot be reached: connect, or {INSTEAD[what]}."
        ) from said


def _quoted(text: str | None) -> str:
    return quote(text or "", safe=" ")
