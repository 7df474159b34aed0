"""Interventions along one direction r = ‖r‖ r̂ of the residual stream (Arditi et al. 2024).

    ablate   x ← x − s (x·r̂) r̂     forget what the stream says along r̂ (s = 1: all of it)
    add      x ← x + s ‖r‖ r̂       say it, whatever the prompt (s = −1: say the opposite)

An intervention is a value: it knows what to do and where, and holds neither model nor state.
Where it acts follows from its kind. Ablation guards everything that is written to the stream (the
embedding, each attention output, each MLP output, in every layer), or only some of those writes where
it names them; addition acts once, at the `resid_pre` of the layer its direction was read from. Both act
at every position, prompt and reply alike.

An attention writes Σ z_h W_h + b, the sum of what its heads do; removed from some of its heads it writes that without
s ((Σ z_h W_h) · r̂) r̂, the sum over those.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from refusal_core.directions import Direction

Kind = Literal["ablate", "add"]


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit of the residual stream: `kind` along `direction`, `scale` times the paper's amount.

    `writers` are names of `ChatModel.parts` to which an ablation is confined; None is all writers, as in the paper.
    Raises ValueError for an unknown kind, a scale that is not finite, and an addition with writers: it is no write.
    """

    direction: Direction
    kind: Kind
    scale: float = 1.0
    writers: frozenset[str] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"An intervention is one of {get_args(Kind)}, not {self.kind!r}.")
        if not math.isfinite(self.scale):
            raise ValueError(f"The scale of an intervention is a finite number, not {self.scale}.")
        if self.kind == "add" and self.writers is not None:
            raise ValueError("An addition acts once, at its layer's input: only an ablation is confined to writers.")

    def __call__(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """`x` after the edit: the formula above, out of place; `x` itself where the scale is 0."""
        if self.scale == 0:
            return x
        r = self.direction.unit.to(x.device)
        if self.kind == "ablate":
            return _ablate(x, r, -self.scale * r)
        return _add(x, self.scale * self.direction.norm * r)


_HEAD = re.compile(r"head (\d+)\.(\d+)")


def head_name(layer: int, head: int) -> str:
    """What an attention head is called among the parts of a model: “head 5.3” is the fourth of block 5."""
    return f"head {layer}.{head}"


Row = tuple[Intervention, ...]
"""What is done to one row of a batch, in order; the empty tuple is the baseline."""


def as_row(row: Row | Intervention | None) -> Row:
    """The interventions of `row` that do something: scale 0 is dropped, so that it is bit-identical to nothing.

    So is an ablation that is confined to no writer at all. Raises ValueError for one of several ablations that is
    confined to heads: of what heads do together, nobody knows the parts after the first.
    """
    row = () if row is None else (row,) if isinstance(row, Intervention) else row
    row = tuple(i for i in row if i.scale != 0 and i.writers != frozenset())
    ablations = [i for i in row if i.kind == "ablate"]
    if len(ablations) > 1 and any(_HEAD.fullmatch(name) for i in ablations for name in i.writers or ()):
        raise ValueError("An ablation that is confined to heads is the only one of its row.")
    return row


def _ablate(
    x: Float[Tensor, "... d_model"], r: Float[Tensor, "... d_model"], minus_sr: Float[Tensor, "... d_model"]
) -> Float[Tensor, "... d_model"]:
    """`x` with −s r̂ (x·r̂) added."""
    wide = _wide(x)
    r, minus_sr = r.to(wide.dtype), minus_sr.to(wide.dtype)
    return torch.addcmul(wide, (wide * r).sum(-1, keepdim=True), minus_sr).to(x.dtype)


def _add(x: Float[Tensor, "... d_model"], r: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    return (_wide(x) + r).to(x.dtype)


def _wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In float32 or more: bf16 would leave a visible rest of the direction behind."""
    return x if x.dtype == torch.float64 else x.float()


class RowEdits:
    """The interventions of a whole batch, stacked so that one operation serves all rows that need it.

    Rows without an intervention are never touched: their numbers stay bit-identical to a run without edits.
    Everything is out of place, so nobody who holds an activation sees it change.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.n_rows = len(rows)
        named = {part for row in rows for i in row for part in i.writers or () if not _HEAD.fullmatch(part)}
        self._everywhere = _stack_ablations(rows, None)
        self._ablations = {writer: _stack_ablations(rows, writer) for writer in named}
        self._additions = {layer: _stack_additions(rows, layer) for layer in _addition_layers(rows)}
        self._heads = {layer: _HeadEdit(mine) for layer, mine in _heads_by_layer(rows).items()}

    @property
    def ablates(self) -> bool:
        """Whether any row is edited at a write as a whole: heads are where their matrix is."""
        return bool(self._everywhere or self._ablations)

    def at_write(self, x: Float[Tensor, "row pos d_model"], writer: str) -> Float[Tensor, "row pos d_model"]:
        """`x`, about to be written to the residual stream by `writer`, with each row's ablations applied in order."""
        for edit in self._ablations.get(writer, self._everywhere):
            index, r, minus_sr = edit.on(x.device)
            x = _replace_rows(x, index, _ablate(_pick_rows(x, index), r, minus_sr))
        return x

    def at_heads(
        self,
        x: Float[Tensor, "row pos d_model"],
        z: Float[Tensor, "row pos heads_x_d_head"],
        layer: int,
        matrix: Callable[[], Float[Tensor, "d_model heads_x_d_head"]],
        n_heads: int,
    ) -> Float[Tensor, "row pos d_model"]:
        """`x`, what the heads of `layer` make of `z` through their `matrix`, without what each row takes from some of them."""
        if layer not in self._heads:
            return x
        index, inputs, minus_sr = self._heads[layer].on(x.device, matrix, n_heads)
        wide = _wide(_pick_rows(x, index))
        along = (_wide(_pick_rows(z, index)) * inputs.to(wide.dtype)).sum(-1, keepdim=True)
        return _replace_rows(x, index, torch.addcmul(wide, along, minus_sr.to(wide.dtype)).to(x.dtype))

    def at_resid_pre(self, layer: int, x: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos d_model"]:
        """`x`, the input of block `layer`, with each row's additions that belong there."""
        if layer not in self._additions:
            return x
        index, vectors = self._additions[layer].on(x.device)
        return _replace_rows(x, index, _add(_pick_rows(x, index), vectors))


class _Edit:
    """Some rows of a batch and the vectors "row 1 d_model" of their edit, brought once to each device that asks."""

    def __init__(self, rows: Sequence[int], *vectors: Tensor) -> None:
        self._tensors = (torch.tensor(rows), *vectors)
        self._at: dict[torch.device, tuple[Tensor, ...]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The rows' numbers and the vectors."""
        if device not in self._at:
            self._at[device] = tuple(t.to(device) for t in self._tensors)
        return self._at[device]


class _HeadEdit:
    """The rows whose ablation is confined to some heads of a layer, and what these heads write along each one's r̂."""

    def __init__(self, rows: dict[int, tuple[Intervention, list[int]]]) -> None:
        self._rows = rows
        self._edit: _Edit | None = None

    def on(
        self, device: torch.device, matrix: Callable[[], Float[Tensor, "d_model heads_x_d_head"]], n_heads: int
    ) -> tuple[Tensor, ...]:
        """The rows' numbers, W r̂ with zeros for other heads ("row 1 heads_x_d_head"), and −s r̂; the matrix is asked for once."""
        if self._edit is None:
            w = _wide(matrix())
            units = torch.stack([i.direction.unit for i, _ in self._rows.values()])
            inputs = (units.to(w) @ w).unflatten(-1, (n_heads, -1))
            chosen = torch.zeros(len(units), n_heads, 1, device=w.device)
            for row, (_, heads) in enumerate(self._rows.values()):
                chosen[row, heads] = 1
            scales = torch.tensor([float(i.scale) for i, _ in self._rows.values()])[:, None, None]
            self._edit = _Edit(list(self._rows), (inputs * chosen).flatten(1)[:, None], -scales * units[:, None])
        return self._edit.on(device)


def _heads_by_layer(rows: Sequence[Row]) -> dict[int, dict[int, tuple[Intervention, list[int]]]]:
    """Layer by layer, the rows that take a direction from some heads alone; not where their whole attention is named."""
    found: dict[int, dict[int, tuple[Intervention, list[int]]]] = {}
    for row, interventions in enumerate(rows):
        for i in interventions:
            for part in sorted(i.writers or ()):
                head = _HEAD.fullmatch(part)
                if head is not None and i.writers is not None and f"attention {head[1]}" not in i.writers:
                    found.setdefault(int(head[1]), {}).setdefault(row, (i, []))[1].append(int(head[2]))
    return found


def _stack_ablations(rows: Sequence[Row], writer: str | None) -> list[_Edit]:
    """One edit with r̂ and −s r̂ per round: ablations of one row need not commute.

    Of `writer` those that act there; of None, a writer that nobody names, those that act everywhere.
    """
    ablations = [[i for i in row if i.kind == "ablate" and (i.writers is None or writer in i.writers)] for row in rows]
    rounds = []
    for turn in range(max(map(len, ablations), default=0)):
        index = [row for row, mine in enumerate(ablations) if turn < len(mine)]
        mine = [ablations[row][turn] for row in index]
        units = torch.stack([i.direction.unit for i in mine])[:, None]
        scales = torch.tensor([float(i.scale) for i in mine])[:, None, None]
        rounds.append(_Edit(index, units, -scales * units))
    return rounds


def _addition_layers(rows: Sequence[Row]) -> set[int]:
    return {i.direction.source.layer for row in rows for i in row if i.kind == "add"}


def _stack_additions(rows: Sequence[Row], layer: int) -> _Edit:
    """The rows with an addition at `layer` and the sum of each row's vectors there."""
    vectors: dict[int, Tensor] = {}
    for index, row in enumerate(rows):
        for i in row:
            if i.kind == "add" and i.direction.source.layer == layer:
                vector = float(i.scale) * i.direction.norm * i.direction.unit
                vectors[index] = vectors[index] + vector if index in vectors else vector
    return _Edit(list(vectors), torch.stack(list(vectors.values()))[:, None])


def _pick_rows(x: Float[Tensor, "row pos d_model"], index: Int[Tensor, " some"]) -> Float[Tensor, "some pos d_model"]:
    return x if len(index) == len(x) else x.index_select(0, index)


def _replace_rows(
    x: Float[Tensor, "row pos d_model"], index: Int[Tensor, " some"], y: Float[Tensor, "some pos d_model"]
) -> Float[Tensor, "row pos d_model"]:
    return y if len(index) == len(x) else x.index_copy(0, index, y)
