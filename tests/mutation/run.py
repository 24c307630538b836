"""Try the fixed sample of mutants on the interpreted machine: `python -m tests.mutation.run DATA [options]`.

DATA is the file that `python -m tests.line_coverage --contexts DATA` writes: which test runs through which line. Each
mutant is tried with the tests that run through its statement, the quickest and most specific first, until one fails. A
test that DATA does not know is newer than it, and is tried first.

    --seconds S     of the processor, for the tests of one mutant (20)
    --again WORDS   try again what has these outcomes (`undecided,survived`); what is said to be equivalent stays
    --part N/M      every Mth mutant only, from the Nth: for M runs side by side
    --results FILE  instead of results.tsv beside this file

results.tsv gets a line a mutant, and a run goes on where the last one stopped. A mutant is *caught* if a test fails
that passes without it, or hangs; it *survived* if all of them pass; it is *undecided* if no test failed in the time
that it had, and there were more; *not run* if no test runs through it. None of these three counts as caught.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.line_coverage import LONG, TESTS, WHOLE_LANES, seconds_of

from .attempt import Session, Told, copy_sources, in_a_new_process, with_session
from .mutants import Mutant, sample
from .table import EQUIVALENT, RESULTS, figures, key_of, known, row_of, write

CPU_S = 20  # for the tests of one mutant
# They start a process of their own, which does not see the mutant.
OTHER_PROCESS = ("tests/machine/test_jit.py",)
START_S = 10  # what a new process needs to import and collect
_LONG_S = 2.0  # a test that takes longer is tried after all others


class Reach:
    """Which tests run through which lines."""

    def __init__(self, data: Path) -> None:
        import coverage

        self._data = coverage.CoverageData(str(data))
        self._data.read()
        self.seconds: dict[str, float] = json.loads(seconds_of(data).read_text(encoding="utf-8"))
        self._files = {}
        for path in self._data.measured_files():
            where = Path(path).parts
            self._files["/".join(where[len(where) - where[::-1].index("spepolicy") - 1 :])] = path
        self.size: Counter[str] = Counter()  # lines that a test runs through
        for path in self._files.values():
            for contexts in self._data.contexts_by_lineno(path).values():
                self.size.update(contexts)

    def of(self, mutant: Mutant, *, whole_file: bool = False) -> set[str]:
        """Return the tests that run through the mutant's statement, or through any line of its file."""
        by_line = self._data.contexts_by_lineno(self._files[mutant.path]) if mutant.path in self._files else {}
        lines = by_line if whole_file else range(mutant.line, mutant.last + 1)
        return {test for line in lines for test in by_line.get(line, ()) if test}


class Trial:
    """Tries mutants, with the tests that reach them."""

    def __init__(self, reach: Reach, folder: Path, session: Session, limit_s: float) -> None:
        self._reach, self._folder, self._session, self._limit_s = reach, folder, session, limit_s
        self._alone: dict[str, bool] = {"import": True}  # test -> passes without a mutant

    def _ordered(self, mutant: Mutant, found: set[str]) -> list[str]:
        new = set(self._session.items) - set(self._reach.seconds)
        own = f"tests/{mutant.path.split('/')[1]}/"

        def dear(test: str) -> tuple[bool, float, str]:
            seconds, size = self._reach.seconds.get(test, 0.0), self._reach.size[test]
            return seconds > _LONG_S, (seconds + 0.01) * (size + 100) * (1 if test.startswith(own) else 2), test

        usable = (self._session.sharing(found) | new) & set(self._session.items)
        return sorted((test for test in usable if not test.startswith(OTHER_PROCESS)), key=dear)

    def outcome(self, mutant: Mutant) -> tuple[str, str]:
        """Return what became of *mutant*, and the test that caught it."""
        early = self._session.runs_before_tests(mutant)
        tests = self._ordered(mutant, self._reach.of(mutant, whole_file=early))
        found, test = self._first_failure(tests, lambda left: self._session.attempt(mutant, left, self._limit_s))
        if found == "caught" or not (early or found == "unpatched"):
            return found, test
        # Forks have what was made before they began.
        return self._first_failure(
            tests, lambda left: in_a_new_process(self._folder, mutant, left, self._limit_s + START_S)
        )

    def _first_failure(self, tests: list[str], run: Callable[[list[str]], Told | None]) -> tuple[str, str]:
        while tests:
            told = run(tests)
            if told is None:
                return "unpatched", ""
            found, test = told.outcome(self._reach.seconds)
            if found != "caught":
                return found, ""
            name = test.partition(" (")[0]
            if name not in self._alone:
                self._alone[name] = self._session.passes_alone(name)
            if self._alone[name]:
                return found, test
            tests = [it for it in tests if self._alone.get(it, True)]
        return "not run", ""


def main(arguments: Sequence[str]) -> int:
    """Try what has not been tried; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run")
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=CPU_S)
    parser.add_argument("--again", default="")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    os.nice(10)
    reach = Reach(options.data)
    results: Path = options.results.resolve()
    part, parts = map(int, options.part.split("/"))
    mutants = sample()
    done = known(results)
    again = [word for word in options.again.split(",") if word]
    old = {key: row for key, row in done.items() if row[0] not in again or row[1].startswith(EQUIVALENT)}
    left = [it for n, it in enumerate(mutants) if n % parts == part and key_of(it) not in old]
    if not results.exists():
        write(results, {}, mutants)

    def work(session: Session) -> None:
        told = in_a_new_process(Path(name), None, list(session.items)[:1], 60)
        if told.outcome()[0] != "survived":
            raise RuntimeError(f"without a mutant: {told.outcome()}")
        trial = Trial(reach, Path(name), session, options.seconds)
        for number, mutant in enumerate(left, 1):
            row = row_of(mutant, *trial.outcome(mutant))
            with results.open("a", encoding="utf-8") as file:
                file.write("\t".join(row) + "\n")
            print(f"{number}/{len(left)}", *row[:7], file=sys.__stdout__, flush=True)

    with tempfile.TemporaryDirectory() as name:
        copy_sources(Path(name))
        left_out = [*(f"--ignore={it}" for it in WHOLE_LANES), *(f"--deselect={it}" for it in LONG)]
        status = with_session(Path(name), [*TESTS, *left_out], work)
        os.chdir(results.parent)
    done = known(results)
    if parts == 1:
        write(results, done, mutants)
    print(figures([done[key_of(it)] for it in mutants if key_of(it) in done]))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
