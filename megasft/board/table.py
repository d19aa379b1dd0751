"""Numbers over the steps of a run, in memory that does not grow with the run."""

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Axis = Literal["step", "tokens", "time"]
AXES: tuple[Axis, ...] = ("step", "tokens", "time")
CAPACITY = 4096  # buckets of a table
COLUMNS = 256  # the most columns that a table takes; others are left out


@dataclass(frozen=True)
class Row:
    """One line of metrics: its place on each axis, and its numbers."""

    step: float
    tokens: float
    time: float
    values: dict[str, float]


@dataclass(frozen=True)
class Series:
    """One column: for each bucket its place [N], and the mean, lowest and highest of its rows [N]; NaN: no value."""

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


class Table:
    """Rows in the order of steps, gathered in at most CAPACITY buckets of `stride` rows each.

    When all buckets are full, each two become one and `stride` doubles. Of a bucket the mean, lowest and highest value
    of each column are kept, so that a peak of a single step stays visible.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity, self.stride, self.count = capacity, 1, 0
        self._x = np.zeros((len(AXES), capacity))
        self._columns: dict[str, NDArray[np.float32]] = {}  # [3: mean, lowest, highest; capacity]
        self._pending: list[Row] = []

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(self._columns)

    @property
    def rows(self) -> int:
        """Points of a series: the buckets, and the one that is not full yet."""
        return self.count + bool(self._pending)

    def extent(self, axis: int) -> tuple[float, float]:
        """The lowest and highest place; there must be a row."""
        first = self._x[axis, 0] if self.count else _places(self._pending)[axis, -1]
        last = _places(self._pending)[axis, -1] if self._pending else self._x[axis, self.count - 1]
        return float(first), float(last)

    def append(self, rows: list[Row]) -> None:
        """More rows, of later steps."""
        for row in rows:
            for name in row.values:
                if name not in self._columns and len(self._columns) < COLUMNS:
                    self._columns[name] = np.full((3, self.capacity), np.nan, np.float32)
        self._pending += rows
        while len(self._pending) >= self.stride:
            if self.count == self.capacity:
                self._halve()
                continue
            buckets = min(len(self._pending) // self.stride, self.capacity - self.count)
            taken, self._pending = self._pending[: buckets * self.stride], self._pending[buckets * self.stride :]
            where = slice(self.count, self.count + buckets)
            self._x[:, where] = _places(taken)[:, self.stride - 1 :: self.stride]
            for name, column in self._columns.items():
                column[:, where] = _reduce(_values(taken, name).reshape(buckets, self.stride))
            self.count += buckets

    def series(self, name: str, axis: Axis) -> Series | None:
        """A column over an axis, with the rows of the bucket that is not full yet; None where there is no such."""
        column = self._columns.get(name)
        if column is None:
            return None
        x, values = self._x[AXES.index(axis), : self.count], column[:, : self.count].astype(np.float64)
        if self._pending:
            x = np.append(x, _places(self._pending)[AXES.index(axis), -1])
            values = np.hstack([values, _reduce(_values(self._pending, name)[None])])
        known = ~np.isnan(values[0])
        return Series(x[known], *values[:, known])

    def _halve(self) -> None:
        half = self.count // 2
        self._x[:, :half] = self._x[:, 1 : 2 * half : 2]
        for column in self._columns.values():
            pairs = column[:, : 2 * half].reshape(3, half, 2)
            mean, low, high = _reduce(pairs[0])[0], _reduce(pairs[1])[1], _reduce(pairs[2])[2]
            column[:, :half] = mean, low, high
            column[:, half:] = np.nan
        self.stride, self.count = 2 * self.stride, half


def _places(rows: list[Row]) -> NDArray[np.float64]:
    return np.array([[row.step for row in rows], [row.tokens for row in rows], [row.time for row in rows]], np.float64)


def _values(rows: list[Row], name: str) -> NDArray[np.float64]:
    return np.array([row.values.get(name, np.nan) for row in rows], np.float64)


def _reduce(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Mean, lowest and highest of each row: [N, K] to [3, N]; NaN is no value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows without a value
        mean = np.nanmean(values, axis=1)
    return np.stack([mean, np.fmin.reduce(values, axis=1), np.fmax.reduce(values, axis=1)])
