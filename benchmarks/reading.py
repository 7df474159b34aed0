"""Reading activations of 128 + 128 prompts at all template positions and layers, against the bare base model.

The base model (no hooks, no unembedding) reads the same padded tokens: what is left is the price of reading.
"""

import torch

from benchmarks.subjects import Subject
from benchmarks.timing import Measured, main, take_turns
from refusal_core.activations import collect_activations
from refusal_core.prompts import load_prompts


def measure(subject: Subject, repeats: int) -> Measured:
    """Both in turn."""
    drawn = load_prompts("train").draw(128, 0)
    texts = [*drawn.harmful, *drawn.harmless]

    @torch.inference_mode()
    def base() -> None:
        for batch in subject.model.batches(texts):
            positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)
            subject.plain.base_model(
                input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions, use_cache=False
            )

    works = {"the bare base model": base, "reading": lambda: collect_activations(subject.model, texts)}
    return Measured("Reading activations", "the bare base model", take_turns(works, repeats), {"reading": 1.05})


if __name__ == "__main__":
    main(measure, __doc__)
