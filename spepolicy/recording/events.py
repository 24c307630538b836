"""Turns the lines of a KVM host's trace into events, one by one, as the table in `spepolicy.recording.reader` says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from spepolicy.machine.hostops import HostOp
from spepolicy.recording.classify import Classifier, Task, Undecided
from spepolicy.recording.lines import LOST, damaged, fields, parse
from spepolicy.recording.model import NO_NOTIFIER

__all__ = ["Log"]

PAGE_SHIFT = 12
CLOCK_STEP_US = 100_000  # the CPUs' trace clocks may differ by less; more means that two logs were pasted together

_MARK = re.compile(r"(?:tracing_mark_write: )?SCENARIO (\S+)(.*)")
_FAULT = re.compile(r"ipa 0x([0-9a-f]+), hsr 0x([0-9a-f]+)")
_PROT_W = 2  # enum kvm_pgtable_prot, arch/arm64/include/asm/kvm_pgtable.h
_UNSET = 255  # operation of an unmap that is not decided yet


class Log:
    """What has been read of one log."""

    def __init__(self, path: Path, base: int, pages: int) -> None:
        self.path, self.base, self.pages = path, base, pages
        self.ignored: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.tasks: dict[str, Task] = {}
        self.number, self.name = 0, ""
        self.time = self.start = 0  # of the last line and of the recording's start: microseconds on the trace's clock
        self.scenario, self.ended = "", False
        self.strange: tuple[int, str] | None = None  # the first line that is no event
        self.outside = (1 << 62, 0)  # guest frames seen outside RAM
        self._begin()
        self.handlers: dict[str, Callable[[Task, str], None]] = {
            "mn_inv_start": self._invalidate,
            "unmap_gfn": self._unmap,
            "s2_unmap": self._s2_unmap,
            "set_spte_gfn": self._set_spte,
            "age_gfn": self._age,
            "s2_mkold": self._s2_age,
            "s2_test_clear_young": self._s2_age,
            "s2_map": self._map,
            "s2_relax_perms": self._relax,
            "s2_mkyoung": self._young,
            "s2_wrprotect": self._write_protect,
            "kvm_entry": self._entry,
            "kvm_exit": self._exit,
            "kvm_guest_fault": self._fault,
            "mm_migrate_pages": self._migrate,
            "mm_collapse_huge_page": self._collapse,
            "mm_compaction_begin": self._bracket,
            "mm_compaction_end": self._bracket,
            "print": self._mark,
            "tracing_mark_write": self._mark,
        }
        for kind in ("memcg", "direct", "node"):
            for end in ("begin", "end"):
                self.handlers[f"mm_vmscan_{kind}_reclaim_{end}"] = self._bracket

    def _begin(self) -> None:
        """Start an empty recording, at the first line or at the scenario's mark."""
        self.rows: list[tuple[int, int, int, int, int, bool]] = []  # time, first, end, op, notifier, write
        self.repointed: set[int] = set()  # rows of the unmaps after which the host itself mapped the page again
        self._pointed: dict[int, tuple[int, int]] = {}  # page that is mapped in this way: that row, line of the mapping
        self.writable = bytearray(b"\1") * self.pages
        self.classifier = Classifier(self.pages)
        self.tasks.clear()

    # -- lines ---------------------------------------------------------------------------------------------------------

    def line(self, number: int, line: str) -> None:
        """Take one line of the log."""
        event = parse(line)
        if event is None:
            self._no_event(number, line)
            return
        comm, pid, seconds, fraction, name, colon, text = event
        self.name = name
        if not colon:
            self.ignored["function"] += 1
            return
        self.seen[name] += 1
        handler = self.handlers.get(name)
        if handler is None or self.ended:
            self.ignored[f"{name} after the scenario" if handler else name] += 1
            return
        now = int(seconds) * 1_000_000 + int(fraction[:6])
        if now < self.time:
            if self.time - now > CLOCK_STEP_US:
                problem = f"time goes back by {(self.time - now) / 1e6:.6f} s"
                remedy = (
                    "Two logs pasted together? Read them one by one, or record with trace_clock 'global' or 'mono'."
                )
                raise damaged(self.path, number, problem, "time stamps that rise", remedy)
            self.ignored["(time stamps raised to that of the line before)"] += 1
            now = self.time
        if not self.time:
            self.start = now
        self.time, self.number = now, number
        task = self.tasks.get(pid)
        if task is None:
            task = self.tasks[pid] = Task(comm)
        handler(task, text)

    def _no_event(self, number: int, line: str) -> None:
        lost = LOST.search(line)
        if self.strange is None and line.strip() and not line.startswith(("#", "cpus=")):
            self.strange = (number, line.strip()[:80])
        if lost:
            self.ignored["(events lost by the trace buffer)"] += int(next(filter(None, lost.groups()), 1))
        elif any(f" {name}:" in line or f":{name}:" in line for name in self.handlers):
            problem = f"no time stamp or task in {line.strip()[:80]!r}"
            remedy = "Keep the trace as the kernel or the tool wrote it, with trace_clock 'local', 'global' or 'mono'."
            raise damaged(self.path, number, problem, "'TASK-PID [CPU] SECONDS.MICROS: event: ...'", remedy)
        counts = re.search(r"entries-in-buffer/entries-written: (\d+)/(\d+)", line)
        if counts and counts[1] != counts[2]:
            self.ignored["(events lost by the trace buffer)"] += int(counts[2]) - int(counts[1])
        self.ignored["comment" if line.startswith("#") else "not an event"] += 1

    def _fields(self, text: str, *names: str) -> list[int]:
        values = fields(text, names)
        if values is None:
            problem = f"malformed {self.name}: {text.strip()[:80]!r}"
            expected = " ".join(f"{name}=0x..." for name in names)
            remedy = "Was the line cut, or the kprobe defined otherwise?"
            raise damaged(self.path, self.number, problem, expected, remedy)
        return values

    def _pages(self, first: int, end: int) -> tuple[int, int] | None:
        """Return guest frames first..end as pages of guest RAM, None (and counted) if there are none."""
        name = self.name
        if end <= first:
            problem = f"malformed {name}: the range from {first:#x} to {end:#x} is empty"
            raise damaged(self.path, self.number, problem, "an end above the start", "Was the line cut?")
        low, high = max(first - self.base, 0), min(end - self.base, self.pages)
        if low >= high:
            self.ignored[f"{name} outside guest RAM"] += 1
            self.outside = (min(self.outside[0], first), max(self.outside[1], end))
            return None
        return low, high

    def _frames(self, addr: int, size: int) -> tuple[int, int]:
        return addr >> PAGE_SHIFT, (addr + size + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT

    def _add(self, pages: tuple[int, int], op: HostOp, write: bool = False) -> None:
        self.rows.append((self.time, *pages, op, NO_NOTIFIER, write))
        self.classifier.evidence[self.name] += 1

    # -- unmaps --------------------------------------------------------------------------------------------------------

    def _invalidate(self, task: Task, text: str) -> None:
        start, end, notifier = self._fields(text, "start", "end", "event")
        if notifier > 7:
            remedy = "Check the offset of the field in the kprobe (struct mmu_notifier_range; see pahole)."
            raise damaged(self.path, self.number, f"malformed mn_inv_start: event={notifier}", "event=0 to 7", remedy)
        self.ignored["mn_inv_start (context)"] += 1
        self.classifier.invalidate(task, notifier, start, end)

    def _unmap(self, task: Task, text: str) -> None:
        first, end = self._fields(text, "start", "end")
        task.unmapping = (first, end)
        pages = self._pages(first, end)
        if pages:
            self._add_unmap(task, pages, task.aged == (first, end), False)

    def _s2_unmap(self, task: Task, text: str) -> None:
        addr, size = self._fields(text, "addr", "size")
        first, end = self._frames(addr, size)
        next_frame, last = task.unmapping
        for shift in (14, 16):
            if next_frame > 0 and addr >> shift == next_frame and addr >> PAGE_SHIFT != next_frame:
                problem = f"unmap_gfn counts pages of {1 << shift} bytes"
                remedy = "Recordings of other hosts cannot be replayed."
                raise damaged(self.path, self.number, problem, "a host with 4 KiB pages", remedy)
        if first == next_frame and end <= last:  # later kernels unmap a range in pieces
            task.unmapping = (end, last) if end < last else (-1, -1)
            self.ignored["s2_unmap (within unmap_gfn)"] += 1
            return
        pages = self._pages(first, end)
        if pages:
            self._add_unmap(task, pages, False, True)

    def _add_unmap(self, task: Task, pages: tuple[int, int], aged: bool, memslot: bool) -> None:
        notifier = NO_NOTIFIER if memslot else task.notifier
        it = Undecided(len(self.rows), *pages, self.number, task.comm, notifier, memslot=memslot)
        it.copied = pages == (task.write_fault - self.base, task.write_fault - self.base + 1)
        self.rows.append((self.time, *pages, _UNSET, notifier, False))
        self._forget_pointed(pages)
        self.classifier.unmap(task, it, aged)

    def _forget_pointed(self, pages: tuple[int, int]) -> None:
        if self._pointed and pages[1] - pages[0] < len(self._pointed):
            for page in range(*pages):
                self._pointed.pop(page, None)
        elif self._pointed:
            self._pointed = {page: at for page, at in self._pointed.items() if not pages[0] <= page < pages[1]}

    def _set_spte(self, task: Task, text: str) -> None:
        (frame,) = self._fields(text, "start")
        task.pointing, task.pointing_row = frame, -1
        pages = self._pages(frame, frame + 1)
        if pages is None:
            return
        row = task.unmapped.event if task.unmapped else -1
        if self.classifier.repointed(task, pages[0]):
            self.ignored["set_spte_gfn (`repointed` of the unmap before)"] += 1
            self.repointed.add(row)
            task.pointing_row = row
            self.writable[pages[0]] = 0
        else:
            self.ignored["set_spte_gfn without an unmap before"] += 1

    def _fault(self, task: Task, text: str) -> None:
        match = _FAULT.match(text)
        if match is None:
            problem = f"malformed kvm_guest_fault: {text.strip()[:80]!r}"
            raise damaged(self.path, self.number, problem, "'ipa 0x..., hsr 0x...'", "Was the line cut?")
        self.ignored["kvm_guest_fault (context)"] += 1
        frame, syndrome = int(match[1], 16) >> PAGE_SHIFT, int(match[2], 16)
        # ESR_EL2 (Arm ARM DDI 0487, D24.2): EC 0x24 data abort, ISS bit 6 WnR; bits 5:2 = 1 translation fault
        task.write_fault = frame if syndrome >> 26 == 0x24 and syndrome & 0x40 else -1
        # change_pte brings no memory for tables: where an unmap has freed the level 3 table it maps nothing. That shows
        # in a translation fault of a vCPU that entered the guest after change_pte.
        row, line = self._pointed.get(frame - self.base, (-1, self.number))
        if syndrome & 0x3C == 0x04 and line < task.entered:
            del self._pointed[frame - self.base]
            self.repointed.discard(row)
            self.ignored["(set_spte_gfn without effect)"] += 1

    # -- the other operations ------------------------------------------------------------------------------------------

    def _age(self, task: Task, text: str) -> None:
        first, end = self._fields(text, "start", "end")
        task.aged = (first, end)
        pages = self._pages(first, end)
        if pages:
            self._add(pages, HostOp.AGE)

    def _s2_age(self, task: Task, text: str) -> None:
        name = self.name
        if name == "s2_mkold":
            (addr,), size, old = self._fields(text, "addr"), 1 << PAGE_SHIFT, 1
        else:
            addr, size, old = self._fields(text, "addr", "size", "mkold")
        if not old or task.aged[0] <= addr >> PAGE_SHIFT < task.aged[1]:
            self.ignored[f"{name} (within age_gfn)" if old else f"{name} without mkold"] += 1
            return
        pages = self._pages(*self._frames(addr, size))
        if pages:
            self._add(pages, HostOp.AGE)

    def _touch(self, pages: tuple[int, int] | None, write: bool) -> None:
        if pages:
            self._add(pages, HostOp.CPU_TOUCH, write)
            self.writable[pages[0] : pages[1]] = bytes([write]) * (pages[1] - pages[0])
            self._forget_pointed(pages)

    def _map(self, task: Task, text: str) -> None:
        addr, size, prot = self._fields(text, "addr", "size", "prot")
        if addr >> PAGE_SHIFT == task.pointing:
            task.pointing = -1
            page = (addr >> PAGE_SHIFT) - self.base
            if task.pointing_row >= 0:
                self._pointed[page] = (task.pointing_row, self.number)
            self.ignored["s2_map (within set_spte_gfn)"] += 1
        else:
            self._touch(self._pages(*self._frames(addr, size)), bool(prot & _PROT_W))

    def _relax(self, task: Task, text: str) -> None:
        addr, prot = self._fields(text, "addr", "prot")
        self._touch(self._pages(*self._frames(addr, 1)), bool(prot & _PROT_W))

    def _young(self, task: Task, text: str) -> None:
        (addr,) = self._fields(text, "addr")
        pages = self._pages(*self._frames(addr, 1))
        self._touch(pages, bool(pages and self.writable[pages[0]]))

    def _write_protect(self, task: Task, text: str) -> None:
        addr, size = self._fields(text, "addr", "size")
        pages = self._pages(*self._frames(addr, size))
        if pages:
            self._add(pages, HostOp.DIRTY_LOG)
            self.writable[pages[0] : pages[1]] = bytes(pages[1] - pages[0])

    # -- context -------------------------------------------------------------------------------------------------------

    def _entry(self, task: Task, text: str) -> None:
        self.ignored["kvm_entry (context)"] += 1
        self.classifier.visit_ends(task)
        task.write_fault = task.pointing = -1
        task.entered = self.number

    def _exit(self, task: Task, text: str) -> None:
        self.ignored["kvm_exit (context)"] += 1
        self.classifier.visit_ends(task)
        task.write_fault = -1

    def _migrate(self, task: Task, text: str) -> None:
        self.ignored["mm_migrate_pages (context)"] += 1
        reason = re.search(r"reason=(\w+)", text)
        if reason:
            self.classifier.migrated(task, reason[1])

    def _collapse(self, task: Task, text: str) -> None:
        self.ignored["mm_collapse_huge_page (context)"] += 1
        self.classifier.collapsed(task)

    def _bracket(self, task: Task, text: str) -> None:
        name = self.name
        self.ignored[f"{name} (context)"] += 1
        if "compaction" in name:
            task.compacting = name.endswith("begin")
        else:
            task.reclaiming = name.endswith("begin")

    def _mark(self, task: Task, text: str) -> None:
        self.ignored["mark (context)"] += 1
        self.classifier.visit_ends(task)
        mark = _MARK.match(text)
        if mark and mark[2].strip() == "end":
            self.ended, self.scenario = True, self.scenario or mark[1]
        elif mark and not self.scenario:
            if self.rows:
                self.ignored["event before the scenario"] += len(self.rows)
            self._begin()
            self.scenario, self.start = mark[1], self.time
