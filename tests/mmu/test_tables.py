"""Stage 2 as KVM builds it and stage 1 as the guest builds it, read back by the walker."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Cpu

from ..machine.interpreted import module
from ..machine.spu_bench import PAGE, Bench

VTCR = {32: 0x802D_3520, 36: 0x802D_355C, 40: 0x802D_3558, 42: 0x802D_3556, 48: 0x802D_3590}  # mmu reference, 6.5
ROOTS = {32: 4, 36: 1, 40: 2, 42: 8, 48: 1}
START = {32: 2, 36: 1, 40: 1, 42: 1, 48: 0}
TRANSLATION, PERMISSION = 0x04, 0x0C


class Stage2:
    """A stage 2 of KVM's for one IPA size, with room for a few tables."""

    def __init__(self, ipa_bits: int = 40, tables: int = 64) -> None:
        self.bits = ipa_bits
        self.vm = SimpleNamespace(vtcr=VTCR[ipa_bits], vttbr=(1 << 30) << 12, pool_used=0, pool_free=-1)
        self.frames = np.zeros(2 * tables, dtype=np.int64)
        self.pool = np.full((tables, 512), -1, dtype=np.int64)  # garbage: tables are zeroed when they are handed out
        self.refs = np.zeros(tables, dtype=np.int32)
        self.tables, self.walker = module("mmu.tables"), module("mmu.walker")
        for _ in range(ROOTS[ipa_bits]):
            self.tables.new_table(self.vm, self.frames, self.pool)

    @property
    def row(self) -> Any:
        """What the walker sees of VTCR_EL2 and VTTBR_EL2."""
        return module("jit").row(self.regime, module("mmu.regime").SECOND)

    @property
    def regime(self) -> Any:
        """Stage 2 of these tables; stage 1 is off."""
        regime = module("mmu.regime")
        stages = np.zeros(3, dtype=regime.STAGE)
        second = module("jit").row(stages, regime.SECOND)
        regime.set_stage2(second, self.vm.vttbr, self.vm.vtcr, regime.HCR_VM, 1)
        return stages

    def map(self, ipa: int, frame: int, writable: int = 1) -> int:
        return int(self.tables.map_stage2(self.vm, self.frames, self.pool, self.refs, self.row, ipa, frame, writable))

    def unmap(self, ipa: int) -> int:
        return int(self.tables.unmap_stage2(self.vm, self.frames, self.pool, self.refs, self.row, ipa))

    def walk(self, ipa: int, write: int = 1) -> tuple[int, int]:
        """Return (FSC or 0, PA)."""
        access = self.walker.WRITE if write else 0
        nothing = np.zeros(0, dtype=np.int64)
        w = module("jit").row(np.zeros(1, dtype=self.walker.STATE), 0)
        self.walker.translate(self.frames, self.pool, nothing, self.regime, w, ipa, access)
        assert w.status == 0 or w.status & ~0x3F == self.walker.STAGE2
        return int(w.status) & 0x3F, int(w.pa) if w.status == 0 else 0

    def tables_in_use(self) -> int:
        free, slot = 0, int(self.vm.pool_free)
        while slot >= 0:
            free, slot = free + 1, int(self.pool[slot, 0])
        return self.vm.pool_used - free


@st.composite
def edits(draw: st.DrawFn) -> tuple[int, list[tuple[str, int, int, int]]]:
    """An IPA size, and operations on few pages in few regions, so that tables fill and empty again."""
    bits = draw(st.sampled_from([36, 40, 42]))
    regions = draw(st.lists(st.integers(0, (1 << (bits - 21)) - 1), min_size=1, max_size=3))
    page = st.tuples(st.sampled_from(regions), st.sampled_from([0, 1, 511])).map(lambda t: (t[0] << 9) + t[1])
    operation = st.tuples(st.sampled_from(["map", "unmap"]), page, st.integers(0, (1 << 30) - 1), st.integers(0, 1))
    return bits, draw(st.lists(operation, max_size=40))


@given(sequence=edits())
@settings(deadline=None)
def test_what_is_mapped_is_found_and_what_is_unmapped_is_not(
    sequence: tuple[int, list[tuple[str, int, int, int]]],
) -> None:
    """After any edits: translations, permissions, fault levels and the number of tables are a model's."""
    bits, operations = sequence
    stage2 = Stage2(bits)
    model: dict[int, tuple[int, int]] = {}
    touched = set()
    for what, page, frame, writable in operations:
        touched.add(page)
        if what == "map":
            before = model.get(page)
            answer = 1 if before is None else (0 if before == (frame, writable) else 2)
            assert stage2.map(page << 12, frame, writable) == answer
            model[page] = (frame, writable)
        else:
            assert stage2.unmap(page << 12) == int(model.pop(page, None) is not None)
    start = START[bits]
    for page in touched:
        if page in model:
            frame, writable = model[page]
            assert stage2.walk((page << 12) + 0x123, write=0) == (0, (frame << 12) + 0x123)
            assert stage2.walk(page << 12)[0] == (0 if writable else PERMISSION | 3)
        else:
            # KVM frees a table with its last entry, so a fault names the highest level that has nothing below.
            level = start
            while level < 3 and any(other >> 9 * (3 - level) == page >> 9 * (3 - level) for other in model):
                level += 1
            assert stage2.walk(page << 12) == (TRANSLATION | level, 0)
    needed = ROOTS[bits] + sum(len({page >> 9 * (3 - level) for page in model}) for level in range(start, 3))
    assert stage2.tables_in_use() == needed


@pytest.mark.parametrize("bits", [bits for bits in VTCR if bits < 48])
def test_an_address_beyond_the_input_size_is_a_level_0_translation_fault(bits: int) -> None:
    """Not an address size fault (spe.md 6.3). Stage 1 stops what is beyond 48 bits."""
    stage2 = Stage2(bits)
    last = (1 << bits) - PAGE
    stage2.map(last, 7)
    assert stage2.walk(last) == (0, 7 << 12)
    for ipa in (1 << bits, 1 << 47):
        assert stage2.walk(ipa)[0] == TRANSLATION


def test_a_leaf_that_points_beyond_ps_is_an_address_size_fault() -> None:
    stage2 = Stage2(40)
    stage2.vm.vtcr = (VTCR[40] & ~(7 << 16)) | 4 << 16  # PS: 44 bits
    stage2.map(0, 1 << 32)
    stage2.map(PAGE, (1 << 32) - 1)
    assert stage2.walk(PAGE)[0] == 0
    assert stage2.walk(0)[0] == 3


def test_a_block_is_translated_and_not_valid_at_level_3() -> None:
    stage2 = Stage2(40)
    stage2.map(0x4000_0000, 1)
    slot = int(stage2.tables.middle_table(stage2.frames, stage2.pool, stage2.row, 0x4000_0000))
    leaf = int(stage2.pool[slot, 0])
    stage2.pool[slot, 3] = (0x8060_0000 | leaf & 0xFFF | stage2.tables.S2_LEAF | stage2.walker.S2_WRITE) & ~2
    assert stage2.walk(0x4000_0000 + (3 << 21) + 0x1_2345) == (0, 0x8060_0000 + 0x1_2345)
    _, entry = stage2.tables.stage2_leaf(stage2.frames, stage2.pool, stage2.row, 0x4000_0000)
    table = ((leaf & 0xFFFF_FFFF_F000) >> 12) - (1 << 30)
    stage2.pool[table, entry] &= ~2
    assert stage2.walk(0x4000_0000)[0] == TRANSLATION | 3


def test_a_walk_of_stage_2_says_the_level_at_which_it_ends() -> None:
    stage2 = Stage2(40)
    leaf = stage2.tables.stage2_leaf
    assert leaf(stage2.frames, stage2.pool, stage2.row, 0) == (-1, 1)
    stage2.map(0, 9)
    for ipa, expected in ((1 << 21, (-1, 2)), (1 << 30, (-1, 1))):
        assert leaf(stage2.frames, stage2.pool, stage2.row, ipa) == expected
    slot, entry = leaf(stage2.frames, stage2.pool, stage2.row, 5 * PAGE)
    assert (slot > 0, entry) == (True, 5), "a table of level 3, with an entry for the page, valid or not"


def test_a_page_of_a_block_is_shown_as_the_page_that_it_would_be() -> None:
    """KVM asks whether a page is mapped writable, and how is not its business."""
    stage2, ipa = Stage2(40), 0x4020_0000
    tables, vm = stage2.tables, stage2.vm
    tables.map_stage2_block(vm, stage2.frames, stage2.pool, stage2.refs, stage2.row, ipa, 0x8_0200, 1)
    stage2.map(ipa + (1 << 21) + 7 * PAGE, 77)
    middle = tables.middle_table(stage2.frames, stage2.pool, stage2.row, ipa)
    page = tables.S2_LEAF | stage2.walker.S2_WRITE
    for n in (0, 1, 300, 511):
        found = tables.leaf_descriptor(stage2.pool, middle, ipa + n * PAGE)
        assert int(found) == (0x8_0200 + n) << 12 | page
    assert int(tables.leaf_descriptor(stage2.pool, middle, ipa + (1 << 21) + 7 * PAGE)) == 77 << 12 | page
    for nothing in (ipa + (1 << 21) + 8 * PAGE, ipa + (2 << 21)):
        assert tables.leaf_descriptor(stage2.pool, middle, nothing) == 0


def test_a_table_outside_memory_is_an_external_abort_on_the_walk() -> None:
    stage2 = Stage2(40)
    stage2.map(0, 1)
    stage2.pool[0, 0] = 0x1234_5000 | 3
    assert stage2.walk(0)[0] == 0x14 | 2


def test_mapping_a_block_says_what_was_there_and_frees_the_table_below() -> None:
    """0: the same, 1: nothing, 2: something else (which needs a TLBI)."""
    stage2 = Stage2(40)
    ipa = 0x4000_0000

    def block(frame: int, writable: int) -> int:
        tables, vm = stage2.tables, stage2.vm
        return int(
            tables.map_stage2_block(vm, stage2.frames, stage2.pool, stage2.refs, stage2.row, ipa, frame, writable)
        )

    assert [block(0x8_0000, 1), block(0x8_0000, 1), block(0x8_0000, 0), block(0x8_0200, 0)] == [1, 0, 2, 2]
    assert stage2.walk(ipa + 0x12_3456, 0) == (0, (0x8_0200 << 12) + 0x12_3456)
    used = stage2.tables_in_use()
    assert stage2.map(ipa + 5 * PAGE, 77) == 3, "the rest of the block is gone"
    assert stage2.walk(ipa, 0)[0] == TRANSLATION | 3
    assert stage2.tables_in_use() == used + 1
    assert block(0x8_0000, 1) == 2
    assert stage2.tables_in_use() == used, "its table is free again"
    assert stage2.walk(ipa + 5 * PAGE) == (0, (0x8_0005 << 12))
    assert stage2.unmap(ipa) == 512
    assert stage2.walk(ipa)[0] & ~3 == TRANSLATION


# ---- both stages -----------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 3), offset=st.integers(0, PAGE - 1))
@settings(deadline=None)
def test_the_buffer_reaches_the_page_that_the_vmm_shows(n: int, offset: int) -> None:
    bench = Bench(virtualized=True)
    status, pa, ipa, reads = bench.translate(bench.start + n * PAGE + offset)
    page = bench.buffer_page(n)
    assert status == 0
    assert ipa == ((int(bench.par.ram_page0) + page) << 12) + offset
    assert pa == ((int(bench.m.host_page[0, page]) & 0xFFFF_FFFF) << 12) + offset
    # Four stage 1 descriptors, each behind three of stage 2, and three for the page itself.
    assert reads == 4 * (3 + 1) + 3
    assert Bench().translate(Bench().start)[3] == 4


def test_the_pages_of_the_buffer_are_scattered_and_its_addresses_are_not() -> None:
    """Contiguous VA, IPA pages in no order, as vmap leaves them."""
    pages = [Bench(buffer_pages=64).buffer_page(n) for n in range(64)]
    assert len(set(pages)) == 64
    assert sum(b == a + 1 for a, b in itertools.pairwise(pages)) < 16


def _table_pages(bench: Bench) -> list[int]:
    """Guest pages that hold the stage 1 tables of the buffer, by level."""
    pages, address = [], int(bench.vm.ttbr1)
    for level in range(4):
        page = (address >> 12) - int(bench.par.ram_page0)
        pages.append(page)
        frame = int(bench.m.host_page[0, page]) & 0xFFFF_FFFF
        slot = bench.slot_of(frame)
        address = int(bench.m.pool[0, slot, (bench.start >> (12 + 9 * (3 - level))) & 511]) & 0xFFFF_FFFF_F000
    return pages


@pytest.mark.parametrize("level", range(4))
def test_a_stage_2_fault_on_a_stage_1_table_is_marked_as_a_walk(level: int) -> None:
    """PMBSR has no such bit. The level is that of stage 2, the IPA that of the descriptor."""
    bench = Bench(virtualized=True)
    page = _table_pages(bench)[level]
    bench.edit_stage2(page, lambda descriptor: 0)
    status, _, ipa, _ = bench.translate(bench.start)
    walker = module("mmu.walker")
    assert status == walker.STAGE2 | walker.WALK | TRANSLATION | 3
    assert ipa >> 12 == int(bench.par.ram_page0) + page


@pytest.mark.parametrize("level", range(4))
def test_stage_1_faults_name_their_level(level: int) -> None:
    walker: Any = module("mmu.walker")
    bench = Bench(virtualized=True)
    frame = int(bench.m.host_page[0, _table_pages(bench)[level]]) & 0xFFFF_FFFF
    slot = bench.slot_of(frame)
    bench.m.pool[0, slot, (bench.start >> (12 + 9 * (3 - level))) & 511] = 0
    assert bench.translate(bench.start)[0] == walker.STAGE1 | TRANSLATION | level


def test_an_address_that_is_not_the_kernels_is_a_level_0_translation_fault() -> None:
    walker = module("mmu.walker")
    for va in (0, 0x1000, 1 << 47, -(1 << 50)):
        assert Bench(virtualized=True).translate(va)[0] == walker.STAGE1 | TRANSLATION


def test_a_stage_1_fault_comes_before_a_stage_2_fault() -> None:
    """Priority: the page's own stage 2 is looked at only when stage 1 has an address."""
    walker = module("mmu.walker")
    bench = Bench(virtualized=True)
    bench.edit_stage2(bench.buffer_page(0), lambda descriptor: 0)
    bench.edit_stage1(0, lambda descriptor: descriptor | 1 << 7)
    assert bench.translate(bench.start)[0] == walker.STAGE1 | PERMISSION | 3
    assert bench.translate(bench.start, write=0)[0] == walker.STAGE2 | TRANSLATION | 3


# ---- the SPU's TLB ---------------------------------------------------------------------------------------------------


def _written_to(bench: Bench, n: int) -> None:
    """Let the SPU write a record to buffer page *n*, so that its TLB holds the page."""
    bench.v.pmbptr = bench.start + n * PAGE
    assert bench.write_records(1) == 1


def test_an_edit_without_tlbi_is_not_seen() -> None:
    """Stage 2 entry gone, or the guest's own: the unit goes on with what it holds, as hardware may."""
    for edit in (
        lambda bench: bench.edit_stage2(bench.buffer_page(0), lambda descriptor: 0),
        lambda bench: bench.edit_stage1(0, lambda descriptor: 0),
    ):
        bench = Bench(virtualized=True)
        _written_to(bench, 0)
        walks = int(bench.tr.walks)
        edit(bench)
        assert bench.write_records(10) == 10
        assert bench.tr.walks == walks


def test_kvms_unmap_invalidates() -> None:
    bench = Bench(virtualized=True)
    _written_to(bench, 0)
    bench.call("host.operate_on_page", int(HostOp.MPROTECT), bench.buffer_page(0))
    assert bench.write_records(1) == 0
    assert bench.syndrome["EC"] == 0x25


def test_an_entry_that_was_evicted_is_walked_again() -> None:
    """Direct mapped: a page that shares the entry evicts it, and then the edit is seen."""
    bench = Bench(virtualized=True, cpu=Cpu(tlb_entries=2))
    _written_to(bench, 0)
    bench.edit_stage2(bench.buffer_page(0), lambda descriptor: 0)
    _written_to(bench, 1)
    _written_to(bench, 0)
    _written_to(bench, 2)
    bench.v.pmbptr = bench.start
    assert bench.write_records(1) == 0
    assert bench.syndrome["EC"] == 0x25


def test_a_walk_in_software_counts_what_it_reads_to_where_it_ends() -> None:
    """KVM's walk of the guest's tables is charged by the descriptor: four, or as many as there are on the way."""
    for level in range(3):
        bench = Bench(virtualized=True)
        page = _table_pages(bench)[level]
        slot = bench.slot_of(int(bench.m.host_page[0, page]) & 0xFFFF_FFFF)
        entry = (bench.start >> (12 + 9 * (3 - level))) & 511
        va_leaf = module("machine.pagetables").va_leaf
        assert va_leaf(bench.m, 0, bench.start)[2] == 4
        bench.m.pool[0, slot, entry] &= ~1
        assert va_leaf(bench.m, 0, bench.start) == (-1, entry, level + 1), "one that is no table ends it, and is read"
        bench.m.pool[0, slot, entry] = 0x1000 | 3
        assert va_leaf(bench.m, 0, bench.start) == (-1, 0, level + 1), "a table outside the VM's memory cannot be read"


@pytest.mark.parametrize("virtualized", [False, True])
def test_a_table_may_be_the_first_page_of_memory_and_the_first_of_the_pool(virtualized: bool) -> None:
    """Page 0 and slot 0 are as good as any."""
    bench = Bench(virtualized=virtualized)
    tables = _table_pages(bench)
    shift = min(tables)
    leaf = module("machine.pagetables").va_leaf(bench.m, 0, bench.start)
    assert leaf[0] >= 0
    bench.par.ram_page0 += shift  # the lowest of them is the first page now
    words = bench.m.host_page[0].copy()
    bench.m.host_page[0] = np.roll(words, -shift)
    assert module("machine.pagetables").va_leaf(bench.m, 0, bench.start) == leaf
    if not virtualized:
        assert bench.slot_of(int(words[tables[0]]) & 0xFFFF_FFFF) == 0
        plain = Bench(virtualized=False)
        assert plain.call("misbehave.level2_entry", plain.start)[0] > 0
        assert plain.translate(plain.start)[0] == 0
