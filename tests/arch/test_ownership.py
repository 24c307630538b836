"""Ownership, enabling, traps, event routing and what is collected, by the rules' numbers in section 2 of spe.md."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from spepolicy.arch.ownership import (
    BUFFER_REGISTERS,
    SAMPLING_REGISTERS,
    Controls,
    EventKind,
    Source,
    State,
    buffer_enabled,
    collects_context,
    collects_physical_address,
    effective_exceptions_el1,
    event_target,
    interrupt_asserted,
    kvm_controls,
    owning_level,
    owning_state,
    profiling_enabled,
    programming_allowed,
    stopped,
    timestamp_source,
    traps,
)
from spepolicy.arch.registers import REGISTERS
from spepolicy.arch.versions import Feature, features_of

from ..machine.interpreted import module

BASE = features_of(1)
EXCEPTIONS = features_of(6)
BITS = (0, 1)


def pack(register: str, **fields: int) -> int:
    return int(REGISTERS[register].pack(**fields))


# A guest that owns its buffer and profiles both levels.
GUEST = Controls(
    BASE,
    mdcr_el2=pack("MDCR_EL2", E2PB=3),
    mdcr_el3=pack("MDCR_EL3", NSPB=3),
    pmscr_el1=pack("PMSCR_EL1", E1SPE=1, E0SPE=1),
    pmblimitr=pack("PMBLIMITR_EL1", E=1),
)
HOST = replace(GUEST, mdcr_el2=0, pmscr_el2=pack("PMSCR_EL2", E2SPE=1, E0HSPE=1))
# The same with SPE exceptions: MDCR_EL3.PMSEE, PMSCR_EL2.EE and PMSCR_EL1.EE are then set by a test.
NEW_GUEST = replace(GUEST, features=EXCEPTIONS)


def with_exceptions(base: Controls, pmsee: int, second: int, first: int = 3) -> Controls:
    return replace(
        base,
        mdcr_el3=base.mdcr_el3 | pack("MDCR_EL3", PMSEE=pmsee),
        pmscr_el2=base.pmscr_el2 | pack("PMSCR_EL2", EE=second),
        pmscr_el1=base.pmscr_el1 | pack("PMSCR_EL1", EE=first),
    )


@pytest.mark.parametrize(("e2pb", "enabled", "owner"), [(0, True, 2), (0, False, 1), (2, True, 1), (3, True, 1)])
def test_rule_1_el2_owns_the_buffer_exactly_if_it_is_enabled_and_e2pb_is_0(
    e2pb: int, enabled: bool, owner: int
) -> None:
    assert owning_level(replace(GUEST, mdcr_el2=pack("MDCR_EL2", E2PB=e2pb), el2_enabled=enabled)) == owner


def test_rule_1_without_el2_el1_owns_it_whatever_e2pb_says() -> None:
    assert owning_level(replace(GUEST, features=BASE & ~Feature.EL2, mdcr_el2=0)) == 1


def test_rule_1_the_owning_state_is_that_of_nspbe_and_nspb() -> None:
    expected = {(0, 0): State.SECURE, (0, 1): State.NON_SECURE, (1, 1): State.REALM, (1, 0): None}
    for (realm, state), owner in expected.items():
        for trap in BITS:
            c = replace(
                GUEST, features=BASE | Feature.RME, mdcr_el3=pack("MDCR_EL3", NSPBE=realm, NSPB=state << 1 | trap)
            )
            assert owning_state(c) == owner
    # without RME, NSPBE is RES0; without EL3 there is one state only
    assert owning_state(replace(GUEST, mdcr_el3=pack("MDCR_EL3", NSPBE=1, NSPB=3))) == State.NON_SECURE
    assert owning_state(replace(GUEST, features=BASE & ~Feature.EL3, state=State.SECURE)) == State.SECURE


def test_rule_2_profiling_is_stopped_by_any_service_bit_that_counts() -> None:
    serviced = pack("PMBSR_EL1", S=1)
    assert not stopped(GUEST)
    assert stopped(replace(GUEST, pmbsr_el1=serviced))
    # without SPE_EXC the other two registers do not exist
    assert not stopped(replace(GUEST, pmbsr_el2=serviced, pmbsr_el3=serviced))
    for pmsee, second in itertools.product(range(4), range(4)):
        c = with_exceptions(NEW_GUEST, pmsee, second)
        assert stopped(replace(c, pmbsr_el1=serviced))
        assert stopped(replace(c, pmbsr_el2=serviced)) == (pmsee != 0 and second >= 2)
        assert stopped(replace(c, pmbsr_el3=serviced)) == (pmsee >= 2)


@pytest.mark.parametrize(("halted", "aarch64", "ours", "enable", "serviced"), list(itertools.product(BITS, repeat=5)))
def test_rule_3_the_buffer_is_enabled_if_nothing_forbids_it(
    halted: int, aarch64: int, ours: int, enable: int, serviced: int
) -> None:
    c = replace(
        GUEST, halted=bool(halted), aarch64=bool(aarch64), state=State.NON_SECURE if ours else State.SECURE,
        pmblimitr=pack("PMBLIMITR_EL1", E=enable), pmbsr_el1=pack("PMBSR_EL1", S=serviced),
    )  # fmt: skip
    assert buffer_enabled(c) == bool(not halted and aarch64 and ours and enable and not serviced)


@pytest.mark.parametrize(("level", "e0", "e1", "enable", "serviced"), list(itertools.product(BITS, repeat=5)))
def test_rule_4_the_machine_enables_profiling_as_the_architecture_does(
    level: int, e0: int, e1: int, enable: int, serviced: int
) -> None:
    """The machine's rule, for the one configuration that it runs: a buffer owned by EL1, EL2 enabled, TGE=0."""
    c = replace(
        GUEST, pmscr_el1=pack("PMSCR_EL1", E1SPE=e1, E0SPE=e0), pmblimitr=pack("PMBLIMITR_EL1", E=enable),
        pmbsr_el1=pack("PMBSR_EL1", S=serviced),
    )  # fmt: skip
    vcpu = SimpleNamespace(level=level, pmscr=c.pmscr_el1, pmblimitr=c.pmblimitr, pmbsr=c.pmbsr_el1, spe_off=0)
    assert module("machine.spu").profiling_enabled(vcpu) == profiling_enabled(c, level)
    assert profiling_enabled(c, level) == bool(enable and not serviced and (e1 if level else e0))


def test_rule_4_each_level_has_its_bit_and_el3_none() -> None:
    bits = {2: ("PMSCR_EL2", "E2SPE", False), 1: ("PMSCR_EL1", "E1SPE", False)}
    bits |= {0: ("PMSCR_EL1", "E0SPE", False)}
    for level, (register, name, tge) in bits.items():
        c = replace(HOST, pmscr_el1=0, pmscr_el2=0, tge=tge)
        assert not profiling_enabled(c, level)
        assert profiling_enabled(replace(c, **{register.lower(): pack(register, **{name: 1})}), level)
    c = replace(HOST, pmscr_el1=0, pmscr_el2=pack("PMSCR_EL2", E0HSPE=1), tge=True)
    assert profiling_enabled(c, 0)
    assert not profiling_enabled(replace(c, tge=False), 0)
    assert not profiling_enabled(HOST, 3)


def test_rule_5_a_vhe_host_is_never_sampled_into_a_guests_buffer() -> None:
    c = replace(GUEST, tge=True, pmscr_el2=pack("PMSCR_EL2", E2SPE=1, E0HSPE=1))
    assert not any(profiling_enabled(c, level) for level in range(4))


def test_rule_6_a_host_that_owns_the_buffer_can_sample_its_guest() -> None:
    assert profiling_enabled(HOST, 1)
    assert profiling_enabled(HOST, 0)
    assert not profiling_enabled(replace(HOST, pmscr_el1=0), 1)


@pytest.mark.parametrize(("buffer", "sampling"), list(itertools.product([False, True], repeat=2)))
def test_the_guest_owns_its_buffer_and_kvm_traps_what_it_asked_for(buffer: bool, sampling: bool) -> None:
    control = kvm_controls(buffer, sampling)
    assert owning_level(replace(GUEST, mdcr_el2=control)) == 1
    assert all(traps(name, control) == buffer for name in BUFFER_REGISTERS)
    assert all(traps(name, control) == sampling for name in SAMPLING_REGISTERS)
    assert not traps("PMBIDR_EL1", control)
    assert set(BUFFER_REGISTERS) | set(SAMPLING_REGISTERS) <= REGISTERS.keys()


def test_with_owner_el2_accesses_from_el1_trap() -> None:
    assert all(traps(name, pack("MDCR_EL2", E2PB=0)) for name in BUFFER_REGISTERS)


def test_pmbidr_p_says_who_may_program_the_buffer() -> None:
    assert programming_allowed(GUEST, 1)
    assert not programming_allowed(replace(GUEST, mdcr_el2=0), 1)
    assert programming_allowed(replace(GUEST, mdcr_el2=0), 2)
    assert not programming_allowed(replace(GUEST, state=State.SECURE), 2)
    assert programming_allowed(replace(GUEST, state=State.SECURE), 3)


@pytest.mark.parametrize("kind", EventKind)
def test_rule_44_without_spe_exceptions_every_event_goes_to_el1(kind: EventKind) -> None:
    assert event_target(GUEST, kind, scr_gpf=True, scr_ea=True, hcr_gpf=True, hcr_tea=True) == 1


def test_rule_44_ee_10_lets_a_hypervisor_take_its_own_stage_2_faults_only() -> None:
    c = with_exceptions(NEW_GUEST, pmsee=1, second=2)
    assert event_target(c, EventKind.STAGE2_FAULT) == 2
    assert event_target(c, EventKind.GPC_FAULT) == 2
    for kind in (EventKind.STAGE1_FAULT, EventKind.OTHER, EventKind.EXTERNAL_ABORT):
        assert event_target(c, kind) == 1
    assert event_target(c, EventKind.EXTERNAL_ABORT, hcr_tea=True) == 2
    assert event_target(c, EventKind.GRANULE_PROTECTION_FAULT, hcr_gpf=True) == 2
    host = with_exceptions(replace(HOST, features=EXCEPTIONS), pmsee=1, second=2)
    assert event_target(host, EventKind.STAGE1_FAULT) == 2


@pytest.mark.parametrize("kind", EventKind)
def test_rule_44_all_events_can_go_to_el2_or_el3(kind: EventKind) -> None:
    assert event_target(with_exceptions(NEW_GUEST, pmsee=1, second=3), kind) == 2
    assert event_target(with_exceptions(NEW_GUEST, pmsee=3, second=3), kind) == 3
    assert event_target(with_exceptions(NEW_GUEST, pmsee=0, second=3), kind) == 1
    own = with_exceptions(NEW_GUEST, pmsee=2, second=0)
    assert event_target(own, kind, scr_ea=True, scr_gpf=True) == (3 if kind >= EventKind.GPC_FAULT else 1)


def test_rule_46_without_spe_exceptions_pmbirq_is_the_service_bit() -> None:
    for serviced in BITS:
        c = replace(GUEST, pmbsr_el1=pack("PMBSR_EL1", S=serviced))
        assert interrupt_asserted(c) == bool(serviced)


def test_rule_47_a_profiling_exception_takes_the_place_of_pmbirq() -> None:
    serviced = replace(NEW_GUEST, pmbsr_el1=pack("PMBSR_EL1", S=1))
    for pmsee, second, first in itertools.product(range(4), repeat=3):
        c = with_exceptions(serviced, pmsee, second, first)
        enabled = pmsee != 0 and second != 0 and first >= 2  # 01 and 10 are for nested virtualization: as 00 and 11
        assert interrupt_asserted(c) == (not enabled)
        assert effective_exceptions_el1(c) == (3 if enabled else 0)


def test_rule_24_a_record_has_the_context_of_the_levels_that_ask_for_it() -> None:
    both = replace(GUEST, pmscr_el1=pack("PMSCR_EL1", CX=1), pmscr_el2=pack("PMSCR_EL2", CX=1))
    assert collects_context(both, 0) == collects_context(both, 1) == (True, True)
    assert collects_context(both, 2) == (False, True)
    assert collects_context(replace(both, tge=True), 0) == (False, True)
    assert collects_context(replace(both, el2_enabled=False), 1) == (True, False)
    assert collects_context(GUEST, 1) == (False, False)


V, P, O = Source.VIRTUAL, Source.PHYSICAL, Source.OFFSET_PHYSICAL  # noqa: E741


@pytest.mark.parametrize(
    ("second", "first", "guest", "host"),
    [(0, 0, V, V), (0, 1, V, V), (0, 3, V, V), (1, 0, V, P), (1, 1, P, P), (1, 3, O, P), (3, 0, V, O), (3, 1, O, O),
     (3, 3, O, O)],
)  # fmt: skip
def test_rule_25_the_owner_and_both_pct_fields_choose_the_timestamp(
    second: int, first: int, guest: Source, host: Source
) -> None:
    el1, el2 = pack("PMSCR_EL1", TS=1, PCT=first), pack("PMSCR_EL2", TS=1, PCT=second)
    assert timestamp_source(replace(GUEST, pmscr_el1=el1, pmscr_el2=el2)) == guest
    assert timestamp_source(replace(HOST, pmscr_el1=el1, pmscr_el2=el2)) == host
    if second == 0:
        assert timestamp_source(replace(HOST, pmscr_el1=el1, pmscr_el2=el2), in_host=True) == P
    only_other = replace(GUEST, pmscr_el1=pack("PMSCR_EL1", PCT=first), pmscr_el2=el2)
    assert timestamp_source(only_other) == Source.NONE


@pytest.mark.parametrize(("el1", "el2"), list(itertools.product(BITS, repeat=2)))
def test_rule_26_el2_decides_whether_a_guest_sees_physical_addresses(el1: int, el2: int) -> None:
    fields = {"pmscr_el1": pack("PMSCR_EL1", PA=el1), "pmscr_el2": pack("PMSCR_EL2", PA=el2)}
    assert collects_physical_address(replace(GUEST, **fields)) == bool(el1 and el2)
    assert collects_physical_address(replace(HOST, **fields)) == bool(el2)
    assert collects_physical_address(replace(GUEST, **fields, el2_enabled=False)) == bool(el1)
