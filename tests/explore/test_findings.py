"""Findings that became tests: traces with the verdicts that the sources give, run under the policies that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spepolicy.explore.scenario import Verdict, read, run
from spepolicy.plugins import build_policy

FILES = sorted((Path(__file__).parent / "findings").glob("*.yaml"))


def verdicts() -> list[Any]:
    found = []
    for path in FILES:
        for verdict in read(path).verdicts:
            fields = "".join(f",{name}={value}" for name, value in verdict.fields.items())
            found.append(pytest.param(path, verdict, id=f"{path.stem}-{verdict.policy}{fields}"))
    return found


@pytest.mark.parametrize(("path", "verdict"), verdicts())
def test_a_finding_has_its_verdict(path: Path, verdict: Verdict) -> None:
    replay = run(path, build_policy(verdict.policy, dict(verdict.fields)), verdict.policy)
    assert set(replay.broken()) == set(verdict.breaks), [step.text for step in replay.steps if step.kinds]
    assert replay.steps[-1].possible or not verdict.breaks  # where nothing has gone wrong there may be no interrupt


def test_a_finding_is_called_as_its_file() -> None:
    assert FILES
    assert [read(path).name for path in FILES] == [path.stem for path in FILES]
