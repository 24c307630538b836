"""KVM's tools, as policies use them through `spepolicy.batch`: each acts on many vCPUs, obeys the machine's rules and
charges its cost.

`lanes` and `vcpus` are int64[n]; results are int64[n].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import (
    BSC_FULL,
    BSC_TOO_LARGE,
    EC_IMPDEF,
    EC_STAGE1,
    FSC_ADDRESS_SIZE,
    FSC_EXTERNAL_ABORT,
    FSC_TRANSLATION,
    PMBLIMITR_E,
    PMBLIMITR_NVM,
    PMBSR_COLL,
    PMBSR_DL,
    PMBSR_EA,
    PMBSR_EC_SHIFT,
    PMBSR_S,
)
from spepolicy.jit import entry, jit, widen
from spepolicy.machine.host import (
    DIRTY,
    FRAME,
    HOLE,
    NOTIFIED,
    PIN_MASK,
    PIN_ONE,
    PRESENT,
    SHARED,
    SKIPPED,
    bug_strikes,
    map_page,
)
from spepolicy.machine.hostpage import READ_ONLY_VMA, pin_page
from spepolicy.machine.kvm import inject
from spepolicy.machine.pagetables import ipa_entry, ipa_middle, va_leaf
from spepolicy.machine.rows import (
    claims,
    frames,
    host_page,
    params,
    pins,
    pool,
    regime_row,
    truth_row,
    vcpu_row,
    vm_row,
)
from spepolicy.machine.scenario import Bug, Handling
from spepolicy.machine.spu import hold_counter
from spepolicy.machine.state import NEVER, LostCause, Machine
from spepolicy.machine.trace import CLAIMED, MAPPED, PINNED, RESUMED, UNPINNED, WALKED, ZERO, log
from spepolicy.mmu.memory import find
from spepolicy.mmu.regime import UPPER
from spepolicy.mmu.tables import S2_LEAF, leaf_descriptor, level_shift
from spepolicy.mmu.walker import AF, FSC_MASK, OA_MASK, S1_READ_ONLY, S2_WRITE, STAGE1, VALID

Ints = NDArray[np.int64]

_NOT_MAPPED, _REPORT_DIRTY = int(Handling.NOT_MAPPED), int(Handling.REPORT_DIRTY)
_REFUSED = int(LostCause.REFUSED)
_STAGE1_FAULT = int(LostCause.STAGE1_FAULT)

# What `pin` answers.
PIN_OK, PIN_OVER_LIMIT, PIN_NO_PAGE = range(3)

# spepolicy.hookspecs.Event
_EVENT_STAGE1, _EVENT_STAGE2, _EVENT_EXTERNAL, _EVENT_IMPDEF, _EVENT_FULL, _EVENT_TOO_LARGE = range(1, 7)

# What `look` finds out.
LOOK_MISSING = 1  # a page is not mapped at stage 2 as the walk needs it
LOOK_TABLE = 2  # it is a stage 1 table, not the buffer
LOOK_LISTED = 4  # it is in the list of pages that KVM pinned for this vCPU
LOOK_NOTIFIED = 8  # KVM's notifier handler unmapped it
LOOK_IN_RANGE = 16  # the faulting VA is in the range that KVM pinned

_SKIP_PAGE = int(Bug.SKIP_PAGE)
_LEAK_PIN = int(Bug.LEAK_PIN)


@jit
def charge(m: Machine, i: int, k: int, cost_ps: int) -> None:
    v = vcpu_row(m, i, k)
    tr = truth_row(m, i, k)
    v.host_ps += cost_ps
    tr.hook_total_ps += cost_ps


@jit
def account_pins(vm: Any, pages: int, now_ps: int) -> None:
    """Change the number of pinned pages; carry its integral over time on (in page x 1000 ps, to stay below 2**63)."""
    elapsed = max(now_ps - vm.pinned_since_ps, 0)
    vm.pinned_page_ps += vm.pinned_pages * (elapsed // 1000)
    vm.pinned_since_ps = max(now_ps, vm.pinned_since_ps)
    vm.pinned_pages += pages
    vm.pinned_peak_pages = max(vm.pinned_peak_pages, vm.pinned_pages)
    vm.charged_peak_pages = max(vm.charged_peak_pages, vm.pinned_pages + vm.locked_pages)


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
        count = 0
        reads = 0
        table = -1
        slot = -1
        before = -1
        v.walk_lo = lo[n]
        v.walk_hi = lo[n]
        for page in range(lo[n] >> 12, (hi[n] + 0xFFF) >> 12):
            va = page << 12
            if va >> 21 != table:
                slot, _entry, steps = va_leaf(m, i, va)
                reads += steps
                table = va >> 21
                if pin_tables != 0:
                    count = _collect_tables(m, i, k, va, count)
            else:
                reads += 1
            descriptor = pool(m, i)[slot, page & 511] if slot >= 0 else 0
            status[n] = leaf_status(descriptor)
            guest_page = ((descriptor & OA_MASK) >> 12) - par.ram_page0
            if status[n] == 0 and (guest_page < 0 or guest_page >= par.ram_pages):
                status[n] = STAGE1 | FSC_TRANSLATION | 3  # points outside the VM's memory: nothing to pin
            if status[n] != 0 or count >= fresh.shape[0]:
                break
            if one_range != 0 and before >= 0 and guest_page != before + 1:
                break
            before = guest_page
            fresh[count] = guest_page
            count += 1
            v.walk_hi = (page + 1) << 12
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
def pin_fresh(m: Machine, lanes: Ints, vcpus: Ints, ignore_limit: int) -> Ints:
    """Pin the pages that the last walk listed (FOLL_WRITE | FOLL_LONGTERM) and map them writable at stage 2. Return
    PIN_* each. *ignore_limit*: the VMM has just raised its limit.
    """
    result = np.zeros(lanes.shape[0], dtype=np.int64)
    for n in range(lanes.shape[0]):
        i = lanes[n]
        k = vcpus[n]
        vm = vm_row(m, i)
        par = params(m, i)
        v = vcpu_row(m, i, k)
        fresh = pins(m, i, k)[1 - v.pin_list]
        if vm.dirty_logging != 0 and par.migration_handling == _NOT_MAPPED:
            v.pin_fresh = 0
            result[n] = PIN_NO_PAGE
            continue
        if ignore_limit == 0 and vm.pinned_pages + vm.locked_pages + v.pin_fresh > par.memlock_pages:
            vm.pin_refused += v.pin_fresh
            log(m, i, k, PINNED, PIN_OVER_LIMIT, v.pin_fresh, ZERO)
            v.pin_fresh = 0
            result[n] = PIN_OVER_LIMIT
            continue
        done, cost = pin_pages(m, i, fresh, v.pin_fresh)
        if done < v.pin_fresh:
            result[n] = PIN_NO_PAGE
        vm.pin_calls += done
        account_pins(vm, done, v.now_ps + v.host_ps)
        v.pin_fresh = done
        log(m, i, k, PINNED, result[n], done, ZERO)
        charge(m, i, k, cost)
        if result[n] != PIN_OK:
            _unpin_list(m, i, k, 1 - v.pin_list, done)
            v.pin_fresh = 0
    return result


@jit
def pin_pages(m: Machine, i: int, pages: NDArray[np.int32], count: int) -> tuple[int, int]:
    """Pin and map the first *count* of *pages*. Return how many there were to pin, and the cost in ps."""
    vm = vm_row(m, i)
    par = params(m, i)
    words = host_page(m, i)
    tables = pool(m, i)
    ram_page0 = par.ram_page0
    before = vm.stage2_maps
    movable = par.zone_movable
    cost = 0
    middle, region = -1, -1
    for n in range(count):
        page = widen(pages[n])
        word = words[page]
        if par.bug == _SKIP_PAGE and word & (PIN_MASK | SKIPPED) == 0 and bug_strikes(m, i):
            words[page] |= SKIPPED  # KVM believes that it has pinned and mapped it
            continue
        ipa = (ram_page0 + page) << 12
        if ipa >> 30 != region or middle < 0:
            region = ipa >> 30
            middle = ipa_middle(m, i, ipa)
        # A resident page that stage 2 maps writable already needs the pin only; that is nearly every page.
        resident = word & (PRESENT | SHARED | HOLE | READ_ONLY_VMA) == PRESENT
        if (
            not resident
            or movable != 0
            or middle < 0
            or not maps_writable(leaf_descriptor(tables, middle, ipa), word & FRAME)
        ):
            paid = pin_page(m, i, page)
            if paid < 0:
                return n, cost
            cost += paid + map_page(m, i, page, 1)
            middle = -1  # a notifier may have freed it
        else:
            words[page] += PIN_ONE
    return count, cost + count * par.pin_page_ps + (vm.stage2_maps - before) * par.map_page_ps


@jit
def maps_writable(descriptor: int, frame: int) -> bool:
    """Tell whether a stage 2 leaf is what map_page would write for a writable mapping of *frame*."""
    return descriptor == (frame << 12) | S2_LEAF | S2_WRITE


@jit
def _unpin_list(m: Machine, i: int, k: int, which: int, count: int) -> None:
    vm = vm_row(m, i)
    par = params(m, i)
    v = vcpu_row(m, i, k)
    pages = pins(m, i, k)[which]
    words = host_page(m, i)
    leaked = 0
    for n in range(count):
        page = widen(pages[n])
        if words[page] & SKIPPED != 0:
            words[page] &= ~SKIPPED
        elif par.bug == _LEAK_PIN and bug_strikes(m, i):
            leaked += 1
        elif words[page] & PIN_MASK != 0:
            words[page] -= PIN_ONE
            if vm.dirty_logging != 0 and par.migration_handling == _REPORT_DIRTY:
                words[page] |= DIRTY  # it was writable so far, and is not pinned when the log is read
    vm.leaked_pins += leaked
    account_pins(vm, leaked - count, v.now_ps + v.host_ps)
    if count != 0:
        log(m, i, k, UNPINNED, ZERO, count, ZERO)
    charge(m, i, k, count * par.unpin_page_ps)


@entry
def unpin_previous(m: Machine, lanes: Ints, vcpus: Ints) -> None:
    """Make the freshly pinned pages the current set and unpin the set before."""
    for n in range(lanes.shape[0]):
        v = vcpu_row(m, lanes[n], vcpus[n])
        _unpin_list(m, lanes[n], vcpus[n], v.pin_list, v.pin_count)
        v.pin_list = 1 - v.pin_list
        v.pin_count = v.pin_fresh
        v.pin_fresh = 0
        v.pin_lo = v.walk_lo
        v.pin_hi = v.walk_hi


@entry
def keep_previous(m: Machine, lanes: Ints, vcpus: Ints) -> None:
    """Add the freshly pinned pages to the current set; its VA range grows to hold both. Where the list is full, the
    fresh pages replace the set.
    """
    for n in range(lanes.shape[0]):
        v = vcpu_row(m, lanes[n], vcpus[n])
        both = pins(m, lanes[n], vcpus[n])
        if v.pin_count + v.pin_fresh > both.shape[1]:
            _unpin_list(m, lanes[n], vcpus[n], v.pin_list, v.pin_count)
            v.pin_count = 0
        if v.pin_count == 0:
            v.pin_lo = v.walk_lo
            v.pin_hi = v.walk_hi
        for p in range(v.pin_fresh):
            both[v.pin_list, v.pin_count + p] = both[1 - v.pin_list, p]
        v.pin_count += v.pin_fresh
        v.pin_fresh = 0
        v.pin_lo = min(v.pin_lo, v.walk_lo)
        v.pin_hi = max(v.pin_hi, v.walk_hi)


@entry
def release_idle(m: Machine, lanes: Ints, vcpus: Ints) -> Ints:
    """Unpin the sets of the other vCPUs of each VM whose buffer is disabled. Return how many pages that were; the time
    is charged to the vCPU that asked.
    """
    released = np.zeros(lanes.shape[0], dtype=np.int64)
    for n in range(lanes.shape[0]):
        i = lanes[n]
        for k in range(params(m, i).vcpus):
            v = vcpu_row(m, i, k)
            if k == vcpus[n] or v.pin_count == 0 or v.pmblimitr & PMBLIMITR_E != 0:
                continue
            released[n] += v.pin_count
            before = v.host_ps
            _unpin_list(m, i, k, v.pin_list, v.pin_count)
            cost = v.host_ps - before
            charge(m, i, k, -cost)
            charge(m, i, vcpus[n], cost)
            v.pin_count = 0
    return released


@entry
def set_timer(m: Machine, lanes: Ints, vcpus: Ints, delay_ps: Ints) -> None:
    """Let each vCPU's timer fire *delay_ps* of host time from now; below 0: never."""
    for n in range(lanes.shape[0]):
        v = vcpu_row(m, lanes[n], vcpus[n])
        v.timer_ps = v.now_ps + v.host_ps + delay_ps[n] if delay_ps[n] >= 0 else NEVER


@entry
def exit_to_vmm(m: Machine, lanes: Ints, vcpus: Ints) -> None:
    """KVM_RUN returns to the VMM, which does something and enters again."""
    for n in range(lanes.shape[0]):
        charge(m, lanes[n], vcpus[n], params(m, lanes[n]).vmm_exit_ps)


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


@entry
def unpin_current(m: Machine, lanes: Ints, vcpus: Ints) -> None:
    """Unpin the current set. The stage 2 entries stay, as unpin_user_pages() leaves them."""
    for n in range(lanes.shape[0]):
        v = vcpu_row(m, lanes[n], vcpus[n])
        _unpin_list(m, lanes[n], vcpus[n], v.pin_list, v.pin_count)
        v.pin_count = 0


@entry
def map_fresh(m: Machine, lanes: Ints, vcpus: Ints) -> Ints:
    """Map the pages that the last walk listed at stage 2, writable, without pinning them. Return 1 where a page does
    not exist.
    """
    failed = np.zeros(lanes.shape[0], dtype=np.int64)
    for n in range(lanes.shape[0]):
        i = lanes[n]
        k = vcpus[n]
        vm = vm_row(m, i)
        par = params(m, i)
        v = vcpu_row(m, i, k)
        cost = 0
        before = vm.stage2_maps
        if vm.dirty_logging != 0 and par.migration_handling == _NOT_MAPPED:
            v.pin_fresh = 0
            failed[n] = 1
        for p in range(v.pin_fresh):
            paid = map_page(m, i, widen(pins(m, i, k)[1 - v.pin_list, p]), 1)
            if paid < 0:
                failed[n] = 1
                break
            cost += paid
        log(m, i, k, MAPPED, failed[n], v.pin_fresh, ZERO)
        v.pin_fresh = 0
        charge(m, i, k, cost + (vm.stage2_maps - before) * par.map_page_ps)
    return failed


@entry
def tell_guest(m: Machine, lanes: Ints, vcpus: Ints, event: int, data_loss: int) -> None:
    """Inject a buffer management event. Where the SPU is not stopped yet, it is stopped first."""
    for n in range(lanes.shape[0]):
        i = lanes[n]
        k = vcpus[n]
        v = vcpu_row(m, i, k)
        tr = truth_row(m, i, k)
        syndrome = v.pmbsr & (PMBSR_COLL | PMBSR_DL)
        if event == _EVENT_STAGE1:
            fault_status = v.walk_status & FSC_MASK if v.walk_status != 0 else FSC_TRANSLATION | 3
            syndrome |= (EC_STAGE1 << PMBSR_EC_SHIFT) | fault_status
            tr.injected_stage1 += 1
        elif event == _EVENT_STAGE2:
            syndrome = v.pmbsr
            tr.injected_stage2 += 1
        elif event == _EVENT_EXTERNAL:
            syndrome |= (EC_STAGE1 << PMBSR_EC_SHIFT) | FSC_EXTERNAL_ABORT | PMBSR_EA
            tr.injected_external += 1
        elif event == _EVENT_FULL:
            syndrome |= BSC_FULL
            tr.injected_full += 1
        elif event == _EVENT_TOO_LARGE:
            syndrome |= BSC_TOO_LARGE
            tr.injected_too_large += 1
        else:
            syndrome |= EC_IMPDEF << PMBSR_EC_SHIFT
            tr.injected_impdef += 1
        if data_loss != 0:
            if syndrome & PMBSR_DL == 0:
                tr.forged_loss += 1
            syndrome |= PMBSR_DL
        if v.pmbsr & PMBSR_S == 0:
            hold_counter(v, v.now_ps)
            v.stop_ps = v.now_ps
            v.stop_cause = _STAGE1_FAULT if event == _EVENT_STAGE1 else _REFUSED
            tr.refused += 1 if event != _EVENT_STAGE1 else 0
        v.event_seen = 1
        v.irq_ps = NEVER
        v.answered = 2
        inject(m, i, k, syndrome | PMBSR_S)


@entry
def resume(m: Machine, lanes: Ints, vcpus: Ints) -> None:
    """Clear PMBSR_EL1.S and go on at the same PMBPTR_EL1 (rule 45); the guest does not notice."""
    for n in range(lanes.shape[0]):
        v = vcpu_row(m, lanes[n], vcpus[n])
        tr = truth_row(m, lanes[n], vcpus[n])
        if v.pmbsr & PMBSR_DL != 0:
            tr.resumed_cut += 1
        log(m, lanes[n], vcpus[n], RESUMED, ZERO, v.pmbptr, ZERO)
        v.pmbsr &= PMBSR_COLL
        v.guest_pmbsr = 0
        v.event_seen = 0
        v.answered = 1


@entry
def score_claims(m: Machine, lanes: Ints, vcpus: Ints) -> None:
    """After the policy answered stage 2 faults: note what it claimed against what was true."""
    for n in range(lanes.shape[0]):
        v = vcpu_row(m, lanes[n], vcpus[n])
        tr = truth_row(m, lanes[n], vcpus[n])
        claims(m, lanes[n])[max(v.claim, 0), tr.fault_cause] += 1
        log(m, lanes[n], vcpus[n], CLAIMED, max(v.claim, 0), tr.fault_cause, ZERO)


@entry
def release_all(m: Machine, lanes: Ints) -> None:
    """Carry the integral of pinned pages to the end of the run. Pins that are left are counted by the judge."""
    for n in range(lanes.shape[0]):
        vm = vm_row(m, lanes[n])
        end = 0
        for k in range(params(m, lanes[n]).vcpus):
            v = vcpu_row(m, lanes[n], k)
            end = max(end, v.now_ps + v.host_ps)
        account_pins(vm, 0, end)
