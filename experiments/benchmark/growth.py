"""Measure how time and memory grow with lanes, buffer, vCPUs, duration and sweep points (see README.md).

python experiments/benchmark/growth.py                    # some minutes
python experiments/benchmark/growth.py --only vcpus       # one of them
python experiments/benchmark/growth.py --page             # and write the result into README.md and growth.svg
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from table import Row, add_json, computer, deliver, load_average, say

FOLDER = Path(__file__).resolve().parent
MAX_EXPONENT = 1.1
UPPER = 3  # points of the upper end, to which a line is fitted
ENOUGH_S = 0.3  # a point that takes less processor time is measured again; the fastest counts
REPEATS = 5
POLICY = "eager_pin"
MARKS = ("<!-- growth: written by growth.py --page -->\n", "<!-- end of growth -->\n")


@dataclass(frozen=True)
class Axis:
    """What grows, and what stays. `words` are settings of the scenario. The size stands for {} in them, and for `lanes`
    or `duration_ms` where that is 0.
    """

    name: str
    title: str
    unit: str
    sizes: tuple[int, ...]
    quick: tuple[int, ...]
    words: tuple[str, ...] = ()
    lanes: int = 64
    duration_ms: int = 20
    reason: str = ""  # why it may grow faster than linearly


@dataclass(frozen=True)
class Point:
    """One size: times in s, and the peak memory of the process in MiB."""

    size: int
    wall_s: float
    cpu_s: float
    peak_mib: float


_KIB = 1024
AXES = {
    axis.name: axis
    for axis in (
        # Short, so that 65,536 lanes take seconds: half of it is the laying out of memory.
        Axis("lanes", "lanes of 1 ms", "", tuple(4**n for n in range(9)), (1, 4), lanes=0, duration_ms=1),
        Axis(
            "buffer", "buffer of a vCPU", "KiB", tuple(16 * 4**n for n in range(7)), (16, 64),
            ("guest.buffer={}KiB", "kvm.memlock=unlimited"), duration_ms=100,
        ),
        Axis(
            "vcpus", "vCPUs of a lane", "", tuple(2**n for n in range(7)), (1, 2),
            ("guest.vcpus={}", "guest.memory=1GiB", "kvm.memlock=unlimited"), lanes=16,
            reason="whatever happens on one vCPU brings all others up to its time first",
        ),
        Axis(
            "duration", "guest time", "ms", (10, 40, 160, 640, 2560), (1, 2), lanes=16, duration_ms=0,
            reason="more and more lanes have met a NUMA scan, after which eager_pin's sessions restart for good",
        ),
        Axis(
            "silent", "guest time, silent host", "ms", (10, 40, 160, 640, 2560), (1, 2), ("host=silent",), 16, 0
        ),
        Axis("points", "points of a sweep", "", (10, 100, 1000, 10000), (10,), lanes=1, duration_ms=1),
    )
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, and return 0 if nothing grows faster than it may, 1 if something does."""
    options = _options(arguments)
    if options.worker:
        print(json.dumps([asdict(point) for point in _in_process(AXES[options.only[0]], options.quick)]))
        return 0
    from spepolicy.drivers.compiling import compile_machine
    from spepolicy.jit import cache_dir

    load = load_average()
    compile_machine(say)
    before = len(list(cache_dir().rglob("*.nbc")))
    curves = {name: measure(AXES[name], options.quick) for name in options.only}
    rows = [row for name, points in curves.items() for row in rows_of(AXES[name], points)]
    if not options.quick:
        fresh = len(list(cache_dir().rglob("*.nbc"))) - before
        rows.append(Row("functions that any size compiled again", str(fresh), "<= 0", fresh <= 0))
    status = deliver(rows, load, options.json)
    if options.page:
        write_page(curves, f"load average {load:.1f} before, {load_average():.1f} after. {computer()}")
    return status


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(AXES), help=f"comma-separated, of {', '.join(AXES)}")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: whether it runs")
    parser.add_argument("--page", action="store_true", help="write table and figure into the page")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    add_json(parser)
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    unknown = [name for name in options.only if name not in AXES]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: known are {', '.join(AXES)}")
    if options.page and (options.quick or options.only != list(AXES)):
        parser.error("--page is for a whole run: leave --quick and --only out")
    return options


# ---- the numbers -----------------------------------------------------------------------------------------------------


def exponents(sizes: Sequence[float], costs: Sequence[float]) -> list[float]:
    """Return the exponent e of cost ~ size**e between each pair of neighbours."""
    return [
        math.log(costs[n + 1] / costs[n]) / math.log(sizes[n + 1] / sizes[n]) for n in range(len(sizes) - 1)
    ]  # fmt: skip


def upper_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent e of the line cost ~ size**e that fits the last `UPPER` points best, by least squares."""
    x = [math.log(size) for size in sizes[-UPPER:]]
    y = [math.log(cost) for cost in costs[-UPPER:]]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((each - mean_x) ** 2 for each in x)
    if spread == 0:
        return 0.0
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def memory_exponent(points: Sequence[Point]) -> float:
    """Return the exponent of the memory at the upper end. What the smallest size takes is left out, but only where the
    largest takes twice as much: less tells nothing from the allocator's habits.
    """
    constant = points[0].peak_mib if points[-1].peak_mib >= 2 * points[0].peak_mib else 0
    grown = [max(point.peak_mib - constant, 1) for point in points]
    return upper_exponent([point.size for point in points], grown)


def rows_of(axis: Axis, points: Sequence[Point]) -> list[Row]:
    """Return the rows of one axis: its ends, and the exponents at its upper end against the bar."""
    sizes = [point.size for point in points]
    rows = [
        Row(f"{axis.title}, {_size(axis, point.size)}", f"{point.cpu_s:.2f} s CPU, {point.peak_mib:.0f} MiB")
        for point in (points[0], points[-1])
    ]
    cpu = upper_exponent(sizes, [point.cpu_s for point in points])
    for what, exponent in (("CPU time", cpu), ("memory", memory_exponent(points))):
        linear = exponent <= MAX_EXPONENT
        value = f"{exponent:.2f}" if linear or not axis.reason else f"{exponent:.2f}: {axis.reason}"
        verdict = True if linear else None if axis.reason else False
        rows.append(Row(f"{axis.title}: exponent of {what}", value, f"<= {MAX_EXPONENT}, or why", verdict))
    return rows


def _size(axis: Axis, size: int) -> str:
    if axis.unit == "KiB" and size >= _KIB:
        return f"{size // _KIB} MiB"
    return f"{size:,} {axis.unit}".strip()


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(axis: Axis, quick: bool) -> list[Point]:
    """Measure all sizes of *axis*, in a process of its own."""
    if axis.name == "points":
        return [_sweep(size) for size in (axis.quick if quick else axis.sizes)]
    say(axis.title)
    command = [sys.executable, __file__, "--worker", "--only", axis.name, *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Point(**point) for point in json.loads(done.stdout.splitlines()[-1])]


def _in_process(axis: Axis, quick: bool) -> list[Point]:
    from dataclasses import replace

    from run import scenario_of

    from spepolicy.drivers.simulate import simulate
    from spepolicy.plugins import build_policy

    policy = build_policy(POLICY, {})
    simulate(replace(scenario_of([]), duration_ps=10**9), policy, name=POLICY, replicates=range(2))  # loads all
    points = []
    for size in axis.quick if quick else axis.sizes:
        lanes, duration_ms = axis.lanes or size, axis.duration_ms or size
        words = [word.format(size) for word in axis.words]
        scenario = replace(scenario_of(words), duration_ps=duration_ms * 10**9)
        tries = []
        for _ in range(REPEATS):
            _reset_peak()
            wall, cpu = time.perf_counter(), time.process_time()
            simulate(scenario, policy, name=POLICY, replicates=range(lanes))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            tries.append(Point(size, wall, cpu, _peak_mib()))
            if cpu >= ENOUGH_S:
                break
        points.append(min(tries, key=lambda point: point.cpu_s))
        say(f"{axis.title}, {_size(axis, size)}: {points[-1].cpu_s:.2f} s CPU, {points[-1].peak_mib:.0f} MiB")
    return points


def _reset_peak() -> None:
    """Let the process's peak of resident memory begin anew; where that may not be, sizes ascend anyway."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / _KIB


def sweep_words(points: int) -> list[str]:
    """Return a sweep of *points* jobs, a multiple of 5: five policies, each with many costs of a trap."""
    from sweep import POLICIES

    traps = ",".join(f"{500 + 10 * n}ns" for n in range(points // len(POLICIES)))
    words = [f"+policy={','.join(POLICIES)}", f"costs.trap={traps}", "duration=1ms", "replicates=1"]
    return ["-m", *words, "baselines=[]", "tracking=none"]


def _sweep(points: int) -> Point:
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "spepolicy", *sweep_words(points)]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"a sweep of {points} points ended with status {process.returncode}")
    wall = time.perf_counter() - begin
    cpu = used.ru_utime + used.ru_stime
    say(f"a sweep of {points:,} points: {cpu:.1f} s CPU")
    return Point(points, wall, cpu, used.ru_maxrss / _KIB)


# ---- the page --------------------------------------------------------------------------------------------------------


def table_of(curves: dict[str, list[Point]]) -> str:
    """Return the table of the page: the ends of each curve, and its exponents."""
    lines = [
        "| what grows | from, to | CPU time, s | its exponent | step by step | peak memory, MiB | its exponent |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, points in curves.items():
        axis, sizes, cpu = AXES[name], [point.size for point in points], [point.cpu_s for point in points]
        cells = [
            axis.title,
            f"{_size(axis, sizes[0])} to {_size(axis, sizes[-1])}",
            f"{cpu[0]:.2f} to {cpu[-1]:.2f}",
            f"{upper_exponent(sizes, cpu):.2f}",
            ", ".join(f"{each:.1f}" for each in exponents(sizes, cpu)),
            f"{points[0].peak_mib:.0f} to {points[-1].peak_mib:.0f}",
            f"{memory_exponent(points):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_page(curves: dict[str, list[Point]], about: str) -> None:
    """Write table and figure, with *about*, where and how they were measured."""
    path = FOLDER / "README.md"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    figure = "![CPU time against size, both logarithmic, beside a line of exponent 1](growth.svg)\n"
    content = f"{table_of(curves)}\nMeasured with {about}\n\n{figure}"
    path.write_text(f"{before}{MARKS[0]}{content}{MARKS[1]}{after}", encoding="utf-8")
    draw(curves, FOLDER / "growth.svg")


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Draw CPU time against size, a panel an axis, each with a grey line of exponent 1 through its last point."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 8}):
        figure, panels = plt.subplots(1, len(curves), figsize=(2.2 * len(curves), 2.2), layout="constrained")
        for panel, (name, points) in zip(panels, curves.items(), strict=True):
            axis, sizes = AXES[name], [point.size for point in points]
            last = points[-1]
            panel.loglog(sizes, [last.cpu_s * size / last.size for size in sizes], color="0.8")
            panel.loglog(sizes, [point.cpu_s for point in points], "o-", markersize=3)
            panel.set_xlabel(axis.title + (f", {axis.unit}" if axis.unit else ""))
            panel.minorticks_off()
            panel.grid(color="0.93")
        panels[0].set_ylabel("CPU time, s")
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
