"""The fields of a policy dataclass as its configuration: what they are, and whether given values fit them.

Nothing here imports Hydra, which uses the same dataclass as its schema; so a policy built in Python is checked as one
from the command line is.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from spepolicy.errors import ConfigurationError, PluginError, nearest

__all__ = ["PolicyField", "checked_policy_fields", "fields_of"]

_SCALARS = (bool, int, float, str)
_NO_DEFAULT = object()


@dataclass(frozen=True)
class PolicyField:
    """One field of a policy: its name, type and default, and the metadata that `spepolicy.hookspecs.doc` gives."""

    name: str
    type: Any
    default: Any
    doc: str
    unit: str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    source: str

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is _NO_DEFAULT

    @property
    def type_name(self) -> str:
        """The type as a user reads it."""
        return _type_name(self.type)

    def rule(self) -> str:
        """Describe the allowed values."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if isinstance(self.type, type) and issubclass(self.type, Enum):
            return f"one of {', '.join(self.type.__members__)}"
        if self.type is bool:
            return "true or false"
        unit = f" {self.unit}" if self.unit else ""
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum:g}..{self.maximum:g}{unit}"
        if self.minimum is not None:
            return f"{self.minimum:g}{unit} or more"
        if self.maximum is not None:
            return f"{self.maximum:g}{unit} or less"
        return f"{self.type_name}{f' [{self.unit}]' if self.unit else ''}"


def fields_of(cls: type, plugin: str) -> tuple[PolicyField, ...]:
    """Return the fields of the policy dataclass *cls* in order; *plugin* is its name, for errors.

    Raises `PluginError` for an annotation that cannot be resolved or whose type cannot be configured.
    """
    try:
        hints = get_type_hints(cls)
    except Exception as error:
        raise PluginError(
            f"policy '{plugin}': the type of a field of {cls.__name__} cannot be resolved ({error}). "
            "Types of fields must be importable at run time, not under TYPE_CHECKING only."
        ) from error
    result = []
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        kind = hints[item.name]
        if not _configurable(kind):
            raise PluginError(
                f"policy '{plugin}': field {item.name} has type {_type_name(kind)}, which cannot be configured. Use "
                "bool, int, float, str, an Enum, a list of these, or X | None of one; keep state in State."
            )
        default = item.default
        if item.default_factory is not MISSING:
            default = item.default_factory()
        meta = item.metadata
        result.append(
            PolicyField(
                name=item.name,
                type=kind,
                default=_NO_DEFAULT if default is MISSING else default,
                doc=meta.get("doc", ""),
                unit=meta.get("unit", ""),
                minimum=meta.get("minimum"),
                maximum=meta.get("maximum"),
                choices=tuple(meta.get("choices", ())),
                source=meta.get("source", ""),
            )
        )
    return tuple(result)


def checked_policy_fields(fields: tuple[PolicyField, ...], values: Mapping[str, Any], plugin: str) -> dict[str, Any]:
    """Return *values* as arguments for the policy's constructor.

    Raises `ConfigurationError` for a name that is no field, a value that does not fit, and a missing required field.
    """
    known = {item.name: item for item in fields}
    for name, value in values.items():
        if name not in known:
            have = f"It has {', '.join(known)}." if known else "It has no fields."
            raise ConfigurationError(
                f"policy.{name}={value}: policy '{plugin}' has no field of that name. {have}{nearest(str(name), known)}"
            )
    for item in fields:
        if item.required and item.name not in values:
            raise ConfigurationError(
                f"policy.{item.name} is missing: policy '{plugin}' has no default for it. "
                f"Set policy.{item.name}=VALUE, {item.rule()}."
            )
    return {name: _checked(known[name], value) for name, value in values.items()}


def _checked(item: PolicyField, value: Any) -> Any:
    key = f"policy.{item.name}"
    value = _typed(item, item.type, value, key)
    for element in value if isinstance(value, list) else [value]:
        if item.choices and element is not None and str(element) not in item.choices:
            raise ConfigurationError(
                f"{key}={element}: must be {item.rule()}.{nearest(str(element), item.choices)}{_about(item)}"
            )
        if isinstance(element, int | float) and not isinstance(element, bool | Enum):
            _check_range(item, element, key)
    return value


def _check_range(item: PolicyField, value: float, key: str) -> None:
    if not math.isfinite(value):
        raise ConfigurationError(f"{key}={value}: not finite. It must be {item.rule()}.{_about(item)}")
    for bound, wrong in ((item.minimum, "too small"), (item.maximum, "too large")):
        if bound is not None and (value < bound if wrong == "too small" else value > bound):
            raise ConfigurationError(
                f"{key}={value}: {wrong}. It must be {item.rule()}; the nearest valid value is {key}={bound:g}."
                f"{_about(item)}"
            )


def _typed(item: PolicyField, kind: Any, value: Any, key: str) -> Any:
    """Return *value* as *kind*, which must be exact but for int to float and the names of Enum members."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [part for part in get_args(kind) if part is not type(None)]
        return _typed(item, inner, value, key)
    if origin is list:
        if isinstance(value, list | tuple):
            return [_typed(item, get_args(kind)[0], element, key) for element in value]
    elif issubclass(kind, Enum):
        if isinstance(value, kind):
            return value
        if isinstance(value, str) and value in kind.__members__:
            return kind[value]
        raise ConfigurationError(
            f"{key}={value}: must be {item.rule()}.{nearest(str(value), kind.__members__)}{_about(item)}"
        )
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ConfigurationError(
        f"{key}={value}: not {_article(_type_name(kind))}. It must be {item.rule()}.{_about(item)}"
    )


def _about(item: PolicyField) -> str:
    return f" ({item.doc})" if item.doc else ""


def _configurable(kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        inner = [part for part in get_args(kind) if part is not type(None)]
        return len(inner) == 1 and len(get_args(kind)) == 2 and _configurable(inner[0])
    if origin is list:
        return _configurable(get_args(kind)[0]) and get_origin(get_args(kind)[0]) is not list
    return kind in _SCALARS or (isinstance(kind, type) and issubclass(kind, Enum))


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind).replace("typing.", "")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"
