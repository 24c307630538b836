"""experiments/benchmark/all.py: one table of all benchmarks, whatever becomes of one of them."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "benchmark"


@pytest.fixture
def benchmark(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("all")


def test_every_script_with_bars_is_a_part(benchmark: ModuleType) -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py") if "add_json(parser)" in path.read_text(encoding="utf-8")}
    assert set(benchmark.PARTS) == scripts - {"table"}
    assert len(scripts) > 5


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_the_table_says_figure_bar_measured_ratio_verdict_and_load(benchmark: ModuleType) -> None:
    row = benchmark.Row
    rows = {
        "walker": [
            row("walks/s", "11 M", ">= 10 M", True, "9 times Python", 0.5),
            row("reads", "24", load=0.5),
        ],
        "sweep": [row("all", "61 s", "<= 60 s", False, load=1.25)],
    }
    text = benchmark.page(rows, "Here.", False)
    assert cells(text) == [
        ["figure", "bar", "measured", "ratio to the peer", "verdict", "load"],
        ["walker: walks/s", ">= 10 M", "11 M", "9 times Python", "met", "0.50"],
        ["walker: reads", "", "24", "", "", "0.50"],
        ["sweep: all", "<= 60 s", "61 s", "", "**short**", "1.25"],
    ]
    assert "1 of 2 bars met." in text
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1, "the columns are aligned"


def test_rows_go_through_a_file(benchmark: ModuleType, tmp_path: Path) -> None:
    import table

    rows = [table.Row("f", "1", ">= 2", False, "half of P", 0.25), table.at_most("g", 1.234, 2)]
    table.write_json(tmp_path / "rows", rows)
    assert table.read_json(tmp_path / "rows") == rows
    assert rows[1].cells() == ("g", "<= 2 s", "1.23 s", "pass")


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise SystemExit(3)", "exit status 3"),
        ("raise SystemExit(0)", "exit status 0"),  # it says that all is well, but measured nothing
        ("import time; time.sleep(60)", "no end after 2 s"),
    ],
)
def test_a_part_that_fails_is_a_row_and_no_pass(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, value: str
) -> None:
    (tmp_path / "broken.py").write_text(code)
    monkeypatch.setattr(benchmark, "FOLDER", tmp_path)
    monkeypatch.setattr(benchmark, "PART_TIMEOUT_S", 2 if "sleep" in code else 60)
    (row,) = benchmark.measured(benchmark.Part("broken", ""), True, tmp_path)
    assert (row.figure, row.value, row.passed) == ("broken: not measured", value, False)


def test_names_are_checked(benchmark: ModuleType) -> None:
    assert benchmark._names("sweep,walker") == ["sweep", "walker"]
    for wrong in ("walkr", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not one of run"):
            benchmark._names(wrong)


@pytest.mark.slow
def test_all_of_them_run(tmp_path: Path) -> None:
    """Small, in processes of their own: whether each gives its rows, not whether it is fast."""
    page = tmp_path / "page.md"
    done = subprocess.run(
        [sys.executable, str(FOLDER / "all.py"), "--quick", "--markdown", str(page)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert page.read_text() == done.stdout
    # perf may be missing, and so may the history of a copy.
    assert "not measured" not in re.sub(
        r"phases: phases: not measured.*|silent: silent: not measured.*", "", done.stdout
    )
    figures = {line[0].partition(":")[0] for line in cells(done.stdout)[1:]}
    assert figures == {path.stem for path in FOLDER.glob("*.py") if "add_json(parser)" in path.read_text()} - {"table"}
    assert "Too small to be judged." in done.stdout
