"""Replies in progress: the rows of all visitors of a model share each step of it (continuous batching).

A step of a model costs little more for thirty rows than for three. So whoever wants a token takes along everybody
who is waiting for one: prompts that were just read join, replies that have ended leave, and each row keeps its own
interventions. Rows never see each other: what shares a step are numbers side by side.

A batch lies right-aligned in its cache: a row that is shorter is padded on the left and its padding masked, so
that batches can be cut and put together between any two steps.
"""

import copy
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from refusal_core.checkpoints import DoesNotFitError, ModelError, in_memory
from refusal_core.interventions import Row, RowEdits

MOST_ROWS = 128
"""How many rows share a step at most."""

MOST_PADDED = 2**16
"""So many positions of padding may be in a batch in any case, and as many as it has of others: what is shorter than the
longest row costs as much memory and time."""

SLICE = 2048
"""A prompt is read in steps of about so many tokens, rows and positions, so that others get their turn in between."""

PATIENCE = 0.05
"""For how many seconds a step waits for those who took part in the one before, at most; never longer than a step."""


OF_KEYS = (DynamicLayer, DynamicSlidingWindowLayer)
"""The caches of keys and values, and nothing else."""


FAILED = "A step that this reply shared with others failed, and the log says why: ask again."


class StoppedError(Exception):
    """Nobody wants the reply any more."""


class Turns:
    """A lock that is handed on in the order in which it was asked for, so that nobody is kept from it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            mine = threading.Event()
            self._waiting.append(mine)
        try:
            mine.wait()
        except BaseException:  # an interrupted wait: the turn, if it has come by now, goes to the next
            with self._lock:
                came = mine not in self._waiting
                if not came:
                    self._waiting.remove(mine)
            if came:
                self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False


@dataclass(eq=False)
class _Shared:
    """Rows that are decoded as one batch: their interventions, their cache, and which of its positions are theirs.

    `position` is that of each row's next token.
    """

    rows: list[Row]
    cache: Cache
    mask: Int[Tensor, "row pos"]
    position: Int[Tensor, "row 1"]
    edits: RowEdits = field(init=False)

    def __post_init__(self) -> None:
        self.edits = RowEdits(self.rows)

    @property
    def can_be_cut(self) -> bool:
        """Whether every layer's cache is a tensor of keys and one of values, of all tokens or of a window of them, or a
        state of each row."""
        return all(type(layer) in (*OF_KEYS, LinearAttentionLayer) for layer in self.cache.layers)

    def select(self, index: list[int]) -> "_Shared":
        """These rows alone, without the positions that are padding to all of them."""
        mask = self.mask[index]
        longest = int(mask.sum(-1).max())
        cache = _each_layer(
            [self.cache], longest, lambda tensors: tensors[0][index][:, :, -longest:], lambda states: states[0][index]
        )
        return _Shared([self.rows[i] for i in index], cache, mask[:, -longest:], self.position[index])


def _together(parts: Sequence[_Shared]) -> _Shared:
    """The rows of all parts as one batch, in this order."""
    longest = max(part.mask.shape[1] for part in parts)

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        size = max(t.shape[2] for t in tensors)
        return torch.cat([pad(t, (0, 0, size - t.shape[2], 0)) for t in tensors])

    return _Shared(
        [row for part in parts for row in part.rows],
        _each_layer([part.cache for part in parts], longest, joined, torch.cat),
        torch.cat([pad(part.mask, (longest - part.mask.shape[1], 0)) for part in parts]),
        torch.cat([part.position for part in parts]),
    )


def _each_layer(
    caches: Sequence[Cache],
    length: int,
    make: Callable[[list[Tensor]], Tensor],
    make_state: Callable[[list[Tensor]], Tensor],
) -> Cache:
    """A cache of `length` tokens, whose keys and values `make` makes from those of `caches`, layer by layer.

    What a linear attention keeps instead has no positions: `make_state` makes that.
    """
    made = copy.copy(caches[0])
    made.layers = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        layer: Any = copy.copy(layers[0])
        is_linear = isinstance(layers[0], LinearAttentionLayer)
        for name in ("conv_states", "recurrent_states") if is_linear else ():
            states = [getattr(a, name) for a in layers]
            # New dictionaries: the copied layer has those of the one it was copied from.
            made_of = {i: s if s is None else make_state([a[i] for a in states]) for i, s in states[0].items()}
            setattr(layer, name, made_of)
        # Layers that share another one's keys and values have none of their own.
        if not is_linear and layer.is_initialized:
            layer.keys, layer.values = make([a.keys for a in layers]), make([a.values for a in layers])
        if hasattr(layer, "cumulative_length"):  # a window counts the tokens that have left it, too
            layer.cumulative_length = length
        made.layers.append(layer)
    return made


def _keeps_keys(cache: Cache) -> bool:
    """Whether what the cache has of a prompt is keys and values alone, so that its rest can be read on top of them."""
    return all(type(layer) in OF_KEYS for layer in cache.layers)


class Decoding:
    """The replies to one batch of prompts, advanced one token at a time. `close` it, so that nobody waits for it."""

    def __init__(
        self,
        desk: "Desk",
        ids: Int[Tensor, "row pos"],
        mask: Int[Tensor, "row pos"],
        rows: list[Row],
        stop: threading.Event | None = None,
    ) -> None:
        self._desk = desk
        self.logits: Float[Tensor, "row d_vocab"]
        self.shared, self.logits = desk.begin(ids, mask, rows, stop)
        self.seats = {row: row for row in range(len(rows))}
        self.failure: ModelError | None = None
        desk.expect(self)

    def step(self, tokens: Sequence[int | None]) -> None:
        """Appends one token to each row; `logits` then are those of the token after it.

        None is for a row that has ended: it takes part no more, and its logits stay what they were. Raises ModelError
        if a step that was shared with other replies has failed, a DoesNotFitError if for lack of memory.
        """
        going_on = {row: token for row, token in enumerate(tokens) if token is not None and row in self.seats}
        if going_on and self.failure is None:
            self._desk.step(self, going_on)
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Says that no more tokens will be asked for."""
        self._desk.forget(self)


def _seated(decodings: Sequence[Decoding]) -> _Shared:
    """The batch of exactly the rows that have a seat in these decodings: the one they share, or one made for them."""
    tables: dict[_Shared, list[Decoding]] = {}
    for decoding in decodings:
        tables.setdefault(decoding.shared, []).append(decoding)
    parts = []
    for shared, members in tables.items():
        members.sort(key=lambda d: min(d.seats.values(), default=0))  # as they sit: then nothing has to be copied
        rows = [seat for decoding in members for seat in decoding.seats.values()]
        parts.append(shared if rows == list(range(len(shared.rows))) else shared.select(rows))
    whole = _together(parts) if len(parts) > 1 else parts[0]
    seat = itertools.count()
    for decoding in itertools.chain.from_iterable(tables.values()):
        decoding.shared, decoding.seats = whole, {row: next(seat) for row in decoding.seats}
    return whole


def _fit(decodings: Mapping[Decoding, Mapping[int, int]]) -> bool:
    """Whether these rows may share a step: not too many, nor much more padding than there are tokens."""
    sizes = [(len(rows), decoding.shared.mask.shape[1]) for decoding, rows in decodings.items()]
    n_rows, longest = sum(n for n, _ in sizes), max(length for _, length in sizes)
    n_tokens = sum(n * length for n, length in sizes)
    return n_rows <= MOST_ROWS and n_rows * longest <= 2 * n_tokens + MOST_PADDED


class Desk:
    """Where the replies of the model `name` meet; `turns` guards it, and `forward` is one step of it.

    Whoever's turn it is does the step for all who wait; the others then find theirs done. Before it starts it waits,
    no longer than a step takes, for those whose last token is only just out: they will want the next one as soon
    as they have looked at it.
    """

    def __init__(self, turns: Turns, forward: Callable[..., Any], name: str) -> None:
        self._turns, self._forward, self._name = turns, forward, name
        self._news = threading.Condition()
        self._waiting: dict[Decoding, tuple[dict[int, int], int]] = {}
        self._expected: weakref.WeakKeyDictionary[Decoding, tuple[float, int]] = weakref.WeakKeyDictionary()
        self._duration = 0.0

    def begin(
        self,
        ids: Int[Tensor, "row pos"],
        mask: Int[Tensor, "row pos"],
        rows: list[Row],
        stop: threading.Event | None = None,
    ) -> tuple[_Shared, Float[Tensor, "row d_vocab"]]:
        """Reads prompts: their rows, and the logits of each reply's first token.

        Long ones in slices, where the cache allows it. Raises StoppedError between two of them once `stop` is set.
        """
        positions, edits = (mask.cumsum(-1) - 1).clamp(min=0), RowEdits(rows)
        size, length = max(1, SLICE // len(rows)), ids.shape[1]
        cache, start, end = None, 0, min(size, length)
        while True:
            if stop is not None and stop.is_set():
                raise StoppedError
            with self._turns:
                result = self._forward(
                    edits,
                    input_ids=ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                )
            if end == length:
                break
            cache = result.past_key_values if _keeps_keys(result.past_key_values) else None
            # Another cache cannot be gone on with by more than a token: all at once then.
            start, end = (0, length) if cache is None else (end, min(end + size, length))
        shared = _Shared(rows, result.past_key_values, mask, positions[:, -1:] + 1)
        return shared, result.logits[:, -1].float().cpu()

    def expect(self, decoding: Decoding) -> None:
        """The next step waits a moment for this one."""
        with self._news:
            self._expected[decoding] = time.monotonic(), threading.get_ident()

    def forget(self, decoding: Decoding) -> None:
        """No step waits for it any more."""
        with self._news:
            self._expected.pop(decoding, None)
            self._news.notify_all()

    def step(self, decoding: Decoding, tokens: dict[int, int]) -> None:
        """Appends these tokens to rows of `decoding`, in one step with whoever else is waiting."""
        with self._news:
            self._expected.pop(decoding, None)
            self._waiting[decoding] = tokens, threading.get_ident()
            self._news.notify_all()
        try:
            with self._turns:
                if decoding in self._waiting:
                    self._advance(self._gather(decoding))
        finally:
            with self._news:
                self._waiting.pop(decoding, None)

    def _gather(self, first: Decoding) -> dict[Decoding, dict[int, int]]:
        """Whoever is waiting, after a moment for those who soon will be: `first`, and others while there is room."""
        me, patience = threading.get_ident(), min(PATIENCE, self._duration)

        def all_are_here() -> bool:
            since = time.monotonic() - patience
            return not any(thread != me and ended > since for ended, thread in self._expected.values())

        with self._news:
            self._news.wait_for(all_are_here, timeout=patience)
            taken = {first: self._waiting[first][0]}
            for other, (tokens, _) in self._waiting.items():
                fits = other is not first and _fit({**taken, other: tokens})
                if fits and first.shared.can_be_cut and other.shared.can_be_cut:
                    taken[other] = tokens
            return taken

    def _advance(self, taken: dict[Decoding, dict[int, int]]) -> None:
        """One step for all of `taken`. If it fails it has failed for each of them: their cache is half written."""
        started = time.monotonic()
        for decoding, tokens in taken.items():
            decoding.failure = ModelError(FAILED)
            if decoding.shared.can_be_cut:
                decoding.seats = {row: seat for row, seat in decoding.seats.items() if row in tokens}
        try:
            with in_memory(self._name):
                shared = _seated(list(taken))
            ids = shared.mask.new_zeros(len(shared.rows), 1)
            for decoding, tokens in taken.items():
                for row, token in tokens.items():
                    ids[decoding.seats[row]] = token
            shared.mask = torch.cat([shared.mask, torch.ones_like(ids)], dim=1)
            result = self._forward(
                shared.edits,
                input_ids=ids,
                attention_mask=shared.mask,
                position_ids=shared.position,
                past_key_values=shared.cache,
            )
            shared.cache, shared.position = result.past_key_values, shared.position + 1
            logits = result.logits[:, -1].float().cpu()
            for decoding, tokens in taken.items():
                decoding.logits = decoding.logits.clone()
                decoding.logits[list(tokens)] = logits[[decoding.seats[row] for row in tokens]]
                decoding.failure = None
        except DoesNotFitError as error:
            for decoding in taken:
                decoding.failure = DoesNotFitError(str(error))  # this one holds what there was no room for
            raise
        finally:
            ended = time.monotonic()
            self._duration = ended - started
            with self._news:
                for decoding in taken:
                    _, thread = self._waiting.pop(decoding)
                    self._expected[decoding] = ended, thread
