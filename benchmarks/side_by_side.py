"""Three panes of one prompt (40 tokens, 64 new ones), against plain `generate` of one row, and of three in turn.

No reply ends before its 64 tokens, so that all do the same work.
"""

from typing import Any, cast

from benchmarks.subjects import Subject
from benchmarks.timing import Measured, main, take_turns

PROMPT_TOKENS, NEW_TOKENS = 40, 64


def measure(subject: Subject, repeats: int) -> Measured:
    """The three ways in turn."""
    prompt = subject.prompt(PROMPT_TOKENS)
    (batch,) = subject.model.batches([prompt])

    def panes() -> None:
        decoding = subject.model.begin([prompt] * 3, subject.rows)
        for _ in range(NEW_TOKENS - 1):
            decoding.step(decoding.logits.argmax(-1).tolist())
        decoding.close()

    def generate() -> None:
        cast(Any, subject.plain).generate(
            batch.ids,
            attention_mask=batch.mask,
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=subject.model.tokenizer.pad_token_id,
        )

    def three_in_turn() -> None:
        for _ in range(3):
            generate()

    works = {"one plain generate": generate, "three panes": panes, "three plain generates": three_in_turn}
    return Measured("Side by side", "one plain generate", take_turns(works, repeats), {"three panes": 1.5})


if __name__ == "__main__":
    main(measure, __doc__)
