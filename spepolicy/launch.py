"""From Hydra's composed configuration to a run.

A `Session` is one call of the program: it hands Hydra the schema and the installed policies, and runs each job that
Hydra asks for. Errors of a job are reported when they happen, so one bad point does not end a sweep.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import field, make_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spepolicy.check import check_flags_given
from spepolicy.completion import HIDDEN
from spepolicy.config import plain, register, to_options, to_scenario
from spepolicy.errors import (
    ConfigurationError,
    OutputError,
    SpePolicyError,
    UnknownPolicyError,
    UnsupportedPolicyError,
    nearest,
)
from spepolicy.host_choice import host_notes
from spepolicy.platforms import reason_not_to_run
from spepolicy.plugins import PolicyInfo, build_policy, installed_policies
from spepolicy.policy_choice import BARE_METAL, baseline_policy, chosen_policy
from spepolicy.policy_fields import fields_of
from spepolicy.schema import MISSING

if TYPE_CHECKING:
    from spepolicy.lab.run import Plan

__all__ = ["Session", "build_plan", "register_policies"]


class Session:
    """One call of the program."""

    def __init__(self, show_traceback: bool) -> None:
        """With *show_traceback*, an error that has a message is shown with its traceback too."""
        self.show_traceback = show_traceback
        self.failed = 0  # jobs that ended with an error
        self.in_job = False

    def start(self, arguments: Sequence[str]) -> None:
        """Compose the configuration that `sys.argv` asks for, and run it.

        *arguments* are those of `sys.argv`. Raises `ConfigurationError` for a flag or value that is wrong and
        `OutputError` for a run folder that cannot be written. An error of a job is printed and counted in `failed`.
        """
        import hydra
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        from spepolicy.messages import explain

        _check_flags(arguments)
        register()
        register_policies()
        if not {"-m", "--multirun"}.isdisjoint(arguments) or any("experiment" in word for word in arguments):
            from hydra.core.plugins import Plugins

            Plugins.instance()  # scans, and thereby makes the classes that ours inherit from anew
            from spepolicy.lab.sweep.launcher import register_plugins

            register_plugins()
        run = hydra.main(version_base="1.3", config_path="pkg://spepolicy_conf", config_name="config")(self.job)
        try:
            run()
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise ConfigurationError(explain(error)) from error
        except (OSError, ValueError) as error:
            if self.in_job or isinstance(error, SpePolicyError):
                raise
            if isinstance(error, OSError):
                raise _file_error(error) from error
            raise ConfigurationError(f"{error}. See --hydra-help.") from error

    def job(self, cfg: Any) -> float | None:
        """Run one composed configuration; Hydra calls this once, or once a job of a sweep."""
        self.in_job = True
        try:
            interrupted = self._run(cfg)
        except SpePolicyError as error:
            self._report(error)
            return None
        if interrupted:
            raise KeyboardInterrupt
        self.in_job = False
        return None

    def _run(self, cfg: Any) -> bool:
        from hydra.core.hydra_config import HydraConfig
        from hydra.core.override_parser.overrides_parser import OverridesParser

        hydra_config = HydraConfig.get()
        check_flags_given(cfg, OverridesParser.create().parse_overrides(list(hydra_config.overrides.task)))
        config = _resolved(cfg)
        task = config.get("task")
        if task == "plugins":
            from spepolicy.plugin_list import plugin_table

            print(plugin_table(), flush=True)
            return False
        if task == "catalogue":
            self._run_catalogue(config, Path(hydra_config.runtime.output_dir))
            return False
        if task == "explore":
            return run_exploration(config, Path(hydra_config.runtime.output_dir))
        plan = build_plan(config, Path(hydra_config.runtime.output_dir))
        from spepolicy.lab.run import execute

        say = partial(print, flush=True)
        report = execute(plan, say)
        say(report.summary())
        return bool(report.interrupted)

    def sweep(
        self, launcher: Any, loader: Any, master: Any, job_overrides: Sequence[Sequence[str]], first_number: int
    ) -> None:
        """Run all jobs of a sweep as one batch. *launcher*: says on what engine; *loader*, *master*: Hydra's."""
        from spepolicy.lab.sweep.compose import Composer
        from spepolicy.lab.sweep.jobs import make_jobs
        from spepolicy.lab.sweep.run import execute_sweep, plan_sweep

        self.in_job = True
        begin = time.perf_counter()
        jobs, failures = make_jobs(Composer(loader, master), job_overrides, first_number)
        for failure in failures:
            self._fail(failure.message())
        if any(job.config.get("task") == "explore" for job in jobs):
            raise ConfigurationError(
                "task=explore: a sweep (-m) simulates. Explore several policies with explore.compare=[NAME,...]."
            )
        if jobs:
            plan = plan_sweep(jobs, failures, Path(master.hydra.sweep.dir))
            say = partial(print, flush=True)
            engine = launcher.engine(jobs[0].config)
            try:
                summary = execute_sweep(plan, engine, say, time.perf_counter() - begin)
            finally:
                engine.close()
            for failure in summary.failures[len(failures) :]:
                self._fail(failure.message())
            say(summary.text())
            if summary.tracking_error:
                self._fail(summary.tracking_error)
            if summary.interrupted:
                raise KeyboardInterrupt
        self.in_job = False

    def _fail(self, message: str) -> None:
        self.failed += 1
        print(f"error: {message}", file=sys.stderr)

    def _run_catalogue(self, config: Mapping[str, Any], folder: Path) -> None:
        """Run the catalogue on the chosen policy, or on all; a verdict that does not hold counts as a failure."""
        from spepolicy.catalogue.task import run_task

        if config.get("policy", MISSING) in (MISSING, None):
            policies = {name: build_policy(name, {}) for name in installed_policies()}
        else:
            name, fields = chosen_policy(config)
            policies = {name: build_policy(name, fields)}
        text, holds = run_task(policies, folder)
        print(text, flush=True)
        self.failed += not holds

    def _report(self, error: SpePolicyError) -> None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra_config = HydraConfig.get()
        self.failed += 1
        self.in_job = False
        if self.show_traceback:
            traceback.print_exc()
        where = ""
        if hydra_config.mode == RunMode.MULTIRUN:
            where = f"job {hydra_config.job.num} ({' '.join(hydra_config.overrides.task)}): "
        print(f"error: {where}{error}", file=sys.stderr)


def build_plan(config: Mapping[str, Any], run_dir: Path) -> Plan:
    """Return what `spepolicy.lab.run.execute` needs for the composed *config*, whose results go to *run_dir*.

    Raises `SpePolicyError` for whatever is wrong with a value, a policy or a recording.
    """
    from spepolicy.lab.run import Plan
    from spepolicy.lab.tracking import TrackingSettings
    from spepolicy.lane_choice import check_guest, check_policies

    options = to_options(config)
    name, policy_fields = chosen_policy(config)
    policies = {name: build_policy(name, policy_fields)}
    for baseline in dict.fromkeys((BARE_METAL, *options.baselines)):
        if baseline not in policies:
            policies[baseline] = baseline_policy(baseline)
    check_policies(options.lanes.lanes, policies)
    scenario = to_scenario(config)
    check_guest(options.lanes, scenario)
    notes = list(host_notes(plain(config)["host"], scenario))
    for each, policy in list(policies.items()):
        reason = reason_not_to_run(policy, each, scenario)
        if reason is not None and each == name:
            raise UnsupportedPolicyError(each, reason)
        if reason is not None:
            del policies[each]
            notes.append(f"Baseline {each} cannot run: {reason}.")
    return Plan(
        chosen=name,
        policies=policies,
        scenario=scenario,
        replicates=options.replicates,
        threads=options.threads,
        run_dir=run_dir,
        tracking=TrackingSettings(**options.tracking),
        config=dict(config),
        notes=tuple(notes),
        lanes=options.lanes,
    )


def run_exploration(config: Mapping[str, Any], run_dir: Path) -> bool:
    """Do what `task=explore` asks for in the composed *config*; return True if Ctrl-C cut it short."""
    import os

    from spepolicy.explore.task import explore
    from spepolicy.lab.tracking import TrackingSettings

    options, scenario = to_options(config), to_scenario(config)
    name, policy_fields = chosen_policy(config)
    policies = {name: build_policy(name, policy_fields)}
    others = list(config["explore"].get("compare") or ())
    if others == ["all"]:
        others = [other for other in installed_policies() if other != BARE_METAL]  # it has no stage 2 and no hooks
    for other in others:
        if other not in policies:
            try:
                policies[other] = build_policy(other, {})
            except UnknownPolicyError as error:
                raise ConfigurationError(
                    f"explore.compare=[{other}]: policy '{other}' is not installed. Installed: "
                    f"{', '.join(error.known)}.{nearest(other, error.known)}"
                ) from error
    return explore(
        config,
        policies,
        run_dir,
        scenario,
        options.threads or len(os.sched_getaffinity(0)),
        TrackingSettings(**options.tracking),
        partial(print, flush=True),
    )


def register_policies() -> None:
    """Store every installed policy in Hydra's ConfigStore as `policy/NAME`: the dataclass is the schema. One that was
    stored earlier in this process and is not installed any more goes.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    store.repo.pop("policy", None)
    for name, info in installed_policies().items():
        try:
            node = OmegaConf.structured(_schema(info))
        except (OmegaConfBaseException, ValueError) as error:  # it must not take the others down
            print(f"warning: policy '{name}' of {info.distribution} cannot be configured: {error}", file=sys.stderr)
            continue
        store.store(group="policy", name=name, node=node, provider=f"{info.distribution} {info.version}")


def _schema(info: PolicyInfo) -> type:
    """Return a dataclass with the policy's fields and one more, which tells a composed configuration's policy.

    It is not a subclass: OmegaConf would make the configuration of a frozen policy read-only.
    """
    columns: list[tuple[str, Any, Any]] = [(HIDDEN, str, field(default=info.name))]
    for item in fields_of(info.cls, info.name):
        default = field() if item.required else field(default_factory=partial(copy, item.default))
        columns.append((item.name, item.type, default))
    return make_dataclass(info.cls.__name__, columns, kw_only=True)


def _resolved(cfg: Any) -> Mapping[str, Any]:
    from omegaconf.errors import OmegaConfBaseException

    from spepolicy.messages import explain

    try:
        return plain(cfg)
    except OmegaConfBaseException as error:
        raise ConfigurationError(explain(error)) from error


def _check_flags(arguments: Sequence[str]) -> None:
    """Parse *arguments* as Hydra will, but with a short message for what it does not know."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()

    def fail(message: str) -> None:
        raise ConfigurationError(f"{message}. See --help and --hydra-help.")

    parser.error = fail  # type: ignore[assignment]
    parser.parse_args(list(arguments))


def _file_error(error: OSError) -> SpePolicyError:
    """Return the error for a file that Hydra cannot read or write; what it writes is in the run's folder."""
    path = Path(str(error.filename or ""))
    reason = error.strerror or error
    if path.suffix in (".yaml", ".yml") and path.parent.name != ".hydra" and path.name != "multirun.yaml":
        return ConfigurationError(f"the configuration file '{path}' cannot be read: {reason}. Make it readable.")
    where = f" '{error.filename}'" if error.filename else ""
    return OutputError(
        f"the run's folder{where} cannot be written: {reason}. It must be below a folder that this "
        "user may write to. Set output.dir=FOLDER."
    )
