"""experiments/benchmark/run.py: every figure is in the table with its bar; wrong arguments get a message."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def benchmark(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("run")


SMALL = ["--lanes", "2", "--duration", "2ms", "--repeats", "1", "--simpy-duration", "2ms"]


def test_table_has_every_figure(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    status = benchmark.main([*SMALL, "--policies", "bare_metal,eager_pin"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.rsplit(maxsplit=3)[0]: line for line in lines if line.endswith(("-", "pass", "FAIL"))}
    for name in ("bare_metal", "eager_pin"):
        figures = [figure for figure in rows if figure.startswith(f"{name}:")]
        for part in ("samples/s", "VM-seconds/s", "page tables", "all else"):
            assert any(part in figure for figure in figures), (name, part)
        for part in ("policy's code", "KVM's tools"):
            assert any(part in figure for figure in figures) is (name == "eager_pin"), "bare_metal has no hooks"
    assert any("SimPy" in figure for figure in rows)
    judged = [line for line in rows.values() if not line.endswith("-")]
    assert len(judged) == 2 + 2 + 1  # speed and memory of each policy, and the ratio
    assert status == (1 if any(line.endswith("FAIL") for line in judged) else 0)
    assert any(line.startswith("Load average") for line in lines)


def test_tools_are_timed_while_the_context_lasts(benchmark: ModuleType) -> None:
    from spepolicy.drivers.tools import Tools

    before = dict(vars(Tools))
    with benchmark.timed_tools() as spent:
        assert vars(Tools)["pin_fresh"] is not before["pin_fresh"]
        with pytest.raises(AttributeError):
            Tools(None, None).trap_eret(None, None, True)  # type: ignore[arg-type]
    assert len(spent) == 1
    assert dict(vars(Tools)) == before


def test_a_row_that_misses_its_bar_fails(benchmark: ModuleType) -> None:
    assert benchmark.Row("f", "1", ">= 2", False).cells() == ("f", ">= 2", "1", "FAIL")
    assert benchmark.Row("f", "3", ">= 2", True).cells() == ("f", ">= 2", "3", "pass")
    assert benchmark.Row("f", "3").cells() == ("f", "-", "3", "-")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--policies", "eager_pni"], "Did you mean 'eager_pin'?"),
        (["--duration", "100"], "--duration=100"),
        (["--policies", "bare_metal", "guest.perod=512"], "perod"),
    ],
)
def test_wrong_arguments(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert benchmark.main([*SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.out == ""


def test_no_lanes(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--lanes", "0"])
    assert stop.value.code == 2
    assert "--lanes is 0" in capsys.readouterr().err
