"""What a search found, kept on the disk: one folder of safetensors and JSON, for others to read and for a second start.

    direction.safetensors      the chosen direction, as everywhere
    activations.safetensors    the differences of means, and the residual streams they were made from
    found.json                 every candidate with its scores, the choice, the refusal tokens, the prompts

The cache has such a folder per search, named by everything that the result is made from: the weights, what the model
reads of each prompt, and the code. A changed template, prompt, seed or line of code is another search. What a search has
measured so far stands beside it in a file of lines, so that one that was interrupted, or killed, goes on where it was.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError

from refusal_core.chat_model import ChatModel
from refusal_core.checkpoints import remove_left_behind
from refusal_core.directions import Direction, DirectionError
from refusal_core.metrics import finite
from refusal_core.prompts import CLASSES, PromptSet
from refusal_core.selection import (
    N_TRAIN,
    N_VAL,
    By,
    CandidateScore,
    Choice,
    Found,
    Progress,
    Rule,
    SumKey,
    Sums,
    choose,
    choose_contrast,
    choose_cosmic,
    find_direction,
    read_at_most,
)

CACHE_VARIABLE = "REFUSAL_CACHE"
CACHE_BYTES = 2_000_000_000
"""The cache holds at most so much: what was used longest ago makes room."""

UNWRITTEN = (OSError, SafetensorError)
"""What writing a search raises where there is no room for it, or no permission."""

BROKEN = (
    OSError, SafetensorError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError,
)  # fmt: skip
"""What reading a search raises where its files are cut off, or are whole and hold something else."""

BEGUN = ".begun.jsonl"
MOST_BEGUN = 16
"""So many searches that were not finished are kept, those begun last."""

_ENTRY = re.compile("[0-9a-f]{32}")
"""What an entry of the cache is called: whatever else is in that folder is not this program's to remove."""

FILES = ("direction.safetensors", "activations.safetensors", "found.json")
"""Of a search; without the last it is none."""

ACTIVATIONS = ("directions", "harmful", "harmless", "val_harmful", "val_harmless")


def cache_folder() -> Path:
    """Where searches are kept: the folder in REFUSAL_CACHE, or the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else platformdirs.user_cache_path("refusal-direction-explorer")


def find_or_recall(
    model: ChatModel,
    prompts: PromptSet,
    validation: PromptSet,
    *,
    by: By | None = None,
    refusal_tokens: Sequence[int] | None = None,
    n_positions: int | None = None,
    complete: bool = False,
    seed: int = 0,
    stop: threading.Event | None = None,
) -> Iterator[Progress | Found]:
    """As `find_direction`, but at once if the same search was made before; a new result is kept.

    A complete table, of which the choice is the same, is what is kept of both.
    """
    drawn = prompts.draw(N_TRAIN, seed), validation.draw(N_VAL, seed)
    read_at = read_at_most(model, n_positions)
    needed, whole = (cache_folder() / key for key in _keys(model, *drawn, by, refusal_tokens, read_at))
    for folder in [whole] if complete else [needed, whole]:
        with contextlib.suppress(DirectionError):
            found = load_found(folder)
            with contextlib.suppress(OSError):  # a cache that can only be read forgets what was used longest ago
                os.utime(folder)
            yield found
            return
    folder = whole if complete else needed
    sums = _KeptSums(folder.with_name(folder.name + BEGUN))
    how: dict[str, Any] = {"by": by, "refusal_tokens": refusal_tokens, "n_positions": read_at, "seed": seed}
    for event in find_direction(model, prompts, validation, **how, complete=complete, stop=stop, sums=sums):
        if isinstance(event, Found):
            with contextlib.suppress(*UNWRITTEN):  # a full or read-only disk costs the second start, not this result
                _keep(event, folder)
                if complete:
                    shutil.rmtree(needed, ignore_errors=True)
            sums.remove()
        yield event


def save_found(found: Found, folder: Path) -> None:
    """Writes what was found into `folder`, which is made if it is not there.

    Whoever is interrupted leaves what was there before, or no finished search: never the files of two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_left_behind(folder, r"\.new-(\d+)-\w+")
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".new-{os.getpid()}-") as name:
        made = Path(name)
        found.direction.save(made / FILES[0])
        tensors = {name: getattr(found, name).contiguous() for name in ACTIVATIONS}
        safetensors.torch.save_file(tensors, made / FILES[1])
        (made / FILES[2]).write_text(json.dumps(as_json(found), indent=1, allow_nan=False) + "\n", "utf-8")
        (folder / FILES[2]).unlink(missing_ok=True)
        for file in FILES:
            (made / file).replace(folder / file)


def as_json(found: Found) -> dict[str, Any]:
    """What was found, without its activations, as JSON has it: scores that are not a number are null, and it says so."""
    said = {
        "source": asdict(found.direction.source),
        "norm": found.direction.norm,
        "chosen": _cell(found.choice.chosen),
        "runner_up": _cell(found.choice.runner_up),
        "margin": found.choice.margin,
        "relaxed": found.choice.relaxed,
        "funnel": funnel(found.choice, len(found.scores)),
        "candidates": [_candidate(s, found.choice.rejected.get(s)) for s in found.scores],
        "refusal_tokens": list(found.refusal_tokens),
        "refusal_shares": list(found.refusal_shares),
        "positions": list(found.positions),
        "prompts": asdict(found.prompts),
        "validation": asdict(found.validation),
        "counts": [[*key, *kept] for key, kept in found.counts.items()],
    }
    return finite(said)


def _candidate(score: CandidateScore, rejected: Rule | None) -> dict[str, Any]:
    return asdict(score) | ({"decided": "nan"} if rejected == "nan" else {}) | {"rejected": rejected}


def load_found(folder: Path) -> Found:
    """What `save_found` wrote; raises DirectionError if it is not there or broken."""
    try:
        said = json.loads((folder / FILES[2]).read_text("utf-8"))
        tensors = safetensors.torch.load_file(folder / FILES[1])
        scores = tuple(
            CandidateScore(**{k: v for k, v in row.items() if k != "rejected"}) for row in said["candidates"]
        )
        direction = Direction.load(folder / FILES[0])
        _check(said, tensors, scores, direction)
        source = direction.source
        by = choose_contrast if source.contrast else choose_cosmic if source.chosen_by else choose
        return Found(
            direction=direction,
            choice=by(scores, tensors["directions"].shape[1]),
            scores=scores,
            refusal_tokens=tuple(said["refusal_tokens"]),
            refusal_shares=tuple(said["refusal_shares"]),
            positions=tuple(said["positions"]),
            prompts=_prompts(said["prompts"]),
            validation=_prompts(said["validation"]),
            counts={(split, cls): (kept, of) for split, cls, kept, of in said["counts"]},
            **{name: tensors[name] for name in ACTIVATIONS},
        )
    except BROKEN as error:
        raise DirectionError(f"{folder} does not hold a finished search ({error}).") from error


def funnel(choice: Choice, n_candidates: int) -> dict[str, int]:
    """How many candidates there are, how many each rule discarded, and how many are left."""
    rules = ("zero", "layer", "late", "induce", "kl", "nan")
    by_rule = {rule: list(choice.rejected.values()).count(rule) for rule in rules}
    return {"candidates": n_candidates, **by_rule, "left": n_candidates - sum(by_rule.values())}


def _cell(score: CandidateScore | None) -> dict[str, int] | None:
    return None if score is None else {"pos": score.pos, "layer": score.layer}


def _check(
    said: dict[str, Any], tensors: dict[str, torch.Tensor], scores: Sequence[CandidateScore], direction: Direction
) -> None:
    """Raises ValueError where the parts of a search do not fit together, which nothing else would notice until later."""
    (n_pos, n_layers, _), d_model = tensors["directions"].shape, len(direction.unit)
    if tensors["directions"].shape[2] != d_model or not all(tensors[name].is_floating_point() for name in ACTIVATIONS):
        raise ValueError("its differences of means are not of the width of its direction")
    for name in ACTIVATIONS[1:]:
        if tensors[name].shape[1:] != (n_pos + 1, n_layers, d_model):
            raise ValueError(f"the activations “{name}” have the shape {tuple(tensors[name].shape)}")
    if [(s.pos, s.layer) for s in scores] != [(pos, layer) for pos in range(-n_pos, 0) for layer in range(n_layers)]:
        raise ValueError("its candidates are not those of its differences of means")
    read_at = direction.source.position, direction.source.layer
    if read_at not in {(s.pos, s.layer) for s in scores} or not torch.allclose(
        tensors["directions"][read_at].float(), (direction.norm * direction.unit).float(), rtol=1e-3, atol=1e-4
    ):
        raise ValueError("its direction is not one of its differences of means")
    if said["positions"] != list(range(-n_pos - 1, 0)):
        raise ValueError(f"its positions are {said['positions']}")
    texts = [said[name][cls] for name in ("prompts", "validation") for cls in CLASSES]
    if not all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in texts):
        raise ValueError("its prompts are no lists of texts")
    if not all(type(token) is int for token in said["refusal_tokens"]):
        raise ValueError("its refusal tokens are no numbers of tokens")
    if not all(isinstance(share, float | int) for share in said["refusal_shares"]):
        raise ValueError("its shares of the refusal tokens are no numbers")
    if not all(type(number) is int for *_, kept, of in said["counts"] for number in (kept, of)):
        raise ValueError("its counts of prompts are no numbers")
    if [len(each) for each in texts] != [len(tensors[name]) for name in ACTIVATIONS[1:]]:
        raise ValueError("its activations are not those of its prompts")


def _prompts(said: dict[str, Any]) -> PromptSet:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    return PromptSet(**fields)


# -- the cache -------------------------------------------------------------------------------------------------------


def _keys(
    model: ChatModel, train: PromptSet, val: PromptSet, by: By | None, tokens: Sequence[int] | None, n_positions: int
) -> tuple[str, str]:
    """The names of a search, and of the same with a complete table."""
    read = [[model.render(text) for text in texts] for s in (train, val) for texts in (s.harmful, s.harmless)]
    made_from = [
        _code_version(), model.name, model.revision, model.fingerprint, model.precision, model.device.type,
        train.source, by, [*map(int, tokens or ())], n_positions, read,
    ]  # fmt: skip
    needed, whole = (hashlib.sha256(json.dumps([*made_from, complete]).encode()) for complete in (False, True))
    return needed.hexdigest()[:32], whole.hexdigest()[:32]


class _KeptSums(Sums):
    """They stand in a file as soon as they are known, and are only remembered where none can be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = ""
        with contextlib.suppress(OSError, ValueError):
            lines = path.read_text("utf-8")
        for line in lines.splitlines():
            with contextlib.suppress(ValueError, TypeError):  # a line that a killed process was writing
                score, number, pos, layer, value = json.loads(line)
                self[str(score), int(number), int(pos), int(layer)] = float(value)

    def note(self, measured: dict[SumKey, float]) -> None:
        super().note(measured)
        with contextlib.suppress(OSError):
            if not self._path.exists():
                self._make_room()
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps([*key, value]) + "\n" for key, value in measured.items()))

    def remove(self) -> None:
        """Forgets what is now part of a finished search."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _make_room(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        begun = sorted(self._path.parent.glob(f"*{BEGUN}"), key=lambda path: path.stat().st_mtime)
        for path in begun[: 1 - MOST_BEGUN]:
            path.unlink(missing_ok=True)


@cache
def _code_version() -> str:
    """Names the code that a search runs: this package's own modules, and the libraries that compute."""
    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _keep(found: Found, folder: Path) -> None:
    """Puts what was found into the cache, whole or not at all, and makes room."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_left_behind(folder.parent, r"\.new-(\d+)-\w+")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".new-{os.getpid()}-") as made:
        save_found(found, Path(made) / "found")
        shutil.rmtree(folder, ignore_errors=True)
        (Path(made) / "found").rename(folder)
    kept = sorted(
        (path for path in folder.parent.iterdir() if _ENTRY.fullmatch(path.name)), key=lambda p: p.stat().st_mtime
    )
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in kept}
    for path in kept[:-1]:
        if sum(sizes.values()) > CACHE_BYTES:
            shutil.rmtree(path, ignore_errors=True)
            del sizes[path]
