"""What of a translation fault reaches PMBSR_EL1: stage, level, status code, and nothing else (spe.md 6a)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from spepolicy.arch.registers import EC_STAGE1, EC_STAGE2, PMBLIMITR_E, PMBSR_DL, PMBSR_EC_SHIFT, PMBSR_S
from spepolicy.jit import entry
from spepolicy.machine.build import Behaviour, allocate, reset, smallest_machine
from spepolicy.machine.lane import start_lanes
from spepolicy.machine.layout import HCR_GUEST, MAIR_EL1, RAM_FRAME0, TCR_EL1
from spepolicy.machine.rows import context, regime_row
from spepolicy.machine.scenario import Cpu, Guest, Scenario, Workload
from spepolicy.machine.spu import complete
from spepolicy.machine.state import Machine
from spepolicy.mmu.memory import KEY, SLOT_SHIFT
from spepolicy.mmu.regime import SCTLR_M, SECOND, UPPER, set_stage1, set_stage2
from spepolicy.mmu.tables import TABLE_DESCRIPTOR, kvm_vtcr
from spepolicy.mmu.walker import AF, OA_MASK, S1_READ_ONLY, S2_READ, S2_WRITE, USER_ACCESS, VALID

NOWHERE = 0x5000_0000_0000  # a physical page without content
IPS_36 = TCR_EL1 & ~(7 << 32) | 1 << 32


@entry
def write_record(m: Any) -> bool:
    """Complete the operation in flight of lane 0, vCPU 0."""
    return complete(m, 0, 0, 1000)


@entry
def decode(m: Any, ttbr1: int, tcr: int, vttbr: int, vtcr: int, updates: int) -> None:
    set_stage1(regime_row(m, 0, UPPER), 1, ttbr1, tcr, MAIR_EL1, SCTLR_M, HCR_GUEST, updates)
    set_stage2(regime_row(m, 0, SECOND), vttbr, vtcr, HCR_GUEST, updates)


def workload() -> Workload:
    """Return the program of `smallest_machine`, whose outcomes are all one operation."""
    m = smallest_machine()
    one = np.ones(1, dtype=np.int64)
    return Workload(
        function_names=("none",),
        distribution_names=("none",),
        op_ps=one,
        alias_threshold=m.alias_threshold,
        alias_outcome=m.alias_outcome,
        weight=np.ones((1, 1)),
        outcome_function=0 * one,
        outcome_type=0 * one,
        outcome_events=0 * one,
        outcome_latency_cycles=one,
        outcome_spread_cycles=one,
        phase_user=0 * one,
        phase_kernel=0 * one,
        phase_ps=one,
        syscall_gap_ps=one,
        syscall_ps=one,
    )


class Lane:
    """One lane whose SPU is about to write a record to the first page of its buffer, and its tables."""

    def __init__(self, **cpu: Any) -> None:
        guest = Guest(ram_pages=4096, buffer_pages=16)
        scenario = Scenario(workload=workload(), guest=guest, cpu=replace(Cpu(), **cpu))
        self.m: Machine = allocate(scenario, Behaviour(), 1)
        self.handle = context(self.m)
        reset(self.m, scenario, [0])
        start_lanes(self.handle, np.zeros(1, dtype=np.int64))
        self.v = self.m.vcpu[0, 0]
        self.va = int(self.v["buffer_va"])
        held = self.m.frames[0][self.m.frames[0] & KEY != 0]
        self.slots = {int((word & KEY) - 1): int(word >> SLOT_SHIFT) for word in held}

    def entry2(self, ipa: int, level: int) -> tuple[int, int]:
        """Return (slot, entry) of the stage 2 descriptor of *level* for *ipa*."""
        where = int(self.m.vm["vttbr"][0]) + (ipa >> 30) * 8
        for above in range(1, level):
            descriptor = self.m.pool[0, self.slots[where >> 12], (where & 0xFFF) >> 3]
            where = int(descriptor & OA_MASK) + (ipa >> 12 + 9 * (2 - above) & 511) * 8
        return self.slots[where >> 12], (where & 0xFFF) >> 3

    def entry1(self, level: int) -> tuple[int, int]:
        """Return (slot, entry) of the stage 1 descriptor of *level* for the buffer."""
        table = self.table1(level)
        return self.slots[RAM_FRAME0 + (table >> 12) - 0x40000], self.va >> 12 + 9 * (3 - level) & 511

    def table1(self, level: int) -> int:
        """Return the IPA of the stage 1 table of *level* for the buffer."""
        table = int(self.m.vm["ttbr1"][0])
        for above in range(level):
            slot = self.slots[RAM_FRAME0 + (table >> 12) - 0x40000]
            table = int(self.m.pool[0, slot, self.va >> 12 + 9 * (3 - above) & 511] & OA_MASK)
        return table

    def ipa(self) -> int:
        return int(self.m.pool[0][self.entry1(3)] & OA_MASK)

    def change(self, where: tuple[int, int], clear: int = 0, set: int = 0) -> None:
        self.m.pool[0][where] = (self.m.pool[0][where] & ~clear) | set

    def registers(self, tcr: int = TCR_EL1, vtcr: int = kvm_vtcr(40), updates: int = 1) -> None:
        vm = self.m.vm[0]
        self.m.regime[0] = 0
        decode(self.handle, vm["ttbr1"], tcr, vm["vttbr"], vtcr, updates)

    def write(self, offset: int = 0) -> tuple[int, int]:
        """Write a record at *offset* in the buffer. Return (PMBSR_EL1, PMBPTR_EL1 relative to the buffer)."""
        self.v["pmbptr"] = self.va + offset
        self.v["pmblimitr"] = (self.va + (16 << 12)) | PMBLIMITR_E
        self.v["pmbsr"], self.v["flight"], self.v["tlb_page"] = 0, 1, -1
        write_record(self.handle)
        return int(self.v["pmbsr"]), int(self.v["pmbptr"]) - self.va


def stage1(code: int) -> int:
    return PMBSR_S | EC_STAGE1 << PMBSR_EC_SHIFT | code


def stage2(code: int) -> int:
    return PMBSR_S | EC_STAGE2 << PMBSR_EC_SHIFT | code


CASES: dict[str, tuple[Callable[[Lane], None], int]] = {
    **{
        f"stage 1 invalid at level {level}": (
            lambda lane, level=level: lane.change(lane.entry1(level), clear=VALID),
            stage1(0x04 + level),
        )
        for level in range(4)
    },
    "stage 1 block at level 0": (lambda lane: lane.change(lane.entry1(0), clear=2), stage1(0x04)),
    "stage 1 reserved at level 3": (lambda lane: lane.change(lane.entry1(3), clear=2), stage1(0x07)),
    "stage 1 block without AF": (lambda lane: lane.change(lane.entry1(2), clear=2 | AF), stage1(0x0A)),
    "stage 1 access flag": (lambda lane: lane.change(lane.entry1(3), clear=AF), stage1(0x0B)),
    "stage 1 read-only": (lambda lane: lane.change(lane.entry1(3), set=S1_READ_ONLY), stage1(0x0F)),
    "stage 1 read-only by a table": (lambda lane: lane.change(lane.entry1(1), set=1 << 62), stage1(0x0F)),
    "stage 1 output beyond IPS": (
        lambda lane: (lane.registers(tcr=IPS_36), lane.change(lane.entry1(3), set=1 << 40)),
        stage1(0x03),
    ),
    "stage 1 table beyond IPS": (
        lambda lane: (lane.registers(tcr=IPS_36), lane.change(lane.entry1(1), set=1 << 40)),
        stage1(0x01),
    ),
    "TTBR1_EL1 beyond IPS": (
        lambda lane: (lane.m.vm["ttbr1"].__setitem__(0, 1 << 40), lane.registers(tcr=IPS_36)),
        stage1(0x00),
    ),
    "EPD1": (lambda lane: lane.registers(tcr=TCR_EL1 | 1 << 23), stage1(0x04)),
    "VA beyond T1SZ": (lambda lane: lane.registers(tcr=TCR_EL1 + (9 << 16)), stage1(0x04)),
    "stage 2 invalid at level 3": (lambda lane: lane.change(lane.entry2(lane.ipa(), 3), clear=VALID), stage2(0x07)),
    "stage 2 of a stage 1 table invalid at level 1": (
        lambda lane: lane.change(lane.entry2(lane.table1(0), 1), clear=VALID),
        stage2(0x05),
    ),
    "stage 2 of a stage 1 table invalid at level 2": (
        lambda lane: lane.change(lane.entry2(lane.table1(2), 2), clear=VALID),
        stage2(0x06),
    ),
    **{
        f"stage 2 of the stage 1 table of level {level} unmapped": (
            lambda lane, level=level: lane.change(lane.entry2(lane.table1(level), 3), clear=VALID),
            stage2(0x07),
        )
        for level in range(4)
    },
    "stage 2 access flag, no flag updates": (
        lambda lane: (lane.registers(updates=0), lane.change(lane.entry2(lane.ipa(), 3), clear=AF)),
        stage2(0x0B),
    ),
    "stage 2 access flag, no HA": (
        lambda lane: (
            lane.registers(vtcr=kvm_vtcr(40) & ~(1 << 21)),
            lane.change(lane.entry2(lane.ipa(), 3), clear=AF),
        ),
        stage2(0x0B),
    ),
    "stage 2 access flag of a stage 1 table": (
        lambda lane: (lane.registers(updates=0), lane.change(lane.entry2(lane.table1(3), 3), clear=AF)),
        stage2(0x0B),
    ),
    "stage 2 read-only": (lambda lane: lane.change(lane.entry2(lane.ipa(), 3), clear=S2_WRITE), stage2(0x0F)),
    "stage 2 of a stage 1 table unreadable": (
        lambda lane: lane.change(lane.entry2(lane.table1(3), 3), clear=S2_READ),
        stage2(0x0F),
    ),
    "stage 1 table in Device memory, PTW": (
        lambda lane: lane.change(lane.entry2(lane.table1(3), 3), clear=0xF << 2),
        stage2(0x0F),
    ),
    "IPA beyond T0SZ": (lambda lane: lane.change(lane.entry1(3), set=1 << 41), stage2(0x04)),
    "stage 2 output beyond PS": (
        lambda lane: (
            lane.registers(vtcr=kvm_vtcr(40) & ~(7 << 16) | 4 << 16),
            lane.change(lane.entry2(lane.ipa(), 3), set=1 << 45),
        ),
        stage2(0x03),
    ),
    "stage 2 table nowhere": (
        lambda lane: lane.m.pool[0].__setitem__(lane.entry2(lane.ipa(), 2), NOWHERE | TABLE_DESCRIPTOR),
        stage2(0x17),
    ),
    "stage 1 table nowhere": (
        lambda lane: lane.change(lane.entry2(lane.table1(2), 3), clear=OA_MASK, set=NOWHERE),
        stage1(0x16),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_gives_exactly_its_stage_and_code(name: str) -> None:
    spoil, expected = CASES[name]
    lane = Lane()
    spoil(lane)
    before = lane.m.truth[0, 0]["written"]
    assert lane.write() == (expected, 0)
    assert lane.m.truth[0, 0]["written"] == before


def test_a_whole_table_faults_nothing() -> None:
    """What the cases above spoil works otherwise; and PAN and EL0's access do not matter to the SPU (rule 30)."""
    lane = Lane()
    lane.registers()
    assert lane.write() == (0, 64)
    lane.change(lane.entry1(3), set=USER_ACCESS)
    assert lane.write() == (0, 64)


def test_hardware_sets_the_access_flag_only_if_the_spu_can() -> None:
    lane = Lane(hardware_access_flag=True)
    lane.change(lane.entry2(lane.ipa(), 3), clear=AF)
    assert lane.write() == (0, 64)
    assert lane.m.pool[0][lane.entry2(lane.ipa(), 3)] & AF
    lane = Lane(hardware_access_flag=False)
    lane.change(lane.entry2(lane.ipa(), 3), clear=AF)
    assert lane.write() == (stage2(0x0B), 0)


def test_a_fault_in_the_middle_of_a_record_lost_data() -> None:
    lane = Lane()
    second = int(lane.m.pool[0][lane.entry1(3)[0], lane.entry1(3)[1] + 1] & OA_MASK)
    lane.change(lane.entry2(second, 3), clear=VALID)
    assert lane.write(4096 - 32) == (stage2(0x07) | PMBSR_DL, 4096)
    assert lane.write(4096) == (stage2(0x07), 4096)
