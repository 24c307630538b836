"""What the command line prints about itself: the installed policies, the groups, one policy, one group.

It reads the plugins, the schema and the files of `conf/`, and imports neither Hydra nor numba: it answers at once.
"""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from spepolicy.machine.guestacts import GuestAct
from spepolicy.plugins import PolicyInfo, broken_plugins, find_policy, installed_policies
from spepolicy.policy_fields import fields_of
from spepolicy.schema import (
    GROUPS,
    HOST_KINDS,
    MIGRATION_KINDS,
    ActSettings,
    OutputSettings,
    RandomOpSettings,
    Root,
    Setting,
    setting_at,
    setting_names,
    settings_of,
)
from spepolicy.version import program_version

__all__ = ["EXAMPLE", "conf_names", "group_help", "overview", "policy_help", "policy_list"]

EXAMPLE = "python -m spepolicy +policy=eager_pin"
CONF = "spepolicy_conf"

_EXAMPLES = (
    (EXAMPLE, "the main job: one policy beside bare metal and a pinned VM"),
    (f"{EXAMPLE} policy.keep_mapped=true", "with a field of the policy"),
    (f"{EXAMPLE} guest=el0_only host=random seed=7", "another guest, another host, other draws"),
    (f"{EXAMPLE} guest.buffer=16MiB costs.trap=6us", "single settings, with their units"),
    ("python -m spepolicy -m +policy=eager_pin,pin_on_fault guest.buffer=1MiB,4MiB", "a sweep: every combination"),
    ("python -m spepolicy +experiment=first_look", "a ready question"),
)
_FLAGS = (
    ("-h, --help [GROUP]", "this page, the settings of a group, or with +policy=NAME the fields of a policy"),
    ("--version", "the version"),
    ("-m, --multirun", "run every combination of the comma-separated values"),
    ("--cfg job", "print the composed configuration and stop"),
    ("--info defaults-tree", "print which file each part comes from and stop"),
    ("--completion bash", 'print shell completion; use it with: eval "$(python -m spepolicy --completion bash)"'),
    ("--hydra-help", "all flags of Hydra, which composes the configuration"),
)


def policy_list() -> str:
    """Return the installed policies with a line each, and how to choose one."""
    policies = installed_policies()
    if policies:
        width = max(len(name) for name in policies)
        lines = ["Installed policies:", *(f"  {name:<{width}}  {info.summary}" for name, info in policies.items())]
        lines += [
            "",
            f"Choose one with +policy=NAME, for example: {EXAMPLE}",
            "See also --help, and +policy=NAME --help.",
        ]
    else:
        lines = ["No policy is installed. Install the project with its entry points: python -m pip install -e ."]
    return "\n".join([*lines, *_broken_lines()])


def overview() -> str:
    """Return the page of --help."""
    lines = [
        f"spepolicy {program_version()}: KVM policies for Arm's SPE (Statistical Profiling Extension), tried before "
        "they are written.",
        "",
        "Usage: python -m spepolicy +policy=NAME [policy.FIELD=VALUE] [GROUP=NAME] [GROUP.SETTING=VALUE] ... [-m]",
        "",
        policy_list(),
        "",
        "Groups, chosen with GROUP=NAME (* is the default; --help GROUP prints the settings):",
        *_table(_group_lines()),
        "",
        "Settings without a group:",
        *_table(_root_lines()),
        "",
        "Examples:",
    ]
    for command, meaning in _EXAMPLES:
        lines += [f"  {command}", f"      {meaning}"]
    return "\n".join([*lines, "", "Flags:", *_table(_FLAGS)])


def policy_help(name: str) -> str:
    """Return what the policy's docstring says, and its fields with type, default, range and meaning."""
    info = find_policy(name)
    lines = [f"{name}, from {info.distribution} {info.version}", "", inspect.cleandoc(info.cls.__doc__ or ""), ""]
    rows = list(_field_rows(info))
    if not rows:
        return "\n".join([*lines, "It has no fields."])
    lines.append("Fields, set with policy.FIELD=VALUE:")
    return "\n".join([*lines, *_table(rows)])


def group_help(group: str) -> str:
    """Return the files of a group with what each is for, and the group's settings with range, meaning and source."""
    if group == "policy":
        return policy_list()
    lines = [f"{group}: {GROUPS[group]}", "", f"Choose with {'+' if group == 'experiment' else ''}{group}=NAME:"]
    lines += _table((name, _head_comment(group, name)) for name in conf_names(group))
    rows = list(_setting_rows(group))
    if rows:
        lines += ["", f"Settings, set with {group}.SETTING=VALUE:", *_table(rows)]
    return "\n".join(lines)


def conf_names(group: str) -> list[str]:
    """Return the names of the files that the package has for *group*."""
    folder = files(CONF).joinpath(group)
    if not folder.is_dir():
        return []
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


# ---- rows ------------------------------------------------------------------------------------------------------------


def _group_lines() -> Iterator[tuple[str, str]]:
    chosen = _defaults()
    for group, purpose in GROUPS.items():
        names = [f"{name}*" if chosen.get(group) == name else name for name in conf_names(group)]
        yield group, f"{purpose}{': ' + ', '.join(names) if names and group != 'policy' else ''}"


def _root_lines() -> Iterator[tuple[str, str]]:
    for name, setting in settings_of(Root).items():
        if name not in GROUPS:
            value = _main_config().get(name)
            yield f"{name}={_shown(value)}", f"{setting.doc}; {setting.rule()}"
    for name, setting in settings_of(OutputSettings).items():
        yield f"output.{name}={_shown(_main_config()['output'][name])}", setting.doc


def _setting_rows(group: str) -> Iterator[tuple[str, str]]:
    if group == "host":
        for kind, cls in HOST_KINDS.items():
            for name, setting in settings_of(cls).items():
                if name != "kind":
                    yield f"host.{name}", f"{_described(setting)} (host={kind})"
        for name, setting in settings_of(RandomOpSettings).items():
            yield f"host.ops.OPERATION.{name}", f"{_described(setting)} (host=random)"
        return
    if group == "migration":
        for kind, cls in MIGRATION_KINDS.items():
            for name, setting in settings_of(cls).items():
                if name != "kind":
                    yield f"migration.{name}", f"{_described(setting)} (migration={kind})"
        return
    if group == "guest":
        for name, setting in settings_of(ActSettings).items():
            yield (
                f"guest.misbehaviour.ACT.{name}",
                f"{_described(setting)}; acts: {', '.join(act.name.lower() for act in GuestAct)}",
            )
    for key in setting_names():
        found = setting_at(key)
        if found and key.startswith(f"{group}."):
            yield key, _described(found)


def _described(setting: Setting) -> str:
    return "; ".join([setting.doc, setting.rule(), *([f"source: {setting.source}"] if setting.source else [])])


def _field_rows(info: PolicyInfo) -> Iterator[tuple[str, str]]:
    for item in fields_of(info.cls, info.name):
        default = "=VALUE (required)" if item.required else f"={_shown(item.default)}"
        kind = item.type_name if item.type in (int, float) else ""
        parts = [item.doc, kind, item.rule(), f"source: {item.source}" if item.source else ""]
        yield f"policy.{item.name}{default}", "; ".join(part for part in dict.fromkeys(parts) if part)


def _broken_lines() -> list[str]:
    broken = broken_plugins()
    if not broken:
        return []
    return ["", "Installed, but cannot be used:", *_table(broken.items())]


# ---- files -----------------------------------------------------------------------------------------------------------


@cache
def _main_config() -> Mapping[str, Any]:
    import yaml

    content: Mapping[str, Any] = yaml.safe_load(_conf_file("config.yaml").read_text(encoding="utf-8"))
    return content


def _defaults() -> dict[str, str]:
    return {key: value for item in _main_config()["defaults"] if isinstance(item, dict) for key, value in item.items()}


def _head_comment(group: str, name: str) -> str:
    """Return the first sentence of the comment that a file begins with."""
    text = []
    for line in _conf_file(f"{group}/{name}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.strip() == "#":
            break
        if not line.startswith("# @package"):
            text.append(line.lstrip("# ").strip())
    return re.split(r"(?<=[.?]) ", " ".join(text), maxsplit=1)[0]


def _conf_file(path: str) -> Traversable:
    return files(CONF).joinpath(path)


# ---- print -----------------------------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """Return *value* as one writes it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list | tuple):
        return f"[{','.join(_shown(item) for item in value)}]"
    return str(value)


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return the rows in two columns, the second wrapped to the width of the terminal."""
    pairs = list(rows)
    width = max(60, min(120, shutil.get_terminal_size((110, 24)).columns))
    left = min(max((len(name) for name, _ in pairs), default=0), 36)
    lines: list[str] = []
    for name, text in pairs:
        wrapped = textwrap.wrap(text, width - left - 4, break_long_words=False) or [""]
        if len(name) > left:
            lines.append(f"  {name}")
            name = ""
        lines.append(f"  {name:<{left}}  {wrapped[0]}".rstrip())
        lines += [f"  {'':<{left}}  {line}" for line in wrapped[1:]]
    return lines
