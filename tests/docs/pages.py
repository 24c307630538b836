"""The project's pages as something that can be run: fenced blocks with commands, and tables of measured results.

A block's fence says how it is run: three backticks, a language, then words. Renderers show nothing of the words.

* `console`: lines that begin with `$ ` are commands, what follows each is its output (`...` stands for any lines).
* `bash`: a script that has to succeed.
* `python`, `toml`: a file; the word is its name.
* other languages are text.

Words: `slow` (more than a few seconds), `status=2` (the exit status of the commands), `server` (it runs until stopped),
`needs=WHAT` (what the folder has to hold: `run`, a finished and tracked run; `trace`, a kernel trace `host.trace`;
`night`, a guest's `perf.data` and the `trace-cmd report` of its host, `host.trace.gz`).

A table below the line `<!-- results: ARGUMENTS -->` has arguments of `python -m spepolicy` in its first column and
names of metrics in its header, each as code; the numbers in these columns are what a run with both arguments gives.

`python -m tests.docs.refresh` writes the outputs and numbers again.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = re.compile(r"<!-- results:(?P<arguments>.*?)-->")
ELLIPSIS = "..."


# ---- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str  # path below the root
    line: int  # of its first line of text, from 0
    language: str
    words: tuple[str, ...]
    text: str  # without the fences, ends in a line feed

    @property
    def label(self) -> str:
        """What a test is called after the block."""
        return f"{self.page}:{self.line}: {self.text.splitlines()[0]}"

    def word(self, key: str) -> str:
        """Return VALUE of the word KEY=VALUE, empty if there is none."""
        return next((word.removeprefix(f"{key}=") for word in self.words if word.startswith(f"{key}=")), "")

    @property
    def slow(self) -> bool:
        """Whether it takes more than a few seconds."""
        return "slow" in self.words

    @property
    def status(self) -> int:
        """The exit status that its commands have."""
        return int(self.word("status") or 0)

    def commands(self) -> list[tuple[str, str]]:
        """Return (command, output) of a `console` block."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.splitlines(keepends=True):
            if line.startswith("$ "):
                found.append((line[2:].rstrip("\n"), []))
            else:
                found[-1][1].append(line)
        return [(command, "".join(output)) for command, output in found]


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of *page*, a path below the root, in order. A fence may not be indented."""
    found: list[Block] = []
    begin: int | None = None
    info: list[str] = []
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if begin is None:
            begin, info = number + 1, line[3:].split() or ["text"]
        else:
            found.append(Block(page, begin, info[0], tuple(info[1:]), "".join(lines[begin:number])))
            begin = None
    assert begin is None, f"{page}: the block that begins in line {begin} has no end"
    return found


# ---- run -------------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return what a shell has in which this Python's environment is active and nothing is configured."""
    dropped = ("HYDRA_FULL_ERROR", "NUMBA_DISABLE_JIT", "MLFLOW_TRACKING_URI", "COMP_LINE")
    env = {key: value for key, value in os.environ.items() if key not in dropped}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    env["COLUMNS"] = "110"
    return env


def run(script: str, folder: Path, extra: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run *script* in *folder* with bash; return its exit status and all that it printed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment() | dict(extra or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def as_shown(output: str, folder: Path) -> str:
    """Return *output* without what differs from run to run: folder, dates, times, commits, MLflow's numbers."""
    text = output.replace(str(folder), "~/lab")
    text = re.sub(r"\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d\.\d+", "DATE/TIME", text)
    text = re.sub(r"runs=%5B.*?%5D&experiments=%5B.*?%5D", "runs=...", text)
    text = re.sub(
        r"(commit [0-9a-f]{12}(, with local changes)?|source [0-9a-f]{16})$", "commit COMMIT", text, flags=re.M
    )
    text = re.sub(r"python [\d.]+( \w+ [\d.]+)+$", "python and packages: VERSIONS", text, flags=re.M)
    text = re.sub(r"(lanes in|:|composing,|simulating,) [\d.]+ s\b", r"\1 N s", text)
    text = re.sub(r"about [\d.]+ \w+ and [\d.]+\w+ of memory for lanes, on \d+ threads?", "about N s and N MiB", text)
    return "".join(line for line in text.splitlines(keepends=True) if not line.lower().startswith("compiling"))


def matches(shown: str, output: str) -> bool:
    """Tell whether *output* is what a page shows, where a line `...` stands for any number of lines."""
    parts = re.split(rf"(?m)^{re.escape(ELLIPSIS)}\n", shown)
    return re.fullmatch(".*".join(re.escape(part) for part in parts), output, re.DOTALL) is not None


def elided(shown: str, output: str) -> str:
    """Return *output* with `...` where *shown*, an older text of it, has it.

    The lines before the first `...` and after the last are as many as they were; those between two are looked for by
    their words, since their numbers may have changed.
    """
    parts = [part.splitlines() for part in re.split(rf"(?m)^{re.escape(ELLIPSIS)}\n", shown)]
    lines = output.splitlines()
    if len(parts) == 1:
        return output
    kept = [lines[: len(parts[0])]]
    at, end = len(parts[0]), len(lines) - len(parts[-1])
    for part in parts[1:-1]:
        wanted = [_words(line) for line in part]
        places = range(at, end - len(part) + 1)
        at = max(places, key=lambda n: sum(_words(line) == want for line, want in zip(lines[n:], wanted, strict=False)))
        kept.append(lines[at : at + len(part)])
        at += len(part)
    kept.append(lines[end:] if parts[-1] else [])
    return f"{ELLIPSIS}\n".join("".join(f"{line}\n" for line in part) for part in kept)


def _words(line: str) -> list[str]:
    return re.findall(r"[a-z_]+", line)


# ---- tables of results -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of a table of results."""

    page: str
    line: int  # from 0
    arguments: str  # of `python -m spepolicy`
    metrics: Mapping[int, str]  # column -> name
    cells: tuple[str, ...]

    @property
    def label(self) -> str:
        """What a test is called after the row."""
        return f"{self.page}: {self.arguments}"

    def measured(self, folder: Path) -> dict[int, str]:
        """Run the row's command in *folder*, which is empty, and return column -> number as the table shows it."""
        status, output = run(f"python -m spepolicy {self.arguments}", folder)
        assert status == 0, output
        (path,) = folder.glob("outputs/**/metrics.json")
        metrics = json.loads(path.read_text(encoding="utf-8"))
        return {column: _number(metrics, name) for column, name in self.metrics.items()}


def result_rows(page: str) -> list[Row]:
    """Return the rows of all tables of results of *page*."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    rows: list[Row] = []
    for start, line in enumerate(lines):
        mark = RESULTS.match(line)
        if mark is None:
            continue
        first = next(n for n in range(start + 1, len(lines)) if lines[n].startswith("|"))
        header = _cells(lines[first])
        metrics = {column: _code(cell) for column, cell in enumerate(header) if column and _code(cell)}
        number = first + 2
        while number < len(lines) and lines[number].startswith("|"):
            cells = _cells(lines[number])
            arguments = " ".join([_code(cells[0]), *shlex.split(mark["arguments"])])
            rows.append(Row(page, number, arguments, metrics, cells))
            number += 1
    return rows


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


def _code(cell: str) -> str:
    """Return what stands in the cell as code, empty if nothing does."""
    found = re.search(r"`([^`]+)`", cell)
    return found[1] if found else ""


def _number(metrics: Mapping[str, float], name: str) -> str:
    """Return the mean with its 95 % interval, to the precision that the interval leaves; `-` if it is not defined."""
    if name not in metrics:
        return "-"
    value, half = metrics[name], metrics.get(f"{name}_ci95", 0.0)
    if abs(value) < 0.0005 and half < 0.0005:
        return "0"
    return f"{_short(value)} ± {_short(half)}" if half else _short(value)


def _short(value: float) -> str:
    """Return three digits, or the part above 0.001."""
    if abs(value) < 0.0005:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"
