"""Run the catalogue: every case on every policy and SPE version, and compare with the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from spepolicy.catalogue.case import BASE, EVENTS, Case, Verdict
from spepolicy.errors import ConfigurationError, SpePolicyError
from spepolicy.machine.state import LostCause
from spepolicy.platforms import equipped

if TYPE_CHECKING:
    from spepolicy.drivers.simulate import Result
    from spepolicy.machine.scenario import Scenario

__all__ = ["Outcome", "Seen", "judge", "observe", "run_catalogue", "scenario_of"]

LANES = 3
_ORDINARY = (LostCause.BUFFER_FULL, LostCause.RING_FULL)


@dataclass(frozen=True)
class Seen:
    """What happened in the lanes of one case, policy and version."""

    blackout: tuple[str, ...]
    tells: tuple[str, ...]
    records: tuple[str, ...]
    errata: tuple[str, ...]
    blackout_pct: float


@dataclass(frozen=True)
class Outcome:
    """One case on one policy and version."""

    case: str
    policy: str
    version: int
    seen: Seen | None  # None: the policy does not run on this machine
    reason: str  # why it does not run
    disagreements: tuple[str, ...]  # with the verdict, in words; empty: it holds
    judged: bool  # False: the sources say nothing of this policy here

    @property
    def mark(self) -> str:
        """How tables show it: "-" does not run, "X" disagrees, "." not judged, "ok", "ok B" with blackout."""
        if self.seen is None:
            return "-"
        if self.disagreements:
            return "X"
        text = "ok" if self.judged else "."
        return f"{text} B" if self.seen.blackout else text


def scenario_of(case: Case, cache: dict[tuple[str, ...], Any]) -> Scenario:
    """Return the machine of *case*. *cache* keeps workloads, so that cases share them. Needs Hydra's registration.

    Raise ConfigurationError with the case's id for settings that are wrong.
    """
    from hydra import compose
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from spepolicy.config import to_scenario
    from spepolicy.messages import explain

    try:
        scenario = to_scenario(compose("config", overrides=[*BASE, *case.set]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(f"catalogue case {case.id}: {explain(error)}") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"catalogue case {case.id}: {error}") from error
    workload = cache.setdefault(("workload", scenario.workload.source), scenario.workload)
    return replace(scenario, workload=workload)


def observe(result: Result, virtualized: bool, manager: Any, hooks: tuple[str, ...]) -> Seen:
    """Return what *result* shows, summed over its lanes."""
    from spepolicy.judge.errata import merge_errata
    from spepolicy.judge.findings import find
    from spepolicy.lab.run import errata_from

    truth = result.truth
    causes = [
        c for c in LostCause if c not in _ORDINARY and (result.blackout_ps[:, :, c].any() or result.lost[:, :, c].any())
    ]
    records = {
        "lost": any(result.lost[:, :, cause].any() for cause in LostCause if cause not in _ORDINARY),
        "discarded": truth["discarded"].any(),
        "cut": truth["resumed_cut"].any(),
        "diverged": truth["diverged_records"].any(),
    }
    notes: list[str] = []
    findings = find(result, virtualized=virtualized, hooks=hooks)
    errata = merge_errata([], errata_from(manager, "report_errata", notes, findings=findings))
    wanted = max(int(truth["wanted_ps"].sum()), 1)
    return Seen(
        blackout=tuple(cause.name.lower() for cause in causes),
        tells=tuple(name for name in EVENTS if truth[f"injected_{name}"].any()),
        records=tuple(name for name, there in records.items() if there),
        errata=tuple(erratum.id for erratum in errata if erratum.count),
        blackout_pct=100.0 * float(result.blackout_ps.sum()) / wanted,
    )


def judge(case: Case, policy: str, seen: Seen) -> tuple[tuple[str, ...], bool]:
    """Compare *seen* with the verdict of *case* on *policy*: (disagreements, whether the sources say anything)."""
    problems = []
    verdict = _verdict_on(case, policy)
    known = verdict is not None and bool(verdict.deviation)
    for what, forbidden in case.never.items():
        for name in forbidden:
            if name in getattr(seen, what) and not known:
                problems.append(f"{what} {name}, which is forbidden: {case.source}")
    judged = False
    if verdict is not None:
        for what in ("blackout", "tells", "records"):
            wanted = getattr(verdict, what)
            if wanted is None:
                continue
            judged = True
            if set(wanted) != set(getattr(seen, what)):
                problems.append(
                    f"{what}: expected {_list(wanted)}, seen {_list(getattr(seen, what))} ({verdict.because})"
                )
        missing = [name for name in verdict.errata or () if name not in seen.errata]
        judged = judged or verdict.errata is not None
        if missing:
            problems.append(f"errata: {_list(missing)} not raised, seen {_list(seen.errata)} ({verdict.because})")
    return tuple(problems), judged


def _verdict_on(case: Case, policy: str) -> Verdict | None:
    named = [verdict for verdict in case.verdicts if policy in verdict.policies]
    if named:
        return named[0]
    return next((verdict for verdict in case.verdicts if "others" in verdict.policies), None)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def run_catalogue(
    cases: Sequence[Case], policies: Mapping[str, object], progress: Callable[[int, int], None] | None = None
) -> list[Outcome]:
    """Run every case on every policy and version; return the outcomes in the order of cases, policies and versions.

    *progress* is told how many of how many policies are done. Lanes of one case share a machine.
    """
    from spepolicy.config import register

    register()
    cache: dict[tuple[str, ...], Any] = {}
    with _composing():
        scenarios = {case.id: scenario_of(case, cache) for case in cases}
    outcomes: list[Outcome] = []
    for n, (name, policy) in enumerate(policies.items()):
        outcomes += _run_policy(cases, scenarios, name, policy)
        if progress is not None:
            progress(n + 1, len(policies))
    place = {case.id: n for n, case in enumerate(cases)}
    return sorted(outcomes, key=lambda outcome: place[outcome.case])


@contextmanager
def _composing() -> Iterator[None]:
    """Let Hydra compose the cases, also from within a job that Hydra itself runs."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    state = GlobalHydra.instance()
    kept = state.hydra
    state.clear()
    try:
        with initialize_config_module("spepolicy_conf", version_base="1.3"):
            yield
    finally:
        state.clear()
        state.hydra = kept


def _run_policy(cases: Sequence[Case], scenarios: Mapping[str, Scenario], name: str, policy: object) -> list[Outcome]:
    from spepolicy.drivers.simulate import Machines, Piece, Runner
    from spepolicy.plugins import installed_reporters, make_plugin_manager

    runner = Runner(policy, name)
    manager = make_plugin_manager(policy, list(installed_reporters().values()))
    hooks = tuple(caller.name for caller in manager.get_hookcallers(policy) or ())
    machines = Machines()
    outcomes = []
    for case in cases:
        scenario = scenarios[case.id]
        if runner.why_unsupported(scenario):
            scenario = equipped(scenario)
        versions = {
            version: replace(scenario, cpu=replace(scenario.cpu, spe_version=version)) for version in case.versions
        }
        reason = runner.why_unsupported(scenario) or ""
        if reason:
            outcomes += [Outcome(case.id, name, version, None, reason, (), False) for version in versions]
            continue
        try:
            results = runner.run([Piece(it, np.arange(LANES)) for it in versions.values()], machines)
        except SpePolicyError as error:
            outcomes += [Outcome(case.id, name, version, None, str(error), (str(error),), True) for version in versions]
            continue
        for version, result in zip(versions, results, strict=True):
            seen = observe(result, runner.behaviour.virtualized, manager, hooks)
            outcomes.append(Outcome(case.id, name, version, seen, "", *judge(case, name, seen)))
    return outcomes
