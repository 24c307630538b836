"""A lane's memory at the start: guest RAM, scattered AUX pages, stage 1 tables that reach them, KVM's stage 2 tables.

Guest pages are handed out in the order of a bijection of [0, ram_pages): stage 1 tables first, then the AUX pages of
each vCPU. So the AUX ring is contiguous in VA and scattered in IPA, as rb_alloc_aux() and vmap() leave it. A driver
that gives the SPU physical addresses (FEAT_SPE_nVM) allocates it contiguous and aligned to its size instead.
"""

from __future__ import annotations

from typing import Any

from spepolicy.jit import jit
from spepolicy.machine.hostops import Backing
from spepolicy.machine.hostpage import (
    FOLIO,
    GONE_MASK,
    HUGE,
    PRESENT,
    RAM_FRAME0,
    ROLE_BUFFER,
    ROLE_HOT,
    ROLE_SHIFT,
    ROLE_TABLE,
)
from spepolicy.machine.pagetables import ipa_leaf, map_ipa, map_ipa_block, unmap_ipa
from spepolicy.machine.rows import (
    frames,
    host_page,
    params,
    pool,
    pool_refs,
    regime_row,
    vcpu_row,
    vm_row,
)
from spepolicy.machine.state import Machine
from spepolicy.mmu.memory import attach, find
from spepolicy.mmu.regime import HCR_PTW, HCR_VM, LOWER, SCTLR_M, SECOND, UPPER, set_stage1, set_stage2
from spepolicy.mmu.tables import (
    S1_LEAF,
    S2_LEAF,
    STAGE2_FRAME0,
    TABLE_DESCRIPTOR,
    kvm_vtcr,
    level_shift,
    new_table,
)
from spepolicy.mmu.walker import OA_MASK, S2_WRITE, VALID

_THP, _HUGETLB = int(Backing.THP), int(Backing.HUGETLB)

# KVM's VTCR_EL2 for the default 40-bit IPA: start at level 1 with two concatenated root tables, HA set (mmu.md 6.5).
VTCR_40BIT = kvm_vtcr(40)
ROOT_TABLES = 2

# What Linux programs for a kernel of 4 KiB pages and 48-bit addresses: T1SZ 16, TG1 4 KiB, IPS 48 bits. TTBR0_EL1 is
# closed (EPD0): no SPE buffer is in user space. KVM's HCR_EL2 has PTW (mmu.md 6.5).
TCR_EL1 = 16 | (1 << 7) | (16 << 16) | (2 << 30) | (5 << 32)
MAIR_EL1 = 0xFF
HCR_GUEST = HCR_VM | HCR_PTW

# Kernel virtual addresses as int64. Each vCPU's AUX ring has a window of 128 MiB in the vmalloc area.
BUFFER_VA0 = -(1 << 47) + 0x1000_0000
BUFFER_WINDOW_SHIFT = 27

# IPA pages outside RAM that a misbehaving guest points its buffer at: at the top of the 40-bit IPA space, above RAM.
READ_ONLY_PAGE = (1 << 28) - 512  # a read-only memslot, as flash is
DEVICE_PAGE = (1 << 28) - 511  # a page of an assigned device
NOWHERE_PAGE = (1 << 28) - 510  # no memslot
READ_ONLY_FRAME = 0x90_0000
DEVICE_FRAME = 0xA0_0000
S2_MEMATTR = 0xF << 2
S2_DEVICE = 0x1 << 2  # Device-nGnRE (mmu.md 6.5)


@jit
def scatter(par: Any, index: int) -> int:
    """Return the guest page that comes at *index* of the allocation order: a bijection of [0, ram_pages), a power of
    two.
    """
    mask = par.ram_pages - 1
    if par.physical != 0:
        return (index + par.scatter_c * par.buffer_pages) & mask
    x = (index * par.scatter_a) & mask
    x ^= x >> 7
    return (x * par.scatter_b + par.scatter_c) & mask


@jit
def guest_page(par: Any, k: int, generation: int, n: int) -> int:
    """Return the guest page behind page *n* of vCPU *k*'s AUX ring in its *generation*-th perf session."""
    per_generation = par.vcpus * par.buffer_pages
    tables = _table_pages(par)
    generations = (par.ram_pages - tables) // per_generation
    base = tables + (generation % generations) * per_generation
    return scatter(par, base + k * par.buffer_pages + n)


@jit
def _table_pages(par: Any) -> int:
    """Return how many pages of the allocation order come before the first ring, which may have to be aligned."""
    if par.physical == 0:
        return par.guest_tables
    return (par.guest_tables + par.buffer_pages - 1) & ~(par.buffer_pages - 1)


@jit
def ring_base(par: Any, v: Any, k: int) -> int:
    """Return the address of vCPU *k*'s AUX ring that its driver gives to the SPU: a VA, or with PMBLIMITR_EL1.nVM an
    IPA.
    """
    if par.physical == 0:
        return v.buffer_va
    return (par.ram_page0 + guest_page(par, k, v.buffer_generation, 0)) << 12


@jit
def reserve_generations(par: Any) -> int:
    """Return how many other pages there are for each page of a buffer: those of the sessions to come."""
    return (par.ram_pages - _table_pages(par)) // (par.vcpus * par.buffer_pages) - 1


@jit
def _lay_traps_for_acts(m: Machine, i: int) -> None:
    """What a misbehaving guest needs: a read-only memslot, an assigned device, and pages that no CPU has touched."""
    par = params(m, i)
    map_ipa(m, i, READ_ONLY_PAGE << 12, READ_ONLY_FRAME, 0)
    map_ipa(m, i, DEVICE_PAGE << 12, DEVICE_FRAME, 1)
    slot, entry = ipa_leaf(m, i, DEVICE_PAGE << 12)
    pool(m, i)[slot, entry] = (pool(m, i)[slot, entry] & ~S2_MEMATTR) | S2_DEVICE
    if par.buffer_mapped == 0:
        for generation in range(1, reserve_generations(par) + 1):
            for k in range(par.vcpus):
                for n in range(par.buffer_pages):
                    unmap_ipa(m, i, (par.ram_page0 + guest_page(par, k, generation, n)) << 12)


@jit
def _guest_table(m: Machine, i: int, role: int) -> int:
    """Give the guest one zeroed page for a stage 1 table; return its guest page number."""
    vm = vm_row(m, i)
    par = params(m, i)
    page = scatter(par, vm.next_table)
    vm.next_table += 1
    slot = vm.pool_used
    vm.pool_used += 1
    pool(m, i)[slot, :] = 0
    attach(frames(m, i), RAM_FRAME0 + page, slot)
    host_page(m, i)[page] = host_page(m, i)[page] | (role << ROLE_SHIFT)
    return page


@jit
def _map_stage1(m: Machine, i: int, va: int, page: int) -> None:
    """The guest maps one page of its AUX ring, making tables on the way."""
    vm = vm_row(m, i)
    par = params(m, i)
    address = vm.ttbr1 & OA_MASK
    for level in range(3):
        slot = find(frames(m, i), address >> 12)
        entry = (va >> level_shift(regime_row(m, i, UPPER), level)) & 511
        if pool(m, i)[slot, entry] & VALID == 0:
            table = _guest_table(m, i, ROLE_HOT if level < 2 else ROLE_TABLE)
            pool(m, i)[slot, entry] = ((par.ram_page0 + table) << 12) | TABLE_DESCRIPTOR
        address = pool(m, i)[slot, entry] & OA_MASK
    slot = find(frames(m, i), address >> 12)
    pool(m, i)[slot, (va >> 12) & 511] = ((par.ram_page0 + page) << 12) | S1_LEAF


@jit
def _map_all_ram(m: Machine, i: int) -> None:
    """The guest has run for a while and touched all of its memory: stage 2 maps it, page by page, or huge page by huge
    page.
    """
    vm = vm_row(m, i)
    par = params(m, i)
    tables = pool(m, i)
    if host_page(m, i)[0] & HUGE != 0:
        for first in range(0, par.ram_pages, FOLIO):
            map_ipa_block(m, i, (par.ram_page0 + first) << 12, RAM_FRAME0 + first, 1)
        return
    for first in range(0, par.ram_pages, 512):
        ipa = (par.ram_page0 + first) << 12
        map_ipa(m, i, ipa, RAM_FRAME0 + first, 1)
        slot = vm.pool_used - 1
        count = min(par.ram_pages - first, 512)
        table = tables[slot]
        leaf = ((RAM_FRAME0 + first) << 12) | S2_LEAF | S2_WRITE
        for n in range(count):
            table[n] = leaf + (n << 12)
        pool_refs(m, i)[slot] = count


@jit
def _decode_stage1(m: Machine, i: int) -> None:
    """Decode what the SPU sees of the guest's TCR_EL1 and TTBR1_EL1."""
    vm = vm_row(m, i)
    par = params(m, i)
    hcr = HCR_GUEST if par.virtualized != 0 else 0
    for half in range(LOWER, UPPER + 1):
        ttbr = vm.ttbr1 if half == UPPER else 0
        row = regime_row(m, i, half)
        set_stage1(row, half, ttbr, TCR_EL1, MAIR_EL1, SCTLR_M, hcr, par.hardware_access_flag)


@jit
def _decode_stage2(m: Machine, i: int) -> None:
    """Decode what the SPU sees of KVM's registers. It updates descriptors only if PMBIDR_EL1.F is 1."""
    vm = vm_row(m, i)
    par = params(m, i)
    hcr = HCR_GUEST if par.virtualized != 0 else 0
    s = regime_row(m, i, SECOND)
    set_stage2(s, vm.vttbr, vm.vtcr, hcr, par.hardware_access_flag)
    s.linear_frame = STAGE2_FRAME0


@jit
def build_memory(m: Machine, i: int) -> None:
    """Lay out the memory of lane *i*, whose arrays are zero and whose frame hash is empty."""
    vm = vm_row(m, i)
    par = params(m, i)
    pages = host_page(m, i)
    huge = HUGE if par.backing == _THP or par.backing == _HUGETLB else 0
    for page in range(pages.shape[0]):
        pages[page] = (RAM_FRAME0 + page) | PRESENT | huge
    if par.virtualized != 0:
        for _ in range(ROOT_TABLES):
            new_table(vm, frames(m, i), pool(m, i))
        vm.vttbr = STAGE2_FRAME0 << 12
        vm.vtcr = VTCR_40BIT
        _decode_stage2(m, i)
        _map_all_ram(m, i)
        if par.acts != 0:
            _lay_traps_for_acts(m, i)
    vm.ttbr1 = (par.ram_page0 + _guest_table(m, i, ROLE_HOT)) << 12
    _decode_stage1(m, i)
    for k in range(par.vcpus):
        v = vcpu_row(m, i, k)
        v.buffer_va = BUFFER_VA0 + (k << BUFFER_WINDOW_SHIFT)
        v.buffer_base = ring_base(par, v, k)
        for n in range(par.buffer_pages):
            page = guest_page(par, k, 0, n)
            _map_stage1(m, i, v.buffer_va + (n << 12), page)
            host_page(m, i)[page] = (host_page(m, i)[page] & ~GONE_MASK) | (ROLE_BUFFER << ROLE_SHIFT)
            if par.virtualized != 0 and par.buffer_mapped == 0:
                ipa = (par.ram_page0 + page) << 12
                unmap_ipa(m, i, ipa)
