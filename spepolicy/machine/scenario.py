"""What defines one lane, as plain integers: the boundary between configuration and machine.

Times are picoseconds (`_ps`), sizes are 4 KiB pages (`_pages`) or bytes (`_bytes`), probabilities are out of 2**16
(`_q16`). Nothing here knows Hydra; `spepolicy.config` turns a composed configuration into these records, and
`spepolicy.machine.build` turns these records into lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

import numpy as np
from numpy.typing import NDArray

from spepolicy.machine.data_addresses import DataAddresses
from spepolicy.machine.hostops import Backing, Kernel

__all__ = [
    "ABSENT",
    "WROTE",
    "Bug",
    "Costs",
    "Cpu",
    "ExternalAbort",
    "Guest",
    "GuestDriver",
    "Handling",
    "Host",
    "HostKind",
    "IrqDelivery",
    "Kvm",
    "Migration",
    "MigrationKind",
    "OpType",
    "Scenario",
    "SessionMode",
    "Workload",
]

PAGE_BYTES = 4096


class SessionMode(IntEnum):
    """How the guest's perf opened the SPE event."""

    PER_TASK = 0  # enabled only while the profiled task is on the CPU
    PER_CPU = 1  # enabled until closed


class HostKind(IntEnum):
    """Where the host's memory management events come from."""

    SILENT = 0
    RANDOM = 1
    RECORDED = 2


class GuestDriver(IntEnum):
    """Whose SPE driver the guest has: spepolicy.machine.linux_spe and other_drivers."""

    LINUX = 0
    FREEBSD = 1
    WINDOWS = 2


class MigrationKind(IntEnum):
    """How the VM is migrated, if at all."""

    NONE = 0
    PRECOPY = 1  # pages are sent while the guest runs, and again if it writes to them; then it stops for the rest
    POSTCOPY = 2  # the guest stops at once and goes on at the target, where its pages follow


class Handling(IntEnum):
    """What KVM does with SPE during a migration (kvm.md 2.3, M1 to M9)."""

    PLAIN = 0  # nothing: buffer pages are write-protected for the log like any page
    NOT_MAPPED = 1  # M1: pages of slots that log are not pinned and mapped for SPE
    REFUSE = 2  # M2: the log cannot be turned on while a vCPU has SPE on
    EXIT_ON_ENABLE = 3  # M3: as M2, and KVM exits to the VMM when a vCPU turns SPE on while the log is on
    STOP_TRAP = 4  # M4: SPE is off and the guest does not see it (KVM_ARM_VCPU_SPE_STOP_TRAP)
    STOP_EXIT = 5  # M5: no entry with SPE on; KVM exits to the VMM (KVM_ARM_VCPU_SPE_STOP_EXIT)
    REPORT_DIRTY = 6  # M6: pinned pages are not write-protected, and reported dirty until the vCPUs stop
    PREFAULT_TARGET = 7  # M7: buffer and tables are mapped on the target before the vCPUs run
    EXIT_WHILE_LOGGING = 8  # M8: log on and buffer enabled: exit to the VMM
    UNLOCK_RELOCK = 9  # M9: unpin everything and stop SPE as M4; pin again when it is over
    UNREPORTED = 10  # a bug: pinned pages are not write-protected, and not reported either (kvm.md 4.4 L2)


# Bits of a page in Machine.dirty. KVM's own log is a bit of its word in Machine.host_page.
WROTE = 2  # judge only: the SPU has written to it since the log was last read
ABSENT = 4  # post-copy: still at the source


class IrqDelivery(IntEnum):
    """How KVM learns of a buffer management interrupt (kvm.md 2.5: I4 and I3)."""

    FORCED_EXIT = 0  # the physical PMBIRQ makes the vCPU exit
    NEXT_EXIT = 1  # KVM looks at PMBSR_EL1 at the next exit, whatever its reason


class Bug(IntEnum):
    """A bug of KVM, injected to see whether it can be told from a legitimate fault."""

    NONE = 0
    SKIP_PAGE = 1  # a page is left out while its range is pinned and mapped; KVM's list says that it is in
    LEAK_PIN = 2  # a page stays pinned when its set is unpinned
    MISSED_NOTIFIER = 3  # an MMU notifier does not unmap a page at stage 2


class OpType(IntFlag):
    """Operation types as the bits of PMSFCR_EL1's type filter, shifted down (spe.md rule 20: B 0, LD 1, ST 2)."""

    OTHER = 0
    BRANCH = 1
    LOAD = 2
    STORE = 4
    FP = 8  # FEAT_SPE_EFT
    SIMD = 16


class ExternalAbort(IntEnum):
    """How the implementation shows an external abort on a buffer write (rule 42; which of them a version allows is in
    `spepolicy.arch.versions`).
    """

    IGNORED = 0
    SERROR = 1
    MMU_FAULT = 2  # of a translation table walk: FSC 0b0101LL
    SYNCHRONOUS = 3  # reported to the SPU: EA=1, PMBPTR_EL1 is the address
    ASYNCHRONOUS = 4  # reported to the SPU: EA=1, DL=1, PMBPTR_EL1 says nothing


@dataclass(frozen=True)
class Cpu:
    """The processor: clock and SPE implementation."""

    spe_version: int = 1  # ID_AA64DFR0_EL1.PMSVer, 1..6 (spe.md 1.1)
    cycle_ps: int = 333  # one CPU cycle
    max_record_bytes: int = 64  # 1 << PMSIDR_EL1.MaxSize
    align_bytes: int = 64  # 1 << PMBIDR_EL1.Align; equal to max_record_bytes means fixed-size records
    counter_bits: int = 12  # PMSIDR_EL1.CountSize: latency counters saturate
    hardware_access_flag: bool = True  # PMBIDR_EL1.F: the SPU honours VTCR_EL2.HA / TCR_EL1.HA
    data_loss_at_boundary: bool = False  # RYZJQX: DL on a fault at a record boundary is IMPLEMENTATION DEFINED
    tlb_entries: int = 16  # SPU TLB entries, direct mapped, power of two
    irq_latency_ps: int = 1_000_000  # S=1 until the core takes PMBIRQ (asynchronous, profiling is already off)
    fine_grained_traps: bool = False  # FEAT_FGT: KVM can trap ERET and PMBIDR_EL1
    features: tuple[str, ...] = ()  # names of spepolicy.arch.versions.OPTIONAL
    external_abort: ExternalAbort = ExternalAbort.SYNCHRONOUS
    external_abort_every: int = 0  # mean number of record writes between external aborts; 0: none
    late_fault_samples: int = 0  # samples after a faulting one that are taken and lost before it is reported (v1p5)
    pick_granule_ops: int = 1  # the sampled operation is one of this many in a row: the first (see machine.pick)
    store_slip_q16: int = 0  # probability that the sample of a store is given to a later operation
    store_slip_granules: int = 1  # at most so many granules later


@dataclass(frozen=True)
class Guest:
    """The VM's guest: its memory, and how its perf uses SPE (model of Linux drivers/perf/arm_spe_pmu.c)."""

    vcpus: int = 1
    ram_pages: int = 65536  # guest RAM, power of two, at IPA ram_base
    ram_base: int = 0x4000_0000
    buffer_pages: int = 1024  # AUX ring of each vCPU, power of two, 4..16384
    buffer_mapped: bool = True  # stage 2 maps the AUX pages at the start: the kernel zeroed them when it allocated them
    driver: GuestDriver = GuestDriver.LINUX
    session: SessionMode = SessionMode.PER_TASK
    profile_user: bool = True  # PMSCR_EL1.E0SPE
    profile_kernel: bool = True  # PMSCR_EL1.E1SPE
    period_ops: int = 4096  # PMSIRR_EL1.INTERVAL * 256; a multiple of 256
    jitter: bool = True  # PMSIRR_EL1.RND
    type_filter: int = 0  # OpType bits; 0: no type filter
    event_filter: int = 0  # PMSEVFR_EL1 bits that must all be set; 0: no event filter
    min_latency_cycles: int = 0  # PMSLATFR_EL1.MINLAT; 0: no latency filter
    type_mask: int = 0  # OpType bits of type_filter that must all be as it says (FEAT_SPE_EFT)
    inverted_event_filter: int = 0  # PMSNEVFR_EL1 bits that must all be clear (FEAT_SPE_FnE); 0: off
    data_source_filter: int = 0  # PMSDSFR_EL1: loads from these sources only (FEAT_SPE_FDS); 0: off
    discard: bool = False  # PMBLIMITR_EL1.FM = discard: samples are counted by the PMU and not written (SPEv1p2)
    physical_addresses: bool = False  # PMSCR_EL1.PA, perf's pa_enable
    context: bool = False  # PMSCR_EL1.CX: CONTEXTIDR_EL1, with CONFIG_PID_IN_CONTEXTIDR
    task_on_ps: int = 4_000_000_000  # mean time the profiled task runs before it is switched out
    task_off_ps: int = 1_000_000_000  # mean time the other task runs
    start_ps: int = 1_500_000  # guest instructions of arm_spe_pmu_start, without traps
    stop_ps: int = 1_500_000  # guest instructions of arm_spe_pmu_stop, without traps
    irq_entry_ps: int = 1_000_000  # guest exception entry until the handler reads PMBSR_EL1
    irq_handler_ps: int = 2_000_000  # rest of the handler
    reader_latency_ps: int = 200_000_000  # AUX wakeup until perf has the data
    reader_bytes_per_us: int = 1000  # perf copies the AUX data to its file at this rate
    paravirtual: bool = False  # the SPE driver tells KVM by a hypercall which buffer it is about to use
    physical_buffer: bool = False  # its driver uses PMBLIMITR_EL1.nVM, and a contiguous ring, where that is offered
    renew_ps: int = 0  # mean guest time between perf sessions: a new one has new AUX pages behind the same VA; 0: never
    # What the guest does that it should not, of each vCPU: (GuestAct, mean interval in ps of guest time or 0, guest
    # time in ps at which it happens once or 0, Moment, 1 with a TLBI, pages)
    acts: tuple[tuple[int, int, int, int, int, int], ...] = ()


@dataclass(frozen=True)
class Kvm:
    """KVM's behaviour apart from the policy."""

    exit_interval_ps: int = 100_000_000  # mean guest time between exits that have nothing to do with SPE; 0: none
    preempt_interval_ps: int = 20_000_000_000  # mean guest time between preemptions of the vCPU; 0: none
    preempt_ps: int = 1_000_000_000  # mean length of a preemption
    memlock_pages: int = 2048  # RLIMIT_MEMLOCK of the VMM
    memlock_unlimited: bool = False  # CAP_IPC_LOCK
    irq_delivery: IrqDelivery = IrqDelivery.FORCED_EXIT
    guest_memfd: bool = True  # the kernel can back a VM by a guest_memfd and map it before the VM runs
    bug: Bug = Bug.NONE
    bug_rate_q16: int = 655  # chance a page that the bug strikes


@dataclass(frozen=True)
class Costs:
    """What each thing that KVM does costs, in host time."""

    trap_ps: int = 2_000_000  # one trapped register access: exit, emulation, entry
    exit_ps: int = 2_000_000  # one exit and entry without SPE state
    spe_switch_ps: int = 300_000  # more per exit when SPE belongs to the guest: PSB CSYNC, DSB, MDCR_EL2
    event_ps: int = 1_000_000  # reading PMBSR and deciding, on top of the exit
    inject_ps: int = 500_000  # making the virtual PMBIRQ pending
    walk_read_ps: int = 100_000  # one descriptor read by KVM's software walk of the guest's stage 1
    pin_page_ps: int = 400_000  # pin_user_pages_fast for one resident page
    unpin_page_ps: int = 100_000
    map_page_ps: int = 500_000  # one stage 2 leaf, with the lock
    swap_in_ps: int = 60_000_000  # one page from swap
    copy_page_ps: int = 1_000_000  # break of a copy-on-write or KSM page
    copy_out_page_ps: int = 500_000  # 4 KiB of records from KVM's own SPE buffer to the guest's
    vmm_exit_ps: int = 20_000_000  # one exit to the VMM and back, with what it does there
    cpu_fault_ps: int = 4_000_000  # an ordinary stage 2 fault of the vCPU, when it zeroes new AUX pages


@dataclass(frozen=True)
class Host:
    """The host's memory management, as events on the lane's memory."""

    kind: HostKind = HostKind.SILENT
    # RANDOM: one row per operation: (HostOp, mean interval in ps of host time, pages per event)
    random_ops: tuple[tuple[int, int, int], ...] = ()
    # RECORDED: see spepolicy.recording.Recording
    recording: object | None = None
    time_scale_q16: int = 1 << 16  # recording seconds per simulated second, times 2**16
    kernel: Kernel = Kernel.V6_1  # whose measured effects hold
    backing: Backing = Backing.ANONYMOUS  # of the guest's memory
    locked: bool = False  # the VMM has mlocked it
    zone_movable: bool = False  # it is in ZONE_MOVABLE: a long-term pin moves a page out first


@dataclass(frozen=True)
class Migration:
    """One live migration of the VM, or none."""

    kind: MigrationKind = MigrationKind.NONE
    handling: Handling = Handling.PLAIN
    start_ps: int = 100_000_000_000  # host time at which the VMM begins
    bandwidth_bytes_per_us: int = 1000  # of the link, for memory
    max_downtime_ps: int = 300_000_000_000  # pre-copy stops when what is left can be sent in this time
    rounds: int = 30  # and after so many rounds whatever is left
    switch_ps: int = 20_000_000_000  # downtime for the state of vCPUs and devices
    dirty_bytes_per_us: int = 100  # the guest's CPUs dirty so much while the log is on, apart from SPE buffers
    working_set_pages: int = 16384  # and no more of them than these
    cancel_round: int = 0  # the VMM gives up after so many rounds; 0: never
    abort: bool = False  # what the VMM does on an exit because of SPE: give up, instead of holding the vCPU
    retry_ps: int = 10_000_000_000  # a migration that KVM refused is tried again after this
    request_ps: int = 200_000_000  # post-copy: one page on demand, there and back


@dataclass(frozen=True)
class Workload:
    """A program as phases over functions. All arrays are made by `spepolicy.workload`.

    A *distribution* is what an instruction stream looks like while one phase of the program, its system calls, the
    other task or the SPE driver runs. An *outcome* is one kind of operation: (function, type, events, latency).
    """

    function_names: tuple[str, ...]
    distribution_names: tuple[str, ...]
    op_ps: NDArray[np.int64]  # [D] mean time per operation (population member)
    alias_threshold: NDArray[np.int64]  # [D, 256] 0..2**24
    alias_outcome: NDArray[np.int64]  # [D, 256, 2] outcome below / at or above the threshold
    weight: NDArray[np.float64]  # [D, F] share of each function, sums to 1 per row
    outcome_function: NDArray[np.int64]  # [K]
    outcome_type: NDArray[np.int64]  # [K] OpType
    outcome_events: NDArray[np.int64]  # [K] Events packet bits
    outcome_latency_cycles: NDArray[np.int64]  # [K] shortest total latency
    outcome_spread_cycles: NDArray[np.int64]  # [K] mean of the exponential part added to it
    phase_user: NDArray[np.int64]  # [P] distribution at EL0 in each phase
    phase_kernel: NDArray[np.int64]  # [P] distribution of system calls in each phase
    phase_ps: NDArray[np.int64]  # [P] mean length of the phase
    syscall_gap_ps: NDArray[np.int64]  # [P] mean EL0 time between system calls
    syscall_ps: NDArray[np.int64]  # [P] mean length of a system call
    other_user: int = 0  # distribution of the task that is not profiled, EL0
    other_kernel: int = 0
    driver: int = 0  # distribution of the SPE driver itself
    # Loops: a distribution may be a loop body, executed over and over from its first operation. Empty: none is.
    loop_first: NDArray[np.int64] | None = None  # [D] index in loop_outcome of the body's first operation
    loop_length: NDArray[np.int64] | None = None  # [D] operations in the body; 0: no loop, draws from the alias table
    loop_outcome: NDArray[np.int64] | None = None  # [L] outcomes in program order
    data: DataAddresses | None = None  # of which the machine needs nothing; None: not known
    source: str = ""


@dataclass(frozen=True)
class Scenario:
    """All that defines a lane except policy and replicate."""

    workload: Workload
    duration_ps: int = 500_000_000_000  # guest-executed time per vCPU
    cpu: Cpu = field(default_factory=Cpu)
    guest: Guest = field(default_factory=Guest)
    kvm: Kvm = field(default_factory=Kvm)
    costs: Costs = field(default_factory=Costs)
    host: Host = field(default_factory=Host)
    migration: Migration = field(default_factory=Migration)
    seed: int = 1
