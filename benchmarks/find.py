"""Finding the direction, against brute force: the paper's three scores of every candidate, each in batches of its own.

Both read the same prompts and give the same choice; the model is loaded before the clock starts.
"""

import torch

from benchmarks.subjects import Subject
from benchmarks.timing import Measured, main, take_turns
from refusal_core.activations import collect_activations
from refusal_core.chat_model import ChatModel
from refusal_core.directions import ZERO_NORM, Direction, Source, difference_in_means
from refusal_core.interventions import Intervention, Kind
from refusal_core.metrics import kl_divergence, refusal_score
from refusal_core.prompts import PromptSet, load_prompts
from refusal_core.selection import CandidateScore, Choice, Found, choose, find_direction


def lazy(model: ChatModel) -> Found:
    """The direction as the app finds it."""
    *_, found = find_direction(model, load_prompts("train"), load_prompts("val"))
    assert isinstance(found, Found)
    return found


def brute_force(model: ChatModel, train: PromptSet, val: PromptSet, tokens: tuple[int, ...]) -> Choice:
    """The same choice from a full table: three batches per candidate, each through the whole model."""
    harmful, harmless = (collect_activations(model, texts) for texts in (train.harmful, train.harmless))
    raw = difference_in_means(harmful, harmless)
    base = model.logits(val.harmless)
    scores: list[CandidateScore] = []
    for at in range(raw.shape[0]):
        for layer in range(model.n_layers):
            pos, norm = at - raw.shape[0], raw[at, layer].norm().item()
            if norm < ZERO_NORM:
                scores.append(CandidateScore(pos, layer, None, None, None, norm))
                continue
            source = Source(fingerprint=model.fingerprint, layer=layer, position=pos)
            direction = Direction.from_difference(raw[at, layer], source)

            def edited(texts: tuple[str, ...], kind: Kind, r: Direction = direction) -> torch.Tensor:
                return model.logits(texts, [Intervention(r, kind)] * len(texts))

            bypass = refusal_score(edited(val.harmful, "ablate"), tokens).mean().item()
            induce = refusal_score(edited(val.harmless, "add"), tokens).mean().item()
            kl = kl_divergence(base, edited(val.harmless, "ablate")).mean().item()
            scores.append(CandidateScore(pos, layer, bypass, induce, kl, norm))
    return choose(scores, model.n_layers)


def measure(subject: Subject, repeats: int) -> Measured:
    """Both in turn; raises RuntimeError if they do not choose the same candidate."""
    model, found = subject.model, lazy(subject.model)

    def whole_table() -> None:
        choice = brute_force(model, found.prompts, found.validation, found.refusal_tokens)
        mine, theirs = found.choice.chosen, choice.chosen
        if mine is None or theirs is None or (mine.pos, mine.layer) != (theirs.pos, theirs.layer):
            raise RuntimeError("The choices differ.")

    works = {"brute force": whole_table, "find": lambda: lazy(model)}
    return Measured("Finding the direction", "brute force", take_turns(works, repeats), {"find": 0.15})


if __name__ == "__main__":
    main(measure, __doc__)
