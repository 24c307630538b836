"""spepolicy.judge.blackout: fractions, pairing, order statistics of windows, and the series over guest time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spepolicy.judge.blackout import (
    blackout_fraction,
    blackout_series,
    excess_blackout,
    lane_series,
    mean_interval_ops,
    missed_samples,
    window_lengths,
)
from spepolicy.judge.lanes import finished_lanes, take_lanes
from spepolicy.machine.scenario import Guest
from spepolicy.machine.state import LOST_CAUSES, LostCause

from .hand_made_results import MS, SECOND, empty_result, eventful_result, profiled, with_windows

spans = st.tuples(st.integers(0, SECOND - 1), st.integers(1, SECOND), st.integers(0, 7))


def test_fraction_is_blackout_over_wanted_time_of_all_vcpus() -> None:
    result = empty_result(vcpus=2)
    profiled(result, 0, 0, (60 * MS, 0), (1, 0, 0))
    result = with_windows(result, [(0, 1, 0, 20 * MS, LostCause.BUFFER_FULL)])
    assert blackout_fraction(result).tolist() == [0.25]


def test_fraction_is_undefined_where_nothing_was_wanted() -> None:
    assert np.isnan(blackout_fraction(empty_result())).all()


def test_excess_pairs_lanes_by_replicate_not_by_position() -> None:
    mine = eventful_result(replicates=(7, 8, 9), blackout_ms=100)
    base = take_lanes(eventful_result("bare_metal", replicates=(7, 8, 9), blackout_ms=0), np.array([2, 0]))
    own = blackout_fraction(mine)
    other = dict(zip(base.replicates.tolist(), blackout_fraction(base), strict=True))
    excess = excess_blackout(mine, base)
    assert excess[0] == own[0] - other[7]
    assert np.isnan(excess[1])
    assert excess[2] == own[2] - other[9]
    assert np.isnan(excess_blackout(mine, None)).all()


def test_excess_over_oneself_is_zero() -> None:
    result = eventful_result()
    assert excess_blackout(result, result).tolist() == [0.0] * 4


@pytest.mark.parametrize(("jitter", "mean"), [(False, 4097.0), (True, 4224.5)])
def test_mean_interval_counts_the_member_that_reloads(jitter: bool, mean: float) -> None:
    assert mean_interval_ops(Guest(period_ops=4096, jitter=jitter)) == mean


def test_missed_samples() -> None:
    result = with_windows(empty_result(), [(0, 0, 0, 3 * MS, LostCause.STAGE1_FAULT)])
    assert missed_samples(result).tolist() == [3 * MS / 100 / 1000]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, SECOND)), max_size=40))
def test_order_statistics_are_those_of_numpy(rows: list[tuple[int, int]]) -> None:
    result = empty_result(replicates=(0, 1, 2))
    result = with_windows(result, [(lane, 0, 0, length, LostCause.RING_FULL) for lane, length in rows])
    found = window_lengths(result)
    for lane in range(3):
        lengths = [length / 1e6 for at, length in rows if at == lane]
        assert found.count[lane] == len(lengths)
        if lengths:
            assert found.median_us[lane] == pytest.approx(np.median(lengths))
            assert found.p99_us[lane] == pytest.approx(np.percentile(lengths, 99))
            assert found.longest_us[lane] == max(lengths)
        else:
            assert np.isnan(found.median_us[lane])
    if rows:
        every = [length / 1e6 for _, length in rows]
        assert found.pooled_p99_us == pytest.approx(np.percentile(every, 99))
        assert found.pooled_longest_us == max(every)


@settings(deadline=None)
@given(st.lists(spans, max_size=20), st.integers(1, 50))
def test_series_is_the_overlap_of_windows_with_bins(rows: list[tuple[int, int, int]], bins: int) -> None:
    rows = [(start, min(length, SECOND - start), cause) for start, length, cause in rows]
    result = with_windows(empty_result(), [(0, 0, start, length, LostCause(cause)) for start, length, cause in rows])
    series = blackout_series(result, bins)
    edges = np.linspace(0, SECOND, bins + 1)
    expected = np.zeros((bins, LOST_CAUSES))
    for start, length, cause in rows:
        expected[:, cause] += np.clip(edges[1:], start, start + length) - np.clip(edges[:-1], start, start + length)
    np.testing.assert_allclose(series.ms_per_s, expected / (SECOND / bins) * 1e3, atol=1e-6)
    total_ps = series.ms_per_s.sum() / 1e3 * SECOND / bins
    assert total_ps == pytest.approx(result.blackout_ps.sum(), abs=1e3)


def test_series_is_a_mean_over_lanes_and_vcpus() -> None:
    result = with_windows(empty_result(replicates=(0, 1), vcpus=2), [(1, 1, 0, SECOND, LostCause.STAGE2_HOST)])
    assert blackout_series(result, 4).ms_per_s[:, LostCause.STAGE2_HOST].tolist() == [250.0] * 4


def test_windows_follow_their_lanes() -> None:
    result = eventful_result(replicates=(10, 11, 12))
    taken = take_lanes(result, np.array([2, 0]))
    assert taken.replicates.tolist() == [12, 10]
    assert taken.windows["lane"].tolist() == [0, 0, 1, 1]
    assert taken.windows["length_ps"].tolist() == [100 * MS, 3 * MS, 100 * MS, MS]


def test_lanes_that_did_not_finish_are_left_out() -> None:
    result = replace(eventful_result(), finished=np.array([False, True, False, True]))
    assert finished_lanes(result).replicates.tolist() == [1, 3]


def test_the_series_of_lanes_is_the_series_of_each() -> None:
    """Laid end to end or lane by lane, and within the guest time."""
    result = eventful_result("sample", tuple(range(4)), 100)
    whole = lane_series(result, 20)
    assert whole.any()
    for lane in range(4):
        alone = blackout_series(take_lanes(result, np.array([lane])), 20).ms_per_s.sum(axis=1)
        assert whole[lane] == pytest.approx(alone)
