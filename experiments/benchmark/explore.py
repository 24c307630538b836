"""Measure how many states a second the explorer visits, and how soon it finds the ERET case (see README.md)."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from hydra import compose, initialize_config_module
from table import Row, add_json, at_most, deliver, load_average

from spepolicy.config import register, to_scenario
from spepolicy.errors import SpePolicyError
from spepolicy.explore.model import make_model
from spepolicy.explore.properties import Kind
from spepolicy.explore.search import Bounds, Outcome, search
from spepolicy.explore.task import settings_from
from spepolicy.plugins import build_policy

MIN_STATES_PER_S = 200_000
MAX_FIRST_TRACE_S = 30
MAX_BYTES = 64
TLC_STATES_PER_S = 1_000_000  # "about 1 M states/s on a laptop": 28.35 million in 28 s (peers.md, TLA+/TLC, learntla)
COMMAND = ("-m", "spepolicy", "task=explore", "+policy=eager_pin", "tracking=none")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, and return 0 if every bar is met, 1 if not, 2 for wrong arguments."""
    options = _options(arguments)
    try:
        load = load_average()
        rows = [row for name in options.configurations.split(",") for row in _search(name, options)]
        if not options.no_command:
            rows.append(_first_trace())
    except SpePolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"TLC, of its own models: {TLC_STATES_PER_S / 1e6:.0f} million states/s on a laptop (peers.md).\n")
    return deliver(rows, load, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--policy", default="eager_pin", help="policy (default eager_pin, as the bar says)")
    add("--configurations", default="lawful_guest,quiet_host", help="files of conf/explore, comma-separated")
    add("--states", type=int, default=3_000_000, help="states at which each search ends (default 3 million)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads (default: one per processor)")
    add_json(parser)
    add("--no-command", action="store_true", help="leave out the run of the command")
    options = parser.parse_args(arguments)
    if options.states < 1000:
        parser.error(f"--states is {options.states}, but must be at least 1000")
    return options


def _outcome(name: str, options: argparse.Namespace) -> Outcome:
    register()
    with initialize_config_module(version_base="1.3", config_module="spepolicy_conf"):
        from omegaconf import OmegaConf

        config = OmegaConf.to_container(compose("config", [f"explore={name}", "host=silent"]), resolve=True)
    assert isinstance(config, dict)
    scenario = to_scenario(config)
    settings = settings_from({str(key): value for key, value in config.items()}, scenario)
    model = make_model(settings, build_policy(options.policy, {}), options.policy)
    search(model, Bounds(max_states=1000), threads=options.threads)  # compiled, and the files read
    return search(model, Bounds(max_states=options.states), threads=options.threads)


def _search(name: str, options: argparse.Namespace) -> list[Row]:
    outcome = _outcome(name, options)
    what = f"{options.policy}, explore={name}"
    wall = outcome.states / outcome.seconds
    busy = outcome.states / outcome.cpu_seconds * options.threads
    share = wall / TLC_STATES_PER_S
    bar = f">= {MIN_STATES_PER_S:,}"
    return [
        Row(
            f"{what}: states/s, {share:.2f} of TLC's", f"{wall:,.0f}", bar, wall >= MIN_STATES_PER_S,
            f"{share:.2f} times TLC, as quoted",
        ),
        Row(f"{what}: states/s of {options.threads} processors that nobody else uses", f"{busy:,.0f}"),
        Row(f"{what}: states", f"{outcome.states:,}"),
        Row(f"{what}: transitions a state", f"{outcome.transitions / outcome.states:.2f}"),
        Row(
            f"{what}: bytes a visited state", f"{outcome.bytes_per_state:.0f}", f"<= {MAX_BYTES}",
            outcome.bytes_per_state <= MAX_BYTES,
        ),
        Row(f"{what}: {{1,0}} found", _found(outcome), "yes", _found(outcome) == "yes"),
    ]  # fmt: skip


def _found(outcome: Outcome) -> str:
    return "yes" if any(found.kind is Kind.BLACKOUT for found in outcome.found) else "no"


def _first_trace() -> Row:
    """Time the command from a warm start until it has printed the trace: a search of 100,000 states."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, *COMMAND, "explore.max_states=100000"], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - begin
    return at_most("the command, warm, to the {1,0} trace", seconds, MAX_FIRST_TRACE_S, digits=1)


if __name__ == "__main__":
    raise SystemExit(main())
