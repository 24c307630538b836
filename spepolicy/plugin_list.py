"""`python -m spepolicy task=plugins`: what is installed, from where, and what cannot be used."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib.metadata import entry_points

from spepolicy.plugins import POLICIES, PROJECT, REPORTERS, broken_plugins, installed_policies, installed_reporters

__all__ = ["PluginRow", "plugin_rows", "plugin_table"]


@dataclass(frozen=True)
class PluginRow:
    """One entry point of the groups `spepolicy.policies` and `spepolicy.reporters`."""

    kind: str  # "policy" or "reporter"
    name: str
    distribution: str
    version: str
    hooks: tuple[str, ...]  # that it implements, in alphabetical order
    origin: str  # module and object of the entry point
    problem: str  # why it cannot be used, or empty


def plugin_rows() -> list[PluginRow]:
    """Return every installed plugin, policies first, by name; those that cannot be used among them."""
    broken = broken_plugins()
    policies = {name: info.cls for name, info in installed_policies().items()}
    loaded: dict[str, dict[str, object]] = {POLICIES: {**policies}, REPORTERS: installed_reporters()}
    rows = []
    for group, kind in ((POLICIES, "policy"), (REPORTERS, "reporter")):
        for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
            plugin = loaded[group].get(point.name)
            rows.append(
                PluginRow(
                    kind=kind,
                    name=point.name,
                    distribution=point.dist.name if point.dist else "unknown",
                    version=point.dist.version if point.dist else "?",
                    hooks=_hooks(plugin),
                    origin=point.value,
                    problem="" if plugin is not None else broken.get(f"{group}: {point.name}", "not loaded"),
                )
            )
    return rows


def _hooks(plugin: object) -> tuple[str, ...]:
    """Return the names of the hooks that *plugin*, a class or an instance, implements."""
    marked = inspect.getmembers(plugin, lambda member: hasattr(member, f"{PROJECT}_impl"))
    return tuple(name for name, _ in marked)


def plugin_table() -> str:
    """Return the list for people: a line each, hooks below it, and then what is wrong."""
    rows = plugin_rows()
    width = max((len(row.name) for row in rows), default=0)
    sources = max((len(f"{row.distribution} {row.version}") for row in rows), default=0)
    lines = []
    for row in rows:
        source = f"{row.distribution} {row.version}"
        lines.append(f"{row.kind:8}  {row.name:{width}}  {source:{sources}}  {row.origin}")
        lines.append(f"{'':10}{'problem: ' + row.problem if row.problem else 'hooks: ' + ', '.join(row.hooks)}")
    unusable = sum(bool(row.problem) for row in rows)
    lines.append(f"{len(rows)} plugins, {unusable} of them cannot be used.")
    return "\n".join(lines)
