"""What must hold: each property with its source, and the kinds of ways to break it.

The explorer looks for the shortest trace of each kind, and of each kind that the host has a part in, for each of the
host's operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["KINDS", "PROPERTIES", "Kind", "Property", "detail_of", "property_of"]


class Kind(IntEnum):
    """A way to break a property; bit 1 << value of what `broken` returns."""

    BLACKOUT = 0
    BLACKOUT_EDITED = 1
    BLACKOUT_HOST = 2
    CUT_RESUMED = 3
    SWITCHED_OFF = 4
    DROPPED = 5
    OUTSIDE = 6
    DIVERGED = 7
    EXTERNAL_ABORT = 8
    LEAK = 9
    OVER_LIMIT = 10
    REFUSED = 11
    PINNED_FAULT = 12
    STALE_PIN = 13
    IMPOSSIBLE_CLAIM = 14
    LIVELOCK = 15
    BLACKOUT_BUG = 17
    ADDED = 18  # by a plugin: spepolicy.explore.added
    BLACKOUT_MIGRATION = 19
    ABSENT_PAGE = 20
    UNLOGGED = 21
    DRAIN_FAULT = 22
    PINS_LONG = 16  # no property: the explorer's own limit


@dataclass(frozen=True)
class Property:
    """One property: what must hold, and who says so."""

    name: str
    rule: str
    source: str
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class KindInfo:
    """How a kind of violation is told."""

    text: str
    by_host: bool = False  # one trace for each host operation


PROPERTIES: tuple[Property, ...] = (
    Property(
        "no_blackout",
        "a lawful guest on a quiet host has no blackout that bare metal does not have",
        "M. Rutland 25 Jul 2022, O. Upton 2 Aug 2022 (kvm.md G1, 1.2)",
        (Kind.BLACKOUT, Kind.BLACKOUT_EDITED),
    ),
    Property(
        "no_host_blackout",
        "the host's memory management causes a lawful guest no blackout",
        "O. Upton 9 Aug 2022 (kvm.md 4.3: never the guest's fault)",
        (Kind.BLACKOUT_HOST,),
    ),
    Property(
        "no_migration_blackout",
        "a live migration causes a lawful guest no blackout",
        "O. Upton 26 Jul and 9 Aug 2022 (kvm.md 2.3, L1, L6)",
        (Kind.BLACKOUT_MIGRATION,),
    ),
    Property(
        "no_bug_blackout",
        "a bug of KVM's pinning causes a lawful guest no blackout",
        "A. Elisei 9 Aug and 12 Sep 2022 (kvm.md 4.5)",
        (Kind.BLACKOUT_BUG,),
    ),
    Property(
        "no_silent_loss",
        "no record is lost without the guest being told",
        "A. Elisei 19 Apr and 27 Jul 2022 (kvm.md A1), spe.md rule 38 and 3.4",
        (Kind.CUT_RESUMED, Kind.SWITCHED_OFF, Kind.DROPPED),
    ),
    Property(
        "contained",
        "nothing is written outside the guest's buffer as its tables define it now or before its last lawful change",
        "W. Deacon 1 Aug 2022 (the impact is confined to the guest), kvm.md Q18",
        (Kind.OUTSIDE,),
    ),
    Property(
        "no_divergence",
        "what the SPU writes is what the VMM, migration and virtio see at that address",
        "kvm.md H8 (the event filter hazard)",
        (Kind.DIVERGED,),
    ),
    Property(
        "allowed_syndrome",
        "the guest sees no state that its SPE version forbids",
        "Arm ARM D17.8.4 (spe.md rule 42), O. Upton 9 Aug 2022 (kvm.md A7)",
        (Kind.EXTERNAL_ABORT,),
    ),
    Property(
        "pins_released",
        "every pin is released with the VM",
        "M. Zyngier, 2021 (kvm.md H11)",
        (Kind.LEAK,),
    ),
    Property(
        "memlock",
        "pinned pages never exceed RLIMIT_MEMLOCK",
        "W. Deacon 19 Apr 2022 (kvm.md G7, H12)",
        (Kind.OVER_LIMIT,),
    ),
    Property(
        "never_refused",
        "no session of a guest with one buffer at a time is refused for the memlock limit that holds one buffer",
        "A. Elisei 19 Apr 2022 (kvm.md G7: cycling buffers)",
        (Kind.REFUSED,),
    ),
    Property(
        "pinned_means_mapped",
        "a page that KVM holds pinned does not fault at stage 2",
        "A. Elisei 27 Jul and 10 Aug 2022 (kvm.md H1 to H4: notifiers fire on pinned pages)",
        (Kind.PINNED_FAULT,),
    ),
    Property(
        "drain_completes",
        "a page that the drain after PMSCR_EL1=0 needs is not let go at that write",
        "A. Elisei 27 Jul 2022 (kvm.md 2.0 fact 6, A19)",
        (Kind.DRAIN_FAULT,),
    ),
    Property(
        "target_has_page",
        "on the target of a migration no write of the SPU finds its page still at the source, for it cannot wait",
        "O. Upton 27 Jul and 9 Aug 2022 (kvm.md L3, M7)",
        (Kind.ABSENT_PAGE,),
    ),
    Property(
        "dirty_log_complete",
        "the dirty log has every page that the SPU wrote to since it was last read",
        "M. Zyngier 27 Jul 2022 (kvm.md L2, M6)",
        (Kind.UNLOGGED,),
    ),
    Property(
        "pin_keeps_page",
        "the page that KVM holds pinned is the one that the VMM has at that address",
        "kvm.md H7 (MADV_DONTNEED, balloon, hole punch)",
        (Kind.STALE_PIN,),
    ),
    Property(
        "possible_claim",
        "the cause that the policy claims for a fault is one that can have been",
        "A. Elisei 9 Aug and 12 Sep 2022 (kvm.md 4.5)",
        (Kind.IMPOSSIBLE_CLAIM,),
    ),
    Property(
        "no_livelock",
        "no fault repeats for ever without a record being written or the guest being told",
        "kvm.md G5, G13",
        (Kind.LIVELOCK,),
    ),
)

KINDS: Mapping[Kind, KindInfo] = {
    Kind.BLACKOUT: KindInfo("profiling is wanted and off, and nobody but KVM has done anything"),
    Kind.BLACKOUT_EDITED: KindInfo(
        "profiling is wanted and off; the guest changed its tables while the buffer was enabled and profiling was off, "
        "as the Arm ARM allows"
    ),
    Kind.BLACKOUT_HOST: KindInfo("profiling is wanted and off, and the host took the page", by_host=True),
    Kind.BLACKOUT_MIGRATION: KindInfo("profiling is wanted and off, because of the migration"),
    Kind.ABSENT_PAGE: KindInfo("post-copy fault: the SPU writes to a page that is still at the source"),
    Kind.UNLOGGED: KindInfo("the SPU has written to a page that the dirty log does not tell: the target has old data"),
    Kind.DRAIN_FAULT: KindInfo(
        "the drain faults at stage 2: KVM let go of the page when profiling was disabled", by_host=True
    ),
    Kind.BLACKOUT_BUG: KindInfo("profiling is wanted and off, because of KVM's bug"),
    Kind.CUT_RESUMED: KindInfo("a cut record (DL=1) stays in the buffer: KVM resumed and told nobody"),
    Kind.SWITCHED_OFF: KindInfo("the guest's driver switches SPE off, and without DL it tells perf nothing"),
    Kind.DROPPED: KindInfo("the sample that faulted is gone: KVM resumed and told nobody"),
    Kind.OUTSIDE: KindInfo("the SPU writes to memory that is not the guest's buffer", by_host=True),
    Kind.DIVERGED: KindInfo("the SPU writes to a page that the VMM's address no longer shows", by_host=True),
    Kind.EXTERNAL_ABORT: KindInfo("PMBSR_EL1 shows an external abort, which SPEv1p3 reports as SError only"),
    Kind.LEAK: KindInfo("the VM is gone and pins are left"),
    Kind.OVER_LIMIT: KindInfo("more pages are pinned than RLIMIT_MEMLOCK allows"),
    Kind.REFUSED: KindInfo("the guest's session is refused: pinning would exceed RLIMIT_MEMLOCK"),
    Kind.PINNED_FAULT: KindInfo("stage 2 fault on a pinned page", by_host=True),
    Kind.STALE_PIN: KindInfo("the host replaces the page behind a pin", by_host=True),
    Kind.IMPOSSIBLE_CLAIM: KindInfo("the policy claims a cause that nothing on this trace can have been"),
    Kind.LIVELOCK: KindInfo("the same fault comes again and again"),
}

assert {kind for p in PROPERTIES for kind in p.kinds} == set(KINDS)


def property_of(kind: Kind) -> Property:
    """Return the property that *kind* breaks."""
    return next(p for p in PROPERTIES if kind in p.kinds)


def detail_of(kind: Kind, last_op: int, claim: int) -> int:
    """Return what tells apart traces of one kind that are all worth showing."""
    if KINDS[kind].by_host:
        return last_op
    return claim if kind is Kind.IMPOSSIBLE_CLAIM else 0
