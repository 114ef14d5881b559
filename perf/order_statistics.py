"""Medians and what can be said of them without assuming a distribution."""

import functools
import math
from collections.abc import Sequence

import numpy as np

_CONFIDENCE = 0.95


def summarise(values: Sequence[float] | np.ndarray) -> dict:
    """The SUMMARY of a report: median, p5, p95 and count of at least one value, and how well the median is known.

    relative_ci: half the width of the median's 95 % confidence interval, divided by the median; None for fewer than six
    values, which have no such interval, and for a median of 0. It takes the values as independent of each other.
    """
    p5, median, p95 = np.percentile(values, (5, 50, 95)).tolist()
    interval = median_interval(values)
    return {
        "median": median,
        "p5": p5,
        "p95": p95,
        "count": len(values),
        "relative_ci": (interval[1] - interval[0]) / 2 / median if interval and median > 0 else None,
    }


def median_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """Two of the values between which the distribution's median lies with 95 % confidence; None for fewer than six.

    The k-th smallest and the k-th largest, for the largest k that keeps the confidence: the median is below the k-th smallest
    of n values if fewer than k of n tosses of a coin show heads (David & Nagaraja, Order Statistics, section 7.1).
    """
    k = _rank(len(values))
    if k == 0:
        return None
    ordered = np.sort(values)
    return float(ordered[k - 1]), float(ordered[-k])


@functools.cache
def _rank(count: int) -> int:
    """The largest k for which fewer than k heads in `count` tosses have a probability of at most 2.5 %; 0 for none."""
    least = (1 - _CONFIDENCE) / 2
    if count > 1000:  # the probabilities' logarithms are sums of large numbers; and the normal curve is exact to 1 in k
        return math.floor((count - 1.96 * math.sqrt(count)) / 2)
    probability, k = 0.0, 0
    while True:
        probability += math.comb(count, k) * 0.5**count
        if probability > least:
            return k
        k += 1
