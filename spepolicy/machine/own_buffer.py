"""KVM owns the profiling buffer (MDCR_EL2.E2PB=0b00): the SPU writes to a buffer of KVM's, and KVM copies (kvm.md P7).

While that is so `pmbptr`, `pmblimitr` and `pmbsr` are the hardware's registers, programmed by KVM, and `shadow_ptr`,
`shadow_limit` and `guest_pmbsr` what the guest wrote and reads. KVM's buffer is mapped at EL2 for good, so that the SPU
never faults; copying goes through the guest's stage 1, walked in software, and the VMM's page tables.

`lanes` and `vcpus` are int64[n]; results are int64[n].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import PMBLIMITR_E, PMBLIMITR_LIMIT, PMBSR_COLL
from spepolicy.jit import entry, jit
from spepolicy.machine.host import DEFERRED, DIRTY, NOTIFIED, invalidate_tlb, resident
from spepolicy.machine.kvm import charge
from spepolicy.machine.linux_spe import settle_records
from spepolicy.machine.pagetables import unmap_ipa, va_leaf
from spepolicy.machine.rows import host_page, params, pool, truth_row, vcpu_row, vm_row
from spepolicy.machine.spu import drain, hold_counter
from spepolicy.machine.state import NEVER, Machine
from spepolicy.machine.walking import leaf_status
from spepolicy.mmu.walker import FSC_MASK, OA_MASK, STAGE1

Ints = NDArray[np.int64]

# What `copy_out` answers.
COPY_ROOM, COPY_FULL, COPY_UNMAPPED, COPY_NO_PAGE = range(4)

OWN_VA = 1 << 46  # of KVM's buffer at EL2: any page, all of them are mapped


@entry
def start_own_buffer(m: Machine, lanes: Ints, vcpus: Ints, pages: int) -> None:
    """Program the SPU with KVM's own buffer of *pages*: as much of it as the guest's buffer has room for.

    The bytes keep their offset in a page, so that every copy is of whole pages but the first and the last.
    """
    for n in range(lanes.shape[0]):
        vm = vm_row(m, lanes[n])
        v = vcpu_row(m, lanes[n], vcpus[n])
        offset = v.shadow_ptr & 0xFFF
        room = (v.shadow_limit & PMBLIMITR_LIMIT) - v.shadow_ptr
        v.pmbptr = OWN_VA + offset
        v.own_from = v.pmbptr
        v.pmblimitr = (OWN_VA + min(offset + room, pages << 12)) | PMBLIMITR_E
        v.pmbsr &= PMBSR_COLL
        v.event_seen = 0
        v.irq_ps = NEVER
        v.answered = 1
        taken = (v.pmblimitr - OWN_VA) >> 12
        vm.own_pages = max(vm.own_pages, taken * params(m, lanes[n]).vcpus)


@jit
def _take_page(m: Machine, i: int, page: int) -> int:
    """Unmap guest page *page* at stage 2, so that the guest's next access faults and KVM can copy then. Return the
    cost in ps.
    """
    par = params(m, i)
    unmap_ipa(m, i, (par.ram_page0 + page) << 12)
    invalidate_tlb(m, i, par.ram_page0 + page, par.ram_page0 + page + 1)
    host_page(m, i)[page] = (host_page(m, i)[page] & ~NOTIFIED) | DEFERRED
    return par.map_page_ps


@jit
def _copy_pages(m: Machine, i: int, k: int, count: int, deferred: int) -> tuple[int, int]:
    """Bring *count* bytes of KVM's buffer to the guest's at shadow_ptr. Return (COPY_ROOM or what failed, cost ps)."""
    par = params(m, i)
    v = vcpu_row(m, i, k)
    cost = 0
    table = -1
    slot = -1
    for va_page in range(v.shadow_ptr >> 12, (v.shadow_ptr + count + 0xFFF) >> 12):
        va = va_page << 12
        reads = 1
        if va >> 21 != table:
            slot, _entry, reads = va_leaf(m, i, va)
            table = va >> 21
        cost += reads * par.walk_read_ps
        descriptor = pool(m, i)[slot, va_page & 511] if slot >= 0 else 0
        status = leaf_status(descriptor)
        page = ((descriptor & OA_MASK) >> 12) - par.ram_page0
        if status != 0 or page < 0 or page >= par.ram_pages:
            v.walk_status = (status & (FSC_MASK | STAGE1)) if status != 0 else STAGE1 | 7
            return COPY_UNMAPPED, cost
        if deferred != 0:
            cost += _take_page(m, i, page)
            continue
        paid = resident(m, i, page, 1)
        if paid < 0:
            return COPY_NO_PAGE, cost
        if vm_row(m, i).dirty_logging != 0:
            host_page(m, i)[page] |= DIRTY  # kvm_write_guest() marks what it writes, unlike the SPU
        size = min(va + 4096, v.shadow_ptr + count) - max(va, v.shadow_ptr)
        cost += paid + ((size * par.copy_out_page_ps) >> 12)
    return COPY_ROOM, cost


@entry
def copy_out(m: Machine, lanes: Ints, vcpus: Ints, deferred: int) -> Ints:
    """Stop KVM's buffer and copy what is in it to the guest's buffer, or with *deferred* take the guest's pages away
    and copy when it reads them. Return COPY_* each: is there room for more, or what went wrong.

    Where the guest has unmapped its buffer, or the VMM has lost the page, the records since the guest opened its
    buffer are lost: how many of them are in the part that could not be copied is not to be found when sizes vary.
    """
    result = np.zeros(lanes.shape[0], dtype=np.int64)
    for n in range(lanes.shape[0]):
        i = lanes[n]
        k = vcpus[n]
        par = params(m, i)
        v = vcpu_row(m, i, k)
        tr = truth_row(m, i, k)
        hold_counter(v, v.now_ps)
        drain(m, i, k)
        count = v.pmbptr - v.own_from if v.own_from != 0 else 0
        v.pmblimitr = 0
        v.own_from = v.pmbptr
        cost = 0
        if count > 0 and v.shadow_ptr + count > v.shadow_limit & PMBLIMITR_LIMIT:
            # A guest that moved its registers while the buffer was enabled: there is no place for what was written.
            settle_records(m, i, k, True)
            result[n] = COPY_FULL
        elif count > 0:
            result[n], cost = _copy_pages(m, i, k, count, deferred)
            tr.copies += 1
            if deferred == 0:
                tr.copied_bytes += count
        if result[n] == COPY_FULL:
            pass
        elif result[n] == COPY_ROOM:
            v.shadow_ptr += count
            if v.shadow_ptr > (v.shadow_limit & PMBLIMITR_LIMIT) - par.max_record_bytes:
                result[n] = COPY_FULL
        else:
            settle_records(m, i, k, True)
        tr.copy_ps += cost
        charge(m, i, k, cost)
    return result
