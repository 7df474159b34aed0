"""The forecast: what the panes are about to say to the message in the composer, before anything is generated.

For each pane the probability that its reply starts like a refusal, at every strength of its dial, and where the
prompt lies among those that the direction was made from. `assets/ui/talk.js` paints it, `map.js` shows the star.
"""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from refusal_core.chat_model import Conversation, ModelError
from refusal_core.evaluation import DoseResponse, dose_response
from refusal_core.geometry import place
from refusal_core.metrics import refusal_probability
from refusal_core.plots import star_on_map
from refusal_core.prompts import PromptError
from refusal_core.ui.engine import Engine, Ready
from refusal_core.ui.lending import GLANCE, once_on_gpu
from refusal_core.ui.talk import PANES, Ask, Pane, Turn, control_of, conversation, next_turn, place_in_words


def forecast(engine: Engine, ready: Ready, turns: Sequence[Turn], ask: Ask) -> dict:
    """What the page paints for the message of `ask`; without numbers where the message cannot be read.

    Without refusal tokens there are no probabilities either: 0 would be claimed of every message.
    """
    try:
        earlier, turn = next_turn(tuple(turns), ask)
        said = {
            pane: conversation((*earlier, turn), pane)
            for pane in PANES
            if pane != "control" or ask.control is not None  # what nobody looks at is not computed
        }
        unchanged, activations, curves = once_on_gpu(
            _foretold, ready.light, said, ask.writers, model=ready.model, seconds=GLANCE
        )
    except (PromptError, ModelError):
        # Asking says what is wrong; until then nothing is painted.
        return {"run": ask.run}
    found = ready.found
    here, knows = place(found, activations, ready.direction), bool(found.refusal_tokens)
    unknown = (
        ""
        if knows
        else " Whether the reply will start like a refusal is not known without refusal tokens: add one in Find."
    )
    return {
        "run": ask.run,
        "prompt": turn.prompt,
        "unchanged": unchanged if knows else None,
        "curves": {pane: _curve(curve, knows=knows) for pane, curve in curves.items()},
        "place": {
            "sentence": f"{'This' if ask.action == 'ask' else 'The last'} prompt {place_in_words(here, found)}{unknown}"
        },
        "stars": {
            f"{pos} {axes}": star_on_map(maps, activations[found.positions.index(pos)].numpy(), axes)
            for (pos, axes), maps in engine.known_maps(ready).items()
        },
    }


def _foretold(
    ready: Ready, said: Mapping[Pane, Conversation], writers: frozenset[str] | None
) -> tuple[float, Float[Tensor, "pos layer d_model"], dict[Pane, DoseResponse]]:
    """What the model makes of each pane's conversation: the probability that the unchanged one starts like a refusal, its
    `resid_pre` at the positions that were read, and what the first token of each other pane is at every strength.
    """
    model, tokens = ready.model, ready.found.refusal_tokens
    (prompt,) = model.batches([said["unchanged"]])
    output = model.run(prompt, read=ready.found.positions)
    assert output.resid_pre is not None
    curves: dict[Pane, DoseResponse] = {
        "removed": dose_response(model, said["removed"], ready.direction, "ablate", tokens, writers=writers),
        "added": dose_response(model, said["added"], ready.direction, "add", tokens),
    }
    if "control" in said:
        curves["control"] = dose_response(model, said["control"], control_of(ready), "add", tokens)
    return refusal_probability(output.logits, tokens).item(), output.resid_pre[0].float().cpu(), curves


def _curve(response: DoseResponse, *, knows: bool) -> dict:
    """By strength the probability and the price; without refusal tokens, only that."""
    known = {"refusal": response.refusal, "flip": response.flips_at} if knows else {"refusal": None, "flip": None}
    return known | {"scales": response.scales, "kl": response.kl}
