"""Parse and print quantities with units: every configuration value that has a unit passes here.

Times become integer picoseconds and sizes integer bytes, exactly: a value that is not a whole number of these is an
error, since the machine knows integers only. Each error is a `ConfigurationError` that names the key, the value, the
rule and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

from spepolicy.errors import ConfigurationError

__all__ = [
    "DURATION_UNITS",
    "SIZE_UNITS",
    "format_count",
    "format_duration",
    "format_size",
    "parse_count",
    "parse_duration",
    "parse_size",
]

DURATION_UNITS: Mapping[str, int] = {  # picoseconds
    "ps": 1,
    "ns": 10**3,
    "us": 10**6,
    "ms": 10**9,
    "s": 10**12,
    "min": 60 * 10**12,
}
SIZE_UNITS: Mapping[str, int] = {  # bytes
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

_QUANTITY = re.compile(r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))(?P<unit>[^0-9.].*)?")
_NOT_FINITE = re.compile(r"[+-]?(?:inf|infinity|nan)[a-z]*", re.IGNORECASE)
# What people write instead, and may have meant; powers of ten are refused rather than guessed at.
_MEANT: Mapping[str, tuple[str, ...]] = {
    "µs": ("us",),
    "μs": ("us",),
    "usec": ("us",),
    "nsec": ("ns",),
    "msec": ("ms",),
    "sec": ("s",),
    "m": ("ms", "MiB"),
    "k": ("KiB",),
    "kb": ("KiB",),
    "mb": ("MiB",),
    "g": ("GiB",),
    "gb": ("GiB",),
    "t": ("TiB",),
    "tb": ("TiB",),
    "byte": ("B",),
    "bytes": ("B",),
}


def parse_duration(value: object, key: str) -> int:
    """Return the picoseconds that *value* means, 0 or more: "500ms", "1.5us", "2s"; "0" needs no unit.

    *key* is the name of the setting, for the message. Raises `ConfigurationError` for a missing or wrong unit, and for
    a number that is negative, not finite, or not a whole number of picoseconds.
    """
    return _parsed_duration(value, key) if isinstance(value, str) else _duration(value, key)


def parse_size(value: object, key: str) -> int:
    """Return the bytes that *value* means, 0 or more: "64B", "128KiB", "4MiB"; "0" needs no unit.

    Units are powers of two only, so that 4MB cannot be mistaken. Errors as in `parse_duration`.
    """
    return _parsed_size(value, key) if isinstance(value, str) else _size(value, key)


def _duration(value: object, key: str) -> int:
    return _parse(value, key, "duration", DURATION_UNITS, "ps", "1.5us")


def _size(value: object, key: str) -> int:
    return _parse(value, key, "size", SIZE_UNITS, "B", "4MiB")


# The jobs of a sweep say the same texts thousands of times, and so do the bounds of the schema.
_parsed_duration = lru_cache(maxsize=4096)(_duration)
_parsed_size = lru_cache(maxsize=4096)(_size)


def parse_count(value: object, key: str) -> int:
    """Return *value*, a whole number of 0 or more without unit, given as an integer or as digits ("1_000" is 1000)."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(?:_[0-9]+)*", value):
        number = int(value)
    else:
        raise ConfigurationError(f"{key}={value}: not a count. A count is a whole number without unit, like {key}=16.")
    if number < 0:
        raise ConfigurationError(f"{key}={value}: negative. A count is 0 or more, for example {key}={-number}.")
    return number


def format_duration(ps: int) -> str:
    """Print *ps* picoseconds in the largest unit that needs no more than three decimals; exact, so it parses back."""
    return _format(ps, {unit: scale for unit, scale in DURATION_UNITS.items() if unit != "min"})


def format_size(size_bytes: int) -> str:
    """Print *size_bytes* in the largest unit that needs no more than three decimals; exact, so it parses back."""
    return _format(size_bytes, SIZE_UNITS)


def format_count(count: int) -> str:
    """Print *count* with a comma between thousands."""
    return f"{count:,}"


def _parse(value: object, key: str, noun: str, units: Mapping[str, int], smallest: str, example: str) -> int:
    rule = f"A {noun} is a number directly followed by {_listed(units)}, for example {key}={example}."
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigurationError(f"{key}={value}: not a {noun}. {rule}")
    text = str(value).strip()
    if _NOT_FINITE.fullmatch(text):
        raise ConfigurationError(f"{key}={value}: not finite. {rule}")
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ConfigurationError(f"{key}={value}: not a {noun}. {rule}")
    number, unit = Fraction(match["number"]), match["unit"]
    if number < 0:
        raise ConfigurationError(f"{key}={value}: negative. A {noun} is 0 or more, like {key}={text.lstrip('-')}.")
    if unit is None:
        if number == 0:
            return 0
        raise ConfigurationError(f"{key}={value}: the unit is missing. {rule}")
    if unit not in units:
        raise ConfigurationError(f"{key}={value}: unknown unit '{unit}'. {rule}{_meant(unit, units, match['number'])}")
    exact = number * units[unit]
    if exact.denominator != 1:
        raise ConfigurationError(
            f"{key}={value}: finer than 1 {smallest}, the resolution. Use a whole number of {smallest}, "
            f"for example {key}={max(1, round(exact))}{smallest}."
        )
    return int(exact)


def _meant(unit: str, units: Mapping[str, int], number: str) -> str:
    unit = unit.strip().casefold()
    exact = {known.casefold(): known for known in units}
    guesses = (exact.get(unit, ""), *_MEANT.get(unit, ()))
    return next((f" Did you mean {number}{guess}?" for guess in guesses if guess in units), "")


def _listed(units: Mapping[str, int]) -> str:
    names = list(units)
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _format(amount: int, units: Mapping[str, int]) -> str:
    smallest = next(iter(units))
    if amount == 0:
        return "0"
    for unit, scale in sorted(units.items(), key=lambda item: -item[1]):
        thousandths, rest = divmod(amount * 1000, scale)
        if abs(amount) >= scale and rest == 0:
            text = f"{'-' if thousandths < 0 else ''}{abs(thousandths) // 1000}.{abs(thousandths) % 1000:03d}"
            return f"{text.rstrip('0').rstrip('.')}{unit}"
    return f"{amount}{smallest}"
