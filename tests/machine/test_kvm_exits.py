"""KVM's exits one at a time, and what a lane's memory is laid out with."""

from __future__ import annotations

import numpy as np
import pytest

from spepolicy.machine.hostops import Backing
from spepolicy.machine.scenario import Host

from .interpreted import module
from .spu_bench import Bench


@pytest.mark.parametrize("enabled", [0, 1])
@pytest.mark.parametrize("preempted", [False, True])
def test_an_exit_costs_and_one_with_spe_in_the_guest_costs_the_switch_too(enabled: int, preempted: bool) -> None:
    bench = Bench(virtualized=True)
    bench.v.pmblimitr = bench.limit | enabled
    bench.v.exit_next_ps = bench.v.preempt_next_ps = 0
    bench.par.exit_interval_ps = bench.par.preempt_interval_ps = 1 << 40
    bench.v.flight = 0
    before = int(bench.v.host_ps)
    with np.errstate(over="ignore"):
        assert bench.call("kvm.ordinary_exit", 0, preempted) == 0
    switch = bench.par.spe_switch_ps if enabled else 0
    assert int(bench.tr.switch_total_ps) == switch
    away = int(bench.tr.other_host_ps)
    assert int(bench.v.host_ps) - before == away + switch
    assert (away > bench.par.exit_ps) if preempted else (away == bench.par.exit_ps)
    assert (int(bench.tr.exits), int(bench.tr.preemptions)) == (int(not preempted), int(preempted))
    due, other = bench.v.preempt_next_ps, bench.v.exit_next_ps
    if not preempted:
        due, other = other, due
    assert due > int(bench.v.now_ps)
    assert other == 0, "the other clock is left alone"


def test_how_long_a_preemption_lasts_does_not_depend_on_when_it_came() -> None:
    """The length and the gap before it are draws of their own: with equal means they were the same number once."""
    bench = Bench(virtualized=True)
    bench.par.preempt_interval_ps = bench.par.preempt_ps = 1 << 40
    gaps, lengths = [], []
    with np.errstate(over="ignore"):
        for _ in range(400):
            before, now = int(bench.tr.other_host_ps), int(bench.v.now_ps)
            bench.call("kvm.ordinary_exit", 0, True)
            lengths.append(int(bench.tr.other_host_ps) - before - int(bench.par.exit_ps))
            gaps.append(int(bench.v.preempt_next_ps) - now)
    assert abs(np.corrcoef(gaps[:-1], lengths[1:])[0, 1]) < 0.2
    assert abs(np.corrcoef(gaps, lengths)[0, 1]) < 0.2
    assert np.mean(lengths) == pytest.approx(1 << 40, rel=0.2)


def test_an_exit_ends_the_operation_in_flight() -> None:
    bench = Bench(virtualized=True)
    bench.v.flight, bench.v.flight_outcome = 1, 0
    with np.errstate(over="ignore"):
        bench.call("kvm.ordinary_exit", 0, False)
    assert int(bench.v.flight) == 0
    assert int(bench.tr.written) == 1


@pytest.mark.parametrize("vcpus", [1, 2, 8])
def test_each_table_of_the_guest_has_a_page_of_its_own(vcpus: int) -> None:
    bench = Bench(virtualized=True, guest={"vcpus": vcpus})
    words = bench.m.host_page[0]
    host = module("machine.hostpage")
    role = (words & host.ROLE_MASK) >> host.ROLE_SHIFT
    tables = np.flatnonzero((role == host.ROLE_TABLE) | (role == host.ROLE_HOT))
    assert len(tables) == int(bench.vm.next_table) <= int(bench.par.guest_tables)
    assert all(bench.slot_of(int(words[page] & host.FRAME)) >= 0 for page in tables)
    assert (role == host.ROLE_BUFFER).sum() == vcpus * int(bench.par.buffer_pages)


@pytest.mark.parametrize("hit", [0, 3, 511])
def test_what_changes_a_block_takes_all_of_its_pages_out_of_the_tlb(hit: int) -> None:
    bench = Bench(virtualized=True, host=Host(backing=Backing.THP), guest={"ram_pages": 1024})
    first = int(bench.par.ram_page0)
    pages = (511, 512, 512 + hit, 1023)  # of the guest; the second huge page begins at 512
    for block in (0, 512):
        assert module("machine.pagetables").ipa_entry(bench.m, 0, (first + block) << 12)[2] == 2, "a block"
    for slot, page in enumerate(pages):
        bench.m.tlb[0, 0, slot] = (slot, 0, first + page, 0)
    bench.call("hostpage.age", 512 + 5, 512 + 6, 1)
    assert [int(row[0]) for row in bench.m.tlb[0, 0, :4]] == [0, -1, -1, -1]


@pytest.mark.parametrize(("now", "diverged", "stray"), [(0, 0, 0), (1, 5, 0), (2, 0, 5), (3, 5, 5)])
def test_records_in_the_buffer_are_booked_by_where_they_went(now: int, diverged: int, stray: int) -> None:
    bench = Bench(virtualized=True)
    bench.tr.diverged_now = now
    module("machine.spu_write").book(bench.tr, 5)
    booked = (bench.tr.written, bench.tr.pending, bench.tr.diverged_records, bench.tr.stray_records)
    assert tuple(map(int, booked)) == (5, 5, diverged, stray)
