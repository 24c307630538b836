"""spepolicy.judge.fidelity: the true profile, the distance, and what sampling noise explains of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spepolicy.judge.fidelity import (
    expected_sampling_tv,
    fidelity,
    function_shares,
    seen_profile,
    total_variation,
    true_profile,
)
from spepolicy.judge.lanes import take_lanes
from spepolicy.machine.draw import EXPONENTIAL_SHIFT, exponential_table
from spepolicy.machine.scenario import OpType

from .hand_made_results import MS, empty_result, profiled, scenario

profiles = st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any).map(lambda x: np.array(x, dtype=float))


@settings(deadline=None)
@given(profiles, profiles)
def test_distance_is_a_metric_between_0_and_1(p: np.ndarray, q: np.ndarray) -> None:
    distance = float(total_variation(p, q))
    assert -1e-12 <= distance <= 1 + 1e-12
    assert distance == pytest.approx(float(total_variation(q, p)))
    assert float(total_variation(p, 7 * p)) == pytest.approx(0.0, abs=1e-12)


def test_distance_of_disjoint_profiles_is_1_and_of_nothing_undefined() -> None:
    assert float(total_variation(np.array([4.0, 0.0]), np.array([0.0, 9.0]))) == 1.0
    assert np.isnan(total_variation(np.array([4.0, 0.0]), np.zeros(2)))


def test_true_profile_counts_operations_of_wanted_time() -> None:
    result = empty_result()
    profiled(result, 0, 0, (2 * MS, 8 * MS), (1, 1, 1))
    # 20 million operations of distribution 0, 40 million of distribution 1
    assert true_profile(result).tolist() == [[10e6, 10e6 + 10e6, 30e6]]
    assert seen_profile(result).tolist() == [[1.0, 1.0, 1.0]]


def test_type_filter_leaves_only_what_it_keeps() -> None:
    shares = function_shares(scenario(type_filter=int(OpType.LOAD)))
    np.testing.assert_allclose(shares, [[0.0, 0.5, 0.0], [0.0, 0.25, 0.0]])


def test_event_filter_wants_all_of_its_bits() -> None:
    np.testing.assert_allclose(function_shares(scenario(event_filter=0b110)), [[0.0, 0.5, 0.0], [0.0, 0.25, 0.0]])
    np.testing.assert_allclose(function_shares(scenario(event_filter=0b10)), [[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])


@pytest.mark.parametrize("least", [1, 5, 10, 11, 30, 100])
def test_latency_filter_keeps_the_share_of_the_machines_draws(least: int) -> None:
    shares = function_shares(scenario(min_latency_cycles=least))
    latencies = [10 + ((20 * int(draw)) >> EXPONENTIAL_SHIFT) for draw in exponential_table()]
    passing = sum(latency >= least for latency in latencies) / 1024
    np.testing.assert_allclose(shares[0], [0.5 * (least <= 1), 0.5 * passing, 0.0])
    # An exponential of mean 20 from 10 on, apart from rounding to cycles and the table's steps.
    assert passing == pytest.approx(min(1.0, np.exp(-(least - 10) / 20)), abs=0.03)


@settings(deadline=None, max_examples=50)
@given(profiles, st.integers(1, 120))
def test_noise_is_the_expectation_over_all_outcomes(profile: np.ndarray, records: int) -> None:
    expected = 0.0
    for p in profile / profile.sum():
        for k in range(records + 1):
            probability = math.comb(records, k) * p**k * (1 - p) ** (records - k)
            expected += probability * abs(k - records * p) / (2 * records)
    assert expected_sampling_tv(records, profile) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("records", [7, 200, 5000])
@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.9, 0.07, 0.03), (0.25, 0.25, 0.25, 0.25)])
def test_noise_is_what_a_monte_carlo_finds(shares: tuple[float, ...], records: int) -> None:
    draws = np.random.default_rng(5).multinomial(records, shares, size=4000)
    found = np.abs(draws / records - shares).sum(axis=1) / 2
    error = found.std() / np.sqrt(len(found))
    assert expected_sampling_tv(records, np.array(shares)) == pytest.approx(found.mean(), abs=4 * error)


def test_noise_of_many_records_is_that_of_the_normal_distribution() -> None:
    # E|X - np| = sqrt(2 n p q / pi), so with two functions TV = sqrt(2 p q / (pi n))
    assert expected_sampling_tv(10**7, np.array([3.0, 1.0])) == pytest.approx(
        np.sqrt(2 * 0.75 * 0.25 / (np.pi * 10**7)), rel=1e-5
    )


def test_noise_of_one_function_is_0_and_without_records_undefined() -> None:
    assert expected_sampling_tv(100, np.array([0.0, 5.0])) == 0.0
    assert np.isnan(expected_sampling_tv(0, np.array([1.0, 1.0])))


def test_a_profile_in_the_true_shares_has_distance_0() -> None:
    result = empty_result()
    profiled(result, 0, 0, (2 * MS, 8 * MS), (100, 200, 300))
    found = fidelity(result)
    assert found.tv.tolist() == [0.0]
    assert found.tv_noise[0] > 0
    assert found.top_error_pp.tolist() == [0.0]
    assert found.top_found.tolist() == [1.0]


def test_bias_survives_pooling() -> None:
    result = empty_result(replicates=range(4))
    for lane, seen in enumerate([(30, 20, 0), (20, 30, 0), (40, 10, 0), (10, 40, 0)]):
        profiled(result, lane, 0, (MS, 0), seen)
    found = fidelity(result)
    np.testing.assert_allclose(found.tv, [0.1, 0.1, 0.3, 0.3])
    assert found.pooled_tv == pytest.approx(0.0)
    for lane in range(4):
        result.seen[lane, 0] += [50, 0, 0]
    assert fidelity(result).pooled_tv == pytest.approx(0.25)


def test_a_lane_without_records_has_no_distance() -> None:
    result = empty_result(replicates=(0, 1))
    profiled(result, 0, 0, (MS, 0), (1, 1, 0))
    profiled(result, 1, 0, (MS, 0), (0, 0, 0))
    found = fidelity(replace(result))
    assert np.isnan(found.tv).tolist() == [False, True]
    assert np.isnan(found.top_found).tolist() == [False, True]


def test_a_lane_s_profile_does_not_depend_on_how_many_are_judged_with_it() -> None:
    """To the last bit: rows of a sweep must be equal however it was cut."""
    rng = np.random.default_rng(4)
    distributions, functions = 13, 41
    result = empty_result(replicates=tuple(range(50)))
    work = replace(
        result.scenario.workload,
        function_names=tuple(map(str, range(functions))),
        op_ps=rng.integers(100, 900, distributions),
        weight=rng.dirichlet(np.ones(functions), distributions),
    )
    result = replace(
        result,
        scenario=replace(result.scenario, workload=work),
        exposure_ps=rng.integers(0, 10**12, (50, 1, distributions)),
    )
    whole = true_profile(result)
    for lane in range(50):
        assert np.array_equal(true_profile(take_lanes(result, np.array([lane])))[0], whole[lane])
