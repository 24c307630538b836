"""Which operation of the host an unmap belongs to.

KVM is told "this range goes" and not why. The reason is read from what the same task does around it. The first rule
that holds decides; `Recording.evidence` counts how often each did. CLEAR below stands for event 1, for 6 (MIGRATE), and
for an unmap_gfn without mn_inv_start; "then" and "follows" mean before the task enters a guest, leaves one or writes a
mark.

    no.  what the log shows                                                            operation
     1   event 3, PROTECTION_PAGE; not by a kworker (writeback cleans file pages so)   FORK
     2   event 4, SOFT_DIRTY                                                           SOFT_DIRTY
     3   event 0, UNMAP                                                                MUNMAP
     4   event 2, PROTECTION_VMA: one of at least three rising ranges without a        NUMA_SCAN
         return to guest or user, or these ranges go on where the ones before
         stopped, at a multiple of 2 MiB (task_numa_work goes VMA by VMA, stops
         after 256 MiB and remembers where)
     5   any other event 2 that is not aligned to 2 MiB at both ends                   MPROTECT
     6   CLEAR by the kernel's thread ksmd / khugepaged / kcompactdN / kswapdN         KSM / THP / COMPACT / RECLAIM
     7   CLEAR between mm_compaction_begin and mm_compaction_end                       COMPACT
     8   CLEAR between mm_vmscan_*_reclaim_begin and _end                              RECLAIM
     9   CLEAR of the range that the task passed to age_gfn last (shrink_folio_list    RECLAIM
         looks at the accessed flag of a page, then unmaps it)
    10   CLEAR, then set_spte_gfn (change_pte) of the page: copy-on-write              FORK or KSM: what shared it last
    11   CLEAR of exactly 2 MiB, then event 0 / 2 that ends inside: 6.1 splits a       MUNMAP / MPROTECT
         huge page at the VMA's new border, and notifies whether there is one or not
    12   CLEAR, and mm_migrate_pages follows: reason numa_misplaced (the last range    NUMA_MIGRATE
         only, as such a fault moves one page); compaction; demotion; any other        COMPACT; RECLAIM; MOVE
    13   CLEAR, and mm_collapse_huge_page follows (MADV_COLLAPSE)                      THP
    14   CLEAR in the stage 2 write fault of a vCPU on the page: copy-on-write         FORK or KSM, as 10
         without change_pte (Linux 6.10 and later)
    15   CLEAR, or an event 2 that 4 and 5 leave open, in a scenario that is named     that operation
         swap, gswap, ksm, unksm, compact, migrate, thp, numa, fork or like a HostOp
    16   none of these, and the caller gave `default_op`                               that operation
    17   none of these                                                                 an error

An s2_unmap outside any unmap_gfn (a memslot goes) has no notifier; only 16 and 17 apply to it. An s2_wrprotect is KVM's
dirty log and needs no rule.

Held against recordings of Linux 6.1 whose operation is known: rules 1, 4, 6 to 8, 10 and 12 decide every unmap of the
shipped recordings without a look at the scenario's name; rule 9 would say the same as 8 for all 28417 unmaps of `swap`.
Experiments with one known operation each (tests/recording) confirm 1 to 6 and 9 to 13. They also show what no rule can
tell, so that the scenario must name it: MADV_DONTNEED, MADV_FREE, hole punching, truncation, a split of huge pages.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from spepolicy.machine.hostops import HostOp
from spepolicy.recording.model import NO_NOTIFIER

__all__ = ["Classifier", "Task", "Undecided"]

# enum mmu_notifier_event, include/linux/mmu_notifier.h, Linux 6.1
UNMAP, CLEAR, PROTECTION_VMA, PROTECTION_PAGE, SOFT_DIRTY, RELEASE, MIGRATE, EXCLUSIVE = range(8)
HUGE = 2 << 20  # bytes of a huge page with 4 KiB pages; also what a NUMA scan rounds its range to

_TASKS = {"ksmd": HostOp.KSM, "khugepaged": HostOp.THP, "kcompactd": HostOp.COMPACT, "kswapd": HostOp.RECLAIM}
# enum migrate_reason, include/linux/migrate_mode.h, as include/trace/events/migrate.h prints it
_REASONS = {
    "compaction": HostOp.COMPACT,
    "memory_failure": HostOp.MOVE,
    "memory_hotplug": HostOp.MOVE,
    "syscall_or_cpuset": HostOp.MOVE,
    "mempolicy_mbind": HostOp.MOVE,
    "contig_range": HostOp.MOVE,
    "longterm_pin": HostOp.MOVE,
    "demotion": HostOp.RECLAIM,
}
_SCENARIOS = {
    "swap": HostOp.RECLAIM,
    "gswap": HostOp.RECLAIM,
    "ksm": HostOp.KSM,
    "unksm": HostOp.KSM,
    "compact": HostOp.COMPACT,
    "migrate": HostOp.MOVE,
    "thp": HostOp.THP,
    "numa": HostOp.NUMA_MIGRATE,
    "fork": HostOp.FORK,
}
UNMAPPING = [op for op in HostOp if op not in (HostOp.NONE, HostOp.CPU_TOUCH, HostOp.AGE, HostOp.DIRTY_LOG)]
_SCENARIOS.update({op.name.lower(): op for op in UNMAPPING})


@dataclass(slots=True)
class Undecided:
    """An unmap that still waits for its operation."""

    event: int  # row of the recording
    first: int  # pages
    end: int
    line: int  # of the log
    comm: str
    notifier: int
    copied: bool = False  # in a stage 2 write fault on this page
    memslot: bool = False  # s2_unmap outside unmap_gfn


@dataclass(slots=True)
class _Chain:
    """PROTECTION_VMA ranges of one visit of a task to the kernel, rising; addresses are virtual, in bytes."""

    start: int
    end: int
    ranges: int = 1
    members: list[tuple[Undecided, bool]] = field(default_factory=list)  # and whether it is large and aligned


@dataclass(slots=True)
class Task:
    """What one task (thread) of the host is in the middle of."""

    comm: str
    notifier: int = NO_NOTIFIER  # the task's last mn_inv_start: event, range of virtual addresses
    start: int = 0
    end: int = 0
    chain: _Chain | None = None
    pending: list[Undecided] = field(default_factory=list)
    compacting: bool = False
    reclaiming: bool = False
    aged: tuple[int, int] = (-1, -1)  # guest frames of the last age_gfn
    unmapping: tuple[int, int] = (-1, -1)  # guest frames of the last unmap_gfn that s2_unmap has not covered yet
    pointing: int = -1  # guest frame of the set_spte_gfn whose s2_map is due
    pointing_row: int = -1  # row of the unmap before it
    write_fault: int = -1  # guest frame of the stage 2 write fault that the task handles
    unmapped: Undecided | None = None  # the task's last unmap, if no other mn_inv_start came after it
    entered: int = 0  # line at which the vCPU last entered the guest


class Classifier:
    """Applies the rules of this module to unmaps in the order of the log."""

    def __init__(self, ram_pages: int) -> None:
        self.decided: dict[int, HostOp] = {}  # row of the recording: operation
        self.evidence: Counter[str] = Counter()
        self.left: list[Undecided] = []
        self._chains: list[_Chain] = []
        self._shared = bytearray(ram_pages)  # per page: the operation (FORK or KSM) that shared it last

    def invalidate(self, task: Task, notifier: int, start: int, end: int) -> None:
        """Take note of mn_inv_start; *start* and *end* are virtual addresses."""
        if notifier in (UNMAP, PROTECTION_VMA):
            huge = task.end - task.start == HUGE and task.start % HUGE == 0 and task.notifier == CLEAR
            if huge and task.unmapped and (task.start < start < task.end or task.start < end < task.end):
                op = HostOp.MUNMAP if notifier == UNMAP else HostOp.MPROTECT
                split = [it for it in task.pending if (it.first, it.end) == (task.unmapped.first, task.unmapped.end)]
                task.pending = [it for it in task.pending if it not in split]
                self._decide(split, op, "CLEAR of 2 MiB for the split of a VMA")
        if notifier == PROTECTION_VMA:
            chain = task.chain
            if chain and start >= chain.end:
                chain.end = end
                chain.ranges += 1
            else:
                task.chain = _Chain(start, end)
                self._chains.append(task.chain)
        task.notifier, task.start, task.end, task.unmapped = notifier, start, end, None

    def unmap(self, task: Task, it: Undecided, aged: bool) -> None:
        """Decide the operation of *it* or keep it until what follows decides. *aged*: the task aged this range last."""
        task.unmapped = it
        if it.memslot:
            self.left.append(it)
        elif it.notifier == PROTECTION_PAGE and not task.comm.startswith("kworker"):
            self._decide([it], HostOp.FORK, "PROTECTION_PAGE")
        elif it.notifier == SOFT_DIRTY:
            self._decide([it], HostOp.SOFT_DIRTY, "SOFT_DIRTY")
        elif it.notifier == UNMAP:
            self._decide([it], HostOp.MUNMAP, "UNMAP")
        elif it.notifier == PROTECTION_VMA and task.chain:
            large = task.start % HUGE == 0 and task.end % HUGE == 0
            task.chain.members.append((it, large))
        elif it.notifier in (CLEAR, MIGRATE, NO_NOTIFIER):
            by_task = _TASKS.get(task.comm.rstrip("0123456789"))
            if by_task:
                self._decide([it], by_task, f"task {by_task.name}")
            elif task.compacting:
                self._decide([it], HostOp.COMPACT, "inside mm_compaction_begin/end")
            elif task.reclaiming:
                self._decide([it], HostOp.RECLAIM, "inside mm_vmscan_reclaim_begin/end")
            elif aged:
                self._decide([it], HostOp.RECLAIM, "aged just before")
            else:
                task.pending.append(it)
        else:
            self.left.append(it)

    def repointed(self, task: Task, page: int) -> bool:
        """Take note of set_spte_gfn (change_pte). Return whether *task* unmapped just this page before."""
        it = task.unmapped
        if it is None or (it.first, it.end) != (page, page + 1):
            return False
        if task.pending and task.pending[-1] is it:  # still undecided, so it was not ksmd: the page was copied
            self._copy_on_write(task.pending.pop(), "copy-on-write, change_pte")
        return True

    def migrated(self, task: Task, reason: str) -> None:
        """Take note of mm_migrate_pages: pages that the task unmapped were moved, for *reason*."""
        if reason == "numa_misplaced":
            if task.pending and task.pending[-1] is task.unmapped:
                self._decide([task.pending.pop()], HostOp.NUMA_MIGRATE, "mm_migrate_pages numa_misplaced")
        elif reason in _REASONS:
            self._decide(task.pending, _REASONS[reason], f"mm_migrate_pages {reason}")

    def collapsed(self, task: Task) -> None:
        """Take note of mm_collapse_huge_page."""
        self._decide(task.pending, HostOp.THP, "mm_collapse_huge_page")

    def visit_ends(self, task: Task) -> None:
        """The task enters or leaves a guest, or a system call: what follows has nothing to do with what came before."""
        for it in task.pending:
            if it.copied:
                self._copy_on_write(it, "copy-on-write, write fault")
            else:
                self.left.append(it)
        task.pending.clear()
        task.chain = None

    def finish(self, tasks: list[Task], scenario: str, default: HostOp | None) -> list[Undecided]:
        """Decide what can be decided at the end of the log; return what cannot, in the order of the log."""
        for task in tasks:
            self.visit_ends(task)
        for i, chain in enumerate(self._chains):
            resumes = i > 0 and self._chains[i - 1].end == chain.start and chain.start % HUGE == 0
            resumed = i + 1 < len(self._chains) and self._chains[i + 1].start == chain.end and chain.end % HUGE == 0
            for it, large in chain.members:
                if chain.ranges >= 3 or resumes or resumed:
                    self._decide([it], HostOp.NUMA_SCAN, "PROTECTION_VMA in a scan of VMAs")
                elif not large:
                    self._decide([it], HostOp.MPROTECT, "PROTECTION_VMA, not a scan")
                else:
                    self.left.append(it)
        named = _SCENARIOS.get(scenario.lower())
        unknown = []
        for it in sorted(self.left, key=lambda it: it.line):
            if named and not it.memslot and it.notifier in (CLEAR, MIGRATE, NO_NOTIFIER):
                self._decide([it], named, f"scenario {scenario}")
            elif it.notifier == PROTECTION_VMA and named in (HostOp.NUMA_MIGRATE, HostOp.NUMA_SCAN):
                self._decide([it], HostOp.NUMA_SCAN, f"scenario {scenario}")
            elif it.notifier == PROTECTION_VMA and named == HostOp.MPROTECT:
                self._decide([it], HostOp.MPROTECT, f"scenario {scenario}")
            elif default is not None:
                self._decide([it], default, f"default_op {default.name}")
            else:
                unknown.append(it)
        return unknown

    def _copy_on_write(self, it: Undecided, rule: str) -> None:
        by = self._shared[it.first] if it.end == it.first + 1 else 0
        if by:
            self._decide([it], HostOp(by), rule)
            self._shared[it.first] = 0  # the copy is the guest's own
        else:
            self.left.append(it)

    def _decide(self, undecided: list[Undecided], op: HostOp, rule: str) -> None:
        for it in undecided:
            self.decided[it.event] = op
            self.evidence[f"unmap: {rule}"] += 1
            if op in (HostOp.FORK, HostOp.KSM):
                self._shared[it.first : it.end] = bytes([op]) * (it.end - it.first)
        undecided.clear()
