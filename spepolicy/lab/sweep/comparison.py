"""Policies beside each other on the same lanes: paired differences, and what they say in plain words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from spepolicy.lab.run import CHOSEN
from spepolicy.lab.summary import number_text
from spepolicy.lab.sweep.collect import Outcome

__all__ = ["Difference", "conclusions", "paired_difference", "scenarios"]

LOSS = "unseen_samples_pct"
MEMORY = "pinned_peak_MiB"
TIME = "stolen_pct"


@dataclass(frozen=True)
class Difference:
    """Mean of one - other over lanes of the same seed and replicate, which see the same guest and host events."""

    mean: float
    half: float  # half-width of its 95 % confidence interval; infinite for a single lane
    lanes: int

    def is_clear(self) -> bool:
        """The interval does not contain 0."""
        return abs(self.mean) > self.half


def paired_difference(one: Outcome, other: Outcome, metric: str) -> Difference:
    """Return the paired difference of *metric* between two outcomes, which must be on one scenario.

    Lanes where either is not defined are left out. Student's interval of the mean, by scipy.
    """
    from scipy import stats

    mine = dict(zip(_pairs(one), one.lanes[metric].tolist(), strict=True))
    theirs = dict(zip(_pairs(other), other.lanes[metric].tolist(), strict=True))
    values = np.array([mine[pair] - theirs[pair] for pair in mine if pair in theirs])
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return Difference(float(values.mean()) if len(values) else math.nan, math.inf, len(values))
    if np.ptp(values) == 0:
        return Difference(float(values[0]), 0.0, len(values))
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return Difference(float(values.mean()), float(interval.high - interval.low) / 2, len(values))


def _pairs(outcome: Outcome) -> list[tuple[int, int]]:
    return list(zip(outcome.seed.tolist(), outcome.replicate.tolist(), strict=True))


def scenarios(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Return the outcomes by what they are on: the values that vary, but for the policy's own fields."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.configuration.scenario_key, []).append(outcome)
    named: dict[str, list[Outcome]] = {}
    for group in groups.values():
        params = group[0].configuration.params.items()
        label = " ".join(f"{key}={value}" for key, value in params if not key.startswith("policy")) or "this scenario"
        named.setdefault(label, []).extend(group)
    return named


def conclusions(outcomes: Iterable[Outcome]) -> list[str]:
    """Return a sentence for each pair of policies that were asked for, on each scenario.

    It says how many more samples the worse of them does not show, whether the difference is clear, and what the better
    one takes for that: memory and stolen time.
    """
    said = []
    for label, group in scenarios(outcomes).items():
        chosen = [outcome for outcome in group if outcome.configuration.role == CHOSEN and LOSS in outcome.values]
        for one, other in itertools.combinations(chosen, 2):
            said.append(_sentence(label, one, other))
    return said


def _sentence(label: str, one: Outcome, other: Outcome) -> str:
    worse, better = (one, other) if one.values[LOSS] >= other.values[LOSS] else (other, one)
    loss = paired_difference(worse, better, LOSS)
    first, second = _own_name(worse), _own_name(better)
    interval = f" +- {number_text(loss.half, 2)}" if math.isfinite(loss.half) and loss.half else ""
    if not math.isfinite(loss.half):
        clear = f"On {label}, one lane says that {first} loses {number_text(loss.mean)} % more samples than {second}"
    elif loss.is_clear():
        clear = f"On {label}, {first} loses {number_text(loss.mean)} %{interval} more samples than {second}"
    else:
        clear = (
            f"On {label}, {first} and {second} lose the same share of samples as far as {loss.lanes} lanes can tell "
            f"({number_text(loss.mean)} %{interval}). {first}"
        )
        return f"{clear}{_memory(worse, better, second).removeprefix(',')}{_time(worse, better, second)}."
    return f"{clear}{_memory(worse, better, second)}{_time(worse, better, second)}."


def _own_name(outcome: Outcome) -> str:
    """Name the policy, with its fields where they vary."""
    params = outcome.configuration.params.items()
    fields = [f"{key.rpartition('.')[2]}={value}" for key, value in params if key.startswith("policy.")]
    return f"`{' '.join([outcome.configuration.policy.name, *fields])}`"


def _memory(one: Outcome, other: Outcome, name: str) -> str:
    mine, theirs = one.values.get(MEMORY, 0.0), other.values.get(MEMORY, 0.0)
    if mine == theirs:
        return ", pins as much memory"
    if not mine or not theirs:
        own = f"{number_text(mine)} MiB of" if mine else "no"
        return f", pins {own} memory ({name}: {number_text(theirs)} MiB)"
    ratio = max(mine, theirs) / min(mine, theirs)
    return f", pins {number_text(ratio)} times {'less' if mine < theirs else 'more'} memory"


def _time(one: Outcome, other: Outcome, name: str) -> str:
    steal = paired_difference(one, other, TIME)
    if not math.isfinite(steal.half) or not steal.is_clear():
        return f", and takes as much of the vCPU's time as {name}"
    more = "more" if steal.mean > 0 else "less"
    return f", and takes {number_text(abs(steal.mean))} +- {number_text(steal.half, 2)} % {more} of the vCPU's time"
