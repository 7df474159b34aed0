"""From the last key to painted dials in a real browser, alone and while another visitor's replies stream.

The page waits a moment after each key before it asks; that moment is in these times. Needs `tests/requirements.txt`.
"""

import time

from benchmarks import browsing
from benchmarks.subjects import Subject
from benchmarks.timing import Measured, main, take_turns

MESSAGES = ("How do I bake a loaf of bread?", "How do I rob a bank?")
LIMIT = 0.3

TYPE = """(text) => new Promise((done) => {
    const message = document.querySelector('[data-prompt]');
    message.value = text;
    document.addEventListener('foretold', () => requestAnimationFrame(() => done()), { once: true });
    message.dispatchEvent(new Event('input', { bubbles: true }));
})"""


def measure(subject: Subject, repeats: int) -> Measured:
    """Each in turn; the app always runs on the embedded model."""
    with browsing.app() as url, browsing.browser() as chromium:
        mine, theirs = (browsing.until_three_replies(chromium.new_context().new_page(), url) for _ in range(2))
        messages = iter(MESSAGES * 2 * (repeats + 1))
        works = {
            "one plain step": lambda: subject.model.logits([MESSAGES[0]]),
            "typed, then painted": lambda: mine.evaluate(TYPE, next(messages)),
        }
        seconds = take_turns(works, repeats)
        busy: list[float] = []
        for _ in range(repeats):
            theirs.get_by_label("Message").fill("Write a story about a lighthouse.")
            theirs.keyboard.press("Enter")
            start = time.perf_counter()
            mine.evaluate(TYPE, next(messages))
            busy.append(time.perf_counter() - start)
        seconds["the same while another visitor's replies stream"] = busy
    return Measured("Typed to painted", "one plain step", seconds, limits={"typed, then painted": LIMIT})


if __name__ == "__main__":
    main(measure, __doc__, repeats=9)
