"""experiments/benchmark/explore.py: every figure is in the table with its bar; wrong arguments get a message."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def benchmark(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("explore")


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
