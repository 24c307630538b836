"""Scenario files: a trace that can be run again, under any policy, with the verdict that is expected. See README.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from spepolicy.errors import ConfigurationError, nearest
from spepolicy.explore.acts import Act, Event, event_name, parse_event
from spepolicy.explore.bench import Bench
from spepolicy.explore.model import Settings, make_model
from spepolicy.explore.properties import PROPERTIES
from spepolicy.explore.trace import Replay, replay
from spepolicy.machine.hostops import Backing, Kernel
from spepolicy.machine.scenario import Bug, Cpu, Handling, IrqDelivery, MigrationKind

__all__ = ["Scenario", "Verdict", "read", "run", "write"]

_ENUMS: Mapping[str, type[IntEnum]] = {
    "irq_delivery": IrqDelivery,
    "bug": Bug,
    "backing": Backing,
    "kernel": Kernel,
    "migration": MigrationKind,
    "handling": Handling,
}
_KEYS = ("name", "title", "source", "initial", "events", "repeats", "verdicts")


@dataclass(frozen=True)
class Verdict:
    """What is expected of one policy."""

    policy: str
    breaks: tuple[str, ...]  # names of properties; empty: all hold
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the policy's dataclass, where they are not defaults


@dataclass(frozen=True)
class Scenario:
    """One scenario file."""

    name: str
    title: str
    source: str
    settings: Settings
    events: tuple[str, ...]  # names as `acts.event_name` gives them
    verdicts: tuple[Verdict, ...] = ()
    repeats: int = 0  # the last so many events are a cycle


def _error(where: str, problem: str, rule: str) -> ConfigurationError:
    return ConfigurationError(f"scenario {where}: {problem}. Rule: {rule}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _settings_as_dict(settings: Settings) -> dict[str, Any]:
    """Return what of *settings* is not the default."""
    standard = Settings()
    changed: dict[str, Any] = {}
    for item in fields(Settings):
        value, default = getattr(settings, item.name), getattr(standard, item.name)
        if value == default:
            continue
        if item.name == "cpu":
            changed["cpu"] = {key: v for key, v in asdict(value).items() if v != getattr(default, key)}
        elif item.name in _ENUMS:
            changed[item.name] = value.name.lower()
        else:
            changed[item.name] = _plain(value)
    return changed


def _settings_from(initial: Mapping[str, Any], where: str) -> Settings:
    known = {item.name: item for item in fields(Settings)}
    values: dict[str, Any] = {}
    for key, value in initial.items():
        if key not in known:
            raise _error(where, f"initial.{key} is unknown", f"one of {', '.join(known)}.{nearest(key, known)}")
        if key == "cpu":
            cpu_fields = {item.name for item in fields(Cpu)}
            if unknown := set(value) - cpu_fields:
                raise _error(where, f"initial.cpu has {sorted(unknown)}", f"of {', '.join(sorted(cpu_fields))}.")
            values["cpu"] = replace(Cpu(), **value)
        elif key in _ENUMS:
            try:
                values[key] = _ENUMS[key][str(value).upper()]
            except KeyError:
                names = ", ".join(member.name.lower() for member in _ENUMS[key])
                raise _error(where, f"initial.{key} is {value}", f"one of {names}.") from None
        else:
            default = known[key].default
            expected = tuple if isinstance(default, tuple) else type(default) if default is not MISSING else object
            value = tuple(value) if isinstance(value, list) else value
            if not isinstance(value, expected):
                raise _error(where, f"initial.{key} is {value!r}", f"of the type {expected.__name__}.")
            values[key] = value
    return Settings(**values)


def read(path: Path) -> Scenario:
    """Return the scenario in *path*; raise ConfigurationError that says what is wrong in it."""
    import yaml

    where = f"'{path.name}'"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _error(where, f"cannot be read: {error.strerror}", "a file that exists.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _error(where, f"is not YAML: {error}", "see spepolicy/explore/README.md.") from error
    if not isinstance(content, dict):
        raise _error(where, "is not a mapping", f"keys {', '.join(_KEYS)}.")
    for key in content:
        if key not in _KEYS:
            raise _error(where, f"has '{key}'", f"keys are {', '.join(_KEYS)}.{nearest(str(key), _KEYS)}")
    for key in ("name", "source", "events"):
        if not content.get(key):
            raise _error(where, f"has no '{key}'", "a scenario has a name, a source and events.")
    names = [p.name for p in PROPERTIES]
    verdicts = []
    for entry in content.get("verdicts") or ():
        breaks = tuple(entry.get("breaks") or ())
        for name in breaks:
            if name not in names:
                raise _error(where, f"breaks '{name}'", f"one of {', '.join(names)}.{nearest(str(name), names)}")
        verdicts.append(Verdict(str(entry["policy"]), breaks, dict(entry.get("fields") or {})))
    return Scenario(
        name=str(content["name"]),
        title=str(content.get("title") or content["name"]),
        source=str(content["source"]),
        settings=_settings_from(content.get("initial") or {}, where),
        events=tuple(str(event) for event in content["events"]),
        verdicts=tuple(verdicts),
        repeats=int(content.get("repeats") or 0),
    )


def write(scenario: Scenario) -> str:
    """Return *scenario* as the text of a file."""
    import yaml

    content: dict[str, Any] = {
        "name": scenario.name,
        "title": scenario.title,
        "source": scenario.source,
        "initial": _settings_as_dict(scenario.settings),
        "events": list(scenario.events),
    }
    if scenario.repeats:
        content["repeats"] = scenario.repeats
    content["verdicts"] = [
        {"policy": v.policy} | ({"fields": dict(v.fields)} if v.fields else {}) | {"breaks": list(v.breaks)}
        for v in scenario.verdicts
    ]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def events_of(scenario: Scenario, events: tuple[Event, ...]) -> list[Event]:
    """Return the events of *scenario* among those of its model; raise ConfigurationError for one that is not there."""
    found = []
    for name in scenario.events:
        event = Event(Act.VM_END) if name == Act.VM_END.name.lower() else parse_event(name, events)
        if event is None:
            known = [event_name(e) for e in events]
            raise _error(
                f"'{scenario.name}'",
                f"event '{name}' is not among those of its initial state",
                f"one of {', '.join(known)}.{nearest(name, known)}",
            )
        found.append(event)
    return found


def run(scenario: Scenario | Path, policy: object, name: str | None = None) -> Replay:
    """Run a scenario, or the file of one, under *policy*, an instance, and return what happened.

    An event that cannot happen under this policy is left out, and its step says so. `Replay.broken()` gives the
    properties that were broken.
    """
    if isinstance(scenario, Path):
        scenario = read(scenario)
    model = make_model(scenario.settings, policy, name or type(policy).__name__)
    return replay(Bench(model, 1), events_of(scenario, model.events), scenario.repeats)
