"""Which conclusions survive when each cost constant moves through its range, and where the others flip.

A *conclusion* is a paired difference of two policies on one scenario whose interval leaves no doubt of its sign. Each
cost constant is moved alone, to both ends of its range in `spepolicy.schema`, and the policies run again on the same
seeds. Where the sign is another one there, the place is narrowed down by bisection, on a logarithmic scale.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from spepolicy.errors import ConfigurationError, nearest
from spepolicy.lab.run import CHOSEN
from spepolicy.lab.sweep.collect import Outcome
from spepolicy.lab.sweep.identity import config_hash, scenario_hash
from spepolicy.lab.sweep.jobs import Configuration
from spepolicy.lab.sweep.statistics import Paired, by_scenario, differences
from spepolicy.machine.scenario import Costs
from spepolicy.policy_choice import BARE_METAL
from spepolicy.schema import CostSettings, settings_of
from spepolicy.units import format_duration, parse_duration

__all__ = ["SENSITIVITY", "Probe", "Sensitivity", "Verdict", "cost_names"]

SENSITIVITY = "sensitivity"  # role of the configurations that are made for it
METRICS = ("excess_blackout_pct", "unseen_samples_pct", "stolen_pct")  # memory does not depend on what things cost
BISECTIONS = 5  # a flip is known to a 32nd of the way from the default to the end, on a logarithmic scale
_LEAST_PS = 1000.0  # what 0 counts as on a logarithmic scale: 1 ns
ALL = "all"


def cost_names(asked: Sequence[str]) -> list[str]:
    """Return the cost constants that `sweep.sensitivity` names; raise `ConfigurationError` for one that is none."""
    known = list(settings_of(CostSettings))
    for name in asked:
        if name not in known and name != ALL:
            raise ConfigurationError(
                f"sweep.sensitivity=[{name}]: not a cost constant. Known: {ALL}, {', '.join(known)}."
                f"{nearest(name, known)}"
            )
    return known if ALL in asked else list(dict.fromkeys(asked))


@dataclass(frozen=True)
class Probe:
    """A scenario with one cost constant moved."""

    scenario: str  # hash of the scenario as it was asked for
    cost: str  # name in group costs
    value_ps: int


@dataclass(frozen=True)
class Verdict:
    """What became of one conclusion under one cost constant."""

    conclusion: Paired
    cost: str
    low_ps: int
    default_ps: int
    high_ps: int
    at_low: int  # sign there: 1, -1, or 0 for no clear difference
    at_high: int
    # Values between which the sign first becomes another one, coming from the default: (still as it was, not any more).
    flip_down_ps: tuple[int, int] | None
    flip_up_ps: tuple[int, int] | None

    def survives(self) -> bool:
        """The sign is the same at both ends."""
        return self.at_low == self.conclusion.sign() == self.at_high


class Sensitivity:
    """The sensitivity analysis of a sweep, a round of simulation at a time."""

    def __init__(self, names: Sequence[str], configurations: Iterable[Configuration]) -> None:
        """*names*: cost constants. *configurations*: of the sweep; those that were asked for are compared."""
        self.costs = list(names)
        self._groups: dict[str, list[Configuration]] = {}
        for configuration in configurations:
            self._groups.setdefault(configuration.scenario_key, []).append(configuration)
        self._groups = {key: group for key, group in self._groups.items() if sum(c.role == CHOSEN for c in group) > 1}
        self._probes: dict[str, Probe] = {}  # hash of the moved scenario -> what was moved
        self._origin: dict[str, str] = {}  # key of a moved configuration -> that of the original
        self._signs: dict[tuple[Probe, str, str, str], int] = {}  # with one, other, metric
        self._rounds = 0

    def next_round(self, outcomes: Mapping[str, Outcome]) -> dict[str, Configuration]:
        """Return the configurations to be simulated next, by key; none when all is known.

        *outcomes* are those of the sweep and of all earlier rounds.
        """
        self._read(outcomes)
        probes: list[Probe] = []
        if self._rounds == 0:
            for scenario, cost in itertools.product(self._groups, self.costs):
                low, default, high = self._range(scenario, cost)
                probes += [Probe(scenario, cost, value) for value in (low, high) if value != default]
        elif self._rounds <= BISECTIONS:
            probes = self._bisected(outcomes)
        self._rounds += 1
        made: dict[str, Configuration] = {}
        for probe in dict.fromkeys(probes):
            made |= self._moved(probe)
        return made

    def verdicts(self, outcomes: Mapping[str, Outcome]) -> list[Verdict]:
        """Return a verdict for every conclusion and cost constant."""
        self._read(outcomes)
        found = []
        for conclusion in self._conclusions(outcomes):
            for cost in self.costs:
                low, default, high = self._range(conclusion.scenario, cost)
                ends = self._sign(conclusion, cost, low), self._sign(conclusion, cost, high)
                flips = self._flip(conclusion, cost, low), self._flip(conclusion, cost, high)
                found.append(Verdict(conclusion, cost, low, default, high, *ends, *flips))
        return found

    # ---- places ------------------------------------------------------------------------------------------------------

    def _range(self, scenario: str, cost: str) -> tuple[int, int, int]:
        """Return the least, the configured and the greatest value of *cost*, ps."""
        setting = settings_of(CostSettings)[cost]
        least, greatest = (int(parse_duration(bound, cost)) for bound in (setting.minimum, setting.maximum))
        return least, int(getattr(self._groups[scenario][0].scenario.costs, setting.to)), greatest

    def _moved(self, probe: Probe) -> dict[str, Configuration]:
        """Return the configurations of a scenario with one constant moved, the baselines among them."""
        group = self._groups[probe.scenario]
        field = settings_of(CostSettings)[probe.cost].to
        costs: Costs = replace(group[0].scenario.costs, **{field: probe.value_ps})
        scenario = replace(group[0].scenario, costs=costs)
        scenario_key = scenario_hash(scenario)
        self._probes[scenario_key] = probe
        made = {}
        for configuration in group:
            if configuration.role != CHOSEN and configuration.policy.name != BARE_METAL:
                continue
            key = config_hash(scenario_key, configuration.policy)
            shown = format_duration(probe.value_ps)
            config = dict(configuration.config) | {"costs": dict(configuration.config["costs"]) | {probe.cost: shown}}
            made[key] = replace(
                configuration,
                key=key,
                scenario_key=scenario_key,
                scenario=scenario,
                role=SENSITIVITY,
                params=configuration.params | {f"costs.{probe.cost}": shown},
                config=config,
                lanes=dict(configuration.lanes),
            )
            self._origin[key] = configuration.key
        return made

    def _bisected(self, outcomes: Mapping[str, Outcome]) -> list[Probe]:
        """Return the middle of every stretch in which a conclusion flips."""
        probes = []
        for conclusion in self._conclusions(outcomes):
            for cost in self.costs:
                low, default, high = self._range(conclusion.scenario, cost)
                for end in (low, high):
                    flip = self._flip(conclusion, cost, end)
                    if flip is None or end == default:
                        continue
                    middle = _middle(*flip)
                    if middle not in flip:
                        probes.append(Probe(conclusion.scenario, cost, middle))
        return probes

    # ---- signs -------------------------------------------------------------------------------------------------------

    def _conclusions(self, outcomes: Mapping[str, Outcome]) -> list[Paired]:
        chosen = [
            outcomes[c.key] for group in self._groups.values() for c in group if c.role == CHOSEN and c.key in outcomes
        ]
        return [paired for paired in differences(chosen, METRICS) if paired.sign()]

    def _read(self, outcomes: Mapping[str, Outcome]) -> None:
        """Take the signs of the differences in every scenario that was moved."""
        moved = [outcomes[key] for key in self._origin if key in outcomes]
        for scenario, group in by_scenario(moved).items():
            compared = [
                replace(outcome, configuration=replace(outcome.configuration, role=CHOSEN))
                for outcome in group
                if outcome.configuration.policy.name != BARE_METAL or self._was_chosen(outcome)
            ]
            for paired in differences(compared, METRICS):
                pair = self._origin[paired.one], self._origin[paired.other]
                self._signs[self._probes[scenario], *pair, paired.metric] = paired.sign()
                self._signs[self._probes[scenario], *pair[::-1], paired.metric] = -paired.sign()

    def _was_chosen(self, outcome: Outcome) -> bool:
        origin = self._origin[outcome.configuration.key]
        return any(c.key == origin and c.role == CHOSEN for group in self._groups.values() for c in group)

    def _sign(self, conclusion: Paired, cost: str, value_ps: int) -> int:
        if value_ps == self._range(conclusion.scenario, cost)[1]:
            return conclusion.sign()
        probe = Probe(conclusion.scenario, cost, value_ps)
        return self._signs.get((probe, conclusion.one, conclusion.other, conclusion.metric), 0)

    def _flip(self, conclusion: Paired, cost: str, end: int) -> tuple[int, int] | None:
        """Return the values next to each other between which the sign changes first on the way to *end*."""
        default = self._range(conclusion.scenario, cost)[1]
        known = {
            probe.value_ps
            for probe, one, other, metric in self._signs
            if (probe.scenario, probe.cost) == (conclusion.scenario, cost)
            and (one, other, metric) == (conclusion.one, conclusion.other, conclusion.metric)
            and min(default, end) <= probe.value_ps <= max(default, end)
        }
        way = sorted({default, *known}, reverse=end < default)
        for before, after in itertools.pairwise(way):
            if self._sign(conclusion, cost, after) != conclusion.sign():
                return before, after
        return None


def _middle(one: int, other: int) -> int:
    """Return the middle of two durations on a logarithmic scale, to three digits."""
    value = math.sqrt(max(one, _LEAST_PS) * max(other, _LEAST_PS))
    digits = max(0, math.floor(math.log10(value)) - 2)
    scale: int = 10**digits
    return round(value / scale) * scale


def verdict_table(verdicts: Sequence[Verdict], outcomes: Mapping[str, Outcome]) -> dict[str, list[Any]]:
    """Return a column a name, a row a conclusion and cost constant: what the file sensitivity.csv holds."""

    def place(flip: tuple[int, int] | None) -> str:
        return "" if flip is None else f"{format_duration(flip[0])} .. {format_duration(flip[1])}"

    words = {1: "more", -1: "less", 0: "no clear difference"}
    labels = {key: outcome.label() for key, outcome in outcomes.items()}
    return {
        "one": [labels[v.conclusion.one] for v in verdicts],
        "other": [labels[v.conclusion.other] for v in verdicts],
        "metric": [v.conclusion.metric for v in verdicts],
        "one_has": [words[v.conclusion.sign()] for v in verdicts],
        "cost": [v.cost for v in verdicts],
        "default": [format_duration(v.default_ps) for v in verdicts],
        "range": [f"{format_duration(v.low_ps)}..{format_duration(v.high_ps)}" for v in verdicts],
        "survives": [v.survives() for v in verdicts],
        "at_low_end": [words[v.at_low] for v in verdicts],
        "at_high_end": [words[v.at_high] for v in verdicts],
        "flips_below": [place(v.flip_down_ps) for v in verdicts],
        "flips_above": [place(v.flip_up_ps) for v in verdicts],
    }
