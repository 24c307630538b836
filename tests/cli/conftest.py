"""Run the program in this process, with or without a stand-in for the laboratory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from spepolicy.cli import main


class Answer(NamedTuple):
    """What the program did."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Return a function that runs the program with arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Answer:
        capsys.readouterr()
        status = main(arguments)
        return Answer(status, *capsys.readouterr())

    return call


@dataclass
class Report:
    """What `execute` returns, as far as the command line looks at it."""

    interrupted: bool = False

    def summary(self) -> str:
        """Return the summary for the terminal."""
        return "the summary"


@dataclass
class Laboratory:
    """A stand-in for `spepolicy.lab.run.execute`: it keeps the plans and returns, or raises, what it was told to."""

    plans: list[Any] = field(default_factory=list)
    answer: Any = field(default_factory=Report)

    def execute(self, plan: Any, say: Callable[[str], None]) -> Any:
        """Keep *plan*."""
        self.plans.append(plan)
        say("working")
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture
def laboratory(monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    """Replace the laboratory by a stand-in: nothing is simulated."""
    stand_in = Laboratory()
    monkeypatch.setattr("spepolicy.lab.run.execute", stand_in.execute)
    return stand_in
