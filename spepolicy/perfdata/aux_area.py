"""The AUX area of a vCPU as perf in the guest gets it: bytes, the AUX records that announce them, and when perf reads.

All of it follows from the lane's event log. The SPU's records are encoded and put where PMBPTR_EL1 was; what the driver
skips is zero, which is padding; and where a fault in the middle of a record stopped the SPU, the bytes before it stay
(spe.md 3.4: the size that the driver accounts is PMBPTR_EL1 less the head of the handle). Positions count bytes since
the event was opened; where the guest's perf opens another event with new pages they simply go on.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import PMBSR_COLL, PMBSR_DL
from spepolicy.drivers.result import LaneLog
from spepolicy.machine.own_buffer import OWN_VA
from spepolicy.machine.scenario import OpType, Scenario
from spepolicy.machine.trace import LogKind
from spepolicy.perfdata.layout import AuxFlag
from spepolicy.perfdata.program import function_addresses
from spepolicy.spe.packets import decode, encode
from spepolicy.spe.records import RECORD, OpClass, Present, Security
from spepolicy.workload import Events

__all__ = ["HANDLE", "AuxArea", "aux_area", "spe_records", "tick_ps"]

HANDLE = np.dtype([("host_ps", "i8"), ("offset", "i8"), ("size", "i8"), ("flags", "u8")])
"""A PERF_RECORD_AUX: host time at which the handle is closed, position, bytes, `AuxFlag`."""

_NEOVERSE_BYTES = 64
_TIMESTAMP_BYTES = 9
# Data source packets of Neoverse N1, N2 and V1 (spe.md 4.5), by the deepest level that the events name.
_SOURCES = ((Events.REMOTE, 0x0D), (Events.LLC_MISS, 0x0E), (Events.LLC_ACCESS, 0x0B), (Events.L1D_REFILL, 0x08))
# Payloads of operation packets (spe.md 4.4): a general-purpose load or store, an atomic that returns a value, and a
# conditional branch. The machine knows of no other kinds.
_STORE, _ATOMIC, _CONDITIONAL = 0x01, 0x06, 0x01


class AuxArea(NamedTuple):
    """What perf in the guest has of one vCPU."""

    content: bytes  # from position 0
    handles: NDArray[Any]  # HANDLE, by time
    reads: NDArray[np.int64]  # [n, 3]: host time in ps, position before and after each read; the last is at the end
    records: NDArray[Any]  # RECORD[m] of what the SPU wrote whole, by time; `offset` is the position


def tick_ps(scenario: Scenario) -> int:
    """Return the length of a tick of the generic counter in ps.

    1 GHz from Armv8.6 on, as the architecture has it (Arm ARM D12.1.2), which SPEv1p2 belongs to (spe.md 1.1); before,
    25 MHz, as on Ampere Altra (spe_data.md).
    """
    return 1000 if scenario.cpu.spe_version >= 3 else 40_000


def spe_records(samples: NDArray[Any], scenario: Scenario, tid: int | None) -> NDArray[Any]:
    """Return RECORD[n]: what the packets of *samples* (`spepolicy.machine.trace.SAMPLE`) say.

    *tid*: of the profiled task, for context packets; None for none. There is no PA: KVM leaves PMSCR_EL2.PA 0.
    """
    records = np.zeros(len(samples), RECORD)
    kind = samples["type"]
    branch = kind & OpType.BRANCH != 0
    load, store = kind & OpType.LOAD != 0, kind & OpType.STORE != 0
    memory = load | store
    function = function_addresses(samples["function"], samples["level"])
    present = np.full(len(samples), _ALWAYS, np.uint32)
    present[branch] |= int(Present.TARGET)
    present[memory] |= int(Present.VA | Present.TRANSLATION)
    present[load] |= int(Present.DATA_SOURCE)
    records["pc"] = function + samples["offset"]
    records["pc_el"], records["pc_security"] = samples["level"], Security.NON_SECURE
    records["target"] = np.where(branch, function + samples["address"], 0)
    records["target_el"] = np.where(branch, samples["level"], 0)
    records["target_security"] = np.where(branch, int(Security.NON_SECURE), 0)
    records["va"] = np.where(memory, samples["address"], 0)
    records["va_tag"] = np.where(memory, samples["address"] >> np.uint64(56), 0)
    records["total_latency"], records["issue_latency"] = samples["total"], samples["issue"]
    records["translation_latency"] = np.where(memory, samples["translation"], 0)
    for event, source in reversed(_SOURCES):
        records["data_source"][load & (samples["events"] & int(event) != 0)] = source
    records["data_source_bytes"] = np.where(load, 1, 0)
    records["op_class"] = np.where(branch, int(OpClass.BRANCH), np.where(memory, int(OpClass.LOAD_STORE), 0))
    records["op"] = np.select([branch, load & store, store], [_CONDITIONAL, _ATOMIC, _STORE], 0)
    records["events"] = samples["events"]
    records["events_bytes"] = 2 if _fixed(scenario) else 4
    records["timestamp"] = samples["host_ps"] // tick_ps(scenario)  # of the operation's beginning: spe.md rule 15
    if tid is not None:
        present |= int(Present.CONTEXT_EL1)
        records["context_el1"] = tid
    records["present"] = present
    return records


_ALWAYS = int(Present.PC | Present.TOTAL | Present.ISSUE | Present.OPERATION | Present.EVENTS | Present.TIMESTAMP)


def _fixed(scenario: Scenario) -> bool:
    return scenario.cpu.align_bytes == scenario.cpu.max_record_bytes


def aux_area(log: LaneLog, samples: NDArray[Any], k: int, tid: int | None) -> AuxArea:
    """Return the AUX area of vCPU *k*. *samples*: `spepolicy.machine.trace.samples` of the lane; *tid* as above."""
    scenario = log.result.scenario
    rows = log.rows[log.rows["vcpu"] == k]
    base, handles, reads = _perf_events(log, rows, k)
    begins = np.flatnonzero(rows["kind"] == LogKind.AUX_BEGIN)
    ends = np.flatnonzero(np.isin(rows["kind"], (LogKind.WRITTEN, LogKind.LOST)))
    mine = samples[samples["vcpu"] == k]
    done = mine[np.isin(mine["fate"], (LogKind.WRITTEN, LogKind.LOST))]
    number = np.searchsorted(begins, ends)
    # What was lost before any session has no place.
    ends, done, session = ends[number > 0], done[number > 0], begins[number[number > 0] - 1]
    # In a session the SPU writes from the head's place in the ring on, without wrapping.
    heads = rows["a"][session].astype(np.int64)
    ring = scenario.guest.buffer_pages << 12
    # A ring whose physical address the SPU has is aligned to its size, so that this holds for those before it, too.
    offset = (rows["a"][ends].astype(np.int64) - int(log.result.vcpu["buffer_base"][0, k])) % ring
    written = rows["kind"][ends] == LogKind.WRITTEN
    sizes = np.where(written, rows["detail"][ends], 0).astype(np.int64)
    if len(ends) and rows["a"][ends].astype(np.int64).max() >= OWN_VA:
        offset = heads % ring + _sizes_before(sizes, session)
    place = base[session] + heads - heads % ring + offset
    length = int(reads[-1, 2]) if len(reads) else 0
    written &= place + sizes <= length  # what KVM could not copy is not there
    records = spe_records(done[written], scenario, tid)
    records["offset"] = place[written]
    content = np.zeros(length + 2 * scenario.cpu.max_record_bytes, np.uint8)
    sizes = sizes[written]
    _put(content, records, place[written], sizes, scenario)
    if not _fixed(scenario):
        after = place + np.where(written, rows["detail"][ends], 0)
        first = np.diff(session, prepend=-1) != 0
        start = np.where(first, base[session] + heads, np.roll(after, 1))
        _put_cut(content, rows[ends], start, done, place, tid, scenario)
    return AuxArea(content[:length].tobytes(), handles, reads, records)


def _sizes_before(sizes: NDArray[np.int64], session: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the bytes written before each record in its session: where KVM's copy of its own buffer puts it."""
    before = np.cumsum(sizes) - sizes
    first = np.searchsorted(session, session)
    shift: NDArray[np.int64] = before - before[first]
    return shift


def _perf_events(log: LaneLog, rows: NDArray[Any], k: int) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.int64]]:
    """Return, for each row, the bytes of all perf events that were closed before it; all AUX records; all reads."""
    bounds = [0, *np.flatnonzero(rows["kind"] == LogKind.RENEWED).tolist(), len(rows)]
    base = np.zeros(len(rows), np.int64)
    handles, reads = [np.zeros(0, HANDLE)], [np.zeros((0, 3), np.int64)]
    before = 0
    for first, end in pairwise(bounds):
        base[first:end] = before
        part = rows[first:end]
        last = end == len(rows)
        closed = _handles(part)
        if last:
            closed = np.concatenate([closed, _open_handle(log, part, k)])
        padded = part[part["kind"] == LogKind.PADDED]
        head = max(
            int((closed["offset"] + closed["size"]).max(initial=0)),
            int((padded["a"] + padded["b"]).max(initial=0)),
        )
        read = _reads(part, head, _end_ps(log, k) if last else int(rows["host_ps"][end]))
        read[:, 1:] += before
        reads.append(read)
        closed["offset"] += before
        # An AUX record is emitted if there is data, or any flag but OVERWRITE (perfdata.md 4).
        handles.append(closed[(closed["size"] > 0) | (closed["flags"] != 0)])
        before += head
    return base, np.concatenate(handles), np.concatenate(reads)


def _handles(rows: NDArray[Any]) -> NDArray[Any]:
    closed = rows[rows["kind"] == LogKind.AUX]
    handles = np.zeros(len(closed), HANDLE)
    handles["host_ps"], handles["offset"], handles["size"] = closed["host_ps"], closed["a"], closed["b"]
    handles["flags"] = closed["detail"]
    return handles


def _open_handle(log: LaneLog, rows: NDArray[Any], k: int) -> NDArray[Any]:
    """Return the handle that is open when the lane ends as perf closes it when it stops the event, or none."""
    vcpu = log.result.vcpu[0, k]
    begins = rows[rows["kind"] == LogKind.AUX_BEGIN]
    if not vcpu["handle_open"] or not len(begins):
        return np.zeros(0, HANDLE)
    head = int(begins["a"][-1])
    ring = log.result.scenario.guest.buffer_pages << 12
    syndrome = int(vcpu["pmbsr"]) | int(vcpu["guest_pmbsr"])
    flags = int(AuxFlag.COLLISION) if syndrome & PMBSR_COLL else 0
    flags |= int(AuxFlag.TRUNCATED | AuxFlag.PARTIAL) if syndrome & PMBSR_DL else 0
    pointer = int(vcpu["pmbptr"])
    if vcpu["own_from"]:  # KVM's own buffer: its bytes are copied to the guest's when the guest closes the handle
        pointer += int(vcpu["shadow_ptr"]) - int(vcpu["own_from"])
    size = pointer - int(vcpu["buffer_base"]) - head % ring
    return np.array([(_end_ps(log, k), head, size, flags)], HANDLE)


def _reads(rows: NDArray[Any], head: int, end_ps: int) -> NDArray[np.int64]:
    """Return when perf read what of one event, of which it reads the rest when it closes it at *end_ps*."""
    read = rows[(rows["kind"] == LogKind.READ) & (rows["b"] > rows["a"])]
    reads = np.stack([read[name].astype(np.int64) for name in ("host_ps", "a", "b")], 1)
    tail = int(reads[-1, 2]) if len(reads) else 0
    return np.concatenate([reads, np.array([[end_ps, tail, head]])]) if head > tail else reads


def _end_ps(log: LaneLog, k: int) -> int:
    vcpu = log.result.vcpu[0, k]
    return int(vcpu["now_ps"] + vcpu["host_ps"])


def _encoded(
    records: NDArray[Any], sizes: NDArray[np.int64], scenario: Scenario
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the bytes of *records* one after the other, each with its *sizes*, and where each begins.

    Neoverse's records have fixed places (perfdata.md 7). In others the timestamp comes last of all, and the padding
    that a record's size asks for before it.
    """
    starts = np.cumsum(sizes) - sizes
    if _fixed(scenario) and scenario.cpu.align_bytes == _NEOVERSE_BYTES:
        return np.frombuffer(encode(records, layout="neoverse"), np.uint8), starts
    packets = np.frombuffer(encode(records), np.uint8)
    begin = decode(packets)[0]["offset"].astype(np.int64)
    length = np.diff(begin, append=len(packets))
    out = np.zeros(int(sizes.sum()), np.uint8)
    at = np.repeat(starts - begin, length) + np.arange(len(packets))
    before_end = np.repeat(begin + length, length) - np.arange(len(packets))
    at += np.where(before_end <= _TIMESTAMP_BYTES, np.repeat(sizes - length, length), 0)
    out[at] = packets
    return out, starts


def _put(
    content: NDArray[np.uint8],
    records: NDArray[Any],
    place: NDArray[np.int64],
    sizes: NDArray[np.int64],
    scenario: Scenario,
) -> None:
    raw, starts = _encoded(records, sizes, scenario)
    content[np.repeat(place - starts, sizes) + np.arange(len(raw))] = raw


def _put_cut(
    content: NDArray[np.uint8],
    ends: NDArray[Any],
    start: NDArray[np.int64],
    done: NDArray[Any],
    place: NDArray[np.int64],
    tid: int | None,
    scenario: Scenario,
) -> None:
    """Write the parts of records that a fault left before the page that it could not write.

    *ends*, *done*: rows of the log and samples that were written or lost; *place*: where, which for a lost one is where
    the SPU stopped; *start*: where the record began.
    """
    longest = scenario.cpu.max_record_bytes
    cut = place - start
    for n in np.flatnonzero((ends["kind"] == LogKind.LOST) & (cut > 0) & (cut < longest)).tolist():
        sample = done[n : n + 1].copy()
        for shift, name in ((0, "total"), (16, "issue"), (32, "translation")):
            sample[name] = int(ends["b"][n]) >> shift & 0xFFFF
        raw, _ = _encoded(spe_records(sample, scenario, tid), np.array([longest]), scenario)
        content[start[n] : place[n]] = raw[: cut[n]]
