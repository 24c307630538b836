"""`task=catalogue` from the command line: on one policy, with its fields, to a table and a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spepolicy.catalogue.case import read_catalogue
from spepolicy.cli import main


def test_the_catalogue_runs_on_the_chosen_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["task=catalogue", "+policy=map_on_fault", f"output.dir={tmp_path}"])
    out = capsys.readouterr().out
    assert status == 0, out
    cases = {case.id for case in read_catalogue()[0]}
    assert f"{len(cases)} cases, 1 policies" in out
    assert "0 disagreements" in out
    (path,) = tmp_path.glob("*/*/catalogue.json")
    assert {outcome["case"] for outcome in json.loads(path.read_text())["outcomes"]} == cases


def test_a_verdict_that_does_not_hold_is_told_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy with other fields than the verdicts are about: it diverges, or does not fault where they say so."""
    words = ["task=catalogue", "+policy=eager_pin", "policy.keep_mapped=true", "policy.pin_stage1_tables=true"]
    status = main([*words, f"output.dir={tmp_path}"])
    assert status == 2
    assert "X H1 eager_pin, PMSVer 1: blackout: expected stage2_host, seen none" in capsys.readouterr().out
