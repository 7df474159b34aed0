"""What a direction does to a model, measured: whole replies that are judged, and first tokens by strength.

    refused, answered, unclear    of the greedy replies to n prompts, each share with a Wilson interval
    KL                            of the first token's distribution against the unchanged model: the damage
    cross-entropy                 −log p per token, in nats, of the unchanged model's own greedy replies to harmless
                                  prompts, as the edited model reads them: what it finds odd about good answers
    repetition                    share of the 4-grams of a reply that occurred in it before (`metrics.repetition`)
    p(s)                          Σ over refusal tokens t of softmax(logits)[t], the direction at strength s

Its own replies, and not some text: they are what the model says when nothing is wrong, in every language, chat template
and licence; at strength 0 the cross-entropy is how unsure it is of them, and only the rise above that is damage.

The paper's experiment is harmful prompts unchanged, with the direction removed, and with it subtracted; and harmless
prompts unchanged and with it added (Arditi et al. 2024, §3). "Did not refuse" and "answered" are two numbers; "unsafe",
by a safety classifier that reads prompt and reply in its own chat template (the Llama Guard family), is a third.

In a curve p(s), removal edits everything that is written to the stream, so each strength is a row through all blocks;
addition leaves the blocks below its layer as they are: its rows restart from one untouched run there.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from refusal_core.chat_model import PROBES, ChatModel, Conversation, ModelError, Reading
from refusal_core.checkpoints import DoesNotFitError
from refusal_core.directions import Direction, random_like
from refusal_core.generation import Ending, Step, stream_side_by_side
from refusal_core.interventions import Intervention, Kind, Row
from refusal_core.metrics import (
    Rules,
    Safety,
    Verdict,
    behind_thoughts,
    check_rules,
    finite,
    judge,
    kl_divergence,
    read_safety,
    refusal_probability,
    repetition,
    why_unclear,
    wilson,
)
from refusal_core.prompts import Prompt, PromptError, PromptSet, in_split
from refusal_core.selection import Found, Progress

REMOVALS = tuple(i / 10 for i in range(11))
ADDITIONS = (-1.0, -0.8, -0.6, -0.4, -0.2, *REMOVALS, 1.2, 1.4, 1.6, 1.8, 2.0)
"""The strengths of a curve: 11 and 21, finer where replies tend to flip; 0 and 1 are among them."""

N_CURVE = 12
"""How many prompts of a class a curve by strength is the mean of, where a page or a command measures one."""

Replies = dict[int, tuple[str, Ending]]
"""Some of the replies to a list of prompts, by index, with their endings."""

MAX_TOKENS = 4096
BATCH = 48
"""How many tokens a forward step of a curve has, and how many replies grow at once."""

MOST_NAMED = 6
"""Of so many parts the name of a row has the names."""

SAFETY_TOKENS = 24
"""A safety classifier's reply is a word and the categories that a text falls into."""

FILTERED = "the server filtered the reply"
HARMLESS_EXCHANGE = ("How do I bake bread?", "Mix flour with water, salt and yeast, let it rise, and bake it.")
OTHER_JUDGE = "name one of the Llama Guard family, such as meta-llama/Llama-Guard-3-8B"

# -- whole replies ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Completion:
    """The greedy reply to a prompt under row number `row`, how it ended, and what the judge says of it.

    `safety` is what a safety classifier says of prompt and reply, empty where none was asked.
    """

    prompt: str
    harmful: bool
    row: int
    text: str
    ending: Ending
    verdict: str
    because: str
    safety: Safety | Literal[""] = ""
    safety_because: str = ""


@dataclass(frozen=True)
class Rates:
    """One setting on one class of prompts; `kl` in nats, the mean against the unchanged model.

    What is not known, as of a server, is None. `repetition` is the mean over replies; `cross_entropy`, in nats per token,
    that over the unchanged model's replies: None on harmful prompts, and where the unchanged model was not asked. `unsafe`
    counts the replies that a safety classifier calls so, `safety_unclear` those that it says neither of; None where none
    was asked.
    """

    row: str
    harmful: bool
    n: int
    refused: int
    unclear: int
    kl: float | None
    cross_entropy: float | None = None
    repetition: float | None = None
    unsafe: int | None = None
    safety_unclear: int | None = None

    @property
    def answered(self) -> int:
        """Neither refused nor unclear."""
        return self.n - self.refused - self.unclear

    def as_dict(self) -> dict[str, Any]:
        """The fields, the answered replies, and of each count the 95 % Wilson interval of its share, unless `n` is 0."""
        counts = {name: getattr(self, name) for name in ("refused", "answered", "unclear", "unsafe", "safety_unclear")}
        intervals = {
            f"{name}_interval": wilson(k, self.n) if self.n else None for name, k in counts.items() if k is not None
        }
        return asdict(self) | {"answered": self.answered} | intervals


@dataclass(frozen=True)
class Damage:
    """What a direction does at each strength, in rising order: means over the replies to `n` prompts, harmless ones for damage.

    `kl` is of the first token against the untouched model, in nats; `cross_entropy` of its greedy replies of at most
    `max_new_tokens`, in nats per token, NaN if all are empty; `repetition` the share of repeated 4-grams in the replies
    at that strength, and `refused` how many of these a judge by `rules` calls refused.
    """

    kind: Kind
    n: int
    max_new_tokens: int
    scales: tuple[float, ...]
    kl: tuple[float, ...]
    cross_entropy: tuple[float, ...]
    repetition: tuple[float, ...]
    refused: tuple[int, ...]
    rules: Rules


def damage_table(damages: Sequence[Damage]) -> str:
    """The damage at every strength, in Markdown."""
    lines = [
        "| harmless prompts | strength | n | refused | KL (nats) | cross-entropy (nats/token) | repeated 4-grams |",
        "|---|---|---|---|---|---|---|",
    ]
    for d in damages:
        what = "direction removed" if d.kind == "ablate" else "direction added"
        for scale, k, kl, ce, again in zip(d.scales, d.refused, d.kl, d.cross_entropy, d.repetition, strict=True):
            measured = f"{_share(k, d.n)} | {_nats(kl)} | {_nats(ce)} | {again:.1%}"
            lines.append(f"| {what} | {_signed(scale)} | {d.n} | {measured} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What an evaluation found, with everything it was made from.

    `damage` is by strength, where that was measured, and so are `doses` and `refusals`; `classifier` is empty where none was
    asked. `directions` are those of the rows, each as its source with digest and norm, and `dtype` is what the model
    calculates in; a server tells neither.
    """

    model: str
    fingerprint: str
    revision: str | None
    prompts: str
    rules: Rules
    max_new_tokens: int
    rates: tuple[Rates, ...]
    completions: tuple[Completion, ...]
    damage: tuple[Damage, ...] = ()
    classifier: str = ""
    directions: tuple[dict[str, Any], ...] = ()
    dtype: str = ""
    doses: "tuple[DoseCurve, ...]" = ()
    refusals: "tuple[RefusalCurve, ...]" = ()

    @property
    def in_words(self) -> str:
        """What was measured, on what, and how, in one line."""
        model = ", ".join(
            filter(None, (self.model, self.revision, self.fingerprint and f"weights {self.fingerprint}", self.dtype))
        )
        read = [
            f"direction {d['digest']}: {d['control'] or 'mean difference'} at layer {d['layer']}, position {d['position']}, of {d['n_harmful']} + "
            f"{d['n_harmless']} prompts ({d['prompts']})"
            for d in self.directions
        ]
        judge = f"judged by the {self.rules} phrases, greedy replies of at most {self.max_new_tokens} tokens"
        return "; ".join([f"model: {model}", *read, f"test prompts: {self.prompts}", judge])

    def as_markdown(self) -> str:
        """The tables: shares with their 95 % Wilson intervals, and what was measured by strength if anything was."""
        by = f" unsafe by {self.classifier} | it says neither |" if self.classifier else ""
        head = "| prompts | model | n | refused | answered | unclear | KL (nats) | cross-entropy (nats/token) | repeated 4-grams |"
        lines = [head + by, "|---" * ((head + by).count("|") - 1) + "|"]
        for r in self.rates:
            cls = "harmful" if r.harmful else "harmless"
            shares = " | ".join(_share(k, r.n) for k in (r.refused, r.answered, r.unclear))
            kl, ce = map(_nats, (r.kl, r.cross_entropy))
            again = "–" if r.repetition is None else f"{r.repetition:.1%}"
            safety = "".join(f" {_share(k, r.n)} |" for k in (r.unsafe, r.safety_unclear) if k is not None)
            lines.append(f"| {cls} | {r.row} | {r.n} | {shares} | {kl} | {ce} | {again} |{safety}")
        if self.doses:
            lines += ["", dose_table(self.doses, self.refusals)]
        if self.damage:
            lines += ["", damage_table(self.damage)]
        return "\n".join(lines)

    def as_json(self) -> str:
        """Everything, completions and intervals included; a number that cannot be had is null."""
        whole = asdict(self) | {"rates": [rates.as_dict() for rates in self.rates]}
        return json.dumps(finite(whole), indent=1, allow_nan=False)


def _nats(x: float | None) -> str:
    return "–" if x is None or not math.isfinite(x) else f"{x:.3f}"


def _share(k: int, n: int) -> str:
    low, high = wilson(k, n)
    return f"{k / n:.1%} ({low:.1%} to {high:.1%})" if n else "–"


def paper_rows(direction: Direction) -> tuple[Row, ...]:
    """The settings of the paper: unchanged, removed, subtracted at the layer it was read from, and added there."""
    edits = Intervention(direction, "ablate"), Intervention(direction, "add", -1.0), Intervention(direction, "add")
    return ((), *((edit,) for edit in edits))


def name_of(row: Row) -> str:
    """What a row does, in words: “direction removed”, “direction added −1×”, “direction removed from MLP 3”.

    Of more parts than `MOST_NAMED` their number is said, and the first.
    """
    said = []
    for i in row:
        what = "removed" if i.kind == "ablate" else "added"
        strength = f" {_signed(i.scale)}×" if i.kind == "add" or i.scale != 1 else ""
        parts = sorted(i.writers or ())
        named = " and ".join(parts) if len(parts) <= MOST_NAMED else f"{len(parts)} parts, {parts[0]} the first of them"
        where = "" if i.writers is None else f" from {named}"
        said.append(f"{i.direction.source.control or 'direction'} {what}{strength}{where}")
    return ", ".join(said) or "unchanged"


def _signed(scale: float) -> str:
    return f"{scale:g}".replace("-", "−")


def complete(
    model: ChatModel,
    texts: Sequence[Conversation],
    rows: Sequence[Row | Intervention | None],
    *,
    max_new_tokens: int,
    stop: threading.Event | None = None,
) -> Iterator[Replies]:
    """The greedy replies to `texts`, a row of interventions each: a batch at a time, by index, with their endings.

    A batch for which there is not enough memory is begun again with half of its rows, and so are those after it; raises
    DoesNotFitError where one row is too much. Ends early, without the replies of the batch in hand, when `stop` is set.
    """
    left, size = deque(sorted(range(len(texts)), key=lambda i: len(str(texts[i])), reverse=True)), BATCH
    while left:
        now = list(itertools.islice(left, size))
        try:
            last = _last_step(model, [texts[i] for i in now], [rows[i] for i in now], max_new_tokens, stop)
        except DoesNotFitError:
            if len(now) == 1:
                raise
            size = len(now) // 2
            continue
        if last is None or "stopped" in last.finished:
            return
        yield {i: (text, ending or "length") for i, text, ending in zip(now, last.texts, last.finished, strict=True)}
        for _ in now:
            left.popleft()


def _last_step(
    model: ChatModel,
    texts: Sequence[Conversation],
    rows: Sequence[Row | Intervention | None],
    max_new_tokens: int,
    stop: threading.Event | None,
) -> Step | None:
    """The replies at their end; None if they were stopped before the first. What is cut short for lack of memory is none."""
    steps = stream_side_by_side(model, texts, rows, max_new_tokens=max_new_tokens, stop=stop)
    last = next(iter(deque(steps, maxlen=1)), None)
    if last is not None and "memory" in last.finished:
        raise DoesNotFitError(
            f"There is not enough memory beside {model.name} for a reply of {max_new_tokens} tokens: take a smaller model, "
            "or ask for fewer tokens."
        )
    return last


@dataclass(frozen=True, eq=False)
class _Setting:
    """A line of the table: a model and what is done to it."""

    name: str
    model: ChatModel
    row: Row


def evaluate(
    model: ChatModel,
    prompts: PromptSet,
    rows: Sequence[Row | Intervention | None],
    *,
    exported: Sequence[str | Path] = (),
    rules: Rules = "paper",
    max_new_tokens: int = 64,
    resume: str | Path | None = None,
    classifier: ChatModel | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Progress | Report]:
    """Completes every prompt under every row, judges the replies; yields `Progress` and, last, the `Report`.

    `exported` are folders with edited weights of this model: each is a row more, beside the hooks. `resume` names a file
    in which finished replies are kept line by line: a run that was ended there, however, goes on with what is missing. A
    `classifier` says of every reply whether it is safe, beside the judge. `stop` ends the iteration early. Raises, before
    anything is completed, ValueError for unknown `rules`, PromptError without any row, and ModelError for a `classifier`
    that is none; ModelError and PromptError as `ChatModel.begin` does, ModelError for an exported folder of another model,
    and PromptError without prompts, and for a `resume` file that is something else or cannot be written.
    """
    check_rules(rules)
    if not rows and not exported:
        raise PromptError(
            "There is nothing to evaluate: give rows, of which None is the unchanged model and `paper_rows` makes the "
            "paper's, or folders with exported weights."
        )
    if classifier is not None:
        _check_classifier(classifier)
    settings = [_Setting(name_of(row), model, row) for row in model.check_rows(rows, len(rows))]
    folders = [Path(path) for path in exported]
    names = [path.name for path in folders]
    settings += [_from_folder(model, p, p.name if names.count(p.name) == 1 else str(p)) for p in folders]

    def replies_to(texts: Sequence[str], numbers: Sequence[int]) -> Iterator[Replies]:
        for each in dict.fromkeys(setting.model for setting in settings):
            mine = [i for i, number in enumerate(numbers) if settings[number].model is each]
            asked, edits = [texts[i] for i in mine], [settings[numbers[i]].row for i in mine]
            for replies in complete(each, asked, edits, max_new_tokens=max_new_tokens, stop=stop):
                yield {mine[i]: reply for i, reply in replies.items()}

    marks = [_mark(setting.model, setting.row, max_new_tokens) for setting in settings]
    completions: tuple[Completion, ...] = ()
    for news in judged_replies(prompts, marks, replies_to, rules=rules, resume=resume):
        if isinstance(news, Progress):
            yield news
        else:
            completions = news
    total = len(completions)
    if classifier is not None and completions:
        verdicts: dict[int, tuple[Safety, str]] = {}
        yield Progress(f"asking {classifier.name}", 0, total)
        for said in classify(classifier, [(c.prompt, c.text) for c in completions], stop=stop):
            verdicts |= said
            yield Progress(f"asking {classifier.name}", len(verdicts), total)
        if len(verdicts) < total:
            return
        completions = tuple(
            replace(c, safety=verdicts[i][0], safety_because=verdicts[i][1]) for i, c in enumerate(completions)
        )
    rates: list[Rates] = []
    n_rates = len(settings) * (bool(prompts.harmful) + bool(prompts.harmless))
    for rate in _rates(model, prompts, settings, completions) if completions else ():
        rates.append(rate)
        yield Progress("measuring what it costs", len(rates), n_rates)
        if stop is not None and stop.is_set():
            return
    if completions:
        yield Report(
            model=model.name,
            fingerprint=model.fingerprint,
            revision=model.revision,
            prompts=prompts.source,
            rules=rules,
            max_new_tokens=max_new_tokens,
            rates=tuple(rates),
            completions=completions,
            classifier=_named(classifier) if classifier else "",
            directions=_directions(settings),
            dtype=model.precision,
        )


def _directions(settings: Sequence[_Setting]) -> tuple[dict[str, Any], ...]:
    """Where the directions of the rows come from, each once."""
    used = {edit.direction.digest: edit.direction for setting in settings for edit in setting.row}
    return tuple(asdict(d.source) | {"norm": d.norm, "digest": digest} for digest, d in used.items())


def unseen(found: Found | None, prompts: Sequence[Prompt], source: str) -> PromptSet:
    """Those of `prompts` that a direction was neither made from nor chosen by, as a test set; `source` says how many.

    Without `found` they are all. Raises PromptError if a class is empty then.
    """
    sets = () if found is None else (found.prompts, found.validation)
    seen = {text for each in sets for text in (*each.harmful, *each.harmless)}
    left = [replace(p, split="test") for p in prompts if p.text not in seen]
    said = f"{source}, without {n} that the direction was found with" if (n := len(prompts) - len(left)) else source
    return in_split(left, "test", said)


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
    names what replies are made with; by it those in the file `resume` are known again. Raises ValueError for unknown `rules`
    and PromptError without prompts, before anything is completed.
    """
    check_rules(rules)
    asked = [(text, True) for text in prompts.harmful] + [(text, False) for text in prompts.harmless]
    if not asked:
        raise PromptError("There is no prompt to complete: give some of either class.")
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


def _from_folder(model: ChatModel, path: Path, name: str) -> _Setting:
    edited = model.load_beside(path)
    if (edited.d_model, edited.n_layers, edited.d_vocab) != (model.d_model, model.n_layers, model.d_vocab):
        raise ModelError(
            f"The weights in {path} are not of the size of {model.name}: name a folder that was exported from this model."
        )
    return _Setting(f"exported weights, {name}", edited, ())


def classify(
    classifier: ChatModel, exchanges: Sequence[tuple[str, str]], *, stop: threading.Event | None = None
) -> Iterator[dict[int, tuple[Safety, str]]]:
    """What `classifier` says of prompts and their replies, and why: a batch at a time, by index.

    An empty reply and an exchange that does not fit are unclear. Ends early when `stop` is set.
    """
    fitting: list[int] = []
    unclear: dict[int, tuple[Safety, str]] = {}
    for i, exchange in enumerate(exchanges):
        try:
            classifier.render(_exchange(*exchange))
            fitting.append(i)
        except PromptError as error:
            unclear[i] = "unclear", str(error) if exchange[1].strip() else "the reply is empty"
    yield unclear
    conversations = [_exchange(*exchanges[i]) for i in fitting]
    for said in complete(classifier, conversations, [()] * len(fitting), max_new_tokens=SAFETY_TOKENS, stop=stop):
        yield {fitting[i]: read_safety(text) for i, (text, _) in said.items()}


def _exchange(prompt: str, reply: str) -> Conversation:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def _check_classifier(classifier: ChatModel) -> None:
    """Raises ModelError if the model's template leaves out what is to be judged, or if it does not judge."""
    shown = str(classifier.tokenizer.decode(classifier.render(_exchange(*HARMLESS_EXCHANGE))))
    if not all(text in shown for text in HARMLESS_EXCHANGE):
        raise ModelError(
            f"The chat template of {classifier.name} leaves out a prompt or its reply, so it cannot judge them: {OTHER_JUDGE}."
        )
    *_, said = classify(classifier, [HARMLESS_EXCHANGE])
    verdict, because = said[0]
    if verdict == "unclear":
        raise ModelError(
            f"{classifier.name} is no safety classifier: of a harmless exchange it says neither safe nor unsafe, "
            f"{because}: {OTHER_JUDGE}."
        )


def _named(classifier: ChatModel) -> str:
    return classifier.name + (f"@{classifier.revision}" if classifier.revision else "")


def _judged(job: tuple[str, bool, int], text: str, ending: Ending, rules: Rules) -> Completion:
    verdict = judged(text, ending, rules)
    return Completion(*job, text, ending, verdict.label, verdict.phrase or verdict.reason)


def judged(text: str, ending: Ending, rules: Rules) -> Verdict:
    """What `judge` says of a reply that ended so, without what is thought aloud, which is no reply.

    One that a server has filtered, that is empty or that loops is neither a refusal nor an answer, by whatever rules.
    """
    if ending == "filtered":
        return Verdict(refused=False, unclear=True, reason=FILTERED)
    if rules != "paper":
        return judge(text, rules)
    reply = behind_thoughts(text)
    verdict = judge(reply, rules)
    if verdict.refused or not (reason := why_unclear(reply)):
        return verdict
    return replace(verdict, unclear=True, reason=reason)


def _rates(
    model: ChatModel, prompts: PromptSet, settings: Sequence[_Setting], completions: Sequence[Completion]
) -> Iterator[Rates]:
    unchanged = [setting.model is model and not setting.row for setting in settings]
    for harmful, texts in ((True, prompts.harmful), (False, prompts.harmless)):
        if not texts:
            continue
        base = model.logits(texts)
        said = [[c for c in completions if c.row == n and c.harmful == harmful] for n in range(len(settings))]
        replies = [_tokens(model, c.text) for c in said[unchanged.index(True)]] if any(unchanged) else []
        for number, setting in enumerate(settings):
            edits = [setting.row] * len(texts)
            kl = 0.0
            if not unchanged[number]:
                kl = kl_divergence(base, setting.model.logits(texts, edits)).mean().item()
            losses = None if harmful or not replies else setting.model.read_replies(texts, replies, edits).losses
            again = [repetition(_tokens(model, c.text)) for c in said[number]]
            yield replace(
                tally(setting.name, number, harmful, completions, kl),
                cross_entropy=None if losses is None or losses.isnan().all() else losses.nanmean().item(),
                repetition=sum(again) / len(again),
            )


def _tokens(model: ChatModel, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def tally(name: str, row: int, harmful: bool, completions: Sequence[Completion], kl: float | None) -> Rates:
    """The rates of the completions of one row and class."""
    mine = [c for c in completions if c.row == row and c.harmful == harmful]
    refused, unclear = (sum(c.verdict == verdict for c in mine) for verdict in ("refused", "unclear"))
    asked = any(c.safety for c in mine)
    unsafe, neither = (sum(c.safety == said for c in mine) if asked else None for said in ("unsafe", "unclear"))
    return Rates(name, harmful, len(mine), refused, unclear, kl, unsafe=unsafe, safety_unclear=neither)


def _mark(model: ChatModel, row: Row, max_new_tokens: int) -> str:
    """Names what a reply was made with, so that a journal never passes off one setting's reply as another's."""
    template = model.render(PROBES[0])
    digest = hashlib.sha256(f"{model.fingerprint} {model.precision} {template} {max_new_tokens}".encode())
    for i in row:
        where = "" if i.writers is None else sorted(i.writers)
        digest.update(f"{i.kind} {i.scale!r} {i.direction.norm!r} {i.direction.source.layer}{where}".encode())
        digest.update(i.direction.unit.numpy().tobytes())
    return digest.hexdigest()[:16]


class _Journal:
    """Replies by setting and prompt, kept in a file of JSON lines if there is one."""

    def __init__(self, path: Path | None) -> None:
        self.replies: dict[tuple[str, str], tuple[str, Ending]] = {}
        self._path, self._new = path, []
        if path is None:
            return
        with self._kept():  # now, and not when the first replies are there to be kept
            path.open("ab").close()
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
        if rest:  # cut off in place: a file that is written anew is empty for a moment, in which a run may be killed
            os.truncate(path, len(whole) + 1 if whole else 0)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PromptError(
                f"Replies cannot be kept in {self._path} ({error.strerror}): name another file, or make room there."
            ) from error

    def add(self, mark: str, prompt: str, text: str, ending: Ending) -> None:
        self.replies[mark, prompt] = text, ending
        self._new.append(json.dumps([mark, prompt, text, ending]) + "\n")

    def flush(self) -> None:
        """Brings what was added onto the disk."""
        if self._path is not None:
            with self._kept(), self._path.open("a", encoding="utf-8") as file:
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
        for (s, p), (t, q) in itertools.pairwise(zip(self.scales, self.refusal, strict=True)):
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
    model.check_rows([Intervention(direction, kind)], 1)
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

    Ends early when `stop` is set. Raises PromptError without texts, and PromptError and ModelError as `dose_response`.
    """
    if not texts:
        raise PromptError("A curve is the mean over prompts, and there is none: add some.")
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


# -- damage by strength ----------------------------------------------------------------------------------------------


def damage_curve(
    model: ChatModel,
    texts: Sequence[str],
    direction: Direction,
    kind: Kind,
    *,
    max_new_tokens: int = 64,
    rules: Rules = "paper",
    scales: Sequence[float] | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Progress | Damage]:
    """What the direction does to replies to `texts` at `scales`, by default `REMOVALS` or `ADDITIONS`; at last `Damage`.

    One step reads the untouched model's replies at a strength; only those are completed anew that would change there.
    Ends early when `stop` is set. Raises ValueError for unknown `rules`, PromptError without texts, and PromptError and
    ModelError as `ChatModel.begin`.
    """
    check_rules(rules)
    if not texts:
        raise PromptError("Damage is measured on harmless prompts, and there is none: add some.")
    scales = tuple(scales) if scales is not None else REMOVALS if kind == "ablate" else ADDITIONS
    rows: list[Row] = [(), *((Intervention(direction, kind, scale),) for scale in scales if scale)]
    n, total = len(texts), len(rows) * len(texts)
    stage = f"damage of {'removal' if kind == 'ablate' else 'addition'}"
    said: dict[
        int, tuple[list[int], bool]
    ] = {}  # tokens and verdict, by the number of the row, times n, and of the text

    def read(reply: tuple[str, Ending]) -> tuple[list[int], bool]:
        return _tokens(model, reply[0]), judged(*reply, rules).refused

    for batch in complete(model, texts, [()] * n, max_new_tokens=max_new_tokens, stop=stop):
        said |= {i: read(reply) for i, reply in batch.items()}
        yield Progress(stage, len(said), total)
    if len(said) < n:
        return
    untouched, readings = [said[i][0] for i in range(n)], list[Reading]()
    for number, row in enumerate(rows):
        if stop is not None and stop.is_set():
            return
        readings.append(model.read_replies(texts, untouched, [row] * n, max_new_tokens=max_new_tokens))
        # Who would have said the same need not say it again.
        said |= {number * n + i: said[i] for i in readings[-1].own.nonzero().flatten().tolist()}
        yield Progress(stage, len(said), total)
    missing = [i for i in range(total) if i not in said]
    asked, edits = [texts[i % n] for i in missing], [rows[i // n] for i in missing]
    for batch in complete(model, asked, edits, max_new_tokens=max_new_tokens, stop=stop):
        said |= {missing[i]: read(reply) for i, reply in batch.items()}
        yield Progress(stage, len(said), total)
    if len(said) < total:
        return
    measured = [
        (
            kl_divergence(readings[0].first, reading.first).mean().item(),
            reading.losses.nanmean().item(),
            sum(repetition(said[number * n + i][0]) for i in range(n)) / n,
            sum(said[number * n + i][1] for i in range(n)),
        )
        for number, reading in enumerate(readings)
    ]
    edited = iter(measured[1:])
    kl, cross_entropy, again, refused = zip(*(next(edited) if scale else measured[0] for scale in scales), strict=True)
    yield Damage(kind, n, max_new_tokens, scales, kl, cross_entropy, again, refused, rules)


@dataclass(frozen=True)
class RefusalCurve:
    """How many replies to `n` prompts are refused at each strength, and the same under random directions of the norm."""

    kind: Kind
    harmful: bool
    n: int
    max_new_tokens: int
    rules: Rules
    scales: tuple[float, ...]
    refused: tuple[int, ...]
    random_refused: tuple[tuple[int, ...], ...]


def refusal_curve(
    model: ChatModel,
    texts: Sequence[str],
    direction: Direction,
    kind: Kind,
    *,
    harmful: bool,
    rules: Rules = "paper",
    max_new_tokens: int = 64,
    n_random: int = 5,
    own: Damage | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Progress | RefusalCurve]:
    """Refusals by strength, of the direction and of `n_random` random ones; yields `Progress` and, last, the curve.

    `own` is what `damage_curve` gave for the same, where that was measured already. Ends early when `stop` is set. Raises
    as `damage_curve` does.
    """
    directions = [direction, *(random_like(direction, seed) for seed in range(n_random))]
    found = [] if own is None else [own]
    for number, each in list(enumerate(directions))[len(found) :]:
        for news in damage_curve(model, texts, each, kind, max_new_tokens=max_new_tokens, rules=rules, stop=stop):
            if isinstance(news, Damage):
                found.append(news)
            else:
                yield Progress("refusals by strength", number * news.total + news.done, len(directions) * news.total)
    if len(found) < len(directions):
        return
    mine, *randoms = found
    counts = tuple(each.refused for each in randoms)
    yield RefusalCurve(kind, harmful, len(texts), max_new_tokens, rules, mine.scales, mine.refused, counts)


@dataclass(frozen=True)
class Strengths:
    """What a direction does at every strength. `doses` are removal and addition on the prompts that they are for, harmful and
    harmless ones, and removal on harmless prompts, `refusals` the first two of these; `damage` is of both on harmless prompts.
    """

    doses: tuple[DoseCurve, ...]
    damage: tuple[Damage, ...]
    refusals: tuple[RefusalCurve, ...]


def by_strength(
    model: ChatModel,
    prompts: PromptSet,
    direction: Direction,
    refusal_tokens: Sequence[int],
    *,
    rules: Rules = "paper",
    max_new_tokens: int = 64,
    stop: threading.Event | None = None,
) -> Iterator[Progress | Strengths]:
    """Everything by strength, on the first `N_CURVE` prompts of each class, with five random directions as the control.

    Without refusal tokens the curves of a dose have no `refusal`, for it would be 0 everywhere. Ends early when `stop` is
    set. Raises as `dose_curve` and `damage_curve` do.
    """
    harmful, harmless = prompts.harmful[:N_CURVE], prompts.harmless[:N_CURVE]
    parts: list[Any] = []
    dose = functools.partial(dose_curve, model, direction=direction, refusal_tokens=refusal_tokens, stop=stop)
    yield from _kept(parts, dose(harmful, kind="ablate", harmful=True))
    yield from _kept(parts, dose(harmless, kind="add", harmful=False))
    yield from _kept(parts, dose(harmless, kind="ablate", harmful=False))
    how: dict[str, Any] = {"rules": rules, "max_new_tokens": max_new_tokens, "stop": stop}
    yield from _kept(parts, damage_curve(model, harmless, direction, "ablate", **how))
    yield from _kept(parts, damage_curve(model, harmless, direction, "add", **how))
    own = parts[-1] if parts and isinstance(parts[-1], Damage) else None
    yield from _kept(parts, refusal_curve(model, harmful, direction, "ablate", harmful=True, **how))
    yield from _kept(parts, refusal_curve(model, harmless, direction, "add", harmful=False, own=own, **how))
    if len(parts) < 7:
        return
    doses: list[DoseCurve] = parts[:3]
    if not refusal_tokens:
        doses = [replace(curve, refusal=(), random_refusal=()) for curve in doses]
    yield Strengths(tuple(doses), tuple(parts[3:5]), tuple(parts[5:]))


def _kept(parts: list[Any], news: Iterator[Any]) -> Iterator[Progress]:
    """The progress of some work; what comes of it is put to the `parts`."""
    for each in news:
        if isinstance(each, Progress):
            yield each
        else:
            parts.append(each)


def dose_table(doses: Sequence[DoseCurve], refusals: Sequence[RefusalCurve]) -> str:
    """By strength the probability that replies start like a refusal and how many are refused, in Markdown.

    The range beside each is that of the random directions.
    """
    lines = [
        "| prompts | model | strength | n | starts like a refusal | random directions | refused | random directions |",
        "|---|---|---|---|---|---|---|---|",
    ]
    judged_by = {(curve.kind, curve.harmful): curve for curve in refusals}
    for dose in doses:
        cls, what = "harmful" if dose.harmful else "harmless", "removed" if dose.kind == "ablate" else "added"
        rated = judged_by.get((dose.kind, dose.harmful))
        for i, scale in enumerate(dose.scales):
            start = (
                f"{dose.refusal[i]:.1%} | {_range([row[i] for row in dose.random_refusal])}"
                if dose.refusal
                else "– | –"
            )
            replies = "– | –"
            if rated is not None:
                among = [row[i] / rated.n for row in rated.random_refused]
                replies = f"{_share(rated.refused[i], rated.n)} | {_range(among)}"
            lines.append(f"| {cls} | direction {what} | {_signed(scale)} | {dose.n} | {start} | {replies} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.1%} to {max(values):.1%}" if values else "–"
