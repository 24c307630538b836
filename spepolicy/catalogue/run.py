"""Run the catalogue: every case on every policy and SPE version, and compare with the verdicts.

Hydra composes only the files that cases choose; what they set beside is patched in (`spepolicy.lab.sweep.compose`).
Cases of one policy that fit into one machine run side by side, policies in threads: a lane's result depends on neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from spepolicy.catalogue.answering import Answering
from spepolicy.catalogue.case import BASE, DRIVERS, Case, read_catalogue
from spepolicy.catalogue.verdict import Seen, judge, observe
from spepolicy.errors import ConfigurationError, SpePolicyError
from spepolicy.machine.scenario import GuestDriver
from spepolicy.platforms import equipped

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result
    from spepolicy.drivers.simulate import Machines, Runner
    from spepolicy.machine.scenario import Scenario

__all__ = ["Outcome", "run_catalogue", "run_one_policy", "scenarios_of"]

LANES = 3


@dataclass(frozen=True)
class Outcome:
    """One case on one policy and version."""

    case: str
    policy: str  # of a case about what the guest is told: the guest's driver
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


@dataclass(frozen=True)
class _Run:
    """One case that is to run on one policy: its machine, and the name that verdicts call the policy by."""

    case: Case
    name: str
    version: int
    scenario: Scenario


_Machinery = Mapping[tuple[str, int], "Scenario"]


def scenarios_of(cases: Sequence[Case]) -> _Machinery:
    """Return the machine of each case by its id and PMSVer. Raise ConfigurationError with the case's id for settings
    that are wrong.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from spepolicy.config import register, to_scenario
    from spepolicy.lab.sweep.compose import Composer

    register()
    scenarios: dict[tuple[str, int], Scenario] = {}
    workloads: dict[Any, Any] = {}  # one object each, so that cases can share a machine
    with _composing():
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        master = hydra.compose_config("config", [], run_mode=RunMode.RUN, with_log_configuration=False)
        composer = Composer(hydra.config_loader, master)
        for case, version in ((each, version) for each in cases for version in each.versions):
            try:
                scenario = to_scenario(composer.compose([*BASE, *case.set, f"cpu.spe_version={version}"]))
            except ConfigurationError as error:
                raise ConfigurationError(f"catalogue case {case.id}: {error}") from error
            workload = workloads.setdefault(scenario.workload.source, scenario.workload)
            scenarios[case.id, version] = replace(scenario, workload=workload)
    return scenarios


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


def run_catalogue(
    cases: Sequence[Case], policies: Mapping[str, object], progress: Callable[[int, int], None] | None = None
) -> list[Outcome]:
    """Run every case on every policy and version; return the outcomes in the order of cases, policies and versions.

    *progress* is told how many of how many policies are done.
    """
    scenarios = scenarios_of(cases)
    jobs = [_work_of(cases, scenarios, name, policy) for name, policy in policies.items()]
    jobs.append(_answers(cases, scenarios))
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for n, found in enumerate(pool.map(_execute, jobs)):
            outcomes += found
            if progress is not None and n < len(policies):
                progress(n + 1, len(policies))
    place = {case.id: n for n, case in enumerate(cases)}
    return sorted(outcomes, key=lambda outcome: place[outcome.case])


def run_one_policy(name: str, policy: object) -> list[Outcome]:
    """Run the whole catalogue on *policy*. Verdicts are about the policy called *name*; where that is `UNKNOWN`,
    disagreements are what the architecture forbids, and failures.
    """
    cases, scenarios = _whole_catalogue()
    return _execute(_work_of(cases, scenarios, name, policy))


@lru_cache(maxsize=1)
def _whole_catalogue() -> tuple[list[Case], _Machinery]:
    cases = read_catalogue()[0]
    return cases, scenarios_of(cases)


_Work = list[tuple[object, list[_Run]]]  # policies, each with what it has to run


def _work_of(cases: Sequence[Case], scenarios: _Machinery, name: str, policy: object) -> _Work:
    """Return what there is to run on one policy: with its own fields, and with those that cases set."""
    usual: list[_Run] = []
    work: _Work = [(policy, usual)]
    for case in cases:
        if case.answer:
            continue
        runs = [_Run(case, name, version, scenarios[case.id, version]) for version in case.versions]
        if name in case.fields:
            work.append((_with_fields(policy, name, case), runs))
        else:
            usual += runs
    return work


def _with_fields(policy: object, name: str, case: Case) -> object:
    """Return *policy* with the fields that *case* sets, the others as they are."""
    from spepolicy.plugins import build_policy

    kept = {field.name: getattr(policy, field.name) for field in fields(policy) if field.init}  # type: ignore[arg-type]
    try:
        return build_policy(name, kept | dict(case.fields[name]))
    except SpePolicyError as error:
        raise ConfigurationError(f"catalogue case {case.id}: {error}") from error


def _answers(cases: Sequence[Case], scenarios: _Machinery) -> _Work:
    """Return the runs of the cases about what the guest is told: one for each driver."""
    work: _Work = []
    for case in cases:
        if not case.answer:
            continue
        runs = []
        for version in case.versions:
            scenario = scenarios[case.id, version]
            for driver in DRIVERS:
                guest = replace(scenario.guest, driver=GuestDriver[driver.upper()])
                runs.append(_Run(case, driver, version, replace(scenario, guest=guest)))
        work.append((Answering(case.answer), runs))
    return work


def _execute(work: _Work) -> list[Outcome]:
    from spepolicy.drivers.simulate import Machines, Runner
    from spepolicy.machine.build import shared_key
    from spepolicy.plugins import installed_reporters, make_plugin_manager

    machines = Machines()
    outcomes = []
    for policy, runs in work:
        runner = Runner(policy, runs[0].name if runs else "")
        manager = make_plugin_manager(policy, list(installed_reporters().values()))
        hooks = tuple(caller.name for caller in manager.get_hookcallers(policy) or ())
        together: dict[Any, list[_Run]] = {}
        for run in runs:
            scenario = run.scenario
            if runner.why_unsupported(scenario):
                scenario = equipped(scenario)
            reason = runner.why_unsupported(scenario) or ""
            if reason:
                outcomes.append(Outcome(run.case.id, run.name, run.version, None, reason, (), False))
            else:
                together.setdefault(shared_key(scenario), []).append(replace(run, scenario=scenario))
        for batch in together.values():
            for run, result in _results(runner, batch, machines):
                if isinstance(result, str):
                    outcomes.append(Outcome(run.case.id, run.name, run.version, None, result, (result,), True))
                    continue
                seen = observe(result, runner.behaviour.virtualized, manager, hooks)
                verdict = judge(run.case, run.name, run.version, seen)
                outcomes.append(Outcome(run.case.id, run.name, run.version, seen, "", *verdict))
    return outcomes


def _results(runner: Runner, batch: Sequence[_Run], machines: Machines) -> list[tuple[_Run, Result | str]]:
    """Return the result of each run of *batch*, or what a policy that broke its contract did there."""
    from spepolicy.drivers.simulate import Piece

    try:
        results = runner.run([Piece(run.scenario, np.arange(LANES)) for run in batch], machines)
    except SpePolicyError as error:
        if len(batch) == 1:
            return [(batch[0], str(error))]
        return [found for run in batch for found in _results(runner, [run], machines)]  # which one was it?
    return list(zip(batch, results, strict=True))
