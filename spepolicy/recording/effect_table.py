"""Makes the table of effects from the measured cells: what each operation does, and what had to be inferred, and why.

    python -m spepolicy.recording.effect_table

reads `pin_cells.tsv` and writes `host_effects.tsv`, both in `spepolicy/machine/effects/`. The experiment acts on one
page or on 2 MiB; what one event covers when an operation acts on another range (`SCOPES` of spepolicy.machine.effects)
follows from how the kernel calls the notifier, as the comments say.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import spepolicy.machine.effects as shipped
from spepolicy.machine.effects import Effect
from spepolicy.machine.hostops import Backing, HostOp, Kernel
from spepolicy.recording.pin_cells import Cell, read_cells

__all__ = ["NOT_CONCLUSIVE", "OPERATION_OF", "make_table", "text_of"]

FOLDER = Path(shipped.__file__).parent

# The operation of the experiment that each operation of the machine is measured by.
OPERATION_OF = {
    HostOp.RECLAIM: "memcg_memory_reclaim", HostOp.KSM: "ksm_identical_pages",
    HostOp.NUMA_SCAN: "numa_balancing_scan", HostOp.NUMA_MIGRATE: "numa_balancing_scan",
    HostOp.MOVE: "move_pages_other_node", HostOp.COMPACT: "compact_memory", HostOp.FORK: "fork_child_alive",
    HostOp.DONTNEED: "madvise_DONTNEED", HostOp.MUNMAP: "munmap_page", HostOp.MPROTECT: "mprotect_READ_then_RW",
    HostOp.THP: "madvise_COLLAPSE", HostOp.DIRTY_LOG: "kvm_dirty_log_enable",
    HostOp.SOFT_DIRTY: "clear_refs_4_softdirty", HostOp.FREE: "madvise_FREE",
    HostOp.PAGEOUT: "madvise_PAGEOUT_region", HostOp.PAGEOUT_PART: "madvise_PAGEOUT_page",
    HostOp.COLD: "madvise_COLD", HostOp.MPROTECT_READ: "mprotect_READ", HostOp.MPROTECT_NONE: "mprotect_NONE",
    HostOp.MREMAP: "mremap_move", HostOp.MAP_FIXED: "mmap_MAP_FIXED_over", HostOp.FORK_EXIT: "fork_child_exits",
    HostOp.FORK_EXCLUDED: "fork_with_DONTFORK", HostOp.MBIND: "mbind_MOVE_other_node",
    HostOp.SOFT_OFFLINE: "madvise_SOFT_OFFLINE", HostOp.THP_SPLIT: "split_huge_pages_debugfs",
    HostOp.REMOVE: "madvise_REMOVE", HostOp.PUNCH_HOLE: "fallocate_PUNCH_HOLE",
    HostOp.TRUNCATE: "ftruncate_0_and_back", HostOp.MEMSLOT_DELETE: "kvm_memslot_delete_readd",
    HostOp.MEMSLOT_READ_ONLY: "kvm_memslot_readd_readonly", HostOp.LRU_GEN: "lru_gen_age_evict",
    HostOp.CLEAR_REFS: "clear_refs_1", HostOp.DIRECT_READ: "o_direct_read_into_page",
}  # fmt: skip
_BACKINGS = {"A": Backing.ANONYMOUS, "H": Backing.THP, "S": Backing.SHMEM}
_LETTERS = {backing: letter for letter, backing in _BACKINGS.items()}
# One notifier call for the whole range: madvise, mprotect, munmap, mmap, truncation, fork, a scan. The others take page
# by page: rmap (try_to_unmap, try_to_migrate), KSM, collapse.
_ON_PAGE_RANGE = (
    HostOp.DONTNEED, HostOp.FREE, HostOp.MPROTECT, HostOp.MPROTECT_READ, HostOp.MPROTECT_NONE, HostOp.MUNMAP,
    HostOp.MREMAP, HostOp.MAP_FIXED, HostOp.REMOVE, HostOp.PUNCH_HOLE,
)  # fmt: skip
_ON_REGION_RANGE = (
    HostOp.FORK, HostOp.FORK_EXIT, HostOp.NUMA_SCAN, HostOp.SOFT_DIRTY, HostOp.TRUNCATE, HostOp.DIRTY_LOG,
    HostOp.MEMSLOT_DELETE, HostOp.MEMSLOT_READ_ONLY,
)  # fmt: skip
_KVM_OWN = (HostOp.DIRTY_LOG, HostOp.MEMSLOT_DELETE, HostOp.MEMSLOT_READ_ONLY)
_FILE_ONLY = (HostOp.REMOVE, HostOp.PUNCH_HOLE, HostOp.TRUNCATE)
_EVICTS = (HostOp.RECLAIM, HostOp.PAGEOUT, HostOp.PAGEOUT_PART)
_KSM_SCANS = 4  # the experiment lets ksmd pass four times: a page that cannot merge is unmapped once a pass

# (kernel, run, operation, backing, states): the operation did not reach the page, so the cell says nothing.
NOT_CONCLUSIVE = {
    ("6.1", "", "compact_memory", "A", "MPB"): "the scanner did not pick the page; see the fresh_boot run",
    ("6.1", "", "compact_memory", "HS", "UMPB"): "the scanner did not pick the page",
    (
        "6.1",
        "fresh_boot",
        "compact_memory",
        "A",
        "M",
    ): "four mlocked neighbours moved, each unmapped; this page did not",
    ("6.12", "", "compact_memory", "AHS", "UP"): "nothing moved in that boot",
    ("6.1", "", "lru_gen_age_evict", "A", "UMP"): "nothing was evicted",
}

Rows = dict[tuple[str, Backing, HostOp, str], Effect]
_NOTHING = ("", "")


def make_table(cells: list[Cell]) -> Rows:
    """Return every row of the table, by (kernel, backing, operation, state)."""
    plain = {(c.kernel, c.operation, c.backing, c.state): c for c in cells if not c.run}
    measured: Rows = {}
    for kernel in Kernel:
        for letter, backing in _BACKINGS.items():
            for op in OPERATION_OF:
                for state in shipped.STATES:
                    row = _measured(plain, _number(kernel), letter, op, state)
                    if row:
                        measured[_number(kernel), backing, op, state] = row
    rows: Rows = {}
    for kernel in Kernel:
        for backing in Backing:
            for op in HostOp:
                for state in shipped.STATES:
                    key = (_number(kernel), backing, op, state)
                    rows[key] = measured.get(key) or _inferred(measured, *key)
    return rows


def _number(kernel: Kernel) -> str:
    return kernel.name.removeprefix("V").replace("_", ".")


# ---- measured --------------------------------------------------------------------------------------------------------


def _measured(
    cells: dict[tuple[str, str, str, str], Cell], kernel: str, letter: str, op: HostOp, state: str
) -> Effect | None:
    """Return the row that a cell gives, None if there is none or it is not conclusive."""
    name = OPERATION_OF[op]
    cell = cells.get((kernel, name, letter, state))
    if cell is None or _not_conclusive(cell):
        return None
    older = cells.get(("6.1", name, letter, state))
    if op == HostOp.NUMA_MIGRATE:
        return _migration(cell, op, letter)
    if op == HostOp.PAGEOUT and kernel == "6.1":
        return _pageout(cell, cells[kernel, "madvise_PAGEOUT_region_twice", letter, state], op, letter)
    if op == HostOp.PAGEOUT_PART and kernel == "6.1" and letter != "H":
        return _pageout(
            cell, cells[kernel, "madvise_PAGEOUT_region_twice", letter, "U" if state == "U" else "P"], op, letter
        )
    words = _ranged(cell, older)
    if op == HostOp.NUMA_SCAN:
        words = [(event, span, 1) for event, span, _ in words]
    if op == HostOp.KSM:
        words = [(event, span, count // _KSM_SCANS if count >= _KSM_SCANS else count) for event, span, count in words]
    steps = [_step(event, span, count, op, letter) for event, span, count in words]
    if op in (HostOp.MEMSLOT_DELETE, HostOp.MEMSLOT_READ_ONLY):
        steps = ["drop/range"]
    return Effect(" ".join(steps), _outcome(cell, older, op), "measured")


def _not_conclusive(cell: Cell) -> bool:
    return any(
        (cell.kernel, cell.run, cell.operation) == key[:3] and cell.backing in key[3] and cell.state in key[4]
        for key in NOT_CONCLUSIVE
    )


def _words(events: str) -> Iterator[tuple[str, str, int]]:
    """Yield (event, "first,end" or "", count) of the events that are calls of KVM."""
    for word in events.split():
        match = re.fullmatch(r"(\w+)(?:\[(\d+,\d+)\])?(?:\*(\d+))?", word)
        if match and match[1] in (*shipped.KINDS, "age"):
            yield match[1], match[2] or "", int(match[3] or 1)


def _ranged(cell: Cell, older: Cell | None) -> list[tuple[str, str, int]]:
    """Return the events of *cell* with ranges: where it has counts only, in the order and with the ranges of 6.1."""
    words = list(_words(cell.events))
    if all(span for _, span, _ in words):
        return words
    template = list(_words(older.events)) if older else []
    counts = {event: count for event, _, count in words}
    known = {event: sum(n for name, _, n in template if name == event) for event in counts}
    if counts == {event: n for event, n in known.items() if n}:
        return [word for word in template if word[0] in counts]
    order = [event for event, _, _ in template]
    out = []
    for event in sorted(counts, key=lambda name: order.index(name) if name in order else len(order)):
        spans = {span for name, span, _ in template if name == event}
        fallback = "0,512" if cell.backing == "H" else "3,4"
        out.append((event, spans.pop() if len(spans) == 1 else fallback, counts[event]))
    return out


def _step(event: str, span: str, count: int, op: HostOp, letter: str) -> str:
    whole = span == "0,512"
    if op in _ON_PAGE_RANGE:
        scope = "edges" if whole else "range"
    elif op in _ON_REGION_RANGE:
        # A pinned huge page is split when the child copies it: a call for each of them.
        scope = "range" if event != "CLEAR" or op == HostOp.TRUNCATE else "folio"
    else:
        scope = "folio" if whole else "page"
    return f"{event}/{scope}" + (f"*{count}" if count > 1 else "")


def _outcome(cell: Cell, older: Cell | None, op: HostOp) -> str:
    words = []
    copied = "CLEAR" in cell.counts("write_events")
    fault = any(name.startswith("permission") for name in cell.counts("write_events"))
    if cell.read == "error":
        words.append("hole")
    elif cell.read == "lost" and cell.events:
        words.append("empty" if copied else "replaced")
    elif cell.page == "swapped" or (cell.page == "none" and op in _EVICTS):
        words.append("swapped")  # of shared memory the VMM's entry is just empty then
    elif cell.page == "moved":
        words.append("moved")
    elif op == HostOp.KSM and copied:
        words.append("merged")
    elif op in (HostOp.FORK, HostOp.FORK_EXIT) and copied:
        words.append("shared")
    elif fault and cell.write == "ok" and op != HostOp.DIRTY_LOG and op != HostOp.NUMA_SCAN:
        words.append("write_tracked")
    if op == HostOp.MPROTECT:
        words.append("writable")
    if op == HostOp.FREE and cell.events:
        words.append("lazy")
    if cell.write != "ok" and cell.read != "error":
        words.append("read_only")
    maps = (older or cell).read_events
    if cell.backing == "H" and ("page." in maps or cell.read == "error") and cell.events:
        words.append("split")
    if op == HostOp.THP and "block." in maps:
        words.append("collapsed")
    return " ".join(words)


def _migration(cell: Cell, op: HostOp, letter: str) -> Effect:
    """The fault that a scan provokes moves the page, or tries to."""
    count = cell.counts("read_events").get("CLEAR", 0)
    span = "0,512" if letter == "H" else "3,4"
    outcome = "moved" if count and cell.state in "UM" else ""
    if count and any(name.startswith("permission") for name in cell.counts("write_events")):
        outcome = f"{outcome} write_tracked".strip()
    return Effect(_step("CLEAR", span, count, op, letter) if count else "", outcome, "measured")


def _pageout(once: Cell, twice: Cell, op: HostOp, letter: str) -> Effect:
    """6.1 spares a page that was accessed since it was aged: what the second call did is what follows the ageing."""
    first, both = list(_words(once.events)), list(_words(twice.events))
    if not first:
        return Effect("", "", "measured")
    assert both[0] == (first[0][0], first[0][1], 2)
    assert len(first) == 1
    steps = [_step("age!", first[0][1], 1, op, letter)]
    steps += [_step(event, span, count, op, letter) for event, span, count in both[1:]]
    return Effect(" ".join(steps), _outcome(twice, None, op) if len(both) > 1 else "", "measured")


# ---- inferred --------------------------------------------------------------------------------------------------------


def _inferred(measured: Rows, kernel: str, backing: Backing, op: HostOp, state: str) -> Effect:
    if backing == Backing.HUGETLB:
        return _hugetlb(op, state)
    if backing == Backing.GUEST_MEMFD:
        return _guest_memfd(op)
    if op == HostOp.NONE:
        return Effect(*_NOTHING, "measured")
    if op == HostOp.CPU_TOUCH:
        return Effect(*_NOTHING, "inferred: a fault of the guest's CPU, not an operation of the host")
    if op == HostOp.AGE:
        scope = "folio" if backing == Backing.THP else "page"
        return Effect(f"age/{scope}", "", "inferred: kvm_age_gfn alone, as reclaim calls it before it decides")
    if op == HostOp.RECLAIM_LAZY:
        return _lazy(kernel, backing, state)
    by_kernel = measured.get(("6.1", backing, op, state))
    if kernel != "6.1" and by_kernel:
        steps = " ".join(word for word in by_kernel.steps.split() if not word.startswith("set_spte"))
        return Effect(steps, by_kernel.outcome, "inferred: measured on 6.1 only; change_pte went with 6.10")
    by_backing = _by_backing(measured, kernel, backing, op, state)
    if by_backing:
        return by_backing
    return _by_state(measured, kernel, backing, op, state)


def _row(measured: Rows, kernel: str, backing: Backing, op: HostOp, state: str) -> Effect:
    key = (kernel, backing, op, state)
    return measured.get(key) or _inferred(measured, *key)


def _because(row: Effect, reason: str) -> Effect:
    return Effect(row.steps, row.outcome, f"inferred: {reason}")


def _by_state(measured: Rows, kernel: str, backing: Backing, op: HostOp, state: str) -> Effect:
    if op == HostOp.COMPACT and state in "UM":
        if backing != Backing.ANONYMOUS:
            return Effect(*_NOTHING, "inferred: no scanner picked such a page in the experiment")
        if state == "M":
            row = _row(measured, kernel, backing, op, "U")
            return _because(row, "6.1, fresh boot: four mlocked pages moved, each with its notifier")
    if op == HostOp.COMPACT:
        return Effect(*_NOTHING, "inferred: the reference count is tested first (512 pinned pages stayed, fresh boot)")
    if state == "M":
        row = _row(measured, kernel, backing, op, "U")
        reason = "KVM's own operation does not look at the VMA" if op in _KVM_OWN else "as unpinned: no eviction"
        return _because(row, reason)
    if state == "B":
        locked, pinned = (_row(measured, kernel, backing, op, other) for other in "MP")
        if not locked.steps:
            return _because(locked, "mlocked memory is spared, pinned or not")
        return _because(pinned, "as pinned: mlock does not keep this operation away")
    if op == HostOp.LRU_GEN:
        return Effect(*_NOTHING, "inferred: not on in 6.1 unless asked for; the run evicted nothing")
    raise AssertionError((kernel, backing, op, state))


def _by_backing(measured: Rows, kernel: str, backing: Backing, op: HostOp, state: str) -> Effect | None:
    """Return what follows from the backing for an operation that was not measured on it."""
    names = {(b, o) for _, b, o, _ in measured}
    if ((backing, op) in names and op != HostOp.LRU_GEN) or op == HostOp.COMPACT:
        return None
    if op in _FILE_ONLY:
        return Effect(*_NOTHING, "inferred: anonymous memory has no file (MADV_REMOVE: EINVAL)")
    if op in _KVM_OWN or op == HostOp.SOFT_DIRTY:
        row = _row(measured, kernel, Backing.ANONYMOUS, op, state)
        kept = " ".join(word for word in row.outcome.split() if word == "read_only")
        whose = "one call for the address space" if op == HostOp.SOFT_DIRTY else "KVM's own operation"
        return Effect(row.steps, kept, f"inferred: {whose}, whatever backs it")
    if op == HostOp.MPROTECT_NONE:
        row = _row(measured, kernel, backing, HostOp.MPROTECT_READ, state)
        outcome = row.outcome.replace("read_only", "hole")
        return Effect(row.steps, outcome, "inferred: the calls of mprotect(PROT_READ), no access after it")
    if op == HostOp.PAGEOUT_PART:
        return _because(_row(measured, kernel, backing, HostOp.PAGEOUT, state), "small pages are taken one by one")
    if op == HostOp.SOFT_OFFLINE:
        return _because(_row(measured, kernel, backing, HostOp.MOVE, state), "migrates the page, as move_pages")
    if op == HostOp.THP:
        reason = "huge already" if backing == Backing.THP else "shared memory without huge="
        return Effect(*_NOTHING, f"inferred: {reason}")
    if op == HostOp.LRU_GEN and backing == Backing.ANONYMOUS:
        return None
    if op == HostOp.LRU_GEN:
        scope = "folio" if backing == Backing.THP else "page"
        steps = f"age/{scope}" if kernel != "6.1" else ""
        return Effect(steps, "", "inferred: as measured for anonymous 4 KiB pages")
    reason = {
        HostOp.KSM: "KSM merges anonymous pages only",
        HostOp.FREE: "MADV_FREE is for anonymous memory (EINVAL)",
        HostOp.THP_SPLIT: "there is no huge page to split",
        HostOp.FORK_EXCLUDED: "the child gets no such mapping",
        HostOp.CLEAR_REFS: "touches the VMM's own entries only, as measured for anonymous memory",
        HostOp.DIRECT_READ: "a pin, as measured for anonymous memory",
    }[op]
    return Effect(*_NOTHING, f"inferred: {reason}")


def _lazy(kernel: str, backing: Backing, state: str) -> Effect:
    """From madvise_FREE_then_PAGEOUT, measured on small anonymous pages: what followed MADV_FREE."""
    if backing == Backing.SHMEM or state in "MB":
        return Effect(*_NOTHING, "inferred: MADV_FREE is refused here (EINVAL)")
    steps = "age/page CLEAR/page" if kernel == "6.1" else "CLEAR/page"
    outcome = "empty" if state == "U" else ""
    if backing == Backing.THP:
        return Effect(steps.replace("page", "folio"), outcome, "inferred: as a small page; MADV_FREE of a part splits")
    return Effect(steps, outcome, "measured")


def _hugetlb(op: HostOp, state: str) -> Effect:
    """A shared hugetlbfs file, not measured: what the kernel's source (mm/hugetlb.c and callers, 6.1) does."""
    off_lists = "hugetlb pages are on no LRU list, and neither merged, split, collapsed nor compacted"
    by_op: dict[HostOp, tuple[str, str, str]] = {
        HostOp.NUMA_SCAN: ("", "", "task_numa_work passes hugetlb VMAs over"),
        HostOp.NUMA_MIGRATE: ("", "", "no scan, no hint fault"),
        HostOp.FORK: ("", "", "a shared mapping is not copied"),
        HostOp.FORK_EXIT: ("", "", "a shared mapping is not copied"),
        HostOp.FORK_EXCLUDED: ("", "", "the child gets no such mapping"),
        HostOp.DONTNEED: ("CLEAR/range", "", "zaps whole huge pages; the file keeps them"),
        HostOp.REMOVE: ("CLEAR/range", "replaced", "a hole in the file, whole huge pages"),
        HostOp.PUNCH_HOLE: ("CLEAR/range", "replaced", "a hole in the file, whole huge pages"),
        HostOp.TRUNCATE: ("CLEAR/range", "replaced", "a hole in the file, whole huge pages"),
        HostOp.MPROTECT: ("PROTECTION_VMA/range*2", "", "one call each; hugetlb VMAs split at huge pages only"),
        HostOp.MPROTECT_READ: ("PROTECTION_VMA/range", "read_only", "hugetlb VMAs split at huge pages only"),
        HostOp.MPROTECT_NONE: ("PROTECTION_VMA/range", "hole", "hugetlb VMAs split at huge pages only"),
        HostOp.MUNMAP: ("UNMAP/range", "hole", "whole huge pages"),
        HostOp.MREMAP: ("UNMAP/range", "hole", "whole huge pages"),
        HostOp.MAP_FIXED: ("UNMAP/range", "empty split", "whole huge pages; what comes is small and anonymous"),
        HostOp.SOFT_DIRTY: ("SOFT_DIRTY/range", "", "one call for the address space, whatever backs it"),
        HostOp.DIRTY_LOG: ("wrprotect/range", "", "KVM's own operation, whatever backs it"),
        HostOp.MEMSLOT_DELETE: ("drop/range", "", "KVM's own operation, whatever backs it"),
        HostOp.MEMSLOT_READ_ONLY: ("drop/range", "read_only", "KVM's own operation, whatever backs it"),
    }
    if op in (HostOp.MOVE, HostOp.MBIND, HostOp.SOFT_OFFLINE):
        if state in "UM":
            return Effect("CLEAR/folio", "moved", "inferred: hugetlb pages migrate whole, as measured for THP")
        return Effect("CLEAR/folio*10", "", "inferred: unmapped for each of ten attempts, as measured for THP")
    steps, outcome, reason = by_op.get(op, ("", "", off_lists))
    return Effect(steps, outcome, f"inferred: {reason}")


def _guest_memfd(op: HostOp) -> Effect:
    """Not measured (guest_memfd came with 6.8, for arm64 memory of a VM later): kvm.md H15 and P2e."""
    if op in (HostOp.PUNCH_HOLE, HostOp.TRUNCATE):
        return Effect("drop/range", "replaced", "inferred: kvm_gmem_punch_hole unmaps the frames itself, no notifier")
    if op == HostOp.MEMSLOT_DELETE:
        return Effect("drop/range", "", "inferred: KVM's own operation, whatever backs it")
    if op == HostOp.DIRTY_LOG:
        return Effect("wrprotect/range", "", "inferred: with the series of July 2026 (dirty logging for guest_memfd)")
    if op == HostOp.MEMSLOT_READ_ONLY:
        return Effect(*_NOTHING, "inferred: KVM refuses KVM_MEM_READONLY for guest_memfd")
    return Effect(
        *_NOTHING, "inferred: folios are unmovable and unevictable, and a slot with guest_memfd only ignores notifiers"
    )


def text_of(rows: Rows) -> str:
    """Return the table as the file has it."""
    lines = ["kernel\tbacking\toperation\tstate\tsteps\toutcome\tbasis"]
    names = {_number(kernel): kernel.name for kernel in Kernel}
    for (kernel, backing, op, state), row in rows.items():
        lines.append("\t".join([names[kernel], backing.name, op.name, state, row.steps, row.outcome, row.basis]))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the table."""
    rows = make_table(read_cells(FOLDER / "pin_cells.tsv"))
    (FOLDER / "host_effects.tsv").write_text(text_of(rows), encoding="utf-8")
    measured = sum(row.basis == "measured" for row in rows.values())
    print(f"host_effects.tsv: {len(rows)} rows, {measured} measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
