"""What the judge observed of one policy, counted from ground truth: the input of erratum reporters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.hookspecs import Cause
from spepolicy.judge.errata import Findings, Observation
from spepolicy.judge.lanes import lane_sum
from spepolicy.machine.scenario import HostKind, IrqDelivery, Scenario, SessionMode
from spepolicy.machine.state import NEVER, LostCause

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result

__all__ = ["OBSERVATIONS", "facts", "find"]

_UNSIGNED = (1 << 64) - 1  # registers are held as int64

_Counts = Callable[["Result"], NDArray[np.int64]]  # [N] or [N, V]


def _truth(name: str) -> _Counts:
    return lambda result: result.truth[name]


def _vm(name: str) -> _Counts:
    return lambda result: result.vm[name]


def _stage2_windows(result: Result) -> NDArray[np.int64]:
    """Blackout windows with a stage 2 cause, [N]."""
    causes = [cause for cause in LostCause if cause.name.startswith("STAGE2_")]
    lanes = result.windows["lane"][np.isin(result.windows["cause"], causes)]
    return np.bincount(lanes, minlength=len(result.replicates))


def _el0_only_faults(result: Result) -> NDArray[np.int64]:
    """Stage 2 faults of sessions that profile EL0 only, [N, V]: their enabling ERET is invisible to KVM (kvm.md G1)."""
    guest = result.scenario.guest
    faults: NDArray[np.int64] = result.truth["stage2_faults"]
    return faults if guest.profile_user and not guest.profile_kernel else np.zeros_like(faults)


def _hidden(result: Result) -> NDArray[np.int64]:
    """1 a vCPU whose guest has no SPE although its user wants to profile, [N, V]."""
    truth = result.truth
    refused = result.blackout_ps[:, :, LostCause.REFUSED] == truth["wanted_ps"]
    hidden: NDArray[np.int64] = ((truth["wanted_ps"] > 0) & (truth["sessions"] == 0) & refused).astype(np.int64)
    return hidden


def _claimed(claimed: Cause, true: Cause) -> _Counts:
    return lambda result: result.claims[:, claimed, true]


def _by_cause(cause: LostCause) -> _Counts:
    return lambda result: result.lost[:, :, cause]


OBSERVATIONS: dict[str, tuple[_Counts, str]] = {
    "stage2_fault": (_truth("stage2_faults"), "stage 2 faults of the SPU"),
    "stage2_fault_host": (_by_cause(LostCause.STAGE2_HOST), "samples lost because the host or the VMM took the page"),
    "stage2_fault_migration": (_by_cause(LostCause.STAGE2_MIGRATION), "samples lost because of a live migration"),
    "stage2_blackout": (_stage2_windows, "blackout windows that a stage 2 fault began"),
    "stage1_fault": (_truth("stage1_faults"), "stage 1 faults of the SPU"),
    "external_abort": (_truth("external_aborts"), "external aborts on buffer writes"),
    "serror": (_truth("serrors"), "of these, delivered as an SError"),
    "data_loss": (_truth("data_loss"), "buffer management events with DL=1"),
    "discarded_records": (_truth("discarded"), "records written, then thrown away because of DL"),
    "forged_loss": (_truth("forged_loss"), "DL=1 told to the guest although no record was cut"),
    "injected_stage1": (_truth("injected_stage1"), "events told to the guest as a stage 1 abort (EC 0x24)"),
    "injected_stage2": (_truth("injected_stage2"), "events told to the guest as a stage 2 abort (EC 0x25)"),
    "injected_external": (_truth("injected_external"), "events told to the guest as an external abort (FSC 0x10, EA)"),
    "injected_impdef": (_truth("injected_impdef"), "events told to the guest as IMPLEMENTATION DEFINED (EC 0x1f)"),
    "fatal": (_truth("fatal"), "events that the guest's driver answered by switching SPE off"),
    "silent_fatal": (_truth("silent_fatal"), "of these, without any AUX flag: perf does not know"),
    "truncated": (_truth("truncated"), "AUX handles closed with PERF_AUX_FLAG_TRUNCATED"),
    "spurious": (_truth("spurious"), "PMBIRQ taken with PMBSR_EL1.S=0"),
    "irqs": (_truth("irqs"), "PMBIRQ taken by the core"),
    "el0_only_fault": (_el0_only_faults, "stage 2 faults while {E0SPE,E1SPE} = {1,0}"),
    "diverged_records": (_truth("diverged_records"), "records written to pages that the VMM's address does not show"),
    "resumed_cut": (_truth("resumed_cut"), "faults with DL=1 that KVM resumed: a cut record stays in the stream"),
    "refused": (_truth("refused"), "sessions that the policy refused before the SPU wrote"),
    "pin_refused": (_vm("pin_refused"), "pages that the memlock limit kept from being pinned"),
    "external_aborts": (_truth("external_aborts"), "writes of the SPU that a device answered with an abort"),
    "forged": (_truth("forged"), "PMBSR_EL1 written by the guest with S=1"),
    "stray_records": (_truth("stray_records"), "records written where the guest's tables no longer point"),
    "migration_refused": (_vm("migration_refused"), "times that a migration could not begin because SPE was on"),
    "unlogged_pages": (_vm("migration_unlogged"), "pages that the SPU wrote to and the dirty log did not tell"),
    "vmm_exits": (_truth("vmm_exits"), "exits to the VMM because of SPE"),
    "stale_pins": (_vm("stale_pins"), "pinned pages that the host replaced behind the pin"),
    "pins_leaked": (_vm("pinned_pages"), "pins that KVM still held when the VM was gone"),
    "hidden": (_hidden, "vCPUs whose guest was shown no SPE although it wanted to profile"),
    "injected_too_large": (_truth("injected_too_large"), "buffers refused for their size (BSC 4)"),
    "copies": (_truth("copies"), "times that KVM copied its own buffer out to the guest's"),
    "stage2_fault_bug": (_by_cause(LostCause.STAGE2_KVM_BUG), "samples lost because of an injected bug of KVM"),
    "bug_told": (_claimed(Cause.KVM_BUG, Cause.KVM_BUG), "faults by a bug of KVM that the policy called so"),
    "leaked_by_bug": (_vm("leaked_pins"), "pins that KVM forgot because of an injected bug"),
    "notifier_ignored": (_vm("notifier_ignored"), "MMU notifier events that the policy's filter ignored"),
}
"""Name -> (count a lane or a vCPU, what it counts)."""


def facts(scenario: Scenario, hooks: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a reporter may need to know of the scenario, as plain values; *hooks*: the policy's."""
    cpu, guest, kvm = scenario.cpu, scenario.guest, scenario.kvm
    return {
        "vcpus": guest.vcpus,
        "buffer_pages": guest.buffer_pages,
        "session": SessionMode(guest.session).name.lower(),
        "profile_user": guest.profile_user,
        "profile_kernel": guest.profile_kernel,
        "fixed_size_records": cpu.max_record_bytes == cpu.align_bytes,
        "data_loss_at_boundary": cpu.data_loss_at_boundary,
        "hardware_access_flag": cpu.hardware_access_flag,
        "external_abort": cpu.external_abort.name.lower(),
        "spe_features": list(cpu.features),
        "irq_delivery": IrqDelivery(kvm.irq_delivery).name.lower(),
        "memlock_pages": kvm.memlock_pages,
        "memlock_unlimited": kvm.memlock_unlimited,
        "host": HostKind(scenario.host.kind).name.lower(),
        "seed": scenario.seed,
        "hooks": list(hooks),
    }


def find(result: Result, *, virtualized: bool, hooks: Sequence[str] = ()) -> Findings:
    """Count everything in `OBSERVATIONS` over the lanes of *result*, all of which have finished.

    :param virtualized: False for a bare-metal baseline, which has no stage 2 and no KVM (hook `virtualization`).
    :param hooks: names of the hooks that the policy implements.
    """
    observations = {name: _observe(result, name, count(result)) for name, (count, _) in OBSERVATIONS.items()}
    return Findings(
        policy=result.policy,
        spe_version=result.scenario.cpu.spe_version,
        virtualized=virtualized,
        replicates=len(result.replicates),
        guest_s=float(result.vcpu["now_ps"].sum()) / 1e12,
        wanted_s=float(lane_sum(result, "wanted_ps").sum()) / 1e12,
        facts=facts(result.scenario, hooks),
        observations=observations,
    )


def _observe(result: Result, name: str, counts: NDArray[np.int64]) -> Observation:
    by_lane = counts.sum(axis=1) if counts.ndim == 2 else counts
    lanes = np.flatnonzero(by_lane)
    if len(lanes) == 0:
        return Observation()
    lane = int(lanes[0])
    first: dict[str, Any] = {"replicate": int(result.replicates[lane])}
    if counts.ndim == 2:
        vcpu = int(np.flatnonzero(counts[lane])[0])
        first["vcpu"] = vcpu
        if name == "stage2_fault":
            first |= _first_fault(result.truth[lane, vcpu])
    return Observation(int(by_lane.sum()), len(lanes), first)


def _first_fault(truth: np.void) -> dict[str, Any]:
    if truth["first_fault_ps"] >= NEVER:
        return {}
    return {
        "host_time_us": round(int(truth["first_fault_ps"]) / 1e6, 3),
        "va": f"0x{int(truth['first_fault_va']) & _UNSIGNED:x}",
        "pmbsr": f"0x{int(truth['first_fault_syndrome']) & _UNSIGNED:x}",
    }
