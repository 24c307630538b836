"""experiments/benchmark/growth.py: the exponents are those of the numbers, and what is too steep needs a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.fixture
def benchmark(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("growth")


SAME_SCRIPT = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@SAME_SCRIPT
@given(
    exponent=st.floats(-2, 3),
    factor=st.floats(0.001, 1000),
    sizes=st.lists(st.integers(1, 10**6), min_size=3, max_size=9, unique=True).map(sorted),
)
def test_a_power_gives_its_exponent(benchmark: ModuleType, exponent: float, factor: float, sizes: list[int]) -> None:
    costs = [factor * size**exponent for size in sizes]
    assert benchmark.upper_exponent(sizes, costs) == pytest.approx(exponent, abs=1e-6)
    assert benchmark.exponents(sizes, costs) == pytest.approx([exponent] * (len(sizes) - 1), abs=1e-5)


def test_only_the_upper_end_counts(benchmark: ModuleType) -> None:
    sizes = [1, 2, 4, 8, 16]
    assert benchmark.upper_exponent(sizes, [7, 7, 4, 8, 16]) == pytest.approx(1)
    assert benchmark.upper_exponent([5], [3]) == 0


def points(benchmark: ModuleType, costs: list[float], memory: list[float]) -> list[object]:
    return [
        benchmark.Point(2**n, cost, cost, mib) for n, (cost, mib) in enumerate(zip(costs, memory, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("memory", "exponent"),
    [
        ([200, 201, 204, 216], 0.04),  # a process of 200 MiB in which 16 MiB more are nothing
        ([200, 264, 328, 456, 712], 1.0),  # 200 MiB and 64 MiB a step: linear
        ([200, 210, 240, 360, 840], 2.0),
    ],
)
def test_memory_counts_where_it_matters(benchmark: ModuleType, memory: list[float], exponent: float) -> None:
    found = benchmark.memory_exponent(points(benchmark, [1.0] * len(memory), memory))
    assert found == pytest.approx(exponent, abs=0.03)


def test_too_steep_is_short_unless_there_is_a_reason(benchmark: ModuleType) -> None:
    axis = replace(benchmark.AXES["buffer"], reason="")
    square = points(benchmark, [1, 4, 16, 64], [100] * 4)
    cpu, memory = benchmark.rows_of(axis, square)[2:]
    assert (cpu.value, cpu.passed, memory.passed) == ("2.00", False, True)
    cpu, memory = benchmark.rows_of(replace(axis, reason="of this"), square)[2:]
    assert (cpu.value, cpu.passed, memory.passed) == ("2.00: of this", None, True)
    line = points(benchmark, [1, 2, 4, 8], [100] * 4)
    assert [row.passed for row in benchmark.rows_of(axis, line)] == [None, None, True, True]


def test_sizes_are_those_of_the_question(benchmark: ModuleType) -> None:
    ends = {name: (axis.sizes[0], axis.sizes[-1]) for name, axis in benchmark.AXES.items()}
    assert ends["lanes"] == (1, 65_536)
    assert ends["buffer"] == (16, 64 * 1024)
    assert ends["vcpus"] == (1, 64)
    assert ends["points"] == (10, 10_000)
    for axis in benchmark.AXES.values():
        steps = [math.log2(b / a) for a, b in zip(axis.sizes, axis.sizes[1:], strict=False)]
        assert min(steps) >= 1, "a step of less says little"
    for size in benchmark.AXES["points"].sizes:
        words = benchmark.sweep_words(size)
        jobs = math.prod(word.count(",") + 1 for word in words if word.startswith(("+policy=", "costs.trap=")))
        assert jobs == size


def test_the_page_is_written_between_its_marks(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begin, end = benchmark.MARKS
    page = (benchmark.FOLDER / "README.md").read_text(encoding="utf-8")
    assert page.count(begin) == page.count(end) == 1
    (tmp_path / "README.md").write_text(page.partition(begin)[0] + begin + "old\n" + end + page.partition(end)[2])
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path)
    curves = {name: points(benchmark, [1, 2, 4], [10, 10, 10]) for name in benchmark.AXES}
    benchmark.write_page(curves, "care.")
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert written.partition(begin)[0] == page.partition(begin)[0]
    assert written.partition(end)[2] == page.partition(end)[2]
    inside = written.partition(begin)[2].partition(end)[0]
    assert "old" not in inside
    assert inside.count("| 1.00 |") == len(curves)
    assert "Measured with care." in inside
    assert (tmp_path / "growth.svg").read_text(encoding="utf-8").count("CPU time, s") >= 1


@pytest.mark.parametrize("words", [["--only", "vcpu"], ["--page", "--quick"], ["--page", "--only", "lanes"]])
def test_wrong_arguments_get_a_message(benchmark: ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main(words)
    assert stop.value.code == 2
