"""SPEv1p0 to SPEv1p5 and the optional features, as one table from which everything that depends on them is derived.

Sources: Arm ARM DDI 0487 M.a.a, A2.2 and A2.3, as restated in spe.md 1.1; what a version permits when the SPU meets an
external abort is spe.md rule 42 (D17.8.4), what `PMBIDR_EL1` may say of it spe.md 1.9.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Flag, auto

from spepolicy.errors import ConfigurationError, nearest

__all__ = [
    "EVENT_NAMES",
    "NO_FEATURE",
    "OPTIONAL",
    "VERSIONS",
    "AbortReport",
    "Feature",
    "Optional",
    "Version",
    "features_of",
]


class Feature(Flag):
    """What an implementation has: SPE's own features by their FEAT_ names, then those of the PE that SPE depends on,
    then what the architecture leaves to the implementation without a name.
    """

    SPE = auto()
    V1P1 = auto()
    V1P2 = auto()
    V1P3 = auto()
    V1P4 = auto()
    V1P5 = auto()
    ARCH_INST = auto()  # the population is architectural instructions
    ERND = auto()  # the secondary counter makes jitter
    LDS = auto()  # data source packets of loads
    FNE = auto()  # inverted event filter
    PBT = auto()  # previous branch target packets
    CRR = auto()  # calls, returns and their like are told apart
    FDS = auto()  # data source filter
    DPFZS = auto()  # PMU freezes when profiling stops
    EFT = auto()  # type filter with masks, floating point and SIMD
    FPF = auto()  # floating point flag in operation type packets
    SPE_SME = auto()
    ALTCLK = auto()  # alternate clock domain
    EXC = auto()  # profiling exceptions in place of PMBIRQ
    NVM = auto()  # buffer addressed without stage 1
    # of the PE
    EL2 = auto()
    EL3 = auto()
    RME = auto()
    NV = auto()
    ECV = auto()
    FGT = auto()
    FGT2 = auto()
    SVE = auto()
    SME = auto()
    # choices of the implementation
    SPECULATIVE = auto()  # operations that are not committed are members of the population
    EARLY_EVENTS = auto()  # events 2, 4, 8, 9 and 10 can be filtered before SPEv1p4
    IMPDEF_EVENTS = auto()  # events 12 to 15 and 48 to 63 exist
    BEFORE_V1P4 = auto()  # not a choice: events 24 to 31 are IMPLEMENTATION DEFINED


NO_FEATURE = Feature(0)


class AbortReport(Flag):
    """Ways in which an external abort on a buffer write can show itself (rule 42)."""

    IGNORED = auto()
    SERROR = auto()
    MMU_FAULT = auto()  # of a translation table walk only
    TO_SPU = auto()  # PMBSR_EL1.EA=1: a buffer management event


@dataclass(frozen=True)
class Version:
    """One version of the extension: what it has, what it may choose, and how it behaves."""

    name: str
    value: int  # ID_AA64DFR0_EL1.PMSVer
    features: Feature  # implied
    aborts: AbortReport  # ways of which the implementation chooses
    access_flag_required: bool  # PMBIDR_EL1.F=0 is not permitted
    late_faults: bool  # MMU and alignment faults may be reported after further operations were sampled (rule 40)

    @property
    def discard_mode(self) -> bool:
        """PMBLIMITR_EL1.FM=0b10 exists."""
        return Feature.V1P2 in self.features


_ANY = AbortReport.IGNORED | AbortReport.SERROR | AbortReport.MMU_FAULT | AbortReport.TO_SPU
_NOT_TO_SPU = AbortReport.IGNORED | AbortReport.SERROR | AbortReport.MMU_FAULT
_V0 = Feature.SPE
_V1 = _V0 | Feature.V1P1
_V2 = _V1 | Feature.V1P2 | Feature.FNE
_V3 = _V2 | Feature.V1P3
_V4 = _V3 | Feature.V1P4
# SPEv1p5 comes with Armv9.5, where FEAT_SPE_EFT is mandatory, and with it FEAT_SPE_FPF.
_V5 = _V4 | Feature.V1P5 | Feature.CRR | Feature.EXC | Feature.NVM | Feature.EFT | Feature.FPF

VERSIONS: dict[int, Version] = {
    version.value: version
    for version in (
        Version("SPE", 1, _V0, _ANY, False, False),
        Version("SPEv1p1", 2, _V1, _ANY, False, False),
        Version("SPEv1p2", 3, _V2, _ANY, False, False),
        Version("SPEv1p3", 4, _V3, _NOT_TO_SPU, True, False),
        Version("SPEv1p4", 5, _V4, _NOT_TO_SPU, True, False),
        Version("SPEv1p5", 6, _V5, _NOT_TO_SPU, True, True),
    )
}


@dataclass(frozen=True)
class Optional:
    """A feature that an implementation may have, and what it needs."""

    feature: Feature
    name: str  # as configuration writes it
    since: int  # lowest PMSVer
    needs: Feature = NO_FEATURE
    until: int = 6  # highest PMSVer with a choice
    source: str = ""


OPTIONAL: dict[str, Optional] = {
    option.name: option
    for option in (
        Optional(Feature.ARCH_INST, "ArchInst", 1, source="spe.md 1.5, rule 8"),
        Optional(Feature.ERND, "ERnd", 1, source="spe.md 1.5, rule 12"),
        Optional(Feature.LDS, "LDS", 1, source="spe.md 1.5"),
        Optional(Feature.PBT, "PBT", 3, source="spe.md 1.1"),
        Optional(Feature.CRR, "CRR", 5, source="spe.md 1.1; implied by SPEv1p5"),
        Optional(Feature.FDS, "FDS", 5, Feature.LDS, source="spe.md 1.1; FGT2 with EL2"),
        Optional(Feature.DPFZS, "DPFZS", 3, source="spe.md 1.1; with PMUv3p7"),
        Optional(Feature.EFT | Feature.FPF, "EFT", 5, source="spe.md 1.1: with FPF; Armv9.4, which has SPEv1p4"),
        Optional(Feature.SPE_SME, "SME", 2, Feature.SME, source="spe.md 1.1"),
        Optional(Feature.ALTCLK, "ALTCLK", 5, source="spe.md 1.1: Armv9.4, which has SPEv1p4"),
        Optional(Feature.NVM, "nVM", 1, source="spe.md 1.1; implied by SPEv1p5; FGT2 with EL2"),
        Optional(Feature.SPECULATIVE, "speculative", 1, source="rule 8: IMPLEMENTATION DEFINED"),
        Optional(Feature.EARLY_EVENTS, "early_events", 1, source="spe.md 1.4: events 2, 4, 8, 9, 10 before SPEv1p4"),
        Optional(Feature.IMPDEF_EVENTS, "impdef_events", 1, source="spe.md 1.4: IMPLEMENTATION DEFINED"),
    )
}

# What a PE has that runs KVM guests with SPE; SVE and SME are an implementation's.
_HOST_PE = Feature.EL2 | Feature.EL3

EVENT_NAMES: dict[str, int] = {
    "retired": 1,
    "l1d_access": 2,
    "l1d_refill": 3,
    "tlb_access": 4,
    "tlb_walk": 5,
    "not_taken": 6,
    "mispredicted": 7,
    "llc_access": 8,
    "llc_miss": 9,
    "remote_access": 10,
    "misaligned": 11,
    "partial_predicate": 17,
    "empty_predicate": 18,
    "l2d_access": 19,
    "l2d_miss": 20,
    "modified": 21,
    "recently_fetched": 22,
    "snooped": 23,
    "streaming_sve": 24,
    "smcu": 25,
}
"""Architected events and their bits in an Events packet, PMSEVFR_EL1 and PMSNEVFR_EL1 (spe.md 4.3)."""


def features_of(version: int, names: Iterable[str] = (), pe: Feature = NO_FEATURE) -> Feature:
    """Return all features of an implementation of PMSVer *version* with the optional features *names*.

    pe: features of the PE besides EL2 and EL3, which are taken for granted where KVM runs.
    Raises ConfigurationError for a version or name that does not exist, or a feature that the version does not have.
    """
    if version not in VERSIONS:
        raise ConfigurationError(f"PMSVer {version}: must be one of {', '.join(map(str, VERSIONS))} (spe.md 1.1).")
    known = VERSIONS[version]
    have = known.features | _HOST_PE | pe
    if version < 5:
        have |= Feature.BEFORE_V1P4
    chosen = list(names)
    for name in chosen:
        if name not in OPTIONAL:
            raise ConfigurationError(
                f"cpu.features=[{name}]: no such feature.{nearest(name, OPTIONAL)} Known: {', '.join(OPTIONAL)}."
            )
        if version < OPTIONAL[name].since:
            needed = VERSIONS[OPTIONAL[name].since]
            raise ConfigurationError(
                f"cpu.features=[{name}]: not in {known.name} (PMSVer {version}); it needs {needed.name} (spe.md 1.1). "
                f"Set cpu.spe_version={needed.value} or more, or leave the feature out."
            )
        have |= OPTIONAL[name].feature
    for name in chosen:
        missing = OPTIONAL[name].needs & ~have
        if missing:
            raise ConfigurationError(
                f"cpu.features=[{name}]: needs {missing.name} as well (spe.md 1.1). Add it, or leave {name} out."
            )
    return have
