"""Building and editing translation tables: what KVM does at stage 2 and the guest at stage 1, in the same memory.

Stage 2 follows KVM's page-table code: a table page counts its valid entries and is freed with the last of them, so that
the level of a later fault is the one that a real KVM would see (data: after a large unmap, the next fault is at level 1
or 2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.jit import lean
from spepolicy.mmu.memory import attach, find
from spepolicy.mmu.walker import AF, OA_MASK, S2_READ, S2_WRITE, TABLE, VALID, level_shift

Ints = NDArray[np.int64]
Slots = NDArray[np.int32]

# KVM's leaf: page, MemAttr 0xF (Normal Write-back), SH inner, S2AP_R, AF (mmu.md 6.5; XN is of no interest to the SPU).
S2_LEAF = VALID | TABLE | (0xF << 2) | S2_READ | (3 << 8) | AF
# Linux kernel page: page, AttrIndx 0, SH inner, AF, nG clear, PXN and UXN.
S1_LEAF = VALID | TABLE | (3 << 8) | AF | (3 << 53)
TABLE_DESCRIPTOR = VALID | TABLE

# Frames of KVM's own table pages: host kernel memory, outside every frame that backs a guest.
STAGE2_FRAME0 = 1 << 30


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
def _own_slot(address: int) -> int:
    """Return the slot of one of KVM's table pages: software reaches them by the linear map, without the hash."""
    return (address >> 12) - STAGE2_FRAME0


@lean
def stage2_leaf(pool: Ints, vttbr: int, vtcr: int, ipa: int) -> tuple[int, int]:
    """Return (slot, entry) of the level 3 descriptor for *ipa*, or (-1, level) if the walk ends earlier."""
    level = 2 - ((vtcr >> 6) & 3)
    address = (vttbr & OA_MASK) + (ipa >> level_shift(level)) * 8
    while True:
        slot = _own_slot(address)
        entry = (address & 0xFFF) >> 3
        if level == 3:
            return slot, entry
        descriptor = pool[slot, entry]
        if descriptor & VALID == 0:
            return -1, level
        level += 1
        address = (descriptor & OA_MASK) + ((ipa >> level_shift(level)) & 511) * 8


@lean
def middle_table(pool: Ints, vttbr: int, vtcr: int, ipa: int) -> int:
    """Return the slot of the level 2 table that covers the 1 GiB of *ipa*, or -1 if there is none."""
    level = 2 - ((vtcr >> 6) & 3)
    address = (vttbr & OA_MASK) + (ipa >> level_shift(level)) * 8
    while level < 2:
        descriptor = pool[_own_slot(address), (address & 0xFFF) >> 3]
        if descriptor & VALID == 0:
            return -1
        level += 1
        address = (descriptor & OA_MASK) + ((ipa >> level_shift(level)) & 511) * 8
    return _own_slot(address)


@lean
def leaf_descriptor(pool: Ints, middle: int, ipa: int) -> int:
    """Return the level 3 descriptor of *ipa* below the level 2 table in slot *middle*, 0 if it has no level 3 table."""
    descriptor = pool[middle, (ipa >> 21) & 511]
    if descriptor & VALID == 0:
        return 0
    return pool[_own_slot(descriptor & OA_MASK), (ipa >> 12) & 511]


@lean
def map_stage2(vm: Any, frames: Ints, pool: Ints, refs: Slots, ipa: int, frame: int, writable: int) -> int:
    """Map one page at stage 2. Return 0 if the entry was there already, 1 if it was invalid, 2 if it replaced a valid
    one.
    """
    level = 2 - ((vm.vtcr >> 6) & 3)
    address = (vm.vttbr & OA_MASK) + (ipa >> level_shift(level)) * 8
    while True:
        slot = _own_slot(address)
        entry = (address & 0xFFF) >> 3
        descriptor = pool[slot, entry]
        if level == 3:
            break
        if descriptor & VALID == 0:
            table = new_table(vm, frames, pool)
            descriptor = ((STAGE2_FRAME0 + table) << 12) | TABLE_DESCRIPTOR
            pool[slot, entry] = descriptor
            refs[slot] += 1
        level += 1
        address = (descriptor & OA_MASK) + ((ipa >> level_shift(level)) & 511) * 8
    new = (frame << 12) | S2_LEAF
    if writable != 0:
        new |= S2_WRITE
    if descriptor == new:
        return 0
    pool[slot, entry] = new
    if descriptor & VALID == 0:
        refs[slot] += 1
        return 1
    return 2


@lean
def unmap_stage2(vm: Any, pool: Ints, refs: Slots, ipa: int) -> int:
    """Remove one page at stage 2 and free tables that are empty then. Return 1 if it was mapped."""
    top = 2 - ((vm.vtcr >> 6) & 3)
    level = top
    slots = (0, 0, 0, 0)
    entries = (0, 0, 0, 0)
    address = (vm.vttbr & OA_MASK) + (ipa >> level_shift(level)) * 8
    while True:
        slot = _own_slot(address)
        entry = (address & 0xFFF) >> 3
        slots = (slots[1], slots[2], slots[3], slot)
        entries = (entries[1], entries[2], entries[3], entry)
        descriptor = pool[slot, entry]
        if descriptor & VALID == 0:
            return 0
        if level == 3:
            break
        level += 1
        address = (descriptor & OA_MASK) + ((ipa >> level_shift(level)) & 511) * 8
    pool[slots[3], entries[3]] = 0
    refs[slots[3]] -= 1
    if refs[slots[3]] == 0:
        _free_upwards(vm, pool, refs, slots, entries, top)
    return 1


@lean
def _free_upwards(
    vm: Any, pool: Ints, refs: Slots, slots: tuple[int, int, int, int], entries: tuple[int, int, int, int], top: int
) -> None:
    """Free an empty level 3 table, and its parent if that becomes empty. Root tables stay."""
    _free_table(vm, pool, slots[3])
    pool[slots[2], entries[2]] = 0
    refs[slots[2]] -= 1
    if top < 2 and refs[slots[2]] == 0:
        _free_table(vm, pool, slots[2])
        pool[slots[1], entries[1]] = 0
        refs[slots[1]] -= 1


@lean
def stage1_leaf(
    frames: Ints, pool: Ints, host_frames: Ints, ram_page0: int, ttbr1: int, va: int
) -> tuple[int, int, int]:
    """Find the level 3 descriptor of *va* the way software does: through the host's mapping of guest memory, not stage
    2.

    Return (slot, entry, descriptors read), slot -1 if a table on the way is missing or outside RAM. *host_frames* is
    the VMM's page table: bits 35:0 of a word are the frame that backs the guest page.
    """
    address = ttbr1 & OA_MASK
    level = 0
    while True:
        page = (address >> 12) - ram_page0
        if page < 0 or page >= host_frames.shape[0]:
            return -1, 0, level
        slot = find(frames, host_frames[page] & 0xF_FFFF_FFFF)
        entry = (va >> level_shift(level)) & 511
        if slot < 0 or level == 3:
            return slot, entry, level + 1
        descriptor = pool[slot, entry]
        if descriptor & VALID == 0 or descriptor & TABLE == 0:
            return -1, entry, level + 1
        address = descriptor & OA_MASK
        level += 1
