"""Try the fixed sample of mutants on the interpreted machine: `python -m tests.mutation.run DATA [RESULTS]`.

DATA is the file that `python -m tests.line_coverage --contexts DATA` writes: which test runs through which line. Each
mutant is put into a copy of the sources, and the tests that run through its statement are tried on it, the most
specific first, until one fails. RESULTS (results.tsv beside this file, by default) gets a line a mutant, and a run
goes on where the last one stopped. One process, at the lowest priority. A mutant is *caught* if a test fails that
passes without it, or hangs; it *survived* if all of them pass; it is *undecided* if no test failed in `CPU_S` seconds
and there were more; *not run* if no test runs through it.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .mutants import ROOT, Mutant, sample, source_of

RESULTS = Path(__file__).with_name("results.tsv")
COLUMNS = ("outcome", "test", "file", "line", "function", "was", "now", "key")
CPU_S = 20  # for the tests of one mutant
HANGS_S = 10  # a test that takes so long of it hangs
MOST = 200  # tests of one mutant
_LONG = ("tests/conformance", "tests/properties", "tests/drivers", "tests/policies", "tests/machine/test_guest")
_SOURCES = ("spepolicy", "tests", "conf", "plugins", "pyproject.toml", "README.md", "experiments")


class Tests:
    """Which tests run through which lines."""

    def __init__(self, data: Path) -> None:
        import coverage

        self._data = coverage.CoverageData(str(data))
        self._data.read()
        self._files = {}
        for path in self._data.measured_files():
            where = Path(path).parts
            self._files["/".join(where[len(where) - where[::-1].index("spepolicy") - 1 :])] = path
        self._size: Counter[str] = Counter()
        for path in self._files.values():
            for contexts in self._data.contexts_by_lineno(path).values():
                self._size.update(contexts)

    def of(self, mutant: Mutant) -> list[str]:
        """Return the tests that run through the mutant's statement: those of its package first, those that run whole
        lanes or large tables last, and among them those first that run through the fewest lines.
        """
        own = f"tests/{mutant.path.split('/')[1]}/"
        by_line = self._data.contexts_by_lineno(self._files[mutant.path]) if mutant.path in self._files else {}
        found = {test for line in range(mutant.line, mutant.last + 1) for test in by_line.get(line, ()) if test}
        return sorted(
            found, key=lambda test: (test.startswith(_LONG), not test.startswith(own), self._size[test], test)
        )


class _Reporter:
    """Tells the parent, through a pipe, when a test begins and whether it fails."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def _say(self, what: str, nodeid: str) -> None:
        os.write(self._pipe, f"{what}\t{time.process_time()}\t{nodeid}\n".encode())

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say("begins", nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._say("failed", report.nodeid)


def _child(tests: list[str], pipe: int) -> None:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "", "--hypothesis-seed=0", "--tb=no", "-n", "0"]
    os._exit(int(pytest.main([*options, *tests], plugins=[_Reporter(pipe)])))


def attempt(tests: list[str]) -> tuple[str, str]:
    """Run *tests* in the current folder, in a process of their own, until one fails: return (outcome, test)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        _child(tests, write)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        told = [line.rstrip("\n").split("\t") for line in pipe]
    _, status = os.waitpid(pid, 0)
    failed = [test for what, _, test in told if what == "failed"]
    if failed:
        return "caught", failed[0]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        since, test = (float(told[-1][1]), told[-1][2]) if told else (0.0, "import")
        return ("caught", f"{test} (hangs)") if CPU_S - since > HANGS_S else ("undecided", "")
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return "survived", ""
    return ("caught", "import") if not told else ("caught", f"{told[-1][2]} (exit {code})")


class Runner:
    """Tries mutants in a copy of the sources."""

    def __init__(self, tests: Tests, folder: Path) -> None:
        self._tests, self._folder = tests, folder
        self._sound: dict[str, bool] = {"import": True}  # test -> passes without a mutant
        for name in _SOURCES:
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
        sys.path.insert(0, str(folder))
        os.environ |= {"NUMBA_DISABLE_JIT": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
        sys.dont_write_bytecode = True
        os.chdir(folder)

    def outcome(self, mutant: Mutant) -> tuple[str, str]:
        """Return what became of *mutant*, and the test that caught it."""
        tests = self._tests.of(mutant)[:MOST]
        path = self._folder / mutant.path
        original = path.read_text(encoding="utf-8")
        while tests := [test for test in tests if self._sound.get(test, True)]:
            path.write_text(source_of(mutant), encoding="utf-8")
            try:
                found, test = attempt(tests)
            finally:
                path.write_text(original, encoding="utf-8")
                shutil.rmtree(self._folder / ".hypothesis", ignore_errors=True)
            if found in ("survived", "undecided"):
                return found, ""
            name = test.partition(" (")[0]
            if name not in self._sound:
                self._sound[name] = attempt([name])[0] in ("survived", "undecided")
            if self._sound[name]:
                return found, test
        return "not run", ""


def known(path: Path) -> dict[str, list[str]]:
    """Return the lines of a table of results, by the mutants' keys."""
    if not path.exists():
        return {}
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {row[-1]: row for row in rows}


def row_of(mutant: Mutant, outcome: str, test: str) -> list[str]:
    """Return a line of the table."""
    texts = [" ".join(text.split())[:100] for text in (mutant.was, mutant.now)]
    key = " | ".join(" ".join(part.split()) for part in mutant.key.split("\t"))
    return [outcome, test, mutant.path, str(mutant.line), mutant.function, *texts, key]


def main(arguments: list[str]) -> int:
    """Try what has not been tried; return the exit status."""
    os.nice(19)
    tests = Tests(Path(arguments[0]))
    results = Path(arguments[1]).resolve() if len(arguments) > 1 else RESULTS
    done = known(results)
    if not results.exists():
        results.write_text("\t".join(COLUMNS) + "\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        runner = Runner(tests, Path(name))
        import hypothesis  # noqa: F401 - once, for all children
        import numba  # noqa: F401
        import pytest  # noqa: F401

        for number, mutant in enumerate(sample(), 1):
            row = row_of(mutant, "", "")
            if row[-1] in done:
                continue
            row[:2] = runner.outcome(mutant)
            done[row[-1]] = row
            with results.open("a", encoding="utf-8") as file:
                file.write("\t".join(row) + "\n")
            print(number, *row[:7], flush=True)
        os.chdir(ROOT)
    count = Counter(row[0] for row in done.values())
    print(dict(count), f"{100 * count['caught'] / max(1, sum(count.values())):.1f} % caught")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
