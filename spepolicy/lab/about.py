"""What an errata page says of a policy and of the machine that it was tried on: `errata_page.About`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from spepolicy.hookspecs import Ownership, Trap
from spepolicy.judge.errata_page import About, plain
from spepolicy.machine.hostops import Notifier
from spepolicy.machine.scenario import Bug

if TYPE_CHECKING:
    from spepolicy.judge.errata import Findings
    from spepolicy.machine.scenario import Scenario

__all__ = ["DOCSTRING_PARTS", "about", "docstring_parts"]

DOCSTRING_PARTS = ("Mechanism", "Source", "Needs", "Costs", "Fails")


def docstring_parts(cls: type) -> tuple[str, dict[str, str]]:
    """Return the first line of a policy's docstring, and what it says under each of DOCSTRING_PARTS, on one line."""
    text = inspect.getdoc(cls) or ""
    found = re.split(rf"(?:^| )({'|'.join(DOCSTRING_PARTS)}): ", " ".join(text.split()))
    parts = dict(zip(found[1::2], (part.strip() for part in found[2::2]), strict=True))
    return text.partition("\n")[0].strip(), parts


def about(policy: object, manager: Any, scenario: Scenario, findings: Findings) -> About:
    """Describe *policy*, which is registered in *manager*, and *scenario*; *findings* are of its run."""
    summary, parts = docstring_parts(type(policy))
    try:
        release = version("spepolicy")
    except PackageNotFoundError:  # run from a tree that is not installed
        release = ""
    return About(
        summary=summary,
        parts=parts,
        fields=_fields(policy),
        controls=_controls(manager) if findings.virtualized else (),
        configuration=_configuration(scenario, findings),
        version=release,
    )


def _fields(policy: object) -> list[tuple[str, str, str]]:
    if not dataclasses.is_dataclass(policy):
        return []
    return [
        (item.name, plain(getattr(policy, item.name)), str(item.metadata.get("doc", "")))
        for item in dataclasses.fields(policy)
        if item.init
    ]


def _controls(manager: Any) -> list[tuple[str, str]]:
    owner = manager.hook.ownership() or Ownership.GUEST
    traps = manager.hook.traps() or Trap.NONE
    ignored = manager.hook.notifier_filter() or Notifier(0)
    e2pb = "0b10" if traps & Trap.PMB else "0b11"
    names = ", ".join(event.name or "" for event in Notifier if event & ignored) or "none"
    return [
        ("MDCR_EL2.E2PB", e2pb if owner == Ownership.GUEST else "0b00"),
        ("MDCR_EL2.TPMS", "1" if traps & Trap.PMS or owner == Ownership.NOBODY else "0"),
        ("MMU notifier events ignored for pinned pages", names),
    ]


def _configuration(scenario: Scenario, findings: Findings) -> list[tuple[str, str]]:
    cpu, guest, kvm = scenario.cpu, scenario.guest, scenario.kvm
    facts = findings.facts
    sizes = "fixed" if facts["fixed_size_records"] else f"multiples of {cpu.align_bytes} bytes"
    levels = [name for name, on in (("EL0", guest.profile_user), ("EL1", guest.profile_kernel)) if on]
    rows = [
        ("SPE version (PMSVer)", str(cpu.spe_version)),
        ("FEAT_FGT", "yes" if cpu.fine_grained_traps else "no"),
        ("Records", f"up to {cpu.max_record_bytes} bytes, {sizes}"),
        ("vCPUs", str(guest.vcpus)),
        ("Guest memory", f"{guest.ram_pages * 4} KiB"),
        ("AUX ring a vCPU", f"{guest.buffer_pages * 4} KiB"),
        ("Profiled", " and ".join(levels) + f", {facts['session'].replace('_', ' ')}"),
        ("Interval", f"{guest.period_ops} operations"),
        ("RLIMIT_MEMLOCK", "unlimited" if kvm.memlock_unlimited else f"{kvm.memlock_pages * 4} KiB"),
        ("Interrupt", str(facts["irq_delivery"]).replace("_", " ")),
        ("Host", str(facts["host"])),
        ("Seed", str(scenario.seed)),
    ]
    if kvm.bug != Bug.NONE:
        rows.append(("Injected bug of KVM", f"{Bug(kvm.bug).name.lower()}, {kvm.bug_rate_q16 / 65536:.3g} a page"))
    return rows
