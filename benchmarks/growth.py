"""How the time of finding a direction grows with prompts, with template positions, and with depth.

Small random Llama models whose every candidate is measured (COSMIC, which measures the same number of them whatever a
random model says). One of the three is doubled twice while the others stay; the exponent is the slope of a line through
the logarithms. Candidates are positions × layers, so depth counts twice: as their number, and as what each costs. A template
with more positions also makes every prompt longer.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from benchmarks.timing import machine
from refusal_core.chat_model import ORGANISM, ChatModel
from refusal_core.prompts import load_prompts
from refusal_core.selection import find_direction

PROMPTS, EXTRA, DEPTH = (8, 16, 32), (0, 5, 15), (8, 16, 32)
"""How many prompts of each class choose, how many positions the template has besides its own five, and how many layers."""

GOALS = {"prompts": 1.1, "positions": 1.6, "depth": 2.2}


@dataclass(frozen=True)
class Growth:
    """Of each thing that grows: its sizes, and the seconds at each."""

    seconds: dict[str, dict[int, float]]

    title = "Growth"

    def exponent(self, what: str) -> float:
        """k in seconds ∝ sizeᵏ, by least squares."""
        sizes, seconds = zip(*self.seconds[what].items(), strict=True)
        return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])

    def as_markdown(self) -> str:
        """A table with a line for each."""
        lines = ["| what grows | seconds | exponent | goal |", "|---|---|---|---|"]
        for what, taken in self.seconds.items():
            said = ", ".join(f"{size}: {seconds:.1f}" for size, seconds in taken.items())
            lines.append(f"| {what} | {said} | **{self.exponent(what):.2f}** | ≤ {GOALS[what]:g} |")
        return "\n".join(lines)


def measure(repeats: int = 1) -> Growth:
    """Each size in turn, the shortest of `repeats`."""
    at: dict[tuple[int, int, int], float] = {}

    def seconds(n: int, extra: int, depth: int) -> float:
        if (n, extra, depth) not in at:
            at[n, extra, depth] = min(_find(_model(extra, depth), n) for _ in range(repeats))
        return at[n, extra, depth]

    own = _model(0, DEPTH[0]).template_positions
    _find(_model(0, DEPTH[0]), 1)
    return Growth(
        {
            "prompts": {n: seconds(n, EXTRA[0], DEPTH[0]) for n in PROMPTS},
            "positions": {own + extra: seconds(PROMPTS[0], extra, DEPTH[0]) for extra in EXTRA},
            "depth": {depth: seconds(PROMPTS[0], EXTRA[0], depth) for depth in DEPTH},
        }
    )


def _model(extra: int, depth: int) -> ChatModel:
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM)
    tokenizer.chat_template += "{% if add_generation_prompt %}" + "." * extra + "{% endif %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=depth, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return ChatModel(made, tokenizer, name="random", revision=None, fingerprint="random", folder=ORGANISM)


def _find(model: ChatModel, n: int) -> float:
    train, val = load_prompts("train").draw(16), load_prompts("val").draw(n)
    start = time.perf_counter()
    for _ in find_direction(model, train, val, by="cosmic", complete=True):
        pass
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    growth = measure(parser.parse_args(arguments).repeats)
    print(f"{growth.title}: small random models\n{machine()}\n{growth.as_markdown()}")


if __name__ == "__main__":
    main()
