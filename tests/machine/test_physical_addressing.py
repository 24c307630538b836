"""FEAT_SPE_nVM on a bench: PMBLIMITR_EL1.nVM takes stage 1 out of the SPU's way, and leaves stage 2 in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spepolicy.arch.registers import PMBLIMITR_NVM
from spepolicy.machine.scenario import Cpu

from .interpreted import module
from .spu_bench import PAGE, Bench

ONE = np.zeros(1, dtype=np.int64)
CPU = Cpu(max_record_bytes=64, align_bytes=64, features=("nVM",))
ADDRESS_SIZE, TRANSLATION = 0x00, 0x04


def physical(**more: Any) -> Bench:
    """A bench whose registers hold the physical address of its ring, as a driver that knows nVM programs them."""
    bench = Bench(**({"cpu": CPU, "guest": {"physical_buffer": True}, "virtualized": True, "physical": True} | more))
    bench.start = int(bench.v.buffer_base)
    bench.limit = bench.start + 4 * PAGE
    bench.v.pmbptr, bench.v.pmblimitr = bench.start, bench.limit | PMBLIMITR_NVM | 1
    return bench


def virtual_page(bench: Bench, n: int) -> int:
    return int(bench.v.buffer_va) + n * PAGE


@pytest.mark.parametrize("virtualized", [True, False])
def test_rule_50_stage_1_is_off_for_the_spu_only(virtualized: bool) -> None:
    """Whatever the guest's tables say of the ring, records go where the registers say; AT and the CPU still see VAs."""
    bench = physical(virtualized=virtualized)
    for n in range(4):
        slot, entry = bench.stage1_leaf(virtual_page(bench, n))
        assert bench.translate(virtual_page(bench, n))[0] == 0
        bench.m.pool[0, slot, entry] = 0
    assert bench.write_records(10**6) == 4 * PAGE // 64
    assert bench.syndrome["EC"] == 0, "buffer full, no fault"
    assert bench.tr.walk_reads == (4 * 3 if virtualized else 0), "stage 2 alone: three levels of a 40-bit IPA"
    assert bench.translate(virtual_page(bench, 0))[0] != 0
    assert bench.tr.stray_records == bench.tr.written, "the guest will not find them behind its VAs"


def test_rule_50_stage_2_applies_as_ever() -> None:
    bench = physical()
    bench.edit_stage2((bench.start >> 12) - int(bench.par.ram_page0) + 1, lambda d: 0)
    assert bench.write_records(10**6) == PAGE // 64
    assert bench.syndrome["EC"] == 0x25
    assert bench.syndrome["MSS"] == TRANSLATION | 3
    assert bench.v.pmbptr == bench.start + PAGE


@pytest.mark.parametrize(("bit", "kind"), [(47, 0x25), (48, 0x24), (63, 0x24)])
def test_rule_50_an_address_beyond_the_implemented_size_is_a_stage_1_fault(bit: int, kind: int) -> None:
    """48 bits of PA are implemented; one that fits them and is beyond the VM's 40 bits faults at stage 2."""
    bench = physical()
    base = (1 << bit) - (1 << 64 if bit == 63 else 0)
    bench.v.pmbptr, bench.v.pmblimitr = base, (base + 4 * PAGE) | PMBLIMITR_NVM | 1
    assert bench.write_records(1) == 0
    assert bench.syndrome["EC"] == kind
    assert bench.syndrome["MSS"] == (TRANSLATION if kind == 0x25 else ADDRESS_SIZE)


def test_rule_50_the_guest_is_offered_it_only_where_the_host_allows_it() -> None:
    """PMBIDR_EL1.AddrMode: without PMSCR_EL2.EnVM, without FEAT_SPE_nVM, or with another owner the driver uses VAs."""
    for fields in ({"physical": False}, {"cpu": Cpu()}, {"own_buffer": True, "trap_pmb": True},
                   {"guest": {"physical_buffer": False}}):  # fmt: skip
        bench = physical(**fields)
        assert bench.par.physical == 0
        assert bench.v.buffer_base == bench.v.buffer_va
    assert physical(virtualized=False, physical=False).par.physical == 1, "effective 1 where EL2 is the owner"


def test_a_ring_with_a_physical_address_is_contiguous_and_aligned() -> None:
    bench = physical(buffer_pages=16)
    assert bench.start % (16 * PAGE) == 0
    pages = [bench.buffer_page(n) for n in range(16)]
    assert pages == list(range(pages[0], pages[0] + 16))
    assert pages[0] == (bench.start >> 12) - int(bench.par.ram_page0)


def test_a_remapped_page_is_not_followed() -> None:
    """The guest moves the page behind a VA, with or without TLBI: the SPU does not look."""
    bench = physical()
    bench.write_records(4)
    assert bench.tr.stray_records == 0
    bench.call("misbehave.move_page", 0, 0, 0, 1)
    bench.write_records(3)
    assert bench.tr.stray_records == 3
    assert bench.v.pmbptr == bench.start + 7 * 64


def listed(bench: Bench, lo: int, hi: int) -> tuple[int, list[int]]:
    status = module("machine.walking").list_physical(bench.m, ONE, ONE, np.array([lo]), np.array([hi]))
    v = bench.v
    return int(status[0]), bench.m.pins[0, 0, 1 - int(v.pin_list), : int(v.pin_fresh)].tolist()


def test_rule_51_a_range_is_listed_without_a_walk() -> None:
    bench = physical()
    first = (bench.start >> 12) - int(bench.par.ram_page0)
    assert listed(bench, bench.start, bench.limit) == (0, [first, first + 1, first + 2, first + 3])
    assert bench.tr.hook_total_ps == 0
    assert listed(bench, bench.start, bench.start) == (0, [])
    below, above = int(bench.par.ram_page0) << 12, int(bench.par.ram_page0 + bench.par.ram_pages) << 12
    for lo, hi in ((below - PAGE, below + PAGE), (above - PAGE, above + PAGE)):
        status, pages = listed(bench, lo, hi)
        assert status != 0
        assert pages == []


def test_look_needs_no_table_on_the_way() -> None:
    walking = module("machine.walking")
    bench = physical()
    page = (bench.start >> 12) - int(bench.par.ram_page0)
    assert int(walking.look(bench.m, ONE, ONE)[0]) == 0
    bench.edit_stage2(page, lambda d: 0)
    assert int(walking.look(bench.m, ONE, ONE)[0]) == walking.LOOK_MISSING
