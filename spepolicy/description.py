"""Read a plain description (mappings, text and numbers, as composed YAML gives them) with errors that name the place.

Every error says where the description stands, which key, its value, the rule and the remedy. Numbers are read as
the decimals that were written, as fractions, so that nothing computed from them depends on the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from spepolicy.errors import ConfigurationError, nearest
from spepolicy.units import format_duration, parse_duration

__all__ = ["SHARE_TOLERANCE", "Node"]

SHARE_TOLERANCE = Fraction(1, 10**6)


@dataclass(frozen=True)
class Node:
    """A value of a description, its key path (empty for the whole), and what to call the description."""

    value: Any
    key: str
    where: str

    @property
    def name(self) -> str:
        """What an error calls this value."""
        return f"'{self.key}'" if self.key else "the description"

    def wrong(self, rule: str, remedy: str) -> ConfigurationError:
        """Return (not raise) the error that this value breaks *rule*."""
        shown = repr(self.value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return ConfigurationError(f"{self.where}: {self.name} is {shown}, but {rule}. {remedy}")

    def child(self, name: str) -> Node:
        """Return the entry *name* of a mapping."""
        return Node(self.value[name], f"{self.key}.{name}" if self.key else name, self.where)

    def entries(self) -> dict[str, Node]:
        """Return the entries of a mapping whose names are free. It must have at least one."""
        if not isinstance(self.value, Mapping):
            raise self.wrong("it must be a mapping of names", "Write 'name: value' lines under it.")
        if not self.value:
            raise self.wrong("it must have at least one entry", "Add one.")
        for name in self.value:
            if not isinstance(name, str) or not name:
                raise self.wrong(f"the name {name!r} in it is not text", "Put the name in quotes.")
        return {name: self.child(name) for name in self.value}

    def fields(self, needed: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Node]:
        """Return the entries of a mapping whose names are fixed: all of *needed* and any of *optional*."""
        needed = tuple(needed)
        known = (*needed, *optional)
        entries = self.entries()
        for name, node in entries.items():
            if name not in known:
                raise node.wrong("no such key is known here", f"Known: {', '.join(known)}.{nearest(name, known)}")
        for name in needed:
            if name not in entries:
                raise ConfigurationError(
                    f"{self.where}: {self.name} has no '{name}', but it needs {', '.join(needed)}. Add '{name}'."
                )
        return entries

    def number(self, low: Fraction | int, high: Fraction | int, unit: str) -> Fraction:
        """Return the number, exactly as the decimal that was written, if it lies in [low, high]."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self.wrong(f"it must be a number ({unit})", "Write it without quotes and without a unit.")
        if not low <= self.value <= high:  # NaN too
            raise self.wrong(f"it must be from {_plain(low)} to {_plain(high)} ({unit})", "Check value and unit.")
        return Fraction(self.value) if isinstance(self.value, int) else Fraction(repr(float(self.value)))

    def whole(self, low: int, high: int, unit: str) -> int:
        """Return a whole number in [low, high]."""
        number = self.number(low, high, unit)
        if number.denominator != 1:
            raise self.wrong(f"it must be a whole number ({unit})", f"Write {round(number)}.")
        return int(number)

    def duration(self, low_ps: int, high_ps: int) -> int:
        """Return a duration in ps, in [low_ps, high_ps], from text with a unit such as "2.5us"."""
        try:
            duration_ps = parse_duration(self.value, self.key)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.where}: {error}") from None
        if not low_ps <= duration_ps <= high_ps:
            rule = f"it must be from {format_duration(low_ps)} to {format_duration(high_ps)}"
            raise self.wrong(rule, "Check value and unit.")
        return duration_ps

    def text(self) -> str:
        """Return text that is not empty."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.wrong("it must be text", "Write a sentence.")
        return self.value

    def one_of(self, known: Iterable[str], what: str) -> str:
        """Return a name that is among *known*."""
        known = tuple(known)
        if self.value not in known:
            close = nearest(str(self.value), known)
            raise self.wrong(f"there is no {what} of that name", f"Known: {', '.join(known)}.{close}")
        return str(self.value)

    def shares(self, known: Iterable[str], what: str) -> dict[str, Fraction]:
        """Return shares of things among *known*: they sum to 1 within `SHARE_TOLERANCE`, the result exactly."""
        known = tuple(known)
        for name, node in self.entries().items():
            if name not in known:
                rule = f"there is no {what} of that name"
                raise node.wrong(rule, f"Known: {', '.join(known)}.{nearest(name, known)}")
        shares = {name: node.number(0, 1, "share") for name, node in self.entries().items()}
        total = sum(shares.values(), Fraction(0))
        if abs(total - 1) > SHARE_TOLERANCE:
            raise self.wrong(
                f"its shares sum to {float(total):.7g} and must sum to 1 within {float(SHARE_TOLERANCE):g}",
                f"Change one of them by {float(1 - total):+.7g}.",
            )
        return {name: share / total for name, share in shares.items()}


def _plain(bound: Fraction | int) -> str:
    return str(int(bound)) if bound == int(bound) else f"{float(bound):g}"
