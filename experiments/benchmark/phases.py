"""Measure where the main job's processor time goes, by what the machine and the lab do (see README.md).

python experiments/benchmark/phases.py                        # the main job, and 1,024 lanes of it
python experiments/benchmark/phases.py --functions 20         # and the compiled functions that cost most
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from table import Row, add_json, deliver, load_average, say

SAMPLES_PER_S = 997  # a prime: nothing in the machine keeps step with it
JOBS = {
    "main job": ("+policy=eager_pin",),
    "1,024 lanes": ("+policy=eager_pin", "guest.vcpus=1", "replicates=1024", "duration=100ms", "baselines=[]"),
}
QUICK = {"main job": ("+policy=eager_pin", "replicates=64", "duration=100ms", "tracking=none")}

START, LOADING, DRIVER = "start: imports, configuration", "start: loading compiled code", "lanes: memory, driver"
POLICY, TOOLS, JUDGE, OUTPUT, TRACKING = "hooks: policies", "hooks: KVM's tools", "judge", "output", "MLflow's process"
# Modules of the compiled machine, by what the issue of a slow run would be filed under.
MODULES = {
    "sampling": ("machine.spu", "machine.pick", "machine.draw", "machine.spu_write", "machine.spu_events"),
    "translation": (
        "mmu.walker", "mmu.tables", "mmu.memory", "mmu.regime", "mmu.refused", "mmu.attributes", "mmu.builder",
        "mmu.address_translate", "machine.pagetables",
    ),
    "guest": (
        "machine.guest", "machine.guestacts", "machine.linux_spe", "machine.misbehave", "machine.other_drivers",
    ),
    "host": (
        "machine.host", "machine.hostops", "machine.hostpage", "machine.operations", "machine.migration",
        "machine.dirtylog",
    ),
    "KVM": (
        "machine.kvm", "machine.answers", "machine.shadow", "machine.own_buffer", "machine.whole_vm", "machine.walking",
        "machine.pinning",
    ),
    DRIVER: ("machine.layout", "machine.build", "machine.state"),
    "clocks and accounts": ("machine.lane", "machine.blackout", "machine.trace", "machine.rows", "jit"),
}  # fmt: skip
PHASES = (START, LOADING, *MODULES, TOOLS, POLICY, JUDGE, OUTPUT, TRACKING)
_PHASE_OF = {f"spepolicy.{module}": phase for phase, modules in MODULES.items() for module in modules}


@dataclass
class Marks:
    """What a run says of itself: where its compiled functions lie, and what it was doing when."""

    pid: int = 0
    main: int = 0  # its first thread
    functions: list[tuple[int, int, str]] = field(default_factory=list)  # address, size, name
    spans: list[tuple[int, int, int, str]] = field(default_factory=list)  # thread, begin, end (ns), phase
    judged_ns: int = 0  # when the judge was done for good; what follows is output


@dataclass(frozen=True)
class Sample:
    """One sample of perf: who ran, when, and the address in the program, also if the kernel was working for it."""

    pid: int
    thread: int
    time_ns: int
    address: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, and return 0: there are no bars."""
    if arguments is None and sys.argv[1:2] == ["--worker"]:
        return _work(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--functions", type=int, default=0, metavar="N", help="also the N compiled functions that cost most"
    )
    parser.add_argument("--quick", action="store_true", help="a small job, for a try")
    parser.add_argument("words", nargs="*", help="another job, as behind `python -m spepolicy`")
    add_json(parser)
    options = parser.parse_args(arguments)
    load = load_average()
    reason = why_not()
    if reason:
        return deliver([Row("phases: not measured", reason)], load, options.json)
    rows = []
    jobs = {" ".join(options.words): options.words} if options.words else QUICK if options.quick else JOBS
    for name, words in jobs.items():
        rows += _job(name, words, options.functions)
    return deliver(rows, load, options.json)


def why_not() -> str:
    """Return why perf cannot sample here, or ""."""
    from spepolicy.jit import COMPILED

    if not COMPILED:
        return "NUMBA_DISABLE_JIT is set, so nothing is compiled"
    if shutil.which("perf") is None:
        return "perf is not installed (Debian: linux-perf)"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*_perf(Path(folder) / "data"), "true"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"perf may not sample here: {done.stderr.strip().splitlines()[-1][:90]}"


def _perf(data: Path) -> list[str]:
    # The processor's own counters are missing in most virtual machines; the kernel's clock of a CPU is always there.
    clock = ["-e", "cpu-clock", "-F", str(SAMPLES_PER_S), "-k", "CLOCK_MONOTONIC", "--user-regs=ip"]
    return ["perf", "record", "-q", *clock, "-o", str(data), "--"]


def _job(name: str, words: Sequence[str], functions: int) -> list[Row]:
    from spepolicy.drivers.compiling import compile_machine

    compile_machine(say)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        say(f"{name}: once, so that all is loaded from the cache")
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(folder / "marks.json"), *words]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        say(f"{name}: under perf")
        subprocess.run([*_perf(folder / "data"), *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        marks = Marks(**json.loads((folder / "marks.json").read_text()))
        samples = read_samples(folder / "data")
    by_phase, by_function = classify(marks, samples)
    total = sum(by_phase.values())
    rows = [Row(f"{name}: CPU time", f"{total / SAMPLES_PER_S:.2f} s, {total:,} samples")]
    rows += [Row(f"{name}: {phase}", f"{100 * by_phase[phase] / total:.1f} %") for phase in PHASES]
    rows += [
        Row(f"{name}: {function}", f"{100 * count / total:.1f} %")
        for function, count in by_function.most_common(functions)
    ]
    return rows


# ---- reading what perf saw -------------------------------------------------------------------------------------------


def read_samples(data: Path) -> list[Sample]:
    """Return the samples of a perf.data file."""
    command = ["perf", "script", "--ns", "-F", "pid,tid,time,ip,uregs", "-i", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [sample for line in done.stdout.splitlines() if (sample := parse_sample(line)) is not None]


def parse_sample(line: str) -> Sample | None:
    """Return the sample of a line of `perf script -F pid,tid,time,ip,uregs --ns`, None if it holds none."""
    match = re.match(r"\s*(\d+)/(\d+)\s+(\d+)\.(\d{9}):\s+([0-9a-f]+)(?:.*\bIP:0x([0-9a-f]+))?", line)
    if match is None:
        return None
    pid, thread, seconds, ns, address, user = match.groups()
    return Sample(int(pid), int(thread), int(seconds) * 10**9 + int(ns), int(user or address, 16))


def classify(marks: Marks, samples: Sequence[Sample]) -> tuple[Counter[str], Counter[str]]:
    """Return how many samples fall into each of `PHASES`, and into each compiled function. Every sample is counted
    once: the phases add up to all of them.
    """
    functions = sorted(marks.functions)
    starts = [address for address, _, _ in functions]
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for thread, begin, end, phase in marks.spans:
        spans.setdefault(thread, []).append((begin, end, phase))
    flat = {thread: innermost(each) for thread, each in spans.items()}
    begins = {thread: [begin for begin, _, _ in each] for thread, each in flat.items()}
    by_phase: Counter[str] = Counter()
    by_function: Counter[str] = Counter()
    for sample in samples:
        place = bisect_right(starts, sample.address) - 1
        compiled = ""
        if sample.pid == marks.pid and place >= 0 and sample.address < functions[place][0] + functions[place][1]:
            compiled = functions[place][2]
            by_function[compiled] += 1
        at = bisect_right(begins.get(sample.thread, []), sample.time_ns) - 1
        inside = flat[sample.thread][at] if at >= 0 else (0, 0, "")
        by_phase[_phase(marks, sample, compiled, inside[2] if sample.time_ns < inside[1] else "")] += 1
    return by_phase, by_function


def innermost(spans: Sequence[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """Cut the *spans* (begin, end, phase) of a thread, which may lie within each other, into pieces that do not: each
    moment belongs to the shortest span that it is in.
    """
    pieces: list[tuple[int, int, str]] = []
    open_: list[tuple[int, str]] = []  # (end, phase), the innermost last
    now = 0

    def run_to(moment: int) -> None:
        nonlocal now
        if open_ and now < moment:
            pieces.append((now, moment, open_[-1][1]))
        now = moment

    for begin, end, phase in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_ and open_[-1][0] <= begin:
            run_to(open_[-1][0])
            open_.pop()
        run_to(begin)
        open_.append((end, phase))
    while open_:
        run_to(open_[-1][0])
        open_.pop()
    return pieces


def _phase(marks: Marks, sample: Sample, compiled: str, span: str) -> str:
    if sample.pid != marks.pid:
        return TRACKING
    if span == POLICY and compiled:
        return TOOLS
    if span:
        return span
    if compiled:
        return phase_of(compiled)
    if sample.thread != marks.main:
        return DRIVER
    return OUTPUT if marks.judged_ns and sample.time_ns >= marks.judged_ns else START


def phase_of(function: str) -> str:
    """Return the phase of a compiled function, "package.module.function"; wrappers and numba's own are the driver's."""
    return _PHASE_OF.get(function.removeprefix("cpython.").rpartition(".")[0], DRIVER)


# ---- the process that is measured ------------------------------------------------------------------------------------


def _work(path: Path, words: Sequence[str]) -> int:
    """Run the program with *words*, and write what it says of itself to *path*."""
    import os

    from jitmap import JitMap
    from numba.core.caching import Cache

    from spepolicy import cli
    from spepolicy.drivers import simulate
    from spepolicy.judge import records
    from spepolicy.lab import run

    marks = Marks(os.getpid(), threading.get_native_id())
    jit_map = JitMap()
    for owner, name, phase in (
        (simulate, "call_hook", POLICY),
        (Cache, "load_overload", LOADING),
        (records, "check_conservation", JUDGE),
        (records, "check_profile", JUDGE),
        (records, "check_time", JUDGE),
        (run, "_judge", JUDGE),
    ):
        _mark(marks, owner, name, phase)
    status = cli.main(words)
    marks.judged_ns = max(end for _, _, end, phase in marks.spans if phase == JUDGE)
    marks.functions = jit_map.functions()
    path.write_text(json.dumps(vars(marks)))
    return status


def _mark(marks: Marks, owner: Any, name: str, phase: str) -> None:
    """Let each call of *owner*'s function *name* leave a span of *phase*."""
    function: Callable[..., Any] = getattr(owner, name)

    @wraps(function)
    def marked(*arguments: Any, **named: Any) -> Any:
        begin = time.monotonic_ns()
        try:
            return function(*arguments, **named)
        finally:
            marks.spans.append((threading.get_native_id(), begin, time.monotonic_ns(), phase))

    setattr(owner, name, marked)


if __name__ == "__main__":
    sys.exit(main())
