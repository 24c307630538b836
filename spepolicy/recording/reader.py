"""Reads the trace of a KVM/arm64 host into a `Recording`.

The trace needs kprobe events, because the kernel's own kvm:* tracepoints give host virtual addresses only. Their names,
with the function probed in Linux 6.1 and the fields, in hexadecimal; gfn is a guest frame number, addr an IPA:

    event                function                                     fields            becomes
    mn_inv_start         kvm_mmu_notifier_invalidate_range_start      start end event   `notifier` of what follows
    unmap_gfn            kvm_unmap_gfn_range                          start end (gfn)   an unmap: see recording.classify
    s2_unmap             kvm_pgtable_stage2_unmap                     addr size         an unmap unless in unmap_gfn
    set_spte_gfn         kvm_set_spte_gfn                             start (gfn)       `repointed` of the unmap before
    age_gfn              kvm_age_gfn                                  start end (gfn)   AGE
    s2_mkold             kvm_pgtable_stage2_mkold                     addr              AGE unless in age_gfn
    s2_test_clear_young  kvm_pgtable_stage2_test_clear_young (6.12)   addr size mkold   AGE unless in age_gfn
    s2_map               kvm_pgtable_stage2_map                       addr size prot    CPU_TOUCH unless in set_spte_gfn
    s2_relax_perms       kvm_pgtable_stage2_relax_perms               addr prot         CPU_TOUCH
    s2_mkyoung           kvm_pgtable_stage2_mkyoung                   addr              CPU_TOUCH
    s2_wrprotect         kvm_pgtable_stage2_wrprotect                 addr size         DIRTY_LOG

`write` of a CPU_TOUCH is bit 1 of prot (KVM_PGTABLE_PROT_W); for s2_mkyoung it is what the page was, writable if
nothing was seen of it before. Each function is probed on entry, so the time is that of the call.

Further lines decide what an unmap is for: kvm_entry, kvm_exit, kvm_guest_fault, mm_migrate_pages,
mm_collapse_huge_page, mm_compaction_begin and _end, mm_vmscan_{memcg,direct,node}_reclaim_begin and _end, and what is
written to trace_marker: `SCENARIO name start`, `SCENARIO name end`. All other lines, and events outside guest RAM or
outside the scenario, are counted in `Recording.ignored`: every line of the log is an event or counted there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spepolicy.errors import RecordingError
from spepolicy.machine.hostops import HostOp
from spepolicy.recording.classify import UNMAPPING, Undecided
from spepolicy.recording.events import Log
from spepolicy.recording.lines import damaged, numbered_lines
from spepolicy.recording.model import NO_NOTIFIER, Recording

__all__ = ["RAM_BASE_GFN", "RAM_PAGES", "read_log"]

RAM_BASE_GFN = 0x40000  # guest RAM at IPA 1 GiB, where QEMU's virt machine and the shipped recordings have it
RAM_PAGES = 65536  # 256 MiB, the guest of the shipped recordings

_PROBES = ("mn_inv_start", "unmap_gfn", "age_gfn", "s2_map", "s2_relax_perms", "s2_unmap", "s2_wrprotect", "s2_mkold")
_STOCK = ("kvm_unmap_hva_range", "kvm_age_hva", "kvm_set_spte_hva")


def read_log(
    path: str | Path,
    *,
    ram_base_gfn: int = RAM_BASE_GFN,
    ram_pages: int = RAM_PAGES,
    default_op: HostOp | None = None,
    kernel: str = "",
) -> Recording:
    """Read a kernel trace as text (`/sys/kernel/tracing/trace`, `trace-cmd report`, `perf script`), plain or gzipped.

    *ram_base_gfn* is the guest frame number (4 KiB) at which guest RAM begins, *ram_pages* its size in pages; what
    happens to other guest memory is counted and left out. *default_op* is the operation of unmaps whose reason the
    trace does not show; without it they are an error. *kernel* is noted, since a trace does not name it.
    Time starts at the mark `SCENARIO name start`, or at the first event if there is none.

    Raise RecordingError for a file that is damaged, is not such a trace, or leaves an unmap without a reason.
    """
    path = Path(path)
    if ram_base_gfn < 0 or not 0 < ram_pages < 2**31:
        raise RecordingError(f"{path}: guest RAM of {ram_pages} pages at frame {ram_base_gfn:#x} is not possible")
    if default_op is not None and default_op not in UNMAPPING:
        names = ", ".join(op.name for op in UNMAPPING)
        raise RecordingError(f"{path}: default_op {default_op.name} does not unmap anything. Choose one of {names}")
    log = Log(path, ram_base_gfn, ram_pages)
    for number, line in numbered_lines(path):
        log.line(number, line)
    _check_kinds(log)
    unknown = log.classifier.finish(list(log.tasks.values()), log.scenario, default_op)
    if unknown:
        raise _undecided(path, unknown)
    return _recording(log, kernel)


def _recording(log: Log, kernel: str) -> Recording:
    columns = np.array([row[:5] for row in log.rows], np.int64).reshape(-1, 5)
    decided = log.classifier.decided
    columns[np.fromiter(decided, np.int64), 3] = np.fromiter(decided.values(), np.int64)
    repointed = np.zeros(len(log.rows), np.bool_)
    repointed[list(log.repointed)] = True
    return Recording(
        time_us=columns[:, 0] - log.start,
        first_page=columns[:, 1].astype(np.int32),
        end_page=columns[:, 2].astype(np.int32),
        op=columns[:, 3].astype(np.uint8),
        notifier=columns[:, 4].astype(np.uint8),
        write=np.array([row[5] for row in log.rows], np.bool_),
        ram_pages=log.pages,
        duration_us=log.time - log.start,
        scenario=log.scenario,
        kernel=kernel,
        source=log.path.name,
        ignored=dict(sorted(log.ignored.items())),
        evidence=dict(sorted(log.classifier.evidence.items())),
        repointed=repointed,
    )


def _check_kinds(log: Log) -> None:
    """Raise RecordingError if *log* cannot tell what happened to the guest's memory."""
    remedy = "Record kvm:* and the kprobes that spepolicy.recording.reader lists, as text of ftrace, trace-cmd or perf."
    if not any(name in log.handlers or name.startswith("kvm_") for name in log.seen):
        line, text = log.strange or (0, "")
        common = ", ".join(name for name, _ in log.seen.most_common(5))
        problem = f"no event of KVM in it, only {common}" if common else f"not a kernel trace; it begins {text!r}"
        raise damaged(log.path, 0 if common else line, problem, "kvm:* events and kprobes", remedy)
    stock = [name for name in _STOCK if log.seen[name]]
    if stock and not any(log.seen[name] for name in _PROBES):
        problem = f"{log.seen[stock[0]]} {stock[0]} events, which have host virtual addresses only, and no kprobes"
        raise damaged(log.path, 0, problem, "unmap_gfn, s2_map and the other kprobes", remedy)
    if not log.rows and log.outside[1]:
        low, high = log.outside
        problem = f"no event touches guest RAM, frames {log.base:#x} to {log.base + log.pages:#x}"
        remedy = f"The log's frames lie between {low:#x} and {high:#x}: give ram_base_gfn and ram_pages."
        raise damaged(log.path, 0, problem, "events on guest RAM", remedy)


def _undecided(path: Path, unknown: list[Undecided]) -> RecordingError:
    it = unknown[0]
    how = f"after notifier event {it.notifier}" if it.notifier != NO_NOTIFIER else "without a notifier event"
    problem = f"{len(unknown)} unmaps have no known reason; the first, by '{it.comm}' {how}, is of page {it.first}"
    expected = "events around it that show the reason (rules in spepolicy.recording.classify)"
    remedy = (
        "Name the scenario like the operation (write 'SCENARIO dontneed start' to trace_marker) or give default_op."
    )
    return damaged(path, it.line, problem, expected, remedy)
