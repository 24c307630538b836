"""experiments/benchmark/phases.py: every sample is counted once, where it belongs; every module has its phase."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SPEPOLICY = Path(__file__).resolve().parents[2] / "spepolicy"
MAIN, WORKER, CHILD = 100, 101, 200  # thread numbers


@pytest.fixture
def benchmark(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("phases")


def marks(benchmark: ModuleType) -> object:
    return benchmark.Marks(
        pid=MAIN,
        main=MAIN,
        functions=[
            (1000, 100, "spepolicy.machine.spu.sample_until"),
            (1100, 50, "spepolicy.mmu.walker.translate"),
            (2000, 10, "cpython.spepolicy.machine.lane.run_lanes"),
            (3000, 10, "numba.core.runtime.nrt.decref"),
        ],
        spans=[
            (WORKER, 10, 20, benchmark.POLICY),
            (WORKER, 12, 14, benchmark.LOADING),
            (MAIN, 50, 60, benchmark.JUDGE),
        ],
        judged_ns=60,
    )


CASES = [
    ((MAIN, WORKER, 5, 1000), "sampling"),
    ((MAIN, WORKER, 5, 1099), "sampling"),
    ((MAIN, WORKER, 5, 1100), "translation"),
    ((MAIN, WORKER, 5, 1150), "DRIVER"),  # behind the last function
    ((MAIN, WORKER, 5, 999), "DRIVER"),
    ((MAIN, WORKER, 5, 2005), "clocks and accounts"),
    ((MAIN, WORKER, 5, 3005), "DRIVER"),
    ((MAIN, WORKER, 11, 1100), "TOOLS"),
    ((MAIN, WORKER, 11, 77), "POLICY"),
    ((MAIN, WORKER, 13, 77), "LOADING"),
    ((MAIN, WORKER, 15, 77), "POLICY"),  # the hook goes on where loading has ended
    ((MAIN, WORKER, 20, 77), "DRIVER"),
    ((MAIN, MAIN, 5, 77), "START"),
    ((MAIN, MAIN, 55, 77), "JUDGE"),
    ((MAIN, MAIN, 61, 77), "OUTPUT"),
    ((CHILD, CHILD, 55, 1000), "TRACKING"),
]


@pytest.mark.parametrize(("sample", "phase"), CASES)
def test_a_sample_falls_into_its_phase(benchmark: ModuleType, sample: tuple[int, int, int, int], phase: str) -> None:
    by_phase, _ = benchmark.classify(marks(benchmark), [benchmark.Sample(*sample)])
    assert by_phase == {getattr(benchmark, phase, phase): 1}


def test_the_phases_add_up_to_all_samples(benchmark: ModuleType) -> None:
    samples = [benchmark.Sample(*sample) for sample, _ in CASES]
    by_phase, by_function = benchmark.classify(marks(benchmark), samples)
    assert sum(by_phase.values()) == len(samples)
    assert set(by_phase) <= set(benchmark.PHASES)
    assert by_function["spepolicy.machine.spu.sample_until"] == 2, "the child's address is its own"


def nested(depth: int, begin: int, end: int) -> st.SearchStrategy[list[tuple[int, int, str]]]:
    """Spans of a thread as calls leave them: each within its caller's, or beside it."""
    if depth == 0 or end - begin < 2:
        return st.just([])

    @st.composite
    def make(draw: st.DrawFn) -> list[tuple[int, int, str]]:
        first, last = sorted(draw(st.tuples(st.integers(begin, end), st.integers(begin, end))))
        inner = draw(nested(depth - 1, first, last))
        return [(first, last, f"depth {depth}"), *inner, *draw(nested(depth - 1, last, end))]

    return make()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)  # the script does not change
@given(spans=nested(3, 0, 30))
def test_each_moment_belongs_to_the_innermost_span(benchmark: ModuleType, spans: list[tuple[int, int, str]]) -> None:
    pieces = benchmark.innermost(spans)
    assert all(begin < end for begin, end, _ in pieces)
    assert all(before[1] <= after[0] for before, after in pairwise(pieces))
    for moment in range(31):
        around = [span for span in spans if span[0] <= moment < span[1]]
        found = [phase for begin, end, phase in pieces if begin <= moment < end]
        assert len(found) == bool(around)
        if around:
            shortest = min(end - begin for begin, end, _ in around)
            assert found[0] in {phase for begin, end, phase in around if end - begin == shortest}


def test_lines_of_perf_are_read(benchmark: ModuleType) -> None:
    in_program = "  71/72  10.000000007:  7f12 ABI:2    IP:0x7f12"
    in_kernel = "  71/72  10.000000007:  ffffffff81000000 ABI:2    IP:0x7f12"
    expected = benchmark.Sample(71, 72, 10 * 10**9 + 7, 0x7F12)
    assert benchmark.parse_sample(in_program) == benchmark.parse_sample(in_kernel) == expected
    no_program = benchmark.parse_sample("  71/72  10.000000007:  ffffffff81000000 ABI:0")
    assert no_program is not None
    assert no_program.address == 0xFFFFFFFF81000000
    assert benchmark.parse_sample("") is None


def test_every_module_of_the_machine_has_a_phase(benchmark: ModuleType) -> None:
    """A module with compiled functions that no phase names would be taken for the driver's Python."""
    known = {module for modules in benchmark.MODULES.values() for module in modules}
    found = {}
    for folder in ("machine", "mmu"):
        for path in (SPEPOLICY / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    names = {name.id for name in node.decorator_list if isinstance(name, ast.Name)}
                    if names & {"jit", "entry", "lean", "inline"}:
                        found[f"{folder}.{path.stem}"] = node.name
    assert len(found) > 20
    assert set(found) <= known, f"put {set(found) - known} into MODULES of experiments/benchmark/phases.py"
    assert benchmark.phase_of("spepolicy.machine.hostpage.map_page") == "host"


def test_names_of_compiled_functions(load: Callable[[str], ModuleType]) -> None:
    jitmap = load("jitmap")
    symbol = "_ZN9spepolicy7machine3spu12sample_untilB4v110B70c8tJTIeFIjxB2IKSg"
    assert jitmap.plain_name(symbol) == "spepolicy.machine.spu.sample_until"
    assert jitmap.plain_name("_ZN7cpython9spepolicy3jit5widenB2v1") == "cpython.spepolicy.jit.widen"
    assert jitmap.plain_name("memcpy") == "memcpy"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed (Debian: linux-perf)")
def test_the_main_job_is_told_by_phase(benchmark: ModuleType, tmp_path: Path) -> None:
    from table import read_json

    reason = benchmark.why_not()
    if reason:
        pytest.skip(reason)
    rows = tmp_path / "rows.json"
    assert benchmark.main(["--quick", "--json", str(rows), "--functions", "3"]) == 0
    shares = {row.figure.partition(": ")[2]: row.value for row in read_json(rows)}
    percent = {phase: float(shares[phase].removesuffix(" %")) for phase in benchmark.PHASES}
    assert sum(percent.values()) == pytest.approx(100, abs=0.05 * len(percent))
    for phase in (benchmark.START, benchmark.LOADING, benchmark.OUTPUT, "sampling"):
        assert percent[phase] > 0, phase
    assert any(name.startswith("spepolicy.machine.") for name in shares)
