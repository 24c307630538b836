"""Measure how fast and how small the simulation is, against the bars that the project sets itself (see README.md)."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from simpy_model import run as run_simpy
from table import Row, add_json, at_most, deliver, load_average, say
from tooltime import timed_tools

from spepolicy.config import register, to_scenario
from spepolicy.drivers.compiling import compile_machine
from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import simulate
from spepolicy.errors import ConfigurationError, SpePolicyError
from spepolicy.machine.scenario import Scenario
from spepolicy.messages import explain
from spepolicy.platforms import reason_not_to_run
from spepolicy.plugins import build_policy, installed_policies
from spepolicy.units import parse_duration

MIN_SAMPLES_PER_S = 40e6
MIN_RATIO = 50
MAX_OTHER_BYTES = 64 * 1024
MAX_HOOK_SHARE = 0.10
MAX_FIRST_RUN_S = 60
MAX_LATER_RUN_S = 5
MAIN_JOB = ("-m", "spepolicy", "+policy=eager_pin")
MAIN_POLICY = "eager_pin"
BASELINES = ("bare_metal", "pin_vm")  # run beside every policy


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, and return 0 if every bar is met, 1 if not, 2 for wrong arguments."""
    options = _options(arguments)
    try:
        load_before = load_average()
        rows = [row for section in _sections(options) for row in section()]
    except SpePolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return deliver(rows, load_before, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--lanes", type=int, default=1024, help="one-vCPU VMs side by side (default 1024, as the bars say)")
    add("--duration", default="100ms", help="guest time of each lane (default 100ms)")
    add("--policies", default="", help="comma-separated names (default: all that are installed)")
    add("--threads", type=int, default=None, help="threads of the simulation (default: one per processor)")
    add("--repeats", type=int, default=3, help="runs of each kind; the median counts (default 3)")
    add("--simpy-duration", default="100ms", help="guest time of each SimPy run, one lane (default 100ms)")
    add("--cold", action="store_true", help="also run the main job with an empty compile cache, then again")
    add_json(parser)
    add("overrides", nargs="*", help="settings of the scenario, such as workload=compressor guest.period=1024")
    options = parser.parse_args(arguments)
    for name in ("lanes", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, but must be at least 1")
    return options


def _sections(options: argparse.Namespace) -> list[Callable[[], list[Row]]]:
    names = [name for name in options.policies.split(",") if name] or list(installed_policies())
    duration_ps = parse_duration(options.duration, "--duration")
    scenario = replace(scenario_of(options.overrides), duration_ps=duration_ps)
    policies, refused = {}, []
    for name in names:
        policy = build_policy(name, {})
        reason = reason_not_to_run(policy, name, scenario)
        if reason is None:
            policies[name] = policy
        else:
            refused.append(Row(f"{name}: cannot run", reason))
    hooks_s: dict[str, float] = {}
    sections = [lambda: _simulation(scenario, policies, options, hooks_s), lambda: refused]
    if options.cold:
        sections += [lambda: _hooks_of_main_job(hooks_s, options), lambda: _main_job(options.repeats)]
    return sections


def scenario_of(overrides: Sequence[str]) -> Scenario:
    """Return the scenario of the main job, as `python -m spepolicy +policy=eager_pin` composes it."""
    register()
    try:
        with initialize_config_module("spepolicy_conf", version_base="1.3"):
            return to_scenario(compose("config", overrides=["guest.vcpus=1", *overrides]))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(explain(error)) from error


def _simulation(
    scenario: Scenario, policies: dict[str, object], options: argparse.Namespace, hooks_s: dict[str, float]
) -> list[Row]:
    """Time the machine and, between its runs, the SimPy model, so that both see the same load of the computer. Put the
    time that hooks take, their tools included, into *hooks_s*, by policy.
    """
    rows = [_warm_up(scenario, policies, options.threads)]
    simpy_scenario = replace(scenario, duration_ps=parse_duration(options.simpy_duration, "--simpy-duration"))
    simpy_rates, main_rates = [], []
    for name, policy in policies.items():
        results = []
        for repeat in range(options.repeats):
            say(f"{name}: run {repeat + 1} of {options.repeats}")
            results.append(_timed(scenario, name, policy, options))
            if name == MAIN_POLICY:
                outcome = run_simpy(simpy_scenario, repeat)
                simpy_rates.append(outcome["samples"] / outcome["seconds"])
                main_rates.append(results[-1].samples / results[-1].seconds)
        rows += _policy_rows(name, results, scenario)
        if results[0].hook_s > 0:
            rows += _hook_rows(name, scenario, policy, options, hooks_s)
    if simpy_rates:
        ours, theirs = statistics.median(main_rates), statistics.median(simpy_rates)
        rows.append(Row("SimPy model, one lane: samples/s", f"{theirs / 1e6:.3f} M"))
        ratio = ours / theirs
        peer = f"{ratio:.0f} times SimPy"
        rows.append(Row(f"{MAIN_POLICY}: times SimPy", f"{ratio:.0f}", f">= {MIN_RATIO}", ratio >= MIN_RATIO, peer))
    return rows


def _warm_up(scenario: Scenario, policies: dict[str, object], threads: int | None) -> Row:
    """Compile or load everything that the timed runs call."""
    begin = time.perf_counter()
    compile_machine(say)
    for name, policy in policies.items():
        simulate(replace(scenario, duration_ps=5 * 10**9), policy, name=name, replicates=range(4), threads=threads)
    return Row("compiling or loading the machine", f"{time.perf_counter() - begin:.1f} s")


def _timed(scenario: Scenario, name: str, policy: object, options: argparse.Namespace) -> Result:
    return simulate(scenario, policy, name=name, replicates=range(options.lanes), threads=options.threads)


def _policy_rows(name: str, results: list[Result], scenario: Scenario) -> list[Row]:
    lanes = len(results[0].replicates)
    rate = statistics.median(result.samples / result.seconds for result in results)
    vm_rate = statistics.median(lanes * scenario.duration_ps / 1e12 / result.seconds for result in results)
    tables, other = results[0].memory["page_tables"], results[0].memory["other"]
    selected = int(np.sum(results[0].truth["selected"]))
    if selected == 0:
        return [Row(f"{name}: VM-seconds/s", f"{vm_rate:.1f}"), Row(f"{name}: samples", "none, by design")]
    fast, small = f">= {MIN_SAMPLES_PER_S / 1e6:.0f} M", f"<= {MAX_OTHER_BYTES // 1024}"
    return [
        Row(f"{name}: samples/s", f"{rate / 1e6:.1f} M", fast, rate >= MIN_SAMPLES_PER_S),
        Row(f"{name}: VM-seconds/s", f"{vm_rate:.1f}"),
        Row(f"{name}: samples simulated, each run", f"{selected:,}"),
        Row(f"{name}: page tables, KiB a lane", f"{tables / 1024:.1f}"),
        Row(f"{name}: all else, KiB a lane", f"{other / 1024:.1f}", small, other <= MAX_OTHER_BYTES),
    ]


def _hook_rows(
    name: str, scenario: Scenario, policy: object, options: argparse.Namespace, hooks_s: dict[str, float]
) -> list[Row]:
    """Run once more, with the tools timed: what hooks take of the machine's processor time."""
    with timed_tools() as spent:
        result = _timed(scenario, name, policy, options)
    hooks_s[name] = result.hook_s
    policys = max(result.hook_s - sum(spent), 0.0)
    return [
        Row(f"{name}: hooks, policy's code, of the machine's time", f"{100 * policys / result.busy_s:.1f} %"),
        Row(f"{name}: hooks, KVM's tools, of the machine's time", f"{100 * sum(spent) / result.busy_s:.1f} %"),
    ]


def _hooks_of_main_job(hooks_s: dict[str, float], options: argparse.Namespace) -> list[Row]:
    """What hooks take, their tools included, of the wall time of the main job with as many lanes. Each thread of the
    simulation has its part of them.
    """
    threads = options.threads or os.cpu_count() or 1
    sizes = ("guest.vcpus=1", f"replicates={options.lanes}", f"duration={options.duration}", *options.overrides)
    rows = []
    for name, seconds in hooks_s.items():
        say(f"main job with {options.lanes} lanes: {name}")
        command = [sys.executable, "-m", "spepolicy", f"+policy={name}", *sizes]
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            _run(command, Path(folder), {})
            wall = time.perf_counter() - begin
        baselines = sum(hooks_s.get(baseline, 0.0) for baseline in BASELINES if baseline != name)
        share = (seconds + baselines) / threads / wall
        bar = f"<= {100 * MAX_HOOK_SHARE:.0f} %"
        rows.append(
            Row(f"{name}: hooks, of the main job's wall time", f"{100 * share:.1f} %", bar, share <= MAX_HOOK_SHARE)
        )
    return rows


def _run(command: Sequence[str], folder: Path, variables: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SpePolicyError(f"the main job ended with status {done.returncode}: {done.stderr.strip()[-500:]}")


def _main_job(repeats: int) -> list[Row]:
    """Time the main job as a user starts it: in an empty folder, first with an empty compile cache, then again."""
    with tempfile.TemporaryDirectory() as folder:
        cache = {"NUMBA_CACHE_DIR": str(Path(folder) / "compiled")}
        work = Path(folder) / "work"
        work.mkdir()
        seconds = []
        for n in range(1 + repeats):
            say(f"main job: {'first run' if n == 0 else f'later run {n} of {repeats}'}")
            begin = time.perf_counter()
            _run([sys.executable, *MAIN_JOB], work, cache)
            seconds.append(time.perf_counter() - begin)
    first, later = seconds[0], statistics.median(seconds[1:])
    return [
        at_most("main job, empty compile cache", first, MAX_FIRST_RUN_S, digits=1),
        at_most("main job, later", later, MAX_LATER_RUN_S),
    ]


if __name__ == "__main__":
    sys.exit(main())
