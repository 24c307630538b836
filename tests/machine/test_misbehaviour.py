"""Guests that misbehave: what the SPU reports, what KVM takes it for, what the guest is told, what the judge counts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from spepolicy.hookspecs import Cause
from spepolicy.machine.guestacts import GuestAct, Moment
from spepolicy.machine.state import Hook, LostCause

from .interpreted import module
from .spu_bench import PAGE, Bench

PMBSR_S, PMBSR_DL = 1 << 17, 1 << 19
HOOKS = 1 << Hook.STAGE2_FAULT


class Expected(NamedTuple):
    """PMBSR_EL1 after the next record (spe.md 1.8 and sheet 6a), and what the judge takes it for."""

    ec: int
    mss: int  # FSC or BSC
    cause: LostCause
    true_cause: Cause | None = None  # of a stage 2 fault
    dl: int = 0
    ea: int = 0


STAGE2_L3, STAGE1_L3, PERMISSION_L3 = 0x07, 0x07, 0x0F
TABLE = {
    GuestAct.REMAP: Expected(0x25, STAGE2_L3, LostCause.STAGE2_GUEST, Cause.GUEST),
    GuestAct.UNMAP: Expected(0x24, STAGE1_L3, LostCause.STAGE1_FAULT),
    GuestAct.WRITE_PROTECT: Expected(0x24, PERMISSION_L3, LostCause.STAGE1_FAULT),
    GuestAct.FREE_TABLE: Expected(0x24, 0x06, LostCause.STAGE1_FAULT),  # level 2: where the walk ends now
    # A stage 2 fault on the read of a stage 1 descriptor: nothing tells it from one on the buffer (sheet 6a).
    GuestAct.BALLOON_TABLE: Expected(0x25, STAGE2_L3, LostCause.STAGE2_GUEST, Cause.GUEST),
    GuestAct.READ_ONLY_SLOT: Expected(0x25, PERMISSION_L3, LostCause.STAGE2_GUEST, Cause.GUEST),
    GuestAct.DEVICE: Expected(0x24, 0x10, LostCause.GUEST_ERROR, ea=1),  # rule 42
    GuestAct.NOWHERE: Expected(0x25, STAGE2_L3, LostCause.STAGE2_GUEST, Cause.GUEST),
    GuestAct.BEYOND_LIMIT: Expected(0x00, 0x00, LostCause.GUEST_ERROR, dl=1),  # rules 34 and 41
}
BY_TLBI = [act for act in TABLE if act not in (GuestAct.BEYOND_LIMIT, GuestAct.BALLOON_TABLE)]


def bench(act: GuestAct, *, tlbi: bool = True, pages: int = 4, mapped: bool = False, **behaviour: Any) -> Bench:
    """An SPU that has written three records, whose guest is about to do *act*."""
    acts = ((int(act), 1, 0, int(Moment.ANY), int(tlbi), pages), (int(GuestAct.RESTORE), 1, 0, 0, 1, 1))
    guest = {"acts": acts, "buffer_mapped": mapped}
    b = Bench(virtualized=True, guest=guest, **({"hooks": HOOKS, "trap_pmb": True} | behaviour))
    for n in range(4):
        b.call("host.cpu_touch", b.buffer_page(n), 1)
    assert b.write_records(3) == 3
    assert not b.stopped
    return b


def perform(b: Bench, row: int = 0) -> None:
    b.call("misbehave.perform", 0, row)


@pytest.mark.parametrize("act", TABLE, ids=lambda act: act.name)
def test_what_the_spu_reports(act: GuestAct) -> None:
    b, expected = bench(act), TABLE[act]
    perform(b)
    before = int(b.tr.written)
    assert b.write_records(1) == 0
    assert b.stopped
    seen = b.syndrome
    assert (seen["EC"], seen["MSS"], seen["DL"], seen["EA"]) == (expected.ec, expected.mss, expected.dl, expected.ea)
    assert b.lost() == {int(expected.cause): 1}
    assert b.tr.written == before
    if expected.true_cause is not None:
        assert b.tr.fault_cause == expected.true_cause


@pytest.mark.parametrize("act", BY_TLBI, ids=lambda act: act.name)
def test_without_a_tlbi_the_spu_writes_where_the_tables_no_longer_point(act: GuestAct) -> None:
    """Rule 32: only maintenance that covers the PE covers its SPU. The judge counts the records as stray."""
    b = bench(act, tlbi=False)
    perform(b)
    old = int(b.tr.stray_records)
    assert b.write_records(5) == 5
    assert not b.stopped
    assert b.tr.stray_records - old == 5
    assert b.tr.diverged_records == 0, "stage 2 and the VMM agree: this is the guest's own confusion"


@pytest.mark.parametrize("act", TABLE, ids=lambda act: act.name)
@pytest.mark.parametrize("handler", [True, False])
def test_what_kvm_makes_of_it(act: GuestAct, handler: bool) -> None:
    """A stage 2 fault is the policy's; anything else, or without a handler, goes to the guest as it is (2.4 E2)."""
    b, expected = bench(act, hooks=HOOKS if handler else 0), TABLE[act]
    perform(b)
    b.write_records(1)
    hook = b.call("kvm.look_at_event", 0)
    if expected.ec == 0x25 and handler:
        assert hook == Hook.STAGE2_FAULT
        assert b.v.virq == 0
    else:
        assert hook == Hook.NONE
        assert b.v.virq == 1
        told = int(b.v.guest_pmbsr)
        assert told & PMBSR_S
        assert (told >> 26 & 0x3F, told & 0xFFFF, told >> 19 & 1) == (expected.ec, expected.mss, expected.dl)


@pytest.mark.parametrize("act", TABLE, ids=lambda act: act.name)
def test_what_was_broken_is_restored(act: GuestAct) -> None:
    b = bench(act)
    perform(b)
    b.write_records(1)
    assert b.stopped
    if act is GuestAct.BEYOND_LIMIT:
        b.v.pmbptr = b.start
    perform(b, 1)
    for n in range(4):
        b.call("host.cpu_touch", b.buffer_page(n), 1)
    if act is GuestAct.BALLOON_TABLE:
        slot, entry = b.call("misbehave.level2_entry", b.start)
        page = ((int(b.m.pool[0, slot, entry]) & 0xFFFF_FFFF_F000) >> 12) - int(b.par.ram_page0)
        b.call("host.cpu_touch", page, 0)
        perform(b, 1)  # the page of the table is there again, and zero: now the descriptors can be written
    b.v.pmbsr = 0
    assert b.write_records(4) == 4


def test_a_table_full_of_other_data_is_walked_as_a_table() -> None:
    """Descriptors that are none: a fault of either stage, an abort, or nothing; never an access outside the arrays."""
    causes = set()
    for seed in range(60):
        b = bench(GuestAct.REUSE_TABLE)
        b.v.key_act = seed * 7919
        perform(b)
        b.write_records(1)
        if b.stopped:
            causes.add(b.syndrome["EC"])
            assert b.tr.fault_cause in (0, Cause.GUEST, Cause.NOT_PINNED)
    assert causes >= {0x24, 0x25}


@pytest.mark.parametrize("by_cpu", [False, True])
def test_a_page_moved_by_the_cpu_is_mapped_and_one_that_nobody_touched_is_not(by_cpu: bool) -> None:
    b = bench(GuestAct.MIGRATE if by_cpu else GuestAct.REMAP, pages=1)
    old = b.buffer_page(0)
    perform(b)
    new = b.buffer_page(0)
    assert new != old
    assert bool(b.stage2_leaf(new) & 1) == by_cpu
    assert b.write_records(1) == int(by_cpu)
    host = module("machine.host")
    roles = b.m.host_page[0] >> host.ROLE_SHIFT & 3
    assert (roles[new], roles[old]) == (host.ROLE_BUFFER, host.ROLE_OTHER)


def test_remapping_while_the_buffer_is_off_is_not_the_guest_s_fault() -> None:
    """The driver may change translations then: the fault that follows is an ordinary first one (kvm.md 4.1 G2)."""
    b = bench(GuestAct.REMAP)
    b.v.pmblimitr &= ~1
    perform(b)
    b.v.pmblimitr |= 1
    b.v.pmbptr = b.start + (int(b.v.aux_head) & (4 * PAGE - 1))
    b.write_records(1)
    assert b.lost() == {int(LostCause.STAGE2_NOT_PINNED): 1}
    assert b.tr.fault_cause == Cause.NOT_PINNED


@pytest.mark.parametrize("trapped", [True, False])
@pytest.mark.parametrize("ec", [0x25, 0x24, 0x1F, 0x00])
def test_a_forged_event(trapped: bool, ec: int) -> None:
    """Where the write traps KVM knows who wrote; else a stage 2 abort from the guest looks like the hardware's (G8)."""
    b = bench(GuestAct.FORGE, trap_pmb=trapped)
    syndrome = (ec << 26) | PMBSR_DL | 7
    b.call("misbehave.forge_event", 0, syndrome)
    assert b.stopped
    assert b.tr.forged == 1
    assert b.tr.stage2_faults == 0
    if trapped:
        assert b.v.virq == 1
        assert b.call("kvm.look_at_event", 0) == Hook.NONE
        assert int(b.v.guest_pmbsr) == syndrome | PMBSR_S
        return
    assert b.v.irq_ps == b.v.now_ps + b.par.irq_latency_ps
    hook = b.call("kvm.take_interrupt", 0)
    assert hook == (Hook.STAGE2_FAULT if ec == 0x25 else Hook.NONE)
    assert b.tr.fault_cause == Cause.GUEST


def test_a_forged_event_does_not_hide_one_that_has_happened() -> None:
    b = bench(GuestAct.UNMAP)
    perform(b)
    b.write_records(1)
    before = int(b.v.pmbsr)
    b.call("misbehave.forge_event", 0, 0x25 << 26)
    assert int(b.v.pmbsr) == before
    assert b.tr.forged == 0


def test_the_last_record_below_the_limit_is_allowed() -> None:
    """Rule 34: PTR <= LIMIT - 2^MaxSize is a legal pointer, one byte more is not."""
    for beyond in (0, 1):
        b = bench(GuestAct.BEYOND_LIMIT)
        b.v.pmbptr = b.limit - 64 + beyond
        b.write_records(1)
        assert b.stopped
        assert b.syndrome["MSS"] == (0 if beyond else 1)
        assert b.syndrome["DL"] == beyond


# ---- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "pmscr", "enabled", "segment", "ended", "now"),
    [
        (Moment.ANY, 0, 0, 3, -1, True),
        (Moment.DISABLED, 3, 0, 0, -1, True),
        (Moment.DISABLED, 3, 1, 0, -1, False),
        (Moment.PROFILING, 3, 1, 0, -1, True),
        (Moment.PROFILING, 2, 1, 0, -1, False),  # E1SPE only, at EL0
        (Moment.PROFILING, 3, 1, 3, -1, False),  # the driver executes
        (Moment.BEFORE_ERET, 1, 1, 0, 4, True),  # arm_spe_pmu_start has just ended
        (Moment.BEFORE_ERET, 1, 1, 0, 0, False),
    ],
)
def test_moments(moment: Moment, pmscr: int, enabled: int, segment: int, ended: int, now: bool) -> None:
    b = bench(GuestAct.REMAP)
    b.v.pmscr, b.v.segment = pmscr, segment
    b.v.pmblimitr = b.limit | enabled
    is_moment = module("machine.misbehave")._is_moment
    assert is_moment(b.v, int(GuestAct.REMAP), int(moment), ended) == now
    if segment > 1:
        assert not is_moment(b.v, int(GuestAct.FORGE), int(moment), ended)


def test_acts_come_at_their_rates_and_fixed_times() -> None:
    """Competing exponential clocks, and one act at 5 us: shares follow the rates, and the one comes once."""
    us = 1_000_000
    acts = ((0, 10 * us, 0, 0, 1, 1), (1, 30 * us, 0, 0, 1, 1), (4, 0, 5 * us, 0, 1, 1))
    b = Bench(virtualized=True, guest={"acts": acts})
    with np.errstate(over="ignore"):
        times: list[tuple[int, int]] = []
        for _ in range(1500):
            times.append((int(b.v.act_next_ps), int(b.v.act_index)))
            b.v.now_ps = b.v.act_next_ps
            b.call("misbehave.schedule_act", 0)
    counts = np.bincount([index for _, index in times], minlength=3)
    assert counts[2] == 1
    assert (5 * us, 2) in times
    share = counts[0] / (counts[0] + counts[1])
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 1500) ** 0.5
