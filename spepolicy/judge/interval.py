"""Means over replicates with 95 % confidence intervals.

Student's t for n replicates has n - 1 degrees of freedom, an integer, for which its distribution function is a finite
sum of powers of a cosine (Abramowitz and Stegun 26.7.3 and 26.7.4): no statistics library is needed for the exact
quantile.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["mean_ci95", "means_ci95", "t_quantile_975"]


def _central_probability(t: float, df: int) -> float:
    """Return P(-t < T < t) for Student's T with integer *df* degrees of freedom, t >= 0."""
    theta = math.atan(t / math.sqrt(df))
    square = math.cos(theta) ** 2
    # Terms grow by (2/3)(4/5).. for odd and (1/2)(3/4).. for even degrees of freedom, times cos^2 each.
    first = 2 if df % 2 else 1
    steps = np.arange(first, df - 2, 2, dtype=np.float64)
    series = 1.0 + float(np.sum(np.cumprod(steps / (steps + 1) * square)))
    if df % 2 == 0:
        return math.sin(theta) * series
    tail = math.sin(theta) * math.cos(theta) * series if df > 1 else 0.0
    return 2 / math.pi * (theta + tail)


@cache
def t_quantile_975(df: int) -> float:
    """Return the 97.5 % quantile of Student's t with *df* >= 1 degrees of freedom, to 1e-10."""
    low, high = 0.0, 13.0  # df = 1 has the largest, 12.706
    while high - low > 1e-11:
        middle = (low + high) / 2
        if _central_probability(middle, df) < 0.95:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mean_ci95(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return (mean, half-width of its 95 % confidence interval) of *values*, float64[n], one a replicate.

    mean +- t(0.975, n - 1) * s / sqrt(n), s the sample standard deviation. NaN marks a replicate for which the measure
    is not defined; it does not count. The mean of nothing is NaN, and so is the half-width for fewer than two values.
    """
    defined = values[~np.isnan(values)]
    n = len(defined)
    if n == 0:
        return math.nan, math.nan
    mean = float(defined.mean())
    if n == 1:
        return mean, math.nan
    return mean, t_quantile_975(n - 1) * float(defined.std(ddof=1)) / math.sqrt(n)


def means_ci95(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return `mean_ci95` of each of *rows*, float64[m, n], to the bit: means and half-widths, float64[m] each.

    Most measures are defined for all replicates; these are done at once.
    """
    count, n = rows.shape
    means, halves = np.full(count, math.nan), np.full(count, math.nan)
    defined = ~np.isnan(rows).any(axis=1)
    whole = rows[defined]
    if n > 0:
        means[defined] = whole.mean(axis=1)
    if n > 1:
        halves[defined] = t_quantile_975(n - 1) * whole.std(axis=1, ddof=1) / math.sqrt(n)
    for row in np.flatnonzero(~defined):
        means[row], halves[row] = mean_ci95(rows[row])
    return means, halves
