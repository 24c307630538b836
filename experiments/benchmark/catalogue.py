"""Measure how long the catalogue of corner cases takes on all installed policies (see README.md)."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from table import Row, add_json, at_most, deliver, load_average, say

from spepolicy.drivers.compiling import compile_machine

MAX_CATALOGUE_S = 20
COMMAND = ("-m", "spepolicy", "task=catalogue")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, and return 0 if every bar is met, 1 if not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", default="", help="one policy instead of all, for a try")
    parser.add_argument("--repeats", type=int, default=1, help="runs, of which the median counts (default 1)")
    add_json(parser)
    options = parser.parse_args(arguments)
    load = load_average()
    compile_machine(say)
    words = [*COMMAND, *([f"+policy={options.policy}"] if options.policy else [])]
    runs = [_seconds(words) for _ in range(options.repeats)]
    if any(status for _, status in runs):
        verdicts = Row("all verdicts hold", "no", "yes", False)
    else:
        verdicts = Row("all verdicts hold", "yes", "yes", True)
    who = options.policy or "all policies"
    rows = [at_most(f"the catalogue, warm, {who}", statistics.median(s for s, _ in runs), MAX_CATALOGUE_S, digits=1)]
    return deliver([*rows, verdicts], load, options.json)


def _seconds(words: Sequence[str]) -> tuple[float, int]:
    """Run the catalogue in an empty folder; return (wall seconds, exit status): 2 if a verdict does not hold."""
    say("the catalogue")
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, *words], cwd=folder, stdout=subprocess.DEVNULL, check=False)
        return time.perf_counter() - begin, done.returncode


if __name__ == "__main__":
    sys.exit(main())
