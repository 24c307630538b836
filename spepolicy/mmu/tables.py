"""Editing translation tables: what KVM does at stage 2 and the guest at stage 1, in the memory that the walker reads.

`find_entry` and `put` are for every granule and both stages; `spepolicy.mmu.builder` does the rest for Python. Below
them is what the machine does to its tables, which are of 4 KiB pages: stage 2 follows KVM's page-table code. A table
page counts its valid entries and is freed with the last of them, so that the level of a later fault is the one that a
real KVM would see (data: after a large unmap, the next fault is at level 1 or 2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import ConfigurationError
from spepolicy.jit import lean
from spepolicy.mmu.memory import attach, find
from spepolicy.mmu.regime import PA_BITS
from spepolicy.mmu.walker import AF, OA_MASK, PAGE_MASK, S2_READ, S2_WRITE, TABLE, VALID, swap_bytes

Ints = NDArray[np.int64]
Slots = NDArray[np.int32]

# KVM's leaf: page, MemAttr 0xF (Normal Write-back), SH inner, S2AP_R, AF (mmu.md 6.5; XN is of no interest to the SPU).
S2_LEAF = VALID | TABLE | (0xF << 2) | S2_READ | (3 << 8) | AF
# Linux kernel page: page, AttrIndx 0, SH inner, AF, nG clear, PXN and UXN.
S1_LEAF = VALID | TABLE | (3 << 8) | AF | (3 << 53)
TABLE_DESCRIPTOR = VALID | TABLE

# Frames of KVM's own table pages: host kernel memory, outside every frame that backs a guest.
STAGE2_FRAME0 = 1 << 30

BLOCK_PAGES = 512  # a block of level 2: 2 MiB
BLOCK_MASK = (BLOCK_PAGES << 12) - 1

FRAME = 0xFFFF_FFFF  # of a word of the VMM's page table (spepolicy.machine.host)


def kvm_vtcr(ipa_bits: int) -> int:
    """Return the VTCR_EL2 that KVM with 4 KiB pages programs for a guest of *ipa_bits*, 32 to 48 (mmu.md 6.5).

    RES1, HA, VS (16-bit VMID), PS 48 bits, SH0 inner, ORGN0 and IRGN0 Write-back; two levels at least, and as few as
    sixteen concatenated root tables allow.
    """
    if not 32 <= ipa_bits <= PA_BITS:
        raise ConfigurationError(
            f"ipa_bits is {ipa_bits}. Rule: KVM's guests have 32 to {PA_BITS}. Remedy: give one of these."
        )
    levels = max(2, (ipa_bits - 8) // 9)
    return 0x802D_3500 | ((levels - 2) << 6) | (64 - ipa_bits)


@lean
def level_shift(s: Any, level: int) -> int:
    """Return the lowest input address bit that indexes a table of *level*: a leaf there maps 2**that bytes."""
    return s.stride + 3 + s.stride * (3 - level)


@lean
def entry_address(s: Any, table: int, address: int, level: int) -> int:
    """Return where the entry for input *address* is in the *table* of *level* of stage *s*."""
    if level == s.start:
        return table + ((address & ((1 << s.input_bits) - 1)) >> s.start_shift) * 8
    return table + ((address >> level_shift(s, level)) & s.index_mask) * 8


@lean
def get(s: Any, pool: Ints, slot: int, entry: int) -> int:
    """Return a descriptor of stage *s* as a number."""
    return swap_bytes(pool[slot, entry]) if s.big_endian != 0 else pool[slot, entry]


@lean
def put(s: Any, pool: Ints, slot: int, entry: int, descriptor: int) -> None:
    """Store a descriptor of stage *s*."""
    pool[slot, entry] = swap_bytes(descriptor) if s.big_endian != 0 else descriptor


@lean
def find_entry(frames: Ints, pool: Ints, s: Any, address: int, last: int) -> tuple[int, int, int]:
    """Find the entry for input *address* of a stage *s* whose tables are at physical addresses, as software does.

    Return (slot, entry, level): of *last* or, where no table goes down so far, of the level where it ends. The slot is
    -1 if a table is not in memory.
    """
    level = s.start
    shift = s.start_shift
    where = entry_address(s, s.base, address, level)
    while True:
        slot = (where >> 12) - s.linear_frame if s.linear_frame != 0 else find(frames, where >> 12)
        entry = (where & 0xFFF) >> 3
        if slot < 0 or level == last:
            return slot, entry, level
        descriptor = get(s, pool, slot, entry)
        if descriptor & TABLE_DESCRIPTOR != TABLE_DESCRIPTOR:
            return slot, entry, level
        level += 1
        shift -= s.stride
        where = (descriptor & s.output_mask) + ((address >> shift) & s.index_mask) * 8


@lean
def new_table(vm: Any, frames: Ints, pool: Ints) -> int:
    """Take a zeroed stage 2 table page; return its slot. Its frame is STAGE2_FRAME0 + slot."""
    slot = vm.pool_free
    if slot >= 0:
        vm.pool_free = pool[slot, 0]
    else:
        slot = vm.pool_used
        vm.pool_used += 1
        attach(frames, STAGE2_FRAME0 + slot, slot)
    pool[slot, :] = 0
    return slot


@lean
def _free_table(vm: Any, pool: Ints, slot: int) -> None:
    pool[slot, 0] = vm.pool_free
    vm.pool_free = slot


@lean
def stage2_leaf(frames: Ints, pool: Ints, s: Any, ipa: int) -> tuple[int, int]:
    """Return (slot, entry) of the level 3 descriptor for *ipa*, or (-1, level) if the walk ends earlier."""
    slot, entry, level = find_entry(frames, pool, s, ipa, 3)
    return (slot, entry) if level == 3 else (-1, level)


@lean
def middle_table(frames: Ints, pool: Ints, s: Any, ipa: int) -> int:
    """Return the slot of the level 2 table that covers the 1 GiB of *ipa*, or -1 if there is none."""
    slot, _entry, level = find_entry(frames, pool, s, ipa, 2)
    return slot if level == 2 else -1


@lean
def leaf_descriptor(pool: Ints, middle: int, ipa: int) -> int:
    """Return the level 3 descriptor of *ipa* below the level 2 table in slot *middle*, 0 if it has no level 3 table. Of
    a block, return what the page descriptor would be.
    """
    descriptor = pool[middle, (ipa >> 21) & 511]
    if descriptor & VALID == 0:
        return 0
    if descriptor & TABLE == 0:
        return descriptor | TABLE | (ipa & BLOCK_MASK & ~PAGE_MASK)
    # KVM reaches its own tables by the linear map, without the hash.
    return pool[((descriptor & OA_MASK) >> 12) - STAGE2_FRAME0, (ipa >> 12) & 511]


@lean
def map_stage2(vm: Any, frames: Ints, pool: Ints, refs: Slots, s: Any, ipa: int, frame: int, writable: int) -> int:
    """Map one page at stage 2. Return 0 if the entry was there already, 1 if it was invalid, 2 if it replaced a valid
    one, 3 if it replaced a block: as in KVM, the other pages of the block are then no longer mapped.
    """
    slot, entry, level = find_entry(frames, pool, s, ipa, 3)
    broken = 0
    while level != 3:
        table = new_table(vm, frames, pool)
        if pool[slot, entry] & VALID == 0:
            refs[slot] += 1
        else:
            broken = 1
        pool[slot, entry] = ((STAGE2_FRAME0 + table) << 12) | TABLE_DESCRIPTOR
        level += 1
        slot = table
        entry = (ipa >> level_shift(s, level)) & 511
    new = (frame << 12) | S2_LEAF
    if writable != 0:
        new |= S2_WRITE
    old = pool[slot, entry]
    if old == new:
        return 0
    pool[slot, entry] = new
    if old & VALID == 0:
        refs[slot] += 1
        return 3 if broken != 0 else 1
    return 2


@lean
def map_stage2_block(
    vm: Any, frames: Ints, pool: Ints, refs: Slots, s: Any, ipa: int, frame: int, writable: int
) -> int:
    """Map the 2 MiB at *ipa* to *frame*, both aligned, by a block of level 2; a table that was there is freed. Return
    as `map_stage2` does.
    """
    slot, entry, level = find_entry(frames, pool, s, ipa, 2)
    while level != 2:
        table = new_table(vm, frames, pool)
        pool[slot, entry] = ((STAGE2_FRAME0 + table) << 12) | TABLE_DESCRIPTOR
        refs[slot] += 1
        level += 1
        slot = table
        entry = (ipa >> level_shift(s, level)) & 511
    new = (frame << 12) | (S2_LEAF & ~TABLE)
    if writable != 0:
        new |= S2_WRITE
    old = pool[slot, entry]
    if old == new:
        return 0
    pool[slot, entry] = new
    if old & VALID == 0:
        refs[slot] += 1
        return 1
    if old & TABLE != 0:
        below = ((old & OA_MASK) >> 12) - STAGE2_FRAME0
        refs[below] = 0
        _free_table(vm, pool, below)
    return 2


@lean
def unmap_stage2(vm: Any, frames: Ints, pool: Ints, refs: Slots, s: Any, ipa: int) -> int:
    """Remove what maps *ipa* at stage 2, a page or a block, and free tables that are empty then, but for the root.
    Return the pages that are no longer mapped: 0, 1 or 512, as KVM takes a block away whole.
    """
    slot, entry, level = find_entry(frames, pool, s, ipa, 3)
    if pool[slot, entry] & VALID == 0:
        return 0
    pages = 1 if level == 3 else BLOCK_PAGES
    while True:
        pool[slot, entry] = 0
        refs[slot] -= 1
        if level == s.start or refs[slot] != 0:
            return pages
        _free_table(vm, pool, slot)
        level -= 1
        slot, entry, level = find_entry(frames, pool, s, ipa, level)


@lean
def stage1_leaf(frames: Ints, pool: Ints, s: Any, host_frames: Ints, ram_page0: int, va: int) -> tuple[int, int, int]:
    """Find the level 3 descriptor of *va* the way the host and the guest's CPU do: through the host's mapping of guest
    memory, whatever stage 2 says.

    Return (slot, entry, descriptors read), slot -1 if a table on the way is missing or outside RAM. *host_frames* is
    the VMM's page table.
    """
    table = s.base
    level = s.start
    while True:
        where = entry_address(s, table, va, level)
        reads = level - s.start
        page = (where >> 12) - ram_page0
        if page < 0 or page >= host_frames.shape[0]:
            return -1, 0, reads
        slot = find(frames, host_frames[page] & FRAME)
        entry = (where & 0xFFF) >> 3
        if slot < 0 or level == 3:
            return slot, entry, reads + 1
        descriptor = get(s, pool, slot, entry)
        if descriptor & TABLE_DESCRIPTOR != TABLE_DESCRIPTOR:
            return -1, entry, reads + 1
        table = descriptor & s.output_mask
        level += 1
