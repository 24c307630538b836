"""Measure a sweep of 1,000 configurations with 8 replicates, tracked in MLflow, against its bars (see README.md).

python experiments/benchmark/sweep.py            # some minutes; --configurations 100 for a try
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from table import Row, add_json, at_most, deliver, load_average, say

MAX_TOTAL_S = 60
MAX_COMPOSE_S = 5
MAX_TRACKING_S = 40
MIN_RATIO = 30
MAX_HELP_S = 0.5
MAX_IMPORT_S = 1.0
POLICIES = ("eager_pin", "pin_on_fault", "pin_vm", "map_on_fault", "synthetic_fault")
SHORT = ("duration=2ms", "replicates=8", "baselines=[]")
PROGRAM = (sys.executable, "-m", "spepolicy")
# What a single run imports before it simulates, tracking off: from the command line to the driver.
IMPORTS = """
import time
begin = time.perf_counter()
from spepolicy.cli import main
from spepolicy.launch import Session
from spepolicy.lab.run import execute
from spepolicy.drivers.simulate import simulate
import hydra
print(time.perf_counter() - begin)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, and return 0 if every bar is met, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--configurations", type=int, default=1000, help="a multiple of 100 (default 1000)")
    parser.add_argument("--basic-jobs", type=int, default=10, help="jobs of Hydra's basic launcher (default 10)")
    add_json(parser)
    options = parser.parse_args(arguments)
    load_before = load_average()
    rows = [*_sweep(options.configurations, options.basic_jobs), *_startup()]
    return deliver(rows, load_before, options.json)


def words(configurations: int) -> list[str]:
    """Return the sweep: policies, buffers, and costs and intervals that a kernel call can share."""
    traps = ",".join(f"{n}us" for n in range(1, configurations // 100 + 1))
    intervals = ",".join(f"{n}us" for n in (50, 100, 150, 200, 250))
    return [
        "-m", f"+policy={','.join(POLICIES)}", "guest.buffer=256KiB,512KiB,1MiB,2MiB", f"costs.trap={traps}",
        f"kvm.exit_interval={intervals}", *SHORT,
    ]  # fmt: skip


def _run(folder: Path, arguments: Sequence[str]) -> tuple[float, str]:
    """Run the program in *folder*; return (wall seconds, what it printed)."""
    begin = time.perf_counter()
    ended = subprocess.run([*PROGRAM, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"the sweep failed: {ended.stderr[-2000:]}")
    return time.perf_counter() - begin, ended.stdout


def _sweep(configurations: int, basic_jobs: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("compiling, and making the database")
        _run(folder, ["-m", "+policy=eager_pin", "seed=1", *SHORT])
        say(f"{configurations:,} configurations as lanes, with tracking")
        total_s, out = _run(folder, words(configurations))
        folder_line = re.search(r"^files: (.*)$", out, re.MULTILINE)
        assert folder_line is not None, out
        seconds = json.loads((Path(folder_line[1]) / "sweep.json").read_text())["seconds"]
        say(f"{basic_jobs} jobs one by one, by Hydra's basic launcher")
        basic = [f"seed=range(0,{basic_jobs})", "+policy=eager_pin", "baselines=[]", "duration=2ms", "replicates=8"]
        basic_s, _ = _run(folder, ["-m", "hydra/launcher=basic", *basic])
        ratio = (basic_s / basic_jobs) / (total_s / configurations)
        tracking_s = json.loads((Path(folder_line[1]) / "tracking.json").read_text())["tracking_s"]
    return [
        at_most(f"{configurations:,} configurations, 8 replicates, tracked", total_s, MAX_TOTAL_S),
        at_most("of which composing", seconds["compose"], MAX_COMPOSE_S),
        at_most("of which MLflow's writing, most of it meanwhile", tracking_s, MAX_TRACKING_S),
        Row(
            "against Hydra's basic launcher, a job", f"{ratio:.0f} times", f">= {MIN_RATIO} times", ratio >= MIN_RATIO,
            f"{ratio:.0f} times the basic launcher",
        ),
    ]  # fmt: skip


def _startup() -> list[Row]:
    begin = time.perf_counter()
    subprocess.run([*PROGRAM, "--help"], stdout=subprocess.DEVNULL, check=True)
    help_s = time.perf_counter() - begin
    answer = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout
    return [
        at_most("python -m spepolicy --help", help_s, MAX_HELP_S),
        at_most("imports of the main job, tracking off", float(answer), MAX_IMPORT_S),
    ]


if __name__ == "__main__":
    sys.exit(main())
