"""Try mutants one by one in one session of pytest: everything is imported and collected once, each attempt is a fork.

In the fork the mutated function gets its new code, wherever it has been imported; that is possible because the machine
is interpreted here, so its functions are Python's. What has run before the first test (constants that a function made,
parameters of tests) is not made anew: mutants of such functions are tried in a new process, on a changed copy of the
sources.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

from .mutants import PACKAGES, ROOT, Mutant, source_of

# A test hangs that takes so much longer than without the mutant, traced, or has run for so long.
HANGS_TIMES, HANGS_S = 10, 3.0
COPIED = ("spepolicy", "tests", "conf", "plugins", "pyproject.toml", "README.md", "experiments")
OPTIONS = (
    "-q", "-p", "no:cacheprovider", "-n", "0", "--tb=no", "--capture=sys",
    "--hypothesis-seed=0", "--hypothesis-profile=mutation",
)  # fmt: skip
_PIPE = "SPEPOLICY_MUTATION_PIPE"


def _say(pipe: int, what: str, nodeid: str) -> None:
    os.write(pipe, f"{what}\t{time.process_time()}\t{nodeid}\n".encode())


class Reporter:
    """A plugin of pytest that tells another process, through a pipe, when a test begins, and whether it fails."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self.failed = False

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        _say(self._pipe, "begins", nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed = True
            _say(self._pipe, "failed", report.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """As a plugin of pytest, in a process of its own: report to the pipe that the parent has opened."""
    without_shrinking()
    if _PIPE in os.environ:
        config.pluginmanager.register(Reporter(int(os.environ[_PIPE])))


def without_shrinking() -> None:
    """Let hypothesis stop at the first example that fails, and remember none."""
    from hypothesis import Phase, settings

    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutation", settings(phases=phases, database=None, deadline=None))


class Told:
    """What an attempt has said: which test failed, and how it ended."""

    def __init__(self, lines: Iterable[str], status: int, limit_s: float) -> None:
        self._lines = [line.rstrip("\n").split("\t") for line in lines]
        self._status, self._limit_s = status, limit_s

    def failed(self) -> list[str]:
        return [test for what, _, test in self._lines if what == "failed"]

    def outcome(self, seconds: Mapping[str, float] | None = None) -> tuple[str, str]:
        """Return (outcome, test); a test has words behind its name if it did not just fail. *seconds*: what tests take
        without a mutant.
        """
        if found := self.failed():
            return "caught", found[0]
        if os.WIFSIGNALED(self._status) and os.WTERMSIG(self._status) in (signal.SIGXCPU, signal.SIGKILL):
            _, since, test = self._lines[-1] if self._lines else ("", "0", "import")
            hangs = max(HANGS_S, HANGS_TIMES * (seconds or {}).get(test, 0.0))
            return ("caught", f"{test} (hangs)") if self._limit_s - float(since) > hangs else ("undecided", "")
        code = os.waitstatus_to_exitcode(self._status)
        if code == 0:
            return "survived", ""
        return "caught", f"{self._lines[-1][2]} (exit {code})" if self._lines else "import"


def _limit(seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # a loop that makes a list ends with MemoryError


def _code_of(code: CodeType, qualified: str) -> list[CodeType]:
    """Return the code of each function of that qualified name inside *code*."""
    inside = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return [it for it in inside if it.co_qualname == qualified] + [
        found for it in inside for found in _code_of(it, qualified)
    ]


class Session:
    """A session of pytest that has collected its tests and can fork attempts."""

    def __init__(self, folder: Path, session: pytest.Session, ran: set[tuple[str, str]]) -> None:
        self._folder, self._ran = folder, ran
        self.items: dict[str, Any] = {item.nodeid: item for item in session.items}
        self._functions: dict[tuple[str, str], list[FunctionType]] = {}
        for it in gc.get_objects():
            if isinstance(it, FunctionType) and it.__code__.co_filename.startswith(str(folder / "spepolicy")):
                self._functions.setdefault((it.__code__.co_filename, it.__code__.co_qualname), []).append(it)
        gc.collect()
        gc.freeze()  # what is there stays shared with the children

    def sharing(self, tests: set[str]) -> set[str]:
        """Return *tests* and those that use a fixture of a whole module which one of them uses: what that runs through
        is booked to the first of its tests.
        """
        users: dict[tuple[str, str, str], set[str]] = {}
        for name, item in self.items.items():
            for fixture, definitions in item._fixtureinfo.name2fixturedefs.items():
                if definitions[-1].scope != "function" and definitions[-1].baseid:
                    chosen = getattr(item, "callspec", None)
                    index = chosen.indices.get(fixture, 0) if chosen is not None else 0
                    users.setdefault((definitions[-1].baseid, fixture, str(index)), set()).add(name)
        return tests.union(*(group for group in users.values() if group & tests))

    def runs_before_tests(self, mutant: Mutant) -> bool:
        """Tell whether the mutant's function, or what it is defined in, has run while tests were collected."""
        path = str(self._folder / mutant.path)
        names = mutant.function.split(".")
        return any((path, ".".join(names[:n])) in self._ran for n in range(1, len(names) + 1))

    def attempt(self, mutant: Mutant, tests: Sequence[str], limit_s: float) -> Told | None:
        """Try *tests* on *mutant*; None: its function cannot be given new code."""
        path = str(self._folder / mutant.path)
        new = compile(source_of(mutant), path, "exec")
        names = mutant.function.split(".")
        for n in range(1, len(names) + 1):
            functions = self._functions.get((path, ".".join(names[:n])), [])
            if functions:
                codes = _code_of(new, ".".join(names[:n]))
                if len(codes) != 1 or any(len(codes[0].co_freevars) != len(f.__code__.co_freevars) for f in functions):
                    return None

                def put() -> None:
                    for function in functions:  # noqa: B023 - called before the loop goes on
                        function.__code__ = codes[0]  # noqa: B023

                return self._forked(tests, limit_s, put)
        return None

    def passes_alone(self, test: str) -> bool:
        """Tell whether *test* passes without a mutant, in a process of its own."""
        return self._forked([test], 600).outcome()[0] == "survived"

    def _forked(self, tests: Sequence[str], limit_s: float, before: Callable[[], None] | None = None) -> Told:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            try:
                self._child([self.items[test] for test in tests], limit_s, write, before)
            finally:
                os._exit(70)
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as pipe:
            lines = pipe.readlines()
        return Told(lines, os.waitpid(pid, 0)[1], limit_s)

    def _child(self, items: list[Any], limit_s: float, pipe: int, before: Callable[[], None] | None) -> None:
        _limit(limit_s)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        reporter = Reporter(pipe)
        config = items[0].config
        config.pluginmanager.register(reporter)
        if before is not None:
            before()
        for item, following in zip(items, [*items[1:], None], strict=True):
            config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if reporter.failed:
                break
        os._exit(0)


def in_a_new_process(folder: Path, mutant: Mutant | None, tests: Sequence[str], limit_s: float) -> Told:
    """Try *tests* on *mutant*, or on none, in the changed copy of the sources at *folder*."""
    path = folder / (mutant.path if mutant is not None else "pyproject.toml")
    original = path.read_text(encoding="utf-8")
    read, write = os.pipe()
    if mutant is not None:
        path.write_text(source_of(mutant), encoding="utf-8")
    try:
        options = (*OPTIONS, "-x", "-p", "tests.mutation.attempt")
        with subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests], cwd=folder, env=os.environ | {_PIPE: str(write)},
            pass_fds=[write], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: _limit(limit_s),
        ) as child:  # fmt: skip
            os.close(write)
            with os.fdopen(read, encoding="utf-8") as pipe:
                lines = pipe.readlines()
            code = child.wait()
    finally:
        path.write_text(original, encoding="utf-8")
    return Told(lines, -code if code < 0 else code << 8, limit_s)


def copy_sources(folder: Path) -> None:
    """Copy what the tests need to *folder*, and let this process and its children import from there."""
    for name in COPIED:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
    sys.path.insert(0, str(folder))
    os.environ |= {"NUMBA_DISABLE_JIT": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    sys.dont_write_bytecode = True
    os.chdir(folder)


class _Loop:
    """A plugin of pytest that puts *work* in the place of running the tests."""

    def __init__(self, folder: Path, work: Callable[[Session], None]) -> None:
        self._folder, self._work = folder, work
        self._ran: set[tuple[str, str]] = set()
        sys.setprofile(self._note)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self._ran.add((frame.f_code.co_filename, frame.f_code.co_qualname))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        interpreted = importlib.import_module("tests.machine.interpreted")
        for package in PACKAGES:
            for file in sorted((self._folder / package).glob("*.py")):
                name = ".".join((*package.split("/")[1:], file.stem)).removesuffix(".__init__")
                importlib.import_module(f"spepolicy.{name}")
                interpreted.module(name)
        sys.setprofile(None)
        self._work(Session(self._folder, session, self._ran))
        return True


def with_session(folder: Path, tests: Sequence[str], work: Callable[[Session], None]) -> int:
    """Collect *tests* below *folder* and call *work*; return pytest's exit status."""
    without_shrinking()
    return int(pytest.main([*OPTIONS, *tests], plugins=[_Loop(folder, work)]))
