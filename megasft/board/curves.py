"""Curves of several runs with few enough points to draw: bins that stay where they are as a run grows."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megasft.board.content import Content
from megasft.board.table import Axis, Series


def bin_width(first: float, last: float, points: int) -> float:
    """The power of two by which [first, last] has at most `points` bins; 0 where the range is empty."""
    extent = last - first
    if not extent / points > 1e-12 * max(abs(first), abs(last)):  # no wider than rounding
        return 0.0
    return 2.0 ** math.ceil(math.log2(extent / points))


def curves(
    content: Content,
    keys: list[str],
    axis: Axis,
    window: tuple[float, float],
    width: float,
    after: float = -math.inf,
    bands: bool = True,
) -> dict[str, Any]:
    """The columns `keys` of a run within `window` of an axis.

    Args:
        width: of a bin; 0: every point.
        after: only points from the bin of this place on, which replace the client's from there.
        bands: whether the lowest and highest values are wanted.

    Returns, by key, `x`, `mean`, `low`, `high`: a list each; `low` and `high` are absent where they equal `mean`.
    """
    found = {}
    for key in keys:
        series = content.series(key, axis)
        if series is not None and len(series.x):
            found[key] = _thin(series, window, width, after, bands)
    return found


def extent(contents: list[Content], axis: Axis) -> tuple[float, float, int]:
    """The lowest and highest place over all runs, and the most points that one has; zeros where there are none."""
    found = [place for content in contents if (place := content.extent(axis))]
    if not found:
        return 0.0, 0.0, 0
    return min(low for low, _, _ in found), max(high for _, high, _ in found), max(most for _, _, most in found)


def _thin(
    series: Series, window: tuple[float, float], width: float, after: float, bands: bool
) -> dict[str, list[float]]:
    place = np.floor(series.x / width) if width else series.x
    start = max(window[0], after if not width or math.isinf(after) else math.floor(after / width) * width)
    # One point beyond each edge of the window, so that lines reach it.
    first = max(0, int(np.searchsorted(series.x, start)) - (start == window[0]))
    last = int(np.searchsorted(series.x, window[1], side="right")) + 1
    x, place = series.x[first:last], place[first:last]
    mean, low, high = series.mean[first:last], series.low[first:last], series.high[first:last]
    if not len(x):
        return {"x": [], "mean": []}
    starts = np.flatnonzero(np.concatenate([[True], np.diff(place) > 0]))
    counts = np.diff(np.append(starts, len(x)))
    x = x[np.append(starts[1:], len(x)) - 1]
    mean = np.add.reduceat(mean, starts) / counts
    thin = {"x": rounded(x, 12), "mean": rounded(mean)}
    if not bands:
        return thin
    low, high = np.fmin.reduceat(low, starts), np.fmax.reduceat(high, starts)
    if not (np.allclose(low, mean, rtol=1e-6, atol=0) and np.allclose(high, mean, rtol=1e-6, atol=0)):
        thin |= {"low": rounded(low), "high": rounded(high)}
    return thin


def rounded(values: NDArray[np.float64], digits: int = 6) -> list[float]:
    """Numbers with so many significant digits: what a picture shows, and half the bytes."""
    return [float(f"{value:.{digits}g}") for value in values.tolist()]
