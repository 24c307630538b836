"""Tools that act on all memory of a VM before it runs, and when it is gone: policies of 2020, 2021 and 2026.

`lanes` is int64[n]; results are int64[n], `PIN_*` of `spepolicy.machine.pinning`. Their time is start-up time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spepolicy.jit import entry, jit
from spepolicy.machine.host import (
    FRAME,
    HOLE,
    LOCKED,
    PIN_MASK,
    PRESENT,
    SHARED,
    SKIPPED,
    map_page,
    resident,
)
from spepolicy.machine.hostpage import READ_ONLY_VMA
from spepolicy.machine.pagetables import ipa_middle
from spepolicy.machine.pinning import PIN_NO_PAGE, PIN_OVER_LIMIT, account_pins, maps_writable, pin_pages
from spepolicy.machine.rows import host_page, params, pool, vcpu_row, vm_row
from spepolicy.machine.state import Machine
from spepolicy.machine.trace import PINNED, UNPINNED, ZERO, log
from spepolicy.mmu.tables import leaf_descriptor

Ints = NDArray[np.int64]

_USABLE = PRESENT | SHARED | HOLE | READ_ONLY_VMA  # a page that can be written as it is has PRESENT of these


@jit
def _charge_vm(m: Machine, i: int, cost_ps: int) -> None:
    """The VM waits: before its first vCPU runs, or stopped by a migration, whose target does this again."""
    vm = vm_row(m, i)
    if vm.migration_begin_ps == 0:
        vm.startup_ps += cost_ps
        return
    vm.migration_downtime_ps += cost_ps
    for k in range(params(m, i).vcpus):
        vcpu_row(m, i, k).host_ps += cost_ps


@entry
def pin_all(m: Machine, lanes: Ints, ignore_limit: int) -> Ints:
    """Pin all RAM of each VM and map it at stage 2. Return PIN_* each. The VM waits for it."""
    result = np.zeros(lanes.shape[0], dtype=np.int64)
    for n in range(lanes.shape[0]):
        i = lanes[n]
        vm = vm_row(m, i)
        par = params(m, i)
        if ignore_limit == 0 and vm.pinned_pages + vm.locked_pages + par.ram_pages > par.memlock_pages:
            vm.pin_refused += par.ram_pages
            result[n] = PIN_OVER_LIMIT
            continue
        everything = np.arange(par.ram_pages).astype(np.int32)
        done, cost = pin_pages(m, i, everything, par.ram_pages)
        _charge_vm(m, i, cost)
        vm.pin_calls += done
        account_pins(vm, done, 0)
        log(m, i, ZERO, PINNED, ZERO, done, ZERO)
        if done < par.ram_pages:
            result[n] = PIN_NO_PAGE
        else:
            vm.slots_locked = 1
    return result


@entry
def unpin_all(m: Machine, lanes: Ints) -> None:
    """Drop every pin on the memory of each VM, but those that KVM has forgotten."""
    for n in range(lanes.shape[0]):
        i = lanes[n]
        vm = vm_row(m, i)
        vm.slots_locked = 0
        words = host_page(m, i)
        for page in range(words.shape[0]):
            if words[page] & (PIN_MASK | SKIPPED) != 0:  # few are, and the rest need not be written back
                words[page] &= ~(PIN_MASK | SKIPPED)
        end = 0
        for k in range(params(m, i).vcpus):
            v = vcpu_row(m, i, k)
            v.pin_count = 0
            end = max(end, v.now_ps + v.host_ps)
        log(m, i, ZERO, UNPINNED, ZERO, vm.pinned_pages - vm.leaked_pins, ZERO)
        account_pins(vm, vm.leaked_pins - vm.pinned_pages, end)


@entry
def mlock_all(m: Machine, lanes: Ints, ignore_limit: int) -> Ints:
    """The VMM locks all RAM of each VM: faulted in, VM_LOCKED, counted against RLIMIT_MEMLOCK. No stage 2 entry."""
    result = np.zeros(lanes.shape[0], dtype=np.int64)
    for n in range(lanes.shape[0]):
        i = lanes[n]
        vm = vm_row(m, i)
        par = params(m, i)
        if ignore_limit == 0 and vm.pinned_pages + vm.locked_pages + par.ram_pages > par.memlock_pages:
            vm.pin_refused += par.ram_pages
            result[n] = PIN_OVER_LIMIT
            continue
        words = host_page(m, i)
        for page in range(par.ram_pages):
            if words[page] & _USABLE != PRESENT:
                cost = resident(m, i, page, 1)
                if cost < 0:
                    result[n] = PIN_NO_PAGE
                    break
                _charge_vm(m, i, cost)
            words[page] |= LOCKED
            vm.locked_pages += 1
        vm.charged_peak_pages = max(vm.charged_peak_pages, vm.pinned_pages + vm.locked_pages)
    return result


@entry
def map_all(m: Machine, lanes: Ints) -> Ints:
    """Map all RAM of each VM at stage 2, writable, without a pin: FINALIZE of RFC v3, KVM_PRE_FAULT_MEMORY of v7."""
    result = np.zeros(lanes.shape[0], dtype=np.int64)
    for n in range(lanes.shape[0]):
        i = lanes[n]
        vm = vm_row(m, i)
        par = params(m, i)
        before = vm.stage2_maps
        words = host_page(m, i)
        middle, region = -1, -1
        for page in range(par.ram_pages):
            ipa = (par.ram_page0 + page) << 12
            if ipa >> 30 != region or middle < 0:
                region = ipa >> 30
                middle = ipa_middle(m, i, ipa)
            # Nearly every page is resident, and mapped because the guest has touched it.
            leaf = leaf_descriptor(pool(m, i), middle, ipa) if middle >= 0 else 0
            if words[page] & _USABLE == PRESENT and maps_writable(leaf, words[page] & FRAME):
                continue
            middle = -1
            cost = map_page(m, i, page, 1)
            if cost < 0:
                result[n] = PIN_NO_PAGE
                break
            _charge_vm(m, i, cost)
        _charge_vm(m, i, (vm.stage2_maps - before) * par.map_page_ps)
    return result
