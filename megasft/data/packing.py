"""Which conversations share a row: best-fit decreasing, window by window, so that the order stays random."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

WINDOW = 4096  # samples


@dataclass(frozen=True)
class Rows:
    """Sample numbers in groups: row r is numbers[ends[r-1]:ends[r]]. Both int64."""

    numbers: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.numbers[self.ends[row - 1] if row else 0 : self.ends[row]]

    @classmethod
    def single(cls, numbers: np.ndarray) -> "Rows":
        """One sample in each row."""
        return cls(numbers, np.arange(1, len(numbers) + 1))

    def shuffled(self, generator: np.random.Generator) -> "Rows":
        """The same rows in another order."""
        order = generator.permutation(len(self))
        starts = np.concatenate([[0], self.ends[:-1]])
        lengths = (self.ends - starts)[order]
        ends = np.cumsum(lengths)
        within = np.arange(len(self.numbers)) - np.repeat(ends - lengths, lengths)
        return Rows(self.numbers[np.repeat(starts[order], lengths) + within], ends)


def pack(numbers: np.ndarray, lengths: np.ndarray, row_length: int) -> Rows:
    """Put samples into rows of at most `row_length` tokens; one that is longer gets a row to itself.

    Args:
        numbers: the samples, in the order of the epoch.
        lengths: of each of them, in tokens.
    """
    rows_of = [np.zeros(0, np.int64)]
    rows = 0
    for first in range(0, len(numbers), WINDOW):
        placed = rows + _best_fit_decreasing(lengths[first : first + WINDOW], row_length)
        rows = int(placed.max()) + 1
        rows_of.append(placed)
    row_of = np.concatenate(rows_of)
    return Rows(numbers[np.argsort(row_of, kind="stable")], np.cumsum(np.bincount(row_of, minlength=rows)))


def _best_fit_decreasing(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """The row of each sample: the longest sample first, each into the fullest row that still takes it (Johnson 1973).

    `room` holds (space left, row) of every row, packed into one integer so that it sorts by space.
    """
    order = np.argsort(-lengths, kind="stable")
    placed: list[int] = []
    room: list[int] = []
    rows = 0
    for length in lengths[order].tolist():
        place = bisect_left(room, length << 32)
        if place == len(room):
            row, left = rows, max(0, row_length - length)
            rows += 1
        else:
            best = room.pop(place)
            row, left = best & 0xFFFFFFFF, (best >> 32) - length
        placed.append(row)
        if left:
            insort(room, left << 32 | row)
    row_of = np.empty(len(lengths), np.int64)
    row_of[order] = placed
    return row_of
