"""Means over conversations, and how far another sample of conversations might have moved them."""

import math
from dataclasses import dataclass

import numpy as np

RESAMPLES, SEED = 2000, 0
AT_ONCE = 2**22  # numbers that are drawn together


@dataclass(frozen=True)
class Difference:
    """Adapter minus base, with its 95% confidence interval; NaN where there is none."""

    value: float
    low: float
    high: float


def ratio(sums: np.ndarray) -> float:
    """The mean of a quantity: sums [conversations, 2], of its value and of what it is a mean over. NaN of nothing."""
    value, count = sums.sum(0).tolist()
    return value / count if count else math.nan


def difference(base: np.ndarray, adapter: np.ndarray, exponential: bool = False) -> Difference:
    """Between two means over the same conversations: base and adapter [conversations, 2], as for `ratio`.

    The interval is the percentile bootstrap's (Efron and Tibshirani 1993, chapter 13): conversations are drawn with
    replacement, 2,000 times from a fixed seed, each with both of its sides, and both means taken anew. That is paired:
    what makes a conversation hard for both does not widen it. With less than two conversations there is none.

    Args:
        exponential: of e to the means (perplexity).
    """
    shown = np.exp if exponential else np.asarray
    value = float(shown(ratio(adapter)) - shown(ratio(base)))
    conversations = len(base)
    if conversations < 2 or math.isnan(value):
        return Difference(value, math.nan, math.nan)
    generator, sides = np.random.default_rng(SEED), np.concatenate([base, adapter], 1)
    found = []
    each = max(1, AT_ONCE // conversations)
    for first in range(0, RESAMPLES, each):
        drawn = min(each, RESAMPLES - first)
        times = generator.multinomial(conversations, np.full(conversations, 1 / conversations), size=drawn)
        base_value, base_count, value_, count = (times @ sides).T
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(shown(value_ / count) - shown(base_value / base_count))
    low, high = np.nanpercentile(np.concatenate(found), (2.5, 97.5)).tolist()
    return Difference(value, low, high)
