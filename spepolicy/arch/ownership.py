"""Who owns the profiling buffer, when profiling is enabled, which accesses trap, and who is told of an event.

Pure functions of register values, by the rules of spe.md section 2 (Arm ARM D17.3 to D17.8 and its pseudocode). The
machine runs one configuration of them, a Non-secure buffer owned by EL1 with EL2 enabled and TGE=0; `kvm_controls`
makes its MDCR_EL2, and a test holds `spepolicy.machine.spu.profiling_enabled` to `profiling_enabled`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from spepolicy.arch.registers import REGISTERS
from spepolicy.arch.versions import Feature

__all__ = [
    "BUFFER_REGISTERS",
    "SAMPLING_REGISTERS",
    "Controls",
    "EventKind",
    "Source",
    "State",
    "buffer_enabled",
    "collects_context",
    "collects_physical_address",
    "effective_exceptions_el1",
    "effective_exceptions_el2",
    "event_target",
    "interrupt_asserted",
    "kvm_controls",
    "owning_level",
    "owning_state",
    "profiling_enabled",
    "programming_allowed",
    "stopped",
    "timestamp_source",
    "traps",
]

BUFFER_REGISTERS = ("PMBLIMITR_EL1", "PMBPTR_EL1", "PMBSR_EL1", "PMBMAR_EL1")
"""Trapped from EL1 by MDCR_EL2.E2PB (spe.md 1.11)."""
SAMPLING_REGISTERS = (
    "PMSCR_EL1", "PMSEVFR_EL1", "PMSFCR_EL1", "PMSICR_EL1", "PMSIRR_EL1", "PMSLATFR_EL1", "PMSIDR_EL1", "PMSNEVFR_EL1",
    "PMSDSFR_EL1",
)  # fmt: skip
"""Trapped from EL1 by MDCR_EL2.TPMS."""


class State(IntEnum):
    """Security states, numbered as {NSE, NS}."""

    SECURE = 0
    NON_SECURE = 1
    REALM = 3


@dataclass(frozen=True)
class Controls:
    """All that decides ownership and enabling. Register values; `state` is the current Security state."""

    features: Feature
    mdcr_el2: int = 0
    mdcr_el3: int = 0
    pmscr_el1: int = 0
    pmscr_el2: int = 0
    pmblimitr: int = 0
    pmbsr_el1: int = 0
    pmbsr_el2: int = 0
    pmbsr_el3: int = 0
    tge: bool = False  # HCR_EL2.TGE
    el2_enabled: bool = True  # in the owning Security state
    state: State = State.NON_SECURE
    halted: bool = False
    aarch64: bool = True  # the owning exception level, and the current one

    def get(self, register: str, field: str) -> int:
        """Return a field of one of the registers; 0 where the implementation does not have it."""
        attribute = "pmblimitr" if register == "PMBLIMITR_EL1" else register.lower()
        stored: int = getattr(self, attribute)
        description = REGISTERS[register]
        return int(description.unpack(description.read(stored, self.features))[field])


def owning_state(c: Controls) -> State | None:
    """Rule 1: the Security state that owns the buffer; None for the reserved value of {NSPBE, NSPB}."""
    if Feature.EL3 not in c.features:
        return c.state
    selected = c.get("MDCR_EL3", "NSPBE") << 1 | c.get("MDCR_EL3", "NSPB") >> 1
    return {0: State.SECURE, 1: State.NON_SECURE, 3: State.REALM}.get(selected)


def owning_level(c: Controls) -> int:
    """Rule 1: the exception level that owns the buffer, 1 or 2."""
    has_el2 = Feature.EL2 in c.features and c.el2_enabled
    return 2 if has_el2 and c.get("MDCR_EL2", "E2PB") == 0 else 1


def effective_exceptions_el2(c: Controls) -> int:
    """Return the effective PMSCR_EL2.EE (spe.md 1.3)."""
    if Feature.EXC not in c.features:
        return 0
    if Feature.EL3 in c.features and c.get("MDCR_EL3", "PMSEE") == 0:
        return 0
    if Feature.EL2 not in c.features or not c.el2_enabled:
        return 1
    return c.get("PMSCR_EL2", "EE")


def effective_exceptions_el1(c: Controls) -> int:
    """Return the effective PMSCR_EL1.EE (spe.md 1.2); the reserved values behave as the nearest defined one."""
    if effective_exceptions_el2(c) == 0:
        return 0
    return 3 if c.get("PMSCR_EL1", "EE") & 2 else 0


def stopped(c: Controls) -> bool:
    """Rule 2: whether profiling is stopped by an event that nobody has cleared."""
    if c.get("PMBSR_EL1", "S"):
        return True
    if effective_exceptions_el2(c) & 2 and c.get("PMBSR_EL2", "S"):
        return True
    return bool(c.get("MDCR_EL3", "PMSEE") & 2 and c.get("PMBSR_EL3", "S"))


def buffer_enabled(c: Controls) -> bool:
    """Rule 3."""
    ours = c.aarch64 and not c.halted and owning_state(c) == c.state
    return ours and c.get("PMBLIMITR_EL1", "E") == 1 and not stopped(c)


def profiling_enabled(c: Controls, level: int) -> bool:
    """Rules 4 to 6: whether operations at exception level *level* of the current Security state are sampled."""
    owner = owning_level(c)
    if level > owner or not buffer_enabled(c) or (c.tge and owner == 1):
        return False
    if level == 2:
        return c.get("PMSCR_EL2", "E2SPE") == 1
    if level == 1:
        return c.get("PMSCR_EL1", "E1SPE") == 1 and not c.tge
    return c.get("PMSCR_EL2", "E0HSPE") == 1 if c.tge else c.get("PMSCR_EL1", "E0SPE") == 1


def traps(register: str, mdcr_el2: int) -> bool:
    """Say whether an access from EL1 to *register* traps to EL2 (spe.md 1.11). PMBIDR_EL1 never does that way."""
    controls = REGISTERS["MDCR_EL2"].unpack(mdcr_el2)
    if register in BUFFER_REGISTERS:
        return not controls["E2PB"] & 1
    return register in SAMPLING_REGISTERS and bool(controls["TPMS"])


def kvm_controls(trap_buffer: bool, trap_sampling: bool, own_buffer: bool = False) -> int:
    """Return the MDCR_EL2 with which KVM gives the buffer to its guest, and sees the accesses that it wants to see, or
    with which it owns the buffer itself.
    """
    owner = 0b00 if own_buffer else 0b10 if trap_buffer else 0b11
    return int(REGISTERS["MDCR_EL2"].pack(E2PB=owner, TPMS=int(trap_sampling)))


def programming_allowed(c: Controls, level: int) -> bool:
    """Return the inverse of PMBIDR_EL1.P as software at *level* reads it (spe.md 1.9)."""
    return level == 3 or (owning_state(c) == c.state and level >= owning_level(c))


class EventKind(IntEnum):
    """Buffer management events, as far as their target depends on them (rule 44)."""

    OTHER = 0  # buffer full, access not allowed
    STAGE1_FAULT = 1
    STAGE2_FAULT = 2
    GPC_FAULT = 3  # granule protection check, other than a granule protection fault
    GRANULE_PROTECTION_FAULT = 4
    EXTERNAL_ABORT = 5


def event_target(
    c: Controls, kind: EventKind, *, scr_gpf: bool = False, scr_ea: bool = False, hcr_gpf: bool = False,
    hcr_tea: bool = False,
) -> int:  # fmt: skip
    """Rule 44: the exception level whose PMBSR records the event, 1, 2 or 3."""
    pmsee = c.get("MDCR_EL3", "PMSEE")
    taken_at_el3 = (
        kind == EventKind.GPC_FAULT
        or (kind == EventKind.GRANULE_PROTECTION_FAULT and scr_gpf)
        or (kind == EventKind.EXTERNAL_ABORT and scr_ea)
    )
    if pmsee == 3 or (pmsee == 2 and taken_at_el3):
        return 3
    exceptions = effective_exceptions_el2(c)
    taken_at_el2 = (
        kind in (EventKind.STAGE2_FAULT, EventKind.GPC_FAULT)
        or (kind == EventKind.STAGE1_FAULT and owning_level(c) == 2)
        or (kind == EventKind.GRANULE_PROTECTION_FAULT and hcr_gpf)
        or (kind == EventKind.EXTERNAL_ABORT and hcr_tea)
    )
    return 2 if exceptions == 3 or (exceptions == 2 and taken_at_el2) else 1


def interrupt_asserted(c: Controls) -> bool:
    """Rules 46 and 47: the level of PMBIRQ. With SPE exceptions enabled at EL1 they take its place."""
    return effective_exceptions_el1(c) == 0 and c.get("PMBSR_EL1", "S") == 1


def collects_context(c: Controls, level: int) -> tuple[bool, bool]:
    """Rule 24: whether a record of an operation at *level* has CONTEXTIDR_EL1, and CONTEXTIDR_EL2."""
    el1 = c.get("PMSCR_EL1", "CX") == 1 and level <= 1 and not c.tge
    el2 = c.get("PMSCR_EL2", "CX") == 1 and Feature.EL2 in c.features and c.el2_enabled
    return el1, el2


class Source(IntEnum):
    """What a Timestamp packet counts."""

    NONE = 0
    VIRTUAL = 1
    PHYSICAL = 2
    OFFSET_PHYSICAL = 3


def timestamp_source(c: Controls, *, in_host: bool = False) -> Source:
    """Rule 25. in_host: the operation executes at EL2, or at EL0 with TGE=1, of a VHE host."""
    owner = owning_level(c)
    if c.get("PMSCR_EL2" if owner == 2 else "PMSCR_EL1", "TS") == 0:
        return Source.NONE
    has_el2 = Feature.EL2 in c.features and c.el2_enabled
    second = c.get("PMSCR_EL2", "PCT") if has_el2 else 1
    first = c.get("PMSCR_EL1", "PCT")
    if second == 0:
        return Source.PHYSICAL if in_host else Source.VIRTUAL
    if second == 1:
        if owner == 2:
            return Source.PHYSICAL
        return {0: Source.VIRTUAL, 1: Source.PHYSICAL}.get(first, Source.OFFSET_PHYSICAL)
    return Source.VIRTUAL if owner == 1 and first == 0 else Source.OFFSET_PHYSICAL


def collects_physical_address(c: Controls) -> bool:
    """Rule 26: whether records have a physical address, the true one behind stage 2."""
    own = c.get("PMSCR_EL1", "PA") == 1
    if Feature.EL2 not in c.features or not c.el2_enabled:
        return own
    return c.get("PMSCR_EL2", "PA") == 1 and (owning_level(c) == 2 or own)
