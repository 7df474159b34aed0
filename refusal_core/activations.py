"""The residual stream of many prompts, kept at the template positions: x[prompt, p, l] = `resid_pre[l]` at p.

Positions count from the end of the rendered prompt: −1 is the last token before the reply, −P … −1 are the
template's own tokens, and −(P+1) is the last token of the instruction itself.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from refusal_core.chat_model import PROBES, ChatModel, Conversation
from refusal_core.prompts import PromptError


def template_positions(model: ChatModel) -> range:
    """−P … −1, the positions a refusal direction is looked for at."""
    return range(-model.template_positions, 0)


def template_prefix(model: ChatModel) -> int:
    """How many first tokens of a rendered message belong to the template, whatever the user wrote."""
    rendered = [model.render(probe) for probe in PROBES]
    same = 0
    while len({r[same] for r in rendered}) == 1:
        same += 1
    return same


def collect_activations(
    model: ChatModel, prompts: Sequence[Conversation], positions: Sequence[int] | None = None
) -> Float[Tensor, "prompt pos layer d_model"]:
    """`resid_pre` of every layer at `positions` (by default the template's P), in float32 on the CPU.

    Raises PromptError for a position that a prompt does not have, and as `ChatModel.render` does.
    """
    positions = template_positions(model) if positions is None else positions
    kept = torch.empty(len(prompts), len(positions), model.n_layers, model.d_model)
    for batch in model.batches(prompts):
        shortest = int(batch.mask.sum(-1).min())
        if outside := [p for p in positions if not -shortest <= p < 0]:  # there a shorter prompt of a batch has padding
            raise PromptError(
                f"A prompt has {shortest:,} tokens, and none at position {outside[0]}: positions count from the end, "
                "−1 is the last one."
            )
        output = model.run(batch, read=positions)
        assert output.resid_pre is not None
        kept[list(batch.index)] = output.resid_pre.float().cpu()
    return kept
