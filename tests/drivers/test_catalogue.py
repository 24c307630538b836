"""The catalogue: its files say what they must, its verdicts hold, and a wrong one is found."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from spepolicy.catalogue.case import read_case, read_catalogue
from spepolicy.catalogue.run import run_catalogue
from spepolicy.catalogue.task import catalogue_table
from spepolicy.errors import ConfigurationError
from spepolicy.plugins import build_policy, installed_policies

ROWS = {*(f"G{n}" for n in range(1, 19)), *(f"A{n}" for n in range(1, 20)), *(f"H{n}" for n in range(1, 19)),
        *(f"L{n}" for n in range(1, 7))}  # fmt: skip


def test_every_row_of_the_notes_is_a_case_or_left_out_with_a_reason() -> None:
    cases, left_out = read_catalogue()
    rows = {re.sub(r"[a-z]$", "", case.id) for case in cases}
    assert rows | {row.id for row in left_out} == ROWS
    assert not {row.id for row in left_out} & rows
    assert all(len(row.why) > 3 for row in left_out)
    for case in cases:
        assert "kvm.md 4" in case.source
        assert case.story


def test_verdicts_name_policies_that_exist() -> None:
    names = {*installed_policies(), "others"}
    for case in read_catalogue()[0]:
        for verdict in case.verdicts:
            assert set(verdict.policies) <= names, case.id
            assert verdict.because


@pytest.mark.slow
def test_every_verdict_holds_on_every_shipped_policy() -> None:
    cases, left_out = read_catalogue()
    policies = {
        name: build_policy(name, {}) for name, info in installed_policies().items() if info.distribution == "spepolicy"
    }
    outcomes = run_catalogue(cases, policies)
    assert [f"{o.case} {o.policy}: {o.disagreements}" for o in outcomes if o.disagreements] == []
    judged = sum(outcome.judged for outcome in outcomes)
    assert judged > 200
    table = catalogue_table(cases, left_out, list(policies), outcomes, 1.0)
    assert f"{len(cases)} cases, {len(policies)} policies" in table
    for case in cases:
        assert case.id in table


def test_a_wrong_verdict_is_a_disagreement_with_its_reason() -> None:
    (case,) = (case for case in read_catalogue()[0] if case.id == "A3")
    wrong = tuple(replace(verdict, blackout=("stage1_fault",)) for verdict in case.verdicts)
    (outcome,) = run_catalogue([replace(case, verdicts=wrong)], {"map_on_fault": build_policy("map_on_fault", {})})
    assert outcome.mark == "X"
    assert "expected stage1_fault, seen stage2_not_pinned" in outcome.disagreements[0]
    assert "no record was there to discard" in outcome.disagreements[0]


def test_what_the_architecture_forbids_is_found_without_a_verdict() -> None:
    (case,) = (case for case in read_catalogue()[0] if case.id == "A7")
    (outcome, *_) = run_catalogue([replace(case, verdicts=())], {"pin_vm": build_policy("pin_vm", {})})
    assert "tells external, which is forbidden" in outcome.disagreements[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("titel: x\n", "has 'titel'.*Did you mean 'title'"),
        ("host: {numa: 1ms 4}\n", "host has 'numa'"),
        ("never: {tells: [impdf]}\n", "never.tells has 'impdf'.*Did you mean 'impdef'"),
        ("verdicts: [{policies: eager_pin}]\n", "has no because"),
        ("verdicts: [{policies: eager_pin, because: x, blackout: [stage2]}]\n", "blackout has 'stage2'"),
        ("set: [\n", "is not YAML"),
    ],
)
def test_a_file_that_is_wrong_says_where(change: str, says: str) -> None:
    good = "id: X\ntitle: t\nsource: kvm.md 4\nstory: s\nverdicts: [{policies: others, because: b}]\n"
    assert read_case(good, "x.yaml", {}).id == "X"
    key = change.partition(":")[0]
    text = "".join(line for line in good.splitlines(keepends=True) if not line.startswith(f"{key}:")) + change
    with pytest.raises(ConfigurationError, match=rf"(?s)x\.yaml.*{says}"):
        read_case(text, "x.yaml", {})


def test_settings_that_do_not_exist_are_told_with_the_case() -> None:
    (case, *_) = read_catalogue()[0]
    with pytest.raises(ConfigurationError, match=r"catalogue case G1: .*guest\.bufer"):
        run_catalogue([replace(case, set=("guest.bufer=64KiB",))], {"pin_vm": build_policy("pin_vm", {})})


def test_files_are_small_and_all_in_the_index() -> None:
    folder = Path(__file__).parents[1] / "catalogue"
    assert len(list(folder.glob("*.yaml"))) == len(read_catalogue()[0]) + 1
    assert all(path.stat().st_size < 4096 for path in folder.glob("[AGHL]*.yaml"))
