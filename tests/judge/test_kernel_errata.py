"""The shipped erratum reporter: which observation makes which erratum, and who is blamed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spepolicy.arch.versions import VERSIONS, AbortReport
from spepolicy.judge.errata import Erratum, Findings, Observation
from spepolicy.judge.findings import OBSERVATIONS, facts, find
from spepolicy.machine.scenario import ExternalAbort
from spepolicy_plugins.errata import KernelErrata

from .hand_made_results import empty_result, scenario


def findings(virtualized: bool = True, spe_version: int = 1, **counts: int) -> Findings:
    observations = {name: Observation() for name in OBSERVATIONS}
    observations |= {name: Observation(count, 1, {"replicate": 0}) for name, count in counts.items()}
    return Findings("p", spe_version, virtualized, 4, 4.0, 2.0, facts(scenario()), observations)


def reported(found: Findings) -> dict[str, Erratum]:
    errata = KernelErrata().report_errata(findings=found)
    assert len({erratum.id for erratum in errata}) == len(errata)
    return {erratum.id: erratum for erratum in errata}


def test_nothing_observed_means_no_erratum() -> None:
    assert reported(findings()) == {}
    assert reported(find(empty_result(), virtualized=False)) == {}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"injected_impdef": 2}, {"SPE-KVM-2"}),
        ({"injected_stage2": 2}, {"SPE-KVM-3"}),
        ({"injected_stage1": 2}, {"SPE-KVM-4"}),
        ({"silent_fatal": 2, "fatal": 5}, {"SPE-KVM-5"}),
        ({"forged_loss": 2}, {"SPE-KVM-6"}),
        ({"diverged_records": 2}, {"SPE-KVM-8"}),
        ({"pin_refused": 2}, {"SPE-KVM-9"}),
        ({"stale_pins": 2}, {"SPE-KVM-10"}),
        ({"pins_leaked": 2}, {"SPE-KVM-11"}),
        ({"stage2_fault": 2}, {"SPE-KVM-12"}),
        ({"stage2_fault": 2, "data_loss": 2}, {"SPE-KVM-12", "SPE-KVM-13"}),
        ({"resumed_cut": 2}, {"SPE-KVM-15"}),
        ({"refused": 2}, {"SPE-KVM-16"}),
        ({"refused": 2, "pin_refused": 9}, {"SPE-KVM-9"}),
        ({"hidden": 2}, {"SPE-KVM-17"}),
        ({"injected_too_large": 2}, {"SPE-KVM-18"}),
        ({"copies": 9, "discarded_records": 2}, {"SPE-KVM-19"}),
        ({"stage2_fault": 2, "stage2_fault_bug": 2, "bug_told": 1}, {"SPE-KVM-12", "SPE-KVM-21"}),
        ({"leaked_by_bug": 2}, {"SPE-KVM-22"}),
        ({"copies": 9}, set()),
        # What is the guest's own business, or every machine's.
        ({"truncated": 9}, set()),
        ({"stage1_fault": 2, "injected_stage1": 2}, set()),
        ({"data_loss": 2, "stage1_fault": 2}, set()),
        ({"irqs": 9, "spurious": 2}, set()),
    ],
)
def test_observation_makes_erratum(counts: dict[str, int], expected: set[str]) -> None:
    found = reported(findings(**counts))
    assert set(found) == expected
    for erratum in found.values():
        assert erratum.count in counts.values()
        assert erratum.first_trace == {"replicate": 0}
        assert erratum.source


@pytest.mark.parametrize("spe_version", range(1, 7))
def test_external_abort_as_buffer_event_is_an_erratum_from_spev1p3_on(spe_version: int) -> None:
    found = reported(findings(spe_version=spe_version, injected_external=1))
    assert set(found) == ({"SPE-KVM-1"} if spe_version >= 4 else set())


def test_the_unseen_eret_matters_to_policies_that_act_when_profiling_is_enabled() -> None:
    found = findings(el0_only_fault=5)
    assert reported(found) == {}
    acting = reported(replace(found, facts={**found.facts, "hooks": ["profiling_enabled", "stage2_fault"]}))
    assert {erratum.id: erratum.count for erratum in acting.values()} == {"SPE-KVM-7": 5}


def test_a_late_interrupt_is_an_erratum_only_if_kvm_waits_for_an_exit() -> None:
    found = findings(irqs=7)
    assert reported(found) == {}
    late = reported(replace(found, facts={**found.facts, "irq_delivery": "next_exit"}))
    assert set(late) == {"SPE-KVM-14"}


def test_blame_for_gaps_follows_the_majority_of_causes() -> None:
    assert reported(findings(stage2_fault=10, stage2_fault_host=6))["SPE-KVM-12"].blame == "host"
    assert reported(findings(stage2_fault=10, stage2_fault_host=4))["SPE-KVM-12"].blame == "kvm"


def test_on_bare_metal_only_the_drivers_silence_is_reported_and_the_guest_is_to_blame() -> None:
    found = reported(findings(virtualized=False, silent_fatal=1, fatal=1, stage1_fault=1, data_loss=1, irqs=5))
    assert {erratum.id: erratum.blame for erratum in found.values()} == {"SPE-KVM-5": "guest"}


def test_thrown_away_records_make_data_loss_severe() -> None:
    mild = reported(findings(stage2_fault=1, data_loss=1))["SPE-KVM-13"]
    severe = reported(findings(stage2_fault=1, data_loss=1, discarded_records=40))["SPE-KVM-13"]
    assert (mild.severity, severe.severity) == ("medium", "high")
    assert severe.effect_on_profile.startswith("40 records")


def test_a_refused_session_is_worse_than_a_refused_page() -> None:
    page = reported(findings(pin_refused=9))["SPE-KVM-9"]
    session = reported(findings(pin_refused=9, refused=2))["SPE-KVM-9"]
    assert (page.severity, page.count) == ("medium", 9)
    assert (session.severity, session.count) == ("high", 2)
    assert "8 MiB" in page.trigger  # 2048 pages


@pytest.mark.parametrize("spe_version", VERSIONS)
def test_the_version_decides_whether_an_external_abort_event_is_an_erratum(spe_version: int) -> None:
    """Told by KVM: legal where an implementation may report external aborts to the SPU (spe.md rule 42)."""
    told = reported(findings(spe_version=spe_version, injected_external=1))
    legal = AbortReport.TO_SPU in VERSIONS[spe_version].aborts
    assert ("SPE-KVM-1" in told) == (not legal) == (spe_version >= 4)


@pytest.mark.parametrize("way", ExternalAbort)
def test_an_external_abort_that_pmbsr_does_not_show_is_an_erratum(way: ExternalAbort) -> None:
    base = scenario()
    found = replace(
        findings(external_abort=3, serror=3 if way == ExternalAbort.SERROR else 0),
        facts=facts(replace(base, cpu=replace(base.cpu, external_abort=way))),
    )
    assert ("SPE-HW-1" in reported(found)) == (way in (ExternalAbort.IGNORED, ExternalAbort.SERROR))
