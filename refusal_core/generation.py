"""Replies streamed side by side from one batch: the same prompt, each row with its own interventions.

    token = argmax_v ( logits_v / T + g_v ),   g ~ Gumbel(0, 1), one draw per step for all rows

With T = 0 the most likely token is taken (greedy). Above 0 the rows share one stream of noise, so that two rows
differ only where their distributions do: a difference between panes is the direction, not luck.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from refusal_core.chat_model import ChatModel, Conversation
from refusal_core.checkpoints import DoesNotFitError
from refusal_core.decoding import Decoding, StoppedError
from refusal_core.interventions import Intervention, Row

Ending = Literal["end", "length", "stopped", "memory", "filtered"]
"""By itself, at the longest, by somebody, for lack of memory, and by the filter of a server, which then replies instead
of the model."""
MAX_NEW_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Step:
    """All replies after one more token each.

    `texts` are the whole replies so far; `tokens` are the tokens just added, None for a row that had ended;
    `finished` says how each row ended, None while it goes on. `logits` are those the tokens were chosen from.
    """

    index: int
    tokens: tuple[int | None, ...]
    texts: tuple[str, ...]
    finished: tuple[Ending | None, ...]
    logits: Float[Tensor, "row d_vocab"]

    def most_likely(self, n: int) -> list[list[tuple[int, float]]]:
        """The `n` most likely tokens of each row before sampling, with their probabilities, the likeliest first."""
        shares, tokens = self.logits.double().softmax(-1).topk(n)
        return [list(zip(t, s, strict=True)) for t, s in zip(tokens.tolist(), shares.tolist(), strict=True)]


def stream_side_by_side(
    model: ChatModel,
    conversations: Sequence[Conversation],
    rows: Sequence[Row | Intervention | None],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    stop: threading.Event | None = None,
) -> Iterator[Step]:
    """Yields a `Step` per token until every row has ended, by itself, by length, or because `stop` was set.

    Where the next token does not fit into memory any more, what has been said so far is all.

    The model is held for one token at a time, so streams of several users take turns. Raises ValueError for a
    number out of range, PromptError and ModelError as `ChatModel.begin` does, all before the first step.
    """
    if not 1 <= max_new_tokens <= MAX_NEW_TOKENS:
        raise ValueError(f"A reply has 1 to {MAX_NEW_TOKENS} new tokens, not {max_new_tokens}.")
    if not 0 <= temperature <= 5:
        raise ValueError(f"The temperature is between 0 and 5, not {temperature}.")
    noise = torch.Generator().manual_seed(int(seed))
    if not conversations or (stop is not None and stop.is_set()):
        return
    limits = [min(max_new_tokens, model.n_ctx - len(model.render(c))) for c in conversations]
    try:
        decoding = model.begin(conversations, rows, stop)
    except StoppedError:
        return
    try:
        yield from _steps(model, decoding, limits, temperature, noise, stop)
    finally:
        decoding.close()


def _steps(
    model: ChatModel,
    decoding: Decoding,
    limits: Sequence[int],
    temperature: float,
    noise: torch.Generator,
    stop: threading.Event | None,
) -> Iterator[Step]:
    replies: list[list[int]] = [[] for _ in decoding.logits]
    finished: list[Ending | None] = [None] * len(replies)
    for index in range(max(limits)):
        added = [
            token if ending is None else None
            for token, ending in zip(_choose_tokens(decoding.logits, temperature, noise), finished, strict=True)
        ]
        for row, token in enumerate(added):
            if token in model.end_tokens:
                finished[row], added[row] = "end", None
            elif token is not None:
                replies[row].append(token)
                finished[row] = "length" if index + 1 == limits[row] else None
        if stop is not None and stop.is_set():
            finished = [ending or "stopped" for ending in finished]
        texts = tuple(
            _decode(model, reply, ending is not None) for reply, ending in zip(replies, finished, strict=True)
        )
        yield Step(index, tuple(added), texts, tuple(finished), decoding.logits)
        if all(finished):
            return
        fits = True
        try:
            decoding.step([None if ending else token for token, ending in zip(added, finished, strict=True)])
        except DoesNotFitError:
            fits = False
        if not fits:
            finished = [ending or "memory" for ending in finished]
            yield Step(index + 1, (None,) * len(finished), texts, tuple(finished), decoding.logits)
            return


def _choose_tokens(logits: Float[Tensor, "row d_vocab"], temperature: float, noise: torch.Generator) -> list[int]:
    if temperature == 0:
        return logits.argmax(-1).tolist()
    uniform = torch.rand(logits.shape[-1], generator=noise, dtype=torch.float64).clamp(min=1e-300)
    return (logits.double() / temperature - (-uniform.log()).log()).argmax(-1).tolist()


def _decode(model: ChatModel, reply: list[int], whole: bool) -> str:
    """The text of `reply`; a character of which only some bytes have arrived waits for the others."""
    text = str(model.tokenizer.decode(reply, skip_special_tokens=True))
    return text if whole else text.rstrip("\ufffd")
