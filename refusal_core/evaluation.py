"""What a direction does to a model, measured: whole replies that are judged, and first tokens by strength.

    refused, answered, unclear    of the greedy replies to n prompts, each share with a Wilson interval
    KL                            of the first token's distribution against the unchanged model: the damage
    p(s)                          Σ over refusal tokens t of softmax(logits)[t], the direction at strength s

The paper's experiment is harmful prompts unchanged, with the direction removed, and with it subtracted; and harmless
prompts unchanged and with it added (Arditi et al. 2024, §3). "Did not refuse" and "answered" are two numbers.

In a curve p(s), removal edits everything that is written to the stream, so each strength is a row through all blocks;
addition leaves the blocks below its layer as they are: its rows restart from one untouched run there.
"""

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from refusal_core.chat_model import ChatModel, Conversation
from refusal_core.directions import Direction, random_like
from refusal_core.generation import Ending, stream_side_by_side
from refusal_core.interventions import Intervention, Kind, Row
from refusal_core.metrics import Rules, judge, kl_divergence, refusal_probability, wilson
from refusal_core.prompts import PromptError, PromptSet
from refusal_core.selection import Progress

REMOVALS = tuple(i / 10 for i in range(11))
ADDITIONS = (-1.0, -0.8, -0.6, -0.4, -0.2, *REMOVALS, 1.2, 1.4, 1.6, 1.8, 2.0)
"""The strengths of a curve: 11 and 21, finer where replies tend to flip; 0 and 1 are among them."""

Replies = dict[int, tuple[str, Ending]]
"""Some of the replies to a list of prompts, by index, with their endings."""

MAX_TOKENS = 4096
BATCH = 48
"""How many tokens a forward step of a curve has, and how many replies grow at once."""


# -- whole replies ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Completion:
    """The greedy reply to a prompt under row number `row`, how it ended, and what the judge says of it."""

    prompt: str
    harmful: bool
    row: int
    text: str
    ending: Ending
    verdict: str
    because: str


@dataclass(frozen=True)
class Rates:
    """One row of interventions on one class of prompts; `kl` in nats, the mean against the unchanged model, if known."""

    row: str
    harmful: bool
    n: int
    refused: int
    unclear: int
    kl: float | None

    @property
    def answered(self) -> int:
        """Neither refused nor unclear."""
        return self.n - self.refused - self.unclear


@dataclass(frozen=True)
class Report:
    """What an evaluation found, with everything it was made from."""

    model: str
    fingerprint: str
    revision: str | None
    prompts: str
    rules: Rules
    max_new_tokens: int
    rates: tuple[Rates, ...]
    completions: tuple[Completion, ...]

    def as_markdown(self) -> str:
        """The table: shares with their 95 % Wilson intervals."""
        lines = ["| prompts | model | n | refused | answered | unclear | KL (nats) |", "|---|---|---|---|---|---|---|"]
        for r in self.rates:
            cls = "harmful" if r.harmful else "harmless"
            shares = " | ".join(_share(k, r.n) for k in (r.refused, r.answered, r.unclear))
            kl = "–" if r.kl is None else f"{r.kl:.3f}"
            lines.append(f"| {cls} | {r.row} | {r.n} | {shares} | {kl} |")
        return "\n".join(lines)

    def as_json(self) -> str:
        """Everything, completions included."""
        return json.dumps(asdict(self), indent=1)


def _share(k: int, n: int) -> str:
    low, high = wilson(k, n)
    return f"{k / n:.1%} ({low:.1%} to {high:.1%})" if n else "–"


def paper_rows(direction: Direction) -> tuple[Row, ...]:
    """The settings of the paper: unchanged, removed, subtracted at the layer it was read from, and added there."""
    edits = Intervention(direction, "ablate"), Intervention(direction, "add", -1.0), Intervention(direction, "add")
    return ((), *((edit,) for edit in edits))


def name_of(row: Row) -> str:
    """What a row does, in words: “direction removed”, “direction added −1×”."""
    said = []
    for i in row:
        what = "removed" if i.kind == "ablate" else "added"
        strength = f" {i.scale:g}×".replace("-", "−") if i.kind == "add" or i.scale != 1 else ""
        said.append(f"{i.direction.source.control or 'direction'} {what}{strength}")
    return ", ".join(said) or "unchanged"


def complete(
    model: ChatModel,
    texts: Sequence[str],
    rows: Sequence[Row | Intervention | None],
    *,
    max_new_tokens: int,
    stop: threading.Event | None = None,
) -> Iterator[Replies]:
    """The greedy replies to `texts`, a row of interventions each: a batch at a time, by index, with their endings.

    Ends early, without the replies of the batch in hand, when `stop` is set.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    for start in range(0, len(order), BATCH):
        now = order[start : start + BATCH]
        steps = stream_side_by_side(
            model, [texts[i] for i in now], [rows[i] for i in now], max_new_tokens=max_new_tokens, stop=stop
        )
        last = next(iter(deque(steps, maxlen=1)), None)
        if last is None or "stopped" in last.finished:
            return
        yield {i: (text, ending or "length") for i, text, ending in zip(now, last.texts, last.finished, strict=True)}


def evaluate(
    model: ChatModel,
    prompts: PromptSet,
    rows: Sequence[Row | Intervention | None],
    *,
    rules: Rules = "paper",
    max_new_tokens: int = 64,
    resume: str | Path | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Progress | Report]:
    """Completes every prompt under every row, judges the replies; yields `Progress` and, last, the `Report`.

    `resume` names a file in which finished replies are kept line by line: a run that was ended there, however, goes on
    with what is missing. `stop` ends the iteration early. Raises ModelError and PromptError as `ChatModel.begin` does,
    and PromptError for a `resume` file that is something else.
    """
    checked = model.check_rows(rows, len(rows))

    def replies_to(texts: Sequence[str], numbers: Sequence[int]) -> Iterator[Replies]:
        edits = [checked[number] for number in numbers]
        return complete(model, texts, edits, max_new_tokens=max_new_tokens, stop=stop)

    marks = [_mark(model, row, max_new_tokens) for row in checked]
    for news in judged_replies(prompts, marks, replies_to, rules=rules, resume=resume):
        if isinstance(news, Progress):
            yield news
            continue
        yield Report(
            model=model.name,
            fingerprint=model.fingerprint,
            revision=model.revision,
            prompts=prompts.source,
            rules=rules,
            max_new_tokens=max_new_tokens,
            rates=tuple(_rates(model, prompts, checked, news)),
            completions=news,
        )


def judged_replies(
    prompts: PromptSet,
    marks: Sequence[str],
    complete: Callable[[Sequence[str], Sequence[int]], Iterator[Replies]],
    *,
    rules: Rules,
    resume: str | Path | None,
) -> Iterator[Progress | tuple[Completion, ...]]:
    """Yields `Progress` and, last, the judged reply to every prompt under every row; a row by its number has its mark.

    `complete` gives the replies to texts, each under the row of that number; the iteration ends early if it does. A mark
    names what replies are made with; by it those in the file `resume` are known again.
    """
    asked = [(text, True) for text in prompts.harmful] + [(text, False) for text in prompts.harmless]
    jobs = [(text, harmful, row) for row in range(len(marks)) for text, harmful in asked]
    journal = _Journal(Path(resume) if resume else None)
    missing = [job for job in jobs if (marks[job[2]], job[0]) not in journal.replies]
    done, total = len(jobs) - len(missing), len(jobs)
    yield Progress("completing prompts", done, total)
    texts = [text for text, _, _ in missing]
    for replies in complete(texts, [row for _, _, row in missing]):
        for i, reply in replies.items():
            journal.add(marks[missing[i][2]], texts[i], *reply)
        journal.flush()
        done += len(replies)
        yield Progress("completing prompts", done, total)
    if done == total:
        yield tuple(_judged(job, *journal.replies[marks[job[2]], job[0]], rules) for job in jobs)


def _judged(job: tuple[str, bool, int], text: str, ending: Ending, rules: Rules) -> Completion:
    verdict = judge(text, rules)
    return Completion(*job, text, ending, verdict.label, verdict.phrase or verdict.reason)


def _rates(
    model: ChatModel, prompts: PromptSet, rows: Sequence[Row], completions: Sequence[Completion]
) -> Iterator[Rates]:
    for harmful, texts in ((True, prompts.harmful), (False, prompts.harmless)):
        base = model.logits(texts)
        for number, row in enumerate(rows):
            kl = kl_divergence(base, model.logits(texts, [row] * len(texts))).mean().item() if row and texts else 0.0
            yield tally(name_of(row), number, harmful, completions, kl)


def tally(name: str, row: int, harmful: bool, completions: Sequence[Completion], kl: float | None) -> Rates:
    """The rates of the completions of one row and class."""
    mine = [c for c in completions if c.row == row and c.harmful == harmful]
    refused, unclear = (sum(c.verdict == verdict for c in mine) for verdict in ("refused", "unclear"))
    return Rates(name, harmful, len(mine), refused, unclear, kl)


def _mark(model: ChatModel, row: Row, max_new_tokens: int) -> str:
    """Names what a reply was made with, so that a journal never passes off one setting's reply as another's."""
    digest = hashlib.sha256(f"{model.fingerprint} {model.dtype} {max_new_tokens}".encode())
    for i in row:
        digest.update(f"{i.kind} {i.scale!r} {i.direction.norm!r} {i.direction.source.layer}".encode())
        digest.update(i.direction.unit.numpy().tobytes())
    return digest.hexdigest()[:16]


class _Journal:
    """Replies by setting and prompt, kept in a file of JSON lines if there is one."""

    def __init__(self, path: Path | None) -> None:
        self.replies: dict[tuple[str, str], tuple[str, Ending]] = {}
        self._path, self._new = path, []
        if path is None or not path.exists():
            return
        # The last line may have been cut off by whatever ended the run: it is made anew.
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        try:
            lines: list[Any] = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        except ValueError:
            lines = [None]
        is_journal = all(isinstance(x, list) and len(x) == 4 and all(isinstance(y, str) for y in x) for x in lines)
        if not is_journal or not (rest.startswith(b'["') or rest in (b"", b"[")):
            raise PromptError(f"{path.name} is not the journal of an evaluation: name a new file.")
        self.replies = {(mark, prompt): (text, cast(Ending, ending)) for mark, prompt, text, ending in lines}
        if rest:
            path.write_bytes(whole + b"\n" if whole else b"")

    def add(self, mark: str, prompt: str, text: str, ending: Ending) -> None:
        self.replies[mark, prompt] = text, ending
        self._new.append(json.dumps([mark, prompt, text, ending]) + "\n")

    def flush(self) -> None:
        """Brings what was added onto the disk."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(self._new)
                file.flush()
                os.fsync(file.fileno())
        self._new = []


# -- first tokens by strength ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DoseResponse:
    """One conversation at each strength, in rising order.

    `refusal` is the probability that the reply starts like a refusal, `kl` that of its first token's distribution
    against the untouched model's, in nats.
    """

    kind: Kind
    scales: tuple[float, ...]
    refusal: tuple[float, ...]
    kl: tuple[float, ...] = ()

    @property
    def flips_at(self) -> float | None:
        """The strength nearest to 0 at which the probability crosses one half, by linear interpolation."""
        crossings = []
        for (s, p), (t, q) in pairwise(zip(self.scales, self.refusal, strict=True)):
            if (p < 0.5) != (q < 0.5):
                crossings.append(s + (0.5 - p) / (q - p) * (t - s))
        return min(crossings, key=abs, default=None)


def dose_response(
    model: ChatModel,
    conversation: Conversation,
    direction: Direction,
    kind: Kind,
    refusal_tokens: Sequence[int],
    scales: Sequence[float] | None = None,
    writers: frozenset[str] | None = None,
) -> DoseResponse:
    """The curve of one conversation at `scales`, by default `REMOVALS` or `ADDITIONS`.

    `writers` confines an ablation as in `Intervention`. Raises PromptError and ModelError as `ChatModel.logits` does.
    """
    scales = tuple(scales) if scales is not None else REMOVALS if kind == "ablate" else ADDITIONS
    (prompt,) = model.batches([conversation])
    layer = direction.source.layer
    start = None
    if kind == "add":
        resid_pre = model.run(prompt, read=slice(None), read_layers=[layer]).resid_pre
        assert resid_pre is not None
        start = resid_pre[:, :, 0]
    rows = [(), *((Intervention(direction, kind, scale, writers),) for scale in scales)]
    at_a_time = max(1, MAX_TOKENS // prompt.ids.numel())
    parts: list[Tensor] = []
    for i in range(0, len(rows), at_a_time):
        chunk = rows[i : i + at_a_time]
        restart = None if start is None else (layer, start.repeat(len(chunk), 1, 1))
        parts.append(model.run(prompt.repeat(len(chunk)), chunk, start=restart).logits)
    untouched, logits = torch.cat(parts).split([1, len(scales)])
    refusal = refusal_probability(logits, refusal_tokens).tolist()
    kl = kl_divergence(untouched.expand_as(logits), logits).tolist()
    return DoseResponse(kind, scales, tuple(refusal), tuple(kl))


@dataclass(frozen=True)
class DoseCurve:
    """Means over `n` prompts at each strength, of the direction and of random directions of its norm, the control.

    The rows of `random_refusal` and `random_kl` belong to one random direction each.
    """

    kind: Kind
    harmful: bool
    n: int
    scales: tuple[float, ...]
    refusal: tuple[float, ...]
    kl: tuple[float, ...]
    random_refusal: tuple[tuple[float, ...], ...]
    random_kl: tuple[tuple[float, ...], ...]


def dose_curve(
    model: ChatModel,
    texts: Sequence[str],
    direction: Direction,
    kind: Kind,
    refusal_tokens: Sequence[int],
    *,
    harmful: bool,
    n_random: int = 5,
    stop: threading.Event | None = None,
) -> Iterator[Progress | DoseCurve]:
    """The mean curve of some prompts, with that of `n_random` random directions; yields `Progress` and the curve.

    Ends early when `stop` is set. Raises PromptError and ModelError as `dose_response` does.
    """
    directions = [direction, *(random_like(direction, seed) for seed in range(n_random))]
    means: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
    scales: tuple[float, ...] = ()
    for number, each in enumerate(directions):
        curves: list[DoseResponse] = []
        for text in texts:
            if stop is not None and stop.is_set():
                return
            curves.append(dose_response(model, text, each, kind, refusal_tokens))
            yield Progress("strengths", number * len(texts) + len(curves), len(directions) * len(texts))
        scales = curves[0].scales
        refusals, kls = ([curve.refusal for curve in curves], [curve.kl for curve in curves])
        means.append((_mean(refusals), _mean(kls)))
    (refusal, kl), *rest = means
    yield DoseCurve(
        kind, harmful, len(texts), scales, refusal, kl, tuple(r for r, _ in rest), tuple(k for _, k in rest)
    )


def _mean(curves: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(values) / len(values) for values in zip(*curves, strict=True))
