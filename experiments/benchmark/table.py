"""What the benchmarks measure, as data and as a table: figure, bar, value, peer, verdict."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numba
import numpy as np

from spepolicy.jit import COMPILED


def load_average() -> float:
    """Return how many processes ran or waited to run, on average over the last minute, to two digits."""
    return round(os.getloadavg()[0], 2)


@dataclass(frozen=True)
class Row:
    """One line of the table. A row without a bar is information."""

    figure: str
    value: str
    bar: str = ""
    passed: bool | None = None
    peer: str = ""  # the ratio to what others achieve in the same run, such as "137 times SimPy"
    load: float = field(default_factory=load_average)  # of the computer when the figure was taken

    def cells(self) -> tuple[str, str, str, str]:
        verdict = "-" if self.passed is None else "pass" if self.passed else "FAIL"
        return self.figure, self.bar or "-", self.value, verdict


def at_most(figure: str, value: float, most: float, unit: str = " s", digits: int = 2) -> Row:
    """Return the row of a *value* that must not exceed *most*; *unit* is written behind both."""
    return Row(figure, f"{value:.{digits}f}{unit}", f"<= {most:g}{unit}", value <= most)


def say(text: str) -> None:
    """Say on stderr what is being done."""
    print(f"... {text}", file=sys.stderr, flush=True)


def computer() -> str:
    """Describe what was measured on."""
    form = "compiled" if COMPILED else "INTERPRETED: no bar can be met"
    return (
        f"{len(os.sched_getaffinity(0))} processors, Python {platform.python_version()}, numpy {np.__version__}, "
        f"numba {numba.__version__}, machine {form}."
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark the option by which `all.py` gets its rows."""
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write the rows as data")


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """Write *rows* to *path*: a list of objects with the names of the fields of `Row`."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> list[Row]:
    """Return the rows that `write_json` wrote."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def print_table(rows: Sequence[Row]) -> None:
    """Print *rows* with aligned columns."""
    lines = [("figure", "bar", "value", "verdict"), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for figure, *cells in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([figure.ljust(widths[0]), *right]))


def deliver(rows: Sequence[Row], load_before: float, path: Path | None = None) -> int:
    """Print *rows* with the load and the computer, write them to *path*, and return the exit status: 0 if every bar is
    met, 1 if one is not.
    """
    print_table(rows)
    print(f"\nLoad average over a minute: {load_before:.2f} before, {load_average():.2f} after. {computer()}")
    if path is not None:
        write_json(path, rows)
    return 0 if all(row.passed is not False for row in rows) else 1
