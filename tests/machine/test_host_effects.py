"""What host operations do to a page, its stage 2 entry, the pin and the SPU's TLB: as measured, and in any order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spepolicy.hookspecs import Cause
from spepolicy.machine.hostops import Backing, HostOp, Kernel, Notifier
from spepolicy.machine.scenario import Cpu, Host, HostKind
from spepolicy.recording.model import NO_NOTIFIER, Recording

from ..properties.scenarios import US, guest, scenario
from .interpreted import Lane, module
from .spu_bench import Bench

FRAME = 0xFFFF_FFFF
VALID, WRITE, AF = 1, 1 << 7, 1 << 10
DISTURBING = [op for op in HostOp if op > HostOp.CPU_TOUCH]
OPERATIONS = DISTURBING


def ordinary_page(lane: Lane) -> int:
    """Return a guest page that is neither a buffer nor a translation table."""
    return int(np.flatnonzero(lane.m.host_page[0] >> 56 == 0)[0])


def word(lane: Lane, page: int) -> int:
    return int(lane.m.host_page[0, page])


@pytest.mark.parametrize("op", DISTURBING, ids=lambda op: op.name)
@pytest.mark.parametrize("pinned", [False, True])
def test_a_filter_keeps_the_entries_of_pinned_pages_only(op: HostOp, pinned: bool) -> None:
    """An ignored notifier leaves the stage 2 entry; the host's own page changes all the same."""
    host = module("machine.host")
    everything = int(sum(Notifier))
    honoured, ignored = (
        Lane(scenario(guest=guest(ram_pages=256)), virtualized=True, notifier_filter=mask) for mask in (0, everything)
    )
    page = ordinary_page(honoured)
    for lane in (honoured, ignored):
        lane.m.host_page[0, page] += host.PIN_ONE if pinned else 0
    before = ignored.stage2_leaf(page)
    for lane in (honoured, ignored):
        lane.call("host.operate_on_page", int(op), page)
    kept = ~(host.GONE_MASK | host.NOTIFIED)
    assert word(ignored, page) & kept == word(honoured, page) & kept
    unmaps = not honoured.stage2_leaf(page) & VALID
    if pinned and unmaps:
        assert ignored.stage2_leaf(page) | AF == before | AF  # ageing is no unmap
        assert ignored.vm.notifier_ignored == 1
    else:
        assert ignored.stage2_leaf(page) == honoured.stage2_leaf(page)
        assert ignored.vm.notifier_ignored == 0


@given(
    first=st.integers(0, 255), count=st.integers(2, 256), op=st.sampled_from([HostOp.NUMA_SCAN, HostOp.MPROTECT]),
    already=st.lists(st.integers(0, 255), max_size=30), pinned=st.lists(st.integers(0, 255), max_size=30),
    mask=st.sampled_from([0, int(Notifier.PROTECTION_VMA)]),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_unmapping_a_range_is_unmapping_its_pages(
    first: int, count: int, op: HostOp, already: list[int], pinned: list[int], mask: int
) -> None:
    """The loop over whole tables leaves what the operation on each page leaves, to the bit."""
    host = module("machine.host")
    lanes = [Lane(scenario(guest=guest(ram_pages=256)), virtualized=True, notifier_filter=mask) for _ in range(2)]
    last = min(first + count, 256)
    for lane in lanes:
        for page in pinned:
            lane.m.host_page[0, page] += host.PIN_ONE
        for page in already:
            lane.call("host.operate_on_page", int(HostOp.MPROTECT), page)
    lanes[0].call("host._unmap_range", int(op), first, last)
    for page in range(first, last):
        lanes[1].call("host.operate_on_page", int(op), page)
    for name in ("host_page", "tlb", "vm"):
        assert np.array_equal(getattr(lanes[0].m, name), getattr(lanes[1].m, name)), name
    assert [lanes[0].stage2_leaf(page) for page in range(256)] == [lanes[1].stage2_leaf(page) for page in range(256)]


@given(data=st.data(), entries=st.sampled_from([1, 4, 16]), mask=st.sampled_from([0, int(Notifier.CLEAR)]))
@settings(deadline=None, max_examples=40)
def test_the_tlb_never_holds_what_stage_2_has_not(data: st.DataObject, entries: int, mask: int) -> None:
    """KVM invalidates whatever it changes: an SPU entry is always what a walk would find, and writable."""
    bench = Bench(virtualized=True, cpu=Cpu(tlb_entries=entries), notifier_filter=mask)
    pages = [bench.buffer_page(n) for n in range(4)]
    for page in pages[:2] if mask else ():
        bench.m.host_page[0, page] += module("machine.host").PIN_ONE  # what the filter keeps mapped may diverge
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["write", "operate", "map"]))
        n = data.draw(st.integers(0, 3))
        if action == "write":
            bench.v.pmbsr, bench.v.pmbptr = 0, bench.start + n * 4096
            bench.write_records(1)
        elif action == "operate":
            bench.call("host.operate_on_page", int(data.draw(st.sampled_from(DISTURBING))), pages[n])
        else:
            bench.call("host.map_page", pages[n], data.draw(st.integers(0, 1)))
        for va_page, frame, ipa_page, _ in bench.m.tlb[0, 0]:
            if va_page != -1:
                leaf = bench.stage2_leaf(int(ipa_page) - int(bench.par.ram_page0))
                assert leaf & VALID
                assert leaf & WRITE
                assert (leaf & 0xFFFF_FFFF_F000) >> 12 == frame
                assert bench.translate(int(va_page) << 12)[:2] == (0, int(frame) << 12)


def test_mapping_another_page_ends_in_a_tlbi() -> None:
    """A pinned page is replaced, its notifier ignored; the next pin maps the new one, and the SPU must not write to the
    old one any more (break-before-make).
    """
    bench = Bench(virtualized=True, notifier_filter=int(Notifier.CLEAR))
    page = bench.buffer_page(0)
    bench.m.host_page[0, page] += module("machine.host").PIN_ONE
    bench.write_records(1)
    old = bench.stage2_leaf(page)
    bench.call("host.operate_on_page", int(HostOp.DONTNEED), page)
    assert bench.stage2_leaf(page) == old
    bench.call("host.map_page", page, 1)
    new = (bench.stage2_leaf(page) & 0xFFFF_FFFF_F000) >> 12
    assert new != (old & 0xFFFF_FFFF_F000) >> 12
    assert new == word(bench, page) & FRAME
    bench.write_records(1)
    held = {int(va): int(frame) for va, frame, _, _ in bench.m.tlb[0, 0]}
    assert held[bench.start >> 12] == new


@given(
    steps=st.lists(
        st.tuples(st.sampled_from([*DISTURBING, "touch", "map"]), st.integers(0, 63), st.booleans()), max_size=40
    )
)
@settings(deadline=None, max_examples=40)
def test_table_pages_count_their_entries(steps: list[tuple[HostOp | str, int, bool]]) -> None:
    """Whoever maps and unmaps: the count in a stage 2 table is the number of its valid entries."""
    lane = Lane(scenario(guest=guest(ram_pages=64, buffer_pages=4)), virtualized=True)
    for what, page, write in steps:
        if what == "touch":
            lane.call("host.cpu_touch", page, int(write))
        elif what == "map":
            lane.call("host.map_page", page, int(write))
        else:
            lane.call("host.operate_on_page", int(what), page)
        middle = module("machine.pagetables").ipa_middle(lane.m, 0, int(lane.par.ram_page0) << 12)
        if middle < 0:
            continue
        valid = np.flatnonzero(lane.m.pool[0, middle] & VALID)
        assert lane.m.pool_refs[0, middle] == len(valid) > 0
        for entry in valid:
            slot = ((int(lane.m.pool[0, middle, entry]) & 0xFFFF_FFFF_F000) >> 12) - (1 << 30)
            assert lane.m.pool_refs[0, slot] == (lane.m.pool[0, slot] & VALID).sum() > 0


@pytest.mark.parametrize("again", ["host.map_page", "host.cpu_touch"])
def test_a_page_that_is_mapped_again_is_nobodys_loss(again: str) -> None:
    """What the host did before is over: if KVM itself drops the entry now, the host is not to blame."""
    bench = Bench(virtualized=True)
    page = bench.buffer_page(0)
    bench.call("host.operate_on_page", int(HostOp.MPROTECT), page)
    bench.call(again, page, 1)
    bench.edit_stage2(page, lambda descriptor: 0)
    bench.write_records(1)
    assert bench.tr.stage2_faults == 1
    assert bench.tr.fault_cause != Cause.HOST


@given(
    moves=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([HostOp.MOVE, HostOp.RECLAIM, HostOp.THP])), max_size=20
    )
)
@settings(deadline=None, max_examples=30)
def test_a_translation_table_keeps_its_content_wherever_its_page_goes(moves: list[tuple[int, HostOp]]) -> None:
    """Tables are ordinary guest pages: moved, swapped out and in, the guest's mapping stays what it was."""
    bench = Bench(virtualized=True)
    ipas = [bench.translate(bench.start + n * 4096)[2] for n in range(4)]
    tables = np.flatnonzero(bench.m.host_page[0] >> 57 == 1)
    assert len(tables) >= 4
    for n, op in moves:
        bench.call("host.operate_on_page", int(op), int(tables[n]))
    for page in tables:
        bench.call("host.map_page", int(page), 1)
    assert [bench.translate(bench.start + n * 4096)[2] for n in range(4)] == ipas
    assert bench.write_records(10) == 10


@pytest.mark.parametrize(
    ("op", "mapped", "cause"),
    [
        (HostOp.MPROTECT, True, Cause.HOST),
        (HostOp.RECLAIM, True, Cause.HOST),
        (HostOp.KSM, True, Cause.HOST),
        (HostOp.DIRTY_LOG, True, Cause.HOST),
        (HostOp.NONE, False, Cause.NOT_PINNED),
        (HostOp.MPROTECT, False, Cause.NOT_PINNED),
    ],
)
def test_the_judge_knows_who_took_the_page(op: HostOp, mapped: bool, cause: Cause) -> None:
    """A page that KVM had never mapped is nobody's fault, even if the host touches it afterwards."""
    bench = Bench(virtualized=True)
    page = bench.buffer_page(0)
    if not mapped:
        bench.edit_stage2(page, lambda descriptor: 0)
    if op != HostOp.NONE:
        bench.call("host.operate_on_page", int(op), page)
    bench.write_records(1)
    assert bench.tr.stage2_faults == 1
    assert bench.tr.fault_cause == cause


# ---- when ------------------------------------------------------------------------------------------------------------


def recording(times_us: list[int], span_us: int) -> Recording:
    n = len(times_us)
    return Recording(
        time_us=np.array(times_us, np.int64), first_page=np.arange(n, dtype=np.int32),
        end_page=np.arange(1, n + 1, dtype=np.int32), op=np.full(n, HostOp.AGE, np.uint8),
        notifier=np.full(n, NO_NOTIFIER, np.uint8), write=np.zeros(n, np.bool_), ram_pages=256, duration_us=span_us,
        scenario="by hand", kernel="", source="by hand",
    )  # fmt: skip


@given(
    gaps=st.lists(st.integers(0, 10**9), min_size=2, max_size=8), rest=st.integers(0, 10**6),
    scale=st.sampled_from([1 << 16, 20 << 16, 1 << 12, 3]),
)  # fmt: skip
@settings(deadline=None)
def test_a_recording_is_replayed_in_order_and_starts_over(gaps: list[int], rest: int, scale: int) -> None:
    """Each gap takes 1/scale of its recorded time, also around the end; gaps of hours do not overflow."""
    times = np.cumsum(gaps).tolist()
    host = Host(kind=HostKind.RECORDED, recording=recording(times, times[-1] + rest), time_scale_q16=scale)
    lane = Lane(scenario(host=host, guest=guest(ram_pages=256)), virtualized=True)
    n = len(times)
    start = (int(lane.vm.host_index) - 1) % n
    exact = 0
    for step in range(2 * n):
        here, there = (start + step) % n, (start + step + 1) % n
        gap_us = times[there] - times[here] if there > here else times[-1] + rest - times[here] + times[0]
        exact += ((gap_us * 1_000_000 + (0 if there > here else 1)) << 16) // scale
        if exact >= 1 << 62:
            break
        assert lane.vm.host_index == there
        assert lane.vm.host_next_ps == exact
        lane.call("host.host_event")
    assert lane.vm.host_events == lane.m.host_ops[0, HostOp.AGE]


@given(seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=10)
def test_the_host_does_the_same_whatever_the_policy(seed: int) -> None:
    """Common random numbers: times, operations and ranges depend on seed and replicate only."""
    ops = tuple((int(op), 50 * US, 4) for op in (HostOp.RECLAIM, HostOp.MOVE, HostOp.KSM))
    host = Host(kind=HostKind.RANDOM, random_ops=ops)
    logs = []
    for behaviour in ({}, {"trap_pmb": True, "trap_pms": True, "notifier_filter": 31}):
        lane = Lane(scenario(host=host, guest=guest(ram_pages=256), seed=seed), virtualized=True, **behaviour)
        log = []
        for _ in range(30):
            log.append((int(lane.vm.host_next_ps), int(lane.vm.host_index), int(lane.vm.host_draws)))
            lane.call("host.host_event")
        logs.append((log, lane.m.host_ops[0].tolist()))
    assert logs[0] == logs[1]
    assert len({index for _, index, _ in logs[0][0]}) == 3


def test_random_operations_come_at_their_rates() -> None:
    """Competing exponential clocks: shares follow the rates, and the mean interval is that of the sum of rates."""
    host = Host(kind=HostKind.RANDOM, random_ops=((int(HostOp.AGE), 10 * US, 1), (int(HostOp.SOFT_DIRTY), 30 * US, 1)))
    lane = Lane(scenario(host=host, guest=guest(ram_pages=256)), virtualized=True)
    n = 2000
    for _ in range(n):
        lane.call("host.host_event")
    aged = int(lane.m.host_ops[0, HostOp.AGE])
    assert abs(aged / n - 0.75) < 4 * (0.75 * 0.25 / n) ** 0.5
    mean = int(lane.vm.host_next_ps) / (n + 1)
    assert abs(mean / (7.5 * US) - 1) < 4 / n**0.5


# ---- filters ---------------------------------------------------------------------------------------------------------

FILTERS = {"none": Notifier(0), "all but UNMAP": ~Notifier.UNMAP, "harmless": Notifier.HARMLESS}


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.name)
@pytest.mark.parametrize("backing", list(Backing), ids=lambda it: it.name)
def test_what_each_filter_costs(op: HostOp, backing: Backing) -> None:
    """On a pinned page that the SPU has in its TLB. Honouring everything never diverges; ignoring all but UNMAP keeps
    the mapping but for UNMAP and KVM's own doing, and diverges where the page or the right to write goes; ignoring what
    is harmless keeps it exactly where the page stays.
    """
    kept, diverged, replaced = {}, {}, {}
    for name, mask in FILTERS.items():
        host = Host(kernel=Kernel.V6_12, backing=backing)
        bench = Bench(virtualized=True, notifier_filter=int(mask), host=host, guest={"ram_pages": 1024})
        word = module("machine.hostpage")
        page = bench.buffer_page(1)
        bench.m.host_page[0] += word.PIN_ONE
        bench.v.pmbptr = bench.start + 4096
        bench.write_records(1)
        frame = bench.m.host_page[0, page] & FRAME
        first = 0 if backing == Backing.HUGETLB else page
        bench.call("operations.operate", int(op), first, 1024 if backing == Backing.HUGETLB else page + 1)
        now = int(bench.m.host_page[0, page])
        replaced[name] = bool(now & (word.HOLE | word.READ_ONLY_VMA)) or (now & FRAME) != frame
        bench.v.pmbptr = bench.start + 4096
        bench.write_records(1)
        kept[name] = bench.tr.stage2_faults == 0
        diverged[name] = bench.tr.diverged_records > 0
    assert not diverged["none"]
    assert not diverged["harmless"]
    assert diverged["all but UNMAP"] == (kept["all but UNMAP"] and replaced["none"])
    if not kept["none"]:
        own = op in (HostOp.DIRTY_LOG, HostOp.MEMSLOT_DELETE, HostOp.MEMSLOT_READ_ONLY)
        own = own or (backing == Backing.GUEST_MEMFD and op in (HostOp.PUNCH_HOLE, HostOp.TRUNCATE))
        by_protection = op in (HostOp.MPROTECT, HostOp.MPROTECT_READ)  # the VMM wants it so
        assert kept["harmless"] == (not replaced["none"] and not own and not by_protection and op not in ZAPS)


ZAPS = (HostOp.DONTNEED, HostOp.REMOVE, HostOp.PUNCH_HOLE, HostOp.TRUNCATE)  # shared memory keeps the page: harmless


def test_write_access_that_the_vmm_gave_up_diverges_until_stage_2_follows() -> None:
    """kvm.md H8: mprotect(PROT_READ) is not honoured while a filter ignores it; honoured, the SPU faults instead."""
    for mask, written, diverged in ((~Notifier.UNMAP, 3, 3), (Notifier(0), 0, 0)):
        bench = Bench(virtualized=True, notifier_filter=int(mask))
        page = bench.buffer_page(0)
        bench.m.host_page[0] += module("machine.hostpage").PIN_ONE  # tables too: the notifier names 2 MiB
        assert bench.write_records(2) == 2
        bench.call("operations.operate", int(HostOp.MPROTECT_READ), page, page + 1)
        assert bench.write_records(3) == written
        assert bench.tr.diverged_records == diverged


def test_locked_slots_cannot_be_changed() -> None:
    """kvm.md H10: RFC v5 refuses it, once the VM's memory is locked and until it is unlocked."""
    bench = Bench(virtualized=True)
    whole_vm, one = module("machine.whole_vm"), np.zeros(1, dtype=np.int64)
    assert whole_vm.pin_all(bench.m, one, 1)[0] == 0
    for op in (HostOp.MEMSLOT_DELETE, HostOp.MEMSLOT_READ_ONLY):
        bench.call("operations.operate", int(op), 0, int(bench.par.ram_pages))
        assert bench.write_records(1) == 1
    whole_vm.unpin_all(bench.m, one)
    bench.call("operations.operate", int(HostOp.MEMSLOT_DELETE), 0, int(bench.par.ram_pages))
    assert bench.write_records(1) == 0


def test_a_page_that_goes_while_the_spu_holds_it_diverges_at_once() -> None:
    """The filter keeps the TLBI away too: records go on to the old page without a walk."""
    bench = Bench(virtualized=True, notifier_filter=int(Notifier.CLEAR))
    page = bench.buffer_page(0)
    bench.m.host_page[0, page] += module("machine.hostpage").PIN_ONE
    assert bench.write_records(2) == 2
    walks = bench.tr.walks
    bench.call("host.operate_on_page", int(HostOp.DONTNEED), page)
    assert bench.write_records(3) == 3
    assert bench.tr.walks == walks
    assert bench.tr.diverged_records == 3
    assert bench.tr.diverged_pages == 1
