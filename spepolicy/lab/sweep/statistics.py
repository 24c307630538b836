"""What a sweep's rows allow to conclude: paired differences of policies, which of them nobody beats, when to stop.

Policies on one scenario are compared lane by lane: lanes of one seed and replicate see the same guest and the same host
events, so what they share drops out of the difference. Intervals and tests are scipy's, the Pareto front is
paretoset's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.lab.run import CHOSEN
from spepolicy.lab.sweep.collect import Outcome

__all__ = ["COMPARED", "PARETO", "Paired", "differences", "half_widths", "pareto_front"]

COMPARED = (
    "excess_blackout_pct", "unseen_samples_pct", "stolen_pct", "pinned_peak_MiB", "fidelity_tv_excess",
    "stage2_faults_per_s",
)  # fmt: skip
PARETO = ("excess_blackout_pct", "stolen_pct", "pinned_peak_MiB")  # less of each is better
CONFIDENCE = 0.95
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """The paired difference of a metric between two configurations on one scenario: one - other."""

    scenario: str  # hash
    one: str  # configuration key
    other: str
    metric: str
    lanes: int  # pairs in which both define the metric
    mean: float
    low: float  # 95 % confidence interval of the mean; equal to it if all pairs differ by the same amount
    high: float
    p: float  # of the hypothesis that the mean is 0, two-sided
    p_adjusted: float = math.nan  # for all differences of the sweep together: Benjamini and Hochberg

    def sign(self) -> int:
        """1 or -1 if the interval leaves no doubt of the sign, 0 if it does or there is no difference."""
        return int(self.low > 0) - int(self.high < 0)


def differences(outcomes: Iterable[Outcome], metrics: Sequence[str] = COMPARED) -> list[Paired]:
    """Return the paired differences of *metrics* between every two configurations that share a scenario.

    Baselines are compared with what was chosen, not with each other. A difference needs two lanes.
    """
    found: list[Paired] = []
    for group in by_scenario(outcomes).values():
        for one, other in itertools.combinations(group, 2):
            if CHOSEN in (one.configuration.role, other.configuration.role):
                found += _paired(one, other, metrics)
    return _adjusted(found)


def by_scenario(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes of each scenario, by its hash."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.configuration.scenario_key, []).append(outcome)
    return groups


def _paired(one: Outcome, other: Outcome, metrics: Sequence[str]) -> list[Paired]:
    rows, columns = _common(one, other)
    if len(rows) < 2:
        return []
    table = np.stack([one.lanes[name][rows] - other.lanes[name][columns] for name in metrics], axis=1)
    found = []
    whole = ~np.isnan(table).any(axis=0)
    for chosen in [np.flatnonzero(whole), *np.flatnonzero(~whole)[:, None]]:
        values = table[:, chosen]
        values = values[~np.isnan(values).any(axis=1)]
        if len(chosen) and len(values) > 1:
            mean, low, high, p = _interval(values)
            found += [
                Paired(
                    one.configuration.scenario_key,
                    one.configuration.key,
                    other.configuration.key,
                    metrics[metric],
                    len(values),
                    *(float(column[n]) for column in (mean, low, high, p)),
                )
                for n, metric in enumerate(chosen)
            ]
    return found


def _common(one: Outcome, other: Outcome) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of *one* and of *other* that have the same seed and replicate."""
    if np.array_equal(one.seed, other.seed) and np.array_equal(one.replicate, other.replicate):
        return np.arange(len(one.seed)), np.arange(len(one.seed))
    theirs = {pair: n for n, pair in enumerate(zip(other.seed.tolist(), other.replicate.tolist(), strict=True))}
    pairs = list(zip(one.seed.tolist(), one.replicate.tolist(), strict=True))
    rows = [n for n, pair in enumerate(pairs) if pair in theirs]
    return np.array(rows, dtype=np.int64), np.array([theirs[pairs[n]] for n in rows], dtype=np.int64)


def _interval(values: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Return mean, low, high and p of each column of *values* [n, k], n > 1, by a paired t test."""
    from scipy import stats

    mean: Floats = values.mean(axis=0)
    equal = np.ptp(values, axis=0) == 0
    steady = equal | (values.var(axis=0) == 0)  # no spread, or one whose square is below the floats: a division by 0
    with np.errstate(invalid="ignore", divide="ignore"):
        tested = stats.ttest_1samp(np.where(steady, values + np.arange(len(values))[:, None], values), 0.0, axis=0)
        interval = tested.confidence_interval(CONFIDENCE)
    mean = np.where(equal, values[0], mean)
    low, high = np.where(steady, mean, interval.low), np.where(steady, mean, interval.high)
    p = np.where(steady, np.where(mean == 0, 1.0, 0.0), tested.pvalue)
    return mean, low, high, p


def _adjusted(found: list[Paired]) -> list[Paired]:
    """Adjust the p values for the number of comparisons."""
    if not found:
        return []
    from dataclasses import replace

    from scipy import stats

    adjusted = stats.false_discovery_control([paired.p for paired in found], method="bh")
    return [replace(paired, p_adjusted=float(p)) for paired, p in zip(found, adjusted, strict=True)]


def pareto_front(outcomes: Iterable[Outcome]) -> set[str]:
    """Return the configurations (keys) that no other on the same scenario beats in all of `PARETO`, by their means.

    Baselines are no candidates. A configuration that lacks one of the metrics is none either.
    """
    from paretoset import paretoset

    front = set()
    for group in by_scenario(outcomes).values():
        able = [o for o in group if o.configuration.role == CHOSEN and all(name in o.values for name in PARETO)]
        if able:
            costs = np.array([[outcome.values[name] for name in PARETO] for outcome in able])
            best = paretoset(costs, sense=["min"] * len(PARETO), distinct=False, use_numba=False)
            front |= {outcome.configuration.key for outcome, on_front in zip(able, best, strict=True) if on_front}
    return front


def half_widths(outcomes: Iterable[Outcome], metric: str) -> dict[str, float]:
    """Return, by configuration, how wide the interval of *metric* is at worst: half of it, in the metric's unit.

    What counts are the paired differences to the other policies that were asked for on the same scenario; where there
    is none, the mean itself. Infinite where two lanes do not define it.
    """
    widths: dict[str, float] = {}
    for group in by_scenario(outcomes).values():
        chosen = [outcome for outcome in group if outcome.configuration.role == CHOSEN]
        for outcome in chosen:
            if len(chosen) == 1:
                widths[outcome.configuration.key] = outcome.ci95.get(metric, math.inf)
        for one, other in itertools.combinations(chosen, 2):
            paired = _paired(one, other, [metric])
            half = (paired[0].high - paired[0].low) / 2 if paired else math.inf
            for key in (one.configuration.key, other.configuration.key):
                widths[key] = max(half, widths.get(key, 0.0))
    return widths


def difference_table(found: Sequence[Paired], outcomes: Mapping[str, Outcome]) -> dict[str, list[Any]]:
    """Return a column a name, a row a difference: what the file differences.csv holds."""
    labels = {key: outcome.label() for key, outcome in outcomes.items()}
    return {
        "one": [labels[paired.one] for paired in found],
        "other": [labels[paired.other] for paired in found],
        "metric": [paired.metric for paired in found],
        "lanes": [paired.lanes for paired in found],
        "one_minus_other": [paired.mean for paired in found],
        "ci95_low": [paired.low for paired in found],
        "ci95_high": [paired.high for paired in found],
        "p": [paired.p for paired in found],
        "p_adjusted": [paired.p_adjusted for paired in found],
        "scenario_hash": [paired.scenario for paired in found],
    }
