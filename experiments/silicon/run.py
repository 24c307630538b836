"""Compare the samples of the machine's SPU with those of real hardware, on loops that were measured (see README.md)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_module
from loops import ALIGNED, LOAD, MEASURED, Loop, workload
from numpy.typing import NDArray

from spepolicy.config import register, to_scenario
from spepolicy.drivers.compiling import compile_machine
from spepolicy.drivers.simulate import simulate
from spepolicy.machine.scenario import Cpu, Guest, Host, Kvm, Scenario
from spepolicy.plugins import build_policy

MEASUREMENTS: dict[str, Any] = json.loads((Path(__file__).parent / "measured.json").read_text())
PERIOD = 131_072
ITERATIONS = 1_000_000
LOAD_FILTER_PERIOD = 20_123 - 20_123 % 256  # as the driver rounds it
# Of the aligned loops, filtered for loads: samples, and loads without any (spe_data.md 4b, read off screenshots).
NEVER_SAMPLED = {"aligned 15": (3585, 0, 6), "aligned 16": (3827, 3, 7), "aligned 17": (4605, 0, 7)}
MODELS = (("uniform", "neoverse_n1"), ("model", "measured"))
# Operations before the loop of the run: which of the two halves of an even loop is picked first. The measured one is
# that of the first load.
ENTRY_OPS = 1001


@dataclass(frozen=True)
class Compared:
    """One figure of one loop: measured, and by each model."""

    loop: str
    figure: str
    measured: tuple[float, float]  # mean, standard deviation over runs; the latter 0 where only one run is known
    models: tuple[tuple[float, float], ...]

    def distance(self, n: int) -> float:
        """Return how far model *n* is from the measured mean, in measured standard deviations."""
        mean, deviation = self.measured
        return abs(self.models[n][0] - mean) / deviation if deviation else float("nan")


def cpu_of(preset: str) -> Cpu:
    """Return the processor of conf/cpu/PRESET.yaml."""
    register()
    with initialize_config_module("spepolicy_conf", version_base="1.3"):
        return to_scenario(compose("config", overrides=[f"cpu={preset}", "host=silent"])).cpu


def samples_of(loop: Loop, cpu: Cpu, *, runs: int, iterations: int, period: int, aligned: bool) -> NDArray[np.int64]:
    """Return int64[runs, operations of the body]: how often each was sampled in each run.

    aligned: as the aligned loops were measured, filtered for loads; and undisturbed, as their samples look.
    """
    op_ps = loop.op_ps
    scenario = Scenario(
        workload=workload(loop, ticks=not aligned),
        duration_ps=iterations * len(loop.body) * op_ps + ENTRY_OPS * op_ps,
        cpu=cpu,
        guest=Guest(
            ram_pages=8192 if aligned else 256,
            buffer_pages=1024 if aligned else 16,  # room for all records of a run: nothing else interrupts it
            period_ops=period,
            jitter=True,
            task_off_ps=0,
            start_ps=ENTRY_OPS * op_ps,
            profile_kernel=False,
            type_filter=LOAD if aligned else 0,
        ),
        kvm=Kvm(exit_interval_ps=0, preempt_interval_ps=0),
        host=Host(),
    )
    result = simulate(scenario, build_policy("bare_metal", {}), name="bare_metal", replicates=range(runs))
    counts: NDArray[np.int64] = result.seen[:, 0, : len(loop.body)]
    return counts


def summary(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def compare_measured(loop: Loop, cpus: Sequence[Cpu], runs: int) -> list[Compared]:
    """Compare the runs of one of the two loops with known distributions."""
    real = MEASUREMENTS[loop.name]
    counts = [samples_of(loop, cpu, runs=runs, iterations=ITERATIONS, period=PERIOD, aligned=False) for cpu in cpus]
    found = []
    for name, places in (("loads", loop.loads), ("stores", loop.stores)):
        totals = [c[:, places].sum(axis=1).astype(np.float64) for c in counts]
        known = (real[name]["mean"], real[name]["sd"])
        found.append(Compared(loop.name, f"{name} a run", known, tuple(map(summary, totals))))
        spread = [np.mean([abs(np.percentile(t, float(q)) - v) for q, v in real[name]["quantiles"].items()])
                  for t in totals]  # fmt: skip
        found.append(
            Compared(loop.name, f"{name}: quantiles off by", (0.0, 0.0), tuple((float(s), 0.0) for s in spread))
        )
        addresses = sum(int(n) * runs_n for n, runs_n in real[name]["addresses"].items()) / real["runs"]
        seen = [(c[:, places] > 0).sum(axis=1).mean() for c in counts]
        models = tuple((float(s), 0.0) for s in seen)
        found.append(Compared(loop.name, f"{name} of 5 that a run samples", (addresses, 0.0), models))
        if f"{name[:-1]}_positions" in real:
            positions = np.array(real[f"{name[:-1]}_positions"])
            off = [float(np.abs(c[:, places].mean(axis=0) - positions).mean()) for c in counts]
            found.append(Compared(loop.name, f"{name}: places off by", (0.0, 0.0), tuple((o, 0.0) for o in off)))
    both = [float((c[:, loop.loads + loop.stores] > 0).all(axis=1).mean()) * 100 for c in counts]
    share = 100 * real["all_ten"] / real["runs"]
    found.append(Compared(loop.name, "runs that sample all ten, %", (share, 0.0), tuple((b, 0.0) for b in both)))
    return found


def compare_aligned(loop: Loop, cpus: Sequence[Cpu]) -> Compared:
    """Count the loads of an aligned loop that are never sampled, in one run as long as the measured one."""
    samples, never, _ = NEVER_SAMPLED[loop.name]
    models = []
    for cpu in cpus:
        iterations = samples * LOAD_FILTER_PERIOD // len(loop.loads)
        counts = samples_of(loop, cpu, runs=1, iterations=iterations, period=LOAD_FILTER_PERIOD, aligned=True)
        models.append((float((counts[0, loop.loads] == 0).sum()), 0.0))
    return Compared(loop.name, f"loads of {len(loop.loads)} never sampled", (float(never), 0.0), tuple(models))


def text(pair: tuple[float, float]) -> str:
    mean, deviation = pair
    return f"{mean:.2f} ({deviation:.2f})" if deviation else f"{mean:.2f}"


def show(rows: Sequence[Compared]) -> None:
    """Print the table: means with standard deviations over runs, and the distance in measured standard deviations."""
    head = [
        "loop",
        "figure",
        "measured",
        *(f"{name}" for name, _ in MODELS),
        *(f"{name} off, sd" for name, _ in MODELS),
    ]
    lines = [head]
    for row in rows:
        distances = [row.distance(n) for n in range(len(MODELS))]
        lines.append(
            [row.loop, row.figure, text(row.measured), *map(text, row.models),
             *("-" if np.isnan(d) else f"{d:.2f}" for d in distances)]
        )  # fmt: skip
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]
    for line in lines:
        cells = [
            cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def compare(runs: int, *, aligned: bool = True) -> list[Compared]:
    """Return the whole table."""
    cpus = [cpu_of(preset) for _, preset in MODELS]
    rows = [row for loop in MEASURED for row in compare_measured(loop, cpus, runs)]
    if aligned:
        rows += [compare_aligned(loop, cpus) for loop in ALIGNED]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1001, help="runs of each loop (default 1001, as measured)")
    options = parser.parse_args(arguments)
    if options.runs < 2:
        parser.error(f"--runs is {options.runs}, but must be at least 2")
    compile_machine(lambda line: print(line, file=sys.stderr))
    show(compare(options.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
