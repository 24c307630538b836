"""Measure what the host's, the guest's and migration's features cost when they are configured silent.

Two engines run the same scenario in turns: this checkout, and a commit from before those features. The host is silent,
the guest behaves, nothing migrates. Both are timed in CPU time of one thread, in processes of their own, so that the
load of the computer falls on both alike; what counts is the ratio of the medians.

    python experiments/benchmark/silent.py                     # against the commit before host operations became data
    python experiments/benchmark/silent.py --base HEAD~1 --policies pin_on_fault --repeats 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from table import Row, add_json, deliver, load_average, say

ROOT = Path(__file__).resolve().parents[2]
BASE = "a7458c9"  # README: name the mode that is missing
MAX_COST_PCT = 15

# What one process does. It imports the engine that PYTHONPATH names, so it must use what both engines have.
WORKER = """
import importlib, json, sys, time
from dataclasses import replace
from hydra import compose, initialize_config_module
from spepolicy.config import register, to_scenario
from spepolicy.drivers.simulate import simulate
name, lanes, duration_ps, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
register()
with initialize_config_module("spepolicy_conf", version_base="1.3"):
    scenario = to_scenario(compose("config", overrides=["guest.vcpus=1", "host=silent"]))
module = importlib.import_module("spepolicy_plugins." + name)
policy = getattr(module, "".join(part.capitalize() for part in name.split("_")))()
simulate(replace(scenario, duration_ps=10**9), policy, name=name, replicates=range(2), threads=1)
scenario = replace(scenario, duration_ps=duration_ps)
for _ in range(repeats):
    begin = time.process_time()
    result = simulate(scenario, policy, name=name, replicates=range(lanes), threads=1)
    print(json.dumps([result.samples, time.process_time() - begin]), flush=True)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, and return 0 if the cost is within the bar, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE, help="the commit to compare with (default %(default)s)")
    parser.add_argument("--policies", default="bare_metal,pin_on_fault,eager_pin", help="comma-separated")
    parser.add_argument("--lanes", type=int, default=128)
    parser.add_argument("--duration-ms", type=int, default=100, help="guest time of each lane")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each engine, of which the median counts")
    add_json(parser)
    options = parser.parse_args(arguments)
    load = load_average()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        done = subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "add", "--detach", "--force", str(base), options.base],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:  # a copy without history has nothing to compare with
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            return deliver(
                [Row("silent: not measured", f"git has no {options.base} here: {reason}")], load, options.json
            )
        try:
            engines = {
                "before": _importable(base, Path(folder) / "before"),
                "now": _importable(ROOT, Path(folder) / "now"),
            }
            rows = [row for name in options.policies.split(",") for row in _compare(name, engines, options)]
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(base)], check=False)
    return deliver(rows, load, options.json)


def _importable(checkout: Path, folder: Path) -> Path:
    """Return a folder that has the packages of *checkout* under their names."""
    folder.mkdir()
    for name, source in (("spepolicy", "spepolicy"), ("spepolicy_plugins", "plugins"), ("spepolicy_conf", "conf")):
        (folder / name).symlink_to(checkout / source)
    return folder


def _compare(name: str, engines: dict[str, Path], options: argparse.Namespace) -> list[Row]:
    """Run both engines in turns; return their rates and what the newer one costs, in percent."""
    rates: dict[str, list[float]] = {engine: [] for engine in engines}
    samples: dict[str, int] = {}
    for turn in range(options.repeats):
        for engine, path in engines.items():
            say(f"{name}, {engine}: turn {turn + 1} of {options.repeats}")
            count, rate = _run(name, path, options)
            rates[engine].append(rate)
            samples[engine] = count
    before, now = (statistics.median(rates[engine]) for engine in ("before", "now"))
    cost = 100 * (1 - now / before)
    same = "the same" if samples["before"] == samples["now"] else f"{samples['before']:,} and {samples['now']:,}"
    rate = f"{before / 1e6:.1f} M before, {now / 1e6:.1f} M now"
    peer = f"{now / before:.2f} times {options.base}"
    return [
        Row(f"{name}: silent features cost", f"{cost:.1f} %", f"<= {MAX_COST_PCT} %", cost <= MAX_COST_PCT, peer),
        Row(f"{name}: samples a second of CPU time", rate),
        Row(f"{name}: samples of both", same),
    ]


def _run(name: str, path: Path, options: argparse.Namespace) -> tuple[int, float]:
    """Run one engine in a process of its own; return (samples simulated, samples a second of CPU time)."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    if path.name == "before":  # the first turn compiles, the others load; nothing of it is of use to anybody later
        environment["NUMBA_CACHE_DIR"] = str(path.parent / "compiled")
    command = [sys.executable, "-c", WORKER, name, str(options.lanes), str(options.duration_ms * 10**9), "2"]
    done = subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name} with {path.name}: {done.stderr.strip()[-600:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return rows[-1][0], max(count / seconds for count, seconds in rows)


if __name__ == "__main__":
    sys.exit(main())
