"""Hydra's and OmegaConf's errors in our words: which key, which value, the rule, and the nearest name that exists.

Hydra's own messages spread over many lines, and name classes and search paths that a user never chose. Nothing here
changes what is an error. A message that no rule below knows is passed on, without its internal lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import fields

from spepolicy.errors import nearest
from spepolicy.plugins import installed_policies
from spepolicy.policy_fields import fields_of
from spepolicy.schema import GROUPS, HOST_KINDS, setting_at, setting_names

__all__ = ["explain", "missing_choice", "unknown_setting"]

_NOUNS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "String": "text"}
_ADDED = ("policy", "experiment")  # groups without a default, chosen with +
_INTERNAL = re.compile(
    r"^\s*(full_key:|object_type|reference_type|See https?:|Config search path|provider=)|^\s*\^?\s*$"
)


def explain(error: BaseException) -> str:
    """Return one message for *error* and its causes, raised by Hydra or OmegaConf while composing a configuration."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(texts)
    override = getattr(error, "override", None)  # hydra.errors.OverrideParseException
    if override is not None:
        return (
            f"{override}: cannot be parsed as KEY=VALUE. A value with spaces, commas, brackets or quotes is written in "
            f"quotes, and these are protected from the shell: 'KEY=\"VALUE\"'."
        )
    for pattern, answer in _RULES:
        match = re.search(pattern, text, re.DOTALL)
        if match:
            return answer(match, text)
    return "; ".join(line.strip().rstrip(":") for line in text.splitlines() if not _INTERNAL.match(line))


def unknown_setting(key: str, owner: str = "") -> str:
    """Return the message for the setting *key* that does not exist, with the nearest that does.

    *owner* is the class that was asked for it: for policy.FIELD it says which policy is chosen.
    """
    group = key.partition(".")[0]
    if group == "policy":
        return _unknown_field(key, owner)
    name = key.removeprefix("host.").partition(".")[0]
    kinds = [
        kind for kind, cls in HOST_KINDS.items() if group == "host" and name in {item.name for item in fields(cls)}
    ]
    if kinds:
        return f"{key}: the chosen host has no such setting; it belongs to host={kinds[0]}. Add host={kinds[0]}."
    where = f"The group's settings: --help {group}." if group in GROUPS else "All groups: --help."
    if group == "hydra":
        return f"{key}: Hydra has no such setting. See --hydra-help."
    return f"{key}: there is no such setting.{nearest(key, [*setting_names(), *GROUPS])} {where}"


def missing_choice(group: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a file *name* that *group* does not have."""
    known = list(known)
    return f"{_plus(group)}={name}: group '{group}' has no '{name}'. It has {', '.join(known)}.{nearest(name, known)}"


def _unknown_field(key: str, owner: str) -> str:
    for info in installed_policies().values():
        if info.cls.__name__ == owner:
            known = [f"policy.{item.name}" for item in fields_of(info.cls, info.name)]
            have = f"It has {', '.join(known)}." if known else "It has no fields."
            return f"{key}: policy '{info.name}' has no such field.{nearest(key, known)} {have}"
    return f"{key}: there is no such setting. A policy's fields: +policy=NAME --help."


def _missing_file(match: re.Match[str], text: str) -> str:
    group, _, name = match["path"].rpartition("/")
    options = re.search(r"Available options in '[^']*':\n((?:\t[^\n]*\n?)+)", text)
    if options is None:
        return f"there is no configuration '{match['path']}'. All groups: --help."
    return missing_choice(group, name, options[1].split())


def _unknown_key(match: re.Match[str], text: str) -> str:
    asked = re.search(r"Could not override '([^']+)'", text)
    deeper = asked and match["full"].startswith(f"{asked[1]}.")
    return unknown_setting(asked[1] if asked and not deeper else match["full"], match["owner"]) + _place(text)


def _unconvertible(match: re.Match[str], text: str) -> str:
    noun = _NOUNS.get(match["type"], match["type"])
    return f"{match['full']}={match['value']}: not {noun}.{_rule(match['full'])}{_place(text)}"


def _null(match: re.Match[str], text: str) -> str:
    return f"{match['full']}=null: it must have a value.{_rule(match['full'])}{_place(text)}"


def _not_single(match: re.Match[str], text: str) -> str:
    return f"{match['full']}={match['value']}: not a single value.{_rule(match['full'])}{_place(text)}"


def _not_list(match: re.Match[str], text: str) -> str:
    given = re.search(r"Error merging override \S+?=(\S+)", text)
    example = f" Write {match['full']}=[{given[1]}]." if given else ""
    return f"{match['full']}: not a list.{example}{_rule(match['full'])}{_place(text)}"


def _is_group(match: re.Match[str], text: str) -> str:
    if "composing config" in text and "'policy/" in text:
        return "+policy: one run has one policy. To run several, sweep: -m +policy=NAME,NAME"
    key = match["full"]
    if not key:
        return f"{match['value']}: not a group of settings"
    return f"{key}={match['value']}: {key} is a group of settings. Set one of them: {key}.NAME=VALUE.{_place(text)}"


def _invalid(match: re.Match[str], text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if not _INTERNAL.match(line)]
    said = next((line for line in lines if not line.startswith(("Error merging override", "In '"))), lines[0])
    return f"{match['full']}: {said.rstrip('.')}.{_rule(match['full'])}{_place(text)}"


def _rule(key: str) -> str:
    setting = setting_at(key)
    if setting:
        return f" {setting.doc[0].upper()}{setting.doc[1:]} must be {setting.rule()}."
    if key.startswith("policy."):
        for info in installed_policies().values():
            for item in fields_of(info.cls, info.name):
                if f"policy.{item.name}" == key:
                    return f" It must be {item.rule()}."
    return ""


def _place(text: str) -> str:
    place = re.search(r"In '([^']+)': \w+ raised while composing config", text)
    return f" (in the file {place[1]}.yaml)" if place else ""


def _plus(group: str) -> str:
    return f"+{group}" if group in _ADDED else group


_FULL = r".*?full_key: (?P<full>[^\n]*)"
_RULES: tuple[tuple[str, Callable[[re.Match[str], str], str]], ...] = (
    (
        r"Could not override '(?P<group>[^']+)'\. No match in the defaults list\.\n.*?use (?P<added>\S+)",
        lambda m, _: f"{m['added'].lstrip('+')}: group '{m['group']}' has no default to change. Use {m['added']}.",
    ),
    (r"Could not find '(?P<path>[^']*)'", _missing_file),
    (
        r"Could not override '(?P<key>[^']+@[^']*)'",
        lambda m, _: f"{m['key']}: a group's place cannot be changed. Write {m['key'].partition('@')[0]}=NAME.",
    ),
    (rf"Key '[^']*' not in '(?P<owner>[^']*)'{_FULL}", _unknown_key),
    (rf"Invalid value assigned: \w+ is not a ListConfig, list or tuple\.{_FULL}", _not_list),
    (rf"Value '(?P<value>.*?)' of type '[^']*' could not be converted to (?P<type>\w+){_FULL}", _unconvertible),
    (rf"Value '(?P<value>.*?)' is not a valid (?P<type>bool)\b{_FULL}", _unconvertible),
    (rf"field '[^']*' is not Optional{_FULL}", _null),
    (rf"Cannot convert '\w+' to string: '(?P<value>.*?)'\n{_FULL}", _not_single),
    (rf"is not a subclass of \w+\. value: (?P<value>[^\n]*)\n{_FULL}", _is_group),
    (
        r"An item is already at '(?P<key>[^']+)'\.\s+Either remove \+ prefix: '(?P<plain>.*?)'\n",
        lambda m, _: f"+{m['plain']}: {m['key']} has a value already. Change it without the +: {m['plain']}",
    ),
    (
        r"^(?P<group>\S+) appears more than once in the final defaults list",
        lambda m, _: (
            f"+{m['group']}: a file of group {m['group']} is chosen already. Write {m['group']}=NAME without +."
        ),
    ),
    (
        r"Ambiguous value for argument '(?P<word>.*?)'\n",
        lambda m, _: (
            f"{m['word']}: several values, but no sweep. Add -m to run each of them, or write [a,b] for a list."
        ),
    ),
    (
        r"Sweep parameters '(?P<word>.*?)' requires --multirun",
        lambda m, _: f"{m['word']}: stands for several values. Add -m to run each of them.",
    ),
    (
        r"Multiple values for (?P<group>[^.\n]+)\.",
        lambda m, _: f"group {m['group']} is chosen more than once. Choose one, or sweep: -m {_plus(m['group'])}=A,B.",
    ),
    (
        r"Could not delete from config\. '(?P<key>[^']+)' does not exist",
        lambda m, _: f"~{unknown_setting(m['key'])}",
    ),
    (
        rf"does not support deletion{_FULL}",
        lambda m, _: f"~{m['full']}: a setting cannot be deleted. Set another value: {m['full']}=VALUE.",
    ),
    (
        r"Interpolation key '(?P<key>[^']+)' not found",
        lambda m, _: f"${{{m['key']}}}: a value refers to a setting that does not exist. {unknown_setting(m['key'])}",
    ),
    (_FULL[3:], _invalid),
)
