"""KVM's tools against a model: which pages are pinned, what is charged, what the guest is shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from spepolicy.hookspecs import Event
from spepolicy.machine.hostops import HostOp

from .interpreted import module
from .spu_bench import PAGE, Bench

ONE = np.zeros(1, dtype=np.int64)
LIMIT = 9
OK, OVER_LIMIT, NO_PAGE = 0, 1, 2


def tool(bench: Bench, name: str, *arguments: Any) -> Any:
    """Use `MODULE.TOOL` on the one vCPU of *bench*."""
    where, _, name = name.partition(".")
    return getattr(module(f"machine.{where}"), name)(bench.m, ONE, ONE, *arguments)


def walk(bench: Bench, first: int, last: int, tables: bool = False) -> int:
    """Walk buffer pages first..last-1; return the status."""
    lo, hi = (np.array([bench.start + n * PAGE]) for n in (first, last))
    return int(tool(bench, "walking.walk_stage1", lo, hi, int(tables), 0)[0])


class Pins(RuleBasedStateMachine):
    """A policy that pins ranges one after the other, unpins, and is disturbed: pins are a multiset of pages."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(virtualized=True)
        self.bench.par.memlock_pages = LIMIT
        self.pages = [self.bench.buffer_page(n) for n in range(4)]
        self.current: list[int] = []
        self.peak = 0

    @rule(first=st.integers(0, 3), count=st.integers(1, 4), then=st.sampled_from(["keep", "drop"]))
    def pin(self, first: int, count: int, then: str) -> None:
        """Walk, pin, and make it the current set, or give up what was current before."""
        last = min(first + count, 4)
        wanted = self.pages[first:last]
        assert walk(self.bench, first, last) == 0
        gone = any(int(self.bench.m.host_page[0, page]) & module("machine.host").HOLE for page in wanted)
        status = int(tool(self.bench, "pinning.pin_fresh", 0)[0])
        if len(self.current) + len(wanted) > LIMIT:
            assert status == OVER_LIMIT
        elif gone:
            assert status == NO_PAGE
        else:
            assert status == OK
            self.peak = max(self.peak, len(self.current) + len(wanted))
            for page in wanted:
                assert self.bench.stage2_leaf(page) & 0x81 == 0x81, "mapped and writable"
            tool(self.bench, "pinning.unpin_previous")
            self.current = wanted
        if then == "drop":
            self.unpin()

    @rule()
    def unpin(self) -> None:
        tool(self.bench, "pinning.unpin_current")
        self.current = []

    @rule(
        op=st.sampled_from([HostOp.MOVE, HostOp.RECLAIM, HostOp.KSM, HostOp.FORK, HostOp.MPROTECT]), n=st.integers(0, 3)
    )
    def disturb(self, op: HostOp, n: int) -> None:
        self.bench.call("host.operate_on_page", int(op), self.pages[n])

    @rule(n=st.integers(0, 3))
    def unmap_for_good(self, n: int) -> None:
        if n == 3:
            self.bench.call("host.operate_on_page", int(HostOp.MUNMAP), self.pages[n])

    @invariant()
    def pins_are_the_models(self) -> None:
        held = (self.bench.m.host_page[0] & module("machine.host").PIN_MASK) >> 40
        model = np.bincount(self.current, minlength=len(held))
        assert np.array_equal(held, model)
        assert self.bench.vm.pinned_pages == len(self.current)
        assert self.bench.v.pin_count == len(self.current)
        assert self.bench.vm.pinned_peak_pages >= self.peak


TestPins = Pins.TestCase
TestPins.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_pinned_page_time_is_the_integral_over_host_time() -> None:
    bench = Bench(virtualized=True)
    for cost in ("walk_read_ps", "pin_page_ps", "unpin_page_ps"):
        setattr(bench.par, cost, 0)
    walk(bench, 0, 3)
    tool(bench, "pinning.pin_fresh", 0)
    tool(bench, "pinning.unpin_previous")
    bench.v.now_ps += 5_000_000
    bench.v.host_ps += 2_000_000
    tool(bench, "pinning.unpin_current")
    bench.v.now_ps += 10_000_000
    module("machine.pinning").release_all(bench.m, ONE)
    assert bench.vm.pinned_page_ps == 3 * 7_000_000 // 1000
    assert bench.vm.pinned_pages == 0


def test_costs_are_charged_for_what_is_done() -> None:
    """A walk per descriptor, a pin and an unpin per page, a map where stage 2 has nothing; swap and copies apart."""
    bench = Bench(virtualized=True)
    par, v = bench.par, bench.v

    def cost(do: Any) -> int:
        before = int(v.host_ps)
        do()
        assert bench.tr.hook_total_ps >= v.host_ps - before
        return int(v.host_ps) - before

    assert cost(lambda: walk(bench, 0, 4)) == (4 + 3) * par.walk_read_ps
    assert cost(lambda: tool(bench, "pinning.pin_fresh", 0)) == 4 * par.pin_page_ps
    tool(bench, "pinning.unpin_previous")
    assert cost(lambda: tool(bench, "pinning.unpin_current")) == 4 * par.unpin_page_ps
    for op, more in ((HostOp.MPROTECT, 0), (HostOp.RECLAIM, par.swap_in_ps), (HostOp.KSM, par.copy_page_ps)):
        bench.call("host.operate_on_page", int(op), bench.buffer_page(0))
        walk(bench, 0, 1)
        assert cost(lambda: tool(bench, "pinning.map_fresh")) == par.map_page_ps + more
        walk(bench, 0, 1)
        assert cost(lambda: tool(bench, "pinning.map_fresh")) == 0
    assert bench.v.host_ps == bench.tr.hook_total_ps


@pytest.mark.parametrize("broken", range(4))
@pytest.mark.parametrize(
    ("edit", "fsc"), [(lambda d: d & ~1, 0x07), (lambda d: d & ~(1 << 10), 0x0B), (lambda d: d | 1 << 7, 0x0F)]
)
def test_a_failed_walk_is_shown_to_the_guest_as_the_hardware_would(edit: Any, fsc: int, broken: int) -> None:
    """Status of the first bad page, the same that the SPU's own walk of that page gives."""
    bench = Bench(virtualized=True)
    bench.edit_stage1(broken, edit)
    status = walk(bench, 0, 4)
    assert status == bench.translate(bench.start + broken * PAGE)[0]
    assert status & 0x3F == fsc
    tool(bench, "answers.tell_guest", int(Event.STAGE1_ABORT), 0)
    assert bench.syndrome | {"COLL": 0} == {"EC": 0x24, "DL": 0, "EA": 0, "S": 1, "COLL": 0, "MSS": fsc}
    assert bench.v.guest_pmbsr == bench.v.pmbsr
    assert bench.v.virq == 1


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_dl_is_forged_only_where_no_record_was_cut(cut: bool, told: bool) -> None:
    """The hardware's DL stays in the syndrome; DL that KVM adds by itself is counted."""
    bench = Bench(virtualized=True)
    bench.v.pmbsr = 0x25 << 26 | int(cut) << 19 | 1 << 17 | 7
    tool(bench, "answers.tell_guest", int(Event.IMPDEF), int(told))
    assert bench.syndrome["DL"] == int(cut or told)
    assert bench.tr.forged_loss == int(told and not cut)


def test_a_walk_with_tables_lists_the_pages_that_a_walk_reads() -> None:
    bench = Bench(virtualized=True)
    assert walk(bench, 0, 4, tables=True) == 0
    listed = bench.m.pins[0, 0, 1, : int(bench.v.pin_fresh)].tolist()
    tables = np.flatnonzero(bench.m.host_page[0] >> 57 == 1).tolist()
    assert sorted(listed) == sorted([*tables, *(bench.buffer_page(n) for n in range(4))])
