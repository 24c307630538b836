"""How much of the rules the tests run through, interpreted: `python -m tests.line_coverage [--contexts FILE]`.

Compiled code cannot be traced. With NUMBA_DISABLE_JIT=1 the tests that look at single rules run the same functions as
Python: this runs those of `TESTS` and fails if fewer than `LEAST` % of the lines of spepolicy/machine, mmu or judge are
reached. Tests that simulate whole lanes are left out: they would take an hour, and reaching a line is not testing it.

With `--contexts`, FILE (of coverage.py) says which test runs through which line, and seconds-FILE.json beside it how
long each takes so: what `tests.mutation` needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("machine", "mmu", "judge")
LEAST = 95
TESTS = (
    "tests/machine",
    "tests/mmu",
    "tests/judge",
    "tests/conformance/test_at_golden.py",
)
WHOLE_LANES = ("tests/machine/test_guest.py",)
# Tables of 2048 and 8192 entries word by word, and all golden cases once more: other tests run through the same lines.
LONG = (
    "tests/mmu/test_builder.py::test_a_page_taken_out_of_a_block_leaves_the_rest[16]",
    "tests/mmu/test_builder.py::test_a_page_taken_out_of_a_block_leaves_the_rest[64]",
    "tests/conformance/test_at_golden.py::test_threads_answer_the_same",
)
_TIMES = "SPEPOLICY_TEST_SECONDS"  # the variable that names the file for them
_RULES = """
[run]
source = spepolicy.machine,spepolicy.mmu,spepolicy.judge
data_file = {data}
[report]
exclude_also =
    if TYPE_CHECKING:
    ^if COMPILED:
    raise AssertionError
"""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """As a plugin of pytest: book what runs to the test that it runs for."""
    import coverage

    tracer = coverage.Coverage.current()
    if tracer is not None:
        tracer.switch_context(item.nodeid)
    yield
    if tracer is not None:
        tracer.switch_context("")


_seconds: dict[str, float] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """As a plugin of pytest: note how long a test takes."""
    _seconds[report.nodeid] = _seconds.get(report.nodeid, 0.0) + report.duration


def pytest_sessionfinish() -> None:
    """As a plugin of pytest: write that down."""
    Path(os.environ[_TIMES]).write_text(json.dumps(_seconds, indent=0), encoding="utf-8")


def _run(*words: str, **variables: str) -> int:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment, check=False).returncode


def seconds_of(data: Path) -> Path:
    """Return the file beside *data* that says how long each test takes."""
    return data.with_name(f"seconds-{data.name}.json")  # a name that coverage.py takes for none of its files


def measure(data: Path, rules: Path, *options: str) -> int:
    """Run the tests and write *data* and *rules*, the settings of coverage.py; return the exit status."""
    rules.write_text(_RULES.format(data=data), encoding="utf-8")
    plugin = ("-p", "tests.line_coverage", "-p", "no:cacheprovider", "-q", "-n", "0", "--hypothesis-seed=0")
    ignored = [*(f"--ignore={path}" for path in WHOLE_LANES), *(f"--deselect={test}" for test in LONG)]
    return _run(
        "coverage", "run", f"--rcfile={rules}", "-m", "pytest", *plugin, *ignored, *options, *TESTS,
        NUMBA_DISABLE_JIT="1", **{_TIMES: str(seconds_of(data))},
    )  # fmt: skip


def report(rules: Path) -> int:
    """Print the lines that are not reached; return the exit status: 0 if each package has enough."""
    short = 0
    for package in PACKAGES:
        wanted = ("--include", f"*/spepolicy/{package}/*", f"--fail-under={LEAST}", "--show-missing", "--skip-covered")
        short |= _run("coverage", "report", f"--rcfile={rules}", *wanted) != 0
    return short


def main(arguments: list[str]) -> int:
    """Measure and report; return the exit status."""
    options: list[Any] = list(arguments)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        if options[:1] == ["--contexts"]:
            data = Path(options[1]).resolve()
            data.unlink(missing_ok=True)
            options = options[2:]
        rules = Path(name) / "rules"
        failed = measure(data, rules, *options)
        return failed or report(rules)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
