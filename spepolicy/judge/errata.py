"""Errata: what a guest can see, or a profile loses, that the architecture or an honest document should have told.

`Findings` is what the judge observed of one policy. Reporters (`spepolicy.hookspecs.ReporterSpec`) turn it into
`Erratum` records; a policy may document its own limitations in its `errata` hook. `merge_errata` brings both together,
`errata_as_json` gives plain containers, `spepolicy.judge.errata_page` pages. Standard library only: every plugin
imports this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from spepolicy.errors import PluginError

__all__ = [
    "BLAME",
    "SEVERITIES",
    "Erratum",
    "Findings",
    "Observation",
    "errata_as_json",
    "merge_errata",
]

SEVERITIES = ("low", "medium", "high")
"""low: visible, harmless. medium: the profile has gaps or a bias that a user can find. high: loss or bias that nobody
is told about, or the guest's session, its VM or its host is harmed."""

BLAME = ("architecture", "guest", "host", "kvm", "limit")
"""Who could avoid it (kvm.md 4): the architecture leaves KVM no choice; the guest; the host's memory management or the
VMM; KVM, that is the policy; a resource limit that somebody set."""

_TEXT_FIELDS = ("id", "title", "trigger", "versions", "effect_on_guest", "effect_on_profile", "workaround", "source")


@dataclass(frozen=True)
class Erratum:
    """One behaviour that differs from the architecture, or one limitation that users must know."""

    id: str  # stable, e.g. "SPE-KVM-3"; records of one id are merged
    title: str
    trigger: str  # what has to happen
    versions: str  # of SPE for which it is an erratum
    effect_on_guest: str
    effect_on_profile: str
    severity: str  # one of SEVERITIES
    blame: str  # one of BLAME
    count: int = 0  # occurrences in this run, all replicates and vCPUs; 0: documented but not seen
    first_trace: Mapping[str, Any] | None = None  # the first occurrence: replicate, vcpu and what is known of it
    workaround: str = "none known"
    source: str = ""  # where it was found or discussed
    documented: bool = False  # the policy itself declares it

    def __post_init__(self) -> None:
        for name in _TEXT_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, str) or (not value.strip() and name != "source"):
                raise PluginError(f"erratum '{self.id}': {name} is {value!r}. It must be a text, not empty. Write one.")
        for name, allowed in (("severity", SEVERITIES), ("blame", BLAME)):
            if getattr(self, name) not in allowed:
                raise PluginError(
                    f"erratum '{self.id}': {name} is {getattr(self, name)!r}. It must be one of {', '.join(allowed)}. "
                    "Choose one."
                )
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 0:
            raise PluginError(
                f"erratum '{self.id}': count is {self.count!r}. It must be an integer, 0 or more. Use int(...)."
            )


@dataclass(frozen=True)
class Observation:
    """How often something happened in one run of one policy."""

    count: int = 0  # over all replicates and vCPUs
    lanes: int = 0  # replicates in which it happened
    first: Mapping[str, Any] | None = None  # replicate, vcpu, and for stage 2 faults guest_time_us, va, pmbsr


_NOTHING = Observation()


@dataclass(frozen=True)
class Findings:
    """What the judge observed of one policy, for reporters: read-only, and made from ground truth."""

    policy: str
    spe_version: int  # ID_AA64DFR0_EL1.PMSVer, 1..6
    virtualized: bool  # False: bare metal, no KVM to blame
    replicates: int
    guest_s: float  # guest-executed seconds, all vCPUs and replicates
    wanted_s: float  # of these, in which profiling was wanted
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the scenario: see spepolicy.judge.findings.facts
    observations: Mapping[str, Observation] = field(default_factory=dict)  # by name: see findings.OBSERVATIONS

    def seen(self, name: str) -> Observation:
        """Return the observation *name*; one with count 0 if it did not happen. Unknown names are a `PluginError`."""
        if name not in self.observations:
            known = ", ".join(sorted(self.observations))
            raise PluginError(
                f"findings have no observation '{name}' (asked by an erratum reporter). Known: {known or 'none'}."
            )
        return self.observations[name]

    def count(self, name: str) -> int:
        """Return how often *name* was observed, all replicates and vCPUs."""
        return self.seen(name).count


def merge_errata(documented: Iterable[Erratum], observed: Iterable[Erratum]) -> list[Erratum]:
    """Bring the policy's own list and the reporters' lists together: one record an id.

    An id in both keeps the policy's text, is marked documented, and takes count and first trace from the observation.
    Two observed records of one id: counts are not added, the larger stays, because reporters look at the same findings.
    Seen ones come first, by severity, then by id.
    """
    merged = {erratum.id: replace(erratum, documented=True) for erratum in documented}
    for erratum in observed:
        known = merged.get(erratum.id)
        if known is None:
            merged[erratum.id] = erratum
        elif erratum.count > known.count:
            merged[erratum.id] = replace(known, count=erratum.count, first_trace=erratum.first_trace)
    return sorted(merged.values(), key=_order)


def _order(erratum: Erratum) -> tuple[bool, int, list[tuple[int, int, str]]]:
    # "SPE-KVM-10" follows "SPE-KVM-9": numbers compare as numbers
    parts = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in erratum.id.split("-")]
    return erratum.count == 0, -SEVERITIES.index(erratum.severity), parts


def errata_as_json(findings: Findings, errata: Sequence[Erratum]) -> dict[str, Any]:
    """Return plain containers for `errata.json`: the run's facts, every observation, every erratum."""
    return {
        "policy": findings.policy,
        "spe_version": findings.spe_version,
        "virtualized": findings.virtualized,
        "replicates": findings.replicates,
        "guest_s": findings.guest_s,
        "wanted_s": findings.wanted_s,
        "facts": dict(findings.facts),
        "observations": {name: asdict(seen) for name, seen in findings.observations.items()},
        "errata": [asdict(erratum) for erratum in errata],
    }
