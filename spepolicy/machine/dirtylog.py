"""KVM's dirty log: the one operation that changes stage 2 without a notifier and leaves the VMM's pages alone.

Every write-protection of stage 2 is here, whoever asks for it: a host that logs at random, a recording, a migration.
"""

from __future__ import annotations

from spepolicy.jit import jit
from spepolicy.machine.effects import KIND_WRITE_PROTECT
from spepolicy.machine.hostpage import DIRTY, FOLIO, PIN_MASK, invalidate_tlb, taken
from spepolicy.machine.pagetables import ipa_entry
from spepolicy.machine.rows import host_calls, host_page, params, pool, vm_row
from spepolicy.machine.state import Machine
from spepolicy.mmu.walker import S2_WRITE, VALID

__all__ = [
    "KEEP_AND_REPORT", "KEEP_NONE", "KEEP_UNREPORTED", "begin_log", "collect_dirty", "end_log", "is_kept",
    "is_reported", "protect_page", "write_protect",
]  # fmt: skip

# What is done about pages that KVM holds pinned (kvm.md 2.3 M6, 4.4 L2).
KEEP_NONE = 0  # they are write-protected like all others
KEEP_AND_REPORT = 1  # they stay writable, and are dirty each time
KEEP_UNREPORTED = 2  # they stay writable, and nobody says so: a bug


@jit
def is_kept(word: int, keep: int) -> bool:
    """Tell whether the page of *word* stays writable."""
    return keep != KEEP_NONE and word & PIN_MASK != 0


@jit
def is_reported(word: int, keep: int) -> bool:
    """Tell whether the log says that the page of *word* is dirty."""
    return word & DIRTY != 0 or (keep == KEEP_AND_REPORT and word & PIN_MASK != 0)


@jit
def protect_page(m: Machine, i: int, page: int, cause: int) -> None:
    """Make *page* read-only at stage 2, with its block if a block maps it. *cause*: GONE_*, of what is lost there."""
    par = params(m, i)
    words = host_page(m, i)
    slot, entry, level = ipa_entry(m, i, (par.ram_page0 + page) << 12)
    descriptor = pool(m, i)[slot, entry]
    if descriptor & VALID == 0 or descriptor & S2_WRITE == 0:
        return
    pool(m, i)[slot, entry] = descriptor & ~S2_WRITE
    first, count = page, 1
    if level != 3:
        first, count = page & ~(FOLIO - 1), FOLIO
    for n in range(first, min(first + count, words.shape[0])):
        words[n] = taken(words[n], cause)
    invalidate_tlb(m, i, par.ram_page0 + first, par.ram_page0 + first + count)


@jit
def write_protect(m: Machine, i: int, first: int, last: int, keep: int, cause: int) -> None:
    """kvm_pgtable_stage2_wrprotect: pages first..last-1 become read-only at stage 2, a block as a whole."""
    words = host_page(m, i)
    host_calls(m, i)[KIND_WRITE_PROTECT] += 1
    for page in range(first, last):
        if not is_kept(words[page], keep):
            protect_page(m, i, page, cause)


@jit
def begin_log(m: Machine, i: int, keep: int, cause: int) -> None:
    """Turn KVM_MEM_LOG_DIRTY_PAGES of the lane's memslot on, which write-protects all of it."""
    vm = vm_row(m, i)
    words = host_page(m, i)
    if vm.dirty_logging == 0:
        for page in range(words.shape[0]):
            words[page] &= ~DIRTY
        write_protect(m, i, 0, words.shape[0], keep, cause)
    vm.dirty_logging = 1


@jit
def end_log(m: Machine, i: int) -> None:
    """Turn it off, which changes no entry of stage 2 (measured: kvm_dirty_log_on_write_off)."""
    vm_row(m, i).dirty_logging = 0


@jit
def collect_dirty(m: Machine, i: int, first: int, last: int, keep: int, cause: int) -> int:
    """KVM_GET_DIRTY_LOG of pages first..last-1: write-protect what is dirty, again, in blocks of 64 pages as KVM does,
    and clear it in the log. Return the dirty pages.
    """
    words = host_page(m, i)
    dirty = 0
    for block in range(first, last, 64):
        before = dirty
        for page in range(block, min(block + 64, last)):
            word = words[page]
            if not is_reported(word, keep):
                continue
            dirty += 1
            words[page] = word & ~DIRTY
            if not is_kept(word, keep):
                protect_page(m, i, page, cause)
        if dirty != before:
            host_calls(m, i)[KIND_WRITE_PROTECT] += 1
    return dirty
