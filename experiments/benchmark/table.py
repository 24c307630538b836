"""The table that the benchmarks print: figure, bar, value, verdict."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from spepolicy.jit import COMPILED


@dataclass(frozen=True)
class Row:
    """One line of the table. A row without a bar is information."""

    figure: str
    value: str
    bar: str = ""
    passed: bool | None = None

    def cells(self) -> tuple[str, str, str, str]:
        verdict = "-" if self.passed is None else "pass" if self.passed else "FAIL"
        return self.figure, self.bar or "-", self.value, verdict


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


def print_table(rows: Sequence[Row]) -> None:
    """Print *rows* with aligned columns."""
    lines = [("figure", "bar", "value", "verdict"), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for figure, *cells in lines:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join([figure.ljust(widths[0]), *right]))
