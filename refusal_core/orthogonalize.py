"""An intervention written into the weights: an ordinary checkpoint, in which no hook has anything left to do.

    ablation         every tensor that writes to the stream without r̂ (`weights.without`): the ablation, exactly
    norm-preserving  the same, each writing vector scaled back to its norm (`weights.with_norms_kept`): nothing can be
                     written along r̂, exactly; everything else is longer than with hooks, so it approximates the ablation
    projected        the ablation of r − (r·μ̂) μ̂, μ the mean harmless activation where r was read: exactly the ablation of
                     that direction, an approximation to r's; `projected-norm-preserving` keeps the norms as well
    addition         b ← b + s ‖r‖ r̂, b the bias of the MLP whose block ends where r was read: the addition, exactly

The tensors are the embeddings of tokens and positions, each attention output and each MLP output, each expert's in a
mixture, and each per-layer embedding's output (Gemma 4). Never the unembedding: where it is tied to the embedding it is
untied first, or the edit would reach the logits too. A checkpoint is edited tensor by tensor, one shard in memory at a
time, in float32, and written back in its own precision; to be compared, it is read block by block from its files.
"Exactly" is up to the rounding of that precision. Where a norm stands after attention or MLP (Gemma 2 to 4, OLMo 2) the
edit is made as what comes out of the norm needs it (`weights`): exactly nothing is written along r̂ there either, but the
norm divides by another number than with hooks, so the weights approximate the ablation, and the export says so.

Every export is measured against the hooks on prompts that the direction has not seen (Arditi et al. 2024, §4.1).
"""

import contextlib
import functools
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from refusal_core.chat_model import ChatModel, ModelError
from refusal_core.checkpoints import remove_left_behind, weights_in
from refusal_core.directions import Direction, project
from refusal_core.interventions import Intervention
from refusal_core.metrics import kl_divergence, refusal_probability
from refusal_core.prompts import load_prompts
from refusal_core.selection import derive_refusal_tokens
from refusal_core.weights import (
    EMBEDDING,
    FUSED,
    UNEMBEDDING,
    covers_every_write,
    mlp_bias,
    with_norms_kept,
    without,
    writer_of,
    writes_along,
)

Variant = Literal["ablation", "norm-preserving", "projected", "projected-norm-preserving", "addition"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
NEEDS_MEAN: tuple[Variant, ...] = ("projected", "projected-norm-preserving")

PIECE = 2**24
"""So many numbers of a tensor are changed at a time, in float32."""

N_HELD_OUT = 16
EXACT = 1e-2
"""An export whose logits differ from the hooks' by less is the intervention up to rounding."""


@dataclass(frozen=True, eq=False)
class Edit:
    """What is written into the weights: a variant of the removal of `direction`, or its addition, `strength` times.

    `harmless_mean` is that of the harmless activations where the direction was read (`Found.harmless_mean`). Raises
    ModelError where a projected variant has none, and for a strength of anything but an addition.
    """

    direction: Direction
    variant: Variant = "ablation"
    strength: float = 1.0
    harmless_mean: Float[Tensor, " d_model"] | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"A variant is one of {VARIANTS}, not {self.variant!r}.")
        if self.variant in NEEDS_MEAN and self.harmless_mean is None:
            raise ModelError(
                f"The variant {self.variant!r} needs the mean of the harmless activations where the direction was read, "
                "which a saved direction does not hold: take it from the search that found the direction, or find it anew."
            )
        if self.variant != "addition" and self.strength != 1:
            raise ModelError(f"A strength belongs to an addition: the variant {self.variant!r} removes all or nothing.")

    @functools.cached_property
    def written(self) -> Direction:
        """The direction that is removed or added: the given one, projected where the variant says so."""
        if self.variant not in NEEDS_MEAN:
            return self.direction
        assert self.harmless_mean is not None
        source = self.direction.source
        return project(self.direction, self.harmless_mean, f"mean of {source.n_harmless} harmless prompts")

    @property
    def hooks(self) -> Intervention:
        """The intervention that the weights are to be."""
        return self._of(self.written)

    @property
    def paper(self) -> Intervention:
        """The intervention of the paper along the direction as it was read: the same but for a projected one."""
        return self._of(self.direction)

    def _of(self, direction: Direction) -> Intervention:
        if self.variant == "addition":
            return Intervention(direction, "add", self.strength)
        return Intervention(direction, "ablate")


@dataclass(frozen=True)
class ExportReport:
    """What was written, how far it is from the hooks, and what it does.

    `max_logit_difference` is over all logits of the first tokens of replies to `n_prompts` prompts that the direction
    has not seen, half of each class, between the weights and hooks of the same direction; `max_difference_from_paper`
    from hooks of the direction as it was read, another one where it was projected, `cosine` to each other.
    `same_first_token` is the share of them with the same most likely token; `edited` counts tensors. `kl` is the mean
    over the harmless ones against the unchanged model, in nats; `refusing` the share of the harmful ones that start like a
    refusal more likely than not, beside that of the unchanged model and of the hooks, by `refusal_tokens`; NaN without any.
    """

    path: str
    edited: int
    n_prompts: int
    max_logit_difference: float
    same_first_token: float
    variant: Variant
    strength: float
    max_difference_from_paper: float
    cosine: float
    kl: float
    kl_of_hooks: float
    refusing: float
    refusing_unchanged: float
    refusing_with_hooks: float
    refusal_tokens: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether the weights are the intervention up to rounding, or an approximation of it."""
        return self.max_logit_difference < EXACT

    @property
    def in_words(self) -> str:
        """All of it in a few sentences."""
        return (
            f"{self.path}: {self.variant}, {self.edited} tensors edited. Over {self.n_prompts} prompts the logits differ "
            f"from the hooks' by at most {self.max_logit_difference:.2e} "
            f"({'exact up to rounding' if self.exact else 'an approximation'}), and {self.same_first_token:.0%} of the first "
            f"tokens are the same. KL on harmless prompts {self.kl:.4f} nats (hooks {self.kl_of_hooks:.4f}); of the replies "
            f"to harmful ones, {self.refusal}."
        )

    @property
    def refusal(self) -> str:
        """How many harmful prompts start like a refusal, in words."""
        if not self.refusal_tokens:
            return "how many start like a refusal is not known, for no token stands out as the beginning of one"
        return (
            f"{self.refusing:.0%} start like a refusal (unchanged {self.refusing_unchanged:.0%}, with hooks "
            f"{self.refusing_with_hooks:.0%})"
        )


def orthogonalize(
    model: ChatModel,
    direction: Direction,
    *,
    variant: Variant = "ablation",
    harmless_mean: Float[Tensor, " d_model"] | None = None,
    strength: float = 1.0,
) -> ChatModel:
    """A model whose weights cannot write `direction`, or another `variant` of it; the given one stays as it is.

    Raises ModelError for a direction of another model, for a family whose writers are not known by name, for an addition
    where there is no bias to take it, for a model in 4 bits, and as `Edit` does.
    """
    edit = Edit(direction, variant, strength, harmless_mean)
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "edited"
        path.mkdir()
        _write_checkpoint(model, edit, path)
        edited = model.load_beside(path)
        if "disk" in edited.places:  # its blocks are read from there
            weakref.finalize(edited, stack.pop_all().close)
    edited.name = f"{model.name}, {'orthogonalised' if variant == 'ablation' else variant}"
    return edited


def export(
    model: ChatModel,
    direction: Direction,
    path: str | Path,
    *,
    variant: Variant = "ablation",
    harmless_mean: Float[Tensor, " d_model"] | None = None,
    strength: float = 1.0,
    refusal_tokens: Sequence[int] | None = None,
) -> ExportReport:
    """Writes the edited model to `path` as an ordinary checkpoint, with a card that says what it is and how exact.

    `refusal_tokens` default to those that the held-out prompts show. The folder appears as a whole or not at all, even
    if the process is killed. Raises ModelError as `orthogonalize` does, if `path` exists, and if it cannot be written.
    """
    edit, path = Edit(direction, variant, strength, harmless_mean), Path(path)
    with _whole(path) as made:
        n_edited = _write_checkpoint(model, edit, made)
        edited = model.load_beside(made, on_disk=True)
        report = _measure(model, edit, edited, n_edited, path, refusal_tokens)
        (made / "README.md").write_text(_card(model, edit, report), "utf-8")
    return report


# -- files -----------------------------------------------------------------------------------------------------------


def check_new(path: Path) -> None:
    """Raises ModelError if there is something where an edited model is to be written."""
    if path.exists():
        raise ModelError(f"{path} exists already: name a new folder for the edited model.")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A folder beside `path` that becomes `path` when the block ends well, with every byte on the disk before that.

    What a process that was killed has left beside it is removed. Raises ModelError if `path` exists or cannot be written.
    """
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_left_behind(path.parent, re.escape(f".{path.name}-") + r"(\d+)-\w+\.part")
        made = path.parent / f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}.part"
        made.mkdir()
        try:
            yield made
            for file in made.iterdir():
                # safetensors writes files that only their owner can read: not the user that a server runs as.
                file.chmod(made.stat().st_mode & 0o666)
                _sync(file)
            _sync(made)
            made.rename(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be written ({error}): make room, or name another folder.") from error


def _sync(path: Path) -> None:
    """Brings a file, or the names in a folder, onto the disk."""
    if path.is_dir():
        if os.name == "nt":  # where a folder cannot be opened, and needs not
            return
        number = os.open(path, os.O_RDONLY)
    else:
        number = os.open(path, os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _write_checkpoint(model: ChatModel, edit: Edit, path: Path) -> int:
    """The edited checkpoint of `model` in the empty folder `path`, shard by shard; how many tensors were edited."""
    model.check_rows([edit.hooks], 1)
    if model.placed.four_bit:
        raise ModelError(
            f"{model.name} is in 4 bits, so weights that are edited in full precision cannot be measured against its hooks: "
            'load it whole, with the device "auto" if it is large, and find the direction there.'
        )
    shards = weights_in(model.folder)
    if not shards:
        raise ModelError(
            f"The checkpoint of {model.name} is not on the disk any more: edit the model it was made from."
        )
    for file in model.folder.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(file, path / file.name)
    return (_write_addition if edit.variant == "addition" else _write_removal)(model, edit, shards, path)


def _write_removal(model: ChatModel, edit: Edit, shards: Sequence[Path], path: Path) -> int:
    tied = model.is_tied and not any(UNEMBEDDING in keys for _, keys in map(_keys, shards))
    edited: list[str] = []
    for shard in shards:
        edited += _write_shard(shard, path / shard.name, edit, tied, model)
    unknown = {name for shard in shards for name in _keys(shard)[1] if FUSED.search(name)} - set(edited)
    if unknown or not covers_every_write(edited, model.n_layers):
        raise ModelError(
            f"{model.name}: the weights that write to the residual stream are not known by name in this family, so the "
            "edit would be incomplete. Remove the direction with hooks instead."
        )
    if model.is_tied:  # also where the unembedding is in the files: who goes by the config would take the embedding
        _set_in_config(path, "tie_word_embeddings", False)
    if tied:
        _write_index(path)
    return len(edited)


def _write_shard(shard: Path, out: Path, edit: Edit, tied: bool, model: ChatModel) -> list[str]:
    """Writes one shard with its writers edited; returns their names. A tied unembedding is written out as it was."""
    r, changed = edit.written.unit, with_norms_kept if edit.variant.endswith("norm-preserving") else without
    tensors, metadata = _read(shard)
    edited: list[str] = []
    for name in list(tensors):
        if (axis := writes_along(name, tensors[name], family=model.family)) is None:
            continue
        if tied and EMBEDDING.search(name):
            tensors[UNEMBEDDING] = tensors[name].clone()
        writer = writer_of(name)
        gain = None if writer is None else model.gain_behind(writer, of_experts=bool(FUSED.search(name)))
        how = functools.partial(changed, r=r, axis=axis, gain=gain)
        tensors[name] = _in_pieces(tensors[name], axis, how)
        edited.append(name)
    save_file(tensors, out, metadata=metadata)
    return edited


def _in_pieces(
    w: Float[Tensor, "*shape"], axis: int, change: Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]]
) -> Float[Tensor, "*shape"]:
    """`w` with its vectors along `axis` changed, so many at a time that what is computed with is small beside it."""
    if w.ndim == 1 or w.numel() <= PIECE:
        return change(w)
    across = next(dim for dim in range(w.ndim) if dim != axis % w.ndim)
    changed, n = torch.empty_like(w), max(1, PIECE * w.shape[across] // w.numel())
    for piece, new in zip(w.split(n, across), changed.split(n, across), strict=True):
        new.copy_(change(piece))
    return changed


def _write_addition(model: ChatModel, edit: Edit, shards: Sequence[Path], path: Path) -> int:
    """The checkpoint with the addition in the bias of one MLP; where the config can have biases, zeros in all others."""
    layer = edit.written.source.layer
    held = {name: shard for shard, keys in map(_keys, shards) for name in keys}
    new: dict[str, torch.Size] = {}
    if layer and mlp_bias(list(held), layer - 1) is None:
        new = _biases_of_config(path, set(held))
    bias = mlp_bias([*held, *new], layer - 1) if layer else None
    if bias is None:
        why = "no block stands before layer 0" if not layer else "the MLPs of this family write without a bias"
        raise ModelError(
            f"{model.name}: an addition becomes a bias of the block before the layer it acts at, and {why}. Add the "
            "direction with hooks instead, or save it as a control vector."
        )
    moved = edit.strength * edit.written.norm * edit.written.unit / (model.write_scale * model.block_scales[layer - 1])
    for shard in shards:
        tensors, metadata = _read(shard)
        for name, size in new.items():
            if (weight := name.removesuffix("bias") + "weight") in tensors:
                tensors[name] = torch.zeros(size, dtype=tensors[weight].dtype)
        if bias in tensors:
            tensors[bias] = (tensors[bias].float() + moved).to(tensors[bias].dtype)
        save_file(tensors, path / shard.name, metadata=metadata)
    if new:
        _write_index(path)
    return 1


def _biases_of_config(path: Path, held: set[str]) -> dict[str, torch.Size]:
    """The tensors that the checkpoint in `path` lacks once its config says that MLPs have biases, where it can say so."""
    if not hasattr(AutoConfig.from_pretrained(path).get_text_config(), "mlp_bias"):
        return {}
    _set_in_config(path, "mlp_bias", True)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    sizes = {name: w.shape for name, w in outline.state_dict().items() if name.endswith(".bias") and name not in held}
    return sizes if all(name.removesuffix("bias") + "weight" in held for name in sizes) else {}


def _keys(shard: Path) -> tuple[Path, list[str]]:
    with safe_open(str(shard), framework="pt") as file:
        return shard, list(file.keys())


def _read(shard: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    _, names = _keys(shard)
    with safe_open(str(shard), framework="pt") as file:
        return {name: file.get_tensor(name) for name in names}, file.metadata()


def _set_in_config(path: Path, name: str, value: bool) -> None:
    config = json.loads((path / "config.json").read_text("utf-8"))
    for part in (config, config.get("text_config", {})):
        if part is config or name in part:
            part[name] = value
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _write_index(path: Path) -> None:
    """Says anew which shard holds which tensor, if there is more than one."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weights = json.loads(index.read_text("utf-8"))
        written = map(_keys, sorted(path.glob("*.safetensors")))
        weights["weight_map"] = {name: shard.name for shard, keys in written for name in keys}
        index.write_text(json.dumps(weights, indent=2) + "\n", "utf-8")


# -- what it is ------------------------------------------------------------------------------------------------------


def _measure(
    model: ChatModel, edit: Edit, edited: ChatModel, n_edited: int, path: Path, refusal_tokens: Sequence[int] | None
) -> ExportReport:
    prompts = load_prompts("test").draw(N_HELD_OUT)
    texts, harmful = [*prompts.harmful, *prompts.harmless], slice(len(prompts.harmful))
    harmless = slice(len(prompts.harmful), None)
    plain, weights = model.logits(texts), edited.logits(texts)
    hooks = model.logits(texts, [edit.hooks] * len(texts))
    paper = hooks if edit.written is edit.direction else model.logits(texts, [edit.paper] * len(texts))
    first = plain.double().softmax(-1)
    tokens = tuple(refusal_tokens or derive_refusal_tokens(first[harmful].mean(0), first[harmless].mean(0)))
    refusing = [
        (refusal_probability(logits[harmful], tokens) > 0.5).double().mean().item() if tokens else math.nan
        for logits in (weights, plain, hooks)
    ]
    kl, kl_of_hooks = (kl_divergence(plain[harmless], logits[harmless]).mean().item() for logits in (weights, hooks))
    return ExportReport(
        path=str(path),
        edited=n_edited,
        n_prompts=len(texts),
        max_logit_difference=(hooks - weights).abs().max().item(),
        same_first_token=(hooks.argmax(-1) == weights.argmax(-1)).float().mean().item(),
        variant=edit.variant,
        strength=edit.strength,
        max_difference_from_paper=(paper - weights).abs().max().item(),
        cosine=(edit.direction.unit @ edit.written.unit).item(),
        kl=kl,
        kl_of_hooks=kl_of_hooks,
        refusing=refusing[0],
        refusing_unchanged=refusing[1],
        refusing_with_hooks=refusing[2],
        refusal_tokens=tokens,
    )


MADE: dict[Variant, str] = {
    "ablation": "Every tensor that writes to the residual stream was changed so that it writes nothing along one direction: "
    "its ablation at every layer and token (Arditi et al., 2024)",
    "norm-preserving": "Every tensor that writes to the residual stream was changed so that it writes nothing along one "
    "direction, and each vector that it writes was scaled back to the norm it had (after Lai, 2025): exactly nothing can be "
    "written along the direction, and the rest of the stream is not that of the ablation, which this approximates",
    "projected": "Every tensor that writes to the residual stream was changed so that it writes nothing along one direction "
    "without its part along the mean harmless activation (after Lai, 2025): the ablation of that projected direction, which "
    "approximates that of the direction as it was read",
    "projected-norm-preserving": "Every tensor that writes to the residual stream was changed so that it writes nothing along "
    "one direction without its part along the mean harmless activation, and each vector that it writes was scaled back to the "
    "norm it had (after Lai, 2025): exactly nothing can be written along the projected direction; of the ablation, of that "
    "direction and the more of the one as it was read, this is an approximation",
    "addition": "A multiple of one direction was added to the bias of one MLP: its addition at one layer and every token "
    "(Arditi et al., 2024)",
}
"""What each variant is, in the words of its card."""


def _card(model: ChatModel, edit: Edit, report: ExportReport) -> str:
    made = {
        "variant": edit.variant, "strength": edit.strength, "norm": edit.written.norm, "digest": edit.written.digest,
        "cosine_to_direction_as_read": report.cosine, "direction": asdict(edit.written.source),
    }  # fmt: skip
    rest = (
        "**approximate**: the variant, a norm after attention or MLP, or the precision of the weights stands in the way"
    )
    kind = "equal up to rounding" if report.exact else rest
    half = report.n_prompts // 2
    from_paper = ""
    if edit.written is not edit.direction:
        from_paper = (
            f"\n- the same from hooks along the direction as it was read: {report.max_difference_from_paper:.2e}; cosine "
            f"of the two directions {report.cosine:.3f}"
        )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {model.name}, one direction {f"added {edit.strength:g}×" if edit.variant == "addition" else "removed"} in its weights: {edit.variant}

A research artefact, made to study how refusal works. {MADE[edit.variant]}.

Measured on the first tokens of replies to {report.n_prompts} prompts that the direction has not seen, half of them harmful:

- largest difference of a logit from the model with hooks along that direction: {report.max_logit_difference:.2e}
  ({kind}); same most likely token in {report.same_first_token:.0%}{from_paper}
- KL from the unchanged model on {half} harmless prompts: {report.kl:.4f} nats (with hooks {report.kl_of_hooks:.4f})
- replies to {half} harmful prompts: {report.refusal}
- tensors edited: {report.edited}; the unembedding is not among them

What was written, and where its direction comes from:

```json
{json.dumps(made, indent=2)}
```
"""
