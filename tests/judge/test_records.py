"""spepolicy.judge.records: the laws hold for a consistent result, and every single wrong term is found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spepolicy.judge.records import ConservationError, check_conservation, check_profile, check_time
from spepolicy.machine.state import LOST_CAUSES, LostCause

from .hand_made_results import MS, empty_result, eventful_result, profiled, with_windows

COUNTERS = ("selected", "collided", "filtered", "kept", "discarded", "in_flight")


def test_consistent_results_pass() -> None:
    for result in (empty_result(), eventful_result()):
        check_conservation(result)
        check_profile(result)
        check_time(result)


@settings(deadline=None)
@given(
    lane=st.integers(0, 3),
    term=st.sampled_from([*COUNTERS, *LostCause]),
    by=st.integers(-1000, 1000).filter(bool),
)
def test_every_single_wrong_term_is_found(lane: int, term: str | LostCause, by: int) -> None:
    result = eventful_result()
    array = result.lost[:, :, term] if isinstance(term, LostCause) else result.truth[term]
    array[lane, 0] += by
    with pytest.raises(ConservationError) as caught:
        check_conservation(result)
    error = caught.value
    assert (error.lane, error.replicate, error.vcpu) == (lane, int(result.replicates[lane]), 0)
    name = f"lost_{term.name.lower()}" if isinstance(term, LostCause) else term
    assert error.terms[name] == array[lane, 0]
    assert set(error.terms) == {*COUNTERS, *(f"lost_{cause.name.lower()}" for cause in LostCause)}
    assert name in str(error)
    assert "by_hand" in str(error)


def test_two_errors_that_cancel_as_a_sum_are_found_if_one_term_is_negative() -> None:
    result = empty_result()
    result.truth["kept"][0, 0] = 5
    result.truth["discarded"][0, 0] = -5
    with pytest.raises(ConservationError):
        check_conservation(result)


def test_the_message_names_replicate_and_vcpu_of_the_first_violation() -> None:
    result = empty_result(replicates=(40, 41), vcpus=3)
    result.truth["selected"][1, 2] = 1
    with pytest.raises(ConservationError, match=r"lane 1 \(replicate 41\), vCPU 2: selected=1, .*=0\. 1 vCPUs"):
        check_conservation(result)


def test_unfinished_lanes_are_not_judged() -> None:
    result = eventful_result()
    result.truth["selected"][2, 0] += 1
    check_conservation(replace(result, finished=np.array([True, True, False, True])))


def test_kept_records_must_be_in_the_profile() -> None:
    result = empty_result()
    profiled(result, 0, 0, (MS, 0), (3, 2, 1))
    check_profile(result)
    result.seen[0, 0, 1] -= 1
    with pytest.raises(ConservationError, match="kept=6, seen=5"):
        check_profile(result)


@settings(deadline=None)
@given(cause=st.integers(0, LOST_CAUSES - 1), by=st.integers(-MS + 1, MS).filter(bool))
def test_blackout_must_be_wanted_time_that_is_not_active_and_in_windows(cause: int, by: int) -> None:
    result = with_windows(empty_result(), [(0, 0, 0, MS, LostCause(cause))])
    check_time(result)
    result.blackout_ps[0, 0, cause] += by
    with pytest.raises(ConservationError, match="wanted = active"):
        check_time(result)
    result.truth["wanted_ps"] += by
    with pytest.raises(ConservationError, match="sum of its windows"):
        check_time(result)
