"""How KVM finds out by software which guest pages the SPU will write to, and which page made it fault.

`lanes` and `vcpus` are int64[n]; results are int64[n]. Policies use it through `spepolicy.batch`; each walk
charges its cost.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import FSC_ADDRESS_SIZE, FSC_TRANSLATION, PMBLIMITR_NVM
from spepolicy.jit import cell, entry, jit
from spepolicy.machine.host import FRAME, NOTIFIED
from spepolicy.machine.kvm import charge
from spepolicy.machine.pagetables import ipa_entry, va_leaf
from spepolicy.machine.rows import frames, host_page, params, pins, pool, regime_row, vcpu_row, vm_row
from spepolicy.machine.state import Machine
from spepolicy.machine.trace import WALKED, ZERO, log
from spepolicy.mmu.memory import find
from spepolicy.mmu.regime import UPPER
from spepolicy.mmu.tables import level_shift
from spepolicy.mmu.walker import AF, FSC_MASK, OA_MASK, S1_READ_ONLY, S2_WRITE, STAGE1, VALID

Ints = NDArray[np.int64]

# What `look` finds out.
LOOK_MISSING = 1  # a page is not mapped at stage 2 as the walk needs it
LOOK_TABLE = 2  # it is a stage 1 table, not the buffer
LOOK_LISTED = 4  # it is in the list of pages that KVM pinned for this vCPU
LOOK_NOTIFIED = 8  # KVM's notifier handler unmapped it
LOOK_IN_RANGE = 16  # the faulting VA is in the range that KVM pinned


@jit
def leaf_status(descriptor: int) -> int:
    """Say whether software finds a page behind a stage 1 descriptor that the SPU may write to."""
    if descriptor & VALID == 0:
        return STAGE1 | FSC_TRANSLATION | 3
    if descriptor & AF == 0:
        return STAGE1 | 0x08 | 3
    if descriptor & S1_READ_ONLY != 0:
        return STAGE1 | 0x0C | 3
    return 0


@jit
def _collect_tables(m: Machine, i: int, k: int, va: int, count: int) -> int:
    """Add the guest pages that hold the stage 1 tables of *va* to the list under construction; return the new count."""
    vm = vm_row(m, i)
    par = params(m, i)
    v = vcpu_row(m, i, k)
    fresh = pins(m, i, k)[1 - v.pin_list]
    address = vm.ttbr1 & OA_MASK
    for level in range(4):
        page = (address >> 12) - par.ram_page0
        if page < 0 or page >= par.ram_pages or count >= fresh.shape[0]:
            break
        fresh[count] = page
        count += 1
        slot = find(frames(m, i), host_page(m, i)[page] & FRAME)
        if slot < 0 or level == 3:
            break
        address = pool(m, i)[slot, (va >> level_shift(regime_row(m, i, UPPER), level)) & 511] & OA_MASK
    return count


@entry
def walk_stage1(m: Machine, lanes: Ints, vcpus: Ints, lo: Ints, hi: Ints, pin_tables: int, one_range: int) -> Ints:
    """Walk the guest's stage 1 for the pages of [lo, hi) in software and list the guest pages. Return 0 or the first
    failure's status. With *one_range* the list ends where the IPA stops being contiguous.
    """
    status = np.zeros(lanes.shape[0], dtype=np.int64)
    for n in range(lanes.shape[0]):
        i = lanes[n]
        k = vcpus[n]
        par = params(m, i)
        v = vcpu_row(m, i, k)
        fresh = pins(m, i, k)[1 - v.pin_list]
        tables = pool(m, i)
        room, page0, ram_pages = fresh.shape[0], par.ram_page0, par.ram_pages
        count, reads, failed = 0, 0, 0
        table, slot, before = -1, -1, -1
        page, end = lo[n] >> 12, (hi[n] + 0xFFF) >> 12
        while page < end:
            if page >> 9 != table:
                slot, _entry, steps = va_leaf(m, i, page << 12)
                reads += steps
                table = page >> 9
                if pin_tables != 0:
                    count = _collect_tables(m, i, k, page << 12, count)
            else:
                reads += 1
            descriptor = cell(tables, slot, page & 511) if slot >= 0 else 0
            failed = leaf_status(descriptor)
            guest_page = ((descriptor & OA_MASK) >> 12) - page0
            if failed == 0 and (guest_page < 0 or guest_page >= ram_pages):
                failed = STAGE1 | FSC_TRANSLATION | 3  # points outside the VM's memory: nothing to pin
            if failed != 0 or count >= room:
                break
            if one_range != 0 and before >= 0 and guest_page != before + 1:
                break
            before = guest_page
            fresh[np.uint64(count)] = guest_page
            count += 1
            page += 1
        status[n] = failed
        v.walk_lo = lo[n]
        v.walk_hi = page << 12 if page << 12 > lo[n] else lo[n]
        v.pin_fresh = count
        v.walk_status = status[n] & (FSC_MASK | STAGE1)
        log(m, i, k, WALKED, v.walk_status, count, ZERO)
        charge(m, i, k, reads * par.walk_read_ps)
    return status


@entry
def list_physical(m: Machine, lanes: Ints, vcpus: Ints, lo: Ints, hi: Ints) -> Ints:
    """List the guest pages of the IPA range [lo, hi): with PMBLIMITR_EL1.nVM there is nothing to walk (spe.md rule 51).
    Return 0, or a status where the range is not all of it in the VM's memory.
    """
    status = np.zeros(lanes.shape[0], dtype=np.int64)
    for n in range(lanes.shape[0]):
        par = params(m, lanes[n])
        v = vcpu_row(m, lanes[n], vcpus[n])
        fresh = pins(m, lanes[n], vcpus[n])[1 - v.pin_list]
        first = (lo[n] >> 12) - par.ram_page0
        end = ((hi[n] + 0xFFF) >> 12) - par.ram_page0
        if first < 0 or end > par.ram_pages:
            status[n] = STAGE1 | FSC_ADDRESS_SIZE
            end = first
        count = min(max(end - first, 0), fresh.shape[0])
        for p in range(count):
            fresh[p] = first + p
        v.pin_fresh = count
        v.walk_lo = lo[n]
        v.walk_hi = lo[n] + (count << 12)
        v.walk_status = status[n]
        log(m, lanes[n], vcpus[n], WALKED, v.walk_status, count, ZERO)
    return status


@entry
def look(m: Machine, lanes: Ints, vcpus: Ints) -> Ints:
    """Find out what KVM can know of the page that made the SPU fault: the first one on the way from the guest's root
    table to PMBPTR that stage 2 does not map as the walk needs it. Return LOOK_* bits.

    KVM reads the guest's tables, its own stage 2, its list of pinned pages, and the note that its notifier handler
    left. Charged as one walk.
    """
    result = np.zeros(lanes.shape[0], dtype=np.int64)
    for n in range(lanes.shape[0]):
        i = lanes[n]
        k = vcpus[n]
        v = vcpu_row(m, i, k)
        par = params(m, i)
        va = v.pmbptr
        bits = LOOK_IN_RANGE if v.pin_count != 0 and v.pin_lo <= va < v.pin_hi else 0
        # With PMBLIMITR_EL1.nVM there is no table on the way.
        physical = v.pmblimitr & PMBLIMITR_NVM != 0
        address = (va if physical else vm_row(m, i).ttbr1) & OA_MASK
        reads = 0
        for level in range(4 if physical else 0, 5):
            page = (address >> 12) - par.ram_page0
            if page < 0 or page >= par.ram_pages:
                break
            slot, entry_, _level = ipa_entry(m, i, (par.ram_page0 + page) << 12)
            leaf = pool(m, i)[slot, entry_]
            aged = leaf & AF == 0 and par.hardware_access_flag == 0
            if leaf & VALID == 0 or aged or (level == 4 and leaf & S2_WRITE == 0):
                bits |= LOOK_MISSING
                if level < 4:
                    bits |= LOOK_TABLE
                if host_page(m, i)[page] & NOTIFIED != 0:
                    bits |= LOOK_NOTIFIED
                listed = pins(m, i, k)[v.pin_list]
                for p in range(v.pin_count):
                    if listed[p] == page:
                        bits |= LOOK_LISTED
                        break
                break
            if level == 4:
                break
            held = find(frames(m, i), host_page(m, i)[page] & FRAME)
            if held < 0:
                break
            reads += 1
            entry_ = (va >> level_shift(regime_row(m, i, UPPER), level)) & 511
            descriptor = pool(m, i)[held, entry_]
            if descriptor & VALID == 0:
                break
            address = descriptor & OA_MASK
        charge(m, i, k, reads * par.walk_read_ps)
        result[n] = bits
    return result
