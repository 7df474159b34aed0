"""Where visitors wait for work of which only so much is done at once, and are told how long."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from refusal_core.selection import Progress

PATIENCE = 0.2
"""After how many seconds whoever has come no nearer is asked whether they still want it."""


class Line:
    """First come, first served, `seats` at a time."""

    def __init__(self, seats: int) -> None:
        self._seats = seats
        self._news = threading.Condition()
        self._here: dict[object, float | None] = {}
        self._duration = 0.0

    @contextmanager
    def joined(self, stop: threading.Event) -> Iterator[Iterator[Progress]]:
        """A place in the line, given up at the end of the context: what is said there of the wait, until it is over.

        Nobody waits once `stop` is set, seat or not: whoever has none does not begin then.
        """
        me = object()
        with self._news:
            self._here[me] = None
        try:
            yield self._waits(me, stop)
        finally:
            with self._news:
                begun = self._here.pop(me)
                if begun is not None and not stop.is_set():
                    seconds = time.monotonic() - begun
                    self._duration = 0.7 * self._duration + 0.3 * seconds if self._duration else seconds
                self._news.notify_all()

    def _waits(self, me: object, stop: threading.Event) -> Iterator[Progress]:
        told = 0
        while not stop.is_set():
            with self._news:
                place = list(self._here).index(me) + 1 - self._seats
                if place <= 0:
                    self._here[me] = time.monotonic()
                    return
                if place == told:
                    self._news.wait(PATIENCE)
                    continue
                seconds = self._duration * -(-place // self._seats)
            told = place
            yield Progress(
                f"you are number {place} in line" + (f", about {seconds:.0f} s" if seconds >= 1 else ""), 0, 0
            )
