"""How KVM pins guest pages, maps them at stage 2 and unpins them, and accounts for it.

A vCPU has two lists of pages (`Machine.pins`): the set that is pinned now, and the list that the last walk made
(spepolicy.machine.walking). `lanes` and `vcpus` are int64[n]; results are int64[n]. Policies use it through
`spepolicy.batch`; each tool obeys the machine's rules and charges its cost.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import PMBLIMITR_E
from spepolicy.jit import cell, entry, jit, prefetch, prefetch_word, widen
from spepolicy.jit import word as word_of
from spepolicy.machine.host import (
    DIRTY,
    FRAME,
    HOLE,
    PIN_MASK,
    PIN_ONE,
    PRESENT,
    SHARED,
    SKIPPED,
    bug_strikes,
    map_page,
)
from spepolicy.machine.hostpage import READ_ONLY_VMA, pin_page
from spepolicy.machine.kvm import charge
from spepolicy.machine.pagetables import ipa_middle
from spepolicy.machine.rows import host_page, params, pins, pool, vcpu_row, vm_row
from spepolicy.machine.scenario import Bug, Handling
from spepolicy.machine.state import Machine
from spepolicy.machine.trace import MAPPED, PINNED, UNPINNED, ZERO, log
from spepolicy.mmu.tables import S2_LEAF, STAGE2_FRAME0, leaf_descriptor
from spepolicy.mmu.walker import OA_MASK, S2_WRITE, TABLE, VALID

Ints = NDArray[np.int64]

_NOT_MAPPED, _REPORT_DIRTY = int(Handling.NOT_MAPPED), int(Handling.REPORT_DIRTY)
_SKIP_PAGE = int(Bug.SKIP_PAGE)
_LEAK_PIN = int(Bug.LEAK_PIN)

_AHEAD = 16  # pages to ask memory for ahead of their turn

# What `pin_fresh` answers.
PIN_OK, PIN_OVER_LIMIT, PIN_NO_PAGE = range(3)


@jit
def account_pins(vm: Any, pages: int, now_ps: int) -> None:
    """Change the number of pinned pages; carry its integral over time on (in page x 1000 ps, to stay below 2**63)."""
    elapsed = max(now_ps - vm.pinned_since_ps, 0)
    vm.pinned_page_ps += vm.pinned_pages * (elapsed // 1000)
    vm.pinned_since_ps = max(now_ps, vm.pinned_since_ps)
    vm.pinned_pages += pages
    vm.pinned_peak_pages = max(vm.pinned_peak_pages, vm.pinned_pages)
    vm.charged_peak_pages = max(vm.charged_peak_pages, vm.pinned_pages + vm.locked_pages)


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
    skipping = par.bug == _SKIP_PAGE
    cost = 0
    middle, region = -1, -1
    for n in range(count):
        if n + _AHEAD < count and middle >= 0:
            _ask_for(words, tables, middle, region, ram_page0, widen(word_of(pages, n + _AHEAD)))
        page = widen(word_of(pages, n))
        word = word_of(words, page)
        if skipping and word & (PIN_MASK | SKIPPED) == 0 and bug_strikes(m, i):
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
            words[np.uint64(page)] = word + PIN_ONE
    return count, cost + count * par.pin_page_ps + (vm.stage2_maps - before) * par.map_page_ps


@jit
def _ask_for(words: Ints, tables: Ints, middle: int, region: int, ram_page0: int, page: int) -> None:
    """Let the processor fetch what `pin_pages` will look at for *page*: its word, and its stage 2 descriptor. Pages lie
    anywhere, and waiting for memory is most of what pinning takes.
    """
    prefetch_word(words, page)
    ipa_page = ram_page0 + page
    if ipa_page >> 18 == region:
        descriptor = cell(tables, middle, (ipa_page >> 9) & 511)
        if descriptor & (VALID | TABLE) == VALID | TABLE:
            prefetch(tables, ((descriptor & OA_MASK) >> 12) - STAGE2_FRAME0, ipa_page & 511)


@jit
def maps_writable(descriptor: int, frame: int) -> bool:
    """Tell whether a stage 2 leaf is what map_page would write for a writable mapping of *frame*."""
    return descriptor == (frame << 12) | S2_LEAF | S2_WRITE


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
def unpin_current(m: Machine, lanes: Ints, vcpus: Ints) -> None:
    """Unpin the current set. The stage 2 entries stay, as unpin_user_pages() leaves them."""
    for n in range(lanes.shape[0]):
        v = vcpu_row(m, lanes[n], vcpus[n])
        _unpin_list(m, lanes[n], vcpus[n], v.pin_list, v.pin_count)
        v.pin_count = 0


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


@jit
def _unpin_list(m: Machine, i: int, k: int, which: int, count: int) -> None:
    vm = vm_row(m, i)
    par = params(m, i)
    v = vcpu_row(m, i, k)
    pages = pins(m, i, k)[which]
    words = host_page(m, i)
    leaking = par.bug == _LEAK_PIN
    # A page that was writable so far, and is not pinned when the log is read, counts as written.
    report = DIRTY if vm.dirty_logging != 0 and par.migration_handling == _REPORT_DIRTY else 0
    leaked = 0
    for n in range(count):
        if n + _AHEAD < count:
            prefetch_word(words, widen(word_of(pages, n + _AHEAD)))
        page = widen(word_of(pages, n))
        word = word_of(words, page)
        if word & SKIPPED != 0:
            words[page] = word & ~SKIPPED
        elif leaking and bug_strikes(m, i):
            leaked += 1
        elif word & PIN_MASK != 0:
            words[np.uint64(page)] = (word - PIN_ONE) | report
    vm.leaked_pins += leaked
    account_pins(vm, leaked - count, v.now_ps + v.host_ps)
    if count != 0:
        log(m, i, k, UNPINNED, ZERO, count, ZERO)
    charge(m, i, k, count * par.unpin_page_ps)


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
