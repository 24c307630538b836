"""Every field of the machine's state: name, unit, meaning, in one place.

All fields are int64, so that the compiled and the interpreted form of the machine compute the same. A lane (one VM) is
a row of `PARAMS` and `VM`; each of its vCPUs is a row of `VCPU`, of which the SPE registers are what KVM could read,
and a row of `TRUTH`, which only the judge reads. `spepolicy.machine.state.Machine` ties the arrays of a batch together.
"""

from __future__ import annotations

import numpy as np

# PARAMS: constants of a lane, from `spepolicy.machine.scenario`; same names, same units.
_PARAMS = [
    "virtualized",
    "vcpus",
    "ram_pages",
    "ram_page0",
    "buffer_pages",
    "buffer_mapped",
    "session",
    "profile_user",
    "profile_kernel",
    "period_ops",
    "jitter",
    "type_filter",
    "event_filter",
    "min_latency_cycles",
    "type_mask",
    "inverted_event_filter",
    "data_source_filter",
    "discard",
    "pmscr",
    "task_on_ps",
    "task_off_ps",
    "start_ps",
    "stop_ps",
    "irq_entry_ps",
    "irq_handler_ps",
    "reader_latency_ps",
    "reader_ps_per_kib",
    "renew_ps",
    "duration_ps",
    "cycle_ps",
    "max_record_bytes",
    "align_bytes",
    "latency_max",
    "hardware_access_flag",
    "data_loss_at_boundary",
    "tlb_mask",
    "irq_latency_ps",
    "secondary_counter",
    "external_abort",
    "external_abort_every",
    "late_fault_samples",
    "pick_granule_ops",
    "store_slip_q16",
    "store_slip_granules",
    "context_bytes",
    "access_bytes",
    "exit_interval_ps",
    "preempt_interval_ps",
    "preempt_ps",
    "memlock_pages",
    "next_exit_only",
    "trap_ps",
    "exit_ps",
    "spe_switch_ps",
    "event_ps",
    "inject_ps",
    "walk_read_ps",
    "pin_page_ps",
    "unpin_page_ps",
    "map_page_ps",
    "swap_in_ps",
    "copy_page_ps",
    "copy_out_page_ps",
    "vmm_exit_ps",
    "cpu_fault_ps",
    "trap_pmb",
    "trap_pms",
    "hidden",
    "fine_grained_traps",
    "own_buffer",
    "paravirtual",
    "physical",
    "bug",
    "bug_rate_q16",
    "hooks",
    "notifier_filter",
    "host_kind",
    "recording_scale_q16",
    "backing",
    "change_pte",
    "swap_read_only",
    "zone_movable",
    "recording_span_ps",
    "acts",
    "driver",
    "migration_kind",
    "migration_handling",
    "migration_start_ps",
    "migration_page_ps",
    "migration_max_downtime_ps",
    "migration_rounds",
    "migration_switch_ps",
    "migration_dirty_page_ps",
    "migration_working_set",
    "migration_cancel_round",
    "migration_abort",
    "migration_retry_ps",
    "migration_request_ps",
    "phases",
    "guest_tables",
    "scatter_a",
    "scatter_b",
    "scatter_c",
]

# VM: what the vCPUs of a lane share.
_VM = """
key_host            hash key of the host's random draws
key_bug             hash key of the draws that decide where an injected bug of KVM strikes
started             vm_created has been called
finished            all vCPUs have run for duration_ps
hook                HOOK_* that the lane waits for, 0 if none
hook_vcpu           the vCPU that reached it
ttbr1               guest TTBR1_EL1: IPA of the stage 1 root
vttbr               VTTBR_EL2: PA of the stage 2 root tables
vtcr                VTCR_EL2
pool_used           table pages handed out
next_table          stage 1 table pages handed out
pool_free           head of the list of free table pages, -1 if none
next_frame          next host page frame to hand out
host_next_ps        host time of the next host event
host_index          RECORDED: index of the next event; RANDOM: the operation that comes next
host_draws          counter of key_host
host_events         host operations applied
host_op             HostOp of the operation under way: whose notifiers fire
notifier_calls      MMU notifier events that reached KVM
notifier_ignored    of these, events on pages that the policy's filter kept mapped
stage2_unmapped     stage 2 leaves removed by notifiers
stage2_maps         stage 2 leaves written by KVM
pinned_pages        pins held by KVM now (pages, counted once per pin)
pinned_peak_pages
charged_peak_pages  most pages that counted against the memlock limit at any time: pinned, and mlock()ed
pinned_since_ps     host time of the last change of pinned_pages
pinned_page_ps      integral of pinned_pages over host time, in page x 1000 ps
locked_pages        pages that the VMM has mlock()ed: they count against the memlock limit beside the pins
own_pages           pages of host memory that KVM holds as SPE buffers of its own
guest_memfd         1: guest RAM is in a guest_memfd, which the host's memory management does not touch
slots_locked        1: KVM refuses to change the VM's memslots, as RFC v5 does once they are locked
bug_draws           counter of key_bug
leaked_pins         pins that KVM forgot because of an injected bug
pin_calls           pages pinned in total
pin_refused         pages refused by the memlock limit
stale_pins          pinned pages that the host replaced behind the pin
migration_phase     spepolicy.machine.migration.Phase
migration_next_ps   host time of what the migration does next, NEVER if nothing
migration_round     rounds of pre-copy that are over
migration_pages     pages that are being sent
migration_sent      pages sent in total
migration_resent    of these, pages sent before
migration_resent_buffer of these, pages of SPE buffers
migration_downtime_ps
migration_refused   times that KVM refused to turn the dirty log on
migration_outcome   0 under way or none, 1 completed, 2 cancelled, 3 given up because of SPE
migration_begin_ps  host time
migration_end_ps
migration_arrived   post-copy: pages pushed so far
migration_demanded  post-copy: pages fetched on demand, for KVM or a CPU
migration_unlogged  pages that the SPU wrote to and the dirty log did not tell: the target has old data
migration_gate      Handling by which KVM exits to the VMM before it enters a vCPU with SPE on, 0 if none
blocked             vCPUs that the VMM holds
startup_ps          time spent in vm_created
locked              1: the VMM has mlocked the guest's memory
died                0, or Failure by which the VM ended early: a panic, an error of KVM_RUN, the host's end
dirty_logging       1: KVM logs dirty pages
window_count        rows in the blackout window log
log_count           rows appended to the event log, those that did not fit included
"""

# VCPU: clocks, registers, SPU, guest and KVM state of one vCPU.
_VCPU = """
now_ps              guest time: advances only while the guest executes
host_ps             host time minus guest time: what exits, traps and preemptions took so far
pmscr               PMSCR_EL1
pmsfcr              PMSFCR_EL1
pmsevfr             PMSEVFR_EL1
pmsnevfr            PMSNEVFR_EL1
pmsdsfr             PMSDSFR_EL1
pmslatfr            PMSLATFR_EL1
pmsirr              PMSIRR_EL1
pmbptr              PMBPTR_EL1
pmblimitr           PMBLIMITR_EL1
pmbsr               PMBSR_EL1 of the hardware
guest_pmbsr         PMBSR_EL1 as the guest reads it
shadow_ptr          PMBPTR_EL1 as the guest wrote it, while KVM owns the buffer (E2PB=0b00)
shadow_limit        PMBLIMITR_EL1 as the guest wrote it, while KVM owns the buffer
own_from            where in KVM's own buffer the bytes begin that have not been copied out
eret_trap           1: HFGITR_EL2.ERET, the vCPU's returns to EL0 trap
eret_due            1: one has just trapped
eret_pending        1: KVM looks at the write after which the guest returns to EL0
timer_ps            host time at which the policy's timer fires, NEVER if it is not set
key_program         hash keys of this vCPU's random streams
key_sample
key_kvm
key_log             hash key of what only the event log needs (spepolicy.machine.trace)
key_act
program_draws       counters of these streams
sample_draws
kvm_draws
act_draws
counting            1 while the interval counter runs (profiling enabled now)
select_ps           guest time of the next selection while counting
left_ops            operations until the next selection while not counting
ecount_ops          what the secondary counter added to the last interval (FEAT_SPE_ERnd)
population_ps       time of an operation that is under way, not counted yet in TRUTH.population
rate_ps             ps per operation that select_ps was computed with
busy_until_ps       the sampled operation in flight completes
flight              1: a sample is in flight
flight_outcome      its outcome
flight_latency      its latency in cycles
flight_counter      counter of the draw that selected it, kept for the event log only
tlb_page            virtual page that the last record went to, -1 if none: must be in the TLB
stop_ps             guest time at which the SPU stopped last
stop_cause          LostCause of it
late_syndrome       PMBSR_EL1 of a fault that is not reported yet (SPEv1p5), 0 if none
late_left           samples that are lost until it is reported
irq_ps              guest time at which the core takes PMBIRQ, NEVER if none is under way
event_seen          1: KVM has handled the event in pmbsr
virq                1: the virtual (or bare-metal) PMBIRQ is pending at the guest
exit_next_ps        guest time of the next ordinary exit
preempt_next_ps     guest time of the next preemption
act_next_ps         guest time of the next act of a guest that misbehaves, NEVER if none
act_index           row of Machine.act that comes then
act_armed           mask of the rows that are due and wait for their moment
moved               times that a page of the buffer was remapped or migrated
table_freed         level 2 descriptor of the stage 1 table that was unlinked, 0 if none
table_freed_va      VA that it translates
reader_ps           guest time at which perf has consumed what it was woken for
spe_off             1: KVM keeps SPE off behind the guest's back, for a migration; 2: for good
reported            1: the guest is told of the blackout that is open by a side channel
session_over        1: the guest's driver has ended the session after an error, for good
blocked             1: the VMM holds the vCPU
blocked_since_ps    host time
segment             SEG_*: what the guest executes
segment_end_ps      guest time at which the segment ends
segment_ps          its length in program time
restart             1: perf enabled the event again, or opened a new session: arm_spe_pmu_start is due
hook_next           HOOK_* that follows the one just answered
drain_due           1: the guest has written PMSCR_EL1=0, KVM has looked at it, and the guest's drain is to come
level               exception level it executes at, 0 or 1
distribution        which operations it executes
resume_segment      segment that an interrupt handler returns to
resume_left_ps      what was left of it
resume_whole_ps     its length in program time
renew_due           1: perf is ending its session and opens another
resume_level
resume_distribution
task                0 the profiled task, 1 the other
phase               phase of the program
phase_left_ps       program time until the phase ends
switch_left_ps      program time until the next context switch
syscall_left_ps     program time until the next system call
renew_next_ps       guest time of the next perf session
event_active        perf event state: 1 ACTIVE or INACTIVE, 0 disabled after truncation
handle_open         1: an AUX output handle is open
wanted              1: a session is open and its task is on the CPU
aux_head            bytes written to the AUX ring since it was opened
aux_tail            bytes consumed by perf
aux_wakeup          aux_head at which perf was last woken, rounded down
aux_flags           flags of the open handle, PERF_AUX_FLAG_*
handle_head         aux_head at which the handle was opened
handle_wakeup       aux_head at which perf is due to be woken next
buffer_va           VA of the AUX ring
buffer_base         its address as the driver gives it to the SPU: buffer_va, or its IPA with PMBLIMITR_EL1.nVM
buffer_generation   which set of IPA pages stands behind it
pin_count           pages in the list of pins, the current set
pin_fresh           pages in the list under construction
pin_list            which of the two lists is current
pin_lo              VA range that the current set was pinned for
pin_hi
walk_lo             VA range of the list under construction
walk_hi
walk_status         0, or the stage 1 fault status of the first page that is not mapped
answered            1: the policy answered the fault; 2: by injecting
claim               Cause claimed for the last fault, -1 if none
window_open         1: a blackout is open
window_start_ps
window_start_host_ps
window_cause
window_ps           guest time in it that was wanted
window_missed_ops   missed operations in it
logged_segment      what the event log last said that it executes, packed
logged_profiling    whether it last said that profiling is enabled
"""

# TRUTH: what only the judge may know.
_TRUTH = """
population          PMU event SAMPLE_POP: members of the population executed while profiling was enabled
survived            PMU event SAMPLE_FILTRATE: samples that no filter rejected
serrors             of external_aborts, those delivered as an SError
selected            samples selected
collided            dropped: another was in flight
filtered            rejected by PMSFCR_EL1
written             records written whole into the buffer
kept                records handed to perf, or in the buffer at the end
discarded           written, then thrown away because of DL; or dropped in discard mode
pending             written since the AUX handle was opened
in_flight           1 at the end if a sample was in flight
wanted_ps           guest time in which profiling was wanted
active_ps           of it, time in which the SPU sampled
wanted_ops          operations executed in wanted time
missed_ops          operations executed in blackout
trap_total_ps       host time in traps of SPE registers
hook_total_ps       host time that the policy's tools charged
event_total_ps      host time in exits for PMBIRQ, reading PMBSR, injection
switch_total_ps     host time of SPE state in ordinary exits
other_host_ps       host time that SPE is not to blame for: exits, preemption
traps               trapped register accesses
exits               ordinary exits
preemptions
irqs                PMBIRQ taken
spurious            handler found S=0
buffer_full         buffer full events
stage1_faults
stage2_faults
external_aborts     writes that a device or memory answered with an abort
data_loss           events with DL=1
sessions            times that the driver opened an AUX handle and enabled the buffer
truncated           handles closed with PERF_AUX_FLAG_TRUNCATED
fatal               events that the driver answered by switching SPE off
silent_fatal        of these, without any AUX flag: perf does not know
ring_full           starts refused because the ring had no space
walks               SPU translations that missed the TLB
walk_reads          descriptor reads by the SPU's walks
diverged_pages      TLB fills for pages whose stage 2 entry is not what the VMM's address shows
diverged_records    records written to such pages
stray_records       records written through a translation that the guest had changed without a TLBI
diverged_now        1: the page of tlb_page is diverged; 2: its translation is stray; 3: both
acts                acts of a guest that misbehaves
forged              PMBSR_EL1 written by the guest with S=1
fault_cause         true Cause of the last stage 2 fault
fault_loss_cause    LOST_* it counts under
injected_impdef     events told to the guest, by Event
injected_external
injected_stage1
injected_stage2
injected_full
injected_too_large
forged_loss         DL=1 told to the guest although no record was cut
resumed_cut         faults with DL=1 that were resumed: a cut record stays in the stream
answered_otherwise  failures that KVM answered without an event in PMBSR_EL1 (spepolicy.machine.answers)
reported_ps         blackout of which the guest was told by a side channel
vmm_exits           exits to the VMM because of SPE
stalled_ps          host time for which the VMM held the vCPU
refused             sessions that the policy refused for the memlock limit
digest              hash over all records written, in order
copies              times that KVM copied its own buffer out to the guest's
copied_bytes        bytes of these
deferred_copies     pages copied when the guest read them
copy_ps             host time of all of these, part of hook_total_ps
announced           calls by which the guest announced a buffer
eret_traps          returns to EL0 that trapped
cpu_faults          stage 2 faults of the guest's CPU on AUX pages, as perf reads them or the kernel zeroes them
first_fault_ps      host time of the first stage 2 fault, NEVER if none
first_fault_va
first_fault_syndrome PMBSR_EL1 of the first stage 2 fault
"""


def _dtype(text: str) -> np.dtype[np.void]:
    return np.dtype([(line.split()[0], np.int64) for line in text.strip().splitlines()])


PARAMS = np.dtype([(name, np.int64) for name in _PARAMS])
VM = _dtype(_VM)
VCPU = _dtype(_VCPU)
TRUTH = _dtype(_TRUTH)

WINDOW = np.dtype(
    [
        ("vcpu", np.int64),
        ("start_ps", np.int64),  # guest time
        ("start_host_ps", np.int64),  # host time
        ("host_length_ps", np.int64),  # host time from start to end
        ("length_ps", np.int64),  # guest time in it in which profiling was wanted
        ("missed_ops", np.int64),
        ("cause", np.int64),  # LostCause
    ]
)
