"""A case of the catalogue: what is set up, and what each policy may show, lose and tell (tests/catalogue/README.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from spepolicy.errors import ConfigurationError, nearest

__all__ = [
    "ANSWERED", "BASE", "DRIVERS", "EVENTS", "GUEST", "RECORDS", "Case", "Never", "OutOfScope", "Verdict", "read_case",
    "read_catalogue",
]  # fmt: skip

FOLDER = "spepolicy_catalogue"  # tests/catalogue of the sources
INDEX = "index.yaml"

EVENTS = ("stage1", "stage2", "external", "impdef")
"""Errors that a policy may tell the guest, besides a full buffer."""

RECORDS = ("lost", "discarded", "cut", "diverged", "unlogged")
"""What may befall records: not written; written and thrown away because of DL, or dropped in discard mode; the stream
goes on behind a cut record and the guest does not know; written to a page that the VMM no longer shows, or not for
writing; written to a page of which the dirty log does not tell, so that a migration's target lacks them."""

GUEST = ("fatal", "silent", "truncated", "dead", "reported")
"""What becomes of the guest's session: its driver switches SPE off; that without any AUX flag, so that perf does not
know; a handle is closed with PERF_AUX_FLAG_TRUNCATED; the VM ends; a side channel reports the blackout."""

ANSWERED = tuple(f"E{n}" for n in range(1, 13))
DRIVERS = ("linux", "freebsd", "windows")
"""A case with `answer` runs on a policy that gives that answer to every fault, once for each of these drivers; its
verdicts name drivers in place of policies."""

BASE = (
    "guest.memory=16MiB", "guest.buffer=64KiB", "guest.buffer_mapped=true", "guest.task_on=1s", "guest.task_off=1us",
    "guest.period=1024", "guest.reader_latency=1us", "kvm=quiet", "host=silent", "duration=3ms", "tracking=none",
)  # fmt: skip
"""The machine of every case: a small VM that nothing disturbs, and a perf that reads at once."""


@dataclass(frozen=True)
class Verdict:
    """What some policies must do in a case. None: the sources say nothing, and what is seen is only reported."""

    policies: tuple[str, ...]  # names or classes of the index; "others": all that no verdict of the case names
    because: str  # reason and source
    blackout: tuple[str, ...] | None = None  # causes of it beyond a full buffer and a full ring: exactly these
    tells: tuple[str, ...] | None = None  # of EVENTS, exactly
    may_tell: tuple[str, ...] | None = None  # of EVENTS: these are allowed, the others are not
    records: tuple[str, ...] | None = None  # of RECORDS, exactly
    guest: tuple[str, ...] | None = None  # of GUEST, exactly
    errata: tuple[str, ...] | None = None  # at least these
    versions: tuple[int, ...] = ()  # ID_AA64DFR0_EL1.PMSVer values that it is about; none: all of the case
    deviation: str = ""  # the policy does what the case forbids, and that is known: why, and who says so


@dataclass(frozen=True)
class Never:
    """What the architecture forbids to every policy."""

    tells: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    versions: tuple[int, ...] = ()  # that forbid it; none: all of the case


@dataclass(frozen=True)
class Case:
    """One scenario file."""

    id: str  # of the row in kvm.md 4
    title: str
    source: str
    story: str
    set: tuple[str, ...]  # overrides of the configuration, on top of BASE
    versions: tuple[int, ...]  # ID_AA64DFR0_EL1.PMSVer
    never: Never
    verdicts: tuple[Verdict, ...]
    fields: Mapping[str, Mapping[str, Any]]  # policy -> fields that it has in this case
    answer: str = ""  # of ANSWERED, for a case about what the guest is told; see DRIVERS


@dataclass(frozen=True)
class OutOfScope:
    """A row that the catalogue does not run."""

    id: str
    title: str
    why: str


def _wrong(where: str, problem: str, rule: str) -> ConfigurationError:
    return ConfigurationError(f"catalogue {where}: {problem}. Rule: {rule}")


def _names(where: str, key: str, value: Any, allowed: tuple[str, ...]) -> tuple[str, ...]:
    listed = value.split() if isinstance(value, str) else list(value or ())
    for name in listed:
        if name not in allowed:
            raise _wrong(where, f"{key} has '{name}'", f"of {', '.join(allowed)}.{nearest(str(name), allowed)}")
    return tuple(listed)


def _keys(where: str, content: Any, known: tuple[str, ...], needed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _wrong(where, f"is {content!r:.40}", f"a mapping with {', '.join(known)}.")
    for key in content:
        if key not in known:
            raise _wrong(where, f"has '{key}'", f"of {', '.join(known)}.{nearest(str(key), known)}")
    for key in needed:
        if not content.get(key):
            raise _wrong(where, f"has no {key}", f"{', '.join(needed)} are needed.")
    return content


def _host(where: str, operations: Mapping[str, str]) -> list[str]:
    """Return overrides for a host that does only *operations*: name -> "INTERVAL PAGES"."""
    from spepolicy.machine.hostops import HostOp

    if not operations:
        return []
    known = tuple(op.name.lower() for op in HostOp if op)
    _names(where, "host", list(operations), known)
    words = ["host=random"]
    for name in known:
        every, _, pages = str(operations.get(name, "0 1")).partition(" ")
        words += [f"host.ops.{name}.every={every}", f"host.ops.{name}.pages={pages}"]
    return words


def _verdict(where: str, content: Any, classes: Mapping[str, tuple[str, ...]], causes: tuple[str, ...]) -> Verdict:
    known = tuple(field.name for field in fields(Verdict))
    entry = _keys(where, content, known, ("policies", "because"))
    expanded: list[str] = []
    for name in str(entry["policies"]).split():
        expanded += classes.get(name, (name,))
    allowed = {"blackout": causes, "tells": EVENTS, "may_tell": EVENTS, "records": RECORDS, "guest": GUEST}
    judged: dict[str, Any] = {
        key: _names(where, key, entry[key], names) for key, names in allowed.items() if key in entry
    }
    if "errata" in entry:
        judged["errata"] = tuple(str(entry["errata"] or "").split())
    judged["versions"] = tuple(int(version) for version in entry.get("versions") or ())
    deviation = str(entry.get("deviation") or "")
    return Verdict(tuple(expanded), str(entry["because"]), deviation=deviation, **judged)


def read_case(text: str, where: str, classes: Mapping[str, tuple[str, ...]]) -> Case:
    """Return the case in *text*. *classes*: of the index. Raise ConfigurationError that names what is wrong *where*."""
    import yaml

    from spepolicy.machine.state import LostCause

    causes = tuple(cause.name.lower() for cause in LostCause)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _wrong(where, f"is not YAML: {error}", "see tests/catalogue/README.md.") from error
    known = ("id", "title", "source", "story", "set", "host", "versions", "never", "fields", "answer", "verdicts")
    entry = _keys(where, content, known, ("id", "title", "source", "story", "verdicts"))
    versions = tuple(int(version) for version in entry.get("versions") or (1,))
    verdicts = tuple(_verdict(where, verdict, classes, causes) for verdict in entry["verdicts"])
    never = _never(where, entry.get("never") or {})
    for judged in (*(verdict.versions for verdict in verdicts), never.versions):
        stray = sorted(set(judged) - set(versions))
        if stray:
            raise _wrong(where, f"judges version {stray[0]}", f"the case runs with {versions}.")
    answer = str(entry.get("answer") or "")
    if answer:
        _names(where, "answer", answer, ANSWERED)
    return Case(
        id=str(entry["id"]),
        title=str(entry["title"]),
        source=str(entry["source"]),
        story=" ".join(str(entry["story"]).split()),
        set=(*(str(word) for word in entry.get("set") or ()), *_host(where, entry.get("host") or {})),
        versions=versions,
        never=never,
        verdicts=verdicts,
        fields={
            policy: dict(values) for names, values in (entry.get("fields") or {}).items() for policy in names.split()
        },
        answer=answer,
    )


def _never(where: str, content: Any) -> Never:
    if not content:
        return Never()
    entry = _keys(where, content, ("tells", "records", "versions"), ())
    return Never(
        tells=_names(where, "never.tells", entry.get("tells"), EVENTS),
        records=_names(where, "never.records", entry.get("records"), RECORDS),
        versions=tuple(int(version) for version in entry.get("versions") or ()),
    )


def read_catalogue() -> tuple[list[Case], list[OutOfScope]]:
    """Return every case of the installed catalogue, in the order of the index, and the rows that it leaves out.

    Raise ConfigurationError for a file that is wrong, and for one that the index does not name.
    """
    import yaml

    folder = files(FOLDER)
    index = yaml.safe_load(folder.joinpath(INDEX).read_text(encoding="utf-8"))
    classes = {name: tuple(str(value).split()) for name, value in index["classes"].items()}
    cases = []
    for name in index["cases"]:
        text = folder.joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        cases.append(read_case(text, f"{name}.yaml", classes))
    there = {item.name for item in folder.iterdir() if item.name.endswith(".yaml")}
    stray = sorted(there - {f"{name}.yaml" for name in index["cases"]} - {INDEX})
    if stray:
        raise _wrong(INDEX, f"does not name {', '.join(stray)}", "every scenario file is in its list.")
    left_out = [OutOfScope(str(row["id"]), str(row["title"]), str(row["why"])) for row in index["out_of_scope"]]
    return cases, left_out
