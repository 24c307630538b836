"""Blackout, guest time in which profiling was wanted and the SPU did not sample: fractions, windows, what was missed.

*wanted* and *blackout* are guest-executed time: while a vCPU is preempted, or its exit is handled, no guest
operation executes, so none can be missed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spepolicy.judge.lanes import Floats, lane_sum, ratio
from spepolicy.machine.state import LOST_CAUSES, LostCause

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result
    from spepolicy.machine.scenario import Guest

__all__ = [
    "CAUSES",
    "BlackoutSeries",
    "WindowLengths",
    "blackout_by_cause_ps",
    "blackout_fraction",
    "blackout_series",
    "excess_blackout",
    "lane_series",
    "mean_interval_ops",
    "missed_samples",
    "window_lengths",
]

CAUSES: tuple[str, ...] = tuple(cause.name.lower() for cause in LostCause)
"""Names of the causes, in the order of `LostCause`."""

PS_PER_US = 1e6
PS_PER_S = 1e12


def blackout_by_cause_ps(result: Result) -> NDArray[np.int64]:
    """Return int64[N, LOST_CAUSES], ps: blackout of all vCPUs of a lane by `LostCause`."""
    total: NDArray[np.int64] = result.blackout_ps.sum(axis=1)
    return total


def blackout_fraction(result: Result) -> Floats:
    """Return float64[N]: blackout / wanted guest time, both summed over the vCPUs; NaN where nothing was wanted."""
    wanted = lane_sum(result, "wanted_ps")
    blackout = blackout_by_cause_ps(result).sum(axis=1)
    return ratio(blackout, wanted)


def excess_blackout(result: Result, baseline: Result | None) -> Floats:
    """Return float64[N]: blackout fraction minus the *baseline*'s (bare metal) at the same replicate, a paired
    difference.

    Lanes of one replicate see the same program and the same host, whatever the policy, so the difference has far less
    variance than either. NaN where the baseline lacks the replicate.
    """
    excess = np.full(len(result.replicates), np.nan)
    if baseline is None:
        return excess
    base = dict(zip(baseline.replicates.tolist(), blackout_fraction(baseline).tolist(), strict=True))
    mine = blackout_fraction(result).tolist()
    for lane, replicate in enumerate(result.replicates.tolist()):
        excess[lane] = mine[lane] - base.get(replicate, np.nan)
    return excess


def mean_interval_ops(guest: Guest) -> float:
    """Return the mean number of operations from one selection to the next.

    PMSIRR_EL1.RND=0: INTERVAL * 256 + 1, because the operation that finds the counter at 0 is not counted down
    (spe.md rule 10). RND=1: the low byte is random at each reload, mean 127.5 (rule 11). `period_ops` is INTERVAL *
    256.
    """
    return guest.period_ops + 1 + (127.5 if guest.jitter else 0.0)


def missed_samples(result: Result) -> Floats:
    """Return float64[N]: samples that were not selected because of blackout = missed operations / mean interval."""
    return lane_sum(result, "missed_ops") / mean_interval_ops(result.scenario.guest)


@dataclass(frozen=True)
class WindowLengths:
    """Lengths of blackout windows in wanted guest time, us; NaN where there is no window. Arrays have a row a lane."""

    count: NDArray[np.int64]
    median_us: Floats
    p99_us: Floats
    longest_us: Floats
    pooled_median_us: float  # over the windows of all lanes
    pooled_p99_us: float
    pooled_longest_us: float


def window_lengths(result: Result) -> WindowLengths:
    """Return order statistics of the windows, by lane and pooled; quantiles interpolate linearly."""
    lanes = len(result.replicates)
    order = np.lexsort((result.windows["length_ps"], result.windows["lane"]))
    length = result.windows["length_ps"][order] / PS_PER_US
    count = np.bincount(result.windows["lane"], minlength=lanes)
    first = np.cumsum(count) - count
    pooled = np.sort(length)
    return WindowLengths(
        count=count,
        median_us=_sorted_quantile(length, first, count, 0.5),
        p99_us=_sorted_quantile(length, first, count, 0.99),
        longest_us=_sorted_quantile(length, first, count, 1.0),
        pooled_median_us=_pooled_quantile(pooled, 0.5),
        pooled_p99_us=_pooled_quantile(pooled, 0.99),
        pooled_longest_us=_pooled_quantile(pooled, 1.0),
    )


def _sorted_quantile(values: Floats, first: NDArray[np.int64], count: NDArray[np.int64], q: float) -> Floats:
    """Quantile *q* of each run values[first : first + count], each sorted; NaN for an empty run."""
    result = np.full(len(count), np.nan)
    some = count > 0
    position = (count[some] - 1) * q
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, count[some] - 1)
    at_low, at_high = values[first[some] + low], values[first[some] + high]
    result[some] = at_low + (at_high - at_low) * (position - low)
    return result


def _pooled_quantile(values: Floats, q: float) -> float:
    return float(_sorted_quantile(values, np.zeros(1, np.int64), np.array([len(values)]), q)[0])


@dataclass(frozen=True)
class BlackoutSeries:
    """Blackout over guest time, mean over replicates and vCPUs."""

    edges_s: Floats  # [B + 1] guest time
    ms_per_s: Floats  # [B, LOST_CAUSES] blackout in ms a second of guest time, by LostCause


def blackout_series(result: Result, bins: int = 60) -> BlackoutSeries:
    """Return blackout by cause in *bins* equal parts of the guest time that the scenario lasts.

    A window counts from its start for as long as its wanted time: where the guest ran at an exception level that is
    not profiled in the middle, the part after that is shown early by so much. The totals over all bins are exact,
    except for what lies past the end.
    """
    duration_ps = float(result.scenario.duration_ps)
    width_ps = duration_ps / bins
    start = result.windows["start_ps"].astype(np.float64)
    end = start + result.windows["length_ps"]
    edges_ps: Floats = np.arange(bins + 1, dtype=np.float64) * width_ps
    total: Floats = np.zeros((bins, LOST_CAUSES))
    # Blackout up to time t is a sum of ramps; a bin's share is the difference between its edges.
    for cause in range(LOST_CAUSES):
        mine = result.windows["cause"] == cause
        if mine.any():
            total[:, cause] = np.diff(_covered_ps(start[mine], end[mine], edges_ps))
    vcpus = max(1, result.truth.size)
    return BlackoutSeries(edges_ps / PS_PER_S, total / width_ps * 1e3 / vcpus)


def lane_series(result: Result, bins: int = 60) -> Floats:
    """Return float64[N, bins]: blackout of all causes in ms a second of guest time and vCPU, a row a lane.

    As `blackout_series`, lane by lane; what lies past the end of the guest time is left out.
    """
    lanes, vcpus = len(result.replicates), max(1, result.truth.shape[1])
    duration_ps = float(result.scenario.duration_ps)
    # The lanes are laid end to end on one axis of time, so that one pass does them all.
    origin = result.windows["lane"] * duration_ps
    start = np.minimum(result.windows["start_ps"], duration_ps)
    end = np.minimum(start + result.windows["length_ps"], duration_ps)
    edges: Floats = np.arange(lanes * bins + 1, dtype=np.float64) * (duration_ps / bins)
    covered: Floats = np.diff(_covered_ps(origin + start, origin + end, edges)).reshape(lanes, bins)
    series: Floats = covered / (duration_ps / bins) * 1e3 / vcpus
    return series


def _covered_ps(start: Floats, end: Floats, at: Floats) -> Floats:
    """Total length of [start, end) up to each time of *at*: sum of min(end, t) - min(start, t)."""
    return _sum_of_minima(np.sort(end), at) - _sum_of_minima(np.sort(start), at)


def _sum_of_minima(ordered: Floats, at: Floats) -> Floats:
    below = np.searchsorted(ordered, at)
    prefix = np.concatenate(([0.0], np.cumsum(ordered)))
    total: Floats = prefix[below] + (len(ordered) - below) * at
    return total
