"""Inside the model: where the stream lies along r̂, which parts write it there, and which words it raises.

    reading[l, p] = x[l, p] · r̂                        the stream at the input of every block, at every token
    x[l] · r̂     = Σ w · r̂   over the writers below l   the embedding, each attention (the sum of its heads), each MLP;
                                                        each times the scales of the blocks it passes (Gemma 4)
    words         = W_U r̂   or   W_U norm(‖r‖ r̂)      the logits that the direction raises and lowers

What a part writes along r̂ is correlation (direct attribution). The causal check is activation patching: in the run of
a harmful prompt one part is made to write, at the template's tokens, what it wrote for a harmless prompt; what that
does to the refusal score is the part's effect. (The note that preceded Arditi et al. 2024 began with it.) To first
order it is had for all parts at once, from one forward and one backward step (attribution patching; Nanda 2023):

    effect ≈ Σ over positions of ∂score/∂w · (w harmful − w harmless)       for a head: z instead of w
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from refusal_core.chat_model import Batch, ChatModel, Conversation, Output
from refusal_core.directions import Direction
from refusal_core.interventions import Intervention, Row
from refusal_core.metrics import refusal_score
from refusal_core.prompts import PromptError
from refusal_core.selection import Progress

BATCH_TOKENS = 4096
GRADIENT_TOKENS = 1024
"""Tokens of a batch whose activations are all kept for the backward step."""

MOST_READ = 2**27
"""So many numbers of the stream are kept at a time, where only their projection is asked for."""

N_PAIRS = 16


@dataclass(frozen=True, eq=False)
class Reading:
    """x[l, p] · r̂ of one text, in units of the stream, with its tokens as text."""

    tokens: tuple[str, ...]
    along: Float[Tensor, "layer pos"]


def read_along(
    model: ChatModel,
    conversations: Sequence[Conversation],
    direction: Direction,
    replies: Sequence[Sequence[int]] | None = None,
    rows: Sequence[Row] | None = None,
    layers: Sequence[int] | None = None,
) -> list[Reading]:
    """A `Reading` of each rendered conversation, with the token ids of a reply after it if there is one.

    Of every layer, or of `layers` in rising order. `rows` are the interventions under which it is read. After ablation at
    strength 1 the reading is zero by construction: what is to mean something is read by the untouched model. Raises PromptError and ModelError as
    `ChatModel.logits` does.
    """
    _check(model, direction)
    if not conversations or (layers is not None and not layers):
        return []
    batch = model.continued(conversations, replies or [()] * len(conversations))
    wanted = range(model.n_layers) if layers is None else layers
    # Of a long prompt a few layers at a time: their whole stream would fill the memory, to be projected on one vector.
    n = max(1, MOST_READ // (batch.ids.numel() * model.d_model))
    parts = []
    for start in range(0, len(wanted), n):
        output = model.run(batch, rows, read=slice(None), read_layers=wanted[start : start + n])
        assert output.resid_pre is not None
        parts.append((output.resid_pre.float() @ direction.unit.to(output.resid_pre.device)).cpu())
    along = torch.cat(parts, dim=-1)
    readings = []
    for row, mask, ids in zip(along, batch.mask.bool().cpu(), batch.ids.cpu(), strict=True):
        tokens = tuple(str(model.tokenizer.decode([token])) for token in ids[mask].tolist())
        readings.append(Reading(tokens, row[mask].T))
    return readings


@dataclass(frozen=True)
class Words:
    """Tokens whose logits a direction changes most, with the change: the largest first, and the smallest first."""

    raised: tuple[tuple[str, float], ...]
    lowered: tuple[tuple[str, float], ...]


def words(model: ChatModel, direction: Direction, *, final_norm: bool, n: int = 20) -> Words:
    """What `direction` says through the unembedding: of r̂ itself, or of ‖r‖ r̂ after the final norm.

    Raises ModelError for a direction of another model.
    """
    _check(model, direction)
    logits = model.unembed(direction.unit * (direction.norm if final_norm else 1.0), final_norm=final_norm)

    def extreme(largest: bool) -> tuple[tuple[str, float], ...]:
        values, tokens = logits.topk(min(n, len(logits)), largest=largest)
        return tuple(
            (str(model.tokenizer.decode([t])), v) for t, v in zip(tokens.tolist(), values.tolist(), strict=True)
        )

    return Words(extreme(True), extreme(False))


@dataclass(frozen=True, eq=False)
class Writers:
    """What each part writes along r̂ at the direction's position: the mean over harmful minus that over harmless prompts.

    `along` is in units of ‖r‖, carried to the direction's layer, and in the order of `ChatModel.writers`; those below
    that layer sum to 1 if the prompts are the ones it was made from. `heads` splits the attentions; None where heads
    cannot be told apart.
    """

    names: tuple[str, ...]
    along: Float[Tensor, " writer"]
    heads: Float[Tensor, "layer head"] | None


def write_along(
    model: ChatModel, harmful: Sequence[Conversation], harmless: Sequence[Conversation], direction: Direction
) -> Writers:
    """Direct attribution of `direction` over two lists of prompts.

    Raises PromptError as `ChatModel.render` does, for an empty list and a prompt in which the direction's position is not,
    and ModelError for a direction of another model.
    """
    _check(model, direction)
    _not_empty(harmful, harmless)
    position = (direction.source.position,)
    sums: list[Tensor] = []
    head_sums: list[Tensor] = []
    for prompts in (harmful, harmless):
        total, head_total = torch.zeros(len(model.writers)), torch.zeros(())
        for batch in model.batches(prompts, BATCH_TOKENS):
            if int(batch.mask.sum(-1).min()) < -position[0]:
                raise PromptError(
                    f"A prompt has no position {position[0]}, where the direction was read: leave it out."
                )
            output = model.run(batch, read_writes=position)
            assert output.writes is not None
            total = total + (output.writes[:, 0].float() @ direction.unit.to(output.writes.device)).sum(0).cpu()
            if output.head_inputs is not None:
                head_total = head_total + model.heads_along(output.head_inputs, direction.unit)[:, 0].sum(0)
        sums.append(total / len(prompts))
        head_sums.append(head_total / len(prompts))
    carried = model.carried_to(direction.source.layer)
    along = carried * (sums[0] - sums[1]) / direction.norm
    heads = (head_sums[0] - head_sums[1]) / direction.norm
    if not heads.ndim:
        return Writers(model.writers, along, None)
    attentions = [i for i, name in enumerate(model.writers) if name.startswith("attention")]
    return Writers(model.writers, along, carried[attentions, None] * heads)


@dataclass(frozen=True, eq=False)
class Patching:
    """The effect of each part: how far the refusal score falls when it does what it did for a harmless prompt.

    Means over `n_pairs` pairs, in log-odds, in the order of `names`; `harmful` and `harmless` are the mean scores of
    the unpatched runs, so that the effect of everything together would be their difference.
    """

    names: tuple[str, ...]
    effect: Float[Tensor, " part"]
    harmful: float
    harmless: float
    n_pairs: int


@dataclass(frozen=True, eq=False)
class Attribution:
    """`Patching` to first order, of every writer in the order of `ChatModel.writers`, and of every head.

    Means over `n_pairs` pairs, in log-odds; `harmful` and `harmless` as there. The heads of a layer sum to its
    attention; None where heads cannot be told apart.
    """

    names: tuple[str, ...]
    effect: Float[Tensor, " writer"]
    heads: Float[Tensor, "layer head"] | None
    harmful: float
    harmless: float
    n_pairs: int


def attribute_writers(
    model: ChatModel,
    harmful: Sequence[Conversation],
    harmless: Sequence[Conversation],
    refusal_tokens: Sequence[int],
    n_pairs: int = N_PAIRS,
) -> Attribution:
    """Attribution patching of every writer and head, at the template's tokens, over the pairs of `patch_parts`.

    Raises PromptError as `ChatModel.render` does, and without a pair.
    """
    pairs = list(zip(harmful, harmless, strict=False))[:n_pairs]
    _not_empty(pairs)
    positions = range(-model.template_positions, 0)
    effect, heads, scores = torch.zeros(len(model.writers)), torch.zeros(()), torch.zeros(2, dtype=torch.float64)
    for batch in model.batches([bad for bad, _ in pairs], GRADIENT_TOKENS):
        told = model.gradients(batch, lambda logits: refusal_score(logits, refusal_tokens), positions)
        clean = _clean_run(model, [pairs[i][1] for i in batch.index], positions)
        assert clean.writes is not None
        scores += torch.stack([told.numbers.sum(), refusal_score(clean.logits.cpu(), refusal_tokens).sum()])
        effect += (told.by_write * (told.writes - clean.writes.float().cpu())).sum((0, 1, 3))
        if told.head_inputs is not None and told.by_head_input is not None and clean.head_inputs is not None:
            parts = zip(told.by_head_input, told.head_inputs, clean.head_inputs, strict=True)
            moved = torch.stack([(g * (z - c.float().cpu())).sum((0, 1)) for g, z, c in parts])
            heads = heads + moved.unflatten(-1, (model.n_heads, -1)).sum(-1)
    mean = scores / len(pairs)
    of_heads = heads / len(pairs) if heads.ndim else None
    return Attribution(model.writers, effect / len(pairs), of_heads, mean[0].item(), mean[1].item(), len(pairs))


def _check(model: ChatModel, direction: Direction) -> None:
    model.check_rows([Intervention(direction, "ablate")], 1)


def _not_empty(*prompts: Sequence[object]) -> None:
    if not all(prompts):
        raise PromptError("What parts do is a mean over prompts of both classes, and one has none: add some.")


def _clean_run(model: ChatModel, prompts: Sequence[Conversation], positions: Sequence[int]) -> Output:
    """What every part did for `prompts`, in their order."""
    return model.run(model.continued(prompts, [()] * len(prompts)), read_writes=positions)


def patch_parts(
    model: ChatModel,
    harmful: Sequence[Conversation],
    harmless: Sequence[Conversation],
    refusal_tokens: Sequence[int],
    n_pairs: int = N_PAIRS,
    stop: threading.Event | None = None,
    parts: Sequence[str] | None = None,
) -> Iterator[Progress | Patching]:
    """Activation patching of some of `ChatModel.parts` (None: all), at the template's tokens; yields `Progress` and, last, `Patching`.

    A writer writes what it wrote for the harmless prompt; a head hands on the z that it handed on there. The prompts are paired in order; setting `stop` ends the iteration early. Raises PromptError as `ChatModel.render` does,
    and without a pair.
    """
    pairs = list(zip(harmful, harmless, strict=False))[:n_pairs]
    _not_empty(pairs)
    positions = range(-model.template_positions, 0)
    names = model.parts if parts is None else tuple(parts)
    numbers = [model.parts.index(name) for name in names]
    effect, scores = torch.zeros(len(names), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for done, (bad, good) in enumerate(pairs):
        (source,) = model.batches([good])
        (target,) = model.batches([bad])
        clean = model.run(source, read_writes=positions)
        assert clean.writes is not None
        base = [refusal_score(output.logits.cpu(), refusal_tokens) for output in (model.run(target), clean)]
        scores += torch.cat(base)
        for start, end in _ranges(target, len(numbers)):
            patches = [(part, _done_by(model, clean, part)) for part in numbers[start:end]]
            if stop is not None and stop.is_set():
                return
            patched = model.run(target.repeat(len(patches)), patches=patches)
            effect[start:end] += base[0] - refusal_score(patched.logits.cpu(), refusal_tokens)
        yield Progress("patching parts", done + 1, len(pairs))
        if stop is not None and stop.is_set():
            return
    mean = scores / len(pairs)
    yield Patching(names, effect / len(pairs), mean[0].item(), mean[1].item(), len(pairs))


def _done_by(model: ChatModel, output: Output, part: int) -> Float[Tensor, "pos size"]:
    """What a part did in a run of one prompt: a writer's write, or a head's z."""
    assert output.writes is not None
    if part < len(model.writers):
        return output.writes[0, :, part]
    layer, head = divmod(part - len(model.writers), model.n_heads)
    assert output.head_inputs is not None
    return output.head_inputs[layer][0].unflatten(-1, (model.n_heads, -1))[:, head]


def _ranges(batch: Batch, n: int) -> Iterator[tuple[int, int]]:
    """Ranges of `n` rows that fit into a forward step each."""
    size = max(1, BATCH_TOKENS // batch.ids.numel())
    for start in range(0, n, size):
        yield start, min(n, start + size)
