"""The catalogue: its files say what they must, its verdicts hold, and a wrong one is found."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from spepolicy.batch import Vcpus
from spepolicy.catalogue.case import DRIVERS, Verdict, read_case, read_catalogue
from spepolicy.catalogue.run import run_catalogue
from spepolicy.catalogue.task import catalogue_table
from spepolicy.errors import ConfigurationError
from spepolicy.hookspecs import Event, hookimpl
from spepolicy.plugins import build_policy, installed_policies

ROWS = {*(f"E{n}" for n in range(1, 13)), *(f"G{n}" for n in range(1, 19)), *(f"A{n}" for n in range(1, 20)),
        *(f"H{n}" for n in range(1, 19)), *(f"L{n}" for n in range(1, 7))}  # fmt: skip
BY_VERSION = "V"  # cases of spe.md, beside the rows of kvm.md


def test_every_row_of_the_notes_is_a_case_or_left_out_with_a_reason() -> None:
    cases, left_out = read_catalogue()
    rows = {re.sub(r"[a-z]$", "", case.id) for case in cases if not case.id.startswith(BY_VERSION)}
    assert rows | {row.id for row in left_out} == ROWS
    assert not {row.id for row in left_out} & rows
    assert all(len(row.why) > 3 for row in left_out)
    for case in cases:
        section = {"E": "kvm.md 2.4", BY_VERSION: "spe.md"}.get(case.id[0], "kvm.md 4")
        assert section in case.source, case.id
        assert case.story


def test_verdicts_name_policies_that_exist() -> None:
    names = {*installed_policies(), "others"}
    for case in read_catalogue()[0]:
        for verdict in case.verdicts:
            assert set(verdict.policies) <= ({*DRIVERS} if case.answer else names), case.id
            assert verdict.because


def test_every_answer_is_judged_for_every_driver() -> None:
    """E1 to E12: each driver of the three has a verdict of its own, in each version that the case runs with."""
    cases = [case for case in read_catalogue()[0] if case.answer]
    assert {case.answer for case in cases} == {f"E{n}" for n in range(1, 13)}
    for case in cases:
        for version in case.versions:
            about = [it for it in case.verdicts if not it.versions or version in it.versions]
            assert {name for it in about for name in it.policies} == {*DRIVERS}, case.id


def test_verdicts_differ_by_version_where_the_architecture_does() -> None:
    """spe.md rules 23, 33, 40 and 42: discard mode, the access flag, late faults, external aborts."""
    cases = {case.id: case for case in read_catalogue()[0]}
    for name in ("A7", "A8", "E2", "G12"):
        assert {verdict.versions for verdict in cases[name].verdicts if verdict.versions}, name
    assert min(cases["V1"].versions) == 3
    assert max(cases["A16"].versions) < 4
    assert cases["V2"].versions == (6,)


@pytest.mark.slow
def test_every_verdict_holds_on_every_shipped_policy() -> None:
    cases, left_out = read_catalogue()
    policies = {
        name: build_policy(name, {}) for name, info in installed_policies().items() if info.distribution == "spepolicy"
    }
    outcomes = run_catalogue(cases, policies)
    assert [f"{o.case} {o.policy}: {o.disagreements}" for o in outcomes if o.disagreements] == []
    judged = sum(outcome.judged for outcome in outcomes)
    assert judged > 900
    table = catalogue_table(cases, left_out, list(policies), outcomes, 1.0)
    assert f"{len(cases)} cases, {len(policies)} policies" in table
    for case in cases:
        assert case.id in table


def test_a_wrong_verdict_is_a_disagreement_with_its_reason() -> None:
    (case,) = (case for case in read_catalogue()[0] if case.id == "A3")
    wrong = tuple(replace(verdict, blackout=("stage1_fault",)) for verdict in case.verdicts)
    (outcome,) = run_catalogue(
        [replace(case, verdicts=wrong, versions=(1,))], {"map_on_fault": build_policy("map_on_fault", {})}
    )
    assert outcome.mark == "X"
    assert "expected stage1_fault, seen stage2_not_pinned" in outcome.disagreements[0]
    assert "no record was there to discard" in outcome.disagreements[0]


def test_what_the_architecture_forbids_is_found_without_a_verdict() -> None:
    (case,) = (case for case in read_catalogue()[0] if case.id == "A7")
    outcomes = run_catalogue([replace(case, verdicts=())], {"pin_vm": build_policy("pin_vm", {})})
    for outcome in outcomes:
        if outcome.version < 4:
            assert outcome.disagreements == (), "allowed before SPEv1p3"
        else:
            assert "tells external, which is forbidden" in outcome.disagreements[0]


def test_what_is_allowed_is_not_what_must_be() -> None:
    (case,) = (case for case in read_catalogue()[0] if case.id == "H1")
    policies = {"eager_pin": build_policy("eager_pin", {})}
    for may_tell, holds in ((("impdef", "stage1"), True), (("stage1",), False)):
        verdict = Verdict(policies=("eager_pin",), because="a test", may_tell=may_tell)
        (outcome,) = run_catalogue([replace(case, verdicts=(verdict,))], policies)
        assert outcome.judged
        assert (not outcome.disagreements) == holds


def test_a_case_may_set_fields_of_a_policy_and_leaves_its_others() -> None:
    """H8c: with the filter of 2022 records diverge, without they do not; what the user chose stays."""
    (case,) = (case for case in read_catalogue()[0] if case.id == "H8c")
    policy = build_policy("pin_while_enabled", {"claims": "look"})
    (wide,) = run_catalogue([case], {"pin_while_enabled": policy})
    (narrow,) = run_catalogue([replace(case, fields={})], {"pin_while_enabled": policy})
    assert wide.seen is not None
    assert narrow.seen is not None
    assert "diverged" in wide.seen.records
    assert "diverged" not in narrow.seen.records
    with pytest.raises(ConfigurationError, match=r"catalogue case H8c: .*notifyers"):
        run_catalogue(
            [replace(case, fields={"pin_while_enabled": {"notifyers": "honour"}})], {"pin_while_enabled": policy}
        )


def test_a_policy_that_breaks_its_contract_is_told_for_its_cases_only() -> None:
    """Cases share a machine; one in which the policy fails does not take the others down."""

    @dataclass
    class Broken:
        """Fails when the page that faulted is behind a cut record."""

        @hookimpl
        def stage2_fault(self, faults: Vcpus) -> None:
            faults.inject(Event.IMPDEF, data_loss=True)
            raise ValueError("broken")

    cases = [case for case in read_catalogue()[0] if case.id in ("A3", "A9")]
    faulting, calm = run_catalogue([replace(case, verdicts=(), versions=(1,)) for case in cases], {"broken": Broken()})
    assert "raised ValueError: broken" in faulting.disagreements[0]
    assert calm.disagreements == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("titel: x\n", "has 'titel'.*Did you mean 'title'"),
        ("host: {numa: 1ms 4}\n", "host has 'numa'"),
        ("never: {tells: [impdf]}\n", "never.tells has 'impdf'.*Did you mean 'impdef'"),
        ("verdicts: [{policies: eager_pin}]\n", "has no because"),
        ("verdicts: [{policies: eager_pin, because: x, blackout: [stage2]}]\n", "blackout has 'stage2'"),
        ("set: [\n", "is not YAML"),
        ("answer: E13\n", "answer has 'E13'"),
        ("verdicts: [{policies: eager_pin, because: x, versions: [3]}]\n", "judges version 3"),
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
    (case,) = (case for case in read_catalogue()[0] if case.id == "G1")
    with pytest.raises(ConfigurationError, match=r"catalogue case G1: .*guest\.bufer"):
        run_catalogue([replace(case, set=("guest.bufer=64KiB",))], {"pin_vm": build_policy("pin_vm", {})})


def test_files_are_small_and_all_in_the_index() -> None:
    folder = Path(__file__).parents[1] / "catalogue"
    assert len(list(folder.glob("*.yaml"))) == len(read_catalogue()[0]) + 1
    assert all(path.stat().st_size < 4096 for path in folder.glob("[AEGHLV]*.yaml"))
