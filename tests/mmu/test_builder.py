"""Round trips over geometry: what the builder maps the walker finds, and what it unmaps faults at the right level."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spepolicy.errors import ConfigurationError
from spepolicy.mmu import Memory, Region, Tables, at, kvm_vtcr
from spepolicy.mmu.tables import S1_LEAF, S2_LEAF
from spepolicy.mmu.walker import AF, S1_READ_ONLY, S2_WRITE

TG0 = {4: 0, 64: 1, 16: 2}  # of TCR_EL1 and VTCR_EL2, by KiB
TG1 = {16: 1, 4: 2, 64: 3}
GRANULE_BITS = {4: 12, 16: 14, 64: 16}

TRANSLATION, ACCESS_FLAG, PERMISSION = 0x04, 0x08, 0x0C

# Translation tables of the host, and of the guest: their IPA and where the host backs them, out of the way of the rest.
HOST = 0x10_0000_0000
GUEST_IPA, GUEST_PA = 0x4000_0000, 0x20_0000_0000
GUEST_BYTES = 0x2000_0000


def start_level(kib: int, bits: int) -> int:
    """Return the first level that needs at most 16 concatenated tables, from the table of spe.md 6.1."""
    stride = GRANULE_BITS[kib] - 3
    for level in (3, 2, 1, 0):
        lowest = (3 - level) * stride + GRANULE_BITS[kib] + 1
        if level in ((0, 1, 2) if kib == 4 else (1, 2, 3)) and lowest <= bits <= min(lowest + stride + 3, 48):
            return level
    raise AssertionError((kib, bits))


def vtcr_of(kib: int, bits: int) -> int:
    level = start_level(kib, bits)
    sl0 = 2 - level if kib == 4 else 3 - level
    return (1 << 31) | (64 - bits) | (sl0 << 6) | (TG0[kib] << 14) | (5 << 16)


def tcr_of(kib: int, bits: int, upper: bool) -> int:
    size = 64 - bits
    epd = 1 << (7 if upper else 23)
    return size | (size << 16) | (TG0[kib] << 14) | (TG1[kib] << 30) | (5 << 32) | epd


@dataclass
class Guest:
    """An address space with both stages, empty but for the guest's tables, which stage 2 maps."""

    memory: Memory
    stage1: Tables
    stage2: Tables
    registers: dict[str, int]

    def par(self, op: str, va: int) -> int:
        return int(at(op, np.array([va & (1 << 64) - 1], dtype=np.uint64), self.registers, self.memory)[0])

    def physical(self, op: str, va: int) -> int:
        par = self.par(op, va)
        assert par & 1 == 0, hex(par)
        return par & 0xFFFF_FFFF_F000 | va & 0xFFF

    def fault(self, op: str, va: int) -> tuple[int, int, int]:
        """Return (stage, kind, level) of the fault that *op* takes."""
        par = self.par(op, va)
        assert par & 1 == 1, hex(par)
        status = par >> 1 & 0x3F
        return 2 if par & 1 << 9 else 1, status & 0x3C, status & 3


def guest(
    kib1: int = 4, bits1: int = 48, upper: bool = True, vtcr: int = kvm_vtcr(40), big_endian: bool = False
) -> Guest:
    memory = Memory()
    stage2 = Tables.stage2(memory, vtcr, Region(HOST, HOST + (1 << 32)).take)
    stage2.map(GUEST_IPA, GUEST_PA, GUEST_BYTES, S2_LEAF | S2_WRITE)
    sctlr = 1 | (1 << 25 if big_endian else 0)
    region = Region(GUEST_IPA, GUEST_IPA + GUEST_BYTES)
    tcr = tcr_of(kib1, bits1, upper)
    stage1 = Tables.stage1(memory, tcr, region.take, upper=upper, sctlr=sctlr, through=stage2)
    registers = {
        "HCR_EL2": (1 << 31) | 1,
        "VTCR_EL2": vtcr,
        "VTTBR_EL2": stage2.root,
        "TCR_EL1": tcr,
        "TTBR0_EL1": 0 if upper else stage1.root,
        "TTBR1_EL1": stage1.root if upper else 0,
        "MAIR_EL1": 0xFF,
        "SCTLR_EL1": sctlr,
        "PAN": 0,
    }
    return Guest(memory, stage1, stage2, registers)


geometry1 = st.tuples(st.sampled_from((4, 16, 64)), st.integers(25, 48), st.booleans(), st.booleans())
geometry2 = st.one_of(
    st.integers(32, 48).map(kvm_vtcr),
    st.tuples(st.sampled_from((4, 16, 64)), st.integers(32, 48)).map(lambda g: vtcr_of(*g)),
)
few = settings(max_examples=60, deadline=None)


def address_in(tables: Tables, upper: bool, number: int, align: int) -> int:
    """Return an aligned address in the upper quarter of the input range, so that it needs its highest bits."""
    top = 1 << tables.input_bits
    inside = (number % (top // 4) + top // 2) // align * align
    return inside - top if upper else inside


@few
@given(geometry1, geometry2, st.integers(0, 1 << 47), st.integers(0, 1 << 27), st.integers(0, 0xFFF))
def test_what_is_mapped_is_found(
    first: tuple[int, int, bool, bool], vtcr: int, number: int, frame: int, offset: int
) -> None:
    kib, bits, upper, big_endian = first
    g = guest(kib, bits, upper, vtcr, big_endian)
    page = max(g.stage1.granule, g.stage2.granule)
    va = address_in(g.stage1, upper, number, page)
    ipa = 0x8000_0000
    pa = 0x1_0000_0000 + frame * page % (1 << 40)
    g.stage1.map(va, ipa, page, S1_LEAF)
    g.stage2.map(ipa, pa, page, S2_LEAF | S2_WRITE)
    assert g.physical("S12E1W", va + offset) == pa + offset
    assert g.physical("S1E1W", va + offset) == ipa + offset
    assert g.stage1.output(va + offset) == ipa + offset
    assert g.stage2.output(ipa + offset) == pa + offset
    assert g.fault("S12E0R", va) == (1, PERMISSION, 3)


@few
@given(geometry1, st.integers(0, 1 << 47), st.data())
def test_what_stage_1_unmaps_faults_where_its_tables_end(
    first: tuple[int, int, bool, bool], number: int, data: st.DataObject
) -> None:
    """The tables of a page go with it, up to one that another page still needs."""
    kib, bits, upper, big_endian = first
    g = guest(kib, bits, upper, big_endian=big_endian)
    va = address_in(g.stage1, upper, number, g.stage1.granule)
    g.stage1.map(va, 0x8000_0000, g.stage1.granule, S1_LEAF)
    shared = data.draw(st.integers(g.stage1.start, 3), label="level of the last table that both pages need")
    neighbour = va ^ g.stage1.block_bytes(shared)
    if neighbour != va and (shared > g.stage1.start or g.stage1.block_bytes(shared) < 1 << bits - 1):
        g.stage1.map(neighbour, 0x8000_0000, g.stage1.granule, S1_LEAF)
        assert g.stage1.unmap(va, g.stage1.granule) == 1
        assert g.fault("S12E1R", va) == (1, TRANSLATION, shared)
        assert g.stage1.output(neighbour) == 0x8000_0000
        g.stage1.unmap(neighbour, g.stage1.granule)
    else:
        g.stage1.unmap(va, g.stage1.granule)
    assert g.fault("S12E1R", va) == (1, TRANSLATION, g.stage1.start)


@few
@given(geometry2, st.integers(0, 1 << 47))
def test_what_stage_2_unmaps_faults_where_its_tables_end(vtcr: int, number: int) -> None:
    g = guest(vtcr=vtcr)
    page = g.stage2.granule
    ipa = address_in(g.stage2, False, number, page)
    va = -(1 << 40)
    g.stage1.map(va, ipa & -4096, 4096, S1_LEAF)
    g.stage2.map(ipa, 0x1_0000_0000, page, S2_LEAF | S2_WRITE)
    assert g.physical("S12E1W", va) == 0x1_0000_0000
    g.stage2.unmap(ipa, page)
    stage, kind, level = g.fault("S12E1W", va)
    assert (stage, kind) == (2, TRANSLATION)
    assert level == g.stage2.lookup(ipa)[1] <= 3
    assert g.stage2.lookup(ipa)[0] == 0
    g.stage2.map(ipa, 0x1_0000_0000, page, S2_LEAF)
    assert g.fault("S12E1W", va) == (2, PERMISSION, 3)


@few
@given(st.sampled_from((4, 16, 64)), st.integers(0, 511), st.integers(0, 8191))
def test_a_block_splits_into_what_it_mapped(kib: int, block: int, page: int) -> None:
    g = guest(vtcr=vtcr_of(kib, 40))
    level = g.stage2.leaf_levels()[-2]
    size = g.stage2.block_bytes(level)
    ipa, pa = 0x1_0000_0000 // size * size + size, 0x80_0000_0000 + block * size
    assert g.stage2.map(ipa, pa, size, S2_LEAF | S2_WRITE) == 1
    inside = page * g.stage2.granule % size
    va = -(1 << 40)
    g.stage1.map(va, ipa + inside, 4096, S1_LEAF)
    assert g.physical("S12E1W", va) == pa + inside
    assert g.stage2.split(ipa) == level + 1
    assert g.physical("S12E1W", va) == pa + inside
    assert g.stage2.lookup(ipa + inside)[1] == level + 1
    g.stage2.protect(ipa + inside, g.stage2.granule, clear=S2_WRITE)
    assert g.fault("S12E1W", va) == (2, PERMISSION, 3)
    assert g.physical("S12E1R", va) == pa + inside
    other = (inside + g.stage2.granule) % size
    assert g.stage2.output(ipa + other) == pa + other


def test_what_is_not_mapped_is_not_split() -> None:
    g = guest()
    nowhere = 0x70_0000_0000
    descriptor, level = g.stage2.lookup(nowhere)
    used = g.memory.used
    assert (descriptor, level < 3) == (0, True)
    assert g.stage2.split(nowhere) == level
    assert (g.stage2.lookup(nowhere), g.memory.used) == ((0, level), used)


@pytest.mark.parametrize("kib", [4, 16, 64])
def test_a_page_taken_out_of_a_block_leaves_the_rest(kib: int) -> None:
    g = guest(kib)
    size = g.stage1.block_bytes(2)
    va = -size
    assert g.stage1.map(va, 4 * size, size, S1_LEAF) == 1
    assert g.stage1.unmap(va + g.stage1.granule, g.stage1.granule) == 1
    assert g.fault("S1E1R", va + g.stage1.granule) == (1, TRANSLATION, 3)
    assert g.physical("S1E1R", va) == 4 * size
    assert g.stage1.unmap(va, size) == (1 << g.stage1.granule.bit_length() - 4) - 1
    assert g.fault("S1E1R", va) == (1, TRANSLATION, g.stage1.start)


def test_a_block_replaces_the_pages_below_it_and_their_table_is_used_again() -> None:
    g = guest()
    used = g.memory.used
    g.stage2.map(0x1_0000_0000, 0x80_0000_0000, 1 << 21, S2_LEAF, blocks=False)
    assert g.memory.used > used
    used = g.memory.used
    assert g.stage2.map(0x1_0000_0000, 0x90_0000_0000, 1 << 21, S2_LEAF) == 1
    assert g.stage2.lookup(0x1_0000_0000)[1] == 2
    g.stage2.map(0x1_4000_0000, 0x80_0000_0000, 4096, S2_LEAF)
    assert g.memory.used == used + 1  # one level 2 table; the level 3 table was free


def test_ageing_and_protection_at_both_stages() -> None:
    g = guest()
    va, ipa = -(1 << 30), 0x8000_0000
    g.stage1.map(va, ipa, 1 << 14, S1_LEAF)
    g.stage2.map(ipa, 0x90_0000_0000, 1 << 14, S2_LEAF | S2_WRITE)
    g.registers["VTCR_EL2"] &= ~(1 << 21)  # without HA
    assert g.stage2.clear_access_flag(ipa, 1 << 13) == 2
    assert g.fault("S12E1R", va) == (2, ACCESS_FLAG, 3)
    g.stage2.protect(ipa, 1 << 14, set=AF)
    g.stage1.clear_access_flag(va, 4096)
    assert g.fault("S12E1R", va) == (1, ACCESS_FLAG, 3)
    g.stage1.protect(va, 1 << 14, set=AF | S1_READ_ONLY)
    assert g.fault("S12E1W", va) == (1, PERMISSION, 3)
    assert g.physical("S12E1R", va) == 0x90_0000_0000


# mmu.md 6.5: VTCR_EL2 with PS=5, 16-bit VMID and HA; start level; root tables.
KVM_LAYOUTS = {
    32: (0x802D_3520, 2, 4),
    34: (0x802D_351E, 2, 16),
    36: (0x802D_355C, 1, 1),
    40: (0x802D_3558, 1, 2),
    42: (0x802D_3556, 1, 8),
    43: (0x802D_3555, 1, 16),
    44: (0x802D_3594, 0, 1),
    48: (0x802D_3590, 0, 1),
}


@pytest.mark.parametrize("bits", KVM_LAYOUTS)
def test_kvm_layouts_are_those_of_the_reference(bits: int) -> None:
    vtcr, start, roots = KVM_LAYOUTS[bits]
    assert kvm_vtcr(bits) == vtcr
    sizes: list[int] = []

    def take(size: int) -> int:
        sizes.append(size)
        return HOST

    tables = Tables.stage2(Memory(), vtcr, take)
    assert tables.start == start
    assert max(sizes[0], 4096) == roots * 4096


@pytest.mark.parametrize("bits", range(32, 49))
def test_every_kvm_layout_reaches_its_last_page_and_not_further(bits: int) -> None:
    g = guest(vtcr=kvm_vtcr(bits))
    last = (1 << bits) - 4096
    g.stage2.map(last, 0x90_0000_0000, 4096, S2_LEAF)
    g.stage1.map(-8192, last, 4096, S1_LEAF)
    assert g.physical("S12E1R", -8192) == 0x90_0000_0000
    if bits < 48:
        g.stage1.map(-4096, 1 << bits, 4096, S1_LEAF)
        assert g.fault("S12E1R", -4096) == (2, TRANSLATION, 0)


def test_a_table_that_stage_2_lost_is_a_stage_2_fault_on_the_walk() -> None:
    g = guest()
    va = -(1 << 30)
    g.stage1.map(va, 0x8000_0000, 4096, S1_LEAF)
    leaf_table = g.stage1._find(va, 3)[0]
    g.stage2.unmap(leaf_table & -4096, 4096)
    par = g.par("S12E1R", va)
    assert par & 1 << 8
    assert g.fault("S12E1R", va) == (2, TRANSLATION, 3)


def test_registers_that_translate_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="TxSZ, SL0"):
        Tables.stage2(Memory(), (1 << 31) | 16, Region(HOST, HOST * 2).take)
    with pytest.raises(ConfigurationError, match="32 to 48"):
        kvm_vtcr(31)


def test_a_range_of_half_pages_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="multiples of 4096"):
        guest().stage2.map(0x8000_0800, 0, 4096, S2_LEAF)
