"""KVM's tools, as batches (`spepolicy.batch`) reach them: each call goes to the machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.arch.registers import PMBSR_COLL
from spepolicy.machine import answers, own_buffer, pinning, walking, whole_vm
from spepolicy.machine.state import Machine

Ints = NDArray[np.int64]

_SHADOWS = {"pmbptr": "shadow_ptr", "pmblimitr": "shadow_limit", "pmbsr": "guest_pmbsr"}  # Ownership.KVM


class Tools:
    """The tools of `spepolicy.batch`, bound to the machine for the time of one hook."""

    def __init__(self, m: Machine, handle: Any) -> None:
        self._machine = m
        self._m = handle

    def register(self, name: str, lanes: Ints, vcpus: Ints) -> NDArray[np.uint64]:
        if name in _SHADOWS and len(lanes) and self._machine.par["own_buffer"][lanes[0]]:  # the same in all lanes
            name = _SHADOWS[name]
        values: NDArray[np.uint64] = self._machine.vcpu[name][lanes, vcpus].view(np.uint64)
        return values

    def parameter(self, name: str, lanes: Ints) -> Ints:
        values: Ints = self._machine.par[name][lanes]
        return values

    def walk_stage1(self, lanes: Ints, vcpus: Ints, lo: Ints, hi: Ints, pin_tables: bool, one_range: bool) -> Ints:
        return walking.walk_stage1(self._m, lanes, vcpus, lo, hi, int(pin_tables), int(one_range))

    def list_physical(self, lanes: Ints, vcpus: Ints, lo: Ints, hi: Ints) -> Ints:
        return walking.list_physical(self._m, lanes, vcpus, lo, hi)

    def pin_fresh(self, lanes: Ints, vcpus: Ints, ignore_limit: bool) -> Ints:
        return pinning.pin_fresh(self._m, lanes, vcpus, int(ignore_limit))

    def map_fresh(self, lanes: Ints, vcpus: Ints) -> Ints:
        return pinning.map_fresh(self._m, lanes, vcpus)

    def unpin_previous(self, lanes: Ints, vcpus: Ints) -> None:
        pinning.unpin_previous(self._m, lanes, vcpus)

    def unpin_current(self, lanes: Ints, vcpus: Ints) -> None:
        pinning.unpin_current(self._m, lanes, vcpus)

    def pin_all(self, lanes: Ints, ignore_limit: bool) -> Ints:
        return whole_vm.pin_all(self._m, lanes, int(ignore_limit))

    def unpin_all(self, lanes: Ints) -> None:
        whole_vm.unpin_all(self._m, lanes)

    def keep_previous(self, lanes: Ints, vcpus: Ints) -> None:
        pinning.keep_previous(self._m, lanes, vcpus)

    def release_idle(self, lanes: Ints, vcpus: Ints) -> Ints:
        return pinning.release_idle(self._m, lanes, vcpus)

    def look(self, lanes: Ints, vcpus: Ints) -> Ints:
        return walking.look(self._m, lanes, vcpus)

    def trap_eret(self, lanes: Ints, vcpus: Ints, armed: bool) -> None:
        self._machine.vcpu["eret_trap"][lanes, vcpus] = int(armed)

    def set_timer(self, lanes: Ints, vcpus: Ints, delay_ps: Ints) -> None:
        answers.set_timer(self._m, lanes, vcpus, delay_ps)

    def exit_to_vmm(self, lanes: Ints, vcpus: Ints) -> None:
        answers.exit_to_vmm(self._m, lanes, vcpus)

    def start_own_buffer(self, lanes: Ints, vcpus: Ints, pages: int) -> None:
        own_buffer.start_own_buffer(self._m, lanes, vcpus, pages)

    def copy_out(self, lanes: Ints, vcpus: Ints, deferred: bool) -> Ints:
        return own_buffer.copy_out(self._m, lanes, vcpus, int(deferred))

    def report_collision(self, lanes: Ints, vcpus: Ints) -> None:
        self._machine.vcpu["pmbsr"][lanes, vcpus] |= PMBSR_COLL

    def mlock_all(self, lanes: Ints, ignore_limit: bool) -> Ints:
        return whole_vm.mlock_all(self._m, lanes, int(ignore_limit))

    def map_all(self, lanes: Ints) -> Ints:
        return whole_vm.map_all(self._m, lanes)

    def use_guest_memfd(self, lanes: Ints) -> None:
        self._machine.vm["guest_memfd"][lanes] = 1

    def inject(self, lanes: Ints, vcpus: Ints, event: int, data_loss: bool) -> None:
        answers.tell_guest(self._m, lanes, vcpus, event, int(data_loss))

    def fail(self, lanes: Ints, vcpus: Ints, failure: int) -> None:
        answers.answer(self._m, lanes, vcpus, failure)

    def resume(self, lanes: Ints, vcpus: Ints) -> None:
        answers.resume(self._m, lanes, vcpus)

    def claim(self, lanes: Ints, vcpus: Ints, causes: Ints | int) -> None:
        self._machine.vcpu["claim"][lanes, vcpus] = causes
