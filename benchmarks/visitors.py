"""Eight visitors with three panes each, all at once, against the same eight one after another.

Each has a prompt of its own and wants 32 tokens a pane; none ends before. All at once they share steps of the model.
"""

from concurrent.futures import ThreadPoolExecutor

from benchmarks.subjects import Subject
from benchmarks.timing import Measured, main, take_turns

VISITORS, NEW_TOKENS = 8, 32


def measure(subject: Subject, repeats: int) -> Measured:
    """Both in turn."""
    prompts = [subject.prompt(24 + 3 * visitor) for visitor in range(VISITORS)]

    def talk(prompt: str) -> None:
        decoding = subject.model.begin([prompt] * 3, subject.rows)
        for _ in range(NEW_TOKENS - 1):
            decoding.step(decoding.logits.argmax(-1).tolist())
        decoding.close()

    def in_turn() -> None:
        for prompt in prompts:
            talk(prompt)

    def at_once() -> None:
        with ThreadPoolExecutor(VISITORS) as visitors:
            list(visitors.map(talk, prompts))

    works = {"one after another": in_turn, "all at once": at_once}
    return Measured("Eight visitors", "one after another", take_turns(works, repeats), {"all at once": 1 / 3})


if __name__ == "__main__":
    main(measure, __doc__)
