"""The event log of a lane: what a timeline, a perf.data file or an explorer's trace is made of.

A log is optional. Its capacity is the last dimension of `Machine.log`, 0 by default: then `log` is one branch that is
never taken. Nothing in the machine reads the log, and what only the log needs of a sampled operation (its place in the
function, its address, how its latency is split) is drawn from a stream of its own, keyed by the sample. So a lane that
is run again with a log gives the results that it gave without one. `spepolicy.drivers.simulate.record_lane` does that.

Rows are appended in the order in which the machine works, which is by time within a vCPU except that a blackout is
noticed at its end; vCPUs run ahead of each other a little. Sort by `host_ps`, stably. Rows that do not fit are counted
in `VM.log_count` and dropped: a reader must compare, and `record_lane` does.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.jit import jit
from spepolicy.machine.data_addresses import data_addresses
from spepolicy.machine.draw import draw
from spepolicy.machine.rows import log_rows, outcome_events, outcome_type, params, vcpu_row, vm_row
from spepolicy.machine.state import Machine

if TYPE_CHECKING:
    from spepolicy.machine.scenario import Workload

LOG = np.dtype(
    [
        ("host_ps", "i8"),  # host time
        ("guest_ps", "i8"),  # guest time of the vCPU; -1 where the host acts
        ("kind", "u2"),  # LogKind
        ("vcpu", "u2"),  # HOST where the host acts
        ("detail", "u4"),
        ("a", "u8"),
        ("b", "u8"),
    ]
)

HOST = 0xFFFF  # `vcpu` of a row that is of no vCPU


class LogKind(IntEnum):
    """What a row says. After the dash: `detail`; `a`; `b`. A field that is not named is 0."""

    # the SPU
    SELECTED = 1  # a sample begins - outcome | level << 16 | task << 17; offset in the function; see `_address`
    COLLIDED = 2  # a selection was dropped, for another operation is in flight
    FILTERED = 3  # the operation in flight is done, and a filter rejected it
    WRITTEN = 4  # it is done, its record is in the buffer - bytes; VA of the first; latencies: see `latencies`
    LOST = 5  # it is done, its record could not be written - LostCause; PMBPTR_EL1; stage 2: guest page + 1
    STOPPED = 6  # buffer management event - LostCause; PMBSR_EL1; PMBPTR_EL1
    PROFILING = 7  # profiling becomes enabled or disabled at the current EL - 1 or 0
    # what executes
    SEGMENT = 8  # - Segment; level; distribution | task << 16
    # registers and ring, by the guest's driver
    REGISTER = 9  # the guest writes - Register; value
    AUX_BEGIN = 10  # a handle is open: PERF_RECORD_AUX to be - 0; head; limit, both as bytes since the ring was opened
    AUX = 11  # it is closed: a PERF_RECORD_AUX - PERF_AUX_FLAG_*; head; size
    PADDED = 12  # the driver writes padding - 0; head; size
    SETTLED = 13  # what was written since AUX_BEGIN is - 1 discarded, 0 kept; records
    RING_FULL = 14  # perf_aux_output_begin finds no space
    READ = 15  # perf has read - 0; tail before; tail after
    RENEWED = 16  # new AUX pages behind the same VA - 0; generation
    HANDLED = 17  # arm_spe_pmu_irq_handler - 0 spurious, 1 session goes on, 2 SPE switched off; PMBSR_EL1 as read
    # KVM
    TRAPPED = 18  # - exits; accesses to buffer registers; to sampling registers
    EXIT = 19  # - 0 ordinary, 1 preempted; ps until the vCPU goes on
    INTERRUPT = 20  # the core takes PMBIRQ - 1 in KVM, 0 on bare metal
    INJECTED = 21  # an event is told to the guest - 0; PMBSR_EL1 that it reads
    VIRQ = 22  # the guest takes its PMBIRQ
    HOOK = 23  # the policy is asked - Hook
    WALKED = 24  # KVM walked stage 1 - status; pages
    PINNED = 25  # - PIN_*; pages
    UNPINNED = 26  # - 0; pages
    MAPPED = 27  # pages mapped at stage 2 for the policy - 1 if one does not exist; pages
    RESUMED = 28  # the policy cleared PMBSR_EL1.S - 0; PMBPTR_EL1
    CLAIMED = 29  # - Cause claimed; true Cause
    # the host
    HOST_OP = 30  # - HostOp; first guest page; end
    # a notifier reached KVM about a page that was mapped or is pinned, or about a range of pages
    UNMAPPED = 31  # - HostOp; first guest page | pages << 32; stage 2 leaves removed
    # blackouts
    BLACK = 32  # a window opens - LostCause
    MIGRATED = 41  # a step of a live migration is done - Phase; pages being sent; round
    LIGHT = 33  # it closes - LostCause; its wanted guest time in ps; operations missed
    # the SPU, again
    DROPPED = 34  # the operation in flight is done, and discard mode drops its record
    ABORTED = 35  # an external abort on a buffer write - ExternalAbort; PMBPTR_EL1
    # the guest against its own buffer (spepolicy.machine.guestacts)
    GUEST_ACT = 40  # - GuestAct; VA; PMBSR_EL1


class Register(IntEnum):
    """`detail` of a REGISTER row."""

    PMSCR = 0
    PMSFCR = 1
    PMSEVFR = 2
    PMSLATFR = 3
    PMSIRR = 4
    PMBLIMITR = 5
    PMBPTR = 6
    PMBSR = 7


def _constant(value: int) -> Any:
    """Return what numba takes for an int64: each plain int is a type of its own, with a copy of `log` for it."""
    return np.int64(value)


_K = {kind.name: _constant(kind) for kind in LogKind}
SELECTED, COLLIDED, FILTERED, WRITTEN, LOST, STOPPED = (
    _K[n] for n in ("SELECTED", "COLLIDED", "FILTERED", "WRITTEN", "LOST", "STOPPED")
)
PROFILING, SEGMENT, REGISTER = _K["PROFILING"], _K["SEGMENT"], _K["REGISTER"]
AUX_BEGIN, AUX, PADDED, SETTLED = _K["AUX_BEGIN"], _K["AUX"], _K["PADDED"], _K["SETTLED"]
RING_FULL, READ, RENEWED, HANDLED = _K["RING_FULL"], _K["READ"], _K["RENEWED"], _K["HANDLED"]
TRAPPED, EXIT, INTERRUPT, INJECTED, VIRQ = (_K[n] for n in ("TRAPPED", "EXIT", "INTERRUPT", "INJECTED", "VIRQ"))
HOOK, WALKED, PINNED, UNPINNED, MAPPED = (_K[n] for n in ("HOOK", "WALKED", "PINNED", "UNPINNED", "MAPPED"))
RESUMED, CLAIMED, HOST_OP, UNMAPPED = _K["RESUMED"], _K["CLAIMED"], _K["HOST_OP"], _K["UNMAPPED"]
BLACK, LIGHT, DROPPED, ABORTED = _K["BLACK"], _K["LIGHT"], _K["DROPPED"], _K["ABORTED"]
GUEST_ACT = _K["GUEST_ACT"]
MIGRATED = _K["MIGRATED"]
REG_PMSCR, REG_PMSFCR, REG_PMSEVFR, REG_PMSLATFR, REG_PMSIRR, REG_PMBLIMITR, REG_PMBPTR, REG_PMBSR = (
    _constant(register) for register in Register
)
ZERO, ONE, TWO, _HOST = (_constant(n) for n in (0, 1, 2, HOST))

# The place of a sampled instruction. Functions have no code of their own unless the workload was recorded from one:
# each is given 256 instructions, of which every eighth is of one type, so that an address always has the same type.
FUNCTION_BYTES = 1024
_TYPES = 8

# Bytes that accesses of one level range over: the cache that serves them, or memory (an assumption; Neoverse N1 has
# 64 KiB, 1 MiB, and a system level cache of tens of MiB).
_REACH_L1, _REACH_L2, _REACH_LLC, _REACH_DRAM = (1 << bits for bits in (16, 20, 24, 30))
_L1D_REFILL, _TLB_WALK, _LLC_ACCESS, _LLC_MISS = 1 << 3, 1 << 5, 1 << 8, 1 << 9
_USER_DATA = 0x0000_AAAB_0000_0000
_KERNEL_DATA = -(1 << 47)  # 0xffff_8000_0000_0000


@jit
def log(m: Machine, i: int, k: int, kind: int, detail: int, a: int, b: int) -> None:
    """Append a row at the present of vCPU *k*."""
    if log_rows(m, i).shape[0] != 0:
        v = vcpu_row(m, i, k)
        _append(m, i, v.now_ps + v.host_ps, v.now_ps, k, kind, detail, a, b)


@jit
def log_at(m: Machine, i: int, k: int, at_ps: int, kind: int, detail: int, a: int, b: int) -> None:
    """Append a row at guest time *at_ps* of vCPU *k*."""
    if log_rows(m, i).shape[0] != 0:
        _append(m, i, at_ps + vcpu_row(m, i, k).host_ps, at_ps, k, kind, detail, a, b)


@jit
def log_vm(m: Machine, i: int, host_ps: int, kind: int, detail: int, a: int, b: int) -> None:
    """Append a row that is of no vCPU, at host time *host_ps*."""
    if log_rows(m, i).shape[0] != 0:
        _append(m, i, host_ps, -ONE, _HOST, kind, detail, a, b)


@jit
def log_host(m: Machine, i: int, kind: int, detail: int, a: int, b: int) -> None:
    """Append a row at the host time of the host event that is being applied."""
    if log_rows(m, i).shape[0] != 0:
        _append(m, i, vm_row(m, i).host_next_ps, -ONE, _HOST, kind, detail, a, b)


@jit
def _append(m: Machine, i: int, host_ps: int, guest_ps: int, k: int, kind: int, detail: int, a: int, b: int) -> None:
    vm = vm_row(m, i)
    rows = log_rows(m, i)
    n = vm.log_count
    vm.log_count += 1
    if n < rows.shape[0]:
        rows[n, 0] = host_ps
        rows[n, 1] = guest_ps
        rows[n, 2] = kind | (k << 16) | (detail << 32)
        rows[n, 3] = a
        rows[n, 4] = b


@jit
def log_state(m: Machine, i: int, k: int, active: bool) -> None:
    """Note what vCPU *k* is about to execute, and whether it is sampled, where that changed."""
    if log_rows(m, i).shape[0] == 0:
        return
    v = vcpu_row(m, i, k)
    state = 1 | (v.segment << 1) | (v.level << 8) | (v.task << 10) | (v.distribution << 16)
    if v.logged_segment != state:
        v.logged_segment = state
        log(m, i, k, SEGMENT, v.segment, v.level, v.distribution | (v.task << 16))
    profiling = ONE if active else ZERO
    if v.logged_profiling != profiling:
        v.logged_profiling = profiling
        log(m, i, k, PROFILING, profiling, ZERO, ZERO)


@jit
def log_selection(m: Machine, i: int, k: int, at_ps: int, outcome: int, counter: int) -> None:
    """Append the row of a sample that begins: *counter* is that of the draw that selected it, and keys its details."""
    v = vcpu_row(m, i, k)
    v.flight_counter = counter
    bits = draw(v.key_log, counter)
    kind = outcome_type(m)[outcome] & 7
    # The product of two uniform numbers: some instructions of a function are hot, most are not.
    slot = ((bits & 31) * ((bits >> 5) & 31)) >> 5
    offset = (slot * _TYPES + kind) * 4
    target = _address(bits >> 10, kind, outcome_events(m)[outcome], v.level)
    _append(m, i, at_ps + v.host_ps, at_ps, k, SELECTED, outcome | (v.level << 16) | (v.task << 17), offset, target)


@jit
def _address(bits: int, kind: int, events: int, level: int) -> int:
    """Return the VA that a load or store accesses, or the offset in its function that a branch goes to; else 0.

    Where the workload knows the addresses of its data, `samples` draws the VA anew (see `machine.data_addresses`).
    """
    if kind & 1 != 0:
        return (bits & 0xFF) << 2
    if kind == 0:
        return ZERO
    reach = _REACH_L1
    if events & _LLC_MISS != 0:
        reach = _REACH_DRAM
    elif events & _LLC_ACCESS != 0:
        reach = _REACH_LLC
    elif events & _L1D_REFILL != 0:
        reach = _REACH_L2
    base = _KERNEL_DATA if level == 1 else _USER_DATA
    return base + (bits & (reach - 1) & ~7)


@jit
def latencies(m: Machine, i: int, k: int) -> int:
    """Return the latency counters of the operation in flight, saturated: total, issue << 16, translation << 32.

    The machine draws the total. How much of it passed before issue is drawn here, evenly (an assumption: no figures are
    published); an access that hits the TLB translates in a cycle, and one with a walk spends a part of the rest on it.
    """
    v = vcpu_row(m, i, k)
    top = params(m, i).latency_max
    bits = draw(v.key_log, v.flight_counter) >> 40
    total = v.flight_latency
    issue = (max(total - 1, 0) * (bits & 0xFF)) >> 8
    translation = ZERO
    if outcome_type(m)[v.flight_outcome] & 6 != 0:
        translation = ONE
        if outcome_events(m)[v.flight_outcome] & _TLB_WALK != 0:
            translation += (max(total - issue - 1, 0) * ((bits >> 8) & 0xFF)) >> 8
    return min(total, top) | (min(issue, top) << 16) | (min(translation, top) << 32)


SAMPLE = np.dtype(
    [
        ("host_ps", "i8"),  # host time of the selection
        ("guest_ps", "i8"),
        ("done_ps", "i8"),  # guest time at which it was written, rejected or lost; -1 in flight at the end
        ("vcpu", "u2"),
        ("level", "u1"),  # exception level it executed at
        ("task", "u1"),  # 0 the profiled task, 1 the other
        ("fate", "u2"),  # LogKind.WRITTEN, FILTERED, LOST, DROPPED, or 0 in flight
        ("cause", "u2"),  # LostCause if LOST
        ("outcome", "u4"),  # index of the workload's outcome tables
        ("function", "u4"),  # index of Workload.function_names
        ("offset", "u4"),  # of the instruction in its function, in bytes
        ("type", "u1"),  # machine.scenario.OpType
        ("events", "u8"),  # Events packet
        ("total", "u2"),  # latency counters in cycles, as in the packets; only if WRITTEN
        ("issue", "u2"),
        ("translation", "u2"),
        ("size", "u2"),  # bytes of the record with padding; only if WRITTEN
        ("address", "u8"),  # VA of a load or store; of a branch, the offset in its function that it goes to
        ("pointer", "u8"),  # VA of the record's first byte in the buffer; of the fault if LOST
        ("kept", "?"),  # perf got it: WRITTEN, and not thrown away because of DL
    ]
)


def samples(rows: NDArray[np.void], workload: Workload) -> NDArray[np.void]:
    """Join the rows of each sample: return SAMPLE[n], in order of selection by host time. Collisions are not in it.

    rows: LOG[n] of one lane, complete. An operation in flight keeps all others out, so the n-th end is of the n-th
    selection of its vCPU.
    """
    parts = [_samples_of(rows[rows["vcpu"] == k], workload) for k in np.unique(rows["vcpu"]) if k != HOST]
    joined = np.concatenate(parts) if parts else np.zeros(0, SAMPLE)
    return joined[np.argsort(joined["host_ps"], kind="stable")]


def _samples_of(rows: NDArray[np.void], workload: Workload) -> NDArray[np.void]:
    begun = rows[rows["kind"] == LogKind.SELECTED]
    ends = rows[np.isin(rows["kind"], (LogKind.WRITTEN, LogKind.FILTERED, LogKind.LOST, LogKind.DROPPED))]
    out = np.zeros(len(begun), SAMPLE)
    for name in ("host_ps", "guest_ps", "vcpu"):
        out[name] = begun[name]
    out["outcome"] = begun["detail"] & 0xFFFF
    out["level"] = begun["detail"] >> 16 & 1
    out["task"] = begun["detail"] >> 17 & 1
    out["function"] = workload.outcome_function[out["outcome"]]
    out["type"] = workload.outcome_type[out["outcome"]]
    out["events"] = workload.outcome_events[out["outcome"]]
    out["offset"] = begun["a"]
    out["address"] = begun["b"]
    if workload.data is not None:
        memory = (out["type"] & 1 == 0) & (out["type"] != 0)
        at = out[memory]
        out["address"][memory] = data_addresses(
            at["address"], at["guest_ps"], at["type"], at["events"], at["function"], workload.data
        )
    out["done_ps"] = -1
    done = out[: len(ends)]
    done["done_ps"], done["fate"], done["pointer"] = ends["guest_ps"], ends["kind"], ends["a"]
    written = ends["kind"] == LogKind.WRITTEN
    done["cause"] = np.where(ends["kind"] == LogKind.LOST, ends["detail"], 0)
    done["size"] = np.where(written, ends["detail"], 0)
    for shift, name in ((0, "total"), (16, "issue"), (32, "translation")):
        done[name] = np.where(written, ends["b"] >> np.uint64(shift) & np.uint64(0xFFFF), 0)
    _mark_kept(rows, done, written)
    return out


def _mark_kept(rows: NDArray[np.void], done: NDArray[np.void], written: NDArray[np.bool_]) -> None:
    """A SETTLED row decides about all records written since the one before it."""
    kept = np.zeros(int(written.sum()), dtype=bool)
    first = 0
    for row in rows[rows["kind"] == LogKind.SETTLED]:
        last = first + int(row["a"])
        kept[first:last] = row["detail"] == 0
        first = last
    done["kept"][written] = kept
