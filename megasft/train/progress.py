"""What a rank is doing, for its watchdog."""

from collections.abc import Callable


class Progress:
    """Counts what a rank gets done, so that its watchdog can tell a slow rank from a hung one.

    Args:
        written: parts of a checkpoint that the background writer has written so far.
    """

    def __init__(self, written: Callable[[], int]) -> None:
        self._written = written
        self._doing, self._micro_batches, self._before = "", 0, 0

    def begin(self, doing: str) -> None:
        """The rank starts something else, such as "step 12"."""
        self._doing, self._before = doing, self._micro_batches

    def count_micro_batch(self) -> None:
        """One more micro batch enters the model."""
        self._micro_batches += 1

    def report(self) -> tuple[int, str]:
        """(a number that grows with all work done, what is being done); may be called from another thread."""
        number = self._micro_batches - self._before
        return self._micro_batches + self._written(), self._doing + (f", micro batch {number}" if number else "")
