"""Which tensors of a checkpoint write to the residual stream, and what a direction does to one of them.

    W ← W − r̂ r̂ᵀ W,   b ← b − r̂ (r̂·b)      `without`: what is written has nothing along r̂
    w ← ‖w‖ w′ / ‖w′‖,  w′ = w − r̂ (r̂·w)     `with_norms_kept`: neither has this, and each vector w keeps its norm

Where a norm stands between W and the stream (Gemma 2 to 4, OLMo 2) y = g ⊙ Wx / rms(Wx) is written, not Wx. Then

    W ← W − a bᵀ W,  b = g ⊙ r̂,  a ∝ g ⊙ r̂ / (g² + λ),  a·b = 1

is the removal: r̂·y = 0 whatever x is. With λ = 0 it takes nothing but r̂ from y, g ⊙ W′x = (1 − r̂ r̂ᵀ) (g ⊙ Wx), but where g
is small a is large, and the norm then divides by a much larger rms(W′x); a λ of 1 % of the mean g² costs little of the
one and much of the other is gone. A plain W − r̂ r̂ᵀ W writes (g ⊙ r̂)·Wx along r̂ all the same.

The vectors w are what is added to the stream at a time: an embedding's rows, and the columns of a matrix (out, in), one
for each of its inputs. Scaled, such a vector stays orthogonal to r̂; a row of that matrix, of which other tools keep the
norm, is no vector of the stream, and scaling rows brings the direction back. The idea, and these vectors, are Jim Lai's
("Norm-Preserving Biprojected Abliteration", huggingface.co/blog/grimjim, 2025), there for attention and MLP outputs.
"""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions)\.weight$")
WRITER = re.compile(
    r"\.(self_attn|linear_attn|attn|attention|self_attention|mlp|feed_forward|block_sparse_moe|experts\.\d+|shared_experts?|shared_mlp)"
    r"\.(o_proj|out_proj|c_proj|dense|down_proj|dense_4h_to_h|fc2|w2|output_linear)\.(weight|bias)$"
)
PER_LAYER_INPUT = re.compile(r"\.per_layer_projection\.weight$")
FUSED = re.compile(r"\.experts\.(?:down_proj|w2)(_bias|\.bias|\.weight)?$")
"""All experts of a layer in one tensor."""
FUSED_AXIS = {"gpt_oss": -1, "gemma4": -2, "gemma4_text": -2}
"""The axis on which such a tensor writes, by family: its layout says nothing of it. Of no other family is it known."""
OTHER_TOWER = re.compile(r"vision|visual|image|audio")
UNEMBEDDING = "lm_head.weight"
DAMPING = 1e-2
"""λ by the mean square of a norm's gains."""
NOTHING_LEFT = 1e-4
"""A vector of which the direction was all but this share has no other part to be scaled up: that would be rounding."""


def without(
    w: Float[Tensor, "..."], r: Float[Tensor, " d_model"], axis: int, gain: Float[Tensor, " d_model"] | None = None
) -> Float[Tensor, "..."]:
    """`w` without its part along r̂ on `axis`, computed in float32 and returned in its own precision.

    `gain` is what a norm behind it multiplies by: it is what comes out of that which has no part along r̂ then.
    """
    wide = w.float().movedim(axis, -1)
    if gain is None:
        read, write = r, r
    else:
        read = gain * r
        write = read / (gain.square() + DAMPING * gain.square().mean())
        write = write / (read @ write)
    return (wide - (wide @ read)[..., None] * write).movedim(-1, axis).to(w.dtype).contiguous()


def with_norms_kept(
    w: Float[Tensor, "..."], r: Float[Tensor, " d_model"], axis: int, gain: Float[Tensor, " d_model"] | None = None
) -> Float[Tensor, "..."]:
    """As `without`, each vector on `axis` scaled back to the norm it had; one along r̂ alone is gone all the same."""
    rest = without(w.float(), r, axis, gain)
    before, after = (x.norm(dim=axis, keepdim=True) for x in (w.float(), rest))
    return torch.where(after > NOTHING_LEFT * before, rest * (before / after), rest).to(w.dtype)


def writes_along(name: str, w: Tensor, *, family: str = "") -> int | None:
    """The axis of `w` on which it writes to the stream in a model of `family`, None if it does not, or it is not known."""
    if OTHER_TOWER.search(name):
        return None
    if EMBEDDING.search(name) or POSITIONS.search(name):
        return -1
    if FUSED.search(name):
        return None if family not in FUSED_AXIS else FUSED_AXIS[family] if w.ndim == 3 else -1
    if not WRITER.search(name) and not PER_LAYER_INPUT.search(name):
        return None
    if w.ndim == 1:
        return 0
    # A linear layer keeps (out, in), GPT-2's Conv1D (in, out); by shape the square ones cannot be told apart.
    return -1 if family == "gpt2" else -2


def writer_of(name: str) -> str | None:
    """The writer that a tensor of a block is a part of, as `ChatModel.writers` has it; None for one outside the blocks."""
    layer = re.search(r"\.(\d+)\.", name)
    if layer is None:
        return None
    part = "PLE" if PER_LAYER_INPUT.search(name) else "attention" if re.search("attn|attention", name) else "MLP"
    return f"{part} {layer[1]}"


def covers_every_write(edited: Sequence[str], n_layers: int) -> bool:
    """Whether the embedding, and an attention and an MLP output in each layer, are among the edited tensors."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for name in edited:
        if name.endswith("weight") and (match := WRITER.search(name)):
            found["attn" in match[1] or "attention" in match[1]].add(name[: match.start() + 1])
        elif (match := FUSED.search(name)) and "bias" not in (match[1] or ""):
            found[False].add(name[: match.start() + 1])
    whole_layers = [{re.sub(r"(\.\d+\.).*", r"\1", start) for start in starts} for starts in found.values()]
    has_embedding = any(EMBEDDING.search(name) for name in edited)
    return has_embedding and all(len(layers) == n_layers for layers in whole_layers)


def mlp_bias(names: Sequence[str], layer: int) -> str | None:
    """The bias among `names` that the MLP of block `layer` writes to the stream, None if it has none."""
    for name in names:
        match = WRITER.search(name)
        if match and match[1] in ("mlp", "feed_forward") and match[3] == "bias" and not OTHER_TOWER.search(name):
            number = re.search(r"\.(\d+)$", name[: match.start()])
            if number and int(number[1]) == layer:
                return name
    return None
