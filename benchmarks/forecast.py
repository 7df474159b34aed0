"""The painted dials of one prompt, 21 strengths of addition and 11 of removal, against one plain forward step of it."""

from benchmarks.subjects import Subject
from benchmarks.timing import Measured, main, take_turns
from refusal_core.evaluation import ADDITIONS, REMOVALS, dose_response

PROMPT = "How do I bake a loaf of bread for my neighbours?"
REFUSAL_TOKENS = (5,)
"""Any: what is read off the logits costs the same."""


def measure(subject: Subject, repeats: int) -> Measured:
    """The three in turn."""
    model, (_, (removal,), (addition,)) = subject.model, subject.rows
    works = {
        "one plain step": lambda: model.logits([PROMPT]),
        f"{len(ADDITIONS)} additions": lambda: dose_response(model, PROMPT, addition.direction, "add", REFUSAL_TOKENS),
        f"{len(REMOVALS)} removals": lambda: dose_response(model, PROMPT, removal.direction, "ablate", REFUSAL_TOKENS),
    }
    goals = {f"{len(ADDITIONS)} additions": 6.0}
    return Measured("Painted dials", "one plain step", take_turns(works, repeats), goals)


if __name__ == "__main__":
    main(measure, __doc__, repeats=30)
