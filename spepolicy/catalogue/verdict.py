"""What happened in a case, and whether that is what its verdict says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spepolicy.catalogue.case import EVENTS, Case, Verdict
from spepolicy.machine.state import LostCause

if TYPE_CHECKING:
    from spepolicy.drivers.result import Result

__all__ = ["UNKNOWN", "Seen", "judge", "observe"]

UNKNOWN = ""  # the name of a policy that no source has heard of: no verdict is about it
_ORDINARY = (LostCause.BUFFER_FULL, LostCause.RING_FULL)


@dataclass(frozen=True)
class Seen:
    """What happened in the lanes of one case, policy and version."""

    blackout: tuple[str, ...]
    tells: tuple[str, ...]
    records: tuple[str, ...]
    guest: tuple[str, ...]
    errata: tuple[str, ...]


def observe(result: Result, virtualized: bool, manager: Any, hooks: tuple[str, ...]) -> Seen:
    """Return what *result* shows, summed over its lanes."""
    from spepolicy.judge.errata import merge_errata
    from spepolicy.judge.findings import find
    from spepolicy.lab.run import errata_from

    truth = result.truth
    causes = [
        c for c in LostCause if c not in _ORDINARY and (result.blackout_ps[:, :, c].any() or result.lost[:, :, c].any())
    ]
    records = {
        "lost": any(result.lost[:, :, cause].any() for cause in LostCause if cause not in _ORDINARY),
        "discarded": truth["discarded"].any(),
        "cut": truth["resumed_cut"].any(),
        "diverged": truth["diverged_records"].any(),
        "unlogged": result.vm["migration_unlogged"].any(),
    }
    guest = {
        "fatal": truth["fatal"].any(),
        "silent": truth["silent_fatal"].any(),
        "truncated": truth["truncated"].any(),
        "dead": result.vm["died"].any(),
        "reported": truth["reported_ps"].any(),
    }
    notes: list[str] = []
    findings = find(result, virtualized=virtualized, hooks=hooks)
    documented = errata_from(manager, "errata", notes)
    observed = merge_errata([], errata_from(manager, "report_errata", notes, findings=findings))
    errata = [*documented, *(erratum for erratum in observed if erratum.count)]
    return Seen(
        blackout=tuple(cause.name.lower() for cause in causes),
        tells=tuple(name for name in EVENTS if truth[f"injected_{name}"].any()),
        records=tuple(name for name, there in records.items() if there),
        guest=tuple(name for name, there in guest.items() if there),
        errata=tuple(erratum.id for erratum in errata),
    )


def judge(case: Case, policy: str, version: int, seen: Seen) -> tuple[tuple[str, ...], bool]:
    """Compare *seen* with the verdict of *case* on *policy* and PMSVer *version*: (disagreements, whether the sources
    say anything).
    """
    problems = []
    verdict = _verdict_on(case, policy, version)
    known = verdict is not None and bool(verdict.deviation)
    if not known and (not case.never.versions or version in case.never.versions):
        for what in ("tells", "records"):
            for name in getattr(case.never, what):
                if name in getattr(seen, what):
                    problems.append(f"{what} {name}, which is forbidden: {case.source}")
    if verdict is None:
        return tuple(problems), False
    judged = False
    for what in ("blackout", "tells", "records", "guest"):
        wanted = getattr(verdict, what)
        if wanted is None:
            continue
        judged = True
        if set(wanted) != set(getattr(seen, what)):
            problems.append(f"{what}: expected {_list(wanted)}, seen {_list(getattr(seen, what))} ({verdict.because})")
    if verdict.may_tell is not None:
        judged = True
        if not set(seen.tells) <= set(verdict.may_tell):
            problems.append(f"tells {_list(seen.tells)}, allowed {_list(verdict.may_tell)} ({verdict.because})")
    missing = [name for name in verdict.errata or () if name not in seen.errata]
    judged = judged or bool(verdict.errata)
    if missing:
        problems.append(f"errata: {_list(missing)} not raised, seen {_list(seen.errata)} ({verdict.because})")
    return tuple(problems), judged


def _verdict_on(case: Case, policy: str, version: int) -> Verdict | None:
    if policy == UNKNOWN:
        return None
    about = [verdict for verdict in case.verdicts if not verdict.versions or version in verdict.versions]
    named = [verdict for verdict in about if policy in verdict.policies]
    if named:
        return named[0]
    return next((verdict for verdict in about if "others" in verdict.policies), None)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
