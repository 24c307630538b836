"""Errata as pages: Markdown for people, reStructuredText in the form of the kernel's Documentation/ for a patch, and a
table of policy by version by erratum for a sweep.

Standard library only. What a page says of the policy and of the configuration is in `About`, which the lab makes.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spepolicy.judge.errata import Erratum, Findings

__all__ = ["About", "errata_as_markdown", "errata_as_rst", "errata_matrix", "matrix_as_markdown"]

_VERSION_NAMES = {1: "SPE", 2: "SPEv1p1", 3: "SPEv1p2", 4: "SPEv1p3", 5: "SPEv1p4", 6: "SPEv1p5"}
_WIDTH = 80  # of the kernel's documentation


@dataclass(frozen=True)
class About:
    """What a page says of the policy and of the machine that it was tried on. Texts without markup."""

    summary: str  # first line of the policy's docstring
    parts: Mapping[str, str] = field(default_factory=dict)  # Mechanism, Source, Needs, Costs, Fails
    fields: Sequence[tuple[str, str, str]] = ()  # name, value in this run, what it is
    controls: Sequence[tuple[str, str]] = ()  # how KVM was set up: name, value
    configuration: Sequence[tuple[str, str]] = ()  # the machine: name, value
    version: str = ""  # of spepolicy


# ---- what both forms say ---------------------------------------------------------------------------------------------


def _title(findings: Findings) -> str:
    return f"Errata of the SPE policy {findings.policy}"


def _introduction(findings: Findings, code: str) -> str:
    version = _VERSION_NAMES.get(findings.spe_version, "unknown version")
    place = "in a KVM guest" if findings.virtualized else "on bare metal"
    return (
        f"What a profile taken {place} under the policy {code} does that the architecture does not allow, or that a "
        f"user has to know. Found by simulation of {findings.replicates} replicates, {findings.guest_s:.3g} s of guest "
        f"time in all, of which profiling was wanted in {findings.wanted_s:.3g} s, on {version} "
        f"(ID_AA64DFR0_EL1.PMSVer = {findings.spe_version})."
    )


def _facts(erratum: Erratum, findings: Findings) -> list[tuple[str, str]]:
    rate = erratum.count / findings.wanted_s if findings.wanted_s else 0.0
    seen = f"{erratum.count} times ({rate:.3g} a second of wanted profiling)" if erratum.count else "not in this run"
    rows = [
        ("Affects", erratum.versions),
        ("Trigger", erratum.trigger),
        ("Effect on the guest", erratum.effect_on_guest),
        ("Effect on the profile", erratum.effect_on_profile),
        ("Seen", seen),
    ]
    if erratum.first_trace:
        rows.append(("First", ", ".join(f"{key} {value}" for key, value in erratum.first_trace.items())))
    rows += [("To blame", erratum.blame), ("Workaround", erratum.workaround)]
    if erratum.source:
        rows.append(("Source", erratum.source))
    return rows


_COLUMNS = ("Erratum", "Title", "Severity", "To blame", "Seen", "Documented")


def _row(erratum: Erratum) -> tuple[str, ...]:
    documented = "yes" if erratum.documented else "no"
    return erratum.id, erratum.title, erratum.severity, erratum.blame, str(erratum.count), documented


# ---- Markdown --------------------------------------------------------------------------------------------------------


def errata_as_markdown(findings: Findings, errata: Sequence[Erratum], about: About | None = None) -> str:
    """Return `errata.md`: what the policy does, what it was tried on, a table, then a section an erratum."""
    title = _title(findings)
    lines = [title, "=" * len(title), "", *textwrap.wrap(_introduction(findings, f"`{findings.policy}`"), 115), ""]
    lines += _about_markdown(about) if about is not None else []
    if not errata:
        return "\n".join([*lines, "Nothing was found, and the policy documents no limitation.", ""])
    lines += [f"| {' | '.join(_COLUMNS)} |", "|---|---|---|---|---:|---|"]
    lines += [f"| {' | '.join(_cell(text) for text in _row(erratum))} |" for erratum in errata]
    for erratum in errata:
        heading = f"{erratum.id}: {erratum.title}"
        lines += ["", heading, "-" * len(heading), ""]
        lines += [f"* **{name}.** {text}" for name, text in _facts(erratum, findings)]
    return "\n".join([*lines, ""])


def _about_markdown(about: About) -> list[str]:
    lines = [about.summary, ""]
    lines += [f"* **{name}.** {text}" for name, text in about.parts.items()]
    for heading, rows in _tables(about):
        lines += ["", f"| {heading} | value |", "|---|---|", *(f"| {_cell(a)} | {_cell(b)} |" for a, b in rows)]
    return [*lines, ""]


def _tables(about: About) -> list[tuple[str, list[tuple[str, str]]]]:
    fields = [(f"{name}: {doc}" if doc else name, value) for name, value, doc in about.fields]
    tables = [("policy", fields), ("KVM", list(about.controls)), ("machine", list(about.configuration))]
    return [(name, rows) for name, rows in tables if rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# ---- reStructuredText ------------------------------------------------------------------------------------------------


def errata_as_rst(findings: Findings, errata: Sequence[Erratum], about: About | None = None) -> str:
    """Return `errata.rst`: the page as Documentation/virt/kvm/arm/ would hold it, ready for a patch."""
    title = _title(findings)
    lines = [".. SPDX-License-Identifier: GPL-2.0", "", "=" * len(title), _escaped(title), "=" * len(title), ""]
    lines += [*_wrapped(_introduction(findings, f"``{findings.policy}``"), escape=False), ""]
    if about is not None:
        lines += _about_rst(about)
    lines += ["Summary", "=======", ""]
    if not errata:
        return "\n".join([*lines, "Nothing was found, and the policy documents no limitation.", ""])
    lines += _list_table([_COLUMNS, *(_row(erratum) for erratum in errata)])
    lines += ["Errata", "======"]
    for erratum in errata:
        heading = _escaped(f"{erratum.id}: {erratum.title}")
        lines += ["", heading, "-" * len(heading), ""]
        for name, text in _facts(erratum, findings):
            lines += [f":{name}:", *_wrapped(text, indent="    ")]
    if about is not None and about.version:
        lines += ["", ".. " + f"Generated by spepolicy {about.version}; counts are of the simulation described above."]
    return "\n".join([*lines, ""])


def _about_rst(about: About) -> list[str]:
    lines = ["Policy", "======", "", *_wrapped(about.summary), ""]
    for name, text in about.parts.items():
        lines += [f"{name}:", *_wrapped(text, indent="    "), ""]
    for heading, rows in _tables(about):
        name = {"policy": "Settings of the policy", "KVM": "Set-up of KVM", "machine": "Machine and guest"}[heading]
        lines += [name, "-" * len(name), "", *_list_table([("Setting", "Value"), *rows])]
    return lines


def _list_table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [".. list-table::", "    :header-rows: 1", ""]
    for row in rows:
        for number, cell in enumerate(row):
            first, *rest = _wrapped(cell, width=_WIDTH - 8) or ["\\"]
            lines.append(f"    {'*' if number == 0 else ' '} - {first}")
            lines += [f"        {line}" for line in rest]
    return [*lines, ""]


def _escaped(text: str) -> str:
    """Return *text* so that reStructuredText shows it as it is."""
    text = re.sub(r"([\\*`|])", r"\\\1", text)
    return re.sub(r"_(?=\W|$)", r"\\_", text)


def _wrapped(text: str, *, indent: str = "", width: int = _WIDTH, escape: bool = True) -> list[str]:
    """Return the lines of a paragraph. None may begin like a list, a field or a directive."""
    lines = textwrap.wrap(
        _escaped(text) if escape else text, width - len(indent), break_long_words=False, break_on_hyphens=False
    )
    safe = [re.sub(r"^([-+:.(]|\d+[.)]|[A-Za-z]+[.)] )", r"\\\1", line) for line in lines]  # "O. Upton" is no list
    return [indent + line for line in safe]


# ---- a sweep ---------------------------------------------------------------------------------------------------------


def errata_matrix(
    runs: Iterable[tuple[str, int, Sequence[Erratum]]],
) -> tuple[list[str], list[tuple[str, int, dict[str, str]]]]:
    """Return (erratum ids, rows) of policy by SPE version by erratum.

    *runs*: policy (or configuration), PMSVer, errata. A row is (policy, PMSVer, cells by id): the number of
    occurrences, summed over runs of the same policy and version; "documented" if it is declared and was not seen. An
    id without a cell was neither.
    """
    table: dict[tuple[str, int], dict[str, tuple[int, bool]]] = {}
    ids: list[str] = []
    for policy, version, errata in runs:
        cells = table.setdefault((policy, version), {})
        for erratum in errata:
            if erratum.id not in ids:
                ids.append(erratum.id)
            count, documented = cells.get(erratum.id, (0, False))
            cells[erratum.id] = (count + erratum.count, documented or erratum.documented)
    ids.sort(key=lambda name: [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("-")])
    rows = []
    for (policy, version), cells in table.items():
        seen = {name: str(count) for name, (count, _) in cells.items() if count}
        declared = {name: "documented" for name, (_, known) in cells.items() if known}
        rows.append((policy, version, declared | seen))
    return ids, rows


def matrix_as_markdown(runs: Iterable[tuple[str, int, Sequence[Erratum]]]) -> str:
    """Return the table of `errata_matrix` as Markdown; "-" where an erratum was neither seen nor documented."""
    ids, rows = errata_matrix(runs)
    lines = [f"| policy | SPE | {' | '.join(ids)} |", f"|---|---|{'---:|' * len(ids)}"]
    for policy, version, cells in rows:
        name = _VERSION_NAMES.get(version, str(version))
        lines.append(f"| {_cell(policy)} | {name} | {' | '.join(cells.get(each, '-') for each in ids)} |")
    return "\n".join([*lines, ""]) if ids else "No erratum was seen, and none is documented.\n"


def plain(value: Any) -> str:
    """Return a setting's value as a page shows it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
