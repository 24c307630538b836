"""How far the profile that the guest gets is from the true one.

The true profile is what a sampler without gaps, collisions and noise would show: every operation that executed while
profiling was wanted and that the filters let through, by function. The distance is the total variation TV(p, q) = 1/2
sum |p_f - q_f|: the share of records that would have to move to another function to make both equal; 0 is perfect, 1 is
disjoint.

A finite sample is never perfect. `expected_sampling_tv` says what distance a *random* sample of the same size has on
average. SPE samples at intervals, which spreads samples evenly over a program's phases, so a good profile may be closer
than that, and the excess slightly negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spepolicy.alias import TABLE_DRAWS
from spepolicy.judge.lanes import Floats, ratio
from spepolicy.machine.draw import EXPONENTIAL_SHIFT, exponential_table
from spepolicy.workload import outcome_counts

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result
    from spepolicy.machine.scenario import Scenario

__all__ = [
    "TOP",
    "Fidelity",
    "expected_sampling_tv",
    "fidelity",
    "function_shares",
    "seen_profile",
    "total_variation",
    "true_profile",
]

TOP = 5
"""Functions that "the top" of a profile means: what a person looks at first."""


def _pass_probability(scenario: Scenario) -> Floats:
    """Return float64[K]: the probability that an operation of each outcome passes the guest's filters (spe.md rules 19,
    20).

    The latency part counts the 1,024 equally likely draws that the machine makes
    (`spepolicy.machine.spu.sample_until`), so it is exact.
    """
    work, guest = scenario.workload, scenario.guest
    passes = np.ones(len(work.outcome_type))
    if guest.type_filter:
        passes *= (work.outcome_type & guest.type_filter) != 0
    if guest.event_filter:
        passes *= (work.outcome_events & guest.event_filter) == guest.event_filter
    if guest.min_latency_cycles:
        spread = (work.outcome_spread_cycles[:, np.newaxis] * exponential_table()) >> EXPONENTIAL_SHIFT
        latency = np.minimum(work.outcome_latency_cycles[:, np.newaxis] + spread, (1 << scenario.cpu.counter_bits) - 1)
        passes *= (latency >= guest.min_latency_cycles).mean(axis=1)
    return passes


def function_shares(scenario: Scenario) -> Floats:
    """Return float64[D, F]: records by function that an operation of each distribution gives; 1 in all, unfiltered."""
    work = scenario.workload
    guest = scenario.guest
    if not (guest.type_filter or guest.event_filter or guest.min_latency_cycles):
        return work.weight
    probability = outcome_counts(work) / TABLE_DRAWS * _pass_probability(scenario)
    shares = np.zeros(work.weight.shape)
    for outcome, function in enumerate(work.outcome_function.tolist()):
        shares[:, function] += probability[:, outcome]
    return shares


def true_profile(result: Result) -> Floats:
    """Return float64[N, F]: operations executed in wanted time that the filters let through, by function, all vCPUs of
    a lane.

    exposure_ps[d] / op_ps[d] operations of distribution d, times `function_shares`. Not normalised.
    """
    operations = result.exposure_ps.sum(axis=1) / result.scenario.workload.op_ps
    # Not with @: BLAS adds in an order that depends on the number of lanes, and a lane's numbers must not.
    profile: Floats = np.zeros((len(operations), len(result.scenario.workload.function_names)))
    for share, executed in zip(function_shares(result.scenario), operations.T, strict=True):
        profile += executed[:, None] * share
    return profile


def seen_profile(result: Result) -> Floats:
    """Return float64[N, F]: records kept, by function, all vCPUs of a lane. Not normalised."""
    profile: Floats = result.seen.sum(axis=1).astype(np.float64)
    return profile


def _normalised(profile: Floats) -> Floats:
    """Rows divided by their sum; NaN for a row of nothing."""
    total = profile.sum(axis=-1, keepdims=True)
    return ratio(profile, np.broadcast_to(total, profile.shape))


def total_variation(p: Floats, q: Floats) -> Floats:
    """Return 1/2 sum |p - q| along the last axis, both normalised first: 0..1, NaN where either profile is empty."""
    distance: Floats = np.abs(_normalised(p) - _normalised(q)).sum(axis=-1) / 2
    return distance


def _mean_absolute_deviation(n: int, p: float) -> float:
    """Return E|X - np| for X ~ Binomial(n, p), exactly.

    De Moivre's identity: E|X - np| = 2 v (1 - p) P(X = v) with v = floor(np) + 1 (P. Diaconis and S. Zabell, "Closed
    form summation for classical distributions", Statistical Science 6(3), 1991).
    """
    if n == 0 or p <= 0.0 or p >= 1.0:
        return 0.0
    v = math.floor(n * p) + 1
    log_choose = math.lgamma(n + 1) - math.lgamma(v + 1) - math.lgamma(n - v + 1)
    return 2 * v * (1 - p) * math.exp(log_choose + v * math.log(p) + (n - v) * math.log1p(-p))


def expected_sampling_tv(records: int, profile: Floats) -> float:
    """Return the expected TV between *profile* (float64[F]) and a multinomial sample of *records* draws from it; NaN
    without records.

    E TV = 1/(2n) sum_f E|X_f - n p_f|; each X_f is binomial, so no normal approximation is needed.
    """
    shares = _normalised(profile)
    if records == 0 or np.isnan(shares).any():
        return math.nan
    return sum(_mean_absolute_deviation(records, float(p)) for p in shares) / (2 * records)


@dataclass(frozen=True)
class Fidelity:
    """Distances of each lane's profile, float64[N], NaN where a lane has no profile."""

    tv: Floats
    tv_noise: Floats  # of it, what random sampling of as many records explains
    top_error_pp: Floats  # largest error in the share of one of the TOP functions, percentage points
    top_found: Floats  # share of the TOP functions that are in the seen profile's top as well
    pooled_tv: float  # of the profile summed over all lanes: noise averages out, bias stays
    pooled_tv_noise: float


def fidelity(result: Result) -> Fidelity:
    """Compare the seen profile of each lane with the true one."""
    true, seen = true_profile(result), seen_profile(result)
    records = seen.sum(axis=1).astype(np.int64)
    noise = [expected_sampling_tv(int(n), row) for n, row in zip(records, true, strict=True)]
    error, found = _top(true, seen)
    return Fidelity(
        tv=total_variation(true, seen),
        tv_noise=np.array(noise, dtype=np.float64),
        top_error_pp=error,
        top_found=found,
        pooled_tv=float(total_variation(true.sum(axis=0), seen.sum(axis=0))),
        pooled_tv_noise=expected_sampling_tv(int(records.sum()), true.sum(axis=0)),
    )


def _top(true: Floats, seen: Floats) -> tuple[Floats, Floats]:
    """Largest share error, in percentage points, of the truly TOP functions, and how many of them are seen as top."""
    p, q = _normalised(true), _normalised(seen)
    top = min(TOP, true.shape[1])
    first = np.argsort(-p, axis=1, kind="stable")[:, :top]
    seen_first = np.argsort(-q, axis=1, kind="stable")[:, :top]
    error = np.abs(np.take_along_axis(p, first, axis=1) - np.take_along_axis(q, first, axis=1)).max(axis=1) * 100
    found = (first[:, :, np.newaxis] == seen_first[:, np.newaxis, :]).any(axis=2).mean(axis=1)
    return error, np.where(np.isnan(error), np.nan, found)
