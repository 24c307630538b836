"""The arrays of a batch of lanes, and the words for what happens in them: causes of loss, hooks, segments.

The fields of the rows are in spepolicy.machine.fields.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

NEVER = 1 << 62  # ps, a time that does not come
LOST_CAUSES = 12  # of them, see LostCause
# Flags of an SPU TLB entry.
DIVERGED = 1  # stage 2 has another page than the VMM's address shows
STRAY = 2  # the guest's own tables no longer say the same
WINDOW_LOG = 128  # blackout windows of a lane that are logged before the driver has to collect them


class LostCause(IntEnum):
    """Why a blackout began, or a sample was lost."""

    BUFFER_FULL = 0
    STAGE1_FAULT = 1
    STAGE2_NOT_PINNED = 2
    STAGE2_GUEST = 3
    STAGE2_HOST = 4
    STAGE2_KVM_BUG = 5
    RING_FULL = 6  # perf did not read in time: no space in the AUX ring
    REFUSED = 7  # the policy told the guest that it cannot profile
    STAGE2_MIGRATION = 8  # live migration: write-protected for dirty logging, or not there yet on the target
    MIGRATION = 9  # live migration: KVM or the VMM switched SPE off for it
    GUEST_ERROR = 10  # the guest programmed the SPU in a way that stops it
    EXTERNAL_ABORT = 11  # the memory system refused the write


class Hook(IntEnum):
    """Points at which the machine waits for the policy. Bit 1 << value of `PARAMS.hooks` says whether it is
    implemented.
    """

    NONE = 0
    VM_CREATED = 1
    BUFFER_ENABLED = 2
    PROFILING_ENABLED = 3
    BUFFER_DISABLED = 4
    STAGE2_FAULT = 5
    VM_DESTROYED = 6
    LOG_FULL = 7  # not a hook: the driver empties the window log
    USER_PROFILING_ARMED = 8
    ERET = 9
    OWN_BUFFER_FULL = 10
    BUFFER_STOPPING = 11
    TIMER = 12
    BUFFER_ANNOUNCED = 13
    MIGRATION_STARTED = 14
    MIGRATION_FINISHED = 15
    PROFILING_DISABLED = 16


class Segment(IntEnum):
    """What a vCPU executes. Program segments can be interrupted, driver segments run with interrupts masked."""

    USER = 0
    KERNEL = 1
    STOP = 2  # arm_spe_pmu_stop, on the way out of the profiled task
    START = 3  # arm_spe_pmu_start, up to PMBLIMITR_EL1.E=1
    START_SAMPLING = 4  # up to PMSCR_EL1
    IRQ_ENTRY = 5  # exception entry until PMBSR_EL1 is read
    IRQ_HANDLER = 6  # the rest
    DONE = 7


class Machine(NamedTuple):
    """The arrays of a batch of N lanes with V vCPUs each. Workload and recording are shared by all lanes."""

    par: NDArray[np.void]  # PARAMS[N]
    vm: NDArray[np.void]  # VM[N]
    regime: NDArray[np.void]  # spepolicy.mmu.regime.STAGE[N, 4]: what the translation registers of the lane say
    walk: NDArray[np.void]  # spepolicy.mmu.walker.STATE[N]: the walk that an SPU of the lane did last
    vcpu: NDArray[np.void]  # VCPU[N, V]
    truth: NDArray[np.void]  # TRUTH[N, V]
    window: NDArray[np.void]  # WINDOW[N, WINDOW_LOG]
    log: Ints  # [N, C, 5] event log, rows of spepolicy.machine.trace.LOG; C = 0: no log
    lost: Ints  # [N, V, LOST_CAUSES] samples lost by cause
    blackout_ps: Ints  # [N, V, LOST_CAUSES] guest time wanted and not active, by cause
    claims: Ints  # [N, 6, 6] stage 2 faults by claimed and true Cause
    host_ops: Ints  # [N, len(HostOp)] host operations applied, by HostOp
    host_calls: Ints  # [N, 12] calls of the host that reach KVM: MMU notifier events 0..7, age, change_pte, and without
    # a notifier dirty logging's write protection and the removal of a memslot
    exposure_ps: Ints  # [N, V, D] wanted guest time by distribution
    seen: Ints  # [N, V, F] records kept, by function
    unseen: Ints  # [N, V, F] records written since the handle was opened, by function
    tlb: Ints  # [N, V, E, 4] virtual page or -1, host frame, IPA page, flags
    pins: NDArray[np.int32]  # [N, V, 2, pages] guest page numbers that KVM holds pinned
    pool: Ints  # [N, P, 512] table pages: descriptors of both stages
    pool_refs: NDArray[np.int32]  # [N, P] valid entries in a stage 2 table page
    frames: Ints  # [N, H] hash of spepolicy.mmu.memory: which table page a host frame holds
    dirty: NDArray[np.uint8]  # [N, ram_pages, or 1 without migration] bits of spepolicy.machine.scenario
    host_page: Ints  # [N, ram_pages] the VMM's page table: see spepolicy.machine.host. Last array that belongs to lanes
    # workload (spepolicy.machine.scenario.Workload)
    op_ps: Ints
    alias_threshold: Ints
    alias_outcome: Ints
    outcome_function: Ints
    outcome_type: Ints
    outcome_events: Ints
    outcome_latency: Ints
    outcome_spread: Ints
    loop_first: Ints
    loop_length: Ints
    loop_outcome: Ints
    phase: Ints  # [P, 5] user, kernel distribution, length, syscall gap, syscall length
    roles: Ints  # [3] distributions: other user, other kernel, driver
    # host events
    rec_ps: Ints  # RECORDED: time of each event in recording picoseconds
    rec_first: NDArray[np.int32]
    rec_end: NDArray[np.int32]
    rec_op: NDArray[np.uint8]  # HostOp, plus 0x80 for a write by the CPU
    random_op: Ints  # [R, 3] HostOp, mean interval ps, pages
    act: Ints  # [A, 6] GuestAct, mean interval ps or 0, guest time ps or 0, Moment, 1 with TLBI, pages
    effect_table: Ints  # spepolicy.machine.effects: [huge, HostOp, state, COLUMNS]
    exponential: Ints  # see spepolicy.machine.draw
