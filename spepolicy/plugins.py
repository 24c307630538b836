"""Find installed plugins, and put together the plugin manager of one run.

Policies and reporters are found by entry point, the shipped ones by the same as a stranger's. A plugin that cannot be
used is reported with its reason and does not harm the others. Nothing is loaded when this module is imported, and
nothing heavy is imported to find out what is installed: the help and the bare command line come through here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np
import pluggy

from spepolicy.errors import ConfigurationError, HookError, PluginError, SpePolicyError, UnknownPolicyError, nearest
from spepolicy.hookspecs import ExplorerSpec, ObserverSpec, Ownership, PolicySpec, ReporterSpec
from spepolicy.policy_fields import checked_policy_fields, fields_of

__all__ = [
    "POLICIES",
    "REPORTERS",
    "PolicyInfo",
    "broken_plugins",
    "build_policy",
    "find_policy",
    "installed_policies",
    "installed_reporters",
    "make_plugin_manager",
]

POLICIES = "spepolicy.policies"
REPORTERS = "spepolicy.reporters"
PROJECT = "spepolicy"  # pluggy's project name, as in spepolicy.hookspecs
_SPECS = (PolicySpec, ReporterSpec, ExplorerSpec, ObserverSpec)


@dataclass(frozen=True)
class PolicyInfo:
    """One installed policy."""

    name: str
    cls: type
    summary: str  # first line of the docstring
    distribution: str
    version: str


@dataclass(frozen=True)
class _Scan:
    """What the entry points of one group gave."""

    found: Mapping[str, tuple[Any, EntryPoint]]
    broken: Mapping[str, str]


# ---- discovery -------------------------------------------------------------------------------------------------------


def installed_policies() -> dict[str, PolicyInfo]:
    """Return every usable policy by the name of its entry point in group `spepolicy.policies`, sorted by name."""
    return dict(_infos(tuple(sys.path)))


def installed_reporters() -> dict[str, object]:
    """Return an instance of every usable erratum reporter by its name in group `spepolicy.reporters`, sorted."""
    return {name: reporter for name, (reporter, _) in _reporters().found.items()}


def broken_plugins() -> dict[str, str]:
    """Return why a plugin cannot be used, by "group: name" of its entry point."""
    return {
        f"{group}: {name}": reason
        for group, scan in ((POLICIES, _policies()), (REPORTERS, _reporters()))
        for name, reason in scan.broken.items()
    }


def find_policy(name: str) -> PolicyInfo:
    """Return the installed policy *name*.

    Raises `UnknownPolicyError` if no plugin provides it, and `PluginError` with the reason if it cannot be used.
    """
    installed = installed_policies()
    if name in installed:
        return installed[name]
    reason = _policies().broken.get(name)
    if reason is not None:
        raise PluginError(f"policy '{name}' cannot be used: {reason}")
    raise UnknownPolicyError(name, installed)


def build_policy(name: str, fields: Mapping[str, Any]) -> object:
    """Return an instance of policy *name* with *fields*; a field that is not given has its default.

    Types, ranges and choices are checked against the dataclass and its metadata (`spepolicy.hookspecs.doc`). Raises
    `ConfigurationError` for a wrong field, `UnknownPolicyError` or `PluginError` as `find_policy`.
    """
    cls = find_policy(name).cls
    values = checked_policy_fields(fields_of(cls, name), fields, name)
    try:
        policy: object = cls(**values)
    except SpePolicyError:
        raise
    except Exception as error:
        raise PluginError(
            f"policy '{name}' does not accept its fields {values}: {type(error).__name__}: {error}. "
            f"See what it allows with: python -m spepolicy +policy={name} --help"
        ) from error
    return policy


@lru_cache(maxsize=8)
def _infos(path: tuple[str, ...]) -> Mapping[str, PolicyInfo]:
    """Reading what is known of a distribution parses its metadata: once is enough, a sweep asks a thousand times."""
    return {
        name: PolicyInfo(name, cls, _first_line(cls), *_origin(point))
        for name, (cls, point) in _scan(POLICIES, path).found.items()
    }


def _policies() -> _Scan:
    return _scan(POLICIES, tuple(sys.path))


def _reporters() -> _Scan:
    return _scan(REPORTERS, tuple(sys.path))


@lru_cache(maxsize=8)
def _scan(group: str, path: tuple[str, ...]) -> _Scan:
    """Load the entry points of *group*; *path* is sys.path, which decides what is installed."""
    by_name: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        by_name.setdefault(point.name, []).append(point)
    found: dict[str, tuple[Any, EntryPoint]] = {}
    broken: dict[str, str] = {}
    for name, points in by_name.items():
        if len(points) > 1:
            sources = " and ".join(" ".join(_origin(point)) for point in points)
            broken[name] = (
                f"{len(points)} installed distributions provide a plugin of that name: {sources}. A name must be "
                "unique. Uninstall one of them, or rename its entry point."
            )
            continue
        point = points[0]
        try:
            loaded = point.load()
            found[name] = (_checked_policy(loaded, name) if group == POLICIES else _instance(loaded), point)
        except (Exception, SystemExit) as error:  # whatever a stranger's module does when it is imported
            reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            broken[name] = f"{reason} (entry point {point.value} of {' '.join(_origin(point))}). Fix or uninstall it."
    return _Scan(found, broken)


def _checked_policy(loaded: Any, name: str) -> type:
    """Return the class if it is a policy whose fields can be configured and whose defaults obey their own rules."""
    cls = _checked_class(loaded)
    fields = fields_of(cls, name)
    try:
        defaults = {item.name: item.default for item in fields if not item.required}
        checked_policy_fields(tuple(item for item in fields if not item.required), defaults, name)
    except ConfigurationError as error:
        raise PluginError(f"the default {error}") from error
    return cls


def _checked_class(loaded: Any) -> type:
    if not inspect.isclass(loaded) or "__dataclass_fields__" not in loaded.__dict__:
        shown = loaded.__name__ if inspect.isclass(loaded) else f"a {type(loaded).__name__}"
        raise PluginError(
            f"{shown} is not a dataclass. A policy is a class decorated with @dataclass: its fields are its "
            "configuration"
        )
    if not _first_line(loaded):
        raise PluginError(
            f"{loaded.__name__} has no docstring. A policy's docstring says how it works, its first line in short"
        )
    return loaded


def _instance(loaded: Any) -> object:
    return loaded() if inspect.isclass(loaded) else loaded


def _first_line(cls: type) -> str:
    """Return the first line of the docstring, empty if there is none; @dataclass itself makes one up: its signature."""
    text = (cls.__doc__ or "").strip()
    return "" if text.startswith(f"{cls.__name__}(") else text.partition("\n")[0].strip()


def _origin(point: EntryPoint) -> tuple[str, str]:
    return (point.dist.name, point.dist.version) if point.dist else ("an unknown distribution", "?")


# ---- the manager of one run ------------------------------------------------------------------------------------------


def make_plugin_manager(policy: object, reporters: Sequence[object]) -> pluggy.PluginManager:
    """Return a new plugin manager with the hooks of `spepolicy.hookspecs`, one policy, and any reporters and observers.

    *policy* is registered under the name "policy". Raises `PluginError` if a plugin breaks the contract: a hook that
    does not exist, a method named like a hook but without @hookimpl, an argument that the hook does not have, a policy
    that is not a dataclass instance, has no docstring, a `State` that is no structured dtype, or no `stage2_fault`
    although its workload runs in a VM.
    """
    manager = pluggy.PluginManager(PROJECT)
    for spec in _SPECS:
        manager.add_hookspecs(spec)
    _check_policy(policy)
    _register(manager, policy, "policy")
    for reporter in reporters:
        _register(manager, _instance(reporter), f"{_label(reporter)}")
    if not manager.hook.stage2_fault.get_hookimpls() and _uses_stage2(manager, policy):
        raise PluginError(
            f"policy {_label(policy)} has no hook stage2_fault. Every policy must answer the SPU's stage 2 faults, "
            "with resume() or inject(Event). Only a bare-metal baseline, whose hook virtualization returns False, and "
            "a policy whose hook ownership says that the guest does not own the buffer have none."
        )
    return manager


def _register(manager: pluggy.PluginManager, plugin: object, name: str) -> None:
    _check_hooks(manager, plugin)
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        text = " ".join(str(error).split())
        raise PluginError(
            f"plugin {_label(plugin)} cannot be registered: {text}. See spepolicy/hookspecs.py."
        ) from error


def _check_policy(policy: object) -> None:
    cls = policy if inspect.isclass(policy) else type(policy)
    try:
        _checked_class(cls)
    except PluginError as error:
        raise PluginError(f"policy {_label(policy)}: {error}.") from None
    if inspect.isclass(policy):
        raise PluginError(f"policy {_label(policy)} is a class. Register an instance: {cls.__name__}().")
    state = getattr(cls, "State", None)
    if state is not None and not (isinstance(state, np.dtype) and state.names):
        raise PluginError(
            f"policy {_label(policy)}: State is {state!r}, not a structured dtype. It declares a row of memory a vCPU: "
            'State = np.dtype([("pinned_lo", "u8"), ...]); leave it out if the policy remembers nothing.'
        )


def _check_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    """Check names and arguments of the hooks that *plugin* implements, with messages of our own."""
    known = _hook_arguments()
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        method = getattr(plugin, attribute, None) if options is not None or attribute in known else None
        if options is None:
            if attribute in known and callable(method):
                raise PluginError(
                    f"plugin {_label(plugin)}: {attribute} is named like a hook but not marked, so it would never be "
                    "called. Decorate it with @hookimpl from spepolicy.hookspecs, or rename it."
                )
            continue
        hook = options.get("specname") or attribute
        if hook not in known:
            raise PluginError(
                f"plugin {_label(plugin)}: there is no hook '{hook}'. "
                f"Hooks are {', '.join(known)}.{nearest(hook, known)}"
            )
        extra = [name for name in _arguments(method) if name not in known[hook]]
        if extra:
            takes = ", ".join(known[hook]) or "no arguments"
            raise PluginError(
                f"plugin {_label(plugin)}: hook {hook} has no argument '{extra[0]}'; arguments are matched by name "
                f"and it offers {takes}.{nearest(extra[0], known[hook])}"
            )


def _uses_stage2(manager: pluggy.PluginManager, policy: object) -> bool:
    """Say whether the SPU of a guest under *policy* writes through stage 2."""
    hook, allowed = "virtualization", "True, False or None"
    try:
        if manager.hook.virtualization() is False:
            return False
        hook, allowed = "ownership", "an Ownership or None"
        return manager.hook.ownership() in (None, Ownership.GUEST)
    except Exception as error:
        raise HookError(
            f"policy {_label(policy)}: hook {hook} raised {type(error).__name__}: {error}. It must return {allowed}."
        ) from error


@cache
def _hook_arguments() -> dict[str, tuple[str, ...]]:
    """Return the arguments of every hook by its name, in the order of `spepolicy.hookspecs`."""
    return {
        name: _arguments(member)[1:]
        for spec in _SPECS
        for name, member in vars(spec).items()
        if hasattr(member, f"{PROJECT}_spec")
    }


def _arguments(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _label(plugin: object) -> str:
    cls = plugin if inspect.isclass(plugin) or inspect.ismodule(plugin) else type(plugin)
    return f"{getattr(cls, '__qualname__', cls.__name__)} ({getattr(cls, '__module__', cls.__name__)})"
