"""The translation tables of a lane: `spepolicy.mmu.tables` with the arrays of that lane."""

from __future__ import annotations

from spepolicy.jit import jit
from spepolicy.machine.rows import frames, host_page, params, pool, pool_refs, regime_row, vm_row
from spepolicy.machine.state import Machine
from spepolicy.mmu.regime import SECOND, UPPER
from spepolicy.mmu.tables import (
    find_entry,
    map_stage2,
    map_stage2_block,
    middle_table,
    stage1_leaf,
    stage2_leaf,
    unmap_stage2,
)


@jit
def map_ipa(m: Machine, i: int, ipa: int, frame: int, writable: int) -> int:
    """Map the page at *ipa* to *frame* at stage 2. Return as `map_stage2` does."""
    s = regime_row(m, i, SECOND)
    return map_stage2(vm_row(m, i), frames(m, i), pool(m, i), pool_refs(m, i), s, ipa, frame, writable)


@jit
def map_ipa_block(m: Machine, i: int, ipa: int, frame: int, writable: int) -> int:
    """Map the 2 MiB at *ipa* to the huge page that starts at *frame*. Return as `map_stage2` does."""
    s = regime_row(m, i, SECOND)
    return map_stage2_block(vm_row(m, i), frames(m, i), pool(m, i), pool_refs(m, i), s, ipa, frame, writable)


@jit
def unmap_ipa(m: Machine, i: int, ipa: int) -> int:
    """Remove the page or block at *ipa* at stage 2. Return the pages that are no longer mapped: 0, 1 or 512."""
    s = regime_row(m, i, SECOND)
    return unmap_stage2(vm_row(m, i), frames(m, i), pool(m, i), pool_refs(m, i), s, ipa)


@jit
def ipa_leaf(m: Machine, i: int, ipa: int) -> tuple[int, int]:
    """Return (slot, entry) of the stage 2 page descriptor of *ipa*, or (-1, level) if the tables end earlier."""
    return stage2_leaf(frames(m, i), pool(m, i), regime_row(m, i, SECOND), ipa)


@jit
def ipa_entry(m: Machine, i: int, ipa: int) -> tuple[int, int, int]:
    """Return (slot, entry, level) of the stage 2 descriptor that a walk of *ipa* ends at, valid or not."""
    return find_entry(frames(m, i), pool(m, i), regime_row(m, i, SECOND), ipa, 3)


@jit
def ipa_middle(m: Machine, i: int, ipa: int) -> int:
    """Return the slot of the stage 2 table of level 2 that covers the 1 GiB of *ipa*, or -1 if there is none."""
    return middle_table(frames(m, i), pool(m, i), regime_row(m, i, SECOND), ipa)


@jit
def va_leaf(m: Machine, i: int, va: int) -> tuple[int, int, int]:
    """Return (slot, entry, descriptors read) of the guest's stage 1 page descriptor of *va*, as `stage1_leaf` does."""
    s = regime_row(m, i, UPPER)
    return stage1_leaf(frames(m, i), pool(m, i), s, host_page(m, i), params(m, i).ram_page0, va)
