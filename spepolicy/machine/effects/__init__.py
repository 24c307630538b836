"""What each host operation does to guest memory, as data: `host_effects.tsv`, one row for kernel, backing, operation
and state of the page.

The table says which events reach KVM (`steps`, in order) and what becomes of the VMM's own page (`outcome`); `basis`
says where the row comes from: `measured`, or `inferred:` and why. It is made from the measured cells in `pin_cells.tsv`
by `python -m spepolicy.recording.effect_table`. `effects` turns it into the integers that
`spepolicy.machine.operations` obeys.

A step is EVENT/SCOPE, with *n for n calls in a row. EVENT is an MMU notifier event, which unmaps; `age`, which clears
the accessed flag (`age!`: and the operation leaves a page alone that had been accessed); `set_spte` (change_pte: KVM
maps the page's new frame read-only by itself, if it has a table there); `wrprotect` (KVM's dirty log) or `drop` (a
memslot goes), which come without a notifier. SCOPE says what one call covers:

    range   all of the operation's range
    edges   the 2 MiB around either end of the range that is not a multiple of 2 MiB: __split_huge_pmd for the new VMA
    folio   the page, or the huge page that it is part of; a call for each
    page    one 4 KiB page; a call for each
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spepolicy.machine.hostops import Backing, HostOp, Kernel

__all__ = ["COLUMNS", "OUTCOMES", "STEPS", "Effect", "effects", "read_effects"]

STEPS = 6
OUTCOME, ROW, SPAN = 6, 7, 8  # columns behind the steps: outcome; what a row of a recording does; 1: has a range step
COLUMNS = 9
OPERATIONS = len(HostOp)

# Kinds of steps: 0 to 7 are MMU notifier events as enum mmu_notifier_event numbers them.
KIND_AGE, KIND_SET_SPTE, KIND_WRITE_PROTECT, KIND_DROP = 8, 9, 10, 11
KINDS = {
    "UNMAP": 0, "CLEAR": 1, "PROTECTION_VMA": 2, "PROTECTION_PAGE": 3, "SOFT_DIRTY": 4, "age": KIND_AGE,
    "set_spte": KIND_SET_SPTE, "wrprotect": KIND_WRITE_PROTECT, "drop": KIND_DROP,
}  # fmt: skip
RANGE, EDGES, FOLIO, PAGE = 1, 2, 3, 4
SCOPES = {"range": RANGE, "edges": EDGES, "folio": FOLIO, "page": PAGE}
KIND_MASK, SCOPE_SHIFT, SCOPE_MASK, SPARE, COUNT_SHIFT = 15, 4, 7, 1 << 7, 8

UNMAP = 1  # a notifier removes the stage 2 entry
MOVE = 2  # the page gets another frame, same content
SWAP = 4
SHARE = 8  # merged by KSM: another frame, read-only
AGE = 16  # the stage 2 access flag is cleared
WRITE_PROTECT = 32
REPLACE = 64  # another page, other content: a pin on the old one is stale
LOSE = 128  # no page any more
COPY_ON_WRITE = 256
ZERO = 512  # with REPLACE: nothing until the next access, which a read takes from the zero page
READ_ONLY = 1024  # the VMA, or the memslot, does not allow writes
WRITE_TRACKED = 2048  # the host's entry is read-only; a write makes it writable, without a copy
LAZY = 4096  # MADV_FREE
SPLIT = 8192  # the huge page becomes small ones
COLLAPSE = 16384  # small pages become a huge one
WRITABLE = 32768  # the VMA allows writes again
OUTCOMES = {
    "moved": MOVE, "swapped": SWAP, "merged": SHARE, "replaced": REPLACE, "empty": REPLACE | ZERO, "hole": LOSE,
    "shared": COPY_ON_WRITE, "read_only": READ_ONLY, "write_tracked": WRITE_TRACKED, "lazy": LAZY, "split": SPLIT,
    "collapsed": COLLAPSE, "writable": WRITABLE,
}  # fmt: skip
STATES = ("U", "M", "P", "B")  # unpinned, mlocked, pinned, both

_FILE = Path(__file__).with_name("host_effects.tsv")
Key = tuple[str, str, str, str]  # names of Kernel, Backing, HostOp and state


class Effect:
    """One row: `steps`, `outcome` and `basis` as written in the table."""

    def __init__(self, steps: str, outcome: str, basis: str) -> None:
        self.steps, self.outcome, self.basis = steps, outcome, basis

    def integers(self) -> list[int]:
        """Return the row as the machine reads it."""
        row = [0] * COLUMNS
        for n, word in enumerate(self.steps.split()):
            name, _, rest = word.partition("/")
            scope, _, times = rest.partition("*")
            spare = SPARE if name.endswith("!") else 0
            kind = KINDS[name.rstrip("!")]
            row[n] = kind | SCOPES[scope] << SCOPE_SHIFT | spare | int(times or 1) << COUNT_SHIFT
            row[ROW] |= {KIND_AGE: AGE, KIND_WRITE_PROTECT: WRITE_PROTECT, KIND_SET_SPTE: 0}.get(kind, UNMAP)
            row[SPAN] |= SCOPES[scope] == RANGE
        for word in self.outcome.split():
            row[OUTCOME] |= OUTCOMES[word]
        row[ROW] |= row[OUTCOME]
        return row


@cache
def read_effects() -> dict[Key, Effect]:
    """Return the whole table."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    columns = [line.split("\t") for line in lines[1:]]
    return {(row[0], row[1], row[2], row[3]): Effect(*row[4:7]) for row in columns}


@cache
def effects(kernel: Kernel, backing: Backing) -> NDArray[np.int64]:
    """Return int64[2, HostOp, state, COLUMNS]: what is done to small and to huge pages of *backing*."""
    table = read_effects()
    small = {Backing.THP: Backing.ANONYMOUS, Backing.HUGETLB: Backing.ANONYMOUS}.get(backing, backing)
    huge = {Backing.ANONYMOUS: Backing.THP}.get(backing, backing)
    rows = [
        [[table[kernel.name, of.name, op.name, state].integers() for state in STATES] for op in HostOp]
        for of in (small, huge)
    ]
    array = np.array(rows, dtype=np.int64)
    array.flags.writeable = False
    return array
