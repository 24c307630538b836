"""The machine's functions one by one, as ordinary Python, beside the compiled machine of the same process.

Compiled, only the few entry points can be called from Python. Here the package is imported a second time with numba
switched off, under the same names but not in `sys.modules`, so that a test can drive a rule, step by step, on one lane.
`test_two_forms.py` holds that both forms compute the same.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numba
import numpy as np

from spepolicy.machine.scenario import Scenario

PACKAGES = ("spepolicy", "spepolicy_plugins")


def _ours() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}


@contextmanager
def _second_copy(known: dict[str, ModuleType]) -> Iterator[None]:
    """Let imports see the interpreted package only; what they add stays in *known*."""
    compiled, before = _ours(), numba.config.DISABLE_JIT
    for name in compiled:
        del sys.modules[name]
    sys.modules.update(known)
    numba.config.DISABLE_JIT = 1
    try:
        yield
    finally:
        known.update(_ours())
        numba.config.DISABLE_JIT = before
        for name in _ours():
            del sys.modules[name]
        sys.modules.update(compiled)


class Interpreted:
    """Modules of the interpreted copy: `interpreted().module("machine.spu").drain(m, 0, 0)`."""

    def __init__(self) -> None:
        self._known: dict[str, ModuleType] = {}

    def module(self, name: str) -> Any:
        """Return module `spepolicy.NAME`, or a module of the plugins by its full name."""
        full = name if name.partition(".")[0] in PACKAGES else f"spepolicy.{name}"
        if full not in self._known:
            with _second_copy(self._known):
                importlib.import_module(full)
        return self._known[full]


@cache
def interpreted() -> Interpreted:
    return Interpreted()


def module(name: str) -> Any:
    """Return one module of the interpreted copy."""
    return interpreted().module(name)


class Lane:
    """One lane, booted and not run: its arrays, and rows with their fields as attributes."""

    def __init__(self, scenario: Scenario, log_rows: int = 0, **behaviour: Any) -> None:
        build = module("machine.build")
        self.m = build.allocate(scenario, build.Behaviour(**behaviour), 1, log_rows)
        build.reset(self.m, scenario, [0])
        with np.errstate(over="ignore"):  # hashes wrap around on purpose
            module("machine.lane").start_lanes(self.m, np.array([0]))
        rows = module("machine.rows")
        self.par, self.vm = rows.params(self.m, 0), rows.vm_row(self.m, 0)
        self.v, self.tr = rows.vcpu_row(self.m, 0, 0), rows.truth_row(self.m, 0, 0)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call `MODULE.FUNCTION(m, 0, ...)` of the interpreted machine, for example `call("spu.drain", 0)`."""
        where, _, function = name.rpartition(".")
        with np.errstate(over="ignore"):
            return getattr(module(f"machine.{where}"), function)(self.m, 0, *arguments)

    def translate(self, va: int, write: int = 1) -> tuple[int, int, int, int]:
        """Walk *va* as the SPU does on a TLB miss: (status, PA, IPA, descriptors read)."""
        walker, m = module("mmu.walker"), self.m
        w = module("machine.rows").walk_row(m, 0)
        access = walker.WRITE | walker.MARK_DIRTY if write else 0
        nothing = module("mmu.memory").NO_ZERO_RANGES
        walker.translate(m.frames[0], m.pool[0], nothing, m.regime[0], w, np.int64(va), access)
        return int(w.status), 0 if w.status else int(w.pa), int(w.address), int(w.reads)

    def slot_of(self, frame: int) -> int:
        """Return the table page that a host frame holds, -1 if none."""
        return int(module("mmu.memory").find(self.m.frames[0], frame))

    def frame_of(self, slot: int) -> int:
        """Return the host frame that holds a table page."""
        memory = module("mmu.memory")
        words = self.m.frames[0][self.m.frames[0] != memory.FREE]
        return int((words[words >> memory.SLOT_SHIFT == slot][0] & memory.KEY) - 1)

    def stage1_leaf(self, va: int) -> tuple[int, int]:
        """Return (slot, entry) of the guest's level 3 descriptor of *va*."""
        slot, entry, _ = module("machine.pagetables").va_leaf(self.m, 0, va)
        return int(slot), int(entry)

    def stage2_leaf(self, page: int) -> int:
        """Return KVM's level 3 descriptor of guest page *page*, 0 if there is none."""
        slot, entry = module("machine.pagetables").ipa_leaf(self.m, 0, (self.par.ram_page0 + page) << 12)
        return int(self.m.pool[0, slot, entry]) if slot >= 0 else 0

    def buffer_page(self, n: int) -> int:
        """Return the guest page behind page *n* of vCPU 0's AUX buffer."""
        slot, entry = self.stage1_leaf(int(self.v.buffer_va) + (n << 12))
        return ((int(self.m.pool[0, slot, entry]) & 0xFFFF_FFFF_F000) >> 12) - int(self.par.ram_page0)

    def lost(self) -> dict[int, int]:
        """Return the samples of vCPU 0 that were lost, by cause."""
        return {cause: int(n) for cause, n in enumerate(self.m.lost[0, 0]) if n}
