"""spepolicy.judge.errata and findings: checked records, merging, counting from truth, and the rendered page."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from spepolicy.errors import PluginError
from spepolicy.judge.errata import (
    Erratum,
    Findings,
    Observation,
    errata_as_json,
    merge_errata,
)
from spepolicy.judge.errata_page import errata_as_markdown
from spepolicy.judge.findings import OBSERVATIONS, find
from spepolicy.machine.state import LostCause

from .hand_made_results import empty_result, eventful_result, scenario

SAMPLE = Erratum(
    id="SPE-KVM-9",
    title="A | B",
    trigger="something happens",
    versions="all",
    effect_on_guest="none",
    effect_on_profile="gaps",
    severity="medium",
    blame="host",
    count=3,
    first_trace={"replicate": 2, "vcpu": 1},
    source="a mail",
)
FINDINGS = Findings("eager_pin", 4, True, 8, 16.0, 4.0, {"seed": 1}, {"fatal": Observation(3, 1, {"replicate": 2})})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("title", ""),
        ("title", 7),
        ("trigger", " "),
        ("severity", "bad"),
        ("blame", "nobody"),
        ("count", -1),
        ("count", 1.5),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_rule(field: str, value: object) -> None:
    with pytest.raises(PluginError) as caught:
        replace(SAMPLE, **{field: value})
    message = str(caught.value)
    assert "SPE-KVM-9" in message
    assert f"{field} is {value!r}" in message
    assert "must be" in message


def test_merging_keeps_the_policys_words_and_the_observed_count() -> None:
    documented = replace(SAMPLE, title="said by the policy", count=0, first_trace=None)
    (merged,) = merge_errata([documented], [SAMPLE])
    assert merged.title == "said by the policy"
    assert merged.documented
    assert (merged.count, merged.first_trace) == (3, {"replicate": 2, "vcpu": 1})


def test_two_reporters_of_one_id_do_not_add_up() -> None:
    (merged,) = merge_errata([], [SAMPLE, replace(SAMPLE, count=5), replace(SAMPLE, count=4)])
    assert merged.count == 5
    assert not merged.documented


def test_order_is_seen_first_then_severity_then_number() -> None:
    errata = [
        replace(SAMPLE, id="SPE-KVM-10"),
        replace(SAMPLE, id="SPE-KVM-2", count=0),
        replace(SAMPLE, id="SPE-KVM-9"),
        replace(SAMPLE, id="SPE-KVM-11", severity="high"),
        replace(SAMPLE, id="OTHER"),
    ]
    assert [e.id for e in merge_errata([], errata)] == ["SPE-KVM-11", "OTHER", "SPE-KVM-9", "SPE-KVM-10", "SPE-KVM-2"]


def test_page_has_a_table_row_and_a_section_an_erratum() -> None:
    quiet = replace(SAMPLE, id="SPE-KVM-1", title="Documented only", count=0, first_trace=None, documented=True)
    page = errata_as_markdown(FINDINGS, [SAMPLE, quiet])
    lines = page.splitlines()
    assert lines[0] == "Errata of the SPE policy eager_pin"
    assert "| SPE-KVM-9 | A \\| B | medium | host | 3 | no |" in lines
    assert "| SPE-KVM-1 | Documented only | medium | host | 0 | yes |" in lines
    section = lines[lines.index("SPE-KVM-9: A | B") :]
    assert section[1] == "-" * len("SPE-KVM-9: A | B")
    assert "* **Seen.** 3 times (0.75 a second of wanted profiling)" in section
    assert "* **First.** replicate 2, vcpu 1" in section
    assert "* **Seen.** not in this run" in section
    parts = ("Affects", "Trigger", "Effect on the guest", "Effect on the profile", "To blame", "Workaround", "Source")
    for text in parts:
        assert sum(line.startswith(f"* **{text}.**") for line in section) == 2
    assert "SPEv1p3 (ID_AA64DFR0_EL1.PMSVer = 4)" in page.replace("\n", " ")


def test_page_without_errata_says_so() -> None:
    assert "Nothing was found" in errata_as_markdown(FINDINGS, [])
    assert "on bare metal" in errata_as_markdown(replace(FINDINGS, virtualized=False), [])


def test_json_has_facts_observations_and_errata() -> None:
    content = json.loads(json.dumps(errata_as_json(FINDINGS, [SAMPLE])))
    assert content["policy"] == "eager_pin"
    assert content["facts"] == {"seed": 1}
    assert content["observations"]["fatal"] == {"count": 3, "lanes": 1, "first": {"replicate": 2}}
    assert content["errata"][0]["id"] == "SPE-KVM-9"
    assert content["errata"][0]["first_trace"] == {"replicate": 2, "vcpu": 1}


def test_findings_count_truth_over_lanes_and_vcpus() -> None:
    result = empty_result(replicates=(10, 11, 12), vcpus=2)
    result.truth["silent_fatal"][1] = [0, 4]
    result.truth["silent_fatal"][2] = [3, 0]
    result.vm["stale_pins"] = [0, 0, 9]
    findings = find(result, virtualized=True)
    assert findings.seen("silent_fatal") == Observation(7, 2, {"replicate": 11, "vcpu": 1})
    assert findings.seen("stale_pins") == Observation(9, 1, {"replicate": 12})
    assert findings.count("fatal") == 0
    assert findings.seen("fatal").first is None
    assert set(findings.observations) == set(OBSERVATIONS)
    assert (findings.replicates, findings.guest_s) == (3, 6.0)


def test_first_stage_2_fault_carries_its_registers() -> None:
    result = eventful_result(replicates=(3,))
    result.truth["first_fault_va"] = np.int64(-0x7FFF_0000_0000)
    first = find(result, virtualized=True).seen("stage2_fault").first
    where = {"replicate": 3, "vcpu": 0, "host_time_us": 5000.0}
    assert first == where | {"va": "0xffff800100000000", "pmbsr": "0x94020007"}


def test_faults_of_an_el0_only_session_are_observed_as_such() -> None:
    result = eventful_result()
    assert find(result, virtualized=True).count("el0_only_fault") == 0
    user_only = replace(result, scenario=scenario(profile_kernel=False))
    findings = find(user_only, virtualized=True, hooks=["profiling_enabled"])
    assert findings.count("el0_only_fault") == findings.count("stage2_fault") == 8
    assert findings.facts["hooks"] == ["profiling_enabled"]


def test_stage_2_windows_and_host_faults_are_observed() -> None:
    findings = find(eventful_result(), virtualized=True)
    assert findings.count("stage2_blackout") == 8
    assert findings.count("stage2_fault_host") == 4
    assert findings.seen("stage2_blackout").lanes == 4


def test_an_observation_that_does_not_exist_is_the_reporters_error() -> None:
    with pytest.raises(PluginError, match=r"no observation 'fatall'.*Known: fatal"):
        FINDINGS.count("fatall")


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_every_observation_says_what_it_counts(name: str) -> None:
    count, text = OBSERVATIONS[name]
    assert len(text.split()) >= 3
    assert int(np.sum(count(empty_result(replicates=(0, 1), vcpus=2)))) == 0


def test_loss_causes_of_stage_2_are_all_seen_as_windows() -> None:
    # A new cause in the machine must be put into one list or the other.
    assert [cause.name for cause in LostCause if cause.name.startswith("STAGE2")] == [
        "STAGE2_NOT_PINNED",
        "STAGE2_GUEST",
        "STAGE2_HOST",
        "STAGE2_KVM_BUG",
        "STAGE2_MIGRATION",
    ]
