"""The guest's program and its SPE driver, segment by segment: what each end of one does, and what KVM sees of it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spepolicy.machine.scenario import SessionMode
from spepolicy.machine.state import NEVER, Hook, LostCause, Segment

from .interpreted import module
from .spu_bench import PAGE, Bench

ENABLED, DISCARD, STOPPED = 1, 2 << 1, 1 << 17  # PMBLIMITR_EL1.E, FM = discard, PMBSR_EL1.S
E0, E1 = 1, 2  # PMSCR_EL1.E0SPE, E1SPE
PROGRAM = (Segment.USER, Segment.KERNEL)


def hooks(*wanted: Hook) -> int:
    return sum(1 << hook for hook in wanted)


def end(bench: Bench, segment: Segment) -> int:
    """Let *segment* end now; return the hook that is called."""
    bench.v.segment = segment
    bench.v.segment_end_ps = bench.v.now_ps
    with np.errstate(over="ignore"):
        return int(bench.call("guest.segment_end", 0))


# ---- the program -----------------------------------------------------------------------------------------------------


def test_lengths_are_drawn_one_by_one_from_an_exponential_distribution() -> None:
    bench = Bench()
    mean, n = 1 << 30, 400
    with np.errstate(over="ignore"):
        drawn = [int(module("machine.guest")._program_draw(bench.m, bench.v, mean)) for _ in range(n)]
    assert len(set(drawn)) > n / 2
    assert abs(np.mean(drawn) / mean - 1) < 4 / n**0.5
    assert abs(np.std(drawn) / mean - 1) < 0.3


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize("session", list(SessionMode))
@pytest.mark.parametrize("active", [0, 1])
def test_a_task_that_comes_back_starts_its_session_by_the_driver_s_code(
    task: int, session: SessionMode, active: int
) -> None:
    """arm_spe_pmu_start() runs when the profiled task is scheduled in, unless perf has disabled the event."""
    bench = Bench(guest={"session": session})
    v = bench.v
    v.task, v.event_active, v.wanted, v.segment = task, active, 0, Segment.USER
    with np.errstate(over="ignore"):
        by_driver = bench.call("guest._switch", 0)
    comes_back = task == 1 and session == SessionMode.PER_TASK
    assert v.task == 1 - task
    assert bool(by_driver) == (comes_back and active == 1)
    assert (v.segment == Segment.START) == by_driver
    if by_driver:
        assert v.segment_end_ps - v.now_ps == v.segment_ps == bench.par.start_ps
        assert v.level == 1
    assert v.wanted == int(comes_back and active == 0), "a disabled event leaves its user waiting for data"


def test_after_the_handler_a_restart_comes_before_the_program() -> None:
    """perf enabled the event while its task was in the interrupt handler: the IPI is taken when that ends."""
    for restart, expected in ((1, Segment.START), (0, Segment.KERNEL)):
        bench = Bench()
        v = bench.v
        v.task, v.restart, v.resume_segment, v.resume_level, v.resume_left_ps = 0, restart, Segment.KERNEL, 1, 77
        assert end(bench, Segment.IRQ_HANDLER) == Hook.NONE
        assert (v.segment, v.restart) == (expected, 0)
        assert v.segment_end_ps - v.now_ps == (bench.par.start_ps if restart else 77)


def test_an_interrupt_puts_the_program_aside_and_it_goes_on_where_it_was() -> None:
    bench = Bench()
    v = bench.v
    v.now_ps, v.segment_end_ps, v.segment_ps, v.level, v.segment = 1000, 5000, 4500, 0, Segment.USER
    bench.call("guest.take_virq", 0)
    assert (v.segment, v.segment_end_ps) == (Segment.IRQ_ENTRY, 1000 + bench.par.irq_entry_ps)
    v.now_ps = 90_000
    assert end(bench, Segment.IRQ_HANDLER) == Hook.NONE
    assert (v.segment, v.level, v.segment_end_ps - v.now_ps, v.segment_ps) == (Segment.USER, 0, 4000, 4500)
    assert v.resume_segment == -1


def test_the_end_of_the_run_counts_the_sample_in_flight() -> None:
    for flight in (0, 1):
        bench = Bench()
        bench.v.flight = flight
        bench.tr.pending = 5
        bench.call("guest.end_of_run", 0)
        assert (bench.tr.in_flight, bench.tr.kept, bench.tr.pending) == (flight, 5, 0)
        assert bench.v.segment == Segment.DONE


# ---- a paravirtual driver, and returns to EL0 that trap --------------------------------------------------------------


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("paravirtual", [False, True])
@pytest.mark.parametrize("virtualized", [False, True])
def test_a_paravirtual_driver_announces_its_ring_by_one_hypercall(
    virtualized: bool, paravirtual: bool, hidden: bool, listens: bool
) -> None:
    """It costs a trap whether or not the policy listens; without KVM, or without SPE, there is nobody to call."""
    bench = Bench(
        virtualized=virtualized, hidden=hidden, hooks=hooks(Hook.BUFFER_ANNOUNCED) if listens else 0,
        guest={"paravirtual": paravirtual},
    )  # fmt: skip
    calls = int(virtualized and paravirtual and not hidden)
    assert (bench.tr.announced, bench.tr.traps) == (calls, calls)
    assert bench.tr.trap_total_ps == bench.v.host_ps == calls * bench.par.trap_ps
    assert bench.v.hook_next == (Hook.BUFFER_ANNOUNCED if calls and listens else Hook.NONE)


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("due", [0, 1])
def test_an_armed_return_to_el0_traps_once(due: int, listens: bool) -> None:
    """kvm.md G1: with FEAT_FGT, HFGITR_EL2.ERET. The trap costs what one costs, and the trap is taken once."""
    bench = Bench(virtualized=True, hooks=hooks(Hook.ERET) if listens else 0)
    bench.v.eret_due = due
    before = int(bench.v.host_ps)
    assert bool(bench.call("guest.eret_trapped", 0)) == (due == 1 and listens)
    assert (bench.tr.eret_traps, bench.tr.traps) == (due, due)
    assert bench.tr.trap_total_ps == bench.v.host_ps - before == due * bench.par.trap_ps
    assert not bench.call("guest.eret_trapped", 0)


# ---- which write KVM sees --------------------------------------------------------------------------------------------

_ENABLING = hooks(Hook.BUFFER_ENABLED, Hook.PROFILING_ENABLED, Hook.USER_PROFILING_ARMED)


@pytest.mark.parametrize("listens", [0, _ENABLING, *(hooks(h) for h in (Hook(2), Hook(3), Hook(8)))])
def test_a_write_that_enables_is_told_to_who_listens_if_it_traps(listens: int) -> None:
    """PMBLIMITR_EL1.E=1 tells of the buffer, then of profiling; PMSCR_EL1 of profiling. With E1SPE the SPU may write
    at once; with E0SPE alone at the next return to EL0. In discard mode nothing will be written (rule 23); while
    PMBSR_EL1.S is set nothing is enabled (rule 31).
    """
    for by_pms, trapped, limit, pmscr, pmbsr in itertools.product(
        (False, True), (False, True), (0, ENABLED, ENABLED | DISCARD), (0, E0, E1, E0 | E1), (0, STOPPED)
    ):
        bench = _listening(listens, trapped)
        v = bench.v
        v.pmblimitr, v.pmscr, v.pmbsr, v.hook_next = bench.limit | limit if limit else 0, pmscr, pmbsr, 0
        found = bench.call("guest.enabled_hooks", 0, by_pms)
        profiling = {0: Hook.NONE, E0: Hook.USER_PROFILING_ARMED}.get(pmscr, Hook.PROFILING_ENABLED)
        expected = [Hook.BUFFER_ENABLED] if not by_pms else []
        expected += [profiling] if profiling else []
        if limit != ENABLED or pmbsr or not trapped:
            expected = []
        expected = [hook for hook in expected if listens >> hook & 1]
        assert [hook for hook in (found, int(v.hook_next)) if hook] == expected, (by_pms, limit, pmscr, pmbsr)


_benches: dict[tuple[int, bool], Bench] = {}


def _listening(listens: int, trapped: bool) -> Bench:
    key = listens, trapped
    if key not in _benches:
        _benches[key] = Bench(virtualized=True, trap_pmb=trapped, trap_pms=trapped, hooks=listens)
    return _benches[key]


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize("trapped", [False, True])
def test_a_write_that_disables_is_told_to_who_listens_if_it_traps(listens: bool, trapped: bool) -> None:
    bench = _listening(hooks(Hook.BUFFER_DISABLED) if listens else 0, trapped)
    told = {}
    for before, after in itertools.product((False, True), repeat=2):
        bench.v.pmblimitr = bench.limit | int(after)
        told[before, after] = module("machine.guest")._disabled_hook(bench.par, bench.v, before)
    assert told.pop((True, False)) == (Hook.BUFFER_DISABLED if listens and trapped else Hook.NONE)
    assert set(told.values()) == {Hook.NONE}


@pytest.mark.parametrize("listens", [False, True])
def test_a_policy_may_look_before_the_first_return_to_el0(listens: bool) -> None:
    """kvm.md G1: E0SPE=1 with E1SPE=0 arms; the driver programs its registers once, and goes on when KVM has looked."""
    bench = Bench(
        virtualized=True, trap_pms=True, hooks=hooks(Hook.USER_PROFILING_ARMED) if listens else 0,
        guest={"profile_kernel": False},
    )  # fmt: skip
    v = bench.v
    v.task = 0
    v.resume_segment, v.resume_level, v.resume_left_ps = Segment.USER, 0, 1000
    before = int(bench.tr.traps)
    assert end(bench, Segment.START_SAMPLING) == (Hook.USER_PROFILING_ARMED if listens else Hook.NONE)
    assert v.wanted == 1
    assert v.pmscr & 3 == E0
    once = int(bench.tr.traps) - before
    assert once > 0
    if listens:
        assert (v.segment, v.segment_end_ps) == (Segment.START_SAMPLING, v.now_ps)
        assert end(bench, Segment.START_SAMPLING) == Hook.NONE
    assert int(bench.tr.traps) - before == once, "the registers are programmed once"
    assert (v.segment, v.eret_pending) == (Segment.USER, 0)


# ---- start and stop --------------------------------------------------------------------------------------------------


def test_without_spe_the_guest_s_user_waits_for_data() -> None:
    """Hidden from the guest: perf_event_open() fails; what it wanted is missing all the same."""
    bench = Bench(virtualized=True, hidden=True)
    v = bench.v
    v.wanted, v.pmblimitr = 0, 0
    assert end(bench, Segment.START) == Hook.NONE
    assert (v.wanted, v.pmblimitr & 1, v.stop_cause) == (1, 0, LostCause.REFUSED)
    assert v.segment in PROGRAM


def test_when_the_driver_has_stopped_the_other_task_runs() -> None:
    bench = Bench()
    v = bench.v
    v.task, v.switch_left_ps, v.handle_open = 0, 0, 0
    assert end(bench, Segment.STOP) == Hook.NONE
    assert v.task == 1
    assert v.segment in PROGRAM
    assert v.pmblimitr & 1 == 0
    assert v.segment_end_ps - v.now_ps == v.segment_ps > 0
    assert v.switch_left_ps > 0


@pytest.mark.parametrize("listens", [(), (Hook.BUFFER_DISABLED,), (Hook.BUFFER_DISABLED, Hook.BUFFER_ANNOUNCED)])
def test_a_new_session_tells_of_the_old_buffer_before_it_announces_the_new(listens: tuple[Hook, ...]) -> None:
    bench = Bench(virtualized=True, trap_pmb=True, hooks=hooks(*listens), guest={"paravirtual": True})
    v = bench.v
    v.hook_next, v.renew_due, v.handle_open = 0, 1, 0
    generation = int(v.buffer_generation)
    found = end(bench, Segment.STOP)
    assert tuple(hook for hook in (found, int(v.hook_next)) if hook) == listens
    assert (v.buffer_generation, v.renew_due) == (generation + 1, 0)
    assert v.segment == Segment.START


# ---- the vCPU's clocks -----------------------------------------------------------------------------------------------


def test_a_preemption_is_one_and_an_exit_the_other() -> None:
    for name, counts in (("preempt_next_ps", (0, 1)), ("exit_next_ps", (1, 0))):
        bench = Bench(virtualized=True)
        bench.v.exit_next_ps = bench.v.preempt_next_ps = NEVER
        setattr(bench.v, name, 5000)
        bench.v.now_ps = 5000
        with np.errstate(over="ignore"):
            bench.call("lane._step", 0, 5000)
        assert (int(bench.tr.exits), int(bench.tr.preemptions)) == counts


def test_a_pending_interrupt_is_taken_at_once_in_the_program_and_masked_in_the_driver() -> None:
    bench = Bench(virtualized=True)
    v = bench.v
    v.now_ps, v.segment_end_ps = 1000, 9000
    v.exit_next_ps = v.preempt_next_ps = NEVER
    for virq, segment, due in ((0, Segment.USER, 9000), (1, Segment.USER, 1000), (1, Segment.STOP, 9000)):
        v.virq, v.segment = virq, segment
        assert bench.call("lane._next_time", 0) == due


def test_a_vcpu_that_is_not_sampled_loses_no_time_and_drains_what_is_in_flight() -> None:
    bench = Bench()
    v = bench.v
    v.pmscr, v.flight, v.irq_ps = 0, 1, NEVER
    bench.advance(7 * PAGE)
    assert (int(v.now_ps), int(v.flight), int(bench.tr.written)) == (7 * PAGE, 0, 1)


# ---- blackouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(("user", "kernel"), [(True, False), (False, True), (True, True)])
def test_time_is_wanted_at_the_levels_that_are_profiled(level: int, user: bool, kernel: bool) -> None:
    """Wanted is guest time in which profiling should be on at the current EL; black what is not active."""
    bench = Bench(guest={"profile_user": user, "profile_kernel": kernel})
    v, tr = bench.v, bench.tr
    v.wanted, v.level, v.now_ps, v.host_ps, v.stop_cause = 1, level, 10_000, 500, LostCause.BUFFER_FULL
    selected = kernel if level else user
    bench.call("blackout.account", 0, 3000, False)
    assert tr.wanted_ps == (3000 if selected else 0)
    assert v.window_open == int(selected)
    if not selected:
        return
    v.now_ps, v.host_ps = 20_000, 900  # another 10,000 ps black, with 400 ps of host time between
    bench.call("blackout.account", 0, 10_000, False)
    bench.call("blackout.close_window", 0)
    bench.call("blackout.close_window", 0)
    assert bench.vm.window_count == 1
    window = bench.m.window[0, 0]
    assert (window["start_ps"], window["start_host_ps"]) == (7000, 7500)
    assert (window["length_ps"], window["host_length_ps"]) == (13_000, 20_900 - 7500)
    assert window["cause"] == LostCause.BUFFER_FULL
    assert int(bench.m.blackout_ps[0, 0].sum()) == tr.wanted_ps == 13_000
    assert tr.active_ps == 0
