"""The ablation written into the weights: what an edited model can no longer write, no hook has to remove.

    W ← W − r̂ r̂ᵀ W,   b ← b − r̂ (r̂·b)      every matrix and bias that writes to the residual stream

These are the embeddings of tokens and positions, each attention output and each MLP output, each expert's in a mixture. Never the unembedding:
where it is tied to the embedding it is untied first, or the edit would reach the logits too. A checkpoint is edited
tensor by tensor, one shard in memory at a time, in float32, and written back in its own precision. Where a norm stands
after attention or MLP (Gemma 2 and 3, OLMo 2) the weights cannot reproduce the ablation, and the export says so.

Every export is measured against the hooks on prompts that the direction has not seen (Arditi et al. 2024, §4.1).
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from refusal_core.chat_model import ChatModel, ModelError
from refusal_core.directions import Direction
from refusal_core.interventions import Intervention
from refusal_core.prompts import load_prompts

EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions)\.weight$")
WRITER = re.compile(
    r"\.(self_attn|linear_attn|attn|attention|mlp|feed_forward|block_sparse_moe|experts\.\d+|shared_experts?|shared_mlp)"
    r"\.(o_proj|out_proj|c_proj|dense|down_proj|dense_4h_to_h|fc2|w2|output_linear)\.(weight|bias)$"
)
FUSED = re.compile(r"\.experts\.(down_proj|w2)(\.weight)?$")
"""All experts of a layer in one tensor, whose layout differs between families: not edited, so refused."""
OTHER_TOWER = re.compile(r"vision|visual|image|audio")
UNEMBEDDING = "lm_head.weight"
N_HELD_OUT = 16
EXACT = 1e-2
"""An export whose logits differ from the hooks' by less is the ablation up to rounding."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how far it is from the hooks.

    `max_logit_difference` is over all logits of the first tokens of replies to `n_prompts` prompts that the direction
    has not seen; `same_first_token` is the share of them with the same most likely token; `edited` counts tensors.
    """

    path: str
    edited: int
    n_prompts: int
    max_logit_difference: float
    same_first_token: float

    @property
    def exact(self) -> bool:
        """Whether the weights are the ablation up to rounding, or an approximation of it."""
        return self.max_logit_difference < EXACT


def orthogonalize(model: ChatModel, direction: Direction) -> ChatModel:
    """A model whose weights cannot write `direction`; the given one stays as it is.

    Raises ModelError for a direction of another model, and for a family whose writers are not known by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edited"
        _write_checkpoint(model, direction, path)
        edited = ChatModel.load(path, device=model.device, dtype=model.dtype)
    edited.name = f"{model.name}, orthogonalised"
    return edited


def export(model: ChatModel, direction: Direction, path: str | Path) -> ExportReport:
    """Writes the edited model to `path` as an ordinary checkpoint, with a card that says what it is and how exact.

    The folder appears as a whole or not at all. Raises ModelError as `orthogonalize` does, and if `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise ModelError(f"{path} exists already: name a new folder for the edited model.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        made = Path(folder) / "edited"
        edited = _write_checkpoint(model, direction, made)
        report = _measure(model, direction, ChatModel.load(made, device=model.device, dtype=model.dtype), edited, path)
        (made / "README.md").write_text(_card(model, direction, report), "utf-8")
        made.rename(path)
    return report


def without(w: Float[Tensor, "..."], r: Float[Tensor, " d_model"], axis: int) -> Float[Tensor, "..."]:
    """`w` without its part along r̂ on `axis`, computed in float32 and returned in its own precision."""
    wide = w.float().movedim(axis, -1)
    return (wide - (wide @ r)[..., None] * r).movedim(-1, axis).to(w.dtype).contiguous()


# -- files -----------------------------------------------------------------------------------------------------------


def _write_checkpoint(model: ChatModel, direction: Direction, path: Path) -> int:
    """The edited checkpoint of `model` in `path`, shard by shard; how many tensors were edited."""
    model.check_rows([Intervention(direction, "ablate")], 1)
    path.mkdir(parents=True)
    shards = sorted(model.folder.glob("*.safetensors"))
    if not shards:
        raise ModelError(
            f"The checkpoint of {model.name} is not on the disk any more: edit the model it was made from."
        )
    tied = model.is_tied and not any(UNEMBEDDING in keys for _, keys in map(_keys, shards))
    edited: list[str] = []
    for shard in shards:
        edited += _write_shard(shard, path / shard.name, direction.unit, tied)
    fused = [name for shard in shards for name in _keys(shard)[1] if FUSED.search(name)]
    if fused or not _covers_every_write(edited, model.n_layers):
        raise ModelError(
            f"{model.name}: the weights that write to the residual stream are not known by name in this family, so the "
            "edit would be incomplete. Remove the direction with hooks instead."
        )
    for file in model.folder.iterdir():
        if file.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copy2(file, path / file.name)
    if tied:
        _say_untied(path)
    return len(edited)


def _covers_every_write(edited: Sequence[str], n_layers: int) -> bool:
    """Whether the embedding, and an attention and an MLP output in each layer, are among the edited tensors."""
    writers = [match for name in edited if name.endswith("weight") and (match := WRITER.search(name))]
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for match in writers:
        found["attn" in match[1] or "attention" in match[1]].add(match.string[: match.start() + 1])
    whole_layers = [{re.sub(r"(\.\d+\.).*", r"\1", start) for start in starts} for starts in found.values()]
    has_embedding = any(EMBEDDING.search(name) for name in edited)
    return has_embedding and all(len(layers) == n_layers for layers in whole_layers)


def _keys(shard: Path) -> tuple[Path, list[str]]:
    with safe_open(str(shard), framework="pt") as file:
        return shard, list(file.keys())


def _write_shard(shard: Path, out: Path, r: Float[Tensor, " d_model"], tied: bool) -> list[str]:
    """Writes one shard with its writers edited; returns their names. A tied unembedding is written out as it was."""
    with safe_open(str(shard), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in _keys(shard)[1]}
        metadata = file.metadata()
    edited: list[str] = []
    for name in list(tensors):
        if (axis := _writes_along(name, tensors[name], len(r))) is None:
            continue
        if tied and EMBEDDING.search(name):
            tensors[UNEMBEDDING] = tensors[name].clone()
        tensors[name] = without(tensors[name], r, axis)
        edited.append(name)
    save_file(tensors, out, metadata=metadata)
    return edited


def _writes_along(name: str, w: Tensor, d_model: int) -> int | None:
    """The axis of `w` on which it writes to the stream, None if it does not."""
    if OTHER_TOWER.search(name):
        return None
    if EMBEDDING.search(name) or POSITIONS.search(name):
        return -1
    if not WRITER.search(name):
        return None
    if w.ndim == 1:
        return 0
    # A linear layer keeps (out, in); GPT-2's Conv1D the other way round, with which its square output is told apart.
    return -1 if name.endswith("c_proj.weight") and w.shape[-1] == d_model else -2


def _say_untied(path: Path) -> None:
    config = json.loads((path / "config.json").read_text("utf-8"))
    for part in (config, config.get("text_config", {})):
        if part is config or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    index = path / "model.safetensors.index.json"
    if index.exists():
        weights = json.loads(index.read_text("utf-8"))
        written = map(_keys, sorted(path.glob("*.safetensors")))
        weights["weight_map"] = {name: shard.name for shard, keys in written for name in keys}
        index.write_text(json.dumps(weights, indent=2) + "\n", "utf-8")


# -- what it is ------------------------------------------------------------------------------------------------------


def _held_out() -> Iterator[str]:
    prompts = load_prompts("test").draw(N_HELD_OUT)
    yield from (*prompts.harmful, *prompts.harmless)


def _measure(model: ChatModel, direction: Direction, edited: ChatModel, n_edited: int, path: Path) -> ExportReport:
    texts = list(_held_out())
    hooks = model.logits(texts, [Intervention(direction, "ablate")] * len(texts))
    weights = edited.logits(texts)
    return ExportReport(
        str(path),
        n_edited,
        len(texts),
        (hooks - weights).abs().max().item(),
        (hooks.argmax(-1) == weights.argmax(-1)).float().mean().item(),
    )


def _card(model: ChatModel, direction: Direction, report: ExportReport) -> str:
    source = json.dumps(asdict(direction.source), indent=2)
    rest = "**approximately**: a norm after attention or MLP, or the precision of the weights, stands in the way"
    kind = "up to rounding" if report.exact else rest
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {model.name}, one direction orthogonalised out of its weights

A research artefact, made to study how refusal works. Every matrix that writes to the residual stream was made
orthogonal to one direction (Arditi et al., 2024), which reproduces its ablation at every layer and token {kind}.

- largest difference of a logit from the model with hooks: {report.max_logit_difference:.2e}, over the first tokens of
  replies to {report.n_prompts} prompts that the direction has not seen; same most likely token in {report.same_first_token:.0%}
- tensors edited: {report.edited}; the unembedding is not among them

The direction:

```json
{source}
```
"""
