"""experiments/benchmark/explore.py: every figure is in the table with its bar; wrong arguments get a message."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "benchmark"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Load explore.py under a name of its own, with its folder on the path, as Python does for a script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_explore", FOLDER / "explore.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_explore", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_table_has_every_figure_and_the_trace_is_found(
    benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark.main(["--states", "2000", "--configurations", "quiet_host", "--no-command"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("eager_pin, explore=quiet_host")]
    for figure in ("states/s, ", "processors that nobody else uses", "transitions a state", "bytes a visited state"):
        assert any(figure in row for row in rows), figure
    assert any("{1,0} found" in row and row.endswith("pass") for row in rows)
    assert any(line.startswith("TLC") for line in lines)


@pytest.mark.parametrize("words", [["--states", "5"], ["--no-such-flag"]])
def test_wrong_arguments_get_a_message(benchmark: ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main(words)
    assert stop.value.code == 2
