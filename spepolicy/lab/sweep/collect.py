"""Collects the rows of a sweep by configuration, as they come, and sums a configuration up when it has all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.judge.errata import Erratum, Findings, Observation, merge_errata
from spepolicy.judge.findings import OBSERVATIONS, facts
from spepolicy.judge.interval import t_quantile_975
from spepolicy.judge.metrics import METRICS
from spepolicy.lab.run import errata_from
from spepolicy.lab.sweep.identity import PolicyChoice
from spepolicy.lab.sweep.jobs import Configuration
from spepolicy.policy_choice import BARE_METAL

__all__ = ["Collector", "Outcome", "Virtual"]

Floats = NDArray[np.float64]

EXCESS = "excess_blackout_pct"
SERIES = "blackout_over_time_ms_per_s"
# A row has no single windows and no profile: of these a sweep says the mean over replicates, or nothing.
_MAXIMUM = ("longest_blackout_us",)
_NOT_HERE = ("fidelity_pooled_tv", "fidelity_pooled_tv_noise")


@dataclass(frozen=True)
class Outcome:
    """One configuration, summed up. Arrays have a row a lane, sorted by seed and replicate."""

    configuration: Configuration
    seed: NDArray[np.int64]
    replicate: NDArray[np.int64]
    lanes: dict[str, Floats]  # metric -> value, NaN where not defined
    values: dict[str, float]  # metric -> mean over lanes (of longest_blackout_us: the largest); defined ones only
    ci95: dict[str, float]  # half-width of the 95 % confidence interval of the mean
    series: Floats  # [bins] blackout over guest time in ms/s, mean over lanes
    findings: Findings
    errata: list[Erratum]

    def label(self) -> str:
        """Return its name in tables."""
        return self.configuration.label()


@dataclass(frozen=True)
class Virtual:
    """What erratum reporters are asked through, for one policy."""

    manager: Any
    virtualized: bool
    hooks: tuple[str, ...]

    @staticmethod
    def of(choice: PolicyChoice) -> Virtual:
        """Put the plugins together."""
        from spepolicy.plugins import installed_reporters, make_plugin_manager

        policy = choice.build()
        manager = make_plugin_manager(policy, list(installed_reporters().values()))
        hooks = tuple(caller.name for caller in manager.get_hookcallers(policy) or ())
        return Virtual(manager, manager.hook.virtualization() is not False, hooks)


@dataclass
class _Gathered:
    """Rows of one configuration."""

    pieces: list[tuple[Mapping[str, Any], slice | NDArray[np.int64]]] = field(default_factory=list)
    count: int = 0
    lost: int = 0  # lanes that failed, and will not come

    def column(self, name: str) -> NDArray[Any]:
        return np.concatenate([columns[name][rows] for columns, rows in self.pieces])


class Collector:
    """All rows of a sweep."""

    def __init__(self, configurations: Mapping[str, Configuration]) -> None:
        self.configurations = dict(configurations)
        self.notes: list[str] = []
        self._gathered = {key: _Gathered() for key in configurations}
        self._bare = {c.scenario_key: c.key for c in configurations.values() if c.policy.name == BARE_METAL}
        self._plugins: dict[PolicyChoice, Virtual] = {}

    def extend(self, more: Mapping[str, Configuration]) -> None:
        """Expect further configurations, too."""
        for key, configuration in more.items():
            self.configurations[key] = configuration
            self._gathered.setdefault(key, _Gathered())
            if configuration.policy.name == BARE_METAL:
                self._bare.setdefault(configuration.scenario_key, key)

    def add(self, key: str, columns: Mapping[str, Any], rows: slice | NDArray[np.int64]) -> None:
        """Take the *rows* of *columns*, all of configuration *key*."""
        gathered = self._gathered[key]
        gathered.pieces.append((columns, rows))
        gathered.count += len(columns["replicate"][rows])

    def add_lost(self, key: str, lanes: int) -> None:
        """Note that *lanes* of configuration *key* failed: it is complete without them."""
        self._gathered[key].lost += lanes

    def is_complete(self, key: str) -> bool:
        """Whether all lanes of a configuration are there, and those of bare metal beside it."""
        bare = self._bare.get(self.configurations[key].scenario_key, key)
        return all(
            self._gathered[k].count + self._gathered[k].lost >= self.configurations[k].size() for k in (key, bare)
        )

    def count(self, key: str) -> int:
        """Return how many lanes of a configuration are there."""
        return self._gathered[key].count

    def row(self, key: str, seed: int, replicate: int) -> dict[str, Any] | None:
        """Return a number by column of one lane of configuration *key*, or None if it is not there."""
        for columns, rows in self._gathered[key].pieces:
            here = (columns["seed"][rows] == seed) & (columns["replicate"][rows] == replicate)
            if here.any():
                n = int(here.argmax())
                picked = {name: column for name, column in columns.items() if isinstance(column, np.ndarray)}
                return {name: column[rows][n] for name, column in picked.items() if column.ndim == 1}
        return None

    def outcomes(self, keys: Iterable[str] | None = None) -> dict[str, Outcome]:
        """Return the outcome of every configuration (of *keys*) of which any lane is there."""
        chosen = self.configurations if keys is None else keys
        return {key: self.outcome(key) for key in chosen if self._gathered[key].count}

    def outcome(self, key: str) -> Outcome:
        """Sum configuration *key* up, over the lanes that are there."""
        configuration, gathered = self.configurations[key], self._gathered[key]
        seed, replicate = gathered.column("seed"), gathered.column("replicate")
        order = np.lexsort((replicate, seed))
        seed, replicate = seed[order], replicate[order]
        lanes: dict[str, Floats] = {
            name: gathered.column(name)[order].astype(np.float64)
            for name in METRICS
            if name not in (*_NOT_HERE, EXCESS)
        }
        lanes[EXCESS] = self._excess(configuration, seed, replicate, lanes["blackout_pct"])
        values, ci95 = _summed_up(lanes)
        findings = self._findings(configuration, gathered, order)
        return Outcome(
            configuration=configuration,
            seed=seed,
            replicate=replicate,
            lanes=lanes,
            values=values,
            ci95=ci95,
            series=np.asarray(gathered.column(SERIES).mean(axis=0), dtype=np.float64),
            findings=findings,
            errata=self._errata(configuration, findings),
        )

    def _excess(
        self, configuration: Configuration, seed: NDArray[np.int64], replicate: NDArray[np.int64], blackout: Floats
    ) -> Floats:
        """Blackout beyond bare metal's in the same lane; NaN where bare metal lacks it."""
        bare = self._gathered.get(self._bare.get(configuration.scenario_key, ""))
        excess = np.full(len(blackout), np.nan)
        if bare is None or not bare.count:
            return excess
        pairs = zip(bare.column("seed").tolist(), bare.column("replicate").tolist(), strict=True)
        base = dict(zip(pairs, bare.column("blackout_pct").tolist(), strict=True))
        for lane, pair in enumerate(zip(seed.tolist(), replicate.tolist(), strict=True)):
            excess[lane] = blackout[lane] - base.get(pair, math.nan)
        return excess

    # ---- errata ------------------------------------------------------------------------------------------------------

    def _findings(self, configuration: Configuration, gathered: _Gathered, order: NDArray[np.int64]) -> Findings:
        virtual = self._virtual(configuration.policy)
        replicate, seed = gathered.column("replicate")[order], gathered.column("seed")[order]
        observations = {}
        for name in OBSERVATIONS:
            counts = gathered.column(f"observed_{name}")[order]
            lanes = np.flatnonzero(counts)
            first = {"replicate": int(replicate[lanes[0]]), "seed": int(seed[lanes[0]])} if len(lanes) else None
            observations[name] = Observation(int(counts.sum()), len(lanes), first)
        return Findings(
            policy=configuration.policy.name,
            spe_version=configuration.scenario.cpu.spe_version,
            virtualized=virtual.virtualized,
            replicates=len(order),
            guest_s=float(gathered.column("guest_ps").sum()) / 1e12,
            wanted_s=float(gathered.column("wanted_ps").sum()) / 1e12,
            facts=facts(configuration.scenario, virtual.hooks),
            observations=observations,
        )

    def _errata(self, configuration: Configuration, findings: Findings) -> list[Erratum]:
        manager = self._virtual(configuration.policy).manager
        notes: list[str] = []
        documented = errata_from(manager, "errata", notes)
        observed = errata_from(manager, "report_errata", notes, findings=findings)
        self.notes += [note for note in notes if note not in self.notes]
        return merge_errata(documented, observed)

    def _virtual(self, choice: PolicyChoice) -> Virtual:
        if choice not in self._plugins:
            self._plugins[choice] = Virtual.of(choice)
        return self._plugins[choice]


def _summed_up(lanes: Mapping[str, Floats]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the mean of every metric and the half-width of its 95 % confidence interval, as `judge.interval` does."""
    values: dict[str, float] = {}
    ci95: dict[str, float] = {}
    table = np.stack(list(lanes.values()))
    defined = ~np.isnan(table)
    counts = defined.sum(axis=1)
    filled = np.where(defined, table, 0.0)
    means = filled.sum(axis=1) / np.maximum(counts, 1)
    squares = np.where(defined, (table - means[:, None]) ** 2, 0.0).sum(axis=1)
    for row, name in enumerate(lanes):
        n = int(counts[row])
        if n == 0:
            continue
        if name in _MAXIMUM:
            values[name] = float(np.nanmax(table[row]))
            continue
        values[name] = float(means[row])
        if n > 1:
            ci95[name] = t_quantile_975(n - 1) * math.sqrt(squares[row] / (n - 1) / n)
    return values, ci95
