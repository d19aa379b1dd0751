"""Where the seconds of a step go, without waiting for the device between its parts."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from megasft import host


class StepClock:
    """Times the parts of each step on this rank: on CUDA by events in its stream, elsewhere by the clock.

    `begin`, then `part` at the start of each part, then `end`. Times of `saving` count for the step that follows.
    """

    def __init__(self) -> None:
        self._saved = 0.0
        self._marks: list[tuple[str, host.Mark]] = []

    def begin(self) -> None:
        """A step begins; what is in progress on the device is not part of it."""
        host.synchronize()
        self._started, self._marks = time.monotonic(), []

    def part(self, name: str) -> None:
        """What follows on this rank's stream is part `name`."""
        self._marks.append((name, host.mark()))

    def end(self) -> tuple[float, dict[str, float]]:
        """(seconds of the step, seconds of each part), after waiting for the device."""
        self.part("")
        host.synchronize()
        seconds, parts = time.monotonic() - self._started, defaultdict[str, float](float)
        for (name, start), (_, end) in pairwise(self._marks):
            parts[name] += host.seconds_between(start, end)
        return seconds, parts

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around what training waits for to be saved."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._saved += time.monotonic() - started

    def take_saved(self) -> float:
        """Seconds of `saving` since the last call."""
        saved, self._saved = self._saved, 0.0
        return saved
