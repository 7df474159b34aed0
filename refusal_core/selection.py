"""Choosing the refusal direction among all candidates (layer, position): Arditi et al. 2024, §2.3 and appendix C.

Every candidate r[p, l] is scored on validation prompts, means over prompts of the last position's scores:

    bypass   refusal score of harmful prompts with r ablated everywhere      (low is strong)
    induce   refusal score of harmless prompts with r added at its layer
    kl       KL on harmless prompts between the untouched model and the model with r ablated

Discarded are candidates with a NaN, from the last fifth of the layers (l ≥ int(0.8 L)), with kl > 0.1, or with
induce < 0. Of the rest the lowest bypass is chosen; ties go to the earliest position, then the earliest layer.

The same choice is made with a fraction of the work: pruned layers are never scored; additions restart from the
cached `resid_pre` of their layer, and stop where the rest of the prompts could not lift induce to 0 even at the
score's upper bound; bypass is measured only where induce ≥ 0; kl lazily, in ascending order of bypass, until two
candidates pass (the chosen one and the runner-up). What was not measured stays None.

Where refusal tokens say nothing, `choose_cosmic` asks the activations instead (Siu et al. 2025, COSMIC, as their published
code has it). In L_low, the tenth of the layers where the classes are least alike (train, position −1), and of the
validation prompts' last position, x̄ being the mean over prompts and those layers:

    S_refuse = cos(x̄ of harmless prompts with r added, x̄ of harmful)
    S_comply = cos(x̄ of harmful prompts with r ablated, x̄ of harmless)       (the highest S_refuse + S_comply is chosen)

Nothing is filtered by what the model does, and instead of induce a candidate at −1 is discarded above the layers where
the other positions' candidates score highest (the median of their peaks, of both scores): there the similarity is of its
own making. An addition at layer l is read from l + 1 on. Unlike theirs, L_low leaves out what stands behind the final norm.

For two classes that are not about refusal, none of this can be asked: `find_contrast` takes the cell at which held-out
prompts lie furthest apart along the difference of the means, and steers nothing to find it.
"""

import functools
import hashlib
import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from refusal_core.chat_model import Batch, ChatModel, Output
from refusal_core.directions import ZERO_NORM, Direction, Source, difference_in_means
from refusal_core.interventions import Intervention, Kind
from refusal_core.metrics import HIGHEST_SCORE, auroc, d_prime, kl_divergence, refusal_score
from refusal_core.prompts import CLASSES, PromptError, PromptSet, Split, load_prompts

KL_LIMIT = 0.1
LAYER_SHARE = 0.8
N_TRAIN, N_VAL = 128, 32
MOST_TOKEN_CHARACTERS = 100
BATCH_TOKENS = 2048
PARTS = 12
"""A forward step has about `BATCH_TOKENS` tokens: a few prompts of about the same length, once per candidate.

The fewer prompts, the less padding, and the sooner a part of them decides.
"""

Rule = Literal["nan", "zero", "layer", "late", "kl", "induce"]

By = Literal["rule", "cosmic"]
COSMIC = "COSMIC"
LOW_SHARE = 0.1


@dataclass(frozen=True)
class CandidateScore:
    """A row of the table: the candidate at template position `pos` and layer `layer` (`resid_pre`), and its scores.

    `bypass` and `induce` are refusal scores (log-odds), `kl` is in nats; None is "not measured". `norm` is ‖r‖.
    `decided` is the rule that a part of the validation prompts was enough for, whatever the score is over all, or that
    other candidates decide, or “nan” where a file cannot hold the score itself. `refuse` and `comply` are COSMIC's
    cosines, which are measured instead of the first two. `auroc` and `d_prime` say how far held-out prompts lie apart
    along r; they are what `choose_contrast` goes by.
    """

    pos: int
    layer: int
    bypass: float | None
    induce: float | None
    kl: float | None
    norm: float | None = None
    decided: Rule | None = None
    auroc: float | None = None
    d_prime: float | None = None
    refuse: float | None = None
    comply: float | None = None

    @property
    def similarity(self) -> float | None:
        """S_refuse + S_comply, by which COSMIC chooses."""
        return None if self.refuse is None or self.comply is None else self.refuse + self.comply


@dataclass(frozen=True)
class Choice:
    """The outcome of the rule. `rejected` says of each discarded candidate which rule discarded it.

    `relaxed` is None when a candidate passed every rule; otherwise `chosen` is the candidate that needs the rules relaxed
    least, of those that bypass refusal at all if there are any, and `relaxed` the worst of the rules that it breaks.
    """

    chosen: CandidateScore | None
    rejected: dict[CandidateScore, Rule]
    runner_up: CandidateScore | None
    relaxed: Rule | None

    @property
    def bypasses(self) -> bool:
        """Whether the choice is one to offer: relaxed rules are for nothing where even then refusal stays."""
        return self.relaxed is None or (self.chosen is not None and (self.chosen.bypass or 0) < 0)

    @property
    def margin(self) -> float | None:
        """How far the chosen candidate is ahead of the runner-up: in bypass, or in similarity where that chose."""
        if self.chosen is None or self.runner_up is None:
            return None
        if self.chosen.similarity is not None and self.runner_up.similarity is not None:
            return self.chosen.similarity - self.runner_up.similarity
        if self.chosen.bypass is None or self.runner_up.bypass is None:
            return None
        return self.runner_up.bypass - self.chosen.bypass


_RULES: dict[Rule, Callable[[CandidateScore, int], bool]] = {
    "nan": lambda s, n_layers: (
        s.decided == "nan"
        or any(x is not None and math.isnan(x) for x in (s.bypass, s.induce, s.kl, s.refuse, s.comply))
        or not math.isfinite(s.norm or 0.0)
    ),
    "zero": lambda s, n_layers: s.norm is not None and s.norm < ZERO_NORM,
    "layer": lambda s, n_layers: s.layer >= int(LAYER_SHARE * n_layers),
    "late": lambda s, n_layers: s.decided == "late",
    "kl": lambda s, n_layers: s.kl is not None and s.kl > KL_LIMIT,
    "induce": lambda s, n_layers: s.decided == "induce" or (s.induce is not None and s.induce < 0),
}


def choose(scores: Sequence[CandidateScore], n_layers: int) -> Choice:
    """Applies the rule to the candidates as far as they are measured; a full table gives the published choice."""
    broken = {s: broken_rules(s, n_layers) for s in scores}
    rejected: dict[CandidateScore, Rule] = {s: rules[0] for s, rules in broken.items() if rules}
    passing = [s for s in scores if s not in rejected and _is_measured(s)]
    if passing:
        ranked = sorted(passing, key=lambda s: (s.bypass, s.pos, s.layer))
        return Choice(ranked[0], rejected, ranked[1] if len(ranked) > 1 else None, None)
    usable = [s for s in scores if _is_measured(s) and not {"nan", "zero"} & set(broken[s])]
    if not usable:
        return Choice(None, rejected, None, None)
    effective = [s for s in usable if (s.bypass or 0) < 0]
    nearest = min(effective or usable, key=lambda s: (_excesses(s, broken[s]), s.bypass, s.pos, s.layer))
    return Choice(nearest, rejected, None, _worst(broken[nearest]))


def choose_cosmic(scores: Sequence[CandidateScore], n_layers: int) -> Choice:
    """The candidate with the highest S_refuse + S_comply of those that no rule discards, then the earliest.

    If every one is discarded, the one that needs the rules relaxed least, and of those the highest again.
    """
    broken = {s: broken_rules(s, n_layers) for s in scores}
    rejected: dict[CandidateScore, Rule] = {s: rules[0] for s, rules in broken.items() if rules}
    measured = [s for s in scores if s.similarity is not None and s.kl is not None]
    passing = sorted((s for s in measured if s not in rejected), key=_by_similarity)
    if passing:
        return Choice(passing[0], rejected, passing[1] if len(passing) > 1 else None, None)
    usable = [s for s in measured if not {"nan", "zero"} & set(broken[s])]
    if not usable:
        return Choice(None, rejected, None, None)
    nearest = min(usable, key=lambda s: (_excesses(s, broken[s]), _by_similarity(s)))
    return Choice(nearest, rejected, None, _worst(broken[nearest]))


def _by_similarity(score: CandidateScore) -> tuple[float, int, int]:
    return -(score.similarity or 0.0), score.pos, score.layer


def choose_contrast(scores: Sequence[CandidateScore], n_layers: int) -> Choice:
    """The candidate with the highest AUROC, then d′, then the earliest, outside the last fifth of the layers."""
    broken = {s: broken_rules(s, n_layers) for s in scores}
    rejected: dict[CandidateScore, Rule] = {s: rules[0] for s, rules in broken.items() if rules}
    ranked = sorted((s for s in scores if s not in rejected and s.auroc is not None), key=_by_separation)
    chosen, runner_up, *_ = *ranked, None, None
    return Choice(chosen, rejected, runner_up, None)


def _by_separation(score: CandidateScore) -> tuple[float, float, int, int]:
    """Sorts the furthest apart first; a d′ that cannot be had, of a single prompt, comes last of its AUROC."""
    far = -math.inf if score.d_prime is None or math.isnan(score.d_prime) else score.d_prime
    return -(score.auroc or 0.0), -far, score.pos, score.layer


def broken_rules(score: CandidateScore, n_layers: int) -> list[Rule]:
    """Every rule that a candidate breaks, as far as it is measured."""
    return [rule for rule, breaks in _RULES.items() if breaks(score, n_layers)]


def _is_direction(score: CandidateScore) -> bool:
    return score.norm is not None and ZERO_NORM <= score.norm < math.inf


def _is_measured(score: CandidateScore) -> bool:
    return score.bypass is not None and score.induce is not None and score.kl is not None


_RELAXED: tuple[Rule, ...] = ("kl", "induce", "late", "layer")
"""The rules that can be relaxed. Of several the first is the worst: it says what the model becomes."""


def _excesses(score: CandidateScore, broken: Sequence[Rule]) -> tuple[int, int, float, int]:
    """How much a candidate needs relaxed: how many rules, how many of them about where it is read, and by how much.

    KL counts in its limits above the limit, induce in log-odds below 0: a little of one is less than a lot of the other.
    """
    amounts = {"kl": (score.kl or 0.0) / KL_LIMIT - 1, "induce": -(score.induce or 0.0)}
    about_place = [rule for rule in broken if rule not in amounts]
    by = sum((amount for rule, amount in amounts.items() if rule in broken), 0.0)
    return len(broken), len(about_place), by, score.layer if about_place else 0


def _worst(broken: Sequence[Rule]) -> Rule:
    return min(broken, key=_RELAXED.index)


SumKey = tuple[str, int, int, int]


class Sums(dict[SumKey, float]):
    """What is measured of a candidate, summed over a batch of prompts, by score, name of the batch, position and layer.

    Whoever keeps them can go on with a search that was interrupted.
    """

    def note(self, measured: dict[SumKey, float]) -> None:
        """These are known now."""
        self.update(measured)


@dataclass(frozen=True)
class Progress:
    """How far long work has come: `done` of `total` in `stage`."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class Found:
    """A found direction with everything it was chosen from.

    `directions` are the raw differences of means (float64). The activations are `resid_pre` at `positions`, the ones
    that were read at and the one before them (−(P+1) … −1 unless fewer were asked for), float32, of the prompts that the untouched model treats as expected, or of all where COSMIC or the
    separation of the classes chose; `counts` says per split and class how many of the drawn prompts those are.
    `refusal_shares` is the mean probability, on harmful training prompts, of each refusal token as the first of the reply.
    """

    direction: Direction
    choice: Choice
    scores: tuple[CandidateScore, ...]
    refusal_tokens: tuple[int, ...]
    refusal_shares: tuple[float, ...]
    directions: Float[Tensor, "template_pos layer d_model"]
    positions: tuple[int, ...]
    prompts: PromptSet
    validation: PromptSet
    harmful: Float[Tensor, "harmful pos layer d_model"]
    harmless: Float[Tensor, "harmless pos layer d_model"]
    val_harmful: Float[Tensor, "val_harmful pos layer d_model"]
    val_harmless: Float[Tensor, "val_harmless pos layer d_model"]
    counts: dict[tuple[str, str], tuple[int, int]]

    @functools.cached_property
    def digest(self) -> str:
        """Names the prompts that the activations are of."""
        sets = [(p.harmful, p.harmless) for p in (self.prompts, self.validation)]
        return hashlib.sha256(repr(sets).encode()).hexdigest()[:16]

    def candidate(self, pos: int, layer: int) -> Direction:
        """The direction of any cell of the map; raises DirectionError where it is numerically zero."""
        source = self.direction.source
        if (pos, layer) != (source.position, source.layer):
            source = replace(source, position=pos, layer=layer, chosen_by="")
        return Direction.from_difference(self.directions[pos, layer], source)

    def harmless_mean(self, pos: int, layer: int) -> Float[Tensor, " d_model"]:
        """The mean of the harmless training prompts' `resid_pre` there, in float64."""
        return self.harmless[:, pos, layer].double().mean(0)


@dataclass(eq=False)
class _Read:
    """One class of one split as the untouched model reads it; `kept` are those that are gone by."""

    prompts: tuple[str, ...]
    activations: Tensor
    logits: Tensor
    kept: list[int]

    def keep_all(self) -> None:
        """Goes by every prompt."""
        self.kept = list(range(len(self.prompts)))


@dataclass(frozen=True, eq=False)
class _Kept:
    """What candidates are made of and measured on: the prompts that are kept, their activations, and all `raw` directions."""

    train: PromptSet
    val: PromptSet
    activations: dict[tuple[str, str], Tensor]
    raw: Float[Tensor, "template_pos layer d_model"]
    counts: dict[tuple[str, str], tuple[int, int]]

    @classmethod
    def of(cls, train: PromptSet, val: PromptSet, reads: Mapping[tuple[str, str], _Read]) -> "_Kept":
        """What is kept of two sets that were read."""
        activations = {key: read.activations[read.kept] for key, read in reads.items()}
        return cls(
            train=train.keep(reads["train", "harmful"].kept, reads["train", "harmless"].kept),
            val=val.keep(reads["val", "harmful"].kept, reads["val", "harmless"].kept),
            activations=activations,
            raw=difference_in_means(activations["train", "harmful"][:, 1:], activations["train", "harmless"][:, 1:]),
            counts={key: (len(read.kept), len(read.prompts)) for key, read in reads.items()},
        )

    def found(
        self,
        model: ChatModel,
        direction: Direction,
        choice: Choice,
        scores: tuple[CandidateScore, ...],
        tokens: tuple[int, ...] = (),
        shares: tuple[float, ...] = (),
    ) -> Found:
        """The chosen direction with all this."""
        return Found(
            direction=direction,
            choice=choice,
            scores=scores,
            refusal_tokens=tokens,
            refusal_shares=shares,
            directions=self.raw,
            positions=tuple(range(-len(self.raw) - 1, 0)),
            prompts=self.train,
            validation=self.val,
            harmful=self.activations["train", "harmful"],
            harmless=self.activations["train", "harmless"],
            val_harmful=self.activations["val", "harmful"],
            val_harmless=self.activations["val", "harmless"],
            counts=self.counts,
        )


def find_direction(
    model: ChatModel,
    prompts: PromptSet,
    validation: PromptSet | None = None,
    *,
    by: By | None = None,
    refusal_tokens: Sequence[int] | None = None,
    n_positions: int | None = None,
    complete: bool = False,
    seed: int = 0,
    stop: threading.Event | None = None,
    sums: Sums | None = None,
) -> Iterator[Progress | Found]:
    """Finds the model's refusal direction; yields `Progress` and, last, `Found`.

    Draws 128 + 128 of `prompts` and 32 + 32 of `validation` (by default the `val` split of the same source, and for prompts
    that name none the embedded ones).
    `refusal_tokens` default to the first tokens most raised on harmful against harmless prompts; with `n_positions` the
    stream is read at so many of the template's P last positions, and not at all of them. `by` says who chooses:
    the rule, or COSMIC, which needs no refusal tokens; without it the rule, and COSMIC where the model's own tokens say
    nothing or no candidate bypasses refusal, which the direction's source then gives with the reason. With `complete`
    every cell of the table is measured, for a map without holes. Setting `stop` ends the iteration early. `sums` that the
    rule has measured in the same search before are not measured again, and new ones are put there. Raises
    PromptError at once if a class is empty, or a refusal token or a number of positions is none of the model's, and later if a class empties because
    the model does not treat it as expected, and none but the rule may choose.
    """
    for token in refusal_tokens or ():
        if not 0 <= token < model.d_vocab:
            raise PromptError(
                f"{token} is no token of {model.name}, which has the numbers 0 to {model.d_vocab - 1}: take others as "
                "refusal tokens, or none to have them found."
            )
    n = read_at_most(model, n_positions)
    train = _not_empty(prompts, "train").draw(N_TRAIN, seed)
    validation = validation or load_prompts("val", prompts.source or "embedded")
    val = _not_empty(validation, "val").draw(N_VAL, seed)
    reads = yield from _read_sets(model, train, val, n, stop)
    if not reads:
        return
    first = {cls: reads["train", cls].logits.double().softmax(-1).mean(0) for cls in ("harmful", "harmless")}
    tokens = (
        tuple(map(int, refusal_tokens))
        if refusal_tokens
        else derive_refusal_tokens(first["harmful"], first["harmless"])
    )
    shares = tuple(first["harmful"][t].item() for t in tokens)
    only_rule = by == "rule" or bool(refusal_tokens)
    why = "as asked for" if by == "cosmic" else ""
    if not why and (lack := _keep_expected(reads, tokens)):
        if only_rule:
            raise PromptError(
                f"{lack[0].upper()}{lack[1:]}, so there is no direction to read: take a model with safety tuning, other "
                "prompts, or other refusal tokens, or have COSMIC choose, which needs none."
            )
        why = f"because {lack}"
    if not why:
        found = yield from _search(model, train, val, reads, tokens, shares, complete, stop, sums)
        if found is None or only_rule or found.choice.bypasses:
            yield from () if found is None else (found,)
            return
        why = "because no candidate bypasses refusal, whichever rule is relaxed"
    for read in reads.values():
        read.keep_all()
    found = yield from _search(model, train, val, reads, tokens, shares, complete, stop, chosen_by=f"{COSMIC}, {why}")
    if found is not None:
        yield found


def read_at_most(model: ChatModel, n_positions: int | None) -> int:
    """At how many of the template's last positions is read: P if none is named; raises PromptError if it has not as many."""
    most = model.template_positions
    if n_positions is not None and not 1 <= n_positions <= most:
        raise PromptError(
            f"The chat template of {model.name} ends in {most} tokens that are the same for every prompt: read at 1 to {most} "
            f"of them, not {n_positions}."
        )
    return n_positions or most


def _not_empty(prompts: PromptSet, split: Split) -> PromptSet:
    """The set itself; raises PromptError, before a model reads anything, if it lacks a class."""
    for name, texts in zip(prompts.classes, (prompts.harmful, prompts.harmless), strict=True):
        if not texts:
            raise PromptError(
                f"There is no {name} prompt in the {split} set, and a direction is the difference of two classes: add "
                f"{name} prompts."
            )
    return prompts


def _search(
    model: ChatModel,
    train: PromptSet,
    val: PromptSet,
    reads: dict[tuple[str, str], _Read],
    tokens: tuple[int, ...],
    shares: tuple[float, ...],
    complete: bool,
    stop: threading.Event | None,
    sums: Sums | None = None,
    chosen_by: str = "",
) -> Generator[Progress, None, Found | None]:
    """Scores the candidates of what is kept and chooses; gives nothing if `stop` was set meanwhile."""
    kept = _Kept.of(train, val, reads)
    scorer = _Scorer(model, kept.raw, _source(model, kept.train), tokens, kept.val, Sums() if sums is None else sums)
    for progress in scorer.score_by_cosine(kept.activations, complete) if chosen_by else scorer.score(complete):
        yield progress
        if stop is not None and stop.is_set():
            return None
    choice = (choose_cosmic if chosen_by else choose)(scorer.scores, model.n_layers)
    if choice.chosen is None:
        raise PromptError(_nothing_left(choice))
    direction = scorer.direction(choice.chosen)
    direction = replace(direction, source=replace(direction.source, chosen_by=chosen_by))
    return kept.found(model, direction, choice, scorer.scores, tokens, shares)


def _nothing_left(choice: Choice) -> str:
    if "nan" in choice.rejected.values():
        return "The scores of the candidates are not numbers: load the model in float32."
    return "No candidate direction could be scored: harmful and harmless prompts look the same to the model."


def find_contrast(
    model: ChatModel,
    prompts: PromptSet,
    validation: PromptSet,
    *,
    n_positions: int | None = None,
    seed: int = 0,
    stop: threading.Event | None = None,
) -> Iterator[Progress | Found]:
    """The difference of the means of any two classes; yields `Progress` and, last, `Found`.

    Draws and reads as `find_direction` does, and keeps every prompt: whether the model refuses it says nothing here. The cell is
    `choose_contrast`'s, from the validation prompts' projections; `refusal_tokens` stay empty. Setting `stop` ends the
    iteration early. Raises PromptError as there, and if the classes have the same mean everywhere.
    """
    n = read_at_most(model, n_positions)
    train, val = _not_empty(prompts, "train").draw(N_TRAIN, seed), _not_empty(validation, "val").draw(N_VAL, seed)
    reads = yield from _read_sets(model, train, val, n, stop)
    if not reads:
        return
    kept = _Kept.of(train, val, reads)
    scores = tuple(
        _apart(pos, layer, kept.raw[pos, layer], *(kept.activations["val", cls][:, pos, layer] for cls in CLASSES))
        for pos in range(-n, 0)
        for layer in range(model.n_layers)
    )
    choice = choose_contrast(scores, model.n_layers)
    if choice.chosen is None:
        raise PromptError(f"The model reads {' and '.join(prompts.classes)} prompts alike: there is no direction.")
    pos, layer = choice.chosen.pos, choice.chosen.layer
    source = replace(_source(model, train), contrast=" − ".join(prompts.classes), position=pos, layer=layer)
    yield kept.found(model, Direction.from_difference(kept.raw[pos, layer], source), choice, scores)


def _apart(pos: int, layer: int, r: Tensor, first: Tensor, second: Tensor) -> CandidateScore:
    """How far the held-out activations of the two classes lie apart along r."""
    norm = r.norm().item()
    if not norm >= ZERO_NORM:
        return CandidateScore(pos, layer, None, None, None, norm)
    a, b = (x.double() @ r / norm for x in (first, second))
    return CandidateScore(pos, layer, None, None, None, norm, auroc=auroc(a, b), d_prime=d_prime(a, b))


def refusal_token(model: ChatModel, text: str) -> int:
    """The one token of `model` that `text` is; raises PromptError if it is none or several."""
    if not text:
        raise PromptError("There is no text: type the token that a refusal begins with.")
    if len(text) > MOST_TOKEN_CHARACTERS:
        raise PromptError(f"{len(text):,} characters are no token: type the first word of a refusal.")
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = ", ".join(f"“{model.tokenizer.decode([i])}”" for i in ids[:8]) + (", …" if len(ids) > 8 else "")
        raise PromptError(f"“{text}” is {len(ids)} tokens of {model.name} ({pieces}): type one of them.")
    return ids[0]


def _source(model: ChatModel, train: PromptSet) -> Source:
    return Source(
        model=model.name,
        revision=model.revision,
        fingerprint=model.fingerprint,
        prompts=train.source,
        n_harmful=len(train.harmful),
        n_harmless=len(train.harmless),
    )


def _read_sets(
    model: ChatModel, train: PromptSet, val: PromptSet, n_positions: int, stop: threading.Event | None
) -> Generator[Progress, None, dict[tuple[str, str], _Read]]:
    """Reads both classes of both splits; gives them by split and class, or nothing if `stop` was set meanwhile."""
    reads: dict[tuple[str, str], _Read] = {}
    sets = {("train", "harmful"): train.harmful, ("train", "harmless"): train.harmless}
    sets |= {("val", "harmful"): val.harmful, ("val", "harmless"): val.harmless}
    total, done = sum(map(len, sets.values())), 0
    for key, texts in sets.items():
        read = _Read(texts, torch.empty(0), torch.empty(0), [])
        read.keep_all()
        for part in _read(model, read, n_positions):
            done += part
            yield Progress("reading prompts", done, total)
            if stop is not None and stop.is_set():
                return {}
        reads[key] = read
    return reads


def _read(model: ChatModel, read: _Read, n_positions: int) -> Iterator[int]:
    """Fills `read` with each prompt's activations there and at the position before, and first-token logits; yields batch sizes."""
    positions = range(-n_positions - 1, 0)
    n = len(read.prompts)
    read.activations = torch.empty(n, len(positions), model.n_layers, model.d_model)
    read.logits = torch.empty(n, model.d_vocab)
    for batch in model.batches(read.prompts, BATCH_TOKENS):
        output = model.run(batch, read=positions)
        assert output.resid_pre is not None
        read.activations[list(batch.index)] = output.resid_pre.float().cpu()
        read.logits[list(batch.index)] = output.logits.float().cpu()
        yield len(batch.index)


def derive_refusal_tokens(
    harmful: Float[Tensor, " d_vocab"], harmless: Float[Tensor, " d_vocab"], at_most: int = 8
) -> tuple[int, ...]:
    """The first tokens most raised on harmful against harmless prompts, from mean first-token probabilities.

    A token counts if it carries at least a twentieth of all probability that is raised.
    """
    raised = (harmful - harmless).clamp(min=0)
    share, token = (raised / raised.sum()).sort(descending=True)
    return tuple(t for s, t in zip(share[:at_most].tolist(), token[:at_most].tolist(), strict=True) if s >= 0.05)


def _keep_expected(reads: dict[tuple[str, str], _Read], tokens: Sequence[int]) -> str | None:
    """Keeps harmful prompts that score above 0 and harmless ones below; says so where none of a class is left."""
    if not tokens:
        return "no token stands out as the beginning of a refusal"
    for (split, cls), read in reads.items():
        score = refusal_score(read.logits, tokens)
        read.kept = ((score > 0) if cls == "harmful" else (score < 0)).nonzero().flatten().tolist()
        if not read.kept:
            verb = "refuses no" if cls == "harmful" else "refuses every"
            return f"the unmodified model {verb} {cls} prompt of the {split} split"
    return None


class _Scorer:
    """The table of scores while it is being filled."""

    def __init__(
        self,
        model: ChatModel,
        raw: Float[Tensor, "pos layer d_model"],
        source: Source,
        tokens: Sequence[int],
        val: PromptSet,
        sums: Sums,
    ) -> None:
        self._sums = sums
        self._model, self._raw, self._source, self._tokens = model, raw, source, tokens
        self._harmful = list(model.batches(val.harmful, BATCH_TOKENS // PARTS))
        self._harmless = list(model.batches(val.harmless, BATCH_TOKENS // PARTS))
        self._base: dict[Batch, Tensor] = {}
        self._made_from = hashlib.sha256(raw.contiguous().numpy().tobytes() + repr(tuple(tokens)).encode()).hexdigest()
        self._table = {
            (pos, layer): CandidateScore(pos, layer, None, None, None, raw[pos, layer].norm().item())
            for pos in range(-len(raw), 0)
            for layer in range(model.n_layers)
        }

    @property
    def scores(self) -> tuple[CandidateScore, ...]:
        """The candidates in the order of positions up to −1, and of layers."""
        return tuple(self._table.values())

    def direction(self, score: CandidateScore) -> Direction:
        """The candidate itself."""
        source = replace(self._source, position=score.pos, layer=score.layer)
        return Direction.from_difference(self._raw[score.pos, score.layer], source)

    def score(self, complete: bool) -> Iterator[Progress]:
        """Measures as little as the rule needs; every cell if `complete`, or if nothing passes the rule."""
        n_layers = self._model.n_layers
        unpruned = [s for s in self.scores if not broken_rules(s, n_layers)]
        yield from self._measure_induce(unpruned, decide=not complete)
        if not complete:
            yield from self._measure_bypass([s for s in self.scores if s.induce is not None and s.induce >= 0])
            with_bypass = [s for s in self.scores if s.bypass is not None and not math.isnan(s.bypass)]
            ranked = sorted(with_bypass, key=lambda s: (s.bypass, s.pos, s.layer))
            yield from self._measure_kl_until_two_pass(ranked, choose)
            choice = choose(self.scores, n_layers)
            if choice.chosen is not None and choice.relaxed is None:
                return
        usable = [s for s in self.scores if _is_direction(s)]
        yield from self._measure_induce([s for s in usable if s.induce is None])
        yield from self._measure_bypass([s for s in usable if s.bypass is None])
        yield from self._measure_kl([s for s in usable if s.kl is None])

    def score_by_cosine(
        self, kept: Mapping[tuple[str, str], Float[Tensor, "prompt pos layer d_model"]], complete: bool
    ) -> Iterator[Progress]:
        """COSMIC's two cosines of every candidate, from what the untouched model reads, and kl as far as it is needed."""
        n_layers = self._model.n_layers
        low = least_alike(kept["train", "harmful"][:, -1], kept["train", "harmless"][:, -1])
        toward = {cls: kept["val", cls][:, -1, low].double().mean((0, 1)) for cls in ("harmful", "harmless")}
        cells = [s for s in self.scores if _is_direction(s)]
        yield from self._measure_refuse(cells, low, toward["harmful"])
        yield from self._measure_comply([s for s in self.scores if s.refuse is not None], low, toward["harmless"])
        self._discard_late()
        left = [s for s in self.scores if not broken_rules(s, n_layers)]
        if not complete:
            yield from self._measure_kl_until_two_pass(sorted(left, key=_by_similarity), choose_cosmic)
            choice = choose_cosmic(self.scores, n_layers)
            if choice.chosen is not None and choice.relaxed is None:
                return
        yield from self._measure_kl([s for s in self.scores if s.similarity is not None and s.kl is None])

    def _discard_late(self) -> None:
        """Candidates at −1 above the median peak of the other positions', in both scores."""
        others = {s.pos for s in self.scores if s.pos != -1 and s.similarity is not None}
        limits = []
        for name in ("refuse", "comply") if others else ():
            rows = [[s for s in self.scores if s.pos == pos and s.similarity is not None] for pos in others]
            peaks = sorted(max(row, key=lambda s: (_number(getattr(s, name)), -s.layer)).layer for row in rows)
            limits.append(peaks[(len(peaks) - 1) // 2])
        for score in self.scores:
            if limits and score.pos == -1 and score.similarity is not None and score.layer > max(limits):
                self._set(score, decided="late")

    def _measure_kl_until_two_pass(
        self, ranked: Sequence[CandidateScore], choose: Callable[[Sequence[CandidateScore], int], Choice]
    ) -> Iterator[Progress]:
        for score in ranked:
            yield from self._measure_kl([score])
            if choose(self.scores, self._model.n_layers).runner_up is not None:
                return

    def _measure_refuse(self, cells: Sequence[CandidateScore], low: list[int], toward: Tensor) -> Iterator[Progress]:
        """As `_measure_induce` does; a layer of `low` that an addition does not reach stays as it is."""
        sums, done = {cell: torch.zeros_like(toward) for cell in cells}, 0
        for batch in self._harmless if cells else []:
            base = self._model.run(batch, read=slice(None))
            assert base.resid_pre is not None
            self._base[batch] = base.logits
            for layer in range(self._model.n_layers):
                mine, later = [c for c in cells if c.layer == layer], [k for k in low if k > layer]
                untouched = _wide(base.resid_pre[:, -1, [k for k in low if k <= layer]]).sum((0, 1))
                for chunk in _chunks(mine, batch):
                    for cell in chunk:
                        sums[cell] += untouched
                    if later:
                        start = layer, base.resid_pre[:, :, layer].repeat(len(chunk), 1, 1)
                        output = self._run(batch, chunk, "add", start=start, read=[-1], read_layers=later)
                        _add_streams(sums, chunk, output)
                done += len(batch.index) * len(mine)
                yield Progress("scoring additions", done, len(cells) * _count(self._harmless))
        for cell, total in sums.items():
            self._set(cell, refuse=torch.cosine_similarity(total, toward, dim=0).item())

    def _measure_comply(self, cells: Sequence[CandidateScore], low: list[int], toward: Tensor) -> Iterator[Progress]:
        sums, done = {cell: torch.zeros_like(toward) for cell in cells}, 0
        for batch in self._harmful:
            for chunk in _chunks(cells, batch):
                _add_streams(sums, chunk, self._run(batch, chunk, "ablate", read=[-1], read_layers=low))
                done += len(chunk) * len(batch.index)
                yield Progress("scoring ablations", done, len(cells) * _count(self._harmful))
        for cell, total in sums.items():
            self._set(cell, comply=torch.cosine_similarity(total, toward, dim=0).item())

    def _measure_induce(self, cells: Sequence[CandidateScore], *, decide: bool = False) -> Iterator[Progress]:
        """Additions at layer l restart from the cached `resid_pre[l]`: the blocks below are unchanged.

        With `decide` a cell is left unmeasured as soon as its score over all prompts must be below 0.
        """
        totals, open_cells, done = dict.fromkeys(cells, 0.0), list(cells), 0
        left = n = _count(self._harmless)
        for batch in self._harmless if cells else []:
            number = self._name_of(batch)
            base = self._model.run(batch, read=slice(None))
            assert base.resid_pre is not None
            self._base[batch] = base.logits
            left -= len(batch.index)
            for layer in range(self._model.n_layers):
                mine = [c for c in open_cells if c.layer == layer]
                for chunk in _chunks(self._recall(totals, "induce", number, mine), batch):
                    start = base.resid_pre[:, :, layer].repeat(len(chunk), 1, 1)
                    logits = self._run(batch, chunk, "add", start=(layer, start)).logits
                    self._accumulate(totals, "induce", number, chunk, refusal_score(logits, self._tokens))
                done += len(batch.index) * sum(c.layer == layer for c in cells)
                yield Progress("scoring additions", done, len(cells) * n)
            if decide and left:
                open_cells = [c for c in open_cells if not is_decided(totals[c], left)]
        for cell, total in totals.items():
            if cell in open_cells:
                self._set(cell, induce=total / n, decided=None)
            else:
                self._set(cell, decided="induce")

    def _measure_bypass(self, cells: Sequence[CandidateScore]) -> Iterator[Progress]:
        totals, done = dict.fromkeys(cells, 0.0), 0
        for batch in self._harmful:
            number = self._name_of(batch)
            left = self._recall(totals, "bypass", number, cells)
            done += (len(cells) - len(left)) * len(batch.index)
            for chunk in _chunks(left, batch):
                logits = self._run(batch, chunk, "ablate").logits
                self._accumulate(totals, "bypass", number, chunk, refusal_score(logits, self._tokens))
                done += len(chunk) * len(batch.index)
                yield Progress("scoring ablations", done, len(cells) * _count(self._harmful))
        for cell, total in totals.items():
            self._set(cell, bypass=total / _count(self._harmful))

    def _measure_kl(self, cells: Sequence[CandidateScore]) -> Iterator[Progress]:
        totals, done = dict.fromkeys(cells, 0.0), 0
        for batch in self._harmless:
            number = self._name_of(batch)
            left = self._recall(totals, "kl", number, cells)
            done += (len(cells) - len(left)) * len(batch.index)
            for chunk in _chunks(left, batch):
                logits = self._run(batch, chunk, "ablate").logits
                kl = kl_divergence(self._base[batch].repeat(len(chunk), 1), logits)
                self._accumulate(totals, "kl", number, chunk, kl)
                done += len(chunk) * len(batch.index)
                yield Progress("scoring damage", done, len(cells) * _count(self._harmless))
        for cell, total in totals.items():
            self._set(cell, kl=total / _count(self._harmless))

    def _name_of(self, batch: Batch) -> int:
        """Names these prompts, the candidates and the refusal tokens: sums of other ones are not theirs."""
        named = f"{self._made_from} {batch.ids.tolist()} {batch.mask.tolist()}".encode()
        return int(hashlib.sha256(named).hexdigest()[:12], 16)

    def _recall(
        self, totals: dict[CandidateScore, float], score: str, number: int, cells: Sequence[CandidateScore]
    ) -> list[CandidateScore]:
        """Adds to `totals` what is known of this batch, and gives the cells of which nothing is."""
        unknown = []
        for cell in cells:
            known = self._sums.get((score, number, cell.pos, cell.layer))
            if known is None:
                unknown.append(cell)
            else:
                totals[cell] += known
        return unknown

    def _accumulate(
        self,
        totals: dict[CandidateScore, float],
        score: str,
        number: int,
        cells: Sequence[CandidateScore],
        scores: Tensor,
    ) -> None:
        measured = [per_prompt.sum().item() for per_prompt in scores.view(len(cells), -1)]
        for cell, value in zip(cells, measured, strict=True):
            totals[cell] += value
        self._sums.note({(score, number, c.pos, c.layer): v for c, v in zip(cells, measured, strict=True)})

    def _run(self, batch: Batch, cells: Sequence[CandidateScore], kind: Kind, **what: Any) -> Output:
        """The prompts of `batch` once per cell, a row each with its own direction; `what` is as in `ChatModel.run`."""
        edits = [(Intervention(self.direction(cell), kind),) for cell in cells]
        rows = [edit for edit in edits for _ in batch.index]
        return self._model.run(batch.repeat(len(cells)), rows, **what)

    def _set(self, cell: CandidateScore, **measured: Any) -> None:
        self._table[cell.pos, cell.layer] = replace(self._table[cell.pos, cell.layer], **measured)


def least_alike(
    harmful: Float[Tensor, "harmful layer d_model"], harmless: Float[Tensor, "harmless layer d_model"]
) -> list[int]:
    """L_low: the tenth of the layers, at least one, whose means are least alike; never the first one's input."""
    alike = torch.cosine_similarity(harmful.double().mean(0), harmless.double().mean(0), dim=-1)[1:]
    n = max(1, int(LOW_SHARE * harmful.shape[1]))
    return sorted((alike.nan_to_num(2.0).argsort(stable=True)[:n] + 1).tolist())


def is_decided(total: float, left: int) -> bool:
    """Whether a mean refusal score must end below 0, from its sum so far and the number of prompts still to come.

    A sum that is not a number decides nothing: it has a rule of its own.
    """
    return total + left * HIGHEST_SCORE < 0


def _chunks(cells: Sequence[CandidateScore], batch: Batch) -> Iterator[Sequence[CandidateScore]]:
    """As many candidates at a time as fit into a forward step together with the prompts of `batch`."""
    size = max(1, BATCH_TOKENS // batch.ids.numel())
    return (cells[i : i + size] for i in range(0, len(cells), size))


def _number(score: float) -> float:
    """What is not a number is the lowest."""
    return -math.inf if math.isnan(score) else score


def _wide(x: Tensor) -> Tensor:
    """In float64 on the CPU: MPS does not have it."""
    return x.float().cpu().double()


def _add_streams(sums: dict[CandidateScore, Tensor], cells: Sequence[CandidateScore], output: Output) -> None:
    """Adds what each cell's prompts read, over all prompts and layers read."""
    assert output.resid_pre is not None
    for cell, read in zip(cells, _wide(output.resid_pre[:, -1]).chunk(len(cells)), strict=True):
        sums[cell] += read.sum((0, 1))


def _count(batches: Sequence[Batch]) -> int:
    return sum(len(batch.index) for batch in batches)
