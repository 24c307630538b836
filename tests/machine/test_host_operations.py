"""Steps of the host's operations: what becomes of a page's word, which huge pages are split, who is notified (H1 to H9
of kvm.md 4.3; the table of effects is measured).
"""

from __future__ import annotations

import numpy as np
import pytest

from spepolicy.machine import effects as fx
from spepolicy.machine.hostops import Backing, HostOp, Kernel
from spepolicy.machine.scenario import Host

from .interpreted import module
from .spu_bench import Bench
from .test_one_page import FOLIO, FRAME, VALID, thp, word, words

CLEAR = 1


def changed(effect: int, before: int, page: int = 9) -> tuple[Bench, int, int]:
    """Apply *effect* to an ordinary page whose word has the bits *before* as well; return (bench, word, new word)."""
    bench = Bench(virtualized=True)
    old = word(bench, page) | before
    return bench, old, int(bench.call("operations.change_backing", old, effect))


@pytest.mark.parametrize("before", ["", "SHARED", "TRACKED", "LAZY_FREE", "READ_ONLY_VMA", "PIN_ONE"])
def test_what_an_effect_does_to_a_page(before: str) -> None:
    """One bit or one frame each; whatever else is known of the page stays."""
    w = words()
    was = getattr(w, before) if before else 0
    for effect, clears, sets in (
        (0, 0, 0),
        (fx.SWAP, w.PRESENT, 0),
        (fx.COPY_ON_WRITE, 0, w.SHARED),
        (fx.LOSE, w.PRESENT, w.HOLE),
        (fx.READ_ONLY, 0, w.READ_ONLY_VMA),
        (fx.WRITABLE, w.READ_ONLY_VMA, 0),
        (fx.WRITE_TRACKED, 0, w.TRACKED),
        (fx.LAZY, 0, w.LAZY_FREE),
        (fx.SPLIT | fx.COLLAPSE, 0, 0),
    ):
        _, old, new = changed(effect, was)
        assert new == (old & ~clears) | sets, effect


@pytest.mark.parametrize("pinned", [False, True])
def test_effects_that_put_another_page_there(pinned: bool) -> None:
    """A moved page keeps its content and its state; a replaced one is private, and a pin on the old one is stale."""
    w = words()
    pin = w.PIN_ONE if pinned else 0
    bits = w.SHARED | w.TRACKED | w.LAZY_FREE
    bench, old, new = changed(fx.MOVE, pin | w.SHARED)
    assert new & FRAME not in (old & FRAME, w.KSM_FRAME)
    assert new & ~FRAME == old & ~FRAME
    assert bench.vm.stale_pins == 0
    bench, old, new = changed(fx.SHARE, pin)
    assert new & FRAME == w.KSM_FRAME
    assert new & ~FRAME == old & ~FRAME | w.SHARED
    bench, old, new = changed(fx.REPLACE, pin | bits)
    assert new & FRAME != old & FRAME
    assert new & ~FRAME == old & ~FRAME & ~bits | w.PRESENT
    assert bench.vm.stale_pins == int(pinned)
    bench, old, new = changed(fx.REPLACE | fx.ZERO, pin | bits)
    assert new & ~FRAME == (old & ~FRAME & ~bits & ~w.PRESENT) | w.EMPTY
    assert bench.vm.stale_pins == int(pinned)


def test_a_table_of_the_guests_is_not_merged_replaced_or_discarded() -> None:
    exempt = module("machine.operations").exempt
    w = words()
    for role in (w.ROLE_OTHER, w.ROLE_BUFFER, w.ROLE_TABLE, w.ROLE_HOT):
        for effect in (fx.MOVE, fx.SWAP, fx.SHARE, fx.REPLACE, fx.LOSE, fx.READ_ONLY, 0):
            spared = role >= w.ROLE_TABLE and effect in (fx.SHARE, fx.REPLACE, fx.LOSE)
            assert bool(exempt(w.PRESENT | role << w.ROLE_SHIFT, effect)) == spared


def test_a_range_that_begins_at_a_table_leaves_it_where_it_is() -> None:
    """Nothing is done to what a step is not for, at the beginning of a range as anywhere in it."""
    bench = Bench(virtualized=True, guest={"vcpus": 2})
    w = words()
    roles = (bench.m.host_page[0] & w.ROLE_MASK) >> w.ROLE_SHIFT
    (table,) = [n for n in range(255) if roles[n] == w.ROLE_TABLE and roles[n + 1] < w.ROLE_TABLE][:1]
    before = word(bench, table)
    bench.call("operations.operate", int(HostOp.DONTNEED), table, table + 2)
    assert (word(bench, table), bench.stage2_leaf(table) & VALID) == (before, VALID)
    assert not bench.stage2_leaf(table + 1) & VALID


# ---- huge pages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effect", "first", "last", "huge"),
    [
        (fx.READ_ONLY, 0, FOLIO, True), (fx.READ_ONLY, 3, 9, False), (fx.MOVE, 0, FOLIO, True), (fx.MOVE, 3, 4, False),
        (fx.SWAP, 3, 4, False), (fx.LOSE, 0, 7, False), (fx.REPLACE, 3, 4, False), (fx.COPY_ON_WRITE, 3, 9, True),
        (fx.LAZY, 3, 9, True), (fx.COPY_ON_WRITE | fx.SPLIT, 0, FOLIO, False), (fx.WRITE_TRACKED, 0, FOLIO, True),
    ],
)  # fmt: skip
def test_a_huge_page_is_split_where_only_a_part_of_it_changes_place_or_rights(
    effect: int, first: int, last: int, huge: bool
) -> None:
    """One entry of the host maps 512 pages: they have one place and one set of rights, or are no huge page."""
    bench = thp()
    bench.call("operations._change_pages", first, last, effect)
    hole = words().HOLE
    kept = [bool(word(bench, n) & words().HUGE) for n in range(FOLIO) if not word(bench, n) & hole]
    assert set(kept) == {huge}
    assert all(word(bench, n) & words().HUGE for n in range(FOLIO, 2 * FOLIO)), "the other one is left alone"
    if effect == fx.MOVE and huge:
        frames = [word(bench, n) & FRAME for n in range(FOLIO)]
        assert frames == list(range(frames[0], frames[0] + FOLIO))
        assert frames[0] % FOLIO == 0


def test_a_huge_page_is_paged_out_whole() -> None:
    """One of its pages is asked for. Measured on 6.1: age and CLEAR of the folio, then all of it is swapped, split."""
    bench = thp()
    for page in (7, FOLIO + 7):
        bench.call("hostpage.age", page, page + 1, 1)
    bench.call("operations.operate", int(HostOp.PAGEOUT), 7, 8)
    w = words()
    assert not any(word(bench, n) & (w.PRESENT | w.HUGE) for n in range(FOLIO) if word(bench, n) & w.ROLE_MASK == 0)
    assert all(word(bench, n) & w.PRESENT and word(bench, n) & w.HUGE for n in range(FOLIO, 2 * FOLIO))


def test_collapsing_makes_a_huge_page_of_present_ones() -> None:
    bench = Bench(virtualized=True, host=Host(), guest={"ram_pages": 2 * FOLIO})
    w = words()
    spare = [n for n in range(FOLIO) if not word(bench, n) & w.ROLE_MASK][:2]
    bench.m.host_page[0, spare[0]] = (word(bench, spare[0]) & ~w.PRESENT) | w.EMPTY
    bench.call("operations._change_pages", 0, FOLIO, fx.COLLAPSE | fx.MOVE)
    for n in range(FOLIO):
        assert word(bench, n) & (w.HUGE | w.PRESENT | w.EMPTY) == w.HUGE | w.PRESENT
    frames = [word(bench, n) & FRAME for n in range(FOLIO)]
    assert frames == list(range(frames[0], frames[0] + FOLIO))
    assert not any(word(bench, n) & w.HUGE for n in range(FOLIO, 2 * FOLIO))


@pytest.mark.parametrize("bad", ["", "PIN_ONE", "HOLE", "SHARED", "READ_ONLY_VMA", "absent"])
def test_khugepaged_gives_up_at_a_page_that_it_cannot_move(bad: str) -> None:
    """kvm.md H3. Pinned, shared, read-only, or not there; and memory that ends before 2 MiB do."""
    bench = Bench(virtualized=True, host=Host(), guest={"ram_pages": 2 * FOLIO})
    w = words()
    if bad == "absent":
        bench.m.host_page[0, FOLIO + 77] &= ~w.PRESENT
    elif bad:
        bench.m.host_page[0, FOLIO + 77] |= getattr(w, bad)
    assert bench.call("operations._can_collapse", 0)
    assert bool(bench.call("operations._can_collapse", FOLIO)) == (not bad)
    short = Bench(virtualized=True)
    assert not short.call("operations._can_collapse", 0), "256 pages are no huge page"


# ---- who is notified -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "blocks"),
    [(100, 200, [0]), (100, 700, [0, 512]), (0, 512, []), (0, 700, [512]), (100, 512, [0]), (100, 1024, [0]),
     (512, 513, [512])],
)  # fmt: skip
def test_the_huge_pages_at_the_ends_of_a_range_are_notified_once(first: int, last: int, blocks: list[int]) -> None:
    """split_huge_pmd() at each end that is not aligned: an MMU notifier for the 2 MiB around it, once for both."""
    bench = Bench(virtualized=True, guest={"ram_pages": 1024})
    bench.vm.host_op = int(HostOp.MPROTECT)
    bench.call("operations._edges", first, last, CLEAR, 3)
    assert int(bench.m.host_calls[0, CLEAR]) == 3 * len(blocks)
    gone = [n for n in range(1024) if not bench.stage2_leaf(n) & VALID]
    assert gone == [n for block in blocks for n in range(block, block + 512)]
    assert bench.vm.notifier_calls == 3 * 512 * len(blocks)


def test_each_huge_page_of_a_range_is_notified_whole_and_small_ones_alone() -> None:
    bench = thp()
    w = words()
    bench.m.host_page[0, FOLIO:] &= ~w.HUGE
    bench.vm.host_op = int(HostOp.FORK)
    bench.call("operations._folios", 5, FOLIO + 3, CLEAR, 1)
    assert int(bench.m.host_calls[0, CLEAR]) == 1 + 3
    assert bench.vm.notifier_calls == FOLIO + 3


def test_what_is_swapped_out_or_merged_already_is_passed_over() -> None:
    for op in (HostOp.RECLAIM, HostOp.KSM):
        bench = Bench(virtualized=True, host=Host(kernel=Kernel.V6_12))
        page = bench.buffer_page(0)
        bench.call("operations.operate", int(op), page, page + 1)
        calls, after = int(bench.vm.notifier_calls), word(bench, page)
        assert calls > 0
        bench.call("operations.operate", int(op), page, page + 1)
        assert (int(bench.vm.notifier_calls), word(bench, page)) == (calls, after), op.name
    bench.call("operations.operate", int(HostOp.MUNMAP), page, page + 1)
    calls = int(bench.vm.notifier_calls)
    for op in (HostOp.RECLAIM, HostOp.MOVE, HostOp.DONTNEED):
        bench.call("operations.operate", int(op), page, page + 1)
        assert int(bench.vm.notifier_calls) == calls, "there is nothing any more"


def test_a_pinned_page_of_a_huge_page_makes_all_of_it_pinned() -> None:
    """page_maybe_dma_pinned() asks the folio."""
    bench = thp()
    row = module("machine.operations")
    op = int(HostOp.MOVE)
    assert bench.call("operations._row", op, 7) == 4
    bench.m.host_page[0, 500] += words().PIN_ONE
    assert bench.call("operations._row", op, 7) == 4 + 2
    assert bench.call("operations._row", op, FOLIO + 7) == 4
    bench.vm.locked = 1
    assert bench.call("operations._row", op, FOLIO + 7) == 4 + 1
    small = Bench(virtualized=True)
    ordinary = int(np.flatnonzero(small.m.host_page[0] >> 56 == 0)[0])
    assert small.call("operations._row", op, ordinary) == 0
    small.m.host_page[0, ordinary] |= words().LOCKED | words().PIN_ONE
    assert small.call("operations._row", op, ordinary) == 3
    assert row.why_of(op, 1) == words().WHY_RMAP
    assert row.why_of(int(HostOp.MPROTECT), 2) == 2


def test_what_is_madvised_free_goes_without_swap() -> None:
    """MADV_FREE: reclaim drops the page if it has not been written since (kvm.md H7), else it swaps it."""
    for lazy in (False, True):
        bench = Bench(virtualized=True)
        page = bench.buffer_page(0)
        bench.edit_stage2(page, lambda d: d & ~(1 << 10))
        if lazy:
            bench.m.host_page[0, page] |= words().LAZY_FREE
        bench.call("operations.operate", int(HostOp.RECLAIM), page, page + 1)
        after = word(bench, page)
        assert not after & words().PRESENT
        assert bool(after & words().EMPTY) == lazy


@pytest.mark.parametrize(
    ("first", "last", "done"), [(3, 700, range(0)), (0, 700, range(512)), (3, 1024, range(512, 1024))]
)
def test_hugetlb_is_unmapped_in_whole_huge_pages(first: int, last: int, done: range) -> None:
    """kvm.md H5: half a hugetlb page cannot be unmapped; a range is taken inwards."""
    bench = Bench(virtualized=True, host=Host(backing=Backing.HUGETLB), guest={"ram_pages": 1024})
    role = words().ROLE_MASK
    tables = {n for n in range(1024) if word(bench, n) & role >= words().ROLE_TABLE << words().ROLE_SHIFT}
    bench.call("operations.operate", int(HostOp.MUNMAP), first, last)
    gone = {n for n in range(1024) if word(bench, n) & words().HOLE}
    assert gone == set(done) - tables
