"""What hooks cost when nothing is steered: one row decoded with all of them in place, against plain transformers.

Both loops are the same: the most likely token, 64 times, with a cache.
"""

import torch

from benchmarks.subjects import Subject
from benchmarks.timing import Measured, main, take_turns

PROMPT_TOKENS, NEW_TOKENS = 40, 64


def measure(subject: Subject, repeats: int) -> Measured:
    """Both in turn."""
    prompt = subject.prompt(PROMPT_TOKENS)
    (batch,) = subject.model.batches([prompt])

    @torch.inference_mode()
    def plain() -> None:
        result = subject.plain(batch.ids, use_cache=True, logits_to_keep=1)
        for _ in range(NEW_TOKENS - 1):
            token = result.logits[:, -1].argmax(-1, keepdim=True)
            result = subject.plain(token, past_key_values=result.past_key_values, use_cache=True, logits_to_keep=1)

    def hooked() -> None:
        decoding = subject.model.begin([prompt])
        for _ in range(NEW_TOKENS - 1):
            decoding.step(decoding.logits.argmax(-1).tolist())
        decoding.close()

    works = {"plain transformers": plain, "hooks, nothing steered": hooked}
    goals = {"hooks, nothing steered": 1.02}
    return Measured("Hooks", "plain transformers", take_turns(works, repeats), goals)


if __name__ == "__main__":
    main(measure, __doc__)
