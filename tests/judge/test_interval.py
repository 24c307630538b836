"""spepolicy.judge.interval: Student's t without a statistics library."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from spepolicy.judge.interval import mean_ci95, means_ci95, t_quantile_975


@pytest.mark.parametrize(
    ("df", "quantile"),
    # Published tables of the 97.5 % point.
    [
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (4, 2.77645),
        (7, 2.36462),
        (10, 2.22814),
        (30, 2.04227),
        (120, 1.97993),
    ],
)
def test_quantiles_of_published_tables(df: int, quantile: float) -> None:
    assert t_quantile_975(df) == pytest.approx(quantile, abs=6e-5)


def test_quantiles_fall_towards_the_normal_distribution() -> None:
    values = [t_quantile_975(df) for df in range(1, 200)]
    assert all(a > b for a, b in pairwise(values))
    assert t_quantile_975(100_000) == pytest.approx(1.959964, abs=5e-5)


def test_interval_by_hand() -> None:
    mean, half = mean_ci95(np.array([1.0, 2.0, 3.0]))
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3))


def test_nan_is_not_a_replicate() -> None:
    assert mean_ci95(np.array([1.0, np.nan, 2.0, 3.0])) == mean_ci95(np.array([1.0, 2.0, 3.0]))
    mean, half = mean_ci95(np.array([np.nan, 5.0]))
    assert mean == 5.0
    assert math.isnan(half)
    assert all(math.isnan(x) for x in mean_ci95(np.array([np.nan])))


def test_the_interval_covers_the_mean_95_times_in_100() -> None:
    random = np.random.default_rng(20)
    draws = random.normal(3.0, 2.0, size=(4000, 5))
    covered = 0
    for row in draws:
        mean, half = mean_ci95(row)
        covered += abs(mean - 3.0) <= half
    assert covered / len(draws) == pytest.approx(0.95, abs=0.015)  # four standard errors


MEASURES = st.floats(-1e12, 1e12) | st.just(math.nan) | st.just(0.0)


@settings(deadline=None)
@given(
    rows=st.tuples(st.integers(1, 12), st.integers(0, 300)).flatmap(
        lambda shape: npst.arrays(np.float64, shape, elements=MEASURES, fill=st.floats(-1e6, 1e6))
    )
)
def test_many_at_once_are_each_by_itself_to_the_bit(rows: NDArray[np.float64]) -> None:
    """Summation in numpy goes by blocks of 128; a sweep's numbers must not depend on who was judged beside whom."""
    means, halves = means_ci95(rows)
    for row, mean, half in zip(rows, means, halves, strict=True):
        np.testing.assert_array_equal((mean, half), mean_ci95(row), strict=False)
