"""Run every benchmark of the project, one after the other, and print one table (see README.md).

python experiments/benchmark/all.py                       # a quarter of an hour on two quiet cores
python experiments/benchmark/all.py --only walker,sweep   # some of them
python experiments/benchmark/all.py --quick               # small ones: whether all runs, not how fast
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from table import Row, computer, load_average, read_json, say, write_json

FOLDER = Path(__file__).resolve().parent
PART_TIMEOUT_S = 900
BARS_MISSED = 1  # the exit status of a benchmark that measured, and found a bar missed


@dataclass(frozen=True)
class Part:
    """One benchmark: a script beside this one, and what is written behind it."""

    script: str
    about: str
    full: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    interpreted: bool = False  # in its quick form, where compiling an engine would take most of the time


PARTS = {
    part.script: part
    for part in (
        Part(
            "run", "rates, memory and hooks of each policy; SimPy; the first run of all", ("--cold",),
            ("--lanes", "8", "--duration", "2ms", "--repeats", "1", "--simpy-duration", "2ms", "--policies",
             "bare_metal,eager_pin"),
        ),
        Part(
            "silent", "what features cost that are not used, against an older engine", (),
            ("--base", "HEAD", "--policies", "bare_metal", "--lanes", "1", "--duration-ms", "1", "--repeats", "1"),
            interpreted=True,
        ),
        Part(
            "walker", "two-stage walks; plain Python", (),
            ("--spaces", "10", "--walks", "20000", "--plain-walks", "20", "--repeats", "1", "--duration", "2ms"),
        ),
        Part("packets", "SPE packets; perf", (), ("--megabytes", "5", "--repeats", "1")),
        Part(
            "explore", "states a second; TLC's figure", (),
            ("--states", "2000", "--configurations", "quiet_host", "--no-command"),
        ),
        Part("catalogue", "all corner cases on all policies", (), ("--policy", "eager_pin")),
        Part(
            "sweep", "1,000 configurations; Hydra's basic launcher", (),
            ("--configurations", "100", "--basic-jobs", "1"),
        ),
        Part("growth", "time and memory against lanes, buffer, vCPUs, duration, points of a sweep", (), ("--quick",)),
        Part("phases", "where the main job's processor time goes", (), ("--quick",)),
    )
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table; return 0 if every bar is met, 1 if one is not, or if a benchmark could not be run."""
    options = _options(arguments)
    begin = time.perf_counter()
    rows: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only:
            say(f"== {name}: {PARTS[name].about}")
            rows[name] = measured(PARTS[name], options.quick, Path(folder))
    minutes = (time.perf_counter() - begin) / 60
    text = page(rows, f"{_today()}, {minutes:.1f} minutes. {computer()}", options.quick)
    print(text, end="")
    if options.json is not None:
        write_json(options.json, [row for part in rows.values() for row in part])
    if options.markdown is not None:
        options.markdown.write_text(text, encoding="utf-8")
    return 0 if all(row.passed is not False for part in rows.values() for row in part) else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--only", default=",".join(PARTS), type=_names, metavar="NAMES", help=f"comma-separated, of {', '.join(PARTS)}")
    add("--quick", action="store_true", help="sizes at which no figure means anything: does everything run?")
    add("--json", type=Path, metavar="FILE", help="write the rows as data, too")
    add("--markdown", type=Path, metavar="FILE", help="write the table to a file, too")
    return parser.parse_args(arguments)


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'} is not one of {', '.join(PARTS)}")
    return names


def measured(part: Part, quick: bool, folder: Path) -> list[Row]:
    """Run *part* in a process of its own and return its rows; if it fails, a row that says how, which is no pass."""
    path = folder / f"{part.script}.json"
    command = [sys.executable, str(FOLDER / f"{part.script}.py"), *(part.quick if quick else part.full)]
    environment = os.environ | ({"NUMBA_DISABLE_JIT": "1"} if quick and part.interpreted else {})
    try:
        done = subprocess.run(
            [*command, "--json", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
            timeout=PART_TIMEOUT_S, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [Row(f"{part.script}: not measured", f"no end after {PART_TIMEOUT_S} s", passed=False)]
    if done.returncode in (0, BARS_MISSED):
        with suppress(FileNotFoundError):
            return [replace(row, passed=None) if quick else row for row in read_json(path)]
    words = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("...")]
    why = words[-1] if words else f"exit status {done.returncode}"
    return [Row(f"{part.script}: not measured", why, passed=False)]


def page(rows: dict[str, list[Row]], about: str, quick: bool) -> str:
    """Return all *rows*, by benchmark, as one table in Markdown that is also aligned for the terminal."""
    titles = ("figure", "bar", "measured", "ratio to the peer", "verdict", "load")
    lines = [titles]
    for name, part in rows.items():
        lines += [(f"{name}: {row.figure}", *_cells(row)) for row in part]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    rule = "|".join(["", *("-" * (width + 2) for width in widths), ""])
    body = ["| " + " | ".join(_aligned(line, widths)) + " |" for line in lines]
    body.insert(1, rule)
    missed = [row.figure for part in rows.values() for row in part if row.passed is False]
    judged = sum(row.passed is not None for part in rows.values() for row in part)
    end = "Too small to be judged." if quick else f"{judged - len(missed)} of {judged} bars met."
    return "\n".join([*body, "", f"{end} Load average at the end {load_average():.2f}. {about}", ""])


def _cells(row: Row) -> tuple[str, ...]:
    verdict = "" if row.passed is None else "met" if row.passed else "**short**"
    return row.bar, row.value, row.peer, verdict, f"{row.load:.2f}"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    pad: list[Callable[[str, int], str]] = [str.ljust, str.rjust, str.rjust, str.ljust, str.ljust, str.rjust]
    return [side(cell, width) for side, cell, width in zip(pad, cells, widths, strict=True)]


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


if __name__ == "__main__":
    sys.exit(main())
