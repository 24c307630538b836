"""The table of README.md's section Performance: some rows of experiments/benchmark/results.json, which the benchmarks
wrote.

    python experiments/benchmark/all.py --json experiments/benchmark/results.json \
        --markdown experiments/benchmark/results.md
    python -m tests.docs.performance                      # writes the table again
"""

from __future__ import annotations

import json

from .pages import ROOT

RESULTS = ROOT / "experiments" / "benchmark" / "results.json"
README = ROOT / "README.md"
BEGIN = "<!-- performance: from experiments/benchmark/results.json, by `python -m tests.docs.performance` -->\n"
END = "<!-- end of performance -->\n"

# What the page calls a figure, and how the benchmark's name of it begins.
FIGURES = (
    ("samples simulated a second: `bare_metal`", "bare_metal: samples/s"),
    ("`pin_on_fault`", "pin_on_fault: samples/s"),
    ("`eager_pin`, which fails most on this host", "eager_pin: samples/s"),
    ("`switch_only`, which is black nearly always", "switch_only: samples/s"),
    ("`eager_pin` against a SimPy model of the same scenario, times", "eager_pin: times SimPy"),
    ("its hooks and their tools, of the main job's wall time", "eager_pin: hooks, of the main job's wall time"),
    ("state of a lane beside its page tables, KiB", "eager_pin: all else, KiB a lane"),
    ("main job, nothing compiled yet", "main job, empty compile cache"),
    ("main job, later", "main job, later"),
    ("two-stage walks a second, 1,000 address spaces", "1,000 address spaces: walks/s"),
    ("states explored a second, `eager_pin`", "eager_pin, explore="),
    ("sweep of 1,000 configurations x 8 replicates, tracked", "1,000 configurations, 8 replicates, tracked"),
    ("the catalogue on all policies", "the catalogue, warm, all policies"),
    ("what unused features of host and migration cost `eager_pin`", "eager_pin: silent features cost"),
    ("packets decoded, against `perf script`, times", "decode, 4 MiB at a time, times perf script --itrace=M"),
)


def table() -> str:
    """Return the table that the results give."""
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = ["| figure | bar | measured |", "|---|---|---|"]
    for label, figure in FIGURES:
        row = next(row for row in rows if row["figure"].startswith(figure))
        short = "" if row["passed"] else ", **short**"
        lines.append(f"| {label} | {row['bar']} | {row['value']}{short} |")
    return "\n".join([*lines, ""])


def shown() -> str:
    """Return the table that the page has."""
    return README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    page = README.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
