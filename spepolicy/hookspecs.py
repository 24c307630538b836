"""The contract between spepolicy and its plugins. A plugin author needs to read this file only.

Order of calls in one run
-------------------------
1. `supports`, `virtualization`, `ownership`, `physical_addressing`, `traps`, `notifier_filter`
                                                       once, when the run is set up
2. `vm_created`                                        once per batch, before the first vCPU runs
3. `buffer_announced`, `buffer_enabled`, `profiling_enabled`, `user_profiling_armed`, `eret`, `profiling_disabled`,
   `buffer_disabled`, `timer`, `stage2_fault`, `migration_started`, `migration_finished`; with `Ownership.KVM` also
   `own_buffer_full` and `buffer_stopping`
                                                       once per batch each time vCPUs reach that point
4. `vm_destroyed`                                      once per batch, when guests have ended
5. `errata`                                            once, when the judge has finished
6. `report_errata`                                     once, with all findings

A *batch* holds vCPUs of many VMs ("lanes") that reached the same point; everything about it is an array over the batch.
Policies may not call each other, may not keep state outside `vcpus.state` (a row a vCPU, dtype declared as `State` on
the plugin), and see what KVM would see: registers, the results of walks that they paid for, their own state. One run
has exactly one policy. Reporters and observers may be many.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spepolicy.batch import Vcpus, Vms
    from spepolicy.explore.added import AddedProperty
    from spepolicy.judge.errata import Erratum, Findings
    from spepolicy.machine.hostops import Notifier

__all__ = ["Cause", "Event", "Failure", "Ownership", "Platform", "Trap", "doc", "hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("spepolicy")
hookimpl = pluggy.HookimplMarker("spepolicy")


class Trap(IntFlag):
    """Which guest accesses trap to KVM. The hardware traps registers in two groups only (spe.md 1.11)."""

    NONE = 0
    PMB = 1  # MDCR_EL2.E2PB = 0b10: PMBLIMITR_EL1, PMBPTR_EL1, PMBSR_EL1
    PMS = 2  # MDCR_EL2.TPMS = 1: PMSCR_EL1, PMSICR_EL1, PMSIRR_EL1, PMSFCR_EL1, PMSEVFR_EL1, PMSLATFR_EL1


class Ownership(IntEnum):
    """Whose the profiling buffer is while the guest runs: MDCR_EL2.E2PB (spe.md 1.11)."""

    GUEST = 0  # 0b10 or 0b11: EL1 owns it, the SPU writes through the guest's stage 1 and KVM's stage 2
    KVM = 1  # 0b00: EL2 owns it, the SPU writes to a buffer of KVM's; accesses to PMB* trap and are emulated
    NOBODY = 2  # 0b00 and TPMS, accesses are UNDEFINED: the guest has no SPE


@dataclass(frozen=True)
class Platform:
    """What KVM and its VMM know of the machine before a VM is created: `supports` judges by it."""

    spe_version: int  # ID_AA64DFR0_EL1.PMSVer, 1..6
    fine_grained_traps: bool  # FEAT_FGT: ERET and PMBIDR_EL1 can be trapped
    max_record_bytes: int  # 1 << PMSIDR_EL1.MaxSize
    fixed_size_records: bool  # PMSIDR_EL1.MaxSize = PMBIDR_EL1.Align
    vcpus: int
    memory_pages: int  # guest RAM, 4 KiB pages
    memlock_pages: int | None  # RLIMIT_MEMLOCK of the VMM, None: CAP_IPC_LOCK
    guest_memfd: bool  # the kernel can back a VM by a guest_memfd and map it before the VM runs
    paravirtual_guest: bool  # the guest's SPE driver announces its buffers
    physical_addressing: bool  # FEAT_SPE_nVM: PMBLIMITR_EL1.nVM exists
    numa_balancing: bool  # the host's kernel scans for NUMA balancing
    ksm: bool  # the host merges equal pages


class Event(IntEnum):
    """What KVM may tell the guest in PMBSR_EL1 (kvm.md 2.4)."""

    STAGE1_ABORT = 1  # EC 0x24, translation fault: "your buffer is not mapped"
    STAGE2_ABORT = 2  # EC 0x25 as the hardware reported it
    EXTERNAL_ABORT = 3  # EC 0x24, FSC 0x10, EA: not allowed from SPEv1p3 on
    IMPDEF = 4  # EC 0x1f, IMPLEMENTATION DEFINED buffer management event
    BUFFER_FULL = 5  # EC 0, BSC 1: with Ownership.KVM, once the guest's buffer is full
    TOO_LARGE = 6  # EC 0, BSC 4: larger than PMBIDR_EL1.MaxBuffSize (spe.md 1.8)


class Failure(IntEnum):
    """What KVM may do about a fault besides showing an `Event` (kvm.md 2.4). None of them is shipped as a default."""

    SERROR = 1  # E3: an SError to the core; the guest's kernel panics
    DISABLE = 2  # E5: no SPE for this guest from now on, which it is not told
    RUN_ERROR = 3  # E6: KVM_RUN fails; the VMM ends the VM
    IGNORE = 4  # E7: the guest sees PMBSR_EL1 as the hardware left it
    COLLISION = 5  # E10: go on, and mark the gap as a collision (PMBSR_EL1.COLL)
    HOST_PANIC = 6  # E11
    SIDEBAND = 7  # E12: go on, and tell the guest of the blackout by a channel of its own


class Cause(IntEnum):
    """What a policy may claim, and what the judge knows, to be the reason for a stage 2 fault."""

    UNKNOWN = 0
    NOT_PINNED = 1  # nothing wrong: the policy had not pinned or mapped the page yet
    GUEST = 2  # the guest changed its translations
    HOST = 3  # the host's memory management or the VMM took the page
    KVM_BUG = 4
    MIGRATION = 5


def doc(
    text: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
    source: str = "",
) -> dict[str, Any]:
    """Describe a field of a policy dataclass: `field(default=..., metadata=doc("what it does", unit="pages",
    minimum=0))`.

    The description is shown by `python -m spepolicy +policy=NAME --help`; *minimum*, *maximum* and *choices* are
    checked before a run starts.
    """
    return {
        "doc": text,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "choices": tuple(choices),
        "source": source,
    }


class PolicySpec:
    """Hooks that a policy may implement. All but `stage2_fault` are optional."""

    # ---- set-up: once per run ---------------------------------------------------------------------------------------

    @hookspec(firstresult=True)
    def virtualization(self) -> bool | None:
        """Say whether the workload runs in a VM at all. Once per run. Only a bare-metal baseline returns False.

        With False there is no stage 2, no trap, no exit and no host event, and no other hook of this policy is called.
        """

    @hookspec(firstresult=True)
    def supports(self, platform: Platform) -> str | None:
        """Say why this policy cannot run on *platform*, in a phrase; None: it can. Once per run, before anything else.

        A policy that cannot run is not simulated: a single run is an error with this reason, a table prints it.
        """

    @hookspec(firstresult=True)
    def ownership(self) -> Ownership | None:
        """Return who owns the profiling buffer (`Ownership`). Once per run. No implementation means `Ownership.GUEST`.

        With `Ownership.KVM` PMB* trap in any case, `own_buffer_full` and `buffer_stopping` must be implemented, and
        the registers that a batch shows are KVM's shadows: what the guest wrote and reads. With `Ownership.NOBODY`
        no other hook is called but `errata`.
        """

    @hookspec(firstresult=True)
    def physical_addressing(self) -> bool | None:
        """Say whether the guest may bypass stage 1 with PMBLIMITR_EL1.nVM=1: PMSCR_EL2.EnVM. Once per run. None: no.

        Needs FEAT_SPE_nVM, and has an effect on guests whose driver asks for it (`guest.physical_buffer`): for them
        PMBIDR_EL1.AddrMode reads 1, and what a batch shows as addresses of the buffer are intermediate physical
        addresses (`vcpus.physical`). Stage 2 applies as ever. Without effect where the guest does not own its buffer.
        """

    @hookspec(firstresult=True)
    def traps(self) -> Trap | None:
        """Return which register groups trap (`Trap`). Once per run. No implementation means `Trap.NONE`.

        A hook that follows a register write (`buffer_enabled`, `profiling_enabled`, `buffer_disabled`) is called only
        if that register traps: KVM does not see the others.
        """

    @hookspec(firstresult=True)
    def notifier_filter(self) -> Notifier | None:
        """Return the MMU notifier events that KVM ignores for pages which this policy holds pinned. Once per run.

        An ignored event leaves the stage 2 entry in place even though the host has changed its own mapping, which
        avoids a fault and risks *silent divergence*. No implementation means that every event is honoured, as mainline
        does.
        """

    # ---- pinning ----------------------------------------------------------------------------------------------------

    @hookspec
    def vm_created(self, vms: Vms) -> None:
        """The VMM has set up its VM, no vCPU has run. Once per batch of VMs. `vms` offers `pin_all()`.

        Time spent here delays the start of the VM; it is not stolen from a running vCPU, but reported as start-up time.
        """

    @hookspec
    def buffer_announced(self, vcpus: Vcpus) -> None:
        """A paravirtual guest has mapped a new AUX ring and tells KVM by a hypercall. Once per batch.

        `vcpus.announced_lo` and `announced_hi` are its range; the ring announced before is gone. Only guests with
        `guest.paravirtual` call; each call costs a trap. The guest waits.
        """

    @hookspec
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        """A trapped write just made ProfilingBufferEnabled() true (PMBLIMITR_EL1.E=1 and PMBSR_EL1.S=0). Once per
        batch.

        Needs `Trap.PMB`. The guest is stopped at the write; what the policy does here is charged to it.
        """

    @hookspec
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        """A trapped write just enabled profiling at the current exception level, EL1. Once per batch.

        That is: buffer enabled, and PMSCR_EL1.E1SPE set, after a write to PMSCR_EL1 (needs `Trap.PMS`) or to
        PMBLIMITR_EL1 or PMBSR_EL1 (needs `Trap.PMB`). NOT called for {E0SPE,E1SPE} = {1,0}: there profiling becomes
        enabled by the ERET to EL0, which KVM does not see.
        """

    @hookspec
    def user_profiling_armed(self, vcpus: Vcpus) -> None:
        """A trapped write left the buffer enabled with {E0SPE,E1SPE} = {1,0}. Once per batch.

        Profiling is not enabled yet: the next ERET to EL0 will do that, unseen unless its trap is armed
        (`vcpus.trap_eret`). Needs `Trap.PMS` for the write of PMSCR_EL1 and `Trap.PMB` for those of PMBLIMITR_EL1 and
        PMBSR_EL1.
        """

    @hookspec
    def eret(self, vcpus: Vcpus) -> None:
        """A return from EL1 to EL0 trapped. Once per batch. Needs FEAT_FGT and `vcpus.trap_eret(True)` before.

        While armed the trap takes *every* return to EL0, each at `costs.trap`.
        """

    @hookspec
    def timer(self, vcpus: Vcpus) -> None:
        """The timer that `vcpus.set_timer` started has fired. Once per batch. Timers count host time and fire once."""

    @hookspec
    def own_buffer_full(self, vcpus: Vcpus) -> None:
        """KVM's own buffer is full and the SPU has stopped. Once per batch, after the exit. `Ownership.KVM` only.

        Every vCPU must be answered: `start_own_buffer()` after `copy_out()` or `defer_copy()`, or `inject(Event)`.
        """

    @hookspec
    def buffer_stopping(self, vcpus: Vcpus) -> None:
        """The guest has drained and now clears PMBLIMITR_EL1.E; KVM stops its own buffer. `Ownership.KVM` only.

        Once per batch, before the guest reads PMBPTR_EL1. Every vCPU needs `copy_out()` or `defer_copy()`.
        """

    @hookspec
    def profiling_disabled(self, vcpus: Vcpus) -> None:
        """A trapped write just cleared PMSCR_EL1.{E0SPE,E1SPE} while the buffer was enabled. Once per batch. Needs
        `Trap.PMS`.

        The guest has NOT drained: its PSB CSYNC and DSB follow this write, and the record of an operation in flight is
        still to be written. A page that is let go here may be gone when the drain needs it (A. Elisei, 27 July 2022).
        NOT called where the SPU has stopped by itself, since then profiling was off before the write.
        """

    @hookspec
    def buffer_disabled(self, vcpus: Vcpus) -> None:
        """A trapped write just cleared PMBLIMITR_EL1.E; the guest has drained. Once per batch. Needs `Trap.PMB`."""

    @hookspec
    def vm_destroyed(self, vms: Vms) -> None:
        """The guests of this batch have ended. Once per batch. `vms` offers `unpin_all()`; pins that are left then are
        leaks.
        """

    # ---- live migration ---------------------------------------------------------------------------------------------

    @hookspec
    def migration_started(self, vms: Vms, vcpus: Vcpus) -> None:
        """The VMM has begun to migrate these VMs; for pre-copy the dirty log is on and stage 2 write-protected.
        Once per batch of VMs; *vcpus* are all vCPUs of *vms*, VM by VM. A policy takes those of the two that it needs.

        With handling=unlock_relock KVM has dropped every pin.
        """

    @hookspec
    def migration_finished(self, vms: Vms, vcpus: Vcpus) -> None:
        """These VMs are about to run on the target, or go on at the source because the migration was given up. Once per
        batch of VMs, with *vms* and *vcpus* as for `migration_started`.

        On the target stage 2 is empty and nothing is pinned (`vcpus.pinned_pages` is 0), whatever the policy's state
        says. Time spent here on a vCPU prolongs its downtime.
        """

    # ---- fault handling ---------------------------------------------------------------------------------------------

    @hookspec
    def stage2_fault(self, faults: Vcpus) -> None:
        """The SPU took a stage 2 fault: PMBSR_EL1.S=1, EC=0x25, profiling has stopped. Once per batch, after the exit.

        Every vCPU in the batch must be answered: `resume()` after the mapping was repaired, or `inject(Event)`. One
        that is not answered is an error (`HookError`). `faults.pmbptr` is the faulting VA, `faults.fault_status` the
        FSC, `faults.data_loss` PMBSR_EL1.DL. Whether the cause was the guest, the host or KVM is not to be seen. A
        policy may `claim(Cause)`; the judge compares.
        """

    # ---- erratum reporting: the policy's own part
    # ---------------------------------------------------------------------

    @hookspec
    def errata(self) -> Sequence[Erratum] | None:
        """Return the limitations that this policy documents, whether or not they occurred. Once per run."""


class ReporterSpec:
    """Hooks of erratum reporters. All implementations are called; results are concatenated."""

    @hookspec
    def report_errata(self, findings: Findings) -> Sequence[Erratum] | None:
        """Turn what the judge observed into errata. Once per run and policy.

        `findings` is read-only: the policy's name, the SPE version, and for each kind of observation the count and its
        first occurrence. An exception is logged with the plugin's name and does not lose the results.
        """


class ExplorerSpec:
    """Hooks of plugins that add to `task=explore`. All implementations are called; results are concatenated."""

    @hookspec
    def explore_properties(self) -> Sequence[AddedProperty] | None:
        """Return properties that must hold in every state of an exploration. Once per policy that is explored.

        Each is a `spepolicy.explore.added.AddedProperty`: a name, the rule, its source, and a function that is given a
        batch of n states and returns bool[n], True where the property is broken. It is called once per batch of new
        states, and may read all of them; the shortest trace to a state where it is broken is reported.
        """


class ObserverSpec:
    """Hooks that watch. All implementations are called; return values are ignored."""

    @hookspec
    def run_finished(self, report: Any) -> None:
        """A run is complete and stored. Once per run. `report` is a `spepolicy.lab.run.Report`, read-only.

        An exception is logged with the plugin's name and does not lose the results.
        """
