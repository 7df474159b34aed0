"""The forecast: what the panes are about to say to the message in the composer, before anything is generated.

For each pane the probability that its reply starts like a refusal, at every strength of its dial, and where the
prompt lies among those that the direction was made from. `assets/ui/talk.js` paints it, `map.js` shows the star.
"""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from refusal_core.chat_model import Conversation, ModelError
from refusal_core.evaluation import DoseResponse, dose_response
from refusal_core.geometry import Place, place
from refusal_core.metrics import refusal_probability
from refusal_core.plots import star_on_map
from refusal_core.prompts import CLASSES, PromptError
from refusal_core.selection import Found
from refusal_core.ui.engine import Engine, Ready
from refusal_core.ui.lending import GLANCE, once_on_gpu
from refusal_core.ui.talk import Ask, Turn, conversation, next_turn


def forecast(engine: Engine, ready: Ready, turns: Sequence[Turn], ask: Ask) -> dict:
    """What the page paints for the message of `ask`; without numbers where the message cannot be read.

    Without refusal tokens there are no probabilities either: 0 would be claimed of every message.
    """
    try:
        earlier, turn = next_turn(tuple(turns), ask)
        said = {pane: conversation((*earlier, turn), pane) for pane in ("unchanged", "removed", "added")}
        unchanged, activations, removal, addition = once_on_gpu(
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
        "removal": _curve(removal) if knows else None,
        "addition": _curve(addition) if knows else None,
        "place": {"sentence": f"{'This' if ask.action == 'ask' else 'The last'} prompt {_lies(here, found)}{unknown}"},
        "stars": {
            f"{pos} {axes}": star_on_map(maps, activations[found.positions.index(pos)].numpy(), axes)
            for (pos, axes), maps in engine.known_maps(ready).items()
        },
    }


def _foretold(
    ready: Ready, said: Mapping[str, Conversation], writers: frozenset[str] | None
) -> tuple[float, Float[Tensor, "pos layer d_model"], DoseResponse, DoseResponse]:
    """What the model makes of each pane's conversation: the probability that the unchanged one starts like a refusal, its
    `resid_pre` at the positions that were read, and the same probability by strength of removal and of addition.
    """
    model, found, direction = ready.model, ready.found, ready.direction
    (prompt,) = model.batches([said["unchanged"]])
    output = model.run(prompt, read=found.positions)
    assert output.resid_pre is not None
    return (
        refusal_probability(output.logits, found.refusal_tokens).item(),
        output.resid_pre[0].float().cpu(),
        dose_response(model, said["removed"], direction, "ablate", found.refusal_tokens, writers=writers),
        dose_response(model, said["added"], direction, "add", found.refusal_tokens),
    )


def _curve(response: DoseResponse) -> dict:
    return {"scales": response.scales, "refusal": response.refusal, "flip": response.flips_at}


def _lies(here: Place, found: Found) -> str:
    """The place among the prompts that the direction was made from, counted."""
    harmful, harmless = found.prompts.classes
    further = f"further toward {'refusal' if found.prompts.classes == CLASSES else harmful}"
    n_harmless, n_harmful = len(found.harmless), len(found.harmful)
    of_harmless, of_harmful = round(here.beyond_harmless * n_harmless), round(here.beyond_harmful * n_harmful)
    if of_harmful == n_harmful:
        return f"lies {further} than every {harmful} prompt the direction was made from."
    over = (
        f"every {harmless} prompt"
        if of_harmless == n_harmless
        else f"{of_harmless} of the {n_harmless} {harmless} prompts"
    )
    if of_harmful:
        return f"lies {further} than {over} and {of_harmful} of the {n_harmful} {harmful} ones."
    if of_harmless:
        return f"lies {further} than {over}, and less far than every {harmful} one."
    return f"lies {further.replace('further', 'less far', 1)} than every prompt the direction was made from."
