"""spepolicy.alias: whole numbers of draws, realised exactly."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spepolicy.alias import SLOT_DRAWS, SLOTS, TABLE_DRAWS, alias_table, apportion, table_counts

weights = st.lists(
    st.one_of(st.integers(0, 5), st.integers(0, 2**40)), min_size=1, max_size=SLOTS
).filter(any)  # fmt: skip


def probabilities(weight: list[int]) -> list[Fraction]:
    return [Fraction(w, sum(weight)) for w in weight]


@settings(deadline=None)
@given(weights)
def test_apportioned_within_one_draw(weight: list[int]) -> None:
    wanted = probabilities(weight)
    counts = apportion(wanted)
    assert sum(counts) == TABLE_DRAWS
    for count, p in zip(counts, wanted, strict=True):
        assert abs(count - p * TABLE_DRAWS) < 1
        assert count == 0 or p > 0


@settings(deadline=None)
@given(weights)
def test_table_realises_the_counts(weight: list[int]) -> None:
    counts = apportion(probabilities(weight))
    threshold, outcome = alias_table(counts)
    assert threshold.shape == (SLOTS,)
    assert outcome.shape == (SLOTS, 2)
    assert threshold.min() >= 0
    assert threshold.max() <= SLOT_DRAWS
    assert table_counts(threshold[None], outcome[None], len(counts))[0].tolist() == counts
    possible = {k for k, count in enumerate(counts) if count}
    assert set(outcome.ravel().tolist()) <= possible  # also where a threshold leaves no room for an outcome


def test_one_outcome_fills_the_table() -> None:
    threshold, outcome = alias_table([0, TABLE_DRAWS, 0])
    assert (outcome == 1).all()
    assert table_counts(threshold[None], outcome[None], 3).tolist() == [[0, TABLE_DRAWS, 0]]


@pytest.mark.parametrize("outcomes", [1, 2, 255, 256])
def test_equal_outcomes_stay_equal(outcomes: int) -> None:
    counts = apportion([Fraction(1, outcomes)] * outcomes)
    assert max(counts) - min(counts) <= 1
    threshold, outcome = alias_table(counts)
    assert np.array_equal(table_counts(threshold[None], outcome[None], outcomes)[0], counts)


def test_ties_go_to_the_earlier_outcome() -> None:
    counts = apportion([Fraction(1, 3)] * 3)
    assert counts == [TABLE_DRAWS // 3 + 1, TABLE_DRAWS // 3, TABLE_DRAWS // 3]
