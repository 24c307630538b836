"""The jobs of a sweep, composed and checked, and the configurations that they are made of.

A *job* is what Hydra asks for: one combination of the swept values. A *configuration* is a policy on a scenario; jobs
that differ only in their seed are one configuration, whose lanes are all its seeds and replicates. The baselines are
configurations too: one for each scenario, shared by all policies on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from spepolicy.config import Options, to_options, to_scenario
from spepolicy.errors import ConfigurationError, SpePolicyError, UnsupportedPolicyError
from spepolicy.lab.run import BASELINE, CHOSEN
from spepolicy.lab.sweep.compose import Composer
from spepolicy.lab.sweep.identity import PolicyChoice, config_hash, scenario_hash
from spepolicy.lane_choice import check_guest, check_policies
from spepolicy.machine.scenario import Scenario
from spepolicy.platforms import reason_not_to_run, why_unsupported
from spepolicy.policy_choice import BARE_METAL, baseline_policy, chosen_policy

__all__ = ["Configuration", "Failure", "Job", "configurations_of", "make_jobs", "one_for_all"]

_OF_THE_SWEEP = ("tracking", "output", "threads", "sweep", "stop")  # one value for all jobs


@dataclass(frozen=True)
class Failure:
    """A job that could not be composed, or whose lanes failed."""

    number: int
    overrides: tuple[str, ...]
    reason: str
    cannot_run: str = ""  # the policy's own reason, where it says that it cannot run on the machine of the job

    def message(self) -> str:
        """Return the line that names it."""
        return f"job {self.number} ({' '.join(self.overrides)}): {self.reason}"


@dataclass(frozen=True)
class Job:
    """One job, checked."""

    number: int
    overrides: tuple[str, ...]
    config: Mapping[str, Any]  # plain containers
    options: Options
    policy: PolicyChoice
    scenario: Scenario


@dataclass
class Configuration:
    """A policy on a scenario, with all lanes that the sweep wants of it."""

    key: str  # spepolicy.lab.sweep.identity.config_hash
    scenario_key: str  # scenario_hash: policies on one scenario are compared with each other
    policy: PolicyChoice
    scenario: Scenario  # its seed is that of its first job
    role: str  # CHOSEN, or BASELINE if no job asked for it
    params: dict[str, str]  # what varies in the sweep, by key of the override
    config: Mapping[str, Any]  # of its first job
    lanes: dict[int, int] = field(default_factory=dict)  # seed -> replicates 0 .. n - 1
    jobs: list[int] = field(default_factory=list)

    def label(self) -> str:
        """Return its name in tables: the policy, and what varies."""
        return " ".join([self.policy.name, *(f"{_short(key)}={value}" for key, value in self.params.items())])

    def size(self) -> int:
        """Return how many lanes it has."""
        return sum(self.lanes.values())


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def make_jobs(
    composer: Composer, job_overrides: Sequence[Sequence[str]], first_number: int
) -> tuple[list[Job], list[Failure]]:
    """Compose and check every job. What is wrong with one is told with its overrides, and does not stop the others."""
    jobs, failures = [], []
    chosen: dict[str, tuple[PolicyChoice, Any]] = {}  # with the manager of its plugins
    for number, overrides in enumerate(job_overrides, first_number):
        try:
            jobs.append(_make_job(composer, number, tuple(overrides), chosen))
        except UnsupportedPolicyError as error:
            failures.append(Failure(number, tuple(overrides), str(error), error.reason))
        except SpePolicyError as error:
            failures.append(Failure(number, tuple(overrides), str(error)))
    return jobs, failures


def _make_job(composer: Composer, number: int, overrides: tuple[str, ...], chosen: dict[str, Any]) -> Job:
    from spepolicy.plugins import make_plugin_manager

    config = composer.compose(overrides)
    name, fields = chosen_policy(config)
    key = f"{name} {fields}"
    if key not in chosen:
        choice = PolicyChoice.of(name, fields)
        chosen[key] = choice, make_plugin_manager(choice.build(), ())
    choice, manager = chosen[key]
    scenario = to_scenario(config)
    options = to_options(config)
    check_guest(options.lanes, scenario)
    reason = why_unsupported(manager, scenario, name)
    if reason is not None:
        raise UnsupportedPolicyError(name, reason)
    return Job(number, overrides, config, options, choice, scenario)


def one_for_all(jobs: Sequence[Job]) -> None:
    """Raise `ConfigurationError` if a setting that belongs to the sweep differs between jobs, or is not for sweeps."""
    for group in _OF_THE_SWEEP:
        first = jobs[0].config.get(group)
        for job in jobs:
            if job.config.get(group) != first:
                different = job.config.get(group)
                raise ConfigurationError(
                    f"{group}: job {jobs[0].number} has {first}, job {job.number} has {different}. These settings "
                    "belong to the sweep as a whole and cannot be swept. Give one value, or start several sweeps."
                )
    policies = {
        BARE_METAL,
        *(job.policy.name for job in jobs),
        *(name for job in jobs for name in job.options.baselines),
    }
    check_policies(jobs[0].options.lanes.lanes, dict.fromkeys(sorted(policies)))


def configurations_of(jobs: Sequence[Job]) -> dict[str, Configuration]:
    """Return the configurations of *jobs* and their baselines by key, in the order of the jobs, baselines first.

    Equal scenarios share one `Scenario`, whatever their overrides looked like.
    """
    params = _varying(jobs)
    canonical: dict[str, Scenario] = {}
    chosen: dict[str, Configuration] = {}
    baselines: dict[str, Configuration] = {}
    defaults: dict[str, PolicyChoice] = {}
    runs: dict[tuple[str, str], bool] = {}  # baseline, scenario -> the policy can run there
    for job in jobs:
        scenario_key = scenario_hash(job.scenario)
        scenario = canonical.setdefault(scenario_key, job.scenario)
        _add(chosen, job, job.policy, scenario_key, scenario, CHOSEN, params[job.number])
        own = {key: value for key, value in params[job.number].items() if not key.startswith("policy.")}
        for name in dict.fromkeys((BARE_METAL, *job.options.baselines)):
            if name not in defaults:
                defaults[name] = _baseline(name)
            if (name, scenario_key) not in runs:
                runs[name, scenario_key] = reason_not_to_run(defaults[name].build(), name, scenario) is None
            if runs[name, scenario_key]:
                _add(baselines, job, defaults[name], scenario_key, scenario, BASELINE, own)
    for key in chosen.keys() & baselines.keys():
        for seed, replicates in baselines.pop(key).lanes.items():
            chosen[key].lanes[seed] = max(replicates, chosen[key].lanes.get(seed, 0))
    # Bare metal comes first, and so on through each scenario: what is compared becomes complete together.
    ordered = sorted((baselines | chosen).values(), key=lambda c: (c.jobs[0], c.policy.name != BARE_METAL, c.role))
    return {configuration.key: configuration for configuration in ordered}


def _add(
    into: dict[str, Configuration],
    job: Job,
    policy: PolicyChoice,
    scenario_key: str,
    scenario: Scenario,
    role: str,
    params: dict[str, str],
) -> None:
    key = config_hash(scenario_key, policy)
    if key not in into:
        into[key] = Configuration(key, scenario_key, policy, scenario, role, params, job.config)
    mine = into[key]
    seed = job.scenario.seed
    mine.lanes[seed] = max(job.options.replicates, mine.lanes.get(seed, 0))
    mine.jobs.append(job.number)


def _baseline(name: str) -> PolicyChoice:
    baseline_policy(name)  # its message names the setting
    return PolicyChoice.of(name, {})


def _varying(jobs: Sequence[Job]) -> dict[int, dict[str, str]]:
    """Return, by job, the overrides whose values differ between jobs, apart from policy, seed and number of lanes."""
    values: dict[str, set[str]] = {}
    given: dict[int, dict[str, str]] = {}
    for job in jobs:
        own = dict(override.lstrip("+").partition("=")[::2] for override in job.overrides)
        given[job.number] = own
        for key, value in own.items():
            values.setdefault(key, set()).add(value)
    count = {key: sum(key in own for own in given.values()) for key in values}
    varying = {
        key
        for key in values
        if (len(values[key]) > 1 or count[key] < len(jobs)) and key not in ("policy", "seed", "replicates")
    }
    return {number: {key: value for key, value in own.items() if key in varying} for number, own in given.items()}


def lanes_of(configuration: Configuration) -> list[tuple[Scenario, range]]:
    """Return (scenario with its seed, replicates) of every seed of *configuration*."""
    return [(replace(configuration.scenario, seed=seed), range(count)) for seed, count in configuration.lanes.items()]
