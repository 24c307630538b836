"""Check one value, or one group of values, against `spepolicy.schema`.

Every error says which key, its value, the rule and where it comes from, and the nearest value or name that is valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spepolicy.errors import ConfigurationError, nearest
from spepolicy.schema import MISSING, Kind, Setting, settings_of
from spepolicy.units import format_duration, format_size, parse_count, parse_duration, parse_size

__all__ = ["check_flags_given", "checked", "checked_fields", "group_at", "known_keys", "value_at"]


def checked(value: Any, setting: Setting, key: str) -> Any:
    """Return *value* in base units (ps, bytes, or as it is) if it obeys *setting*.

    *key* is its full name. Raises `ConfigurationError`.
    """
    if setting.kind is Kind.FLAG:
        if not isinstance(value, bool):
            raise ConfigurationError(f"{key}={value}: not true or false. Write {key}=true or {key}=false.")
        return value
    if setting.kind is Kind.TEXT:
        if not isinstance(value, str) or not value.strip():
            raise ConfigurationError(f"{key}={value}: not text. It must name {setting.doc}.")
        return value
    if setting.kind is Kind.NAMES:
        if not isinstance(value, list | tuple):
            raise ConfigurationError(f"{key}={value}: not a list. Write {key}=[{value}].")
        return [_choice(item, setting, key) for item in value]
    if setting.kind is Kind.CHOICE:
        return _choice(value, setting, key)
    return _in_range(value, setting, key)


def _choice(value: Any, setting: Setting, key: str) -> str:
    if not isinstance(value, str) or (setting.choices and value not in setting.choices):
        raise ConfigurationError(f"{key}={value}: must be {setting.rule()}.{nearest(str(value), setting.choices)}")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigurationError(f"{key}={value}: not a finite number. Write it without unit, for example {key}=1.5.")
    return float(value)


_PARSE: Mapping[Kind, Callable[[Any, str], Any]] = {
    Kind.DURATION: parse_duration,
    Kind.SIZE: parse_size,
    Kind.COUNT: parse_count,
    Kind.NUMBER: _number,
}
_PRINT: Mapping[Kind, Callable[[Any], str]] = {
    Kind.DURATION: format_duration,
    Kind.SIZE: format_size,
    Kind.COUNT: str,
    Kind.NUMBER: "{:g}".format,
}


def _in_range(value: Any, setting: Setting, key: str) -> int | float:
    parse = _PARSE[setting.kind]
    number: int | float = parse(value, key)
    if number == 0 and setting.zero:
        return number
    low = -math.inf if setting.minimum is None else parse(setting.minimum, key)
    high = math.inf if setting.maximum is None else parse(setting.maximum, key)
    step = 1 if setting.multiple_of == 1 else parse(setting.multiple_of, key)
    if number < low:
        problem, valid = "too small", low
    elif number > high:
        problem, valid = "too large", high
    elif setting.power_of_two and number & (number - 1):  # type: ignore[operator]  # counts and sizes are integers
        problem, valid = "not a power of two", min(1 << int(number).bit_length(), high)
    elif step != 1 and number % step:
        problem, valid = f"not a multiple of {setting.multiple_of}", min(-(-number // step) * step, high)
    else:
        return number
    shown = _PRINT[setting.kind](valid)
    raise ConfigurationError(
        f"{key}={value}: {problem}. {setting.doc[0].upper()}{setting.doc[1:]} must be {setting.rule()} "
        f"(source: {setting.source}). The nearest valid value is {key}={shown}."
    )


def value_at(config: Mapping[str, Any], key: str, prefix: str = "") -> Any:
    """Return the value at *key*, or raise a `ConfigurationError` that names it *prefix* + *key*."""
    if config.get(key, MISSING) == MISSING:
        raise ConfigurationError(f"{prefix}{key} is missing. Set {prefix}{key}=VALUE; conf/config.yaml has a default.")
    return config[key]


def group_at(config: Mapping[str, Any], key: str, prefix: str = "") -> Mapping[str, Any]:
    """Return the group of settings at *key*, or raise a `ConfigurationError`."""
    group = value_at(config, key, prefix)
    if not isinstance(group, Mapping):
        raise ConfigurationError(
            f"{prefix}{key}={group}: not a group of settings. Set one of its settings, {prefix}{key}.NAME=VALUE, "
            f"or choose a file with {key}=NAME; --help lists the files."
        )
    return group


def known_keys(values: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raise a `ConfigurationError` for a key that is not among *known*; *where* is the group's name or empty."""
    for key in values:
        if key not in known:
            raise ConfigurationError(
                f"{where}{'.' if where else ''}{key}: there is no such setting.{nearest(str(key), known)} "
                f"Known: {', '.join(known)}."
            )


def checked_fields(
    values: Mapping[str, Any], cls: type, where: str, *, special: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return what the group *values* gives for the fields of a dataclass of `spepolicy.machine.scenario`.

    *cls* is the group's schema and *where* its name. Settings in *special* may be there and are left to the caller.
    Sizes and times are in the unit of the field (`Setting.per`).
    """
    settings = settings_of(cls)
    known_keys(values, {**settings, **dict.fromkeys(special)}, where)
    result = {}
    for name, setting in settings.items():
        if name in special:
            continue
        key = f"{where}.{name}"
        value = checked(value_at(values, name, f"{where}."), setting, key)
        if setting.to:
            result[setting.to] = value // setting.per if setting.per != 1 else value
    return result


def check_flags_given(cfg: Any, overrides: Sequence[Any]) -> None:
    """Reject a number for a true-or-false setting on the command line: OmegaConf would take any but 0 for true.

    *overrides*: Hydra's parsed overrides, which have been applied to *cfg*.
    """
    from omegaconf import BooleanNode, Container, OmegaConf

    for override in overrides:
        key = override.key_or_group
        parent = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else cfg
        given = override.value()
        if not isinstance(parent, Container) or isinstance(given, bool) or not isinstance(given, int | float):
            continue
        if isinstance(parent._get_node(key.rpartition(".")[2]), BooleanNode):
            raise ConfigurationError(f"{key}={given}: not true or false. Write {key}=true or {key}=false.")
