"""Finding the direction, against brute force: the paper's three scores of every candidate, each in batches of its own.

Both read the same prompts and give the same choice; the model is loaded before the clock starts. The two take turns,
and the medians are compared.
"""

import argparse
import statistics
import time

import torch

from refusal_core.activations import collect_activations
from refusal_core.chat_model import ORGANISM, ChatModel
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


def main() -> None:
    """Prints both times, their ratio, and whether the choices agree."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.find", description=__doc__)
    parser.add_argument("--model", default=str(ORGANISM), help="folder or hub id; default: the embedded toy model")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model = ChatModel.load(options.model)
    found = lazy(model)
    times: dict[str, list[float]] = {"find": [], "brute force": []}
    for _ in range(options.repeats):
        start = time.perf_counter()
        found = lazy(model)
        times["find"].append(time.perf_counter() - start)
        start = time.perf_counter()
        choice = brute_force(model, found.prompts, found.validation, found.refusal_tokens)
        times["brute force"].append(time.perf_counter() - start)
        chosen, expected = found.choice.chosen, choice.chosen
        assert chosen is not None
        assert expected is not None
        assert (chosen.pos, chosen.layer) == (expected.pos, expected.layer), "the choices differ"
    middle = {name: statistics.median(taken) for name, taken in times.items()}
    print(f"{model.name} on {model.device.type}, {torch.get_num_threads()} threads, median of {options.repeats}")
    for name, taken in times.items():
        print(f"{name:12} {middle[name]:6.2f} s  ({min(taken):.2f} to {max(taken):.2f})")
    print(f"ratio        {middle['find'] / middle['brute force']:6.2f}, the same choice")


if __name__ == "__main__":
    main()
